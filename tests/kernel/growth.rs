//! Growing a COW file under a live snapshot, and what to do when it is too late for that.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::{Refusal, Retry};
use dmsnap::snapshot::GrowOptions;
use dmsnap::{Error, ErrorKind, Snapshot, SnapshotOptions, Store};

use crate::common::filling::{Direct, status_of, usage_of};
use crate::common::reading::{dm_table, loops_below};
use crate::common::{Mounted, Scene, chain, run};

const SMALL: u64 = 256 << 10;

fn po() -> SnapshotOptions {
    let mut options = SnapshotOptions::new();
    options.store(Store::PersistentOverflow);
    options
}

/// A `PO` snapshot over a COW file of [`SMALL`].
fn small(scene: &Scene) -> (Snapshot, String, std::path::PathBuf) {
    let name = scene.name();
    let cow = scene.sparse(format!("{name}.cow"), SMALL);
    let snapshot = po().create(scene.image(), &cow, &name);
    (snapshot.expect("a snapshot"), name, cow)
}

fn total(status: &SnapshotStatus) -> u64 {
    match status {
        SnapshotStatus::Usage(usage) => usage.total.to_bytes().expect("small"),
        other => panic!("{other}"),
    }
}

/// Makes it overflow; returns how much of it was written before.
fn overflow(snapshot: &Snapshot, name: &str) -> u64 {
    let device = Direct::open(snapshot.device());
    let mut written = 0;
    while device.write(0x5a, written, 4096).is_ok() {
        written += 4096;
        assert!(written < SMALL, "it never overflows");
    }
    assert_eq!(status_of(name), SnapshotStatus::Overflow);
    written
}

