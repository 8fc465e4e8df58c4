//! Loop devices of the fake machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::world::{Binding, file_id, label};
use super::{Script, ScriptLoop};
use crate::base::{DeviceNumber, loop_node};
use crate::error::Step;
use crate::kernel::sys::LO_AUTOCLEAR;
use crate::kernel::{LoopStatus, Loops};

impl Loops for Script {
    type Loop = ScriptLoop;

    fn open_loop_control(&self) -> Result<(), Errno> {
        self.call(Step::OpenLoopControl)
    }

    fn find_loop(&self) -> Result<u32, Errno> {
        self.call(Step::FindLoop)?;
        let world = self.world.borrow();
        Ok((0..)
            .find(|number| !world.loops.contains_key(number))
            .unwrap_or(0))
    }

    fn add_loop(&self, _number: u32) -> Result<(), Errno> {
        self.call(Step::AddLoop)
    }

    fn open_loop(&self, path: &Path, _writable: bool) -> Result<ScriptLoop, Errno> {
        self.call(Step::OpenLoop)?;
        let text = path.to_string_lossy();
        let number = text
            .strip_prefix("/dev/loop")
            .and_then(|digits| digits.parse().ok());
        let number = number.ok_or(Errno::ENOENT)?;
        if let Some(binding) = self.world.borrow_mut().loops.get_mut(&number) {
            binding.opens += 1;
        }
        Ok(ScriptLoop {
            world: Arc::clone(&self.world),
            number,
        })
    }

    fn attach_loop(
        &self,
        device: &ScriptLoop,
        backing: &u64,
        flags: u32,
        _sector_bytes: u32,
        path: &Path,
    ) -> Result<(), Errno> {
        self.call(Step::AttachLoop)?;
        let mut world = self.world.borrow_mut();
        world.next_diskseq += 1;
        let binding = Binding {
            backing: file_id(*backing),
            path: path.to_owned(),
            label: label(path),
            bytes: world.file_bytes(path),
            autoclear: flags & LO_AUTOCLEAR != 0,
            diskseq: world.next_diskseq,
            opens: 1,
        };
        match world.loops.insert(device.number, binding) {
            None => Ok(()),
            Some(_) => Err(Errno::EBUSY),
        }
    }

    fn detach_loop(&self, device: &ScriptLoop) -> Result<(), Errno> {
        self.call(Step::DetachLoop)?;
        let mut world = self.world.borrow_mut();
        let binding = world.loops.get_mut(&device.number).ok_or(Errno::ENXIO)?;
        binding.autoclear = true;
        Ok(())
    }

    fn resize_loop(&self, device: &ScriptLoop) -> Result<(), Errno> {
        self.call(Step::ResizeLoop)?;
        let mut world = self.world.borrow_mut();
        let binding = world.loops.get(&device.number).ok_or(Errno::ENXIO)?;
        let bytes = world.file_bytes(&binding.path);
        let binding = world.loops.get_mut(&device.number).ok_or(Errno::ENXIO)?;
        binding.bytes = bytes;
        Ok(())
    }

    fn lock_loop(&self, _device: &ScriptLoop, _exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockLoop)
    }

    fn mark_loop(&self, _device: &ScriptLoop) -> Result<(), Errno> {
        self.call(Step::LockLoop)
    }

    fn loop_is_marked(&self, _device: &ScriptLoop) -> Result<bool, Errno> {
        self.call(Step::TestLock).map(|()| false)
    }

    fn loop_number(&self, device: &ScriptLoop) -> Result<DeviceNumber, Errno> {
        self.call(Step::InspectLoop)?;
        Ok(DeviceNumber {
            major: 7,
            minor: device.number,
        })
    }

    fn loop_diskseq(&self, device: &ScriptLoop) -> Result<u64, Errno> {
        self.call(Step::ReadDiskseq)?;
        let world = self.world.borrow();
        world
            .loops
            .get(&device.number)
            .map(|binding| binding.diskseq)
            .ok_or(Errno::ENXIO)
    }

    fn loop_status(&self, device: &ScriptLoop) -> Result<LoopStatus, Errno> {
        self.call(Step::InspectLoop)?;
        let world = self.world.borrow();
        let binding = world.loops.get(&device.number).ok_or(Errno::ENXIO)?;
        Ok(LoopStatus {
            backing: binding.backing,
            autoclear: binding.autoclear,
            direct_io: false,
            offset_bytes: 0,
            limit_bytes: 0,
            label: binding.label,
        })
    }

    fn loop_size_bytes(&self, _device: &ScriptLoop) -> Result<u64, Errno> {
        self.call(Step::SizeLoop)?;
        Ok(1 << 20)
    }

    fn loop_sector_bytes(&self, _device: &ScriptLoop) -> Result<u32, Errno> {
        self.call(Step::SizeLoop)?;
        Ok(512)
    }

    fn sweep_nodes(&self) {}

    fn read_only_loops(&self) -> Vec<u32> {
        let world = self.world.borrow();
        let shared = world
            .loops
            .iter()
            .filter(|(_, binding)| binding.label.is_shared());
        shared.map(|(number, _)| *number).collect()
    }

    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber> {
        let number = path
            .to_string_lossy()
            .strip_prefix("/dev/loop")
            .and_then(|digits| digits.parse().ok());
        let world = self.world.borrow();
        number
            .map(|number| world.holding(number).collect())
            .unwrap_or_default()
    }

    fn shows_backing(&self, _path: &Path) -> bool {
        self.clock.get() < self.world.borrow().letting_go_until
    }

    fn loop_node_of(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        self.call(Step::InspectLoop)?;
        let world = self.world.borrow();
        let bound = world.loops.contains_key(&number.minor);
        bound.then(|| loop_node(number.minor)).ok_or(Errno::ENOENT)
    }

    fn backing_path(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        self.call(Step::InspectLoop)?;
        let world = self.world.borrow();
        let binding = world.loops.get(&number.minor).ok_or(Errno::ENOENT)?;
        Ok(binding.path.clone())
    }
}
