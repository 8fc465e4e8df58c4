//! A scripted machine: it keeps loop and dm devices in memory as the kernel does, and fails the calls it is told to.
//!
//! What it proves is the order of steps and their undoing, for every step that can fail. What the kernel itself
//! does is proved in tests/kernel.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::dm_message::Address;
use crate::error::Step;
use crate::host::{FileFacts, FileKind, Host};
use crate::loop_device::LoopStatus;
use crate::mapper::{Device, TargetVersion};
use crate::name::{DeviceName, DeviceNumber};
use crate::sys::LO_AUTOCLEAR;
use crate::table::{SnapshotParams, TargetLine};
use crate::uuid::DeviceUuid;

use world::{Binding, CHUNK, FILE_BYTES, ScriptDevice, World, file_id, inode, label};

/// Whether the call made as `Step`, the n-th of all (from 1), is to fail, and how.
type Fault = Box<dyn Fn(Step, usize) -> Option<Errno>>;

pub(crate) struct Script {
    fault: RefCell<Fault>,
    /// Every call so far, in order.
    pub(crate) calls: RefCell<Vec<Step>>,
    pub(crate) world: Rc<RefCell<World>>,
    clock: Cell<Duration>,
}

pub(crate) struct ScriptLoop {
    world: Rc<RefCell<World>>,
    number: u32,
}

impl Drop for ScriptLoop {
    fn drop(&mut self) {
        let mut world = self.world.borrow_mut();
        if let Some(binding) = world.loops.get_mut(&self.number) {
            binding.opens = binding.opens.saturating_sub(1);
        }
        world.settle();
    }
}

impl Script {
    pub(crate) fn new(fault: impl Fn(Step, usize) -> Option<Errno> + 'static) -> Self {
        Self {
            fault: RefCell::new(Box::new(fault)),
            calls: RefCell::default(),
            world: Rc::default(),
            clock: Cell::default(),
        }
    }

    /// From now on, faults are these, and calls are counted from 1 again.
    pub(crate) fn restart(&self, fault: impl Fn(Step, usize) -> Option<Errno> + 'static) {
        *self.fault.borrow_mut() = Box::new(fault);
        self.calls.borrow_mut().clear();
    }

    fn call(&self, step: Step) -> Result<(), Errno> {
        self.calls.borrow_mut().push(step);
        let nth = self.calls.borrow().len();
        (self.fault.borrow())(step, nth).map_or(Ok(()), Err)
    }

    fn find(&self, address: Address<'_>) -> Result<String, Errno> {
        let world = self.world.borrow();
        let fits = |uuid: &str, device: &ScriptDevice| match address {
            Address::Name(name) => device.name == name,
            Address::Uuid(wanted) => uuid == wanted,
            Address::Number(number) => device.number == number,
        };
        let found = world
            .devices
            .iter()
            .find(|(uuid, device)| fits(uuid, device));
        found.map(|(uuid, _)| uuid.clone()).ok_or(Errno::ENXIO)
    }

    fn open_count(&self) -> u32 {
        u32::from(self.clock.get() < self.world.borrow().busy_until)
    }
}

impl Host for Script {
    type File = u64;
    type Loop = ScriptLoop;
    type Watch = ();

    fn open_file(&self, path: &Path, _writable: bool) -> Result<u64, Errno> {
        self.call(Step::OpenFile)?;
        let moved = self.world.borrow().moved.get(path).copied();
        Ok(moved.unwrap_or_else(|| inode(path)))
    }

    fn open_backing(&self, path: &Path, writable: bool) -> Result<u64, Errno> {
        self.open_file(path, writable)
    }

