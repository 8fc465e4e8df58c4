{
use dmsnap::{CowSize, Durability, SnapshotOptions};

let cow = "/run/vm-42.cow";
let snapshot = SnapshotOptions::new()
    .durability(Durability::ThrowAway)
    .make_cow(CowSize::WorstCase)
    .create("/images/base.ext4", cow, "vm-42")?;
std::fs::remove_file(cow)?; // its space is freed when the loop device goes
// ... when the VM has exited:
snapshot.cleanup()?;
Ok::<(), Box<dyn std::error::Error>>(())
}
