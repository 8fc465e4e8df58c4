{
use dmsnap::{CowSize, SnapshotOptions, Store};

fn main() -> dmsnap::Result<()> {
    let snapshot = SnapshotOptions::new()
        .store(Store::PersistentOverflow)
        .make_cow(CowSize::WorstCase) // sparse: it takes what is written
        .create("/images/base.ext4", "/var/lib/vms/vm-42.cow", "vm-42")?;
    println!("boot from {}", snapshot.device().display()); // /dev/dm-3: open it at once
    let handles = snapshot.into_handles(); // plain data: store it, this process may go away

    // When the VM has exited and was waited for, from this process or another one:
    dmsnap::cleanup(&handles)?;
    std::fs::remove_file("/var/lib/vms/vm-42.cow").ok(); // the COW file is yours: keep it or delete it
    Ok(())
}
main()
}
