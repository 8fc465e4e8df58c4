{
use std::os::unix::fs::chown;
use std::path::Path;

use dmsnap::{CowSize, SnapshotOptions};
use nix::sys::stat::{Mode, SFlag, mknod};

let snapshot = SnapshotOptions::new()
    .make_cow(CowSize::WorstCase)
    .create("/images/base.ext4", "/var/lib/vms/vm-42.cow", "vm-42")?;
let dev = snapshot.handles().dev.expect("a snapshot that was made has its number");
let node = Path::new("/srv/jailer/firecracker/vm-42/root/disk"); // the VMM's `path_on_host` is /disk
mknod(node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, dev.to_dev_t())?;
chown(node, Some(123), Some(100))?;
Ok::<(), Box<dyn std::error::Error>>(())
}
