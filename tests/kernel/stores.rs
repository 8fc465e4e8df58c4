//! Stores, chunk sizes, direct I/O, discard, and what happens when a COW file is full.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::Refusal;
use dmsnap::{ChunkSize, Error, Snapshot, SnapshotOptions, Store, Warning};

use crate::common::reading::{dm_table, loop_at};
use crate::common::scene::{COW_BYTES, content, ext4};
use crate::common::{Mounted, Scene, output, run, stated_kernel};

fn chunk(sectors: u64) -> ChunkSize {
    ChunkSize::new(sectors).expect("a chunk size")
}

fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

fn status_of(snapshot: &Snapshot) -> Option<SnapshotStatus> {
    let name = snapshot.handles().name.clone().expect("a name");
    dmsnap::status(&name).expect("a status").status
}

fn open(device: &Path) -> File {
    let opened = File::options().read(true).write(true).open(device);
    opened.expect("the device opens")
}

#[test]
fn stores_and_chunk_sizes_are_in_the_table_as_asked() {
    let scene = Scene::new();
    for (store, letters) in [
        (Store::Persistent, "P"),
        (Store::PersistentOverflow, "PO"),
        (Store::Transient, "N"),
    ] {
        for sectors in [1, 8, 32, 128, 2048] {
            let mut options = SnapshotOptions::new();
            options.store(store).chunk_size(chunk(sectors));
            let snapshot = scene.snapshot_with(&options);
            let table = dm_table(&name_of(&snapshot));
            assert!(table.ends_with(&format!(" {letters} {sectors}")), "{table}");
            assert_eq!(content(snapshot.device()), content(scene.image()));
            snapshot.cleanup().expect("nobody has it open");
        }
    }
}

#[test]
fn a_transient_store_writes_no_header_and_takes_blank_files_only() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let mut options = SnapshotOptions::new();
    options.store(Store::Transient);
    let create = || options.create(scene.image(), &cow, &scene.name());
    create().expect("a snapshot").cleanup().expect("idle");
    let untouched = fs::metadata(&cow).expect("the COW file").blocks();
    assert_eq!(untouched, 0, "a transient store has no header");
    create().expect("still blank").cleanup().expect("idle");
}

