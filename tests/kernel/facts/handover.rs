//! Handover: how a live snapshot becomes a layer.
//!
//! V is a live snapshot of O in C0, B the dm device that becomes the layer, C1 the COW device on which V goes on:
//!
//! 1. load `snapshot O C0` into B
//! 2. load `snapshot B C1` into V
//! 3. suspend V
//! 4. resume B
//! 5. resume V

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{CHUNK_BYTES, Device, Stack, errno_text};
use crate::common::reading::{dm_exists, number};
use crate::common::{Losetup, Scene, eventually, output, run};

/// Writes file after file, each synced before the next, until it is stopped.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

/// The inodes of the file system are not to run out.
const FILES: u64 = 2000;

fn file_content(nth: u64) -> Vec<u8> {
    nth.to_le_bytes().repeat(512)
}

impl Writer {
    pub(crate) fn start(dir: PathBuf) -> Self {
        let (stop, synced) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&synced));
        let thread = std::thread::spawn(move || {
            for nth in (0..FILES).take_while(|_| !stopped.load(Ordering::Relaxed)) {
                let file = File::create(dir.join(nth.to_string()))?;
                file.write_all_at(&file_content(nth), 0)?;
                file.sync_all()?;
                count.store(nth + 1, Ordering::Release);
                // Most of the time a write is in flight, and the CPU has time for the rest.
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        Self {
            stop,
            synced,
            thread,
        }
    }

    pub(crate) fn synced(&self) -> u64 {
        self.synced.load(Ordering::Acquire)
    }

    /// Waits for a few more files.
    pub(crate) fn go_on(&self) {
        let goal = (self.synced() + 10).min(FILES);
        let written = eventually(Duration::from_secs(30), || self.synced() >= goal);
        assert!(written, "{} of {goal} files", self.synced());
    }

    /// How many files there are; no write of any failed.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().expect("it does not panic");
        ended.expect("no write fails");
        self.synced.load(Ordering::Acquire)
    }
}

pub(crate) fn assert_files(dir: &Path, count: u64) {
    for nth in 0..count {
        let found = fs::read(dir.join(nth.to_string()));
        let found = found.unwrap_or_else(|error| panic!("file {nth} of {count}: {error}"));
        assert!(found == file_content(nth), "file {nth} of {count}");
    }
}

fn load_refusal(device: &Device, table: &str) -> String {
    errno_text(&output!(
        "dmsetup",
        "reload",
        &device.name,
        "--table",
        table
    ))
}

/// Where a header's sector has nothing of the kernel's.
const MARK_AT: u64 = 64;

const MARK: [u8; 192] = [7; 192];

fn mark(cow: &Path) -> [u8; 192] {
    let mut found = [0; 192];
    let file = File::open(cow).expect("readable");
    file.read_exact_at(&mut found, MARK_AT).expect("a header");
    found
}

/// The `valid` word of a store's header.
fn valid(cow: &Path) -> u32 {
    let mut start = [0; 8];
    let file = File::open(cow).expect("readable");
    file.read_exact_at(&mut start, 0).expect("a header");
    assert_eq!(&start[..4], b"SnAp");
    u32::from_le_bytes([4, 5, 6, 7].map(|byte| start[byte]))
}

// drivers/md/dm-snap.c, snapshot_ctr and snapshot_preresume: the table that is loaded second for the same origin and
// COW device takes the exceptions over when it is resumed while the first is suspended.
#[test]
fn a_mounted_snapshot_becomes_a_layer_three_times_under_writes() {
    let scene = Scene::ext4();
    let mut stack = Stack::over(&scene);
    let (_, mut cow) = stack.cow();
    let mut origin = stack.image.clone();
    let v = stack.snapshot(&origin, &cow);
    let at = stack.mount(&v);
    let writer = Writer::start(at.clone());

    let mut layers = Vec::new();
    for _ in 0..3 {
        writer.go_on();
        let (b, fresh) = stack.prepare(&v, &origin, &cow);
        assert_eq!(b.attributes(), "-I-w");
        // Not the steps yet: V goes on as if nothing were loaded.
        writer.go_on();
        let synced = writer.synced();
        v.suspend();
        b.resume();
        v.resume();
        assert_eq!(
            (b.attributes(), v.attributes()),
            ("L--w".into(), "L--w".into())
        );
        writer.go_on();
        layers.push((b.clone(), synced, b.content()));
        (origin, cow) = (b.number, fresh);
    }

    // Two forks of each while V is written.
    let mut forks = Vec::new();
    for (b, synced, _) in &layers {
        for _ in 0..2 {
            let fork = stack.fork(b);
            run!("e2fsck", "-f", "-n", fork.node());
            let at = stack.mount(&fork);
            assert_files(&at, *synced);
            fs::write(at.join("own"), &fork.name).expect("a fork can be written");
            forks.push((fork, at));
        }
    }
    writer.go_on();
    let written = writer.stop();
    assert_files(&at, written);
    assert!(!at.join("own").exists(), "V sees nothing of its forks");
    for (fork, at) in &forks {
        let own = fs::read_to_string(at.join("own")).expect("its own file");
        assert_eq!(own, fork.name, "and they nothing of each other");
        stack.unmount(at);
        run!("e2fsck", "-f", "-n", fork.node());
    }
    stack.unmount(&at);
    run!("e2fsck", "-f", "-n", v.node());
    for (b, _, before) in &layers {
        assert!(b.content() == *before, "a layer has changed");
        assert_ne!(b.status(), "Invalid");
    }
}

