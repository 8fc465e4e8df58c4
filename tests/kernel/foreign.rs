//! Living beside losetup and dmsetup: theirs taken down by us, ours by them.

use dmsnap::base::LoopHandle;
use dmsnap::export::ExportOptions;
use dmsnap::snapshot::CheckpointOptions;
use dmsnap::teardown::Outcome;
use dmsnap::{CowSize, Handles, adopt, cleanup, remove, repair};

use crate::common::reading::{alias_exists, dm_exists, loops_below, number};
use crate::common::scene::{IMAGE_BYTES, content};
use crate::common::{Foreign, Losetup, Scene, chain, run, settle, udev};

struct TheirSnapshot {
    device: Foreign,
    origin: Losetup,
    cow: Losetup,
}

/// What the shell scripts of old did.
fn their_snapshot(scene: &Scene, name: &str) -> TheirSnapshot {
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.cow(format!("{name}.cow")));
    let table = format!(
        "0 {} snapshot {} {} P 8",
        IMAGE_BYTES / 512,
        number(&origin.device),
        number(&cow.device)
    );
    let device = Foreign::create(name, &table);
    TheirSnapshot {
        device,
        origin,
        cow,
    }
}

#[test]
fn theirs_is_removed_by_us_and_its_loops_stay() {
    let scene = Scene::new();
    let name = scene.name();
    let theirs = their_snapshot(&scene, &name);
    assert_eq!(remove(&name), Ok(Outcome::Removed));
    assert!(!dm_exists(&name) && !alias_exists(&name));
    assert!(
        theirs.origin.is_bound() && theirs.cow.is_bound(),
        "they have no autoclear, and nobody named them"
    );
    drop(theirs.device);
}

#[test]
fn theirs_is_cleaned_up_by_handles() {
    let scene = Scene::new();
    let name = scene.name();
    let theirs = their_snapshot(&scene, &name);
    let mut handles = Handles::default();
    handles.name = Some(name.parse().expect("a name"));
    handles.origin_loop = Some(LoopHandle::at(&theirs.origin.device));
    handles.cow_loop = Some(LoopHandle::at(&theirs.cow.device));
    cleanup(&handles).expect("nobody has it open");
    assert!(!dm_exists(&name) && !alias_exists(&name));
    scene.assert_clean();
    cleanup(&handles).expect("already gone");
}

#[test]
fn theirs_is_not_in_our_list() {
    let scene = Scene::new();
    let name = scene.name();
    let theirs = their_snapshot(&scene, &name);
    assert_eq!(dmsnap::list().expect("a list"), []);
    let error = dmsnap::status(&name).expect_err("not ours");
    println!(
        "message: status of a foreign device: {}",
        crate::common::chain(&error)
    );
    drop(theirs);
}

/// Taking over a device that losetup and dmsetup made renamed it to `DMSNAP-...` instead of giving it a uuid: the flag
/// was the wrong bit, and every test adopted a device of our own.
#[test]
fn theirs_is_adopted_under_its_name_and_cleaned_up() {
    let scene = Scene::new();
    let name = scene.name();
    let theirs = their_snapshot(&scene, &name);
    let handles = adopt(&name).expect("a snapshot over two loop devices");
    let uuid = run!("dmsetup", "info", "-c", "--noheadings", "-o", "uuid", &name);
    assert!(uuid.trim().starts_with("DMSNAP-"), "{uuid:?}");
    assert_eq!(
        handles.name.as_ref().map(|name| name.as_str()),
        Some(name.as_str())
    );
    assert_eq!(
        handles.uuid.as_ref().map(|uuid| uuid.as_str()),
        Some(uuid.trim())
    );
    assert!(alias_exists(&name), "udev's or libdm's link stays");
    cleanup(&handles).expect("nobody has it open");
    assert!(!dm_exists(&name) && !alias_exists(&name));
    scene.assert_clean();
    drop(theirs);
}

#[test]
fn theirs_can_be_read_where_ours_is_made_over_the_same_image() {
    let scene = Scene::new();
    let theirs = their_snapshot(&scene, &scene.name());
    let ours = scene.snapshot();
    assert_eq!(content(ours.device()), content(scene.image()));
    ours.cleanup().expect("nobody has it open");
    drop(theirs);
}

#[test]
fn ours_is_removed_by_dmsetup() {
    let scene = Scene::new();
    for by_name in [true, false] {
        let handles = scene.snapshot().into_handles();
        let name = handles.name.clone().expect("a name").to_string();
        run!("dmsetup", "remove", "--retry", &name);
        assert!(!dm_exists(&name));
        assert!(
            loops_below(scene.dir()).is_empty() || udev(),
            "autoclear detaches them"
        );
        // dmsetup leaves /dev/mapper to udev where there is one, and udev does not know of our link.
        if by_name {
            assert_eq!(remove(&name), Ok(Outcome::AlreadyGone));
        } else {
            cleanup(&handles).expect("already gone");
        }
        assert!(!alias_exists(&name), "a link that leads nowhere");
    }
}

#[test]
fn ours_is_suspended_resumed_and_read_by_dmsetup() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name").to_string();
    run!("dmsetup", "suspend", &name);
    run!("dmsetup", "resume", &name);
    assert_eq!(content(snapshot.device()), content(scene.image()));
    snapshot.cleanup().expect("nobody has it open");
}

/// Resumed by us after a flush, the device lost the link below /dev/mapper that udev had made for its maker.
#[test]
fn the_link_to_an_adopted_device_outlives_each_resume() {
    let scene = Scene::new();
    let (name, layer) = (scene.name(), scene.name());
    let theirs = their_snapshot(&scene, &name);
    settle();
    adopt(&name).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let assert_link = |after: &str| {
        settle();
        assert!(alias_exists(&name), "after {after}");
    };
    assert_link("adopt");
    let exported = ExportOptions::new().export_live(&name, scene.path("out"));
    exported.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_link("a live export");
    let mut options = CheckpointOptions::new();
    options.make_cow(CowSize::WorstCase);
    let frozen = options.checkpoint(&name, &layer, scene.path("second"));
    let frozen = frozen.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_link("a checkpoint");
    run!("dmsetup", "suspend", &name);
    let repaired = repair(&name).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(repaired.is_some(), "it was suspended");
    assert_link("a repair");
    drop(frozen);
    assert_eq!(remove(&name), Ok(Outcome::Removed));
    settle();
    assert!(!alias_exists(&name));
    drop(theirs);
}