#[test]
fn a_live_snapshot_grows_under_its_user_and_never_shrinks() {
    let scene = Scene::new();
    let (snapshot, name, cow) = small(&scene);
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, SMALL / 2).expect("it fits");
    let grown = snapshot.grow(1 << 20).expect("it grows");
    assert_eq!(total(&grown), 1 << 20);
    assert_eq!(fs::metadata(&cow).expect("the COW file").len(), 1 << 20);
    device.write(0x5a, SMALL / 2, SMALL).expect("it fits now");
    for less in [0, SMALL, 1 << 20] {
        let same = dmsnap::snapshot::grow(&name, less).expect("nothing to do");
        assert_eq!(total(&same), 1 << 20);
    }
    // Somebody made the file longer and died before the loop device was told.
    run!("truncate", "-s", (2 << 20).to_string(), &cow);
    let uuid = snapshot.handles().uuid.clone().expect("a uuid");
    let taken = dmsnap::snapshot::grow(&uuid, 0).expect("it is told");
    assert_eq!(total(&taken), 2 << 20);
    let blocks = || fs::metadata(&cow).expect("the COW file").blocks() * 512;
    assert!(blocks() < 1 << 20, "it is sparse: {}", blocks());
    let mut options = GrowOptions::new();
    options.reserve(true).grow(&name, 3 << 20).expect("room");
    assert!(blocks() >= 3 << 20, "it is reserved: {}", blocks());
    assert!(device.reads(0x5a, 0, SMALL + SMALL / 2));
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn whoever_grows_at_the_same_time_none_makes_it_shorter() {
    let scene = Scene::new();
    let (snapshot, name, cow) = small(&scene);
    let name = &name;
    for round in 0..8 {
        let base = (round + 1) << 20;
        std::thread::scope(|scope| {
            for nth in 0..4 {
                scope.spawn(move || {
                    let asked = base + (nth << 16);
                    let grown = dmsnap::snapshot::grow(name, asked).expect("it grows");
                    assert!(total(&grown) >= asked, "{grown}");
                });
            }
        });
        let most = base + (3 << 16);
        assert_eq!(fs::metadata(&cow).expect("the COW file").len(), most);
        assert_eq!(usage_of(name).total.to_bytes(), Some(most));
    }
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_file_that_moved_is_found_and_one_that_went_is_not_mistaken() {
    let scene = Scene::new();
    let (snapshot, name, cow) = small(&scene);
    let moved = scene.path("moved.cow");
    fs::rename(&cow, &moved).expect("the same directory");
    scene.file(&cow, "another file, at the old path");
    let grown = snapshot.grow(1 << 20).expect("the kernel knows its path");
    assert_eq!(total(&grown), 1 << 20);

    fs::remove_file(&moved).expect("it is there");
    let elsewhere = |path| Refusal::FileElsewhere {
        name: name.clone(),
        path,
    };
    let gone = scene.path("moved.cow (deleted)");
    let refused = snapshot.grow(2 << 20);
    println!("bad input: grow, COW file unlinked: {refused:?}");
    assert_eq!(refused, Err(elsewhere(gone.clone()).into()));
    scene.file(&gone, "a file with an unlikely name");
    assert_eq!(snapshot.grow(2 << 20), Err(elsewhere(gone.clone()).into()));
    let length = fs::metadata(&gone).expect("it is there").len();
    assert_eq!(length, "a file with an unlikely name".len() as u64);
    assert_eq!(usage_of(&name).total.to_bytes(), Some(1 << 20));
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_host_without_room_fails_the_growth_and_not_the_snapshot() {
    let scene = Scene::new();
    let options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"];
    let mounted = Mounted::mount(options, &scene.path("mnt"));
    let cow = mounted.at().join("cow");
    let file = File::create(&cow).expect("a new file");
    file.set_len(SMALL).expect("room for a sparse file");
    drop(file);
    let name = scene.name();
    let snapshot = po().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let mut reserved = GrowOptions::new();
    let error = reserved.reserve(true).grow(&name, 8 << 20);
    let error = error.expect_err("there is no room");
    println!("message: grow without room: {}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(usage_of(&name).total.to_bytes(), Some(SMALL));
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, SMALL / 2).expect("it works on");
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn an_overflowed_snapshot_is_recovered_over_a_longer_file() {
    let scene = Scene::new();
    let (snapshot, name, cow) = small(&scene);
    let not_yet = dmsnap::snapshot::recover(&name, 1 << 20).expect_err("it works");
    let working = Refusal::NotOverflowed { name: name.clone() };
    assert_eq!(not_yet, working.into());
    let written = overflow(&snapshot, &name);
    let table = dm_table(&name);
    let error = snapshot.grow(1 << 20).expect_err("it is too late");
    println!("message: grow after an overflow: {}", chain(&error));
    assert_eq!(error, Refusal::Overflowed { name: name.clone() }.into());
    assert_eq!(fs::metadata(&cow).expect("the COW file").len(), SMALL);

    let user = Direct::open(snapshot.device());
    let mut options = GrowOptions::new();
    options.retry(Retry::until(std::time::Duration::from_millis(50)));
    let error = options.recover(&name, 1 << 20).expect_err("it is open");
    println!("message: recover an open device: {}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(chain(&error).contains("open count 1"), "{}", chain(&error));
    assert_eq!(dm_table(&name), table);
    drop(user);

    let again = dmsnap::snapshot::recover(&name, 1 << 20).expect("it is closed");
    assert_eq!(again.warnings().len(), 1, "{:?}", again.warnings());
    assert_ne!(again.handles().uuid, snapshot.handles().uuid);
    assert_eq!(dm_table(&name).split(' ').nth(5), Some("PO"));
    assert_eq!(usage_of(&name).total.to_bytes(), Some(1 << 20));
    assert_eq!(loops_below(scene.dir()).len(), 2);
    let device = Direct::open(again.device());
    assert!(device.reads(0x5a, 0, written), "what fitted is there");
    device.write(0xa5, 0, SMALL).expect("writes work again");
    drop(device);
    again.cleanup().expect("nobody has it open");
}

#[test]
fn what_is_lost_is_said_to_be_lost() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.sparse("cow", SMALL));
    let snapshot = SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, SMALL).expect_err("it does not fit");
    drop(device);
    let lost = Error::from(Refusal::Invalid { name: name.clone() });
    println!("message: grow an invalid snapshot: {lost}");
    assert_eq!(snapshot.grow(1 << 20), Err(lost.clone()));
    assert_eq!(dmsnap::snapshot::recover(&name, 1 << 20), Err(lost));
    assert_eq!(fs::metadata(&cow).expect("the COW file").len(), SMALL);
    snapshot.cleanup().expect("nobody has it open");
    let error = dmsnap::snapshot::grow(&name, 1 << 20).expect_err("it is gone");
    assert_eq!(error.kind(), ErrorKind::Gone);
}