// drivers/md/dm-snap.c, snapshot_ctr: the COW device is opened as the table is, and nothing is written to a store that
// is there.
#[test]
fn a_layer_may_have_a_read_only_table_over_a_read_only_loop_device() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");

    // What is behind the header in its chunk is nobody's but ours.
    let marked = File::options().write(true).open(&file).expect("ours");
    marked.write_all_at(&MARK, MARK_AT).expect("room");
    let (_, fresh) = stack.cow();
    let b = stack.device();
    b.load_read_only(&stack.table(&image, &cow));
    v.load(&stack.table(&b.number, &fresh));
    v.suspend();
    b.resume();
    v.resume();
    assert_eq!(b.attributes(), "L--r");
    let frozen = b.content();
    v.open().write(2, 0, 2 * CHUNK_BYTES).expect("room");
    assert!(b.content() == frozen, "the layer is as it was");

    assert_eq!(mark(&file), MARK, "the handover writes no header");

    // Under the live V, B goes over to a loop device that cannot be written.
    let before = fs::read(&file).expect("readable");
    let read_only = Losetup::attach_read_only(&file);
    b.load_read_only(&stack.table(&image, &number(&read_only.device)));
    stack.loops.push(read_only);
    b.suspend();
    b.resume();
    run!("dmsetup", "mknodes", &b.name);
    assert_eq!(b.attributes(), "L--r");
    assert!(b.content() == frozen, "read from the file anew");
    assert!(v.open().reads(2, 0, 2 * CHUNK_BYTES));
    let fork = stack.fork(&b);
    assert!(fork.open().reads(1, 0, CHUNK_BYTES));
    fork.open().write(3, 0, CHUNK_BYTES).expect("room");
    assert!(b.content() == frozen);
    assert!(
        fs::read(&file).expect("readable") == before,
        "the frozen file is as it was"
    );
}

// drivers/md/dm-snap.c, snapshot_ctr: the store of a table that waits has no chunk size; __handover_exceptions swaps the
// two stores.
#[test]
fn a_table_that_waits_for_its_exceptions_or_has_given_them_away_shows_no_chunk_size() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    let (b, _) = stack.prepare(&v, &image, &cow);
    let waiting = run!("dmsetup", "table", "--inactive", &b.name);
    assert!(
        waiting.ends_with(&format!("{image} {cow} P 0")),
        "{waiting}"
    );
    v.suspend();
    b.resume();
    let given = run!("dmsetup", "table", &v.name);
    assert!(given.ends_with(&format!("{image} {cow} P 0")), "{given}");
    let live = run!("dmsetup", "table", &b.name);
    assert!(live.ends_with(&format!("{image} {cow} P 8")), "{live}");
    v.resume();
}

#[test]
fn before_the_suspension_a_handover_is_undone_by_a_clear_and_a_removal() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, _) = stack.prepare(&v, &image, &cow);
    assert_eq!(
        b.refusal("remove"),
        "Device or resource busy",
        "V's inactive table holds it"
    );
    v.clear();
    b.remove();
    assert_eq!(v.attributes(), "L--w");
    v.open().write(2, CHUNK_BYTES, CHUNK_BYTES).expect("room");
    assert!(v.open().reads(1, 0, CHUNK_BYTES));
    // And nothing of it is in the way of the next one.
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    b.resume();
    v.resume();
    assert!(v.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
}

