//! Many live snapshots over one origin: they all work, the next one asks no more of the kernel, and what they take is known.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use dmsnap::{ChunkSize, CowSize, Handles, Snapshot, SnapshotOptions, Store, cleanup};

use super::worker::use_disk;
use super::{repeated, timed, trace};
use crate::common::{PREFIX, Scene, chain, settle};

/// Of /proc/meminfo, in KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    pub(super) available: i64,
    pub(super) slab: i64,
    stacks: i64,
}

impl Memory {
    /// Without what the kernel would give back if asked.
    pub(super) fn now() -> Self {
        fs::write("/proc/sys/vm/drop_caches", "3").expect("root may");
        let text = fs::read_to_string("/proc/meminfo").expect("/proc is mounted");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let words = line.and_then(|rest| rest.split_whitespace().nth(1));
            words.and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        Self {
            available: field("MemAvailable"),
            slab: field("Slab"),
            stacks: field("KernelStack"),
        }
    }
}

struct Fleet<'a> {
    scene: &'a Scene,
    options: SnapshotOptions,
    cow_bytes: u64,
    /// Has `create` make the COW files.
    makes: bool,
}

impl Fleet<'_> {
    fn create(&self) -> Snapshot {
        let name = self.scene.name();
        let cow = format!("{name}.cow");
        let cow = match self.makes {
            true => self.scene.path(cow),
            false => self.scene.sparse(cow, self.cow_bytes),
        };
        let made = self.options.create(self.scene.image(), cow, &name);
        made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)))
    }

    fn grow(&self, fleet: &mut Vec<Handles>, count: usize) {
        fleet.extend((fleet.len()..count).map(|_| self.create().into_handles()));
    }

    /// The system calls of a create and of a cleanup now, the fewest of a few tries: what has to wait makes more. The
    /// first ones are not counted: they may have the kernel make new loop devices, which then stay.
    fn calls(&self) -> [usize; 2] {
        let tries: Vec<_> = (0..4).map(|_| self.calls_once()).collect();
        [0, 1].map(|which| {
            let counts = tries.iter().skip(1).map(|each| each[which]);
            counts.min().expect("some tries")
        })
    }

    fn calls_once(&self) -> [usize; 2] {
        let name = self.scene.name();
        let cow = self.scene.sparse(format!("{name}.cow"), self.cow_bytes);
        let (log, file) = (
            self.scene.path("strace.log"),
            self.scene.path("handles.json"),
        );
        let [image, cow] = [self.scene.image(), &cow].map(|path| path.to_str().expect("ASCII"));
        let create = trace::calls(&log, &["create", image, cow, &name]);
        let handles = dmsnap::adopt(&name).unwrap_or_else(|error| panic!("{}", chain(&error)));
        fs::write(&file, serde_json::to_string(&handles).expect("plain data")).expect("room");
        let file = file.to_str().expect("ASCII");
        let cleanup = trace::calls(&log, &["cleanup", file]);
        [create.len(), cleanup.len()]
    }
}

/// Eight threads clean up together.
pub(super) fn clean_all(fleet: Vec<Handles>) {
    let fleet = Mutex::new(fleet);
    let next = || fleet.lock().expect("no thread panics with it").pop();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(handles) = next() {
                    cleanup(&handles).unwrap_or_else(|error| panic!("{}", chain(&error)));
                }
            });
        }
    });
}

#[test]
fn a_fleet_over_one_image() {
    let scene = Scene::new();
    let count = repeated(40, 1000);
    let ships = Fleet {
        scene: &scene,
        options: SnapshotOptions::new(),
        cow_bytes: 8 << 20,
        makes: false,
    };
    let mut fleet = Vec::new();
    ships.grow(&mut fleet, 10);
    let few = ships.calls();
    let before = Memory::now();
    let ((), growing) = timed(|| ships.grow(&mut fleet, count));
    let after = Memory::now();
    let more = i64::try_from(count - 10).expect("few");
    println!(
        "{count} snapshots over one image: made in {growing:.1?}; KiB for each: {} of memory, of these {} of slab and \
         {} of kernel stacks",
        (before.available - after.available) / more,
        (after.slab - before.slab) / more,
        (after.stacks - before.stacks) / more,
    );

    for (nth, handles) in (0u64..).zip(&fleet) {
        let device = handles.device.as_deref().expect("a device");
        use_disk(device, nth).unwrap_or_else(|error| panic!("snapshot {nth}: {error}"));
    }
    let (listed, listing) = timed(dmsnap::list);
    let listed = listed
        .expect("a list")
        .into_iter()
        .map(|each| each.expect("readable").name);
    let mut listed: Vec<_> = listed.filter(|name| name.starts_with(PREFIX)).collect();
    let names = fleet
        .iter()
        .map(|each| each.name.clone().expect("a name").to_string());
    let mut names: Vec<_> = names.collect();
    listed.sort();
    names.sort();
    assert_eq!(listed, names, "list shows all");
    println!("listed in {listing:.1?}");

    let many = ships.calls();
    println!("system calls of a create and a cleanup: {few:?} at 10 alive, {many:?} at {count}");
    for which in [0, 1] {
        assert!(many[which] <= few[which], "{few:?} and {many:?} calls");
    }

    let ((), clearing) = timed(|| clean_all(fleet));
    println!("all cleaned up by 8 threads in {clearing:.1?}");
    settle();
}

