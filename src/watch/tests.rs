//! A look, every call failed in turn.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use super::Change;
use super::watcher::Watcher;
use crate::base::{DeviceId, DeviceName};
use crate::error::{Error, Step};
use crate::kernel::fake::Script;
use crate::snapshot::{SnapshotOptions, create};

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with two live snapshots.
fn machine() -> Script {
    let script = Script::new(never);
    let options = SnapshotOptions::new();
    for (name, cow) in [("vm-1", "/cow"), ("vm-2", "/the/cow")] {
        let name = DeviceName::new(name).expect("a name");
        let made = create(
            &script,
            &options,
            Path::new("/image"),
            Path::new(cow),
            &name,
        );
        let _ = made.expect("nothing fails");
    }
    script
}

fn watch(script: &Script) -> Watcher<'_, Script> {
    let mut watcher = Watcher::new(script).expect("nothing fails");
    for name in ["vm-1", "vm-2"] {
        watcher.add(&DeviceId::from(name)).expect("it is live");
    }
    script.restart(never);
    watcher
}

#[test]
fn whichever_call_of_a_check_fails_it_is_told_and_hides_no_other() {
    let script = machine();
    assert_eq!(watch(&script).check(), Ok(Vec::new()));
    let calls = script.calls.take();
    assert_eq!(calls, [Step::ArmPoll, Step::Status, Step::Status]);
    for (index, step) in calls.iter().enumerate() {
        let script = machine();
        let mut watcher = watch(&script);
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        match watcher.check() {
            Err(Error::Failed { step: named, .. }) => {
                assert_eq!((named, *step), (Step::ArmPoll, Step::ArmPoll))
            }
            Err(error) => panic!("{error}"),
            Ok(news) => {
                let [event] = &news[..] else {
                    panic!("{news:?}")
                };
                assert_eq!(event.name, format!("vm-{index}"));
                assert!(matches!(
                    &event.change,
                    Change::Unreadable(Error::Failed {
                        step: Step::Status,
                        ..
                    })
                ));
            }
        }
        assert_eq!(watcher.watched.len(), 2, "both are watched on");
    }
}

#[test]
fn whichever_call_of_an_addition_fails_nothing_is_added() {
    let script = machine();
    drop(watch(&script));
    let mut watcher = Watcher::new(&script).expect("nothing fails");
    script.restart(never);
    watcher.add(&DeviceId::from("vm-1")).expect("it is live");
    let calls = script.calls.take();
    assert_eq!(calls.len(), 3, "{calls:?}");
    for index in 0..calls.len() {
        let script = machine();
        let mut watcher = Watcher::new(&script).expect("nothing fails");
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        assert!(watcher.add(&DeviceId::from("vm-1")).is_err());
        assert!(watcher.watched.is_empty());
    }
}

#[test]
fn those_that_are_due_one_after_the_other_are_read_together() {
    let script = machine();
    let mut watcher = Watcher::new(&script).expect("nothing fails");
    let reads = |watcher: &mut Watcher<'_, Script>, now: u64| {
        script.world.borrow_mut().now = Duration::from_millis(now);
        script.restart(never);
        watcher.check().expect("nothing fails");
        let calls = script.calls.take();
        calls.iter().filter(|step| **step == Step::Status).count()
    };
    watcher.add(&DeviceId::from("vm-1")).expect("it is live");
    // Nearly full, so that its pause is short; then both are as they are.
    assert_eq!(reads(&mut watcher, 10_000), 1);
    let pause = watcher.pause();
    watcher.add(&DeviceId::from("vm-2")).expect("it is live");
    let pause_ms = u64::try_from(pause.as_millis()).expect("short");
    let later = 10_000 + pause_ms / 16;
    assert_eq!(reads(&mut watcher, later), 1, "vm-2 alone");
    assert_eq!(reads(&mut watcher, 10_000 + pause_ms / 2), 0, "none is due");
    assert_eq!(
        reads(&mut watcher, 10_000 + pause_ms),
        2,
        "vm-2 a little early"
    );
    assert_eq!(watcher.pause(), pause, "from now on they are due together");
}

#[test]
fn one_that_is_added_again_is_watched_once() {
    let script = machine();
    let mut watcher = watch(&script);
    for name in ["vm-1", "vm-2", "vm-1"] {
        watcher.add(&DeviceId::from(name)).expect("it is live");
    }
    assert_eq!(watcher.watched.len(), 2);
    assert!(watcher.forget(&DeviceId::from("vm-1")));
    watcher.add(&DeviceId::from("vm-1")).expect("it is live");
    assert_eq!(watcher.watched.len(), 2);
}

#[test]
fn a_pools_uuid_is_not_watched() {
    let script = machine();
    let mut world = script.world.borrow_mut();
    let uuid = world.devices.keys().next().expect("two").clone();
    let device = world.devices.remove(&uuid).expect("it is there");
    let (name, uuid) = (device.name.clone(), format!("{uuid}-pool"));
    world.devices.insert(uuid.clone(), device);
    drop(world);
    let mut watcher = Watcher::new(&script).expect("nothing fails");
    assert!(watcher.add(&DeviceId::from(uuid.as_str())).is_err());
    watcher
        .add(&DeviceId::from(name.as_str()))
        .expect("its name says which snapshot");
}
