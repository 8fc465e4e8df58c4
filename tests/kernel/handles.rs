//! Cleanup by handles: whole, in part, out of date, from another process.

use std::fs::File;
use std::time::Duration;

use dmsnap::base::{DeviceName, LoopHandle};
use dmsnap::error::Retry;
use dmsnap::{ErrorKind, Handles, Teardown, cleanup};

use crate::common::reading::{dm_exists, dm_table};
use crate::common::tools::{complaint, finish, success};
use crate::common::{Foreign, Losetup, Scene, chain, dmsnap, eventually, run, udev};

/// Empty handles but for what `fill` puts in.
fn handles(fill: impl FnOnce(&mut Handles)) -> Handles {
    let mut handles = Handles::default();
    fill(&mut handles);
    handles
}

#[test]
fn cleanup_twice_is_as_good_as_once() {
    let scene = Scene::new();
    let handles = scene.snapshot().into_handles();
    cleanup(&handles).expect("nobody has it open");
    scene.assert_clean();
    cleanup(&handles).expect("already gone");
    cleanup(&Handles::default()).expect("nothing to do");
}

#[test]
fn any_one_way_to_the_device_is_enough() {
    let scene = Scene::new();
    let parts: [fn(&Handles) -> Handles; 6] = [
        |whole| handles(|part| part.name = whole.name.clone()),
        |whole| handles(|part| part.device = whole.device.clone()),
        |whole| handles(|part| part.mapper = whole.mapper.clone()),
        |whole| handles(|part| part.uuid = whole.uuid.clone()),
        |whole| handles(|part| part.dev = whole.dev),
        |whole| {
            let mut part = whole.clone();
            part.uuid = None;
            part
        },
    ];
    for part in parts {
        let part = part(scene.snapshot().handles());
        cleanup(&part).unwrap_or_else(|error| panic!("{part:?}: {}", chain(&error)));
        assert!(scene.residue().is_empty() || udev(), "{part:?}");
        scene.assert_clean();
        cleanup(&part).expect("already gone");
    }
}

#[test]
fn any_one_field_may_be_missing() {
    let scene = Scene::new();
    let empty: [fn(&mut Handles); 8] = [
        |handles| handles.name = None,
        |handles| handles.uuid = None,
        |handles| handles.dev = None,
        |handles| handles.device = None,
        |handles| handles.mapper = None,
        |handles| handles.cow_loop = None,
        |handles| handles.origin_loop = None,
        |handles| handles.origin = None,
    ];
    for empty in empty {
        let mut handles = scene.snapshot().into_handles();
        empty(&mut handles);
        cleanup(&handles).unwrap_or_else(|error| panic!("{handles:?}: {}", chain(&error)));
        scene.assert_clean();
    }
}

#[test]
fn loops_without_a_device_are_detached() {
    let scene = Scene::new();
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.cow("cow"));
    let loops = handles(|handles| {
        handles.origin_loop = Some(LoopHandle::at(&origin.device));
        handles.cow_loop = Some(LoopHandle::at(&cow.device));
    });
    cleanup(&loops).expect("nobody has them open");
    assert!(!origin.is_bound() && !cow.is_bound());
    cleanup(&loops).expect("already gone");
    cleanup(&handles(|handles| {
        handles.cow_loop = Some(LoopHandle::at("/dev/loop987654"));
    }))
    .expect("there never was such a loop device");
}

#[test]
fn what_stays_is_named_and_the_rest_is_done() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let held = snapshot.handles().clone();
    let holder = File::open(snapshot.device()).expect("the device opens");
    let error = Teardown::new()
        .retry(Retry::until(Duration::from_millis(100)))
        .cleanup(&held)
        .expect_err("the device is open");
    println!("message: debris: {}", chain(&error));
    let path = |of: &Option<LoopHandle>| of.as_ref().expect("a loop").path.clone();
    let left: Vec<_> = error
        .left()
        .iter()
        .map(|left| left.object.clone())
        .collect();
    let mapper = held.mapper.clone().expect("an alias");
    assert_eq!(
        left,
        [mapper, path(&held.cow_loop), path(&held.origin_loop)]
    );
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(
        chain(&error).contains(": open count 1"),
        "{}",
        chain(&error)
    );
    assert_eq!(
        crate::common::reading::loops_below(scene.dir()).len(),
        2,
        "it works on"
    );

    // Loops of another snapshot are not held by the device that stays.
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.cow("another cow"));
    let mixed = handles(|handles| {
        handles.name = held.name.clone();
        handles.origin_loop = Some(LoopHandle::at(&origin.device));
        handles.cow_loop = Some(LoopHandle::at(&cow.device));
    });
    let error = Teardown::new()
        .retry(Retry::ONCE)
        .cleanup(&mixed)
        .expect_err("the device is open");
    println!("message: debris, loops free: {}", chain(&error));
    // udevd may have them open for a moment; until then they stay, and are named.
    let gone = || !origin.is_bound() && !cow.is_bound();
    assert!(eventually(Duration::from_secs(60), gone), "it went on");
    let left: Vec<_> = error.left().iter().map(|left| &left.object).collect();
    let device = held.mapper.as_ref().expect("an alias");
    assert!(left == [device] || udev() && left[0] == device, "{left:?}");
    drop(holder);
    cleanup(&held).expect("nobody has it open");
}

