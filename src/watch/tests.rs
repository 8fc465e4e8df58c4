//! A look, every call failed in turn.

use std::path::Path;

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
