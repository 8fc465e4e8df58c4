//! What a disk outlives, and how many writes and flushes its COW file gets for that.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dmsnap::error::Refusal;
use dmsnap::pool::CowFate;
use dmsnap::snapshot::{CheckpointOptions, GrowOptions};
use dmsnap::{CowSize, Durability, Origin, PoolOptions, Snapshot, SnapshotOptions, Store};

use crate::checkpoint::{SOON, freeze, name_of};
use crate::common::filling::Direct;
use crate::common::reading::{dm_table, number};
use crate::common::scene::COW_BYTES;
use crate::common::{Scene, TempSetting, chain, eventually, run};
use crate::proof::worker::Process;

/// How many chunks are written, each with a flush behind it.
const WRITES: u64 = 64;

const CHUNK_BYTES: u64 = 4096;

const ALL: [Durability; 3] = [
    Durability::ThrowAway,
    Durability::Processes,
    Durability::PowerCuts,
];

fn queue_of(node: &Path) -> std::path::PathBuf {
    let number = number(&fs::canonicalize(node).expect("a node"));
    Path::new("/sys/dev/block").join(number)
}

fn setting(node: &Path) -> String {
    let path = queue_of(node).join("queue/write_cache");
    let setting = fs::read_to_string(path).expect("a setting");
    setting.trim().to_owned()
}

fn wanted(durability: Durability) -> &'static str {
    match durability {
        Durability::PowerCuts => "write back",
        _ => "write through",
    }
}

fn cow_loop(snapshot: &Snapshot) -> &Path {
    let cow = snapshot.handles().cow_loop.as_ref();
    &cow.expect("a COW loop").path
}

/// The writes and flushes that the block device has completed (Documentation/block/stat.rst).
fn completed(node: &Path) -> [u64; 2] {
    let text = fs::read_to_string(queue_of(node).join("stat")).expect("statistics");
    let fields: Vec<u64> = text
        .split_whitespace()
        .map(|field| field.parse().expect("a number"))
        .collect();
    [fields[4], fields[15]]
}

/// Writes to chunks that are new to the store, and flushes after each.
fn write(device: &Path) {
    let (writer, node) = (Direct::open(device), File::open(device).expect("a device"));
    for nth in 0..WRITES {
        let byte = u8::try_from(nth + 1).expect("few");
        let at = nth * CHUNK_BYTES;
        writer.write(byte, at, CHUNK_BYTES).expect("room");
        node.sync_data().expect("it takes a flush");
    }
}

fn has_what_was_written(device: &Path) -> bool {
    let reader = Direct::open(device);
    (0..WRITES).all(|nth| {
        let byte = u8::try_from(nth + 1).expect("few");
        reader.reads(byte, nth * CHUNK_BYTES, CHUNK_BYTES)
    })
}

#[test]
fn each_durability_writes_and_flushes_the_cow_file_as_little_as_it_says() {
    let scene = Scene::new();
    let counts = ALL.map(|durability| {
        let mut options = SnapshotOptions::new();
        options.durability(durability);
        let snapshot = scene.snapshot_with(&options);
        assert_eq!(setting(snapshot.device()), wanted(durability));
        let before = completed(cow_loop(&snapshot));
        write(snapshot.device());
        let after = completed(cow_loop(&snapshot));
        // What would take the flushes from the next file on that loop device.
        assert_eq!(setting(cow_loop(&snapshot)), "write back", "{durability}");
        snapshot.cleanup().expect("nobody has it open");
        let count = [after[0] - before[0], after[1] - before[1]];
        println!("{durability}: {count:?} writes and flushes for {WRITES} first writes");
        count
    });
    let [throw_away, processes, power_cuts] = counts;
    assert_eq!(throw_away[1], 0);
    assert!(throw_away[0] * 10 <= WRITES * 12, "{throw_away:?}");
    assert_eq!(processes, [2 * WRITES, 2 * WRITES], "the store's commits");
    assert_eq!(power_cuts, [3 * WRITES, 3 * WRITES], "the guest's besides");
}

/// What makes this binary a maker: a durability by its place in [`ALL`], the image, the COW file and the name.
const JOB: &str = "DMSNAP_TEST_DURABILITY";

/// Makes a disk, writes to it, says so, and waits for the end with the disk open.
fn make(job: &str) {
    let words: Vec<&str> = job.split('\n').collect();
    let [nth, image, cow, name] = words[..] else {
        panic!("no job: {job:?}");
    };
    let mut options = SnapshotOptions::new();
    options.durability(ALL[nth.parse::<usize>().expect("a number")]);
    let snapshot = options
        .create(image, cow, name)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let _open = File::open(snapshot.device()).expect("a device");
    write(snapshot.device());
    fs::write(format!("{cow}.written"), "").expect("room");
    loop {
        std::thread::park();
    }
}

