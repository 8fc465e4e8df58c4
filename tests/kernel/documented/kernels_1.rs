{
use dmsnap::{CowSize, ErrorKind, SectorSize, SnapshotOptions};

let mut options = SnapshotOptions::new();
options.make_cow(CowSize::WorstCase).sector_size(SectorSize::Bytes4096);
let disk = match options.discard(true).create("/images/base.ext4", "/run/vm-42.cow", "vm-42") {
    Err(error) if error.kind() == ErrorKind::Unsupported => {
        eprintln!("without discard, as this kernel cannot: {}", error.one_line());
        options.discard(false).create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?
    }
    answer => answer?,
};
disk.cleanup()?;
Ok::<(), dmsnap::Error>(())
}