// drivers/md/dm-snap.c, snapshot_preresume: "Unable to resume snapshot source until handover completes".
#[test]
fn between_suspension_and_handover_it_is_undone_in_one_order_only() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    let waiting = {
        let v = v.clone();
        let written = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&written);
        let thread = std::thread::spawn(move || {
            let wrote = v.open().write(2, CHUNK_BYTES, CHUNK_BYTES);
            done.store(true, Ordering::Release);
            wrote
        });
        (written, thread)
    };
    assert_eq!(
        b.refusal("remove"),
        "Device or resource busy",
        "V's inactive table holds it"
    );
    v.clear();
    assert_eq!(v.refusal("resume"), "Invalid argument");
    assert_eq!(
        v.attributes(),
        "L-sw",
        "still suspended, and its old table there"
    );
    assert!(!waiting.0.load(Ordering::Acquire), "its I/O waits");
    b.remove();
    v.resume();
    waiting
        .1
        .join()
        .expect("no panic")
        .expect("the write goes through");
    assert_eq!(v.attributes(), "L--w");
    assert!(v.open().reads(1, 0, CHUNK_BYTES) && v.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
}

// drivers/md/dm-snap.c, snapshot_resume: __handover_exceptions invalidates the source in memory. A process may be killed
// between the two resumes.
#[test]
fn after_the_handover_whoever_resumes_completes_it() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let before = v.content();
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    let waiting = {
        let v = v.clone();
        std::thread::spawn(move || v.open().write(2, CHUNK_BYTES, CHUNK_BYTES))
    };
    b.resume();

    // What whoever watches sees of it meanwhile.
    assert_eq!(
        (v.status().as_str(), v.attributes().as_str()),
        ("Invalid", "LIsw")
    );
    assert_eq!((b.attributes().as_str(), valid(&file)), ("L--w", 1));
    assert_ne!(b.status(), "Invalid");
    assert!(b.content() == before);
    assert_eq!(
        b.refusal("remove"),
        "Device or resource busy",
        "there is no way back"
    );

    v.resume();
    waiting
        .join()
        .expect("no panic")
        .expect("the write goes through");
    assert_ne!(v.status(), "Invalid");
    assert!(v.open().reads(1, 0, CHUNK_BYTES) && v.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
    assert!(b.content() == before, "the write went to V alone");
}

// Who clears V's table after the handover has the old one resumed, which has lost its exceptions; B has them.
#[test]
fn after_the_handover_a_cleared_table_can_be_loaded_again() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, fresh) = stack.prepare(&v, &image, &cow);
    v.suspend();
    b.resume();
    v.clear();
    v.resume();
    assert_eq!(
        (v.status().as_str(), v.attributes().as_str()),
        ("Invalid", "L--w")
    );
    assert!(!v.read_start().status.success(), "EIO");
    v.load(&stack.table(&b.number, &fresh));
    v.suspend();
    v.resume();
    assert!(v.open().reads(1, 0, CHUNK_BYTES));
    v.open().write(2, 0, CHUNK_BYTES).expect("room");
    assert_eq!(valid(&file), 1);
    assert!(b.open().reads(1, 0, CHUNK_BYTES));
}

// drivers/md/dm-snap.c, snapshot_dtr: "Cancelling snapshot handover." The swap destroys V's old table, which B has the
// exceptions from.
#[test]
fn a_resume_of_v_too_early_invalidates_b_and_the_file_stays_valid() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    v.resume();
    assert_eq!(
        (v.attributes().as_str(), b.attributes().as_str()),
        ("L--w", "-I-w")
    );
    assert!(!v.read_start().status.success(), "EIO");
    b.resume();
    assert_eq!(b.status(), "Invalid");
    assert!(!v.read_start().status.success(), "EIO");
    assert_ne!(v.status(), "Invalid", "it has a fresh store of its own");
    // A whole chunk needs nothing of B.
    v.open()
        .write(3, 2 * CHUNK_BYTES, CHUNK_BYTES)
        .expect("room");
    assert_eq!(valid(&file), 1);

    // B is had again from the file, under the same number, so that V's table still holds. A table that is loaded beside
    // the invalid one would take its invalidity over, so that one goes first.
    v.suspend();
    stack.park(&b, &image, &cow);
    b.suspend();
    b.resume();
    b.load(&stack.table(&image, &cow));
    b.suspend();
    b.resume();
    v.resume();
    assert!(b.open().reads(1, 0, CHUNK_BYTES));
    assert_eq!(valid(&file), 1);
    assert!(v.open().reads(1, 0, CHUNK_BYTES) && v.open().reads(3, 2 * CHUNK_BYTES, CHUNK_BYTES));
    v.open().write(2, 0, CHUNK_BYTES).expect("room");
    assert!(b.open().reads(1, 0, CHUNK_BYTES));
}