/// The maker, which is the writer too, is killed with the disk open. Another program removes the device, after which
/// nothing is promised of a throw-away disk.
#[test]
fn what_each_durability_promises_is_there_after_its_maker_was_killed() {
    if let Ok(job) = env::var(JOB) {
        return make(&job);
    }
    let scene = Scene::new();
    for (nth, durability) in ALL.into_iter().enumerate() {
        let (name, cow) = (scene.name(), scene.sparse(format!("{nth}.cow"), COW_BYTES));
        let image = scene.image();
        let job = format!("{nth}\n{}\n{}\n{name}", image.display(), cow.display());
        let words = [
            "--exact",
            "durability::what_each_durability_promises_is_there_after_its_maker_was_killed",
            "--nocapture",
        ];
        let this = env::current_exe().expect("this binary");
        let mut maker = Process::start(Command::new(this).args(words).env(JOB, job));
        let said = scene.path(format!("{nth}.cow.written"));
        let there = eventually(SOON, || said.exists() || !maker.is_running());
        assert!(there && maker.is_running(), "{durability}: it has written");
        maker.kill();

        let device = Path::new("/dev/mapper").join(&name);
        assert_eq!(setting(&device), wanted(durability), "{durability}");
        assert!(has_what_was_written(&device), "{durability}");
        run!("dmsetup", "remove", "--retry", &name);
        // What dmsetup does not know of.
        let _ = fs::remove_file(&device);
        if durability == Durability::ThrowAway {
            continue;
        }
        let mut options = SnapshotOptions::new();
        let again = options.durability(durability).create(image, &cow, &name);
        let again = again.expect("the store is sound");
        assert!(has_what_was_written(again.device()), "{durability}");
        again.cleanup().expect("nobody has it open");
    }
}

/// A table that is swapped in resets the setting.
#[test]
fn a_recycled_device_of_a_pool_ends_flushes_and_its_cow_file_is_only_deleted() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an origin");
    let pool = PoolOptions::new().size(1).open(&origin, scene.dir());
    let pool = pool.expect("a pool");
    for _ in 0..3 {
        let claimed = pool.claim(&scene.name()).expect("a disk");
        let (device, cow) = (claimed.snapshot.device(), cow_loop(&claimed.snapshot));
        assert_eq!(setting(device), "write through", "recycled: {claimed:?}");
        assert!(dm_table(&name_of(&claimed.snapshot)).ends_with(" N 8"));
        let before = completed(cow)[1];
        write(device);
        assert_eq!(completed(cow)[1], before);
        assert_eq!(setting(cow), "write back");
        let handles = claimed.snapshot.handles();
        let name = name_of(&claimed.snapshot);
        for fate in [CowFate::Keep, CowFate::HandBack] {
            let kept = pool.release(handles, fate).map(drop);
            let name = name.clone();
            assert_eq!(kept, Err(Refusal::NothingToKeep { name }.into()));
        }
        assert!(has_what_was_written(device), "it is as it was");
        let released = pool.release(handles, CowFate::Delete);
        released.expect("nobody has it open");
        assert!(pool.wait_recycled(Duration::from_secs(60)));
    }
    pool.drain().expect("all released");

    let mut options = PoolOptions::new();
    options.size(1).durability(Durability::PowerCuts);
    let pool = options.open(&origin, scene.dir()).expect("a pool");
    let claimed = pool.claim(&scene.name()).expect("a disk");
    assert_eq!(setting(claimed.snapshot.device()), "write back");
    assert!(dm_table(&name_of(&claimed.snapshot)).ends_with(" P 8"));
    let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
    released.expect("nobody has it open");
    pool.drain().expect("all released");
}

#[test]
fn a_disk_keeps_its_durability_through_a_checkpoint_a_rollback_and_a_recovery() {
    let scene = Scene::new();
    for durability in [Durability::Processes, Durability::PowerCuts] {
        let mut options = SnapshotOptions::new();
        let snapshot = scene.snapshot_with(options.durability(durability));
        let (_, layer) = freeze(&scene, &snapshot);
        assert_eq!(setting(snapshot.device()), wanted(durability));
        let cow = scene.path(format!("{}.back", name_of(&snapshot)));
        let back = CheckpointOptions::new()
            .make_cow(CowSize::WorstCase)
            .rollback(&snapshot, cow);
        let back = back.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(setting(snapshot.device()), wanted(durability));
        dmsnap::cleanup(&back).expect("nobody has it open");
        drop(layer);

        let (name, small) = (scene.name(), scene.sparse(scene.name(), 64 << 10));
        let made = options
            .store(Store::PersistentOverflow)
            .create(scene.image(), small, &name);
        let device = made.expect("a snapshot").device().to_owned();
        let full = (0..WRITES).any(|nth| {
            let written = Direct::open(&device).write(1, nth * CHUNK_BYTES, CHUNK_BYTES);
            written.is_err()
        });
        assert!(full, "it overflows");
        let again = GrowOptions::new().recover(name.as_str(), COW_BYTES);
        let again = again.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(setting(again.device()), wanted(durability));
        again.cleanup().expect("nobody has it open");
    }
}

/// 6.1 shows the COW device's setting at the dm device. Taken for the disk's own, it would end flushes that the next COW
/// device takes, of a disk that is to survive power cuts.
#[test]
fn a_setting_of_another_programs_on_the_cow_device_is_not_taken_for_the_disks() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let file = queue_of(cow_loop(&snapshot)).join("queue/write_cache");
    let theirs = TempSetting::set(file, "write through");
    let (_, layer) = freeze(&scene, &snapshot);
    assert_eq!(setting(snapshot.device()), "write back");
    drop(theirs);
    snapshot.cleanup().expect("nobody has it open");
    drop(layer);
}
