//! Nodes of loop devices in a /dev that the kernel does not fill, as a container's copy of one.
//!
//! They are made from the numbers that sysfs tells, at the path where everybody looks, so that the lock on a node is the
//! same for all who share that /dev. Ours are known by a mode that devtmpfs, udev and container engines give to none, and
//! go once their loop device is free.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::base::DeviceNumber;

/// Read and write for the owner, and the sticky bit, which means nothing on a node.
const OURS: u32 = 0o1600;

/// Whether this process has met a /dev without the kernel's nodes.
static MET: AtomicBool = AtomicBool::new(false);

/// From now on removals look for nodes to remove.
pub(super) fn note_missing() {
    MET.store(true, Ordering::Relaxed);
}

/// Makes the node of a loop device that is there and has none; says whether it is worth opening now.
///
/// In a devtmpfs the kernel makes it, a moment after sysfs shows the device, and one of ours would stay for ever.
pub(super) fn make_for_loop(node: &Path) -> bool {
    if fs::symlink_metadata(node).is_ok() || is_devtmpfs() {
        return false;
    }
    let name = node.file_name().unwrap_or_default();
    let number = fs::read_to_string(Path::new("/sys/block").join(name).join("dev"));
    let number = number.ok().and_then(|text| text.trim().parse().ok());
    let Some(number): Option<DeviceNumber> = number else {
        return false;
    };
    note_missing();
    let mode = Mode::from_bits_truncate(OURS);
    match mknod(node, SFlag::S_IFBLK, mode, number.to_dev_t()) {
        Ok(()) => {
            // The umask of the process may have taken something off the mode.
            let _ = fs::set_permissions(node, fs::Permissions::from_mode(OURS));
            true
        }
        Err(errno) => errno == Errno::EEXIST,
    }
}

/// Whether the kernel makes the nodes below /dev.
fn is_devtmpfs() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The last one mounted there is the one that is seen.
    let at_dev = |line: &&str| line.split(' ').nth(4) == Some("/dev");
    let kind = |line: &str| {
        line.split_once(" - ")?
            .1
            .split(' ')
            .next()
            .map(str::to_owned)
    };
    mounts.lines().rfind(at_dev).and_then(kind).as_deref() == Some("devtmpfs")
}

/// Removes our nodes of loop devices that are free and that nobody is about to bind.
pub(super) fn sweep() {
    if !MET.load(Ordering::Relaxed) {
        return;
    }
    for entry in fs::read_dir("/dev").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_loop = name.as_encoded_bytes().starts_with(b"loop");
        let ours = |found: &fs::Metadata| {
            found.file_type().is_block_device() && found.mode() & 0o7777 == OURS
        };
        let bound = || Path::new("/sys/block").join(&name).join("loop").exists();
        if is_loop && entry.metadata().is_ok_and(|found| ours(&found)) && !bound() {
            remove_unlocked(&entry.path());
        }
    }
}

/// A maker locks the node that it has opened, from before it binds the device until the snapshot is live.
fn remove_unlocked(node: &Path) {
    let Ok(open) = fs::File::open(node) else {
        return;
    };
    if crate::kernel::sys::lock(std::os::fd::AsFd::as_fd(&open), true).is_ok() {
        let _ = fs::remove_file(node);
    }
}
