{
use dmsnap::{CowSize, SnapshotOptions, Store};

let snapshot = SnapshotOptions::new()
    .store(Store::PersistentOverflow)
    .make_cow(CowSize::Bytes(2 << 30))
    .create("/images/base.ext4", "/var/lib/vms/vm-42.cow", "vm-42")?;
snapshot.cleanup()?;
Ok::<(), dmsnap::Error>(())
}
