//! The COW device under a snapshot: its length, and the flushes that reach it.

use std::fs::{self, File};

use super::{CHUNK_BYTES, COW_BYTES, Device, Stack};
use crate::common::reading::number;
use crate::common::scene::IMAGE_BYTES;
use crate::common::{Losetup, Scene, run};

// drivers/md/dm-snap-persistent.c, persistent_usage and prepare_exception ask for the COW device's size each time; the
// table of exceptions is as large as the device was when the target was made (init_hash_tables, dm-snap.c).
#[test]
fn a_cow_device_that_is_loaded_short_and_lengthened_is_used_in_full() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let file = scene.sparse("short.cow", 64 << 10);
    let short = Losetup::attach(&file);
    let (node, cow) = (short.device.clone(), number(&short.device));
    stack.loops.push(short);
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &cow);
    let total = |status: &str| {
        let total = status.split(['/', ' ']).nth(1);
        total.and_then(|total| total.parse::<u64>().ok())
    };
    assert_eq!(total(&v.status()), Some((64 << 10) / 512));
    let opened = File::options().write(true).open(&file).expect("ours");
    opened.set_len(COW_BYTES).expect("room");
    run!("losetup", "-c", &node);
    assert_eq!(total(&v.status()), Some(COW_BYTES / 512));

    // Every chunk of the image, many times what it was loaded for.
    for nth in 0..IMAGE_BYTES / CHUNK_BYTES {
        let byte = u8::try_from(nth % 251).expect("small");
        v.open()
            .write(byte, nth * CHUNK_BYTES, CHUNK_BYTES)
            .expect("room");
    }
    let right = |device: &Device| {
        let content = fs::read(device.node()).expect("readable");
        let chunks = content.chunks(4096).enumerate();
        chunks.fold(true, |right, (nth, chunk)| {
            right && chunk.iter().all(|byte| usize::from(*byte) == nth % 251)
        })
    };
    assert!(right(&v));
    assert_ne!(v.status(), "Invalid");
    v.remove();
    let anew = stack.snapshot(&image, &cow);
    assert!(right(&anew), "and as it was when it is loaded again");
}

/// Requests that a block device has completed (Documentation/block/stat.rst): writes and flushes.
pub(super) fn completed(device: &str) -> [u64; 2] {
    let file = format!("/sys/dev/block/{device}/stat");
    let text = fs::read_to_string(file).expect("sysfs has it");
    let fields: Vec<u64> = text
        .split_whitespace()
        .map(|field| field.parse().expect("a number"))
        .collect();
    [fields[4], fields[15]]
}

pub(super) fn write_through(device: &Device) {
    let file = format!("/sys/dev/block/{}/queue/write_cache", device.number);
    fs::write(&file, "write through").expect("it can be set");
    let now = fs::read_to_string(&file).expect("sysfs has it");
    assert_eq!(now.trim(), "write through");
}

pub(super) fn cache_of(number: &str) -> String {
    let file = format!("/sys/dev/block/{number}/queue/write_cache");
    let setting = fs::read_to_string(file).expect("sysfs has it");
    setting.trim().to_owned()
}

// drivers/md/dm-table.c, dm_table_set_restrictions: a table brings the limits of its queue, and with them this setting.
#[test]
fn the_write_cache_setting_of_a_dm_device_is_its_live_tables() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (file, cow) = stack.cow();
    let image = stack.image.clone();
    let mut v = stack.snapshot(&image, &cow);
    assert_eq!(cache_of(&v.number), "write back");
    write_through(&v);
    let stays = |v: &Device, after: &str| {
        assert_eq!(cache_of(&v.number), "write through", "after {after}");
    };

    v.suspend();
    stays(&v, "a suspension");
    v.resume();
    stays(&v, "a resume without another table");
    let (first, other) = (v.name.clone(), scene.name());
    run!("dmsetup", "rename", &v.name, &other);
    v.name = other;
    stays(&v, "a rename");
    run!("dmsetup", "rename", &v.name, &first);
    v.name = first;
    let opened = File::options().write(true).open(&file).expect("ours");
    opened.set_len(2 * COW_BYTES).expect("room");
    run!(
        "losetup",
        "-c",
        &stack.loops.last().expect("the COW's").device
    );
    stays(&v, "a longer COW device");
    v.load(&stack.table(&image, &cow));
    stays(&v, "a table that was only loaded");
    v.clear();
    stays(&v, "a table that was dropped");

    // The same one once more, as it is swapped when a disk is made longer; another COW device; none of all, and back.
    v.load(&stack.table(&image, &cow));
    v.resume();
    assert_eq!(cache_of(&v.number), "write back", "after the same table");
    write_through(&v);
    let (_, next) = stack.cow();
    v.load(&stack.table(&image, &next));
    v.resume();
    assert_eq!(cache_of(&v.number), "write back", "over another device");
    write_through(&v);
    v.load(&format!("0 {} error", stack.sectors));
    v.resume();
    v.load(&stack.table(&image, &cow));
    v.resume();
    assert_eq!(cache_of(&v.number), "write back", "after an error table");
}

/// Writes and flushes that reach the COW's loop device when 64 new chunks are written, each with an fsync.
pub(super) fn requests_of_64_writes(device: &Device, cow: &str) -> [u64; 2] {
    let (writer, node) = (device.open(), File::open(device.node()).expect("it opens"));
    let before = completed(cow);
    for nth in 0..64 {
        writer
            .write(1, nth * CHUNK_BYTES, CHUNK_BYTES)
            .expect("room");
        node.sync_data().expect("nothing fails");
    }
    let after = completed(cow);
    [after[0] - before[0], after[1] - before[1]]
}

// block/blk-core.c, submit_bio_noacct: a flush ends at a queue without a volatile write cache. A persistent store commits
// with PREFLUSH and FUA (write_exceptions, drivers/md/dm-snap-persistent.c), which is two flushes for a loop device.
#[test]
fn a_dm_device_whose_write_cache_is_off_ends_the_flushes_above_it() {
    let scene = Scene::new();
    let mut counted = Vec::new();
    for (store, through) in [("P", false), ("P", true), ("N", false), ("N", true)] {
        let mut stack = Stack::over(&scene);
        let (_, cow) = stack.cow();
        let image = stack.image.clone();
        let v = stack.device();
        v.load(&format!(
            "0 {} snapshot {image} {cow} {store} 8",
            stack.sectors
        ));
        v.resume();
        if through {
            write_through(&v);
        }
        counted.push(requests_of_64_writes(&v, &cow));
    }
    let mut stack = Stack::over(&scene);
    let (_, cow) = stack.cow();
    let image = stack.image.clone();
    let linear = stack.device();
    linear.load(&format!("0 {} linear {cow} 0", COW_BYTES / 512));
    linear.resume();
    write_through(&linear);
    let v = stack.snapshot(&image, &linear.number);
    counted.push(requests_of_64_writes(&v, &cow));
    println!("writes and flushes: {counted:?}");
    let cache = format!("/sys/dev/block/{cow}/queue/write_cache");
    let own = fs::read_to_string(cache).expect("sysfs has it");
    assert_eq!(
        own.trim(),
        "write back",
        "the loop device's own is as it was"
    );

    let expected = [[3, 3], [2, 2], [2, 1], [1, 0], [2, 0]];
    assert_eq!(counted, expected.map(|each| each.map(|each| each * 64)));
}
