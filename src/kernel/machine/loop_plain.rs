//! Opens loop devices' nodes and detaches them without the crate `loopdev`, by the same calls as `loop_crate.rs`.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::error::errno_of;
use crate::kernel::seam::LOOP_CONTROL;
use crate::kernel::sys;

fn open(path: &Path) -> Result<File, Errno> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map_err(|error| errno_of(&error))
}

/// The open node `/dev/loop-control`.
#[derive(Debug)]
pub(crate) struct Control(File);

impl Control {
    pub(crate) fn open() -> Result<Self, Errno> {
        open(Path::new(LOOP_CONTROL)).map(Self)
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A node `/dev/loopN`, open for reading and writing.
#[derive(Debug)]
pub(crate) struct Node(File);

impl Node {
    pub(crate) fn open(path: &Path) -> Result<Self, Errno> {
        open(path).map(Self)
    }

    pub(crate) fn detach(&self) -> Result<(), Errno> {
        sys::loop_clear(self.as_fd())
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
