//! The kernel facts that the fake machine models. Those of handover have their tests in tests/kernel/facts, by the same
//! names; V, B, C0 and C1 are theirs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::{Script, ScriptFile, ScriptLoop};
use crate::base::{ChunkSize, DeviceName, DeviceNumber, DeviceUuid, Sectors, Store};
use crate::dm::{Address, Discard, SnapshotParams, Target, TargetLine};
use crate::kernel::fake::mapped::MAPPED;
use crate::kernel::{Clock, DevId, DeviceMapper, Files, LO_AUTOCLEAR, Loops};

const IMAGE: DeviceNumber = loop_number(0);
const C0: DeviceNumber = loop_number(1);
const C1: DeviceNumber = loop_number(2);
const C2: DeviceNumber = loop_number(3);

const fn loop_number(minor: u32) -> DeviceNumber {
    DeviceNumber::at(7, minor)
}

fn machine() -> Script {
    let script = Script::new(|_, _| None);
    for device in [IMAGE, C0, C1, C2] {
        let mut world = script.world.borrow_mut();
        world.bind_foreign(device.minor(), u64::from(device.minor()));
    }
    script
}

fn line(target: Target) -> TargetLine {
    TargetLine {
        start: Sectors::default(),
        length: Sectors::new(2048),
        target,
    }
}

fn snapshot(origin: DeviceNumber, cow: DeviceNumber) -> TargetLine {
    line(Target::Snapshot(SnapshotParams {
        origin,
        cow,
        store: Store::Persistent,
        chunk: ChunkSize::DEFAULT,
        discard: Discard::Unsupported,
    }))
}

/// A dm device of the fake's, one verb at a time.
struct Device<'a> {
    script: &'a Script,
    uuid: DeviceUuid,
    number: DeviceNumber,
}

impl<'a> Device<'a> {
    fn create(script: &'a Script, name: &str) -> Self {
        let uuid = DeviceUuid::new(format!("DMSNAP-{name}")).expect("ours");
        let name = DeviceName::new(name).expect("a name");
        let number = script.create(&name, &uuid).expect("it is free");
        Self {
            script,
            uuid,
            number,
        }
    }

    fn live(script: &'a Script, name: &str, origin: DeviceNumber, cow: DeviceNumber) -> Self {
        let device = Self::create(script, name);
        device.load(&snapshot(origin, cow)).expect("a new store");
        device.resume().expect("nobody shares it");
        device
    }

    fn load(&self, line: &TargetLine) -> Result<(), Errno> {
        self.script.load(&self.uuid, line)
    }

    fn clear(&self) {
        self.script.clear(&self.uuid).expect("it is there");
    }

    fn suspend(&self) {
        self.script.suspend(&self.uuid).expect("it is there");
    }

    fn resume(&self) -> Result<(), Errno> {
        self.script.resume(&self.uuid).map(drop)
    }

    fn remove(&self, deferred: bool) -> Result<bool, Errno> {
        let address = Address::Uuid(self.uuid.as_str());
        self.script.remove(address, deferred)
    }

    /// As dmsetup has it: live table, inactive table, suspended.
    fn attributes(&self) -> String {
        let address = Address::Uuid(self.uuid.as_str());
        let found = self.script.query(address).expect("it is there");
        [
            (found.live_table, 'L'),
            (found.inactive_table, 'I'),
            (found.suspended, 's'),
        ]
        .map(|(is_so, letter)| if is_so { letter } else { '-' })
        .iter()
        .collect()
    }

    fn is_there(&self) -> bool {
        let address = Address::Uuid(self.uuid.as_str());
        self.script.query(address).is_ok()
    }

    fn is_invalid(&self) -> bool {
        let status = self.script.status(&self.uuid).expect("it is there");
        status.is_some_and(|(_, text)| text == "Invalid")
    }
}

/// V over the image and C0, and a checkpoint of it up to its pause.
fn prepared(script: &Script) -> (Device<'_>, Device<'_>) {
    let v = Device::live(script, "v", IMAGE, C0);
    let b = Device::create(script, "b");
    b.load(&snapshot(IMAGE, C0)).expect("a destination");
    v.load(&snapshot(b.number, C1)).expect("by its number");
    (v, b)
}

