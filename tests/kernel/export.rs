//! What a kernel writes into a COW file, read without it: diffs, cuts and exports.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dmsnap::error::{ExportObstacle, Refusal};
use dmsnap::export::ExportOptions;
use dmsnap::find::State;
use dmsnap::store::ExceptionStore;
use dmsnap::{ChunkSize, CowSize, Error, SnapshotOptions, Store};

use crate::common::scene::{Content, content, patterned};
use crate::common::tools::success;
use crate::common::{Mounted, Scene, dmsnap, run};
use crate::proof::{short_or_long, timed};

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn writable(device: &Path) -> File {
    let opened = File::options().read(true).write(true).open(device);
    opened.expect("the device opens")
}

/// Writes to each of these chunks, wherever in it.
fn scribble(device: &Path, image: u64, chunk: u64, chunks: &[u64], numbers: &mut Numbers) {
    let device = writable(device);
    for (number, fill) in chunks.iter().zip((1..=255u8).cycle()) {
        let room = chunk.min(image - number * chunk) / 512;
        let from = numbers.below(room);
        let sectors = 1 + numbers.below((room - from).min(16));
        let length = usize::try_from(sectors * 512).expect("small");
        let wrote = device.write_all_at(&vec![fill; length], number * chunk + from * 512);
        wrote.expect("room in the COW file");
    }
    device.sync_all().expect("the COW file takes it");
}

/// The numbers below `count`, in no order.
fn shuffled(count: u64, numbers: &mut Numbers) -> Vec<u64> {
    let mut all: Vec<u64> = (0..count).collect();
    for nth in (1..all.len()).rev() {
        let other = numbers.below(nth as u64 + 1);
        all.swap(nth, usize::try_from(other).expect("small"));
    }
    all
}

fn changed(cow: &Path, chunk: u64) -> (BTreeSet<u64>, u64) {
    let mut store = ExceptionStore::open(File::open(cow).expect("a COW file")).expect("a store");
    let extents = store.changed_extents().expect("a sound store");
    let used = store.used_bytes().expect("a sound store");
    let chunks = extents.iter().flat_map(|extent| {
        extent.origin_offset / chunk..(extent.origin_offset + extent.length).div_ceil(chunk)
    });
    (chunks.collect(), used)
}

fn exported(scene: &Scene, cow: &Path, options: &ExportOptions) -> Content {
    let out = scene.path("out.img");
    options.export(scene.image(), cow, &out).expect("an export");
    let found = content(&out);
    fs::remove_file(out).expect("it is there");
    found
}

#[test]
fn exports_diffs_and_cuts_are_what_the_device_was() {
    // Sectors of a chunk, MiB of the image, new chunks a round: more than an area, where chunks are small enough for
    // that.
    let short = [(8, 6, 250), (32, 17, 350), (128, 8, 30), (2048, 10, 3)];
    let long = [
        (8, 32, 2500),
        (32, 64, 1200),
        (128, 288, 1500),
        (2048, 64, 20),
    ];
    for (sectors, mib, count) in short_or_long(short, long) {
        // No multiple of the chunk size.
        let bytes = (mib << 20) + 5 * 512;
        let scene = Scene::over(|image| patterned(image, bytes));
        let stores = [Store::Persistent, Store::PersistentOverflow];
        // On disk they are the same until they overflow; the short form goes over the longest image once.
        let twice = short_or_long(sectors != 32, true);
        for store in stores.into_iter().take(1 + usize::from(twice)) {
            let (seen, took) = timed(|| round_trip(&scene, bytes, sectors, store, count));
            println!("export: {} {sectors}: {seen}, {took:?}", store.letters());
        }
    }
}

/// Three snapshots one after the other on one COW file, each written to in so many places.
fn round_trip(scene: &Scene, bytes: u64, sectors: u64, store: Store, count: usize) -> String {
    let mut options = SnapshotOptions::new();
    let chunk = ChunkSize::new(sectors).expect("a chunk size");
    options.store(store).chunk_size(chunk);
    let cow = scene.path(format!("{}-{sectors}.cow", store.letters()));
    let create = |options: &SnapshotOptions| {
        let created = options.create(scene.image(), &cow, &scene.name());
        created.expect("a snapshot")
    };
    let mut numbers = Numbers(sectors + 1);
    let order = shuffled(bytes.div_ceil(chunk.bytes()), &mut numbers);
    let mut last = None;
    for round in 0..3 {
        let snapshot = if round == 0 {
            create(options.clone().make_cow(CowSize::WorstCase))
        } else {
            create(&options)
        };
        let (before, new) = order[..(round + 1) * count].split_at(round * count);
        let again = before.iter().copied().step_by(8);
        let chunks: Vec<u64> = new.iter().copied().chain(again).collect();
        scribble(
            snapshot.device(),
            bytes,
            chunk.bytes(),
            &chunks,
            &mut numbers,
        );
        last = (round == 2).then(|| content(snapshot.device()));
        snapshot.cleanup().expect("nobody has it open");
    }
    let written: BTreeSet<u64> = order[..3 * count].iter().copied().collect();
    let disk = last.expect("three rounds");
    assert!(
        exported(scene, &cow, &ExportOptions::new()) == disk,
        "not the device's bytes"
    );
    let (chunks, used) = changed(&cow, chunk.bytes());
    assert_eq!(chunks, written, "the diff names what was written");

    File::options()
        .write(true)
        .open(&cow)
        .and_then(|file| file.set_len(used))
        .expect("cut");
    assert!(
        exported(scene, &cow, &ExportOptions::new()) == disk,
        "cut to what is used"
    );
    let snapshot = create(&options);
    assert!(content(snapshot.device()) == disk, "attached when cut");
    snapshot.cleanup().expect("nobody has it open");
    let areas = written.len() as u64 / (chunk.bytes() / 16) + 1;
    fs::remove_file(&cow).expect("it is there");
    format!(
        "{} exceptions, {areas} areas, {used} bytes used",
        written.len()
    )
}

