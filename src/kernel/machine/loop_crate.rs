//! Opens loop devices' nodes and detaches them through the crate `loopdev`. No other file imports it, but for `sys.rs`,
//! which borrows its descriptors. Without the feature `loopdev`, `loop_plain.rs` takes the place of this file.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::error::errno_of;
use crate::kernel::sys;

/// The open node `/dev/loop-control`.
#[derive(Debug)]
pub(crate) struct Control(loopdev::LoopControl);

impl Control {
    pub(crate) fn open() -> Result<Self, Errno> {
        let opened = loopdev::LoopControl::open();
        opened.map(Self).map_err(|error| errno_of(&error))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::fd_of_loop_control(&self.0)
    }
}

/// A node `/dev/loopN`, open for reading and writing.
#[derive(Debug)]
pub(crate) struct Node(loopdev::LoopDevice);

impl Node {
    pub(crate) fn open(path: &Path) -> Result<Self, Errno> {
        let opened = loopdev::LoopDevice::open(path);
        opened.map(Self).map_err(|error| errno_of(&error))
    }

    pub(crate) fn detach(&self) -> Result<(), Errno> {
        self.0.detach().map_err(|error| errno_of(&error))
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::fd_of_loop_device(&self.0)
    }
}