#[test]
fn a_snapshot_becomes_a_layer() {
    let script = machine();
    let (v, b) = prepared(&script);
    assert_eq!(
        (b.attributes().as_str(), v.attributes().as_str()),
        ("-I-", "LI-")
    );
    v.suspend();
    assert_eq!(b.resume(), Ok(()));
    assert_eq!(v.resume(), Ok(()));
    assert_eq!(
        (b.attributes().as_str(), v.attributes().as_str()),
        ("L--", "L--")
    );
    assert!(!b.is_invalid() && !v.is_invalid());
    let fork = Device::live(&script, "fork", b.number, C2);
    assert_eq!(
        b.remove(false),
        Err(Errno::EBUSY),
        "V and the fork have it open"
    );
    assert!(!fork.is_invalid());
}

#[test]
fn a_table_that_waits_for_its_exceptions_or_has_given_them_away_shows_no_chunk_size() {
    let script = machine();
    let (v, b) = prepared(&script);
    let table = |device: &Device<'_>, inactive| {
        let found = script.table(DevId::Uuid(&device.uuid), inactive);
        found.expect("it is there").expect("it has one").1
    };
    assert_eq!(table(&b, true), "7:0 7:1 P 0");
    v.suspend();
    assert_eq!(b.resume(), Ok(()));
    assert_eq!(table(&b, false), "7:0 7:1 P 8");
    assert_eq!(table(&v, false), "7:0 7:1 P 0");
}

#[test]
fn before_the_suspension_a_handover_is_undone_by_a_clear_and_a_removal() {
    let script = machine();
    let (v, b) = prepared(&script);
    assert_eq!(
        b.remove(false),
        Err(Errno::EBUSY),
        "V's inactive table holds it"
    );
    v.clear();
    assert_eq!(b.remove(false), Ok(false));
    assert_eq!(v.attributes(), "L--");
    assert!(!v.is_invalid());
}

#[test]
fn between_suspension_and_handover_it_is_undone_in_one_order_only() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(
        b.remove(false),
        Err(Errno::EBUSY),
        "V's inactive table holds it"
    );
    v.clear();
    assert_eq!(v.resume(), Err(Errno::EINVAL));
    assert_eq!(
        v.attributes(),
        "L-s",
        "still suspended, and its old table there"
    );
    assert_eq!(b.remove(false), Ok(false));
    assert_eq!(v.resume(), Ok(()));
    assert_eq!(v.attributes(), "L--");
    assert!(!v.is_invalid());
}

#[test]
fn after_the_handover_whoever_resumes_completes_it() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(b.resume(), Ok(()));
    assert!(v.is_invalid() && !b.is_invalid());
    assert_eq!(
        (v.attributes().as_str(), b.attributes().as_str()),
        ("LIs", "L--")
    );
    assert_eq!(b.remove(false), Err(Errno::EBUSY), "there is no way back");
    assert_eq!(v.resume(), Ok(()));
    assert!(!v.is_invalid() && !b.is_invalid());
}

#[test]
fn after_the_handover_a_cleared_table_can_be_loaded_again() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(b.resume(), Ok(()));
    v.clear();
    assert_eq!(v.resume(), Ok(()));
    assert!(v.is_invalid());
    assert_eq!(v.load(&snapshot(b.number, C1)), Ok(()));
    v.suspend();
    assert_eq!(v.resume(), Ok(()));
    assert!(!v.is_invalid() && !b.is_invalid());
}

#[test]
fn a_resume_of_v_too_early_invalidates_b_and_the_file_stays_valid() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(v.resume(), Ok(()));
    assert_eq!(
        (v.attributes().as_str(), b.attributes().as_str()),
        ("L--", "-I-")
    );
    assert_eq!(b.resume(), Ok(()));
    assert!(b.is_invalid());
    assert!(!v.is_invalid(), "it has a fresh store of its own");

    // A table that is loaded beside the invalid one takes its invalidity over.
    assert_eq!(b.load(&snapshot(IMAGE, C0)), Ok(()));
    assert_eq!(b.resume(), Ok(()));
    assert!(b.is_invalid());
    for table in [line(Target::Error), snapshot(IMAGE, C0)] {
        assert_eq!(b.load(&table), Ok(()));
        assert_eq!(b.resume(), Ok(()));
    }
    assert!(!b.is_invalid(), "read from the file anew");
}

#[test]
fn a_layer_whose_handover_was_cancelled_is_loaded_anew() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(v.resume(), Ok(()));
    assert_eq!(b.load(&snapshot(IMAGE, C0)), Err(Errno::EINVAL));
    assert_eq!(b.load(&line(Target::Error)), Ok(()));
    assert_eq!(b.attributes(), "-I-");
    assert_eq!(b.load(&snapshot(IMAGE, C0)), Ok(()));
    assert_eq!(b.resume(), Ok(()));
    assert!(!b.is_invalid());
}