#[test]
fn direct_io_is_effective_or_a_warning_says_that_it_is_not() {
    let scene = Scene::new();
    let disk = scene.path("disk.img");
    ext4(&disk, 64 << 20);
    let mounted = Mounted::mount(
        ["-o", "loop", disk.to_str().expect("UTF-8")],
        &scene.path("mnt"),
    );
    let mut options = SnapshotOptions::new();
    options.direct_io(true);
    // ext4 can; tmpfs can from some kernel on; either way the kernel's word and ours must be the same.
    for (on, must) in [(mounted.at(), true), (scene.dir(), false)] {
        let cow = on.join("cow");
        let file = File::create(&cow).expect("a new file");
        file.set_len(COW_BYTES).expect("room for a sparse file");
        drop(file);
        let snapshot = options
            .create(scene.image(), &cow, &scene.name())
            .expect("a snapshot");
        let cow_loop = snapshot.handles().cow_loop.clone().expect("a COW loop");
        let effective = loop_at(&cow_loop.path).expect("it is bound").direct_io;
        assert!(effective || !must, "ext4 can do direct I/O");
        println!("direct I/O below {}: {effective}", on.display());
        let warned = snapshot.warnings().contains(&Warning::DirectIoUnavailable);
        assert_eq!(warned, !effective, "{:?}", snapshot.warnings());
        let origin_loop = snapshot
            .handles()
            .origin_loop
            .clone()
            .expect("an origin loop");
        let origin = loop_at(&origin_loop.path).expect("it is bound");
        assert!(!origin.direct_io, "the origin's page cache is shared");

        let device = open(snapshot.device());
        device.write_all_at(&[7; 4096], 4096).expect("writable");
        device.sync_all().expect("the COW file takes it");
        drop(device);
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn a_discard_gives_the_space_back_when_asked_for_and_fails_otherwise() {
    let scene = Scene::new();
    let written = 1 << 20;
    let mut cases = vec![(true, 512), (false, 512), (false, 8)];
    // dm-snap.c, snapshot_io_hints, gives the granularity of discards in sectors where the block layer takes bytes.
    // From a kernel between 6.12 and 7.3 on blk_stack_limits divides by it in 512-byte units: with chunks of less than
    // 512 sectors, loading such a table is a divide error, and the kernel is gone.
    if ["5.10", "6.1", "6.12"].contains(&stated_kernel().as_str()) {
        cases.push((true, 8));
    } else {
        let mut options = SnapshotOptions::new();
        let cow = scene.cow("crash.cow");
        let refused =
            options
                .discard(true)
                .trust_discards(true)
                .create(scene.image(), &cow, &scene.name());
        let refusal = Refusal::DiscardChunk { chunk: chunk(8) };
        assert_eq!(refused, Err(Error::Refused(refusal)));
    }
    for (discard, sectors) in cases {
        let mut options = SnapshotOptions::new();
        options
            .discard(discard)
            .trust_discards(true)
            .chunk_size(chunk(sectors));
        let name = scene.name();
        let cow = scene.cow(format!("{discard}-{sectors}.cow"));
        let snapshot = options
            .create(scene.image(), &cow, &name)
            .expect("a snapshot");
        let features = if discard { " 1 discard_zeroes_cow" } else { "" };
        let table = dm_table(&name);
        assert!(
            table.ends_with(&format!(" P {sectors}{features}")),
            "{table}"
        );
        let device = open(snapshot.device());
        device
            .write_all_at(&vec![0xa5; written], 0)
            .expect("writable");
        device.sync_all().expect("the COW file takes it");
        drop(device);
        let blocks = || fs::metadata(&cow).expect("the COW file").blocks();
        let full = blocks();
        let length = written.to_string();
        let done = output!("blkdiscard", "-o", "0", "-l", length, snapshot.device());
        assert_eq!(done.status.success(), discard, "{done:?}");
        if discard {
            assert!(
                blocks() < full / 2,
                "{full} blocks before, {} after",
                blocks()
            );
            let mut seen = vec![1; written];
            open(snapshot.device())
                .read_exact_at(&mut seen, 0)
                .expect("readable");
            assert!(seen.iter().all(|byte| *byte == 0), "discarded, reads zero");
        }
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn a_full_p_store_is_lost_and_refused_for_good() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.sparse("cow", 256 << 10));
    let create = || SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = create().expect("a snapshot");
    overfill(snapshot.device());
    assert_eq!(status_of(&snapshot), Some(SnapshotStatus::Invalid));
    snapshot.cleanup().expect("nobody has it open");
    let header = fs::read(&cow).expect("readable");
    let error = create().expect_err("it is invalid");
    println!("bad input: COW invalidated by an overflow: {error}");
    assert_eq!(
        error,
        Error::from(Refusal::CowInvalid { path: cow.clone() })
    );
    assert_eq!(fs::read(&cow).expect("readable"), header);
}

#[test]
fn a_full_po_store_fails_writes_and_lives_on_in_a_longer_file() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.sparse("cow", 256 << 10));
    let mut options = SnapshotOptions::new();
    options.store(Store::PersistentOverflow);
    let create = || options.create(scene.image(), &cow, &name);
    let snapshot = create().expect("a snapshot");
    overfill(snapshot.device());
    assert_eq!(status_of(&snapshot), Some(SnapshotStatus::Overflow));
    snapshot.cleanup().expect("nobody has it open");

    run!("truncate", "-s", COW_BYTES.to_string(), &cow);
    let snapshot = create().expect("a longer COW file");
    let mut seen = [0; 512];
    open(snapshot.device())
        .read_exact_at(&mut seen, 0)
        .expect("readable");
    assert_eq!(seen, [0x5a; 512], "what fitted is still there");
    assert!(matches!(
        status_of(&snapshot),
        Some(SnapshotStatus::Usage(_))
    ));
    snapshot.cleanup().expect("nobody has it open");
}

/// Writes twice what a COW file of 256 KiB takes; the kernel fails some of it.
fn overfill(device: &Path) {
    let device = open(device);
    let wrote = device.write_all_at(&vec![0x5a; 512 << 10], 0);
    assert!(
        wrote.and_then(|()| device.sync_all()).is_err(),
        "it does not fit"
    );
}
