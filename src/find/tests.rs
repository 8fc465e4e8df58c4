//! Listing and adopting, every call failed in turn.

use std::path::Path;

use nix::errno::Errno;

use super::adopt::adopt_on;
use super::list::ours;
use crate::base::{DeviceId, DeviceName, DeviceNumber, Handles};
use crate::error::{AdoptObstacle, Error, Refusal, Result, Step};
use crate::kernel::LO_AUTOCLEAR;
use crate::kernel::fake::Script;
use crate::kernel::{DeviceMapper, Files, Loops};

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with a snapshot that losetup and dmsetup made.
fn foreign() -> Script {
    let script = Script::new(never);
    let mut world = script.world.borrow_mut();
    world.bind_foreign(3, 8);
    world.bind_foreign(4, 9);
    world.make_foreign("vm", 3, 4);
    drop(world);
    script
}

fn adopt(script: &Script) -> Result<Handles> {
    adopt_on(script, &DeviceId::from("vm"))
}

fn step_of(error: &Error) -> Step {
    match error {
        Error::Failed { step, .. } => *step,
        other => panic!("{other}"),
    }
}

/// Whether the two loop devices are as their maker left them.
fn loops_untouched(script: &Script) -> bool {
    let world = script.world.borrow();
    world.loops.values().all(|binding| !binding.autoclear)
}

#[test]
fn whichever_call_of_an_adoption_fails_nothing_was_touched_or_the_next_one_mends_it() {
    let script = foreign();
    adopt(&script).expect("nothing fails");
    assert!(!loops_untouched(&script), "they go with the snapshot now");
    let calls = script.calls.take();
    assert_eq!(calls.len(), 49, "{calls:?}");
    let named = calls.iter().position(|step| *step == Step::SetUuid);
    let named = named.expect("it gets a uuid");
    for (index, step) in calls.iter().enumerate() {
        let script = foreign();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        match adopt(&script) {
            // Some calls only look, for a message or for an identity that can be unknown.
            Ok(_) => assert_ne!(*step, Step::SetUuid),
            Err(Error::Refused(Refusal::NotAdoptable { .. })) => assert!(index < named),
            Err(error) => assert_eq!(step_of(&error), *step, "call {index}"),
        }
        let uuids: Vec<String> = script.world.borrow().devices.keys().cloned().collect();
        let ours = uuids[0].starts_with("DMSNAP-");
        if index <= named && uuids[0].is_empty() {
            assert!(loops_untouched(&script), "call {index}, {step:?}");
        }
        assert!(ours || index <= named, "call {index}, {step:?}");
        script.restart(never);
        let handles = adopt(&script).expect("nothing fails any more");
        assert_eq!(handles.name, DeviceName::new("vm").ok());
        let world = script.world.borrow();
        assert!(world.loops.values().all(|binding| binding.autoclear));
    }
}

#[test]
fn what_cannot_be_adopted_says_why_and_is_left_alone() {
    let script = foreign();
    script.world.borrow_mut().loops.remove(&4);
    let error = adopt(&script).expect_err("no loop device under it");
    let number = DeviceNumber::new(7, 4).expect("within bounds");
    let refusal = Refusal::NotAdoptable {
        name: "vm".to_owned(),
        why: AdoptObstacle::CowNotALoop { number },
    };
    assert_eq!(error, Error::Refused(refusal));
    assert!(loops_untouched(&script));
}

#[test]
fn whichever_call_of_a_list_fails_the_error_names_it_and_hides_no_more_than_its_snapshot() {
    let all = |script: &Script| ours(script);
    let machine = || {
        let script = foreign();
        adopt(&script).expect("nothing fails");
        script.world.borrow_mut().make_foreign("other", 3, 4);
        script.restart(never);
        script
    };
    let script = machine();
    let found = all(&script).expect("nothing fails");
    assert_eq!(found.len(), 1, "another program's is not in it");
    let calls = script.calls.take();
    assert_eq!(calls.len(), 15, "{calls:?}");
    for (index, step) in calls.iter().enumerate() {
        let script = machine();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let before = script.world.borrow().residue();
        match all(&script) {
            Err(error) => assert_eq!(step_of(&error), *step, "call {index}"),
            Ok(found) => match &found[0].1 {
                Err(error) => assert_eq!(step_of(error), *step, "call {index}"),
                // What a loop device has is left out when it cannot be read.
                Ok(_) => assert!(matches!(
                    step,
                    Step::InspectLoop | Step::OpenLoop | Step::ReadDiskseq
                )),
            },
        }
        assert_eq!(script.world.borrow().residue(), before);
    }
}

#[test]
fn a_fake_loop_device_goes_with_its_last_user() {
    let script = Script::new(never);
    let device = script
        .open_loop(Path::new("/dev/loop0"), true)
        .expect("opens");
    let file = script.open_file(Path::new("/x"), true).expect("opens");
    let attached = script.attach_loop(&device, &file, LO_AUTOCLEAR, 512, Path::new("/x"));
    assert_eq!(attached, Ok(()));
    drop(device);
    assert!(script.world.borrow().loops.is_empty());
    assert_eq!(script.list().map(|all| all.len()), Ok(0));
}