#[test]
fn memory_by_store_chunk_size_and_cow_size() {
    let scene = Scene::new();
    let count = repeated(4, 40);
    let mut warm = false;
    println!("KiB of kernel memory for each of {count} snapshots:");
    let mut of_made = Vec::new();
    for (store, sectors, mebibytes, makes) in [
        (Store::Persistent, 8, 8, false),
        (Store::Persistent, 8, 64, false),
        (Store::Persistent, 8, 1032, false),
        (Store::Persistent, 8, 1032, true),
        (Store::Persistent, 128, 64, false),
        (Store::Persistent, 128, 1032, false),
        (Store::Transient, 8, 64, false),
        (Store::Transient, 8, 1032, false),
        (Store::Transient, 8, 1032, true),
    ] {
        let mut options = SnapshotOptions::new();
        let chunk = ChunkSize::new(sectors).expect("a power of two");
        options.store(store).chunk_size(chunk);
        if makes {
            options.make_cow(CowSize::Bytes(mebibytes << 20));
        }
        let ships = Fleet {
            scene: &scene,
            options,
            cow_bytes: mebibytes << 20,
            makes,
        };
        let mut fleet = Vec::new();
        // The first ones may have the kernel make new loop devices, which are nobody's cost.
        ships.grow(&mut fleet, if warm { 1 } else { count });
        clean_all(std::mem::take(&mut fleet));
        warm = true;
        settle();
        let before = Memory::now();
        ships.grow(&mut fleet, count);
        let after = Memory::now();
        clean_all(fleet);
        let each = (before.available - after.available) / i64::try_from(count).expect("few");
        let how = if makes { "made" } else { "found" };
        println!("  {store:?}, chunks of {sectors} sectors, COW of {mebibytes} MiB, {how}: {each}");
        if (sectors, mebibytes) == (8, 1032) {
            of_made.push((each, makes));
        }
        // The hash tables are bounded at 2.25 MiB or twice that, kcopyd reserves 512 KiB; the rest is small.
        assert!(each < 8 << 10, "{each} KiB for one snapshot");
    }
    settle();
    // Of a few, what else the kernel keeps meanwhile is as much as their tables.
    for pair in of_made.chunks(2).filter(|_| count > 4) {
        let [(found, false), (made, true)] = pair else {
            panic!("{of_made:?} are no pairs");
        };
        // Of the 2 MiB for 1032 MiB of changes; 64 MiB take 128 KiB.
        assert!(made + 1024 < *found, "{pair:?}: the table is for all of it");
    }
}

/// Reads and writes of what has changed, where six times as much did as the kernel's table was made for, beside a table
/// for all of it. In its short form only that both disks have what was written.
#[test]
fn more_changes_than_were_expected_are_all_there_and_as_fast() {
    let scene = Scene::new();
    let chunks = repeated(2_000, 100_000);
    let image = scene.sparse("image", 1 << 30);
    let expected = u64::try_from(chunks).expect("few") * 4096 / 6;
    let disks = [CowSize::Bytes(expected), CowSize::WorstCase].map(|expected| {
        let name = scene.name();
        let mut options = SnapshotOptions::new();
        options
            .make_cow(CowSize::WorstCase)
            .expected_changes(expected);
        let made = options.create(&image, scene.path(format!("{name}.cow")), &name);
        made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)))
    });
    let files = disks.each_ref().map(|disk| {
        let mut options = fs::File::options();
        let file = options.read(true).write(true).open(disk.device());
        file.expect("the disk")
    });
    // Each a chunk by itself: what is consecutive shares an entry of the table.
    let mut places: Vec<u64> = (0..chunks as u64).map(|nth| nth * 2).collect();
    let mut seed = 1_u64;
    for nth in (1..places.len()).rev() {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        places.swap(nth, (seed >> 33) as usize % (nth + 1));
    }
    let at = |place: u64| place * 4096;
    let rounds = places.len() / 10;
    let mut times = [[0.0_f64; 3]; 2];
    // Now the one first and now the other.
    let turns = |nth: usize| [nth % 2, 1 - nth % 2].map(|disk| (disk, &files[disk]));
    for (nth, places) in places.chunks(rounds).enumerate() {
        for (disk, file) in turns(nth) {
            let writes = || {
                for place in places {
                    let content = place.to_ne_bytes().repeat(512);
                    file.write_all_at(&content, at(*place)).expect("no error");
                }
                file.sync_data().expect("no error");
            };
            times[disk][0] += timed(writes).1.as_secs_f64();
            times[disk][1] += timed(writes).1.as_secs_f64();
        }
    }
    for (nth, places) in places.chunks(rounds).enumerate() {
        for (disk, file) in turns(nth) {
            fs::write("/proc/sys/vm/drop_caches", "1").expect("root may");
            let reads = || {
                let mut content = vec![0; 4096];
                for place in places.iter().step_by(10) {
                    file.read_exact_at(&mut content, at(*place))
                        .expect("no error");
                    assert_eq!(content, place.to_ne_bytes().repeat(512));
                }
            };
            times[disk][2] += timed(reads).1.as_secs_f64();
        }
    }
    let [few, all] = times;
    for (nth, what) in ["first writes", "second writes", "reads"]
        .iter()
        .enumerate()
    {
        let (few, all) = (few[nth], all[nth]);
        println!(
            "{chunks} chunks, {what}: {few:.2} s, {all:.2} s: {:.2} times",
            few / all
        );
    }
    drop(files);
    for disk in disks {
        let cleaned = disk.cleanup();
        assert!(cleaned.is_ok(), "{cleaned:?}");
    }
    settle();
}
