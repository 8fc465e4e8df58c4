//! Who is who: handles out of date, adoption, waiting for the end, and what other tools leave or take.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use dmsnap::base::LoopHandle;
use dmsnap::error::{Refusal, Retry};
use dmsnap::teardown::{Fate, Outcome};
use dmsnap::{
    ErrorKind, Handles, ReapOptions, SnapshotOptions, Teardown, WhenBusy, adopt, cleanup,
};

use super::worker::use_disk;
use crate::common::reading::{self, alias_exists, dm_exists, loops_below};
use crate::common::tools::{complaint, finish, success};
use crate::common::{Foreign, Losetup, Scene, chain, dmsnap, run};

fn name(handles: &Handles) -> String {
    handles.name.clone().expect("a name").to_string()
}

fn loop_path(of: &Option<LoopHandle>) -> &Path {
    &of.as_ref().expect("a loop device").path
}

#[test]
fn everything_of_an_old_handle_serves_somebody_else() {
    let scene = Scene::new();
    let old = scene.snapshot().into_handles();
    cleanup(&old).expect("nobody has it open");
    let theirs = scene.cow("theirs");
    let loops = [&old.origin_loop, &old.cow_loop];
    let loops = loops.map(|each| Losetup::attach_at(loop_path(each), &theirs));
    let foreign = Foreign::zero(&name(&old));
    let minor = reading::number(&Path::new("/dev/mapper").join(name(&old)));
    assert_eq!(
        Some(minor),
        old.dev.map(|dev| dev.to_string()),
        "even the number is the same"
    );
    cleanup(&old).expect("ours is already gone");
    Teardown::new()
        .retry(Retry::ONCE)
        .wait_gone(&old)
        .expect("ours is already gone");
    assert!(
        loops.iter().all(Losetup::is_bound),
        "somebody else's file was detached"
    );
    assert!(dm_exists(&name(&old)), "somebody else's device was removed");
    drop(foreign);
}

/// Even the same file on the same device is not taken for ours: the binding has another number (5.15 and later), and
/// ours have autoclear.
#[test]
fn a_loop_number_that_serves_the_same_file_for_somebody_else() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let made = SnapshotOptions::new().create(scene.image(), &cow, &scene.name());
    let old = made.expect("a snapshot").into_handles();
    cleanup(&old).expect("nobody has it open");
    let theirs = Losetup::attach_at(loop_path(&old.cow_loop), &cow);
    cleanup(&old).expect("ours is already gone");
    assert!(theirs.is_bound(), "another tool's loop device was detached");
}

#[test]
fn adoption_gives_the_handles_that_create_gave() {
    let scene = Scene::new();
    let cow = scene.cow("a cow");
    let (image, name) = (scene.image().to_str().expect("ASCII"), scene.name());
    let printed = success(dmsnap().args(["create", image, cow.to_str().expect("ASCII"), &name]));
    let handles: Handles = serde_json::from_str(&printed).expect("handles");
    assert_eq!(adopt(&name), Ok(handles.clone()));
    let uuid = handles.uuid.clone().expect("a uuid");
    assert_eq!(adopt(&uuid), Ok(handles.clone()));
    assert_eq!(success(dmsnap().args(["adopt", &name])), printed);
    let gone = adopt("dmsnap-test-no-such").expect_err("there is no such device");
    assert_eq!(gone.kind(), ErrorKind::Gone);

    let file = scene.file("handles.json", &printed);
    success(dmsnap().arg("cleanup").arg(file));
    scene.assert_clean();
}

