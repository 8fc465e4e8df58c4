{
use dmsnap::{CowSize, SnapshotOptions};

let snapshot = SnapshotOptions::new()
    .make_cow(CowSize::WorstCase)
    .create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?;
println!("boot from {}", snapshot.device().display()); // /dev/dm-3, open it at once
// ... the VM runs, this process may come and go; when the VM has exited:
snapshot.cleanup()?;
Ok::<(), dmsnap::Error>(())
}