#[test]
fn a_resume_of_b_too_early_is_refused_and_costs_nothing() {
    let script = machine();
    let (v, b) = prepared(&script);
    assert_eq!(b.resume(), Err(Errno::EINVAL));
    assert_eq!(b.attributes(), "L-s", "the table was swapped in");
    v.suspend();
    assert_eq!(b.resume(), Ok(()));
    assert_eq!(v.resume(), Ok(()));
    assert!(!v.is_invalid() && !b.is_invalid());
}

#[test]
fn a_third_table_of_the_same_origin_and_cow_device_is_refused() {
    let script = machine();
    let (_v, _b) = prepared(&script);
    let third = Device::create(&script, "third");
    assert_eq!(third.load(&snapshot(IMAGE, C0)), Err(Errno::EINVAL));
    assert_eq!(third.load(&snapshot(IMAGE, C2)), Ok(()));
}

#[test]
fn a_store_whose_header_says_so_is_invalid_from_its_load_on() {
    let script = machine();
    let start = [&b"SnAp"[..], &[0; 4]].concat();
    let inode = u64::from(C0.minor());
    script.world.borrow_mut().contents.insert(inode, start);
    assert!(Device::live(&script, "v", IMAGE, C0).is_invalid());
    assert!(!Device::live(&script, "other", IMAGE, C1).is_invalid());
}

#[test]
fn a_layer_that_is_flagged_for_removal_goes_with_its_last_user() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(b.resume().and_then(|()| v.resume()), Ok(()));
    assert_eq!(b.remove(true), Ok(true));
    assert_eq!(b.attributes(), "L--");
    let fork = Device::live(&script, "fork", b.number, C2);
    assert_eq!(v.remove(false), Ok(false));
    assert!(b.is_there(), "the fork has it open");
    // Another layer in between: they go one after the other.
    let top = Device::live(&script, "top", fork.number, C1);
    assert_eq!(fork.remove(true), Ok(true));
    assert_eq!(top.remove(true), Ok(false), "nobody has it open");
    assert!(!fork.is_there() && !b.is_there());
}

#[test]
fn a_snapshot_goes_back_to_its_layer_over_a_fresh_store() {
    let script = machine();
    let (v, b) = prepared(&script);
    v.suspend();
    assert_eq!(b.resume().and_then(|()| v.resume()), Ok(()));
    assert_eq!(v.load(&snapshot(b.number, C2)), Ok(()));
    v.suspend();
    assert_eq!(v.resume(), Ok(()));
    assert!(!v.is_invalid());
    let holding = |device| script.world.borrow().holding(device).count();
    assert_eq!((holding(C1), holding(C2), holding(b.number)), (0, 1, 1));
}

#[test]
fn a_live_or_inactive_table_and_an_open_node_have_a_device_open() {
    let script = machine();
    let v = Device::live(&script, "v", IMAGE, C0);
    let count = |device: &Device<'_>| {
        let found = script.query(Address::Number(device.number));
        found.expect("it is there").open_count
    };
    assert_eq!(count(&v), 0);
    let node = script
        .open_file(&v.number.dm_node(), false)
        .expect("a node");
    assert_eq!((count(&v), v.remove(false)), (1, Err(Errno::EBUSY)));
    drop(node);
    let above = Device::create(&script, "above");
    assert_eq!(above.load(&snapshot(v.number, C1)), Ok(()));
    assert_eq!((count(&v), v.remove(false)), (1, Err(Errno::EBUSY)));
    assert_eq!(above.resume(), Ok(()));
    assert_eq!(above.load(&snapshot(v.number, C2)), Ok(()));
    assert_eq!(count(&v), 1, "both tables of a device are one user");
    let missing = DeviceNumber::at(MAPPED, 99);
    assert_eq!(above.load(&snapshot(missing, C2)), Err(Errno::ENODEV));
    assert_eq!(above.remove(false), Ok(false));
    assert_eq!(v.remove(false), Ok(false));
}

fn attached(script: &Script, number: u32, path: &str) -> (ScriptFile, ScriptLoop) {
    let path = Path::new(path);
    let file = script.open_file(path, true).expect("it is there");
    let node = PathBuf::from(format!("/dev/loop{number}"));
    let device = script.open_loop(&node, true).expect("it opens");
    let attached = script.attach_loop(&device, &file, LO_AUTOCLEAR, 512, path);
    assert_eq!(attached, Ok(()));
    (file, device)
}