/// Gone is gone: the COW file serves the next snapshot at once. Once it did not: when the last close is a work
/// queue's, the kernel lets go of the backing file, and of the lock on it, a moment after the loop device is unbound,
/// and the next create found the file in use by another snapshot.
#[test]
fn the_end_of_a_deferred_removal_can_be_waited_for() {
    let scene = Scene::new();
    for _ in 0..10 {
        let cow = scene.path("cow");
        File::create(&cow)
            .and_then(|file| file.set_len(8 << 20))
            .expect("room");
        let made = SnapshotOptions::new().create(scene.image(), &cow, &scene.name());
        let handles = made
            .unwrap_or_else(|error| panic!("{}", chain(&error)))
            .into_handles();
        let device = handles.device.clone().expect("a device");
        let holder = File::open(&device).expect("the device opens");
        let outcome = Teardown::new().when_busy(WhenBusy::Defer).remove(&device);
        assert_eq!(outcome, Ok(Outcome::Deferred { open_count: 1 }));
        let brief = Retry::until(Duration::from_millis(50));
        let error = Teardown::new()
            .retry(brief)
            .wait_gone(&handles)
            .expect_err("it is open");
        assert_eq!(error.kind(), ErrorKind::Busy, "{}", chain(&error));
        drop(holder);
        Teardown::new()
            .retry(Retry::default())
            .wait_gone(&handles)
            .expect("its last user is gone");
        assert!(!dm_exists(&name(&handles)));
        assert!(loops_below(scene.dir()).is_empty());
    }
}

#[test]
fn an_alias_whose_device_another_tool_removed_is_swept() {
    let scene = Scene::new();
    let name = name(&scene.snapshot().into_handles());
    let live = scene.snapshot();
    let live_name = self::name(live.handles());
    run!("dmsetup", "remove", "--noudevsync", &name);
    // dmsetup may have taken the alias with it, as it does where no udev is.
    let left = alias_exists(&name);
    let sweep = |dry| {
        let reaped = ReapOptions::new()
            .dry_run(dry)
            .reap(|info| info.name == live_name);
        let reaped = reaped.expect("a sweep").into_iter();
        let others = reaped.filter(|item| item.name != live_name);
        others
            .map(|item| (item.name, item.fate))
            .collect::<Vec<_>>()
    };
    println!("dmsetup remove left our alias: {left}");
    if !left {
        let alias = Path::new("/dev/mapper").join(&name);
        std::os::unix::fs::symlink("/dev/mapper/../dm-987654", alias).expect("as it would be left");
    }
    assert_eq!(sweep(true), [(name.clone(), Ok(Fate::Due))]);
    assert!(alias_exists(&name));
    assert_eq!(sweep(false), [(name.clone(), Ok(Fate::AliasRemoved))]);
    assert!(!alias_exists(&name));
    assert!(alias_exists(&live_name), "a live alias stays");
    live.cleanup().expect("nobody has it open");
}

#[test]
fn a_cow_file_does_not_go_with_a_touched_image() {
    let scene = Scene::new();
    let image = scene.path("image");
    fs::copy(scene.image(), &image).expect("room");
    let (cow, name) = (scene.cow("cow"), scene.name());
    let made = SnapshotOptions::new()
        .create(&image, &cow, &name)
        .expect("a snapshot");
    use_disk(made.device(), 3).expect("a disk");
    made.cleanup().expect("nobody has it open");

    run!("touch", "-d", "2001-02-03 04:05:06", &image);
    let paths = [&image, &cow].map(|path| path.to_str().expect("ASCII"));
    let line = complaint(&finish(
        dmsnap().args(["create", paths[0], paths[1], &name]),
    ));
    println!("re-attached over a touched image: {line}");
    let error = SnapshotOptions::new()
        .create(&image, &cow, &name)
        .expect_err("it was touched");
    let changed = matches!(error, dmsnap::Error::Refused(Refusal::OriginChanged { .. }));
    assert!(changed, "{}", chain(&error));
    scene.assert_clean();

    let words = ["create", "--any-origin", paths[0], paths[1], &name];
    let printed = success(dmsnap().args(words));
    let handles: Handles = serde_json::from_str(&printed).expect("handles");
    cleanup(&handles).expect("nobody has it open");
}