    fn lengthen_file(&self, file: &u64, bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)?;
        let mut world = self.world.borrow_mut();
        let size = world.sizes.entry(*file).or_insert(FILE_BYTES);
        *size = bytes.max(*size);
        Ok(())
    }

    fn make_file(&self, path: &Path) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        self.world.borrow_mut().made_files.insert(path.to_owned());
        Ok(inode(path))
    }

    fn make_memory_file(&self) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        Ok(0)
    }

    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::MoveFile)?;
        let mut world = self.world.borrow_mut();
        if world.made_files.contains(to) {
            return Err(Errno::EEXIST);
        }
        if !world.made_files.remove(from) {
            return Err(Errno::ENOENT);
        }
        world.made_files.insert(to.to_owned());
        let inode = world.moved.remove(from).unwrap_or_else(|| inode(from));
        world.moved.insert(to.to_owned(), inode);
        let bound = world.loops.values_mut().filter(|each| each.path == from);
        bound.for_each(|each| each.path = to.to_owned());
        Ok(())
    }

    fn size_file(&self, _file: &u64, _bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)
    }

    fn inspect_file(&self, file: &u64) -> Result<FileFacts, Errno> {
        self.call(Step::InspectFile)?;
        let mtime = self.world.borrow().mtimes.get(file).copied();
        Ok(FileFacts {
            id: file_id(*file),
            kind: FileKind::Regular,
            mode: 0o600,
            size_bytes: *self.world.borrow().sizes.get(file).unwrap_or(&FILE_BYTES),
            mtime_ns: mtime.unwrap_or(1),
            links: 1,
            has_blocks: false,
        })
    }

    fn lock_file(&self, _file: &u64, _exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockFile)
    }

    fn read_at(&self, _file: &u64, buffer: &mut [u8], at: usize) -> Result<usize, Errno> {
        self.call(Step::ReadFile)?;
        buffer.fill(0);
        if let Some(stored) = self.world.borrow().store.get(at..at + buffer.len()) {
            buffer.copy_from_slice(stored);
        }
        Ok(buffer.len())
    }

    fn write_at(&self, _file: &u64, bytes: &[u8], at: usize) -> Result<(), Errno> {
        self.call(Step::MarkFile)?;
        let mut world = self.world.borrow_mut();
        if let Some(stored) = world.store.get_mut(at..at + bytes.len()) {
            stored.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn sync_file(&self, _file: &u64) -> Result<(), Errno> {
        self.call(Step::SyncFile)
    }

    fn date_file(&self, file: &u64, mtime_ns: Option<i64>) -> Result<(), Errno> {
        self.call(Step::DateFile)?;
        let now = 1_000_000;
        let mut world = self.world.borrow_mut();
        world.mtimes.insert(*file, mtime_ns.unwrap_or(now));
        Ok(())
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
            world: Rc::clone(&self.world),
            number,
        })
    }

    fn attach_loop(
        &self,
        device: &ScriptLoop,
        backing: &u64,
        flags: u32,
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
            label: binding.label,
        })
    }

    fn loop_size_bytes(&self, _device: &ScriptLoop) -> Result<u64, Errno> {
        self.call(Step::SizeLoop)?;
        Ok(1 << 20)
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

    fn backing_of(&self, number: DeviceNumber) -> Result<(PathBuf, PathBuf), Errno> {
        self.call(Step::InspectLoop)?;
        let world = self.world.borrow();
        let binding = world.loops.get(&number.minor).ok_or(Errno::ENOENT)?;
        let node = PathBuf::from(format!("/dev/loop{}", number.minor));
        Ok((node, binding.path.clone()))
    }

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

    fn open_mapper(&self) -> Result<(), Errno> {
        self.call(Step::OpenMapper)
    }

    fn target_version(&self) -> Result<TargetVersion, Errno> {
        self.call(Step::TargetVersion)?;
        Ok(TargetVersion {
            target: [1, 16, 0],
            interface_minor: 48,
        })
    }

    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno> {
        self.call(Step::Create)?;
        if self.find(Address::Name(name.as_str())).is_ok() {
            return Err(Errno::EBUSY);
        }
        let mut world = self.world.borrow_mut();
        let minor = u32::try_from(world.devices.len()).unwrap_or(0);
        let number = DeviceNumber { major: 254, minor };
        let device = ScriptDevice {
            name: name.to_string(),
            number,
            table: None,
            live: false,
            suspended: false,
        };
        world.devices.insert(uuid.to_string(), device);
        Ok(number)
    }

    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        self.call(Step::Load)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.table = Some(line.clone());
        Ok(())
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        self.call(Step::Resume)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        (device.live, device.suspended) = (true, false);
        world.settle();
        drop(world);
        Ok(self.open_count())
    }

    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno> {
        self.call(Step::Rename)?;
        let uuid = self.find(Address::Name(from.as_str()))?;
        if self.find(Address::Name(to.as_str())).is_ok() {
            return Err(Errno::EBUSY);
        }
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(&uuid).ok_or(Errno::ENXIO)?;
        device.name = to.to_string();
        Ok(())
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::Suspend)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.suspended = true;
        Ok(())
    }

    fn query(&self, address: Address<'_>) -> Result<Device, Errno> {
        self.call(Step::Query)?;
        let uuid = self.find(address)?;
        let world = self.world.borrow();
        let device = &world.devices[&uuid];
        Ok(Device {
            name: device.name.clone(),
            uuid: uuid.clone(),
            number: device.number,
            open_count: self.open_count(),
            live_table: device.live,
            inactive_table: device.table.is_some() && !device.live,
            suspended: device.suspended,
            deferred_remove: false,
        })
    }

    fn live_table(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        let world = self.world.borrow();
        let device = world.devices.get(uuid.as_str()).ok_or(Errno::ENXIO)?;
        let line = device.table.as_ref().filter(|_| device.live);
        Ok(line.map(|line| (line.target.kind().to_owned(), line.target.params())))
    }

    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get(uuid.as_str()).ok_or(Errno::ENXIO)?;
        let Some(params) = device.params().filter(|_| device.live) else {
            return Ok(None);
        };
        if device.merges() {
            return Ok(Some(("snapshot-merge".to_owned(), world.merge_on())));
        }
        let sectors = world.loops[&params.cow.minor].bytes / 512;
        let usage = || format!("16/{sectors} 16");
        let text = world.status.map_or_else(usage, str::to_owned);
        Ok(Some(("snapshot".to_owned(), text)))
    }

    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        self.call(Step::Remove)?;
        let uuid = self.find(address)?;
        if self.open_count() > 0 {
            return if deferred {
                Ok(true)
            } else {
                Err(Errno::EBUSY)
            };
        }
        let mut world = self.world.borrow_mut();
        let device = world.devices.remove(&uuid);
        if self.clock.get() < world.dying_until {
            world.dying.extend(device);
        }
        world.status = None;
        world.settle();
        Ok(false)
    }

    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf> {
        Some(number.dm_node())
    }

    fn make_alias(&self, path: &Path, _: DeviceNumber, _: Option<&Path>) -> Result<(), Errno> {
        self.call(Step::Link)?;
        self.world.borrow_mut().aliases.insert(path.to_owned());
        Ok(())
    }

    fn remove_alias(&self, path: &Path, _number: DeviceNumber) -> Result<bool, Errno> {
        self.call(Step::Unlink)?;
        Ok(self.world.borrow_mut().aliases.remove(path))
    }

    fn is_our_alias(&self, path: &Path) -> bool {
        self.world.borrow().aliases.contains(path)
    }

    fn unlink(&self, path: &Path) -> Result<(), Errno> {
        self.call(Step::Unlink)?;
        let mut world = self.world.borrow_mut();
        let found = world.aliases.remove(path) || world.made_files.remove(path);
        if found { Ok(()) } else { Err(Errno::ENOENT) }
    }

    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        self.call(Step::Query)?;
        let text = path.to_string_lossy();
        let number = text.strip_prefix("/dev/loop").and_then(|n| n.parse().ok());
        Ok(Some(DeviceNumber {
            major: if number.is_some() { 7 } else { 254 },
            minor: number.unwrap_or(0),
        }))
    }

    fn is_present(&self, _number: DeviceNumber) -> bool {
        false
    }

    fn holders(&self, _number: DeviceNumber) -> Vec<String> {
        vec!["vmm (pid 1)".to_owned()]
    }

    fn random(&self) -> Result<u128, Errno> {
        self.call(Step::Random)?;
        Ok(42)
    }

    fn now(&self) -> Duration {
        self.clock.get()
    }

    fn watch_closes(&self, _nodes: &[PathBuf]) -> Result<(), Errno> {
        Ok(())
    }

    /// The users' close is seen as it happens.
    fn wait_for_close(&self, (): &(), pause: Duration) -> bool {
        let left = self.world.borrow().busy_until.checked_sub(self.clock.get());
        let seen = left.filter(|left| !left.is_zero() && *left <= pause);
        self.sleep(seen.unwrap_or(pause));
        seen.is_some()
    }

    fn sleep(&self, pause: Duration) {
        self.clock.set(self.clock.get() + pause);
        let mut world = self.world.borrow_mut();
        if self.clock.get() >= world.dying_until {
            world.dying.clear();
            world.settle();
        }
    }
}

mod growth;
mod merging;
mod pooling;
mod tests;
mod world;
