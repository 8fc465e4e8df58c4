//! `/dev/mapper/<name>`, the alias that people and tools look for.
//!
//! A symlink to `/dev/dm-N`, written absolute where udev's are relative: that is how ours are known. Where /dev is
//! no devtmpfs and has no `/dev/dm-N`, it is a block device node instead.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::error::Step;
use crate::name::DeviceNumber;
use crate::policy::{self, Verdict};

/// Makes the alias; replaces a stale one. Returns the path that leads to the device without it, if there is one.
///
/// Whatever stands at `path` is stale: the kernel has just given the name to our device alone. Only links and
/// block device nodes are replaced all the same.
pub(crate) fn make(path: &Path, number: DeviceNumber) -> Result<PathBuf, Errno> {
    let node = number.dm_node();
    let has_node = leads_to(&node, number);
    let place = |at: &Path| match has_node {
        true => symlink(&node, at).map_err(errno_of),
        false => mknod(
            at,
            SFlag::S_IFBLK,
            Mode::S_IRUSR | Mode::S_IWUSR,
            number.to_dev_t(),
        ),
    };
    match place(path) {
        Err(errno) if policy::verdict(Step::Link, errno) == Verdict::NameTaken => {
            replace(path, errno, place)?
        }
        other => other?,
    }
    Ok(if has_node { node } else { path.to_owned() })
}

fn replace(
    path: &Path,
    taken: Errno,
    place: impl Fn(&Path) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let kind = fs::symlink_metadata(path).map_err(errno_of)?.file_type();
    if !kind.is_symlink() && !kind.is_block_device() {
        return Err(taken);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}", std::process::id()));
    place(&beside)?;
    fs::rename(&beside, path).map_err(|error| {
        let _ = fs::remove_file(&beside);
        errno_of(error)
    })
}

/// Removes the alias if it leads to the device `number`; says whether it did.
pub(crate) fn remove(path: &Path, number: DeviceNumber) -> Result<bool, Errno> {
    let ours = match fs::read_link(path) {
        Ok(target) => target.file_name() == number.dm_node().file_name(),
        Err(_) => leads_to(path, number),
    };
    if !ours {
        return Ok(false);
    }
    match fs::remove_file(path).map_err(errno_of) {
        Err(errno) if policy::verdict(Step::Unlink, errno) == Verdict::Gone => Ok(false),
        other => other.map(|()| true),
    }
}

/// Whether it is a link in our spelling, wherever that leads by now.
pub(crate) fn is_ours(path: &Path) -> bool {
    fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/dev/dm-"))
}

fn leads_to(path: &Path, number: DeviceNumber) -> bool {
    let found = fs::symlink_metadata(path);
    found
        .is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == number.to_dev_t())
}

fn errno_of(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
