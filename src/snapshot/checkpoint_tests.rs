//! Every call of a checkpoint failed in turn.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use super::checkpoint::{CheckpointOptions, checkpoint};
use super::create::{create, create_on};
use super::layer::attach_layer;
use super::origin::open as open_origin;
use super::rollback::rollback;
use super::{Base, SnapshotOptions};
use crate::backing::{CowOptions, CowSize};
use crate::base::{DeviceName, DeviceNumber, Durability, Handles};
use crate::dm::Address;
use crate::error::{Error, Result, Retry, Step};
use crate::find::at_work::MAKER_RETRY;
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
    machine_of(Durability::PowerCuts)
}

fn machine_of(durability: Durability) -> (Script, Handles) {
    let script = Script::new(never);
    let (image, cow) = (Path::new("/image"), Path::new(COW));
    let mut options = SnapshotOptions::new();
    options.durability(durability);
    let made = create(&script, &options, image, cow, &name("vm"));
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
    freeze_as(script, false)
}

fn freeze_as(script: &Script, keep: bool) -> Result<(Base<ScriptLoop>, Handles)> {
    let mut options = CheckpointOptions::new();
    options
        .keep(keep)
        .make_cow(CowSize::Bytes(1 << 20))
        .deadline(Duration::ZERO);
    checkpoint(
        script,
        &options,
        &"vm".into(),
        &name("noon"),
        Path::new(NEXT),
    )
}

