//! Every call of growing and recovering failed in turn.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::create::create;
use super::grow::grow_on;
use super::recover::recover_on;
use super::{GrowOptions, Snapshot, SnapshotOptions};
use crate::base::{DeviceName, DeviceUuid, Handles, Kind, Store};
use crate::dm::SnapshotStatus;
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict};
use crate::kernel::DeviceMapper;
use crate::kernel::fake::Script;
use crate::kernel::fake::world::*;
use crate::teardown::clean;

const LONGER: u64 = 3 << 20;
const COW: &str = "/the/cow";

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with a live snapshot whose device says `status`.
fn machine(status: Option<&'static str>) -> (Script, Handles) {
    let script = Script::new(never);
    let mut options = SnapshotOptions::new();
    options.store(Store::PersistentOverflow);
    let name = DeviceName::new("vm").expect("a name");
    let (image, cow) = (Path::new("/image"), Path::new(COW));
    let snapshot = create(&script, &options, image, cow, &name).expect("nothing fails");
    script.world.borrow_mut().status = status;
    script.restart(never);
    (script, snapshot.into_handles())
}

fn grow(script: &Script) -> Result<SnapshotStatus> {
    grow_on(script, &GrowOptions::new(), &"vm".into(), LONGER)
}

fn recover(script: &Script) -> Result<Snapshot> {
    recover_on(
        script,
        GrowOptions::new().retry(Retry::ONCE),
        &"vm".into(),
        LONGER,
    )
}

/// What a failure of that call is reported as: a loop device that is only looked at is inspected.
fn reported(step: Step) -> Step {
    match step {
        Step::OpenLoop => Step::InspectLoop,
        other => other,
    }
}

fn total(status: SnapshotStatus) -> u64 {
    match status {
        SnapshotStatus::Usage(usage) => usage.total.to_bytes().expect("small"),
        other => panic!("{other}"),
    }
}

fn cow_bytes(script: &Script) -> u64 {
    script.world.borrow().file_bytes(Path::new(COW))
}

#[test]
fn whichever_call_of_grow_fails_the_snapshot_is_as_it_was_and_asking_again_does_it() {
    let (script, _) = machine(None);
    assert_eq!(grow(&script).map(total), Ok(LONGER));
    let calls = script.calls.take();
    assert_eq!(calls.len(), 13, "{calls:?}");
    for (index, step) in calls.iter().enumerate() {
        let (script, handles) = machine(None);
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let error = grow(&script).expect_err("one call failed");
        assert!(matches!(&error, Error::Failed { step: at, .. } if *at == reported(*step)));
        assert_eq!(script.world.borrow().residue(), before, "{step:?}");
        script.restart(never);
        assert_eq!(grow(&script).map(total), Ok(LONGER), "after {step:?}");
        clean(&script, &handles, &Retry::ONCE).expect("no loop device is held");
        assert_eq!(script.world.borrow().residue(), BTreeSet::new());
    }
}

#[test]
fn a_file_is_made_longer_only_and_the_loop_device_told_in_any_case() {
    let (script, _) = machine(None);
    grow(&script).expect("nothing fails");
    script.restart(never);
    let less = grow_on(&script, &GrowOptions::new(), &"vm".into(), 1).map(total);
    assert_eq!((less, cow_bytes(&script)), (Ok(LONGER), LONGER));
    let calls = script.calls.take();
    assert!(!calls.contains(&Step::SizeFile) && calls.contains(&Step::ResizeLoop));
}

#[test]
fn what_grow_cannot_help_is_refused_and_nothing_done() {
    let name = || "vm".to_owned();
    let overflowed = Refusal::Overflowed { name: name() };
    let invalid = Refusal::Invalid { name: name() };
    for (status, refusal) in [("Overflow", overflowed), ("Invalid", invalid.clone())] {
        let (script, _) = machine(Some(status));
        assert_eq!(grow(&script), Err(refusal.into()));
        let calls = script.calls.take();
        assert!(!calls.contains(&Step::SizeFile) && !calls.contains(&Step::ResizeLoop));
    }
    let working = Refusal::NotOverflowed { name: name() };
    for (status, refusal) in [(None, working), (Some("Invalid"), invalid)] {
        let (script, handles) = machine(status);
        assert_eq!(recover(&script), Err(refusal.into()));
        assert_eq!(cow_bytes(&script), FILE_BYTES);
        clean(&script, &handles, &Retry::ONCE).expect("it is as it was");
    }
}

#[test]
fn a_file_that_is_not_the_one_behind_the_loop_device_is_left_alone() {
    for status in [None, Some("Overflow")] {
        let (script, _) = machine(status);
        let moved = || {
            for binding in script.world.borrow_mut().loops.values_mut() {
                binding.path = PathBuf::from("/somewhere/else");
            }
        };
        moved();
        let error = match status {
            None => grow(&script).expect_err("another file"),
            Some(_) => recover(&script).map(drop).expect_err("another file"),
        };
        let path = PathBuf::from("/somewhere/else");
        let name = "vm".to_owned();
        assert_eq!(error, Refusal::FileElsewhere { name, path }.into());
        let missing = |step, _| (step == Step::OpenFile).then_some(Errno::ENOENT);
        script.restart(missing);
        let refused = match status {
            None => grow(&script).map(drop),
            Some(_) => recover(&script).map(drop),
        };
        assert_eq!(refused, Err(error));
        assert!(!script.calls.borrow().contains(&Step::SizeFile));
    }
}

