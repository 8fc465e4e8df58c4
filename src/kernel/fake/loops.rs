//! Loop devices of the fake machine.

use std::path::{Path, PathBuf};
use std::sync::MutexGuard;

use nix::errno::Errno;

use super::opens::Object;
use super::world::{Binding, file_id, label, loop_at};
use super::{Script, ScriptFile, ScriptLoop};
use crate::base::{DeviceNumber, loop_node};
use crate::error::Step;
use crate::kernel::sys::LO_AUTOCLEAR;
use crate::kernel::{LoopNumbers, LoopStatus, Loops};

impl Loops for Script {
    type Loop = ScriptLoop;

    fn loop_numbers(&self) -> MutexGuard<'_, LoopNumbers> {
        self.numbers.lock().expect("no panic while it was locked")
    }

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
        // Any block device's node will do: a layer's serves as one.
        let mapped = self.world.borrow().mapped_at(path);
        if let Some(number) = mapped {
            return Ok(ScriptLoop {
                opened: self.opened(Object::Mapped(number)),
                number: u32::MAX,
            });
        }
        let number = loop_at(path).ok_or(Errno::ENOENT)?;
        Ok(ScriptLoop {
            opened: self.opened(Object::Loop(number)),
            number,
        })
    }

    fn attach_loop(
        &self,
        device: &ScriptLoop,
        backing: &ScriptFile,
        flags: u32,
        _sector_bytes: u32,
        path: &Path,
    ) -> Result<(), Errno> {
        self.call(Step::AttachLoop)?;
        let inode = backing.inode();
        let mut world = self.world.borrow_mut();
        if world.loops.contains_key(&device.number) {
            return Err(Errno::EBUSY);
        }
        world.next_diskseq += 1;
        world.share(backing.0.open);
        let binding = Binding {
            backing: file_id(inode),
            path: path.to_owned(),
            label: label(path),
            bytes: world.file_bytes(path),
            autoclear: flags & LO_AUTOCLEAR != 0,
            diskseq: world.next_diskseq,
            open: Some(backing.0.open),
        };
        world.loops.insert(device.number, binding);
        Ok(())
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

    fn lock_loop(&self, device: &ScriptLoop, exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockLoop)?;
        self.world.borrow_mut().lock(device.opened.open, exclusive)
    }

    fn mark_loop(&self, device: &ScriptLoop) -> Result<(), Errno> {
        self.call(Step::LockLoop)?;
        self.world.borrow_mut().mark(device.opened.open)
    }

    fn loop_is_marked(&self, device: &ScriptLoop) -> Result<bool, Errno> {
        self.call(Step::TestLock)?;
        Ok(self.world.borrow().is_marked(device.opened.open))
    }

    fn loop_number(&self, device: &ScriptLoop) -> Result<DeviceNumber, Errno> {
        self.call(Step::InspectLoop)?;
        Ok(DeviceNumber::at(7, device.number))
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

    fn count_users(&self, path: &Path, at_most: usize) -> usize {
        self.stacked_on(path).len().min(at_most)
    }

    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber> {
        let world = self.world.borrow();
        let number = world.number_of(path);
        number.map_or_else(Vec::new, |number| world.holding(number).collect())
    }

    fn shows_backing(&self, _path: &Path) -> bool {
        let world = self.world.borrow();
        world.now < world.letting_go_until
    }

    fn loop_node_of(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        self.call(Step::InspectLoop)?;
        if number.major() != 7 {
            return Err(Errno::ENOTBLK);
        }
        let world = self.world.borrow();
        let bound = world.loops.contains_key(&number.minor());
        bound
            .then(|| loop_node(number.minor()))
            .ok_or(Errno::ENOENT)
    }

    fn backing_path(&self, number: DeviceNumber) -> Result<PathBuf, Errno> {
        self.call(Step::InspectLoop)?;
        let world = self.world.borrow();
        let binding = world.loops.get(&number.minor()).ok_or(Errno::ENOENT)?;
        Ok(binding.path.clone())
    }
}
