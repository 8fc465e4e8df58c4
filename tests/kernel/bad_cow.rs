//! Bad input: COW files that somebody uses, or that hold something else than what is asked for.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use dmsnap::{ChunkSize, SnapshotOptions, Store};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::common::rows::Row;
use crate::common::scene::{COW_BYTES, ext4};
use crate::common::tools::{complaint, finish, start, success};
use crate::common::{Losetup, Scene, dmsnap, dmsnap_under, run};

fn message(scene: &Scene, what: &str, cow: &Path, options: &SnapshotOptions) -> String {
    Row::new(scene, what, scene.image(), cow).refused(options).1
}

fn in_use(cow: &Path) -> String {
    format!("COW file {cow:?} is in use by another snapshot")
}

#[test]
fn a_cow_file_of_a_live_snapshot() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name");
    let cow = scene.path(format!("{name}.cow"));
    let link = scene.path("link");
    fs::hard_link(&cow, &link).expect("a hard link");
    let options = SnapshotOptions::new();
    for (what, cow) in [
        ("COW in use, same process", &cow),
        ("COW in use, by a hard link", &link),
    ] {
        assert_eq!(message(&scene, what, cow, &options), in_use(cow));
    }
    let row = Row::new(&scene, "COW in use, other process", scene.image(), &cow);
    assert_eq!(row.refused_under(&[]), in_use(&cow));
    let other = scene.cow("other");
    let row = Row::new(&scene, "image is a COW file in use", &cow, &other);
    let (_, text) = row.refused(&options);
    assert_eq!(
        text,
        format!(
            "origin image {cow:?} is locked: by another process, as a COW file, by a merge, or against one by the snapshots over it, which must be cleaned up first"
        )
    );
    snapshot.cleanup().expect("nobody has it open");
    let again = options
        .create(scene.image(), &cow, &scene.name())
        .expect("it is free again");
    again.cleanup().expect("nobody has it open");
}

#[test]
fn an_image_in_use_is_no_cow_file() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let other = scene.cow("other");
    let row = Row::new(&scene, "COW is an image in use", &other, scene.image());
    let (_, text) = row.refused(&SnapshotOptions::new());
    assert_eq!(text, in_use(scene.image()));
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_cow_file_whose_creator_was_killed() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    // SIGKILL on the way out: the creator ran no code of ours after the handles were printed.
    let log = scene.path("strace.log");
    let mut creator = dmsnap_under(&[
        "strace",
        "-o",
        log.to_str().expect("UTF-8"),
        "-e",
        "inject=exit_group:signal=KILL",
    ]);
    let killed = finish(
        creator
            .arg("create")
            .arg(scene.image())
            .args([&cow])
            .arg(&name),
    );
    assert!(!killed.status.success(), "{killed:?}");
    let handles = scene.file("handles.json", &killed.stdout);
    let options = SnapshotOptions::new();
    assert_eq!(
        message(&scene, "COW in use, creator killed", &cow, &options),
        in_use(&cow)
    );
    success(dmsnap().arg("cleanup").arg(&handles));
    let again = options
        .create(scene.image(), &cow, &scene.name())
        .expect("it is free again");
    again.cleanup().expect("nobody has it open");
}

#[test]
fn a_cow_file_that_losetup_has() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    // A loop device that took no lock is not seen by the lock; whatever comes of it must be whole or nothing.
    let theirs = Losetup::attach(&cow);
    let outcome = SnapshotOptions::new().create(scene.image(), &cow, &scene.name());
    println!(
        "bad input: COW file bound by losetup: {}",
        outcome
            .as_ref()
            .map_or_else(|error| error.to_string(), |_| "(works)".to_owned())
    );
    if let Ok(snapshot) = outcome {
        snapshot.cleanup().expect("nobody has it open");
    }
    assert!(theirs.is_bound(), "that one is not ours");
}

#[test]
fn a_cow_file_that_somebody_has_locked() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let (ready, writer) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let (held, release) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let mut holder = Command::new("flock")
        .arg(&cow)
        .args(["sh", "-c", "echo locked; read line"])
        .stdin(held)
        .stdout(writer)
        .spawn()
        .expect("flock starts");
    let (mut ready, mut release) = (File::from(ready), File::from(release));
    let mut word = [0; 7];
    ready.read_exact(&mut word).expect("it has the lock");
    let options = SnapshotOptions::new();
    assert_eq!(
        message(&scene, "COW locked by another program", &cow, &options),
        in_use(&cow)
    );
    // Longer than a create waits unless it is told to.
    let letting_go = thread::spawn(move || {
        thread::sleep(Duration::from_secs(2));
        release.write_all(b"\n").expect("it listens");
        holder.wait().expect("it ends")
    });
    let mut patient = SnapshotOptions::new();
    patient.deadline(Duration::from_secs(300));
    let made = patient.create(scene.image(), &cow, &scene.name());
    made.expect("the lock goes before the deadline")
        .cleanup()
        .expect("nobody has it open");
    letting_go.join().expect("it ends");
}

