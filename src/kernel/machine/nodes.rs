//! Makes loop devices' nodes in a /dev that the kernel does not fill, such as a container's copy.
//!
//! They are made from the device numbers in sysfs, under the usual path, so that all processes with that /dev lock the
//! same node. dmsnap's nodes are known by a file mode that devtmpfs, udev and container engines never use, and are
//! removed when their loop device is free.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::base::DeviceNumber;

/// The mode of dmsnap's nodes: read and write for the owner, and the sticky bit, which means nothing on a node.
const OURS: u32 = 0o1600;

/// True if this process has met a /dev without the kernel's nodes.
static MET: AtomicBool = AtomicBool::new(false);

/// Notes that nodes are missing in /dev: from now on removals look for nodes to remove.
pub(super) fn note_missing() {
    MET.store(true, Ordering::Relaxed);
}

/// Makes the missing node of an existing loop device; returns true if there is a node to open now.
///
/// In a devtmpfs it makes none: the kernel does, a moment after sysfs shows the device, and another node would stay.
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

/// True if the kernel makes the nodes below /dev.
fn is_devtmpfs() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The mount that was made last hides the others.
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

/// Removes dmsnap's nodes of loop devices that are free and that nobody is about to attach a file to.
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

/// Removes the node unless it is locked: a `create` locks the node from before it attaches the file until the snapshot
/// is live.
fn remove_unlocked(node: &Path) {
    let Ok(open) = fs::File::open(node) else {
        return;
    };
    if crate::kernel::sys::lock(std::os::fd::AsFd::as_fd(&open), true).is_ok() {
        let _ = fs::remove_file(node);
    }
}