// As before, found before anybody has resumed B: its table was cancelled, and a new one reads the file.
#[test]
fn a_layer_whose_handover_was_cancelled_is_loaded_anew() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    v.resume();
    assert_eq!(
        load_refusal(&b, &stack.table(&image, &cow)),
        "Invalid argument"
    );
    // A table that reads nothing takes its place, and holds both devices meanwhile: whoever is killed here leaves a
    // layer that still says what it is made of.
    stack.park(&b, &image, &cow);
    assert_eq!(b.attributes(), "-I-w");
    let deps = run!("dmsetup", "deps", "--inactive", &b.name);
    assert!(deps.starts_with("2 dependencies"), "{deps}");
    b.load(&stack.table(&image, &cow));
    b.resume();
    assert_eq!(valid(&file), 1);
    assert!(b.open().reads(1, 0, CHUNK_BYTES) && v.open().reads(1, 0, CHUNK_BYTES));
    v.open().write(2, 0, CHUNK_BYTES).expect("room");
    assert!(b.open().reads(1, 0, CHUNK_BYTES));
}

// drivers/md/dm-snap.c, snapshot_preresume: "Unable to perform snapshot handover until source is suspended."
#[test]
fn a_resume_of_b_too_early_is_refused_and_costs_nothing() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, _) = stack.prepare(&v, &image, &cow);
    assert_eq!(b.refusal("resume"), "Invalid argument");
    assert_eq!(b.attributes(), "L-sw", "its table is in, and waits");
    assert_eq!(v.attributes(), "LI-w");
    v.open()
        .write(2, CHUNK_BYTES, CHUNK_BYTES)
        .expect("V works on");
    // It can be undone so,
    v.clear();
    b.remove();
    v.suspend();
    v.resume();
    assert!(v.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
    // and go on.
    let (b, _) = stack.prepare(&v, &image, &cow);
    assert_eq!(b.refusal("resume"), "Invalid argument");
    v.suspend();
    b.resume();
    v.resume();
    assert!(b.open().reads(1, 0, CHUNK_BYTES) && b.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
    assert!(v.open().reads(2, CHUNK_BYTES, CHUNK_BYTES));
}

// drivers/md/dm-snap.c, __invalidate_snapshot: a copy from a dead layer fails, and V's store is marked invalid with all
// that was acknowledged before in it.
#[test]
fn a_store_that_a_dead_layer_made_invalid_is_whole_but_for_its_mark() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (b, fresh) = stack.prepare(&v, &image, &cow);
    let file = stack.last_cow().to_owned();
    let opened = File::options().write(true).open(&file).expect("ours");
    opened.write_all_at(&MARK, MARK_AT).expect("room");
    v.suspend();
    v.resume();
    b.resume();
    v.open()
        .write(3, 2 * CHUNK_BYTES, CHUNK_BYTES)
        .expect("a whole chunk");
    v.open()
        .write(4, 3 * CHUNK_BYTES, 512)
        .expect_err("the rest of it cannot be read");
    assert_eq!((v.status().as_str(), valid(&file)), ("Invalid", 0));
    assert_eq!(
        mark(&file),
        [0; 192],
        "the header is written anew, and alone"
    );

    v.suspend();
    for (device, origin, cow) in [(&v, &b.number, &fresh), (&b, &image, &cow)] {
        stack.park(device, origin, cow);
        device.suspend();
        device.resume();
    }
    opened.write_all_at(&1u32.to_le_bytes(), 4).expect("room");
    b.load(&stack.table(&image, &cow));
    b.suspend();
    b.resume();
    v.load(&stack.table(&b.number, &fresh));
    v.suspend();
    v.resume();
    assert!(v.open().reads(1, 0, CHUNK_BYTES) && v.open().reads(3, 2 * CHUNK_BYTES, CHUNK_BYTES));
    v.open().write(4, 3 * CHUNK_BYTES, 512).expect("room");
}

