{
use dmsnap::{SectorSize, SnapshotOptions};

// Chunks are 8 sectors of 512 bytes: 4096 bytes, as the disk's sectors.
let snapshot = SnapshotOptions::new()
    .sector_size(SectorSize::Bytes4096)
    .discard(true)
    .create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?;
snapshot.cleanup()?;
Ok::<(), dmsnap::Error>(())
}
