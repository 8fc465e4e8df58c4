//! The nodes of loop devices by `loopdev`, whose only importer this is but for the borrowing of its descriptors in
//! `sys.rs`: it opens the nodes and detaches. Without the feature of its name `loop_plain.rs` stands here.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::error::errno_of;
use crate::kernel::sys;

/// `/dev/loop-control`, open.
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

/// `/dev/loopN`, open for reading and writing.
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