// drivers/md/dm.c, dm_deferred_remove: a device that is flagged while somebody has it open goes with the last of them.
#[test]
fn a_layer_that_is_flagged_for_removal_goes_with_its_last_user() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let mut layers = Vec::new();
    let (mut origin, mut below) = (image, cow);
    for _ in 0..3 {
        let (b, fresh) = stack.prepare(&v, &origin, &below);
        v.suspend();
        b.resume();
        v.resume();
        run!("dmsetup", "remove", "--deferred", &b.name);
        (origin, below) = (b.number.clone(), fresh);
        layers.push(b);
    }
    let top = layers.last().expect("three");
    let fork = stack.fork(top);
    fork.open()
        .write(2, 0, CHUNK_BYTES)
        .expect("a flagged layer takes forks");
    v.remove();
    for b in &layers {
        assert_eq!(b.attributes(), "L--w", "it has a user");
        let state = run!("dmsetup", "info", &b.name);
        assert!(state.contains("DEFERRED REMOVE"), "{state}");
    }
    fork.remove();
    let gone = || layers.iter().all(|b| !dm_exists(&b.name));
    assert!(eventually(Duration::from_secs(60), gone), "the whole stack");
}

// Nobody has V open when it is suspended: who opens it later reads nothing before it is resumed, and nothing of before.
#[test]
fn a_snapshot_goes_back_to_its_layer_over_a_fresh_store() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let before = v.content();
    let (b, _) = stack.prepare(&v, &image, &cow);
    v.suspend();
    b.resume();
    v.resume();
    v.open().write(2, 0, 2 * CHUNK_BYTES).expect("room");
    assert!(v.content() != before);

    let (_, fresh) = stack.cow();
    v.load(&stack.table(&b.number, &fresh));
    v.suspend();
    let reader = {
        let v = v.clone();
        std::thread::spawn(move || v.content())
    };
    assert_eq!(v.attributes(), "LIsw");
    v.resume();
    assert!(reader.join().expect("no panic") == before);
    assert!(v.content() == before && b.content() == before);
}

// drivers/md/dm-snap.c, snapshot_ctr: a target's I/O is cut at its own chunks (dm_set_target_max_io_len).
#[test]
fn a_layer_and_what_stands_on_it_may_have_chunks_of_different_sizes() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, mut cow) = stack.cow();
    let mut origin = stack.image.clone();
    let mut chunk = 8;
    let v = stack.snapshot(&origin, &cow);
    let mut expected = fs::read(scene.image()).expect("readable");
    for (nth, next) in [(1, 128), (2, 8), (3, 1)] {
        let at = u64::from(nth) * 3 * CHUNK_BYTES;
        v.open().write(nth, at, 2 * CHUNK_BYTES).expect("room");
        let from = usize::try_from(at).expect("small");
        expected[from..from + 8192].fill(nth);
        let (_, fresh) = stack.cow();
        let b = stack.device();
        let line = |origin: &str, cow: &str, chunk: u32| {
            format!("0 {} snapshot {origin} {cow} P {chunk}", stack.sectors)
        };
        b.load(&line(&origin, &cow, chunk));
        v.load(&line(&b.number, &fresh, next));
        v.suspend();
        b.resume();
        v.resume();
        let same = |device: &Device| fs::read(device.node()).expect("readable") == expected;
        assert!(same(&b) && same(&v), "chunks of {chunk} below {next}");
        (origin, cow, chunk) = (b.number, fresh, next);
    }
}

// drivers/md/dm-table.c, dm_get_device: a path is looked up in /dev. The kernel makes no /dev/mapper/NAME, and dmsetup and
// udev make it when the device is resumed, which comes later.
#[test]
fn the_layer_is_named_by_its_number_as_it_has_no_path_yet() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    let (_, fresh) = stack.cow();
    let b = stack.device();
    b.load(&stack.table(&image, &cow));
    let by_path = stack.table(b.node().to_str().expect("ASCII"), &fresh);
    let why = load_refusal(&v, &by_path);
    // The second one until Linux 6.4.
    let known = ["No such file or directory", "No such device"];
    assert!(known.contains(&why.as_str()), "{why}");
    v.load(&stack.table(&b.number, &fresh));
    v.suspend();
    b.resume();
    v.resume();
    assert_eq!(v.attributes(), "L--w");
}
