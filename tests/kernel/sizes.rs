//! How long a COW file has to be, to the chunk.

use std::fs::{self, File};
use std::path::Path;

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::Refusal;
use dmsnap::{ChunkSize, CowSize, Error, Snapshot, SnapshotOptions, Store, Warning};

use crate::common::filling::{Direct, data_chunks, status_of, usage_of};
use crate::common::reading::number;
use crate::common::{Foreign, Losetup, Scene, run};
use crate::proof::short_or_long;

/// Chunk sizes in sectors, and for each how many chunks a metadata area and its data take.
const AREAS: [(u64, u64); 3] = [(1, 33), (8, 257), (32, 1025)];

fn chunk(sectors: u64) -> ChunkSize {
    ChunkSize::new(sectors).expect("a chunk size")
}

fn options(sectors: u64) -> SnapshotOptions {
    let mut options = SnapshotOptions::new();
    options
        .store(Store::PersistentOverflow)
        .chunk_size(chunk(sectors));
    options
}

fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

/// Over a blank image that is longer than all COW files here.
fn scene() -> Scene {
    Scene::over(|image| {
        let file = File::create(image).expect("a new file");
        file.set_len(20 << 20).expect("room for a sparse file");
    })
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).expect("the file is there").len()
}

/// Overwrites a snapshot until its store is full, which all but the one write too many survive.
fn fill(snapshot: &Snapshot, chunk: ChunkSize) {
    let name = name_of(snapshot);
    let total = usage_of(&name).total.to_bytes().expect("small");
    let bytes = data_chunks(total, chunk) * chunk.bytes();
    let device = Direct::open(snapshot.device());
    let written = device.write(0x5a, 0, bytes);
    let status = status_of(&name);
    assert!(written.is_ok(), "{total} bytes: {written:?}, {status}");
    let SnapshotStatus::Usage(usage) = status else {
        panic!("{total} bytes: {status}");
    };
    assert!(usage.is_full(chunk), "{total} bytes: {usage:?}");
    device
        .write(0x5a, bytes, chunk.bytes())
        .expect_err("one more than fits");
    assert_eq!(status_of(&name), SnapshotStatus::Overflow, "{total} bytes");
    assert!(device.reads(0x5a, 0, bytes), "{total} bytes");
}

// drivers/md/dm-snap-persistent.c, persistent_commit_exception: the next metadata area is zeroed before the last
// exception of a full one is committed, and where that cannot be written the store is given up.
#[test]
fn at_one_size_per_area_a_po_store_is_invalid_before_it_is_full() {
    let scene = scene();
    for (sectors, area) in AREAS {
        let bytes = (area + 1) * sectors * 512;
        let cow = scene.sparse(format!("{sectors}.cow"), bytes);
        let loops = [scene.image(), &cow].map(Losetup::attach);
        let [origin, cow] = [&loops[0], &loops[1]].map(|each| number(&each.device));
        let name = scene.name();
        let table = format!("0 40960 snapshot {origin} {cow} PO {sectors}");
        let foreign = Foreign::create(&name, &table);
        run!("dmsetup", "mknodes", &name);
        let device = Direct::open(&Path::new("/dev/mapper").join(&name));
        let data = (area - 1) * sectors * 512;
        let _ = device.write(0x5a, 0, data);
        drop(device);
        let status = run!("dmsetup", "status", &name);
        assert!(status.ends_with("snapshot Invalid"), "{status}");
        drop((foreign, loops));
    }
}

#[test]
fn a_full_overwrite_fits_the_worst_case_and_not_a_chunk_less() {
    for (sectors, area) in AREAS {
        let chunk = chunk(sectors);
        let per_area = area - 1;
        let few = if sectors < 32 { 3 } else { 1 };
        for chunks in [per_area, per_area + 1, per_area - 1]
            .into_iter()
            .take(short_or_long(few, 3))
        {
            // The second time with an image that ends within a chunk.
            for short in [0, 512].into_iter().take(1 + usize::from(sectors == 8)) {
                let bytes = chunks * chunk.bytes() - short;
                full_overwrite(chunk, chunks, bytes);
            }
        }
    }
}

