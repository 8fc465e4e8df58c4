//! The host's file system under the COW file is full: the guest's disk fails, and the host can see it and clear it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::Refusal;
use dmsnap::find::State;
use dmsnap::{SnapshotOptions, Store};

use crate::common::scene::ext4;
use crate::common::tools::{complaint, finish, success};
use crate::common::{Losetup, Mounted, Scene, chain, dmsnap, eventually, reading, run};

/// What is written between two syncs, which are what takes the time.
static WRITE: [u8; 64 << 10] = [0xa5; 64 << 10];

/// Writes until the disk gives up, as a guest would notice it: at the next sync.
fn fill(device: &Path) -> std::io::Error {
    let disk = File::options()
        .write(true)
        .open(device)
        .expect("the device opens");
    for at in (0..4u64 << 20).step_by(WRITE.len()) {
        let wrote = disk.write_all_at(&WRITE, at);
        if let Err(error) = wrote.and_then(|()| disk.sync_data()) {
            return error;
        }
    }
    panic!("all of it was written to a file system without room for it");
}

/// On a file system, mounted at `at`, with room for a store and some chunks, but not for the whole image.
fn the_disk_fails_and_the_host_sees_it(scene: &Scene, what: &str, at: &Path, store: Store) {
    let (name, cow) = (scene.name(), at.join("cow"));
    let file = File::create_new(&cow).expect("a new file");
    file.set_len(8 << 20).expect("sparse, whatever the room");
    drop(file);
    let mut options = SnapshotOptions::new();
    options.store(store);
    let made = options
        .create(scene.image(), &cow, &name)
        .expect("a snapshot");
    let write = fill(made.device());

    let info = dmsnap::status(&name).expect("a status");
    let dmsetup = run!("dmsetup", "status", &name);
    println!(
        "{what}, {store:?}: the guest sees {write}; status {:?}; dmsetup: {dmsetup}",
        info.status
    );
    assert_eq!(info.state, State::Live);
    assert_eq!(info.status, Some(SnapshotStatus::Invalid));
    assert!(dmsetup.ends_with("snapshot Invalid"), "{dmsetup}");
    let read =
        File::open(made.device()).and_then(|disk| disk.read_exact_at(&mut [0; 4096], 2 << 20));
    read.expect_err("an invalid snapshot fails all I/O");

    let status = success(dmsnap().args(["status", &name]));
    let list = success(dmsnap().args(["list", "--json"]));
    assert!(status.contains("invalid"), "{status}");
    assert!(list.contains("\"status\": \"invalid\""), "{list}");
    made.cleanup().expect("nobody has it open");
    assert!(!reading::dm_exists(&name));
    let detached = || reading::loops_below(at).is_empty();
    assert!(
        eventually(Duration::from_secs(60), detached),
        "{:?}",
        reading::loops_below(at)
    );

    // What was written is lost with the store, and a second try is not made to look like a disk.
    if store.is_persistent() {
        let again = options
            .create(scene.image(), &cow, &name)
            .expect_err("its store is invalid");
        println!("{what}, {store:?}: {}", chain(&again));
        assert_eq!(again, Refusal::CowInvalid { path: cow.clone() }.into());
    }
    std::fs::remove_file(cow).expect("nobody has it");
}

const STORES: [Store; 3] = [
    Store::Persistent,
    Store::PersistentOverflow,
    Store::Transient,
];

#[test]
fn a_cow_file_on_a_full_tmpfs() {
    let scene = Scene::new();
    let small = Mounted::mount(
        ["-t", "tmpfs", "-o", "size=1M", "tmpfs"],
        &scene.path("small"),
    );
    for store in STORES {
        the_disk_fails_and_the_host_sees_it(&scene, "tmpfs", small.at(), store);
    }
}

#[test]
fn a_cow_file_on_a_full_ext4() {
    let scene = Scene::new();
    let disk = scene.path("disk");
    ext4(&disk, 4 << 20);
    let held = Losetup::attach(&disk);
    let device = held.device.to_str().expect("ASCII").to_owned();
    let small = Mounted::mount([&*device], &scene.path("small"));
    for store in STORES {
        the_disk_fails_and_the_host_sees_it(&scene, "ext4", small.at(), store);
    }
}

#[test]
fn no_room_even_for_the_store() {
    let scene = Scene::new();
    let small = Mounted::mount(
        ["-t", "tmpfs", "-o", "size=64k", "tmpfs"],
        &scene.path("small"),
    );
    let cow = small.at().join("cow");
    File::create_new(&cow)
        .and_then(|file| file.set_len(8 << 20))
        .expect("sparse");
    let room = File::create_new(small.at().join("filler")).expect("a new file");
    while room
        .write_all_at(&[1; 4096], room.metadata().expect("a file").len())
        .is_ok()
    {}
    let paths = [scene.image(), &cow].map(|path| path.to_str().expect("ASCII"));
    let name = scene.name();
    let done = finish(dmsnap().args(["create", paths[0], paths[1], &name]));
    println!("create without room: {}", complaint(&done));
    scene.assert_clean();
}

#[test]
fn a_reservation_is_refused_up_front() {
    let scene = Scene::new();
    let small = Mounted::mount(
        ["-t", "tmpfs", "-o", "size=1M", "tmpfs"],
        &scene.path("small"),
    );
    let cow = small.at().join("cow");
    let paths = [scene.image(), &cow].map(|path| path.to_str().expect("ASCII"));
    let name = scene.name();
    let words = [
        "create",
        "--make-cow",
        "worst-case",
        paths[0],
        paths[1],
        &name,
    ];
    let line = complaint(&finish(dmsnap().args(words).arg("--reserve")));
    println!("create with a reservation: {line}");
    assert!(
        line.ends_with("No space left on device (os error 28)"),
        "{line}"
    );
    assert!(!cow.exists(), "the file that was made is gone again");
    scene.assert_clean();

    // Without one it is made, and the guest meets the end later.
    let handles = success(dmsnap().args(words));
    let handles: dmsnap::Handles = serde_json::from_str(&handles).expect("handles");
    dmsnap::cleanup(&handles).expect("nobody has it open");
}
