//! Every call of a checkpoint failed in turn.

use std::collections::BTreeSet;
use std::path::Path;

use nix::errno::Errno;

use super::checkpoint::{CheckpointOptions, checkpoint};
use super::create::{create, create_on};
use super::{Base, SnapshotOptions};
use crate::backing::CowSize;
use crate::base::{DeviceName, Handles};
use crate::dm::Address;
use crate::error::{Error, Result, Retry, Step};
use crate::kernel::DeviceMapper;
use crate::kernel::fake::{Script, ScriptLoop};
use crate::store::{self, Probe};
use crate::teardown::{clean, repair_every};

const COW: &str = "/the/cow";
const NEXT: &str = "/the/next";

fn name(name: &str) -> DeviceName {
    DeviceName::new(name).expect("a name")
}

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with a live snapshot.
fn machine() -> (Script, Handles) {
    let script = Script::new(never);
    let (image, cow) = (Path::new("/image"), Path::new(COW));
    let made = create(&script, &SnapshotOptions::new(), image, cow, &name("vm"));
    let handles = made.expect("nothing fails").into_handles();
    // What the kernel wrote when it read the blank file.
    let mut header = vec![0; 4096];
    for (nth, word) in [0x7041_6e53_u32, 1, 1, 8].iter().enumerate() {
        header[nth * 4..nth * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    let inode = script
        .world
        .borrow_mut()
        .file_at(Path::new(COW))
        .expect("it is there");
    script.world.borrow_mut().contents.insert(inode, header);
    script.world.borrow_mut().missing.insert(NEXT.into());
    script.restart(never);
    (script, handles)
}

fn freeze(script: &Script) -> Result<(Base<ScriptLoop>, Handles)> {
    let mut options = CheckpointOptions::new();
    options.make_cow(CowSize::Bytes(1 << 20)).retry(Retry::ONCE);
    checkpoint(
        script,
        &options,
        &"vm".into(),
        &name("noon"),
        Path::new(NEXT),
    )
}

/// Whether the snapshot's COW file says that it is a layer's.
fn is_frozen(script: &Script) -> bool {
    let mut world = script.world.borrow_mut();
    let inode = world.file_at(Path::new(COW)).expect("it is there");
    match store::probe(&world.contents[&inode]) {
        Probe::Store(header) => header.chain.is_some_and(|chain| chain.frozen),
        other => panic!("{other:?}"),
    }
}

/// The loop device under the snapshot's writes, and whether the guest waits.
fn writes_to(script: &Script) -> (u32, bool) {
    script.restart(never);
    let device = script.query(Address::Name("vm")).expect("it is there");
    let world = script.world.borrow();
    let live = world.devices[&device.uuid]
        .live
        .as_ref()
        .expect("it is live");
    let valid = live.valid;
    assert!(valid, "its exceptions are lost");
    assert!(!device.inactive_table || device.suspended);
    (
        live.params().expect("a snapshot").cow.minor,
        device.suspended,
    )
}

#[test]
fn whichever_call_of_a_checkpoint_fails_the_snapshot_works_as_before_or_over_the_layer() {
    let (script, handles) = machine();
    let (before, _) = writes_to(&script);
    script.restart(never);
    let (layer, _) = freeze(&script).expect("nothing fails");
    let calls = script.calls.take();
    let (after, waits) = writes_to(&script);
    assert!(before != after && !waits && is_frozen(&script));
    // A fork, and the end of all: the layer goes with its last user.
    script.world.borrow_mut().missing.insert("/fork".into());
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Bytes(1 << 20));
    let fork = create_on(&script, &options, &layer, Path::new("/fork"), &name("fork"));
    let fork = fork.expect("nothing fails").into_handles();
    for each in [&handles, &fork] {
        clean(&script, each, &Retry::ONCE).expect("nobody has it open");
    }
    drop(layer);
    let files = BTreeSet::from(["/fork".into(), NEXT.into()]);
    assert_eq!(script.world.borrow().residue(), files);

    let of = |step| calls.iter().filter(|call| **call == step).count();
    assert_eq!(calls.len(), 52, "{calls:?}");
    assert_eq!((of(Step::Suspend), of(Step::Resume)), (1, 2));
    let suspended = calls.iter().position(|call| *call == Step::Suspend);
    let paused = &calls[suspended.expect("it suspends")..];
    assert_eq!(paused[..3], [Step::Suspend, Step::Resume, Step::Resume]);
    for (index, step) in calls.iter().enumerate() {
        let (script, handles) = machine();
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let result = freeze(&script).map(drop);
        let (cow, waits) = match &result {
            // The last resume: the layer has all, and the guest waits. Whoever resumes it completes the checkpoint.
            Err(Error::Debris { left, .. }) if *step == Step::Resume => {
                assert_eq!(left[0].object, Path::new("/dev/mapper/vm"), "call {index}");
                script.restart(never);
                let uuid = handles.uuid.as_ref().expect("a uuid");
                script.resume(uuid).expect("nothing fails");
                writes_to(&script)
            }
            _ => writes_to(&script),
        };
        assert!(
            !waits,
            "the guest waits after call {index}, {step:?}: {result:?}"
        );
        if cow == after {
            // What the end of it did not come to, a repair does.
            let repaired = repair_every(&script).expect("nothing fails");
            assert!(
                repaired.iter().all(|item| item.outcome.is_ok()),
                "{repaired:?}"
            );
            assert!(is_frozen(&script), "call {index}, {step:?}");
            let layer = script.query(Address::Name("noon")).expect("it is there");
            assert!(layer.deferred_remove, "call {index}, {step:?}");
            continue;
        }
        assert!(
            result.is_err() && !is_frozen(&script),
            "call {index}, {step:?}"
        );
        assert_eq!(
            script.world.borrow().residue(),
            before,
            "call {index}, {step:?}: {result:?}"
        );
        clean(&script, &handles, &Retry::ONCE).expect("no loop device is held");
    }
}

/// The snapshot's COW file would be refused to everybody, once it is down, if it went on being a layer's.
#[test]
fn wherever_a_checkpoint_is_killed_one_repair_ends_it_and_no_file_is_taken_for_another_sort() {
    let (script, _) = machine();
    let (before, _) = writes_to(&script);
    script.restart(never);
    drop(freeze(&script).expect("nothing fails"));
    let calls = script.calls.take();
    for (index, step) in calls.iter().enumerate() {
        let (script, _) = machine();
        script.restart(move |_, nth| (nth > index).then_some(Errno::EIO));
        let killed = freeze(&script).map(drop);
        assert!(killed.is_err(), "call {index}, {step:?}");
        script.restart(never);
        for item in repair_every(&script).expect("it can be asked") {
            assert!(item.outcome.is_ok(), "call {index}, {step:?}: {item:?}");
        }
        let (cow, waits) = writes_to(&script);
        assert!(!waits, "call {index}, {step:?}");
        assert_eq!(is_frozen(&script), cow != before, "call {index}, {step:?}");
    }
}
