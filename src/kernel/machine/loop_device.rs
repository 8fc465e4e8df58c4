//! Attaches, inspects and detaches loop devices.
//!
//! With the feature `loopdev` that crate opens the nodes and detaches. It has no `LOOP_CONFIGURE`,
//! `LOOP_GET_STATUS64` or control fd without an open in the same call; those go through `sys.rs` on its fds. So does
//! `LOOP_SET_CAPACITY`, which the crate asks for through a node that is open for writing: its close wakes udev's watch.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, fstat};

use super::loop_crate::{Control, Node};
use crate::base::{DeviceNumber, FileId};
use crate::error::errno_of;
use crate::kernel::seam::{Label, LoopStatus};
use crate::kernel::sys;

/// Returns the node of the loop device with that device number; ENOTBLK for a device that is no loop device.
pub(crate) fn node_of(number: DeviceNumber) -> Result<PathBuf, Errno> {
    let sysfs = PathBuf::from(format!("/sys/dev/block/{number}"));
    let leads_to = fs::read_link(&sysfs).map_err(|error| errno_of(&error))?;
    let bound = |_: &&OsStr| sysfs.join("loop").exists();
    let name = leads_to.file_name().filter(bound);
    Ok(Path::new("/dev").join(name.ok_or(Errno::ENOTBLK)?))
}

/// Returns the path of the file behind the loop device, as sysfs has it (`loop/backing_file`): with ` (deleted)` at its
/// end if the file has been unlinked.
pub(crate) fn backing_path(number: DeviceNumber) -> Result<PathBuf, Errno> {
    let read = fs::read(format!("/sys/dev/block/{number}/loop/backing_file"));
    let mut bytes = read.map_err(|error| errno_of(&error))?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// Returns the numbers of the loop devices that are attached read-only, from sysfs alone, without opening any.
pub(crate) fn read_only() -> Vec<u32> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let number = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let number = name.to_str()?.strip_prefix("loop")?.parse().ok()?;
        let bound = entry.path().join("loop").exists();
        let read_only = || fs::read_to_string(entry.path().join("ro")).is_ok_and(|ro| ro == "1\n");
        (bound && read_only()).then_some(number)
    };
    entries.filter_map(number).collect()
}

/// The open node `/dev/loop-control`.
#[derive(Debug)]
pub(crate) struct LoopControl(Control);

impl LoopControl {
    pub(crate) fn open() -> Result<Self, Errno> {
        Control::open().map(Self)
    }

    /// Returns the number of a device that was free a moment ago (`LOOP_CTL_GET_FREE`).
    pub(crate) fn find_free(&self) -> Result<u32, Errno> {
        sys::loop_find_free(self.0.as_fd())
    }

    /// Makes the device of that number (`LOOP_CTL_ADD`).
    pub(crate) fn add(&self, number: u32) -> Result<(), Errno> {
        sys::loop_add(self.0.as_fd(), number)
    }
}

/// An open node of a loop device. Closing it detaches the device if that has autoclear and nobody else has it open.
#[derive(Debug)]
pub(crate) enum LoopDevice {
    /// The node is open for reading and writing, as it must be to attach a COW file.
    Writable(Node),
    /// The node is open for reading: a device that is attached through it is read-only, and its close does not wake
    /// udev's watch.
    ReadOnly(OwnedFd),
}

/// Describes a lock of the whole node, on which there are no other locks of this kind.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the C library's own constants for these fields"
)]
const MARK: libc::flock = libc::flock {
    l_type: libc::F_WRLCK as libc::c_short,
    l_whence: libc::SEEK_SET as libc::c_short,
    l_start: 0,
    l_len: 0,
    l_pid: 0,
};

impl LoopDevice {
    pub(crate) fn open(path: &Path, writable: bool) -> Result<Self, Errno> {
        if writable {
            Node::open(path).map(Self::Writable)
        } else {
            // `O_NONBLOCK` keeps the open from blocking if the path is a FIFO's.
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            open(path, flags, Mode::empty()).map(Self::ReadOnly)
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Writable(node) => node.as_fd(),
            Self::ReadOnly(fd) => fd.as_fd(),
        }
    }

    /// Attaches `backing` with `LO_FLAGS_*` flags in one call (`LOOP_CONFIGURE`).
    pub(crate) fn attach(
        &self,
        backing: BorrowedFd<'_>,
        flags: u32,
        sector_bytes: u32,
        path: &Path,
    ) -> Result<(), Errno> {
        sys::loop_configure(
            self.fd(),
            backing,
            flags,
            sector_bytes,
            path.as_os_str().as_encoded_bytes(),
        )
    }

    /// Locks the node (`flock`), as udev does before it probes one. Closing the node frees the lock.
    pub(crate) fn lock(&self, exclusive: bool) -> Result<(), Errno> {
        sys::lock(self.fd(), exclusive)
    }

    /// Marks the node with a lock of another kind (`F_OFD_SETLK`), which no probe takes and no `flock` conflicts with.
    /// Closing the node frees it.
    pub(crate) fn mark(&self) -> Result<(), Errno> {
        fcntl(self.fd(), FcntlArg::F_OFD_SETLK(&MARK)).map(drop)
    }

    /// True if another open file has marked the node.
    pub(crate) fn is_marked(&self) -> Result<bool, Errno> {
        let mut mark = MARK;
        fcntl(self.fd(), FcntlArg::F_OFD_GETLK(&mut mark))?;
        Ok(mark.l_type == MARK.l_type)
    }

    pub(crate) fn detach(&self) -> Result<(), Errno> {
        match self {
            Self::Writable(node) => node.detach(),
            Self::ReadOnly(_) => Err(Errno::EBADF),
        }
    }

    /// Sets the device's size to the backing file's present one (`LOOP_SET_CAPACITY`).
    pub(crate) fn resize(&self) -> Result<(), Errno> {
        sys::loop_set_capacity(self.fd())
    }

    pub(crate) fn number(&self) -> Result<DeviceNumber, Errno> {
        Ok(DeviceNumber::from_dev_t(fstat(self.fd())?.st_rdev))
    }

    pub(crate) fn status(&self) -> Result<LoopStatus, Errno> {
        let info = sys::loop_status(self.fd())?;
        Ok(LoopStatus {
            backing: FileId {
                dev: DeviceNumber::from_kernel(info.device),
                inode: info.inode,
            },
            autoclear: info.flags & sys::LO_AUTOCLEAR != 0,
            direct_io: info.flags & sys::LO_DIRECT_IO != 0,
            offset_bytes: info.offset,
            limit_bytes: info.sizelimit,
            label: Label(info.file_name),
        })
    }

    /// Returns the device's `diskseq`, which is new each time a file is attached (`BLKGETDISKSEQ`, Linux 5.15 and
    /// later).
    pub(crate) fn diskseq(&self) -> Result<u64, Errno> {
        sys::block_diskseq(self.fd())
    }

    pub(crate) fn size_bytes(&self) -> Result<u64, Errno> {
        sys::block_size_bytes(self.fd())
    }

    pub(crate) fn sector_bytes(&self) -> Result<u32, Errno> {
        sys::block_sector_bytes(self.fd())
    }
}
