//! What a disk outlives, and how many flushes its COW file gets for that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dmsnap::pool::CowFate;
use dmsnap::{Durability, Origin, PoolOptions, Snapshot, SnapshotOptions};

use crate::common::scene::COW_BYTES;
use crate::common::tools::start;
use crate::common::{Scene, run};

/// How many chunks are written, each with a flush behind it.
const WRITES: u64 = 32;

fn setting(node: &Path) -> String {
    let name = fs::canonicalize(node).expect("a node");
    let name = name.file_name().expect("a name").to_owned();
    let path = Path::new("/sys/block").join(name).join("queue/write_cache");
    fs::read_to_string(path)
        .expect("a setting")
        .trim()
        .to_owned()
}

fn cow_loop(snapshot: &Snapshot) -> &Path {
    &snapshot
        .handles()
        .cow_loop
        .as_ref()
        .expect("a COW loop")
        .path
}

/// The flushes that the loop device has done: the sixteenth field of its statistics.
fn flushes(node: &Path) -> u64 {
    let name = node.file_name().expect("a name");
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"));
    let text = text.expect("statistics");
    let field = text.split_whitespace().nth(15).expect("flushes");
    field.parse().expect("a number")
}

/// Writes to chunks that are new to the store, and flushes after each.
fn write(device: &Path) {
    let device = File::options().write(true).open(device).expect("a device");
    for nth in 0..WRITES {
        let block = [u8::try_from(nth + 1).expect("few"); 4096];
        device.write_all_at(&block, nth * 4096).expect("room");
        device.sync_data().expect("it takes a flush");
    }
}

fn first_bytes(device: &Path) -> Vec<u8> {
    let bytes = usize::try_from(WRITES * 4096).expect("it fits");
    let mut all = fs::read(device).expect("it can be read");
    all.truncate(bytes);
    all
}

#[test]
fn each_durability_flushes_the_cow_file_as_little_as_it_says() {
    let scene = Scene::new();
    let counts = [
        (Durability::ThrowAway, "write through"),
        (Durability::Processes, "write through"),
        (Durability::PowerCuts, "write back"),
    ]
    .map(|(durability, wanted)| {
        let mut options = SnapshotOptions::new();
        options.durability(durability);
        let snapshot = scene.snapshot_with(&options);
        assert_eq!(setting(snapshot.device()), wanted, "{durability}");
        let before = flushes(cow_loop(&snapshot));
        write(snapshot.device());
        let count = flushes(cow_loop(&snapshot)) - before;
        // What would take the flushes from the next file on that loop device.
        assert_eq!(setting(cow_loop(&snapshot)), "write back", "{durability}");
        snapshot.cleanup().expect("nobody has it open");
        println!("{durability}: {count} flushes for {WRITES} writes");
        count
    });
    assert_eq!(counts[0], 0);
    assert!(counts[1] > 0, "the store's commits");
    assert!(counts[2] >= counts[1] + WRITES, "the guest's besides");
}

/// The writer is killed with the disk open, and the disk removed by another program.
#[test]
fn what_is_to_survive_processes_is_there_after_a_kill() {
    let scene = Scene::new();
    let cow = scene.sparse("cow", COW_BYTES);
    let mut options = SnapshotOptions::new();
    options.durability(Durability::Processes);
    let name = scene.name();
    let snapshot = options
        .create(scene.image(), &cow, &name)
        .expect("a snapshot");
    write(snapshot.device());
    let written = first_bytes(snapshot.device());
    let vmm = start(Command::new("sh").args([
        "-c",
        r#"exec 3<>"$1"; kill -9 $$"#,
        "sh",
        snapshot.device().to_str().expect("UTF-8"),
    ]));
    assert!(!vmm.join().status.success(), "it was killed");
    drop(snapshot);
    run!("dmsetup", "remove", "--retry", &name);
    // What dmsetup does not know of.
    let _ = fs::remove_file(Path::new("/dev/mapper").join(&name));
    let again = options
        .create(scene.image(), &cow, &name)
        .expect("the store is sound");
    assert_eq!(first_bytes(again.device()), written);
    again.cleanup().expect("nobody has it open");
}

/// A table that is swapped in resets the setting.
#[test]
fn a_recycled_device_ends_flushes_too() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an origin");
    let mut options = SnapshotOptions::new();
    options.durability(Durability::ThrowAway);
    let pool = PoolOptions::new()
        .size(1)
        .snapshot(&options)
        .open(&origin, scene.dir());
    let pool = pool.expect("a pool");
    for _ in 0..4 {
        let claimed = pool.claim(&scene.name()).expect("a disk");
        let device = claimed.snapshot.device();
        assert_eq!(setting(device), "write through", "recycled: {claimed:?}");
        let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
        released.expect("nobody has it open");
        assert!(pool.wait_recycled(Duration::from_secs(60)));
    }
    pool.drain().expect("all released");
}
