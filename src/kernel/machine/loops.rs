//! The machine's loop devices.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};

use nix::errno::Errno;

use super::loop_device::{self, LoopDevice};
use super::{Machine, holders, nodes};
use crate::base::DeviceNumber;
use crate::error::{Step, Verdict, policy};
use crate::kernel::LoopNumbers;
use crate::kernel::seam::{DeviceMapper, LoopStatus, Loops};

impl Loops for Machine {
    type Loop = LoopDevice;

    fn loop_numbers(&self) -> MutexGuard<'_, LoopNumbers> {
        // What a thread that panicked had begun to note is a hint like the rest.
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_loop_control(&self) -> Result<(), Errno> {
        self.loops().map(drop)
    }

    fn find_loop(&self) -> Result<u32, Errno> {
        self.loops()?.find_free()
    }

    fn add_loop(&self, number: u32) -> Result<(), Errno> {
        self.loops()?.add(number)
    }

    fn open_loop(&self, path: &Path, writable: bool) -> Result<LoopDevice, Errno> {
        match LoopDevice::open(path, writable) {
            Err(errno) if policy::verdict(Step::OpenLoop, errno) == Verdict::TakeAnother => {
                if !nodes::make_for_loop(path) {
                    return Err(errno);
                }
                LoopDevice::open(path, writable)
            }
            opened => opened,
        }
    }

    fn attach_loop(
        &self,
        device: &LoopDevice,
        backing: &OwnedFd,
        flags: u32,
        sector_bytes: u32,
        path: &Path,
    ) -> Result<(), Errno> {
        device.attach(backing.as_fd(), flags, sector_bytes, path)
    }

    fn detach_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.detach()
    }

    fn resize_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.resize()
    }

    fn lock_loop(&self, device: &LoopDevice, exclusive: bool) -> Result<(), Errno> {
        device.lock(exclusive)
    }

    fn mark_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.mark()
    }

    fn loop_is_marked(&self, device: &LoopDevice) -> Result<bool, Errno> {
        device.is_marked()
    }

    fn loop_number(&self, device: &LoopDevice) -> Result<DeviceNumber, Errno> {
        device.number()
    }

    fn loop_diskseq(&self, device: &LoopDevice) -> Result<u64, Errno> {
        device.diskseq()
    }

    fn loop_status(&self, device: &LoopDevice) -> Result<LoopStatus, Errno> {
        device.status()
    }

    fn loop_size_bytes(&self, device: &LoopDevice) -> Result<u64, Errno> {
        device.size_bytes()
    }

    fn loop_sector_bytes(&self, device: &LoopDevice) -> Result<u32, Errno> {
        device.sector_bytes()
    }

    fn sweep_nodes(&self) {
        nodes::sweep();
    }

    fn read_only_loops(&self) -> Vec<u32> {
        loop_device::read_only()
    }

    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber> {
        let number = self.device_number(path).ok().flatten();
        number.map(holders::stacked_on).unwrap_or_default()
    }

    fn count_users(&self, path: &Path, at_most: usize) -> usize {
        let name = path.file_name().unwrap_or_default();
        holders::count(&Path::new("/sys/block").join(name), at_most)
    }

    /// True if sysfs names a backing file for the loop device: it does until the kernel is done with detaching.
    fn shows_backing(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default();
        let attributes = Path::new("/sys/block").join(name).join("loop");
        attributes.exists()
    }

    fn loop_node_of(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        loop_device::node_of(number)
    }

    fn backing_path(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        loop_device::backing_path(number)
    }
}
