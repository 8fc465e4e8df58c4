//! A linear device between a snapshot and its COW device, whose setting ends the store's own flushes: how it goes with
//! the snapshot, and what it does to growth and to a handover.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::cow_device::{cache_of, completed, requests_of_64_writes, write_through};
use super::{CHUNK_BYTES, COW_BYTES, Device, Stack};
use crate::common::reading::{dm_exists, dm_info, loop_at};
use crate::common::{Scene, eventually, run};

/// A deferred removal is done by a work item of the kernel's (`dm_deferred_remove`, drivers/md/dm.c).
const SOON: Duration = Duration::from_secs(60);

fn linear(cow: &str, bytes: u64) -> String {
    format!("0 {} linear {cow} 0", bytes / 512)
}

/// A live linear device over all of a fresh COW file, which ends flushes.
fn below(stack: &mut Stack<'_>) -> (Device, String) {
    let (_, cow) = stack.cow();
    let device = stack.device();
    device.load(&linear(&cow, COW_BYTES));
    device.resume();
    write_through(&device);
    (device, cow)
}

fn defer(device: &Device) {
    run!("dmsetup", "remove", "--deferred", &device.name);
    assert!(dm_exists(&device.name), "somebody has it open");
}

/// What the kernel says has the loop device in its tables.
fn holders(node: &Path) -> Vec<String> {
    let name = node.file_name().expect("a name").to_owned();
    let entries = fs::read_dir(Path::new("/sys/block").join(name).join("holders"));
    let names = entries.expect("sysfs has it").flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn is_gone(device: &Device) -> bool {
    eventually(SOON, || !dm_exists(&device.name))
}

// drivers/md/dm-ioctl.c, dev_remove; drivers/md/dm.c, dm_blk_close: a table has the devices below it open, whether it is
// live or only loaded.
#[test]
fn a_deferred_linear_device_goes_with_the_table_above_it_live_or_not() {
    let scene = Scene::new();
    for resumed in [true, false] {
        let mut stack = Stack::over(&scene);
        let (l, _) = below(&mut stack);
        let image = stack.image.clone();
        let v = stack.device();
        v.load(&stack.table(&image, &l.number));
        defer(&l);
        if resumed {
            v.resume();
        }
        let node = stack.loops.last().expect("the COW's").device.clone();
        let minor = l.number.rsplit(':').next().expect("a minor");
        assert_eq!(holders(&node), [format!("dm-{minor}")], "not the snapshot");
        v.remove();
        assert!(is_gone(&l), "resumed: {resumed}");
        let free = || holders(&node).is_empty() && loop_at(&node).is_some();
        assert!(eventually(SOON, free));
    }
}

// It takes new tables while it waits for its removal, and each of them resets the setting.
#[test]
fn a_deferred_linear_device_is_made_longer_below_a_live_snapshot() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (l, cow) = below(&mut stack);
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &l.number);
    defer(&l);
    assert_eq!(requests_of_64_writes(&v, &cow)[1], 0);
    let attached = stack.loops.last().expect("the COW's");
    let file = File::options().write(true).open(&attached.backing);
    file.expect("ours").set_len(2 * COW_BYTES).expect("room");
    run!("losetup", "-c", &attached.device);
    let total = |bytes: u64| format!("/{} ", bytes / 512);
    assert!(v.status().contains(&total(COW_BYTES)), "not of itself");
    l.load(&linear(&cow, 2 * COW_BYTES));
    l.suspend();
    l.resume();
    assert!(v.status().contains(&total(2 * COW_BYTES)));
    assert_eq!(cache_of(&l.number), "write back");
    write_through(&l);
    let before = completed(&cow)[1];
    let writer = v.open();
    for nth in 64..128 {
        let at = nth * CHUNK_BYTES;
        writer.write(2, at, CHUNK_BYTES).expect("room");
    }
    assert_eq!(completed(&cow)[1], before);
    assert!(writer.reads(1, 0, CHUNK_BYTES) && writer.reads(2, 64 * CHUNK_BYTES, CHUNK_BYTES));
    drop(writer);
    assert_eq!(dm_info(&l.name, "attr"), "L--w");
    v.remove();
    assert!(is_gone(&l));
    // The node that the last resume made is dmsetup's, and the kernel does not know of it; where udev makes it, it is gone.
    let _ = fs::remove_file(l.node());
}

// A handover goes by the COW device's number, which is the linear device's for both tables.
#[test]
fn a_handover_over_linear_devices_leaves_each_with_its_own() {
    let scene = Scene::new();
    let mut stack = Stack::over(&scene);
    let (l0, c0) = below(&mut stack);
    let image = stack.image.clone();
    let v = stack.snapshot(&image, &l0.number);
    defer(&l0);
    v.open().write(1, 0, CHUNK_BYTES).expect("room");
    let (l1, c1) = below(&mut stack);
    let b = stack.device();
    b.load(&stack.table(&image, &l0.number));
    v.load(&stack.table(&b.number, &l1.number));
    defer(&l1);
    v.suspend();
    b.resume();
    v.resume();
    assert!(v.open().reads(1, 0, CHUNK_BYTES));
    let old = completed(&c0);
    assert_eq!(requests_of_64_writes(&v, &c1)[1], 0);
    assert_eq!(completed(&c0), old, "the layer is not written");
    v.remove();
    assert!(is_gone(&l1), "with the snapshot");
    assert!(dm_exists(&l0.name), "the layer has it");
    assert!(b.open().reads(1, 0, CHUNK_BYTES));
    b.remove();
    assert!(is_gone(&l0));
}
