//! Makes and removes `/dev/mapper/<name>`, the alias that people and tools look for.
//!
//! It is a symlink to `/dev/dm-N`, in a spelling that only dmsnap uses. Where /dev is no devtmpfs and has no
//! `/dev/dm-N`, it is a block device node instead.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use super::nodes;
use crate::base::DeviceNumber;
use crate::error::{Step, Verdict, errno_of, policy};

/// What the target of dmsnap's aliases begins with. No other program spells the path to a dm device so.
const SPELLING: &str = "/dev/mapper/../dm-";

/// Returns the device's node if /dev has it, as a devtmpfs does for as long as the device is there.
pub(crate) fn find_node(number: DeviceNumber) -> Option<PathBuf> {
    Some(number.dm_node()).filter(|node| leads_to(node, number))
}

/// Makes the alias of the device `number`, whose node is `node`, and replaces a stale one.
///
/// Whatever is at `path` is stale, as the kernel has just given the name to this device alone. Still, only links and
/// block device nodes are replaced.
pub(crate) fn make(path: &Path, number: DeviceNumber, node: Option<&Path>) -> Result<(), Errno> {
    let place = || match node {
        Some(_) => {
            symlink(format!("{SPELLING}{}", number.minor()), path).map_err(|error| errno_of(&error))
        }
        None => {
            nodes::note_missing();
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknod(path, SFlag::S_IFBLK, mode, number.to_dev_t())
        }
    };
    match place() {
        Err(errno) if policy::verdict(Step::Link, errno) == Verdict::NameTaken => {
            remove_stale(path, errno)?;
            place()
        }
        other => other,
    }
}

fn remove_stale(path: &Path, taken: Errno) -> Result<(), Errno> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.is_symlink() && !found.file_type().is_block_device() {
        return Err(taken);
    }
    unlink(path).map(drop)
}

/// Removes the alias if it leads to the device `number`; returns true if it did.
pub(crate) fn remove(path: &Path, number: DeviceNumber) -> Result<bool, Errno> {
    let ours = match fs::read_link(path) {
        Ok(target) => target.file_name() == number.dm_node().file_name(),
        Err(error) => match fs::symlink_metadata(path) {
            Ok(found) if found.is_symlink() => return Err(errno_of(&error)),
            _ => {
                nodes::note_missing();
                leads_to(path, number)
            }
        },
    };
    if ours { unlink(path) } else { Ok(false) }
}

/// Unlinks a path; returns false if there was nothing.
fn unlink(path: &Path) -> Result<bool, Errno> {
    match nix::unistd::unlink(path) {
        Err(errno) if policy::verdict(Step::Unlink, errno) == Verdict::Gone => Ok(false),
        other => other.map(|()| true),
    }
}

/// True if the path is a link in dmsnap's spelling, whether or not its device is still there.
pub(crate) fn is_ours(path: &Path) -> bool {
    fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with(SPELLING))
}

fn leads_to(path: &Path, number: DeviceNumber) -> bool {
    let found = nix::sys::stat::lstat(path);
    let is_block = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFBLK;
    found.is_ok_and(|found| is_block(found.st_mode) && found.st_rdev == number.to_dev_t())
}
