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
use crate::mapper::Device;
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

    fn inspect_file(&self, file: &u64) -> Result<FileFacts, Errno> {
        self.call(Step::InspectFile)?;
        Ok(FileFacts {
            id: file_id(*file),
            kind: FileKind::Regular,
            mode: 0o600,
            size_bytes: 1 << 20,
            mtime_ns: 1,
        })
    }

    fn lock_file(&self, _file: &u64, _exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockFile)
    }

    fn read_start(&self, _file: &u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.call(Step::ReadFile)?;
        Ok(buffer.len())
    }

    fn write_at(&self, _file: &u64, bytes: &[u8], _at: usize) -> Result<usize, Errno> {
        self.call(Step::MarkFile)?;
        Ok(bytes.len())
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

    fn loop_diskseq(&self, device: &ScriptLoop) -> Option<u64> {
        self.world
            .borrow()
            .loops
            .get(&device.number)
            .map(|binding| binding.diskseq)
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

    fn target_version(&self) -> Result<[u32; 3], Errno> {
        self.call(Step::TargetVersion)?;
        Ok([1, 16, 0])
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
        world
            .devices
            .get_mut(uuid.as_str())
            .ok_or(Errno::ENXIO)?
            .live = true;
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
            suspended: false,
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
        self.world.borrow_mut().aliases.remove(path);
        Ok(())
    }

    fn device_number(&self, _path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        self.call(Step::Query)?;
        Ok(Some(DeviceNumber {
            major: 254,
            minor: 0,
        }))
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

mod tests {
    use super::*;
    use crate::error::{Error, Result};
    use crate::handles::{Handles, LoopHandle};
    use crate::options::SnapshotOptions;
    use crate::policy::{AT_ONCE, Retry, Verdict};
    use crate::snapshot::{Snapshot, create};
    use crate::teardown::clean;

    fn never(_: Step, _: usize) -> Option<Errno> {
        None
    }

    fn create_on(script: &Script) -> Result<Snapshot> {
        let name = DeviceName::new("vm").expect("a name");
        create(
            script,
            &SnapshotOptions::new(),
            Path::new("/image"),
            Path::new("/cow"),
            &name,
        )
    }

    fn made(script: &Script) -> Handles {
        let handles = create_on(script).expect("nothing fails").into_handles();
        script.restart(never);
        handles
    }

    fn step_of(error: &Error) -> Step {
        match error {
            Error::Failed { step, .. } => *step,
            Error::Debris { source, .. } => step_of(source),
            Error::Refused(refusal) => panic!("refused: {refusal}"),
        }
    }

    fn calls_of_a_create() -> Vec<Step> {
        let script = Script::new(never);
        let _ = create_on(&script).expect("nothing fails");
        script.calls.take()
    }

    #[test]
    fn whichever_call_of_create_fails_nothing_is_left_and_the_error_names_it() {
        let calls = calls_of_a_create();
        assert_eq!(calls.len(), 25);
        for (index, step) in calls.iter().enumerate() {
            let script = Script::new(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
            let error = create_on(&script).expect_err("one call failed");
            assert_eq!(step_of(&error), *step, "call {index}");
            assert_eq!(error.errno(), Some(Errno::EIO as i32));
            assert_eq!(error.left(), []);
            assert_eq!(
                script.world.borrow().residue(),
                BTreeSet::new(),
                "after call {index}, {step:?}"
            );
        }
    }

    #[test]
    fn when_undoing_fails_too_the_debris_is_exactly_what_is_left() {
        let calls = calls_of_a_create();
        let created = calls
            .iter()
            .position(|step| *step == Step::Create)
            .expect("it creates");
        for index in created + 1..calls.len() {
            let script = Script::new(move |step, nth| {
                (nth == index + 1 || step == Step::Remove).then_some(Errno::EIO)
            });
            let error = create_on(&script).expect_err("one call failed");
            assert_eq!(step_of(&error), calls[index]);
            let named: BTreeSet<_> = error
                .left()
                .iter()
                .map(|leftover| leftover.object.clone())
                .collect();
            assert_eq!(script.world.borrow().residue(), named);
        }
    }

    #[test]
    fn a_lost_race_takes_another_device_and_leaves_the_lost_one_alone() {
        for (step, errno) in [
            (Step::AttachLoop, Errno::EBUSY),
            (Step::OpenLoop, Errno::ENXIO),
            (Step::OpenLoop, Errno::ENOENT),
        ] {
            let losses = Cell::new(20u32);
            let script = Script::new(move |at, _| {
                (at == step && losses.replace(losses.get().saturating_sub(1)) > 0).then_some(errno)
            });
            let _ = create_on(&script).expect("the race is won in the end");
            assert!(!script.calls.borrow().contains(&Step::DetachLoop));
            assert_eq!(
                script
                    .calls
                    .borrow()
                    .iter()
                    .filter(|each| **each == step)
                    .count(),
                22
            );
        }
        let script = Script::new(|step, _| (step == Step::AttachLoop).then_some(Errno::EBUSY));
        let error = create_on(&script).expect_err("it never wins");
        assert_eq!(error.verdict(), Some(Verdict::TakeAnother));
        assert!(script.now() <= Duration::from_secs(5));
    }

    #[test]
    fn a_call_that_is_interrupted_is_repeated_but_not_for_ever() {
        for step in calls_of_a_create() {
            let script = Script::new(move |at, _| (at == step).then_some(Errno::EINTR));
            let error = create_on(&script).expect_err("it is interrupted for ever");
            assert_eq!(step_of(&error), step);
            let asked = script
                .calls
                .borrow()
                .iter()
                .filter(|each| **each == step)
                .count();
            assert_eq!(asked, AT_ONCE as usize, "{step:?}");
            let script =
                Script::new(move |at, nth| (at == step && nth % 2 == 0).then_some(Errno::EINTR));
            let _ = create_on(&script).expect("interrupted now and then");
        }
    }

    #[test]
    fn cleanup_removes_everything_twice_over() {
        let script = Script::new(never);
        let handles = made(&script);
        assert_eq!(script.world.borrow().residue().len(), 3);
        for _ in 0..2 {
            assert_eq!(clean(&script, &handles, &Retry::default()), Ok(()));
            assert_eq!(script.world.borrow().residue(), BTreeSet::new());
        }
    }

    #[test]
    fn whichever_call_of_cleanup_fails_it_goes_on_and_names_what_stays() {
        let script = Script::new(never);
        let handles = made(&script);
        clean(&script, &handles, &Retry::ONCE).expect("nothing fails");
        let calls = script.calls.take();
        for index in 0..calls.len() {
            let script = Script::new(never);
            let handles = made(&script);
            script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
            let left: BTreeSet<PathBuf> = match clean(&script, &handles, &Retry::ONCE) {
                Ok(()) => BTreeSet::new(),
                Err(error) => error
                    .left()
                    .iter()
                    .map(|leftover| leftover.object.clone())
                    .collect(),
            };
            let residue = script.world.borrow().residue();
            assert!(
                residue.is_subset(&left),
                "call {index}, {:?}: {residue:?} but {left:?}",
                calls[index]
            );
        }
    }

    #[test]
    fn a_busy_device_is_waited_for_until_it_is_closed_or_the_deadline() {
        let script = Script::new(never);
        let handles = made(&script);
        script.world.borrow_mut().busy_until = Duration::from_millis(70);
        let error = clean(&script, &handles, &Retry::until(Duration::from_millis(50)));
        let error = error.expect_err("the deadline comes first");
        assert_eq!(error.verdict(), Some(Verdict::Busy));
        assert_eq!(error.left().len(), 3, "{error}");
        assert_eq!(script.now(), Duration::from_millis(50));
        assert_eq!(
            script.world.borrow().residue().len(),
            3,
            "the alias is still there"
        );
        clean(&script, &handles, &Retry::default()).expect("closed at 70 ms");
        assert!(script.now() < Duration::from_millis(90));
    }

    #[test]
    fn what_is_somebody_elses_by_now_is_left_alone() {
        let script = Script::new(never);
        let mut handles = made(&script);
        clean(&script, &handles, &Retry::ONCE).expect("nothing fails");
        script.world.borrow_mut().bind_foreign(0, 99);
        script.world.borrow_mut().bind_foreign(1, 99);
        handles.uuid = Some(DeviceUuid::new("DMSNAP-another").expect("a uuid"));
        clean(&script, &handles, &Retry::ONCE).expect("all is gone");
        assert_eq!(script.world.borrow().residue().len(), 2);
        handles.cow_loop = Some(LoopHandle::at("/dev/loop1"));
        clean(&script, &handles, &Retry::default()).expect("taken at its word");
        assert_eq!(
            script.world.borrow().residue(),
            BTreeSet::from([PathBuf::from("/dev/loop0")])
        );
    }

    /// The alias belongs to whoever has the name: old handles of a VM that was started again once took it away.
    #[test]
    fn old_handles_leave_the_alias_of_a_new_snapshot_of_that_name_alone() {
        let script = Script::new(never);
        let mut old = made(&script);
        clean(&script, &old, &Retry::ONCE).expect("nothing fails");
        let new = made(&script);
        old.uuid = Some(DeviceUuid::new("DMSNAP-old").expect("a uuid"));
        (old.cow_loop, old.origin_loop) = (None, None);
        clean(&script, &old, &Retry::ONCE).expect("all is gone");
        let alias = new.mapper.expect("it has an alias");
        assert!(script.world.borrow().aliases.contains(&alias));
    }

    #[test]
    fn who_waits_in_vain_is_told_who_holds_the_device() {
        let script = Script::new(never);
        let handles = made(&script);
        script.world.borrow_mut().busy_until = Duration::MAX;
        let wait = |retry| {
            clean(&script, &handles, retry)
                .expect_err("it stays busy")
                .left()[0]
                .error
                .clone()
        };
        let told = |error: Error| {
            std::error::Error::source(&error)
                .expect("a cause")
                .to_string()
        };
        let busy = "Device or resource busy (os error 16): open count 1";
        assert_eq!(told(wait(&Retry::ONCE)), busy);
        assert_eq!(
            told(wait(&Retry::until(Duration::from_millis(1)))),
            format!("{busy}, vmm (pid 1)")
        );
    }
}
