//! Each state, ended under writes.

use std::process::Command;
use std::time::Duration;

use dmsnap::dm::SnapshotStatus;
use dmsnap::watch::Change;

use super::{Stage, is_gone, last_is_bound, last_loop, let_go, repair, try_verb, uuid};
use crate::common::tools::start;
use crate::common::{Scene, eventually, run};
use crate::facts::Device;
use crate::facts::handover::{Writer, assert_files};

/// Steps of a checkpoint behind the loading of both tables, up to where its process was killed; and what is done then.
type States = &'static [(&'static [&'static str], &'static str)];

const UNDONE: States = &[
    (&[], "undone"),
    (&["resume b"], "undone"),
    (&["suspend v"], "undone"),
    (&["resume b", "suspend v"], "undone"),
    (&["suspend v", "clear v"], "undone"),
    (&["suspend v", "clear v", "resume v"], "undone"),
    (&["suspend v", "clear v", "remove b"], "resumed"),
];

const FINISHED: States = &[
    (&["suspend v", "resume b"], "finished"),
    (&["suspend v", "resume b", "resume v"], "finished"),
];

fn step(verb: &str, v: &Device, b: &Device) {
    let (verb, which) = verb.split_once(' ').expect("two words");
    let device = if which == "v" { v } else { b };
    match (verb, which) {
        // No node: the kernel's answer to a checkpoint makes none.
        ("resume", "b") => drop(crate::common::output!(
            "dmsetup",
            "resume",
            "--addnodeoncreate",
            &device.name
        )),
        // A resume may be refused.
        _ => drop(try_verb(verb, device)),
    }
}

#[test]
fn a_checkpoint_that_was_cut_off_before_the_handover_is_undone() {
    cut_off_in(UNDONE);
}

#[test]
fn a_checkpoint_that_was_cut_off_behind_the_handover_is_finished() {
    cut_off_in(FINISHED);
}

/// V goes on with all data, whatever the state.
fn cut_off_in(states: States) {
    let scene = Scene::ext4();
    let mut stage = Stage::over(&scene);
    let writer = Writer::start(stage.at.clone());
    let mut watch = dmsnap::watch::Watch::new().expect("device-mapper");
    watch.add(&stage.v.name).expect("a live snapshot");
    let mut origin = stage.stack.image.clone();
    let mut cow = stage.c0.clone();
    let v = stage.v.clone();
    let mut layers = Vec::new();
    writer.go_on();
    for (steps, outcome) in states {
        let (_, fresh) = stage.stack.cow();
        let c1 = last_loop(&stage.stack).to_owned();
        let b = stage.stack.device_of(&uuid(&c1, "-layer"));
        b.load(&stage.stack.table(&origin, &cow));
        v.load(&stage.stack.table(&b.number, &fresh));
        let_go(&c1);
        let synced = writer.synced();
        steps.iter().for_each(|verb| step(verb, &v, &b));
        // Whoever watches, or asks, is not told that V is lost.
        if steps.ends_with(&["suspend v", "resume b"]) {
            assert_eq!(v.status(), "Invalid");
        }
        let info = dmsnap::status(&v.name).expect("it is there");
        assert_ne!(info.status, Some(SnapshotStatus::Invalid), "{steps:?}");
        let events = watch.check().expect("it can be asked");
        assert!(
            events.iter().all(|event| event.change != Change::Invalid),
            "{events:?}"
        );
        // The last state is V's, whole, and B's alone.
        let swapped = steps.ends_with(&["resume b", "resume v"]);
        let half_way = v.attributes() != "L--w";
        assert_eq!(stage.is_interrupted(), half_way, "{steps:?}");
        let name = if swapped { &b.name } else { &v.name };
        assert_eq!(repair(name), format!("{name}: {outcome}\n"), "{steps:?}");
        assert_eq!(v.attributes(), "L--w", "{steps:?}");
        assert_ne!(v.status(), "Invalid", "{steps:?}");
        assert!(!stage.is_interrupted(), "{steps:?}");
        // A half-made layer is gone by then.
        let left = if is_gone(&b) { &v.name } else { &b.name };
        assert_eq!(repair(left), "", "{steps:?}");
        // V's writes that waited go through.
        writer.go_on();
        if *outcome == "finished" {
            assert_eq!(b.attributes(), "L--w", "{steps:?}");
            assert_ne!(b.status(), "Invalid", "{steps:?}");
            (origin, cow) = (b.number.clone(), fresh);
            layers.push((b, synced));
        } else {
            assert!(is_gone(&b), "{steps:?}");
            let gone = || !last_is_bound(&stage.stack);
            assert!(eventually(Duration::from_secs(60), gone), "{steps:?}");
        }
    }
    for (b, synced) in &layers {
        let fork = stage.stack.fork(b);
        run!("e2fsck", "-f", "-n", fork.node());
        let at = stage.stack.mount(&fork);
        assert_files(&at, *synced);
        stage.stack.unmount(&at);
        fork.remove();
    }
    let written = writer.stop();
    assert_files(&stage.at, written);
    let at = stage.at.clone();
    stage.stack.unmount(&at);
    // By the kernel's own node: the link that dmsetup had udev make goes with a resume that tells udev to make none.
    let (_, minor) = v.number.split_once(':').expect("two numbers");
    run!("e2fsck", "-f", "-n", format!("/dev/dm-{minor}"));
    // The layers go with their last user.
    v.remove();
    let all_gone = || layers.iter().all(|(b, _)| is_gone(b));
    assert!(eventually(Duration::from_secs(60), all_gone), "{layers:?}");
}