#[test]
fn a_loop_device_that_a_live_or_inactive_table_holds_stays_bound() {
    let script = machine();
    let (file, device) = attached(&script, 8, "/cow");
    let v = Device::live(&script, "v", IMAGE, C0);
    assert_eq!(v.load(&snapshot(IMAGE, loop_number(8))), Ok(()));
    drop((file, device));
    let is_bound = || script.world.borrow().loops.contains_key(&8);
    assert!(is_bound());
    v.clear();
    assert!(!is_bound());
}

#[test]
fn a_lock_is_shared_or_exclusive_and_goes_with_its_holder() {
    let script = machine();
    let node = Path::new("/dev/loop1");
    let open = || script.open_loop(node, false).expect("it opens");
    let (one, two) = (open(), open());
    assert_eq!(script.lock_loop(&one, false), Ok(()));
    assert_eq!(script.lock_loop(&two, false), Ok(()));
    assert_eq!(script.lock_loop(&two, true), Err(Errno::EAGAIN));
    assert_eq!(script.mark_loop(&one), Ok(()));
    assert_eq!(script.loop_is_marked(&one), Ok(false), "by somebody else");
    assert_eq!(script.loop_is_marked(&two), Ok(true));
    drop(one);
    assert_eq!(script.loop_is_marked(&two), Ok(false));
    assert_eq!(script.lock_loop(&two, true), Ok(()));
    assert_eq!(script.lock_loop(&open(), false), Err(Errno::EAGAIN));
    let other = script.open_loop(Path::new("/dev/loop2"), false);
    let other = other.expect("it opens");
    assert_eq!(script.lock_loop(&other, true), Ok(()));
}

#[test]
fn a_loop_device_keeps_the_lock_on_its_backing_file() {
    let script = machine();
    let (file, device) = attached(&script, 8, "/cow");
    assert_eq!(script.lock_file(&file, true), Ok(()));
    drop(file);
    let again = script.open_file(Path::new("/cow"), true);
    let again = again.expect("it is there");
    assert_eq!(script.lock_file(&again, true), Err(Errno::EAGAIN));
    drop(device);
    assert_eq!(script.lock_file(&again, true), Ok(()));
}

#[test]
fn a_file_is_the_same_by_another_path_and_another_by_the_same() {
    let script = machine();
    let id = |path: &str| {
        script
            .look(Path::new(path), true)
            .map(|facts| (facts.id, facts.links))
    };
    let made = script.make_file(Path::new("/a")).expect("it is free");
    let first = script.inspect_file(&made).expect("it is open");
    assert_eq!(script.link_file(Path::new("/a"), Path::new("/bb")), Ok(()));
    assert_eq!(id("/bb"), Ok((first.id, 2)));
    assert_eq!(
        script.link_file(Path::new("/a"), Path::new("/bb")),
        Err(Errno::EEXIST)
    );
    assert_eq!(script.unlink(Path::new("/a")), Ok(()));
    assert_eq!(id("/a"), Err(Errno::ENOENT));
    assert_eq!(id("/bb"), Ok((first.id, 1)));
    let anew = script.make_file(Path::new("/a")).expect("it is free");
    assert_ne!(script.inspect_file(&anew).expect("it is open").id, first.id);
    assert_eq!(
        script.move_file(Path::new("/a"), Path::new("/bb")),
        Err(Errno::EEXIST)
    );
    assert_eq!(
        script.replace_file(Path::new("/a"), Path::new("/bb")),
        Ok(())
    );
    let gone = script.inspect_file(&made).expect("it is open");
    assert_eq!((gone.id, gone.links), (first.id, 0));
    assert_ne!(
        id("/cc").map(|(id, _)| id),
        id("/bb").map(|(id, _)| id),
        "as long a path"
    );
}

#[test]
fn a_removed_device_holds_its_loop_devices_for_as_long_as_its_table_takes() {
    let script = machine();
    drop(attached(&script, 8, "/unused"));
    let (file, device) = attached(&script, 8, "/cow");
    let v = Device::live(&script, "v", IMAGE, loop_number(8));
    drop((file, device));
    script.world.borrow_mut().dying_until = Duration::from_millis(5);
    assert_eq!(v.remove(false), Ok(false));
    let is_bound = || script.world.borrow().loops.contains_key(&8);
    assert!(!v.is_there() && is_bound());
    script.sleep(Duration::from_millis(5));
    assert!(!is_bound());
}
