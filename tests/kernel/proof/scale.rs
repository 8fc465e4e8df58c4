//! Many live snapshots over one origin: they all work, the next one asks no more of the kernel, and what they take is known.

use std::fs;
use std::sync::Mutex;

use dmsnap::{ChunkSize, Handles, Snapshot, SnapshotOptions, Store, cleanup};

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
}

impl Fleet<'_> {
    fn create(&self) -> Snapshot {
        let name = self.scene.name();
        let cow = self.scene.sparse(format!("{name}.cow"), self.cow_bytes);
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
    for (store, sectors, mebibytes) in [
        (Store::Persistent, 8, 8),
        (Store::Persistent, 8, 64),
        (Store::Persistent, 8, 1024),
        (Store::Persistent, 128, 64),
        (Store::Persistent, 128, 1024),
        (Store::Transient, 8, 64),
        (Store::Transient, 8, 1024),
    ] {
        let mut options = SnapshotOptions::new();
        let chunk = ChunkSize::new(sectors).expect("a power of two");
        options.store(store).chunk_size(chunk);
        let ships = Fleet {
            scene: &scene,
            options,
            cow_bytes: mebibytes << 20,
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
        println!("  {store:?}, chunks of {sectors} sectors, COW of {mebibytes} MiB: {each}");
        // The hash tables are bounded at 2.25 MiB or twice that, kcopyd reserves 512 KiB; the rest is small.
        assert!(each < 8 << 10, "{each} KiB for one snapshot");
    }
    settle();
}