#[test]
fn recover_makes_the_same_snapshot_over_a_longer_file() {
    let (script, old) = machine(Some("Overflow"));
    let new = recover(&script).expect("nothing fails").into_handles();
    assert_eq!(grow(&script).map(total), Ok(LONGER));
    assert_eq!((&new.name, cow_bytes(&script)), (&old.name, LONGER));
    let world = script.world.borrow();
    let params = world.devices.values().next().and_then(ScriptDevice::params);
    let params = params.expect("a table");
    assert_eq!(params.store, Store::PersistentOverflow);
    assert_eq!(world.loops[&params.cow.minor()].path, Path::new(COW));
    assert_eq!(
        world.loops[&params.origin.minor()].path,
        Path::new("/image")
    );
}

#[test]
fn a_recovered_snapshot_ends_flushes_if_the_old_one_did() {
    let (script, old) = machine(Some("Overflow"));
    let old = old.dev.expect("a number");
    script.end_flushes(old).expect("nothing fails");
    let new = recover(&script).expect("nothing fails").into_handles();
    assert!(script.ends_flushes(new.dev.expect("a number")));
    let (script, _) = machine(Some("Overflow"));
    let new = recover(&script).expect("nothing fails").into_handles();
    assert!(!script.ends_flushes(new.dev.expect("a number")));
}

#[test]
fn whichever_call_of_recover_fails_the_old_device_stays_or_the_error_says_that_it_went() {
    let (script, _) = machine(Some("Overflow"));
    let _ = recover(&script).expect("nothing fails");
    let calls = script.calls.take();
    let removal = calls.iter().position(|step| *step == Step::Remove);
    let removal = removal.expect("it removes");
    for (index, step) in calls.iter().enumerate() {
        // Its failure is a warning.
        if *step == Step::Link {
            continue;
        }
        let (script, _) = machine(Some("Overflow"));
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let error = recover(&script).expect_err("one call failed");
        let Error::Failed {
            step: at, source, ..
        } = &error
        else {
            panic!("{error:?}");
        };
        let after = script.world.borrow().residue();
        if index <= removal {
            assert_eq!(*at, reported(*step), "call {index}");
            assert_eq!(after, before, "call {index}, {step:?}");
            script.restart(never);
            let _ = recover(&script).expect("it is as it was");
        } else {
            assert_eq!(at, step, "call {index}");
            assert_eq!(after, BTreeSet::new(), "call {index}, {step:?}");
            let note = source.note().expect("a note");
            assert!(note.contains("is removed"), "{note}");
            assert_eq!(cow_bytes(&script), LONGER);
        }
    }
}

#[test]
fn an_open_device_is_not_recovered_from_under_its_user() {
    let (script, _) = machine(Some("Overflow"));
    script.world.borrow_mut().busy_until = Duration::MAX;
    let before = script.world.borrow().residue();
    let error = recover(&script).expect_err("it is open");
    assert_eq!(error.verdict(), Some(Verdict::Busy));
    assert_eq!(script.world.borrow().residue(), before);
    script.world.borrow_mut().busy_until = Duration::ZERO;
    let _ = recover(&script).expect("closed");
}

/// "Refused" means that no device was touched, and here one is gone.
#[test]
fn what_would_be_refused_after_the_removal_is_a_failure_that_says_so() {
    let (script, _) = machine(Some("Overflow"));
    let removed = AtomicBool::new(false);
    script.restart(move |step, _| match step {
        Step::Remove => {
            removed.store(true, Ordering::Relaxed);
            None
        }
        // Somebody has locked the COW file.
        Step::LockFile if removed.load(Ordering::Relaxed) => Some(Errno::EAGAIN),
        _ => None,
    });
    let error = recover(&script).expect_err("it cannot be made anew");
    let Error::Failed { step, source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*step, Step::Create);
    let note = source.note().expect("a note");
    assert!(note.contains("is locked"), "{note}");
    assert!(note.contains("the overflowed device is removed"), "{note}");
}

/// A machine with a claimed device of a pool, and what releases it and claims it for the next VM.
fn pooled() -> (Script, DeviceUuid) {
    let (script, handles) = machine(None);
    let uuid = handles.uuid.expect("its uuid");
    let pooled = DeviceUuid::new(format!("{}-pool", uuid.as_str())).expect("ours");
    assert_eq!(pooled.kind(), Kind::Pooled);
    let mut world = script.world.borrow_mut();
    let device = world.devices.remove(uuid.as_str()).expect("it is there");
    world.devices.insert(pooled.to_string(), device);
    drop(world);
    (script, pooled)
}

#[test]
fn a_device_that_is_another_vms_by_now_is_not_grown() {
    let (script, uuid) = pooled();
    let (world, key) = (Arc::clone(&script.world), uuid.to_string());
    script.restart(move |step, _| {
        if step == Step::InspectLoop
            && let Some(device) = world.borrow_mut().devices.get_mut(&key)
        {
            device.name = "the-next-vm".to_owned();
        }
        None
    });
    let error = grow(&script).expect_err("vm is gone");
    assert_eq!(error.verdict(), Some(Verdict::Gone), "{error}");
    assert!(!script.calls.borrow().contains(&Step::SizeFile));
}

#[test]
fn a_pools_uuid_does_not_say_which_snapshot_is_meant() {
    let (script, uuid) = pooled();
    let error = grow_on(&script, &GrowOptions::new(), &(&uuid).into(), LONGER);
    let error = error.expect_err("it says no more than which device");
    assert!(matches!(error, Error::Refused(_)), "{error}");
    assert!(grow(&script).is_ok(), "its name does");
}