#[test]
fn foreign_data() {
    let scene = Scene::new();
    let options = SnapshotOptions::new();
    let image = scene.path("ext4");
    ext4(&image, COW_BYTES);
    let text = scene.file("text", "hello ".repeat(4096));
    for (what, cow) in [("COW holds an ext4", &image), ("COW holds a text", &text)] {
        assert_eq!(
            message(&scene, what, cow, &options),
            format!(
                "COW file {cow:?} holds foreign data: neither blank nor a snapshot's exception store"
            )
        );
    }
}

/// A COW file with a store of 8 sectors, and these words at these offsets of its header.
fn store_with(scene: &Scene, name: &str, words: &[(u64, u32)]) -> std::path::PathBuf {
    let cow = scene.cow(name);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    snapshot.cleanup().expect("nobody has it open");
    let file = File::options().write(true).open(&cow).expect("it is ours");
    for (offset, word) in words {
        file.write_all_at(&word.to_le_bytes(), *offset)
            .expect("writable");
    }
    cow
}

#[test]
fn damaged_and_invalid_stores() {
    let scene = Scene::new();
    let options = SnapshotOptions::new();
    for (what, words, says) in [
        (
            "COW header damaged: version",
            [(8, 7)],
            "holds a damaged exception store: version is 7",
        ),
        (
            "COW header damaged: chunk size",
            [(12, 24)],
            "holds a damaged exception store: chunk_size is 24",
        ),
        (
            "COW header damaged: valid",
            [(4, 9)],
            "holds a damaged exception store: valid is 9",
        ),
        (
            "COW header damaged: magic",
            [(0, 0x1234_5678)],
            "holds foreign data: neither blank nor a snapshot's exception store",
        ),
        (
            "COW marked invalid",
            [(4, 0)],
            "holds a snapshot that the kernel has marked invalid (it overflowed or a write failed)",
        ),
    ] {
        let cow = store_with(&scene, what, &words);
        assert_eq!(
            message(&scene, what, &cow, &options),
            format!("COW file {cow:?} {says}")
        );
    }
}

#[test]
fn a_header_whose_magic_alone_is_gone_is_not_blank() {
    let scene = Scene::new();
    // The kernel would take it for new, and write a store over it.
    let cow = store_with(&scene, "cow", &[(0, 0)]);
    let text = message(
        &scene,
        "COW header without magic",
        &cow,
        &SnapshotOptions::new(),
    );
    assert!(text.contains("holds foreign data"), "{text}");
}

#[test]
fn another_chunk_size_than_the_stores() {
    let scene = Scene::new();
    let cow = store_with(&scene, "cow", &[]);
    let mut options = SnapshotOptions::new();
    options.chunk_size(ChunkSize::new(32).expect("a chunk size"));
    assert_eq!(
        message(&scene, "COW with another chunk size", &cow, &options),
        format!("COW file {cow:?} was made with chunks of 8 sectors, not 32")
    );
}

#[test]
fn a_transient_store_over_something() {
    let scene = Scene::new();
    let cow = store_with(&scene, "cow", &[]);
    let mut options = SnapshotOptions::new();
    options.store(Store::Transient);
    assert_eq!(
        message(&scene, "transient store on a used COW", &cow, &options),
        format!("COW file {cow:?} is not blank (truncate it to reuse it)")
    );
    run!("truncate", "-s", "0", &cow);
    run!("truncate", "-s", COW_BYTES.to_string(), &cow);
    let snapshot = options
        .create(scene.image(), &cow, &scene.name())
        .expect("it is blank now");
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn two_processes_with_one_cow_file() {
    let scene = Scene::new();
    for round in 0..5 {
        let cow = scene.cow(format!("{round}.cow"));
        let names = [scene.name(), scene.name()];
        let racers = names.clone().map(|name| {
            let mut command = dmsnap();
            start(command.arg("create").args([scene.image(), &cow]).arg(name))
        });
        let done = racers.map(|racer| racer.join());
        let (winners, losers): (Vec<_>, Vec<_>) =
            done.iter().partition(|done| done.status.success());
        assert_eq!(winners.len(), 1, "{done:?}");
        assert_eq!(complaint(losers[0]), in_use(&cow));
        let handles = scene.file(format!("{round}.json"), &winners[0].stdout);
        success(dmsnap().arg("cleanup").arg(handles));
        scene.assert_clean();
    }
}
