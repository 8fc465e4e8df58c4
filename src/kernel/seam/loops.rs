//! Loop devices.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::Files;
use crate::base::{DeviceNumber, FileId};

/// The node that names free loop devices.
pub(crate) const LOOP_CONTROL: &str = "/dev/loop-control";

/// What a loop device is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopStatus {
    pub(crate) backing: FileId,
    pub(crate) autoclear: bool,
    pub(crate) direct_io: bool,
    /// Where in the backing file the device begins.
    pub(crate) offset_bytes: u64,
    /// How much of it the device shows at most; 0 for all.
    pub(crate) limit_bytes: u64,
    pub(crate) label: Label,
}

/// The name that a loop device was given by its maker (`lo_file_name`), in its first 63 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(pub(crate) [u8; 64]);

impl Label {
    /// Whether it is an origin's that anybody may share.
    pub(crate) fn is_shared(&self) -> bool {
        self.0.starts_with(SHARED_ORIGIN.as_bytes())
    }

    /// Of any other of ours: the path that its backing file had then, as far as it goes.
    pub(crate) fn path(&self) -> &Path {
        let text = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        Path::new(OsStr::from_bytes(text))
    }
}

/// What the name that a loop device was given by its maker begins with (`lo_file_name`) if it is a shared origin's. The
/// kernel and losetup find the backing file elsewhere.
pub(crate) const SHARED_ORIGIN: &str = "dmsnap-origin:";

/// Calls on loop devices.
pub(crate) trait Loops: Files {
    type Loop;

    fn open_loop_control(&self) -> Result<(), Errno>;
    fn find_loop(&self) -> Result<u32, Errno>;
    fn add_loop(&self, number: u32) -> Result<(), Errno>;
    fn open_loop(&self, path: &Path, writable: bool) -> Result<Self::Loop, Errno>;
    fn attach_loop(
        &self,
        device: &Self::Loop,
        backing: &Self::File,
        flags: u32,
        sector_bytes: u32,
        path: &Path,
    ) -> Result<(), Errno>;
    fn detach_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn resize_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn lock_loop(&self, device: &Self::Loop, exclusive: bool) -> Result<(), Errno>;
    fn mark_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn loop_is_marked(&self, device: &Self::Loop) -> Result<bool, Errno>;
    fn loop_number(&self, device: &Self::Loop) -> Result<DeviceNumber, Errno>;
    fn loop_diskseq(&self, device: &Self::Loop) -> Result<u64, Errno>;
    fn loop_status(&self, device: &Self::Loop) -> Result<LoopStatus, Errno>;
    fn loop_size_bytes(&self, device: &Self::Loop) -> Result<u64, Errno>;
    fn loop_sector_bytes(&self, device: &Self::Loop) -> Result<u32, Errno>;
    /// Removes the nodes that were made for loop devices which are free by now.
    fn sweep_nodes(&self);
    /// The numbers of the loop devices that are bound read-only.
    fn read_only_loops(&self) -> Vec<u32>;
    /// The dm devices that stand on the loop device.
    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber>;
    fn shows_backing(&self, path: &Path) -> bool;
    /// The loop device's node; ENOTBLK for a device that is no loop device.
    fn loop_node_of(&self, number: DeviceNumber) -> Result<PathBuf, Errno>;
    /// The path of the file behind the loop device, as the kernel has it.
    fn backing_path(&self, number: DeviceNumber) -> Result<PathBuf, Errno>;
}
