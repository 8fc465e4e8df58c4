//! A scripted machine: it keeps loop and dm devices in memory as the kernel does, and fails the calls it is told to.
//!
//! What it proves is the order of steps and their undoing, for every step that can fail. What the kernel itself
//! does is proved in tests/kernel.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::dm_message::Address;
use crate::error::Step;
use crate::handles::FileId;
use crate::host::{FileFacts, FileKind, Host};
use crate::loop_device::LoopStatus;
use crate::mapper::{Device, TargetVersion};
use crate::name::{DeviceName, DeviceNumber};
use crate::sys::LO_AUTOCLEAR;
use crate::table::{Target, TargetLine};
use crate::uuid::DeviceUuid;

/// Whether the call made as `Step`, the n-th of all (from 1), is to fail, and how.
type Fault = Box<dyn Fn(Step, usize) -> Option<Errno>>;

pub(crate) struct Script {
    fault: RefCell<Fault>,
    /// Every call so far, in order.
    pub(crate) calls: RefCell<Vec<Step>>,
    pub(crate) world: Rc<RefCell<World>>,
    clock: Cell<Duration>,
}

#[derive(Default)]
pub(crate) struct World {
    /// Loop number to what it is bound to.
    loops: BTreeMap<u32, Binding>,
    next_diskseq: u64,
    devices: BTreeMap<String, ScriptDevice>,
    aliases: BTreeSet<PathBuf>,
    made_files: BTreeSet<PathBuf>,
    /// When the users of each dm device close it.
    pub(crate) busy_until: Duration,
}

struct Binding {
    backing: FileId,
    autoclear: bool,
    diskseq: u64,
    opens: usize,
}

struct ScriptDevice {
    name: String,
    number: DeviceNumber,
    table: Option<[u32; 2]>,
    live: bool,
    suspended: bool,
}

impl World {
    /// Everything that somebody would have to clean up, by path.
    pub(crate) fn residue(&self) -> BTreeSet<PathBuf> {
        let loops = self
            .loops
            .keys()
            .map(|n| PathBuf::from(format!("/dev/loop{n}")));
        let mapper = |device: &ScriptDevice| Path::new("/dev/mapper").join(&device.name);
        loops
            .chain(self.devices.values().map(mapper))
            .chain(self.aliases.iter().cloned())
            .chain(self.made_files.iter().cloned())
            .collect()
    }

    /// Binds a loop device as another program does: without autoclear, and nobody holds it open.
    pub(crate) fn bind_foreign(&mut self, number: u32, inode: u64) {
        let binding = Binding {
            backing: file_id(inode),
            autoclear: false,
            diskseq: 0,
            opens: 0,
        };
        self.loops.insert(number, binding);
    }

    fn held(&self, number: u32) -> bool {
        self.devices
            .values()
            .any(|device| device.table.is_some_and(|loops| loops.contains(&number)))
    }

    fn settle(&mut self) {
        let idle: Vec<u32> = self
            .loops
            .iter()
            .filter(|(number, binding)| {
                binding.autoclear && binding.opens == 0 && !self.held(**number)
            })
            .map(|(number, _)| *number)
            .collect();
        self.loops.retain(|number, _| !idle.contains(number));
    }
}

fn file_id(inode: u64) -> FileId {
    FileId {
        dev: DeviceNumber { major: 8, minor: 1 },
        inode,
    }
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

    /// The inode is the length of the path, so that two paths are two files.
    fn open_file(&self, path: &Path, _writable: bool) -> Result<u64, Errno> {
        self.call(Step::OpenFile)?;
        Ok(path.as_os_str().len() as u64)
    }

    fn make_file(&self, path: &Path) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        self.world.borrow_mut().made_files.insert(path.to_owned());
        Ok(0)
    }

    fn size_file(&self, _file: &u64, _bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)
    }

    fn inspect_file(&self, file: &u64) -> Result<FileFacts, Errno> {
        self.call(Step::InspectFile)?;
        Ok(FileFacts {
            id: file_id(*file),
            kind: FileKind::Regular,
            mode: 0o600,
            size_bytes: 1 << 20,
            mtime_ns: 1,
            links: 1,
            has_blocks: false,
        })
    }

    fn lock_file(&self, _file: &u64, _exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockFile)
    }

    fn read_at(&self, _file: &u64, buffer: &mut [u8], _at: usize) -> Result<usize, Errno> {
        self.call(Step::ReadFile)?;
        Ok(buffer.len())
    }

    fn write_at(&self, _file: &u64, _bytes: &[u8], _at: usize) -> Result<(), Errno> {
        self.call(Step::MarkFile)
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
        _: &Path,
    ) -> Result<(), Errno> {
        self.call(Step::AttachLoop)?;
        let mut world = self.world.borrow_mut();
        world.next_diskseq += 1;
        let binding = Binding {
            backing: file_id(*backing),
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

    fn is_stacked_on(&self, path: &Path) -> bool {
        let number = path
            .to_string_lossy()
            .strip_prefix("/dev/loop")
            .and_then(|digits| digits.parse().ok());
        number.is_some_and(|number| self.world.borrow().held(number))
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
        let Target::Snapshot(params) = &line.target else {
            return Err(Errno::EINVAL);
        };
        let loops = [params.origin.minor, params.cow.minor];
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.table = Some(loops);
        Ok(())
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::Resume)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        (device.live, device.suspended) = (true, false);
        Ok(())
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::Suspend)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.suspended = true;
        Ok(())
    }

    fn status(&self, _uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        Ok(Some(("snapshot".to_owned(), "24/2048 16".to_owned())))
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
        world.devices.remove(&uuid);
        world.settle();
        Ok(false)
    }

    fn make_alias(&self, path: &Path, number: DeviceNumber) -> Result<PathBuf, Errno> {
        self.call(Step::Link)?;
        self.world.borrow_mut().aliases.insert(path.to_owned());
        Ok(number.dm_node())
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

    fn device_number(&self, _path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        self.call(Step::Query)?;
        Ok(Some(DeviceNumber {
            major: 254,
            minor: 0,
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

    fn sleep(&self, pause: Duration) {
        self.clock.set(self.clock.get() + pause);
    }
}

mod tests;