#[test]
fn an_area_that_is_exactly_full_is_followed_by_one_that_must_travel() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let create = || SnapshotOptions::new().create(scene.image(), &cow, &scene.name());
    let snapshot = create().expect("a snapshot");
    let device = writable(snapshot.device());
    device.write_all_at(&vec![7; 256 * 4096], 0).expect("room");
    device.sync_all().expect("the COW file takes it");
    drop(device);
    let disk = content(snapshot.device());
    snapshot.cleanup().expect("nobody has it open");
    let (chunks, used) = changed(&cow, 4096);
    assert_eq!((chunks.len(), used), (256, 259 * 4096));

    let cut = |bytes: u64| {
        let file = File::options().write(true).open(&cow);
        file.and_then(|file| file.set_len(bytes)).expect("cut");
    };
    cut(used);
    let snapshot = create().expect("cut to what is used");
    assert!(content(snapshot.device()) == disk);
    snapshot.cleanup().expect("nobody has it open");
    cut(used - 4096);
    let error = create().expect_err("the kernel reads the area behind the full one");
    println!("message: attach a COW file cut too short: {error}");
    let refused = ExportOptions::new().export(scene.image(), &cow, scene.path("out"));
    let refused = refused.expect_err("and so does an export");
    println!("message: export a COW file cut too short: {refused}");
    assert!(
        matches!(refused, Error::Refused(Refusal::CowUnsound { .. })),
        "{refused:?}"
    );
}

#[test]
fn an_invalid_store_still_has_what_was_written_before() {
    let scene = Scene::new();
    let cow = scene.sparse("cow", 256 << 10);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    let device = writable(snapshot.device());
    device.write_all_at(&[0x11; 16384], 8192).expect("room");
    device.sync_all().expect("the COW file takes it");
    let wrote = device.write_all_at(&vec![0x5a; 512 << 10], 1 << 20);
    wrote
        .and_then(|()| device.sync_all())
        .expect_err("it does not fit");
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
    let (options, out) = (ExportOptions::new(), scene.path("out"));
    let refused = options.export(scene.image(), &cow, &out);
    assert_eq!(
        refused,
        Err(Error::Refused(Refusal::CowInvalid { path: cow.clone() }))
    );
    let done = options
        .clone()
        .invalid_store(true)
        .export(scene.image(), &cow, &out);
    println!(
        "export of an invalid store: {:?}",
        done.expect("what there is")
    );
    let mut expected = fs::read(scene.image()).expect("the image");
    let found = fs::read(&out).expect("the export");
    assert!(
        found[8192..8192 + 16384] == [0x11; 16384],
        "what was synced is there"
    );
    expected[8192..8192 + 16384].fill(0x11);
    let later = 1 << 20..(1 << 20) + (512 << 10);
    assert!(found[..later.start] == expected[..later.start]);
    assert!(found[later.end..] == expected[later.end..]);
}

