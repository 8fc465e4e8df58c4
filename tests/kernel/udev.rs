//! With udevd, without it, and with one that is stuck. `DMSNAP_TEST_UDEV` says which; each test asserts in both.

use std::fs;
use std::path::Path;

use dmsnap::{Snapshot, SnapshotOptions};

use crate::common::reading::alias_exists;
use crate::common::{Scene, output, run, settle, udev};

fn alias_of(snapshot: &Snapshot) -> &Path {
    snapshot.handles().mapper.as_deref().expect("an alias")
}

/// The alias is there and leads to this device.
fn assert_alias(snapshot: &Snapshot, when: &str) {
    let leads_to = fs::canonicalize(alias_of(snapshot));
    assert_eq!(
        leads_to.ok().as_deref(),
        Some(snapshot.device()),
        "the alias, {when}"
    );
}

#[test]
fn nobody_looks_into_a_guests_disk() {
    // A file system in it is what blkid would find.
    let scene = Scene::ext4();
    let snapshot = scene.snapshot();
    settle();
    assert_alias(&snapshot, "after udevd has seen the device");
    if udev() {
        let node = snapshot.device();
        let properties = run!("udevadm", "info", "--query=property", node);
        println!("{properties}");
        for wanted in [
            "DM_UDEV_DISABLE_DISK_RULES_FLAG=1",
            "DM_UDEV_DISABLE_OTHER_RULES_FLAG=1",
            "DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG=1",
            "DM_UDEV_DISABLE_DM_RULES_FLAG=1",
        ] {
            assert!(
                properties.lines().any(|line| line == wanted),
                "no {wanted} in:\n{properties}"
            );
        }
        assert!(!properties.contains("ID_FS_"), "blkid has read it");
        let links = run!("udevadm", "info", "--query=symlink", node);
        assert_eq!(links, "", "udevd owns no link to it");
    } else {
        assert!(!Path::new("/run/udev/data").exists());
    }
    snapshot.cleanup().expect("nobody has it open");
    settle();
}

#[test]
fn fifty_devices_of_one_name_all_have_their_alias() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    for cycle in 0..50 {
        let snapshot = SnapshotOptions::new()
            .create(scene.image(), &cow, &name)
            .expect("a snapshot");
        assert_alias(&snapshot, "right after create");
        // Now and then, leave udevd the time to do something about a device that is gone.
        if cycle % 10 == 0 {
            settle();
            assert_alias(&snapshot, "when udevd has caught up");
        }
        snapshot.cleanup().expect("udevd does not have it open");
        assert!(!alias_exists(&name));
    }
    settle();
    assert!(!alias_exists(&name), "nobody made it anew");
}

/// udevd, if there is one, that does nothing until the value goes.
struct Stopped {
    process: Option<String>,
}

impl Stopped {
    fn udevd() -> Self {
        let mut stopped = Self { process: None };
        if udev() {
            let process = udevd().expect("DMSNAP_TEST_UDEV=1 says that udevd runs");
            run!("kill", "-STOP", &process);
            stopped.process = Some(process);
        }
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            output!("kill", "-CONT", process);
        }
    }
}

fn udevd() -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .map(|entry| entry.path())
        .filter(|path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == "systemd-udevd")
        })
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .min_by_key(|process| process.parse::<u32>().unwrap_or(u32::MAX))
}

#[test]
fn a_udevd_that_is_stuck_is_not_waited_for() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    settle();
    let stopped = Stopped::udevd();
    let create = || {
        SnapshotOptions::new()
            .create(scene.image(), &cow, &name)
            .expect("a snapshot")
    };
    for _ in 0..5 {
        let snapshot = create();
        assert_alias(&snapshot, "udevd stuck");
        fs::File::open(snapshot.device()).expect("it opens at once");
        snapshot.cleanup().expect("nobody has it open");
        assert!(!alias_exists(&name));
    }

    // All that udevd has missed, it now hears of at once, while a device of that name is alive.
    let snapshot = create();
    drop(stopped);
    settle();
    assert_alias(&snapshot, "udevd has caught up");
    snapshot.cleanup().expect("nobody has it open");
    settle();
    assert!(!alias_exists(&name), "nobody made it anew");
}
