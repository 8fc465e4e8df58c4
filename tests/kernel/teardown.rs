//! Removal by name and by path: busy, deferred, gone, refused.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use dmsnap::error::{Refusal, Retry};
use dmsnap::teardown::Outcome;
use dmsnap::{Error, ErrorKind, Snapshot, Teardown, WhenBusy, remove};

use crate::common::reading::{alias_exists, dm_exists, dm_info, loops_below};
use crate::common::{Scene, chain, eventually};

fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

#[test]
fn a_busy_device_fails_at_once_with_its_open_count() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let holder = File::open(snapshot.device()).expect("the device opens");
    let error = Teardown::new()
        .retry(Retry::ONCE)
        .remove(&name)
        .expect_err("it is open");
    println!("message: busy: {}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Busy);
    let expected = format!(
        "cannot remove /dev/mapper/{name}: Device or resource busy (os error 16): open count 1"
    );
    assert!(chain(&error).starts_with(&expected), "{error:?}");
    assert_eq!(dm_info(&name, "open"), "1");
    assert!(
        alias_exists(&name),
        "the device stays, and so does its alias"
    );
    drop(holder);
    assert_eq!(
        Teardown::new().retry(Retry::ONCE).remove(&name),
        Ok(Outcome::Removed)
    );
    assert!(!dm_exists(&name) && !alias_exists(&name));
    assert_eq!(
        Teardown::new().retry(Retry::ONCE).remove(&name),
        Ok(Outcome::AlreadyGone)
    );
}

#[test]
fn removal_waits_for_a_holder_that_goes() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let holder = File::open(snapshot.device()).expect("the device opens");
    let guest = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(holder);
    });
    assert_eq!(remove(&name), Ok(Outcome::Removed));
    guest.join().expect("the holder let go");
}

#[test]
fn removal_gives_up_at_the_deadline() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let holder = File::open(snapshot.device()).expect("the device opens");
    let (patience, start) = (Duration::from_millis(500), Instant::now());
    let error = Teardown::new()
        .retry(Retry::until(patience))
        .remove(&name)
        .expect_err("it stays open");
    let took = start.elapsed();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(took >= patience, "before the deadline: {took:?}");
    println!("message: still busy at the deadline: {}", chain(&error));
    let holder_named = format!("(pid {})", std::process::id());
    assert!(chain(&error).ends_with(&holder_named), "{error:?}");
    assert!(alias_exists(&name) && dm_exists(&name));
    drop(holder);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn every_path_to_the_device_will_do() {
    let scene = Scene::new();
    for path in [
        |snapshot: &Snapshot| PathBuf::from(name_of(snapshot)),
        |snapshot: &Snapshot| Path::new("/dev/mapper").join(name_of(snapshot)),
        |snapshot: &Snapshot| snapshot.device().to_owned(),
    ] {
        let snapshot = scene.snapshot();
        let (name, path) = (name_of(&snapshot), path(&snapshot));
        assert_eq!(remove(&path), Ok(Outcome::Removed), "{path:?}");
        assert!(!dm_exists(&name) && !alias_exists(&name), "{path:?}");
        scene.assert_clean();
        assert_eq!(remove(&path), Ok(Outcome::AlreadyGone), "{path:?}");
    }
}

#[test]
fn what_is_no_dm_device_is_not_removed() {
    let scene = Scene::new();
    let file = scene.file("file", "not a device");
    let error = remove(&file).expect_err("a file is no device");
    println!("message: remove a file: {}", chain(&error));
    assert_eq!(error, Error::from(Refusal::NotABlockDevice { path: file }));
    for name in ["", "a b", "..", "/dev/mapper/a b"] {
        let error = remove(name).expect_err("no dm device has that name");
        assert!(
            matches!(error, Error::Refused(Refusal::Name(_))),
            "{name}: {error:?}"
        );
    }
    let gone = remove(scene.path("no such node"));
    assert_eq!(gone, Ok(Outcome::AlreadyGone));
}

#[test]
fn a_block_device_that_is_no_dm_device_is_left_alone() {
    let scene = Scene::new();
    let other = crate::common::Losetup::attach(&scene.cow("other"));
    let outcome = remove(&other.device);
    println!("message: remove a loop device: {outcome:?}");
    assert!(other.is_bound());
    assert_ne!(outcome, Ok(Outcome::Removed));
}

#[test]
fn a_deferred_removal_comes_with_the_last_close() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let holders = [(); 2].map(|()| File::open(snapshot.device()).expect("the device opens"));
    assert_eq!(
        Teardown::new().when_busy(WhenBusy::Defer).remove(&name),
        Ok(Outcome::Deferred { open_count: 2 })
    );
    assert!(dm_exists(&name), "it is still open");
    assert_eq!(loops_below(scene.dir()).len(), 2, "and works on");
    let info = dmsnap::status(&name).expect("a status");
    assert!(info.deferred_remove);

    let [first, last] = holders;
    drop(first);
    assert!(dm_exists(&name), "one has it open yet");
    drop(last);
    let soon = Duration::from_secs(60);
    assert!(eventually(soon, || !dm_exists(&name)), "removed at last");
    assert!(
        eventually(soon, || loops_below(scene.dir()).is_empty()),
        "the loops with it"
    );
    assert_eq!(
        Teardown::new().when_busy(WhenBusy::Defer).remove(&name),
        Ok(Outcome::AlreadyGone)
    );
}

#[test]
fn an_idle_device_is_not_deferred_but_removed() {
    let scene = Scene::new();
    let name = name_of(&scene.snapshot());
    assert_eq!(
        Teardown::new().when_busy(WhenBusy::Defer).remove(&name),
        Ok(Outcome::Removed)
    );
    assert!(!dm_exists(&name));
}

#[test]
fn cleanup_of_a_deferred_snapshot_waits_for_it() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let holder = File::open(snapshot.device()).expect("the device opens");
    Teardown::new()
        .when_busy(WhenBusy::Defer)
        .remove(&name)
        .map(drop)
        .expect("deferred");
    let guest = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(holder);
    });
    snapshot.cleanup().expect("gone by its holder's close");
    guest.join().expect("the holder let go");
    assert!(!dm_exists(&name));
}
