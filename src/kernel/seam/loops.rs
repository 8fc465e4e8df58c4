//! Loop devices.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;

use nix::errno::Errno;

use super::Files;
use crate::base::{DeviceNumber, FileId};
use crate::kernel::LoopNumbers;

/// The control node of loop devices, which tells free ones.
pub(crate) const LOOP_CONTROL: &str = "/dev/loop-control";

/// What a loop device is attached to (`struct loop_info64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopStatus {
    pub(crate) backing: FileId,
    pub(crate) autoclear: bool,
    pub(crate) direct_io: bool,
    /// The offset in the backing file at which the device begins.
    pub(crate) offset_bytes: u64,
    /// How many bytes of it the device shows at most; 0 for all.
    pub(crate) limit_bytes: u64,
    pub(crate) label: Label,
}

/// The name that the attaching program stored in a loop device (`lo_file_name`): its first 63 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(pub(crate) [u8; 64]);

impl Label {
    /// True if the loop device is a shared origin's, which any snapshot over that image may use.
    pub(crate) fn is_shared(&self) -> bool {
        self.0.starts_with(SHARED_ORIGIN.as_bytes())
    }

    /// Returns the backing file's path at the time of attaching, cut off at 63 bytes, for dmsnap's other loop devices.
    pub(crate) fn path(&self) -> &Path {
        let text = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        Path::new(OsStr::from_bytes(text))
    }
}

/// What `lo_file_name` of a shared origin's loop device begins with. The kernel and `losetup` do not take the backing
/// file from there.
pub(crate) const SHARED_ORIGIN: &str = "dmsnap-origin:";

/// Calls on loop devices.
pub(crate) trait Loops: Files {
    type Loop;

    /// Returns what this process knows of the loop devices' numbers, which its threads share.
    fn loop_numbers(&self) -> MutexGuard<'_, LoopNumbers>;
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
    /// Returns the numbers of the loop devices that are attached read-only.
    fn read_only_loops(&self) -> Vec<u32>;
    /// Returns the dm devices that use the loop device.
    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber>;
    /// Returns how many devices use the loop device, or `at_most`.
    fn count_users(&self, path: &Path, at_most: usize) -> usize;
    fn shows_backing(&self, path: &Path) -> bool;
    /// Returns the loop device's node; ENOTBLK for a device that is no loop device.
    fn loop_node_of(&self, number: DeviceNumber) -> Result<PathBuf, Errno>;
    /// Returns the path of the file behind the loop device, as the kernel has it.
    fn backing_path(&self, number: DeviceNumber) -> Result<PathBuf, Errno>;
}