/// As a create has it: the kernel sizes its table of changed chunks by what the COW device is when the table is loaded.
#[test]
fn a_made_cow_file_is_short_until_the_table_is_loaded_and_whole_before_the_pause() {
    for (expected, is_short) in [
        (None, true),
        (Some(CowSize::Bytes(1 << 20)), true),
        (Some(CowSize::Bytes(1 << 30)), false),
    ] {
        let (script, _) = machine();
        let mut options = CheckpointOptions::new();
        options.make_cow(CowSize::Bytes(1 << 30));
        if let Some(expected) = expected {
            options.expected_changes(expected);
        }
        let (id, next) = ("vm".into(), Path::new(NEXT));
        let frozen = checkpoint(&script, &options, &id, &name("noon"), next);
        assert!(frozen.is_ok(), "nothing fails");
        let calls = script.calls.take();
        let first = |step| calls.iter().position(|call| *call == step);
        let [loaded, paused] = [Step::Load, Step::Suspend].map(first);
        let told = first(Step::ResizeLoop);
        assert_eq!(told.is_some(), is_short, "{calls:?}");
        assert!(loaded < paused && told < paused && (!is_short || loaded < told));
    }
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
        live.params().expect("a snapshot").cow.minor(),
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
    assert_eq!(calls.len(), 53, "{calls:?}");
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
            let repaired = repair_every(&script, &MAKER_RETRY).expect("nothing fails");
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

/// As a SIGKILL: nothing that comes behind is done, and what the process had open is closed.
#[test]
fn whichever_call_a_checkpoint_dies_at_one_repair_ends_it() {
    dies_and_is_repaired(false);
}

#[test]
fn a_layer_that_was_to_be_kept_is_kept_by_the_repair_too() {
    dies_and_is_repaired(true);
}

/// One repair does all there is to do after a death at that call, and a second one finds nothing.
fn repaired_for_good(script: &Script, index: usize) {
    script.restart(never);
    for item in repair_every(script, &MAKER_RETRY).expect("it can be asked") {
        assert!(item.outcome.is_ok(), "call {index}: {item:?}");
    }
    script.restart(never);
    let again = repair_every(script, &MAKER_RETRY).expect("it can be asked");
    assert!(again.is_empty(), "call {index}: {again:?}");
}

fn dies_and_is_repaired(keep: bool) {
    let calls = {
        let (script, _) = machine();
        freeze_as(&script, keep).map(drop).expect("nothing fails");
        script.calls.take().len()
    };
    let mut finished = 0;
    for index in 0..calls {
        let (script, _) = machine();
        let (before, _) = writes_to(&script);
        script.restart(move |_, nth| (nth > index).then_some(Errno::EIO));
        let _ = freeze_as(&script, keep).map(drop);
        repaired_for_good(&script, index);
        let (cow, waits) = writes_to(&script);
        assert!(!waits, "the guest waits after call {index}");
        let layer = script.query(Address::Name("noon"));
        assert_eq!(cow != before, layer.is_ok(), "call {index}");
        assert_eq!(is_frozen(&script), layer.is_ok(), "call {index}");
        if let Ok(layer) = layer {
            assert_eq!(layer.deferred_remove, !keep, "call {index}");
            let alias = script.is_our_alias(Path::new("/dev/mapper/noon"));
            assert_eq!(alias, keep, "call {index}");
            finished += 1;
        }
    }
    assert!(finished > 0, "it dies behind the handover too");
}

/// Whether the guest's flushes end at the snapshot.
fn ends_flushes(script: &Script) -> bool {
    script.restart(never);
    let device = script.query(Address::Name("vm")).expect("it is there");
    script.ends_flushes(device.number)
}

/// A swap of its tables resets that.
#[test]
fn a_snapshot_that_ends_flushes_does_so_behind_a_checkpoint_a_rollback_and_a_repair() {
    for durability in [Durability::Processes, Durability::PowerCuts] {
        let wanted = durability == Durability::Processes;
        let (script, _) = machine_of(durability);
        assert_eq!(ends_flushes(&script), wanted);
        script.restart(never);
        drop(freeze(&script).expect("nothing fails"));
        let calls = script.calls.take();
        assert_eq!(ends_flushes(&script), wanted);
        script.world.borrow_mut().missing.insert(BACK.into());
        go_back(&script).expect("nothing fails");
        assert_eq!(ends_flushes(&script), wanted);

        // Killed in the pause, behind the handover.
        let (script, _) = machine_of(durability);
        let paused = calls.iter().position(|step| *step == Step::Suspend);
        let paused = paused.expect("it suspends");
        script.restart(move |_, nth| (nth > paused + 2).then_some(Errno::EIO));
        let _ = freeze(&script).map(drop);
        script.restart(never);
        let repaired = repair_every(&script, &MAKER_RETRY).expect("it can be asked");
        assert!(repaired.iter().all(|each| each.outcome.is_ok()));
        let (_, waits) = writes_to(&script);
        assert!(!waits && script.query(Address::Name("noon")).is_ok());
        assert_eq!(ends_flushes(&script), wanted);
    }
}

/// Another program has set the COW device to end them: the next one takes the flushes of a disk that is to have them.
#[test]
fn a_setting_of_the_cow_device_is_not_taken_for_the_snapshots() {
    let (script, _) = machine_of(Durability::Processes);
    let (minor, _) = writes_to(&script);
    let cow = DeviceNumber::at(7, minor);
    script.world.borrow_mut().flushless.insert(cow);
    drop(freeze(&script).expect("nothing fails"));
    assert!(!ends_flushes(&script));
}

#[test]
fn flushes_that_cannot_be_ended_again_are_no_failure_of_a_checkpoint() {
    let (script, _) = machine_of(Durability::Processes);
    script.restart(|step, _| (step == Step::EndFlushes).then_some(Errno::EROFS));
    drop(freeze(&script).expect("the disk works"));
    script.world.borrow_mut().missing.insert(BACK.into());
    go_back(&script).expect("the disk works");
    assert!(!ends_flushes(&script));
}

const BACK: &str = "/the/back";

/// A machine whose snapshot stands on a layer, which it keeps.
fn frozen_machine() -> (Script, Handles) {
    let (script, handles) = machine();
    drop(freeze(&script).expect("nothing fails"));
    script.world.borrow_mut().missing.insert(BACK.into());
    script.restart(never);
    (script, handles)
}

fn go_back(script: &Script) -> Result<Handles> {
    let mut options = CheckpointOptions::new();
    options
        .make_cow(CowSize::Bytes(1 << 20))
        .deadline(Duration::ZERO);
    rollback(script, &options, &"vm".into(), Path::new(BACK))
}

#[test]
fn whichever_call_of_a_rollback_fails_the_snapshot_is_as_it_was_or_back_at_its_checkpoint() {
    let (script, handles) = frozen_machine();
    let (before, _) = writes_to(&script);
    script.restart(never);
    go_back(&script).expect("nothing fails");
    let calls = script.calls.take();
    let (after, waits) = writes_to(&script);
    assert!(before != after && !waits);
    clean(&script, &handles, &Retry::ONCE).expect("nobody has it open");
    let files = BTreeSet::from([BACK.into(), NEXT.into()]);
    assert_eq!(script.world.borrow().residue(), files);
    for (index, step) in calls.iter().enumerate() {
        let (script, handles) = frozen_machine();
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let result = go_back(&script).map(drop);
        let (cow, waits) = writes_to(&script);
        assert!(!waits, "it waits after call {index}, {step:?}: {result:?}");
        if cow != after {
            assert!(result.is_err(), "call {index}, {step:?}");
            assert_eq!(
                script.world.borrow().residue(),
                before,
                "call {index}, {step:?}"
            );
        }
        clean(&script, &handles, &Retry::ONCE).expect("no loop device is held");
    }
}

/// As a SIGKILL: the snapshot is then as before, or back at its checkpoint, and does not wait.
#[test]
fn whichever_call_a_rollback_dies_at_one_repair_ends_it() {
    let calls = {
        let (script, _) = frozen_machine();
        go_back(&script).expect("nothing fails");
        script.calls.take().len()
    };
    for index in 0..calls {
        let (script, handles) = frozen_machine();
        script.restart(move |_, nth| (nth > index).then_some(Errno::EIO));
        let _ = go_back(&script).map(drop);
        repaired_for_good(&script, index);
        let (_, waits) = writes_to(&script);
        assert!(!waits, "it waits after call {index}");
        let device = script.query(Address::Name("vm")).expect("it is there");
        assert!(!device.inactive_table, "call {index}");
        clean(&script, &handles, &Retry::ONCE).expect("no loop device is held");
        let mut left = script.world.borrow().residue();
        left.retain(|path| path.starts_with("/dev"));
        assert!(left.is_empty(), "call {index}: {left:?}");
    }
}

#[test]
fn whichever_call_of_attaching_a_layer_fails_nothing_is_left_and_asking_again_does_it() {
    let stage = || {
        let (script, handles) = machine();
        drop(freeze(&script).expect("nothing fails"));
        clean(&script, &handles, &Retry::ONCE).expect("nobody has it open");
        let image = open_origin(&script, Path::new("/image"), &CowOptions::default())
            .expect("nothing fails");
        script.restart(never);
        (script, image)
    };
    let attach = |script: &Script, image: &Base<ScriptLoop>| {
        attach_layer(
            script,
            image,
            Path::new(COW),
            &name("noon"),
            CheckpointOptions::new().keep(true),
        )
        .map(|(base, _)| base)
    };
    let (script, image) = stage();
    let before = script.world.borrow().residue();
    let layer = attach(&script, &image).expect("nothing fails");
    let calls = script.calls.take();
    script.restart(never);
    let next = create_on(
        &script,
        &SnapshotOptions::new(),
        &layer,
        Path::new(NEXT),
        &name("vm"),
    );
    let _ = next
        .expect("its COW file was made over that layer")
        .into_handles();
    for (index, step) in calls.iter().enumerate() {
        let (script, image) = stage();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let attached = attach(&script, &image);
        if attached.is_ok() {
            // The number of a binding that cannot be read.
            assert_eq!(*step, Step::ReadDiskseq, "call {index}");
            continue;
        }
        drop(attached);
        script.restart(never);
        let after = script.world.borrow().residue();
        assert_eq!(after, before, "call {index}, {step:?}");
        let again = attach(&script, &image);
        assert!(again.is_ok(), "after call {index}, {step:?}");
    }
}