fn full_overwrite(chunk: ChunkSize, chunks: u64, bytes: u64) {
    let scene = Scene::over(|image| {
        let file = File::create(image).expect("a new file");
        file.set_len(bytes).expect("room for a sparse file");
    });
    let sectors = u64::from(chunk);
    let (name, cow) = (scene.name(), scene.path("made"));
    let mut options = options(sectors);
    options.make_cow(CowSize::WorstCase);
    let snapshot = options.create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    assert_eq!(snapshot.warnings(), []);
    let worst = length(&cow);
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, bytes).expect("all of it fits");
    assert!(device.reads(0x5a, 0, bytes));
    let usage = usage_of(&name);
    assert_eq!(
        (usage.total.to_bytes(), usage.percent()),
        (Some(worst), 100)
    );
    drop(device);
    snapshot.cleanup().expect("nobody has it open");

    let less = worst - chunk.bytes();
    let (name, cow) = (scene.name(), scene.sparse("less", less));
    let snapshot = self::options(sectors).create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let device = Direct::open(snapshot.device());
    let written = device.write(0x5a, 0, bytes);
    if chunks % (chunk.bytes() / 16) == 0 {
        // A chunk less is the size that no store is left at.
        let lengthened = Warning::CowLengthened {
            bytes: less,
            sound_bytes: worst,
        };
        assert_eq!(snapshot.warnings(), [lengthened]);
        assert_eq!(length(&cow), worst);
        written.expect("it is the worst case again");
    } else {
        written.expect_err("a chunk too many");
        assert_eq!(status_of(&name), SnapshotStatus::Overflow);
    }
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn no_size_that_create_accepts_is_invalid_before_it_is_full() {
    let scene = scene();
    for (sectors, area) in AREAS {
        let chunk = chunk(sectors);
        let few = if sectors < 32 { 6 } else { 2 };
        for chunks in [area + 1, area, 3, area - 1, area + 2, 2 * area + 1]
            .into_iter()
            .take(short_or_long(few, 5))
        {
            for partial in [0, chunk.bytes() - 1] {
                let name = scene.name();
                let cow = scene.sparse(&name, chunks * chunk.bytes() + partial);
                let snapshot = options(sectors).create(scene.image(), &cow, &name);
                let snapshot = snapshot.expect("a snapshot");
                fill(&snapshot, chunk);
                snapshot.cleanup().expect("nobody has it open");
                fs::remove_file(&cow).expect("it is there");
            }
        }
    }
}

#[test]
fn no_size_that_grow_accepts_is_invalid_before_it_is_full() {
    let scene = scene();
    for (sectors, area) in AREAS {
        let chunk = chunk(sectors);
        let few = if sectors < 32 { 4 } else { 1 };
        for chunks in [area + 1, area, area - 1, area + 2]
            .into_iter()
            .take(short_or_long(few, 4))
        {
            let snapshot = least(&scene, sectors);
            let asked = chunks * chunk.bytes() - 100;
            let grown = snapshot.grow(asked).expect("it grows");
            let SnapshotStatus::Usage(usage) = grown else {
                panic!("{grown}");
            };
            let total = usage.total.to_bytes().expect("small");
            assert!((asked..asked + 2 * chunk.bytes()).contains(&total));
            fill(&snapshot, chunk);
            snapshot.cleanup().expect("nobody has it open");
        }
    }
    // Through all sizes of two areas, filled to the last chunk at each.
    let (sectors, area) = AREAS[0];
    let chunk = chunk(sectors);
    let snapshot = least(&scene, sectors);
    let name = name_of(&snapshot);
    let device = Direct::open(snapshot.device());
    let mut written = 0;
    for chunks in 3..2 * area + 5 {
        snapshot.grow(chunks * chunk.bytes()).expect("it grows");
        let total = usage_of(&name).total.to_bytes().expect("small");
        let bytes = data_chunks(total, chunk) * chunk.bytes();
        if bytes > written {
            let wrote = device.write(0xa5, written, bytes - written);
            wrote.unwrap_or_else(|error| panic!("{chunks} chunks: {error}"));
            written = bytes;
        }
        assert!(usage_of(&name).is_full(chunk), "{chunks} chunks");
    }
    assert!(device.reads(0xa5, 0, written));
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
}

/// A snapshot over the shortest COW file that there is.
fn least(scene: &Scene, sectors: u64) -> Snapshot {
    let name = scene.name();
    let cow = scene.sparse(&name, 3 * sectors * 512);
    let snapshot = options(sectors).create(scene.image(), &cow, &name);
    snapshot.expect("a snapshot")
}

#[test]
fn a_block_device_of_a_bad_size_is_refused_as_it_cannot_be_made_longer() {
    let scene = scene();
    let (sectors, area) = AREAS[0];
    let file = scene.sparse("device", (area + 1) * 512);
    let disk = Losetup::attach(&file);
    let path = disk.device.clone();
    let (bytes, sound_bytes) = ((area + 1) * 512, (area + 2) * 512);
    let trap = Error::from(Refusal::CowSizeTrap {
        path: path.clone(),
        bytes,
        sound_bytes,
    });
    let name = scene.name();
    let create = || options(sectors).create(scene.image(), &path, &name);
    assert_eq!(create(), Err(trap));
    println!("bad input: a COW device of a trap size");

    run!("truncate", "-s", (area * 512).to_string(), &file);
    run!("losetup", "-c", &path);
    let snapshot = create().expect("a sound size");
    let short = snapshot
        .grow(sound_bytes)
        .expect_err("devices are not grown");
    let refusal = Refusal::CowDeviceShort {
        path: path.clone(),
        bytes: area * 512,
        asked: sound_bytes,
    };
    assert_eq!(short, refusal.into());
    let grow_to = |bytes: u64| {
        run!("truncate", "-s", bytes.to_string(), &file);
        run!("losetup", "-c", &path);
        snapshot.grow(bytes)
    };
    let trap = Refusal::CowSizeTrap {
        path: path.clone(),
        bytes,
        sound_bytes,
    };
    assert_eq!(grow_to(bytes), Err(trap.into()));
    let total = usage_of(&name).total.to_bytes();
    assert_eq!(total, Some(area * 512), "the loop device was not told");
    grow_to(sound_bytes).expect("it was made longer");
    fill(&snapshot, chunk(sectors));
    snapshot.cleanup().expect("nobody has it open");
}