#[test]
fn a_suspended_snapshot_is_resumed_unless_somebody_is_at_work_on_it() {
    let scene = Scene::ext4();
    let stage = Stage::over(&scene);
    let writer = Writer::start(stage.at.clone());
    writer.go_on();
    let node = last_loop(&stage.stack).to_owned();
    // As a live export does it: the lock, then the flush.
    let held = format!("exec 9<{}; flock 9; exec sleep 60", node.display());
    let held = start(Command::new("sh").args(["-c", &held]));
    let locked = || {
        !crate::common::output!("flock", "-n", &node, "true")
            .status
            .success()
    };
    assert!(eventually(Duration::from_secs(60), locked));
    stage.v.suspend();
    assert!(!stage.is_interrupted());
    assert_eq!(stage.repair(), format!("{}: in-progress\n", stage.v.name));
    assert_eq!(stage.v.attributes(), "L-sw");
    run!("kill", "-KILL", held.id().to_string());
    held.join();
    assert!(stage.is_interrupted());
    assert_eq!(stage.repair(), format!("{}: resumed\n", stage.v.name));
    assert_eq!(stage.v.attributes(), "L--w");
    writer.go_on();
    assert_eq!(stage.repair(), "");
    let written = writer.stop();
    assert_files(&stage.at, written);
}

#[test]
fn a_rollback_that_was_cut_off_is_undone() {
    let scene = Scene::ext4();
    let mut stage = Stage::over(&scene);
    let writer = Writer::start(stage.at.clone());
    for suspends in [false, true] {
        let (_, fresh) = stage.stack.cow();
        let c1 = last_loop(&stage.stack).to_owned();
        let image = stage.stack.image.clone();
        stage.v.load(&stage.stack.table(&image, &fresh));
        let_go(&c1);
        if suspends {
            stage.v.suspend();
        }
        assert!(stage.is_interrupted());
        assert_eq!(stage.repair(), format!("{}: undone\n", stage.v.name));
        assert_eq!(stage.v.attributes(), "L--w");
        let gone = || !last_is_bound(&stage.stack);
        assert!(eventually(Duration::from_secs(60), gone));
        writer.go_on();
    }
    let written = writer.stop();
    assert_files(&stage.at, written);
}