#[test]
fn a_loop_number_that_serves_another_file_is_left_alone() {
    let scene = Scene::new();
    let old = scene.snapshot().into_handles();
    cleanup(&old).expect("nobody has it open");
    let theirs = scene.cow("theirs");
    let cow_loop = old.cow_loop.as_ref().expect("a COW loop");
    let other = Losetup::attach_at(&cow_loop.path, &theirs);
    cleanup(&old).expect("ours is already gone");
    assert!(other.is_bound(), "somebody else's file was detached");
}

#[test]
fn a_loop_number_that_serves_our_file_again_is_another_binding() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name");
    let cow = scene.path(format!("{name}.cow"));
    let old = snapshot.into_handles();
    cleanup(&old).expect("nobody has it open");
    let cow_loop = old.cow_loop.as_ref().expect("a COW loop");
    let other = Losetup::attach_at(&cow_loop.path, &cow);
    cleanup(&old).expect("ours is already gone");
    // Before Linux 5.15 a binding has no number; but it has no autoclear either, and ours always have.
    assert!(other.is_bound(), "somebody else's binding was undone");
}

#[test]
fn a_name_that_another_device_has_is_left_alone() {
    let scene = Scene::new();
    let old = scene.snapshot().into_handles();
    cleanup(&old).expect("nobody has it open");
    let name = old.name.clone().expect("a name");
    let foreign = Foreign::zero(name.as_str());
    cleanup(&old).expect("ours is already gone");
    assert_eq!(dm_table(name.as_str()), "0 2048 zero");
    assert!(
        old.mapper.as_ref().expect("an alias").exists(),
        "their alias stays"
    );
    // Without a uuid the name is taken at its word.
    let named = handles(|handles| handles.name = Some(name.clone()));
    cleanup(&named).expect("nobody has it open");
    assert!(!dm_exists(name.as_str()));
    drop(foreign);
}

#[test]
fn a_renamed_device_is_still_ours() {
    let scene = Scene::new();
    let handles = scene.snapshot().into_handles();
    let name = handles.name.clone().expect("a name");
    let renamed = scene.name();
    run!("dmsetup", "rename", "--noudevsync", name.as_str(), &renamed);
    cleanup(&handles).expect("found by its uuid");
    assert!(!dm_exists(&renamed));
}

#[test]
fn handles_survive_as_json_and_another_process_cleans_up() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let json = serde_json::to_string(snapshot.handles()).expect("handles are plain data");
    let back: Handles = serde_json::from_str(&json).expect("and come back");
    assert_eq!(&back, snapshot.handles());
    let file = scene.file("handles.json", &json);
    drop(snapshot);
    assert_eq!(success(dmsnap().arg("cleanup").arg(&file)), "");
    scene.assert_clean();
    success(dmsnap().arg("cleanup").arg(&file));
}

#[test]
fn a_callers_database_may_hold_empty_strings_and_bare_paths() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let path = |of: &Option<LoopHandle>| of.as_ref().expect("a loop").path.clone();
    let loose = serde_json::json!({
        "name": snapshot.handles().name,
        "uuid": "",
        "device": "",
        "mapper": null,
        "cow_loop": path(&snapshot.handles().cow_loop),
        "origin_loop": path(&snapshot.handles().origin_loop),
    });
    let file = scene.file("handles.json", loose.to_string());
    success(dmsnap().arg("cleanup").arg(&file));
}

#[test]
fn the_command_names_everything_that_is_left() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name: DeviceName = snapshot.handles().name.clone().expect("a name");
    let json = serde_json::to_string(snapshot.handles()).expect("handles are plain data");
    let file = scene.file("handles.json", &json);
    let holder = File::open(snapshot.device()).expect("the device opens");
    let line = complaint(&finish(
        dmsnap().args(["cleanup", "--deadline", "100ms"]).arg(&file),
    ));
    println!("message: cleanup of an open device: {line}");
    assert!(
        line.starts_with(&format!("left behind /dev/mapper/{name}, /dev/loop")),
        "{line}"
    );
    drop(holder);
    snapshot.cleanup().expect("nobody has it open");
}