#[test]
fn a_cow_file_that_is_in_use_is_not_exported_by_its_path() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    let refused = ExportOptions::new().export(scene.image(), &cow, scene.path("out"));
    let name = name_of(&snapshot);
    assert_eq!(
        refused,
        Err(Error::Refused(Refusal::CowOfSnapshot { path: cow, name }))
    );
    snapshot.cleanup().expect("nobody has it open");
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A snapshot's name as a string.
fn name_of(snapshot: &dmsnap::Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

#[test]
fn a_live_export_has_what_was_written_before_it_cached_or_not() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let device = writable(snapshot.device());
    for chunk in [3u64, 90, 91, 500] {
        // Not synced: it is in the page cache of this host alone.
        device
            .write_all_at(&[0x77; 4096], chunk * 4096)
            .expect("room");
    }
    let out = scene.path("out");
    let done = ExportOptions::new()
        .export_live(&name, &out)
        .expect("an export");
    assert_eq!(done.changed_bytes, 4 * 4096);
    assert!(content(&out) == content(snapshot.device()));
    let info = dmsnap::status(&name).expect("it is there");
    assert_eq!(info.state, State::Live);
    device.write_all_at(&[0x78; 4096], 0).expect("it goes on");
    device.sync_all().expect("it goes on");
    drop(device);
    fs::remove_file(&out).expect("it is there");
    let json = success(dmsnap().args(["export", "--json", &name]).arg(&out));
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["changed_bytes"], 5 * 4096);
    assert!(content(&out) == content(snapshot.device()));
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_live_export_beside_a_writer_has_all_that_stands_still() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    let device = writable(snapshot.device());
    let still: usize = 2 << 20;
    device
        .write_all_at(&vec![0x77; still / 2], 0)
        .expect("room");
    let stop = AtomicBool::new(false);
    let out = scene.path("out");
    thread::scope(|scope| {
        // Chunks that were never written to before, and some again and again.
        let writer = scope.spawn(|| {
            let mut numbers = Numbers(7);
            let mut rounds = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let at = still as u64 + numbers.below(512) * 4096;
                device.write_all_at(&[0xee; 4096], at).expect("it goes on");
                if rounds % 8 == 0 {
                    device.sync_data().expect("it goes on");
                }
                rounds += 1;
            }
            rounds
        });
        for _ in 0..short_or_long(3, 30) {
            let done = ExportOptions::new().replace(true).export_live(&name, &out);
            println!("export beside a writer: {:?}", done.expect("an export"));
            let found = fs::read(&out).expect("the export");
            let image = fs::read(scene.image()).expect("the image");
            assert!(found[..still / 2].iter().all(|byte| *byte == 0x77));
            assert!(found[still / 2..still] == image[still / 2..still]);
            for at in (still..found.len()).step_by(4096) {
                let block = &found[at..at + 4096];
                // Full blocks, written in one go each: old or new, sector by sector at the least.
                let sound = block.chunks(512).zip(image[at..at + 4096].chunks(512));
                let sound = sound.map(|(found, old)| found == old || found == [0xee; 512]);
                assert!(sound.into_iter().all(|sound| sound), "at {at}");
            }
        }
        stop.store(true, Ordering::Relaxed);
        let rounds = writer.join().expect("no write fails");
        println!("export beside a writer: it wrote {rounds} times");
    });
    drop(device);
    assert_eq!(
        dmsnap::status(&name).expect("it is there").state,
        State::Live
    );
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_live_export_freezes_a_file_system_that_is_mounted_here() {
    let scene = Scene::ext4();
    let cow = scene.sparse("cow", 32 << 20);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    let mounted = Mounted::mount([utf8(snapshot.device())], &scene.path("mnt"));
    fs::write(mounted.at().join("note"), "not synced by anybody").expect("room");
    let out = scene.path("out");
    let done = ExportOptions::new().export_live(name_of(&snapshot), &out);
    done.expect("an export");
    fs::write(mounted.at().join("later"), "thawed").expect("it is thawed");
    drop(mounted);
    snapshot.cleanup().expect("nobody has it open");
    let mounted = Mounted::mount(["-o", "loop", utf8(&out)], &scene.path("mnt"));
    let note = fs::read(mounted.at().join("note")).expect("it was written back");
    assert_eq!(note, b"not synced by anybody");
}

#[test]
fn what_cannot_be_exported_live_is_refused_and_stays_as_it_is() {
    let scene = Scene::new();
    let live = |name: &str, out: &PathBuf| ExportOptions::new().export_live(name, out);
    let refusal = |name: &str, why: ExportObstacle| {
        let name = name.to_owned();
        Err(Error::Refused(Refusal::NotExportable { name, why }))
    };
    let out = scene.path("out");
    let snapshot = scene.snapshot();
    let name = name_of(&snapshot);
    run!("dmsetup", "suspend", "--nolockfs", &name);
    assert_eq!(live(&name, &out), refusal(&name, ExportObstacle::Suspended));
    let state = dmsnap::status(&name).expect("it is there").state;
    assert_eq!(state, State::Suspended, "and still is");
    run!("dmsetup", "resume", "--noudevsync", &name);
    live(&name, &out).expect("resumed");
    snapshot.cleanup().expect("nobody has it open");

    let mut options = SnapshotOptions::new();
    options.store(Store::Transient);
    let snapshot = scene.snapshot_with(&options);
    let name = name_of(&snapshot);
    assert_eq!(live(&name, &out), refusal(&name, ExportObstacle::Transient));
    snapshot.cleanup().expect("nobody has it open");

    let (name, cow) = (scene.name(), scene.cow("moved"));
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &name)
        .expect("a snapshot");
    let other = scene.cow("other");
    let bound = Mounted::bind(&other, &cow);
    let found = live(&name, &out);
    let refusal = Refusal::FileElsewhere {
        name: name.clone(),
        path: cow.clone(),
    };
    assert_eq!(found, Err(Error::Refused(refusal)), "mounted over");
    drop(bound);
    // The kernel follows a file that is moved.
    let away = scene.path("away");
    fs::rename(&cow, &away).expect("it is there");
    live(&name, &scene.path("moved.out")).expect("by its name of now");
    fs::remove_file(&away).expect("it is there");
    let error = live(&name, &scene.path("gone.out")).expect_err("nobody can open it");
    println!("message: export of a snapshot whose COW file is unlinked: {error}");
    snapshot.cleanup().expect("nobody has it open");
}
