//! What an export, a grow or a merge is pointed at: a loop device over a part of its file, a file system without links,
//! a COW file in use.

use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use dmsnap::export::ExportOptions;
use dmsnap::merge::{MergeOptions, MergeOutcome};
use dmsnap::{DeviceId, SnapshotOptions};

use crate::common::fixtures::{Losetup, Mounted};
use crate::common::tools::finish;
use crate::common::{Scene, dmsnap, output, run};

/// A snapshot that losetup and dmsetup made, gone with this value.
struct Foreign {
    name: String,
    loops: [String; 2],
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = output!("dmsetup", "remove", "--retry", &self.name);
        for device in &self.loops {
            let _ = output!("losetup", "-d", device);
        }
    }
}

fn foreign(scene: &Scene, origin: &str, cow: &str) -> Foreign {
    let name = scene.name();
    let bytes: u64 = run!("blockdev", "--getsize64", origin)
        .parse()
        .expect("a number");
    let table = format!("0 {} snapshot {origin} {cow} P 8", bytes / 512);
    let uuid = format!("DMSNAP-{name}");
    run!("dmsetup", "create", "-u", uuid, "--table", table, &name);
    Foreign {
        name,
        loops: [origin.to_owned(), cow.to_owned()],
    }
}

// The file was exported from its first byte on, and exit 0 said that this was the disk.
#[test]
fn a_loop_device_over_a_part_of_its_file_is_not_taken_for_the_file() {
    let scene = Scene::new();
    let (disk, cow, out) = (scene.path("disk"), scene.path("cow"), scene.path("out"));
    let mut content = vec![0; 4 << 20];
    content[..5].copy_from_slice(b"FIRST");
    content[1 << 20..(1 << 20) + 6].copy_from_slice(b"SECOND");
    fs::write(&disk, content).expect("room");
    run!("truncate", "-s", "4M", &cow);
    let part = ["-o", "1048576", "--sizelimit", "1048576"];
    let origin = run!(
        "losetup", "-rf", "--show", part[0], part[1], part[2], part[3], &disk
    );
    let store = run!("losetup", "-f", "--show", &cow);
    let device = foreign(&scene, &origin, &store);
    let error = ExportOptions::new().export_live(device.name.as_str(), &out);
    let text = error.expect_err("not the file").to_string();
    println!("export: {text}");
    assert!(
        text.contains("from byte 1048576") && text.contains(&origin),
        "{text}"
    );
    assert!(!out.exists());
    drop(device);

    // A limit keeps the device as long as it was, however long the file is.
    let origin = run!("losetup", "-rf", "--show", &disk);
    let store = run!("losetup", "-f", "--show", "--sizelimit", "2097152", &cow);
    let device = foreign(&scene, &origin, &store);
    let grown = dmsnap::snapshot::grow(device.name.as_str(), 8 << 20);
    let text = grown.expect_err("it cannot grow").to_string();
    println!("grow: {text}");
    assert!(
        text.contains("2097152 bytes") && text.contains(&store),
        "{text}"
    );
    assert_eq!(fs::metadata(&cow).expect("it is there").len(), 4 << 20);
    drop(device);
}

// A store that was made over a partition was merged into the whole disk, from its first byte on: the boot sector and the
// partition before it were overwritten, and exit 0 said that all was well.
#[test]
fn a_store_that_was_made_over_a_part_of_a_disk_is_not_merged_into_the_disk() {
    let scene = Scene::new();
    let (disk, cow, copy) = (scene.path("disk"), scene.path("cow"), scene.path("copy"));
    let mut content = vec![0; 4 << 20];
    content[..5].copy_from_slice(b"FIRST");
    content[1 << 20..(1 << 20) + 6].copy_from_slice(b"SECOND");
    fs::write(&disk, content).expect("room");
    fs::copy(&disk, &copy).expect("room");
    let changed = scene.file("changed", b"THIRD.".repeat(1024));
    run!("truncate", "-s", "4M", &cow);
    let part = |mode: &str| {
        run!(
            "losetup",
            mode,
            "--show",
            "-o",
            "1048576",
            "--sizelimit",
            "1048576",
            &disk
        )
    };
    let write = |device: &Path| {
        let (from, to) = (arg("if=", &changed), arg("of=", device));
        run!("dd", from, to, "bs=4096", "conv=fsync");
    };
    let refused = |origin: &Path, cow: &Path| {
        let dated = run!("stat", "-c", "%y %z", origin);
        let merged = MergeOptions::new().merge(origin, cow, |_| ControlFlow::Continue(()));
        let text = merged.expect_err("not the image").to_string();
        println!("merge: {text}");
        run!("cmp", origin, &copy);
        assert_eq!(run!("stat", "-c", "%y %z", origin), dated);
        text
    };

    let (origin, store) = (part("-rf"), run!("losetup", "-f", "--show", &cow));
    let device = foreign(&scene, &origin, &store);
    write(&Path::new("/dev/mapper").join(&device.name));
    drop(device);
    let text = refused(&disk, &cow);
    assert!(
        text.contains("8192") && text.contains("4194304 bytes"),
        "{text}"
    );

    // Ours says what it was made over.
    let origin = part("-rf");
    let ours = scene.cow("ours");
    let snapshot = SnapshotOptions::new()
        .create(&origin, &ours, &scene.name())
        .expect("over a block device");
    write(snapshot.device());
    snapshot.cleanup().expect("idle");
    run!("losetup", "-d", &origin);
    let text = refused(&disk, &ours);
    assert!(
        text.contains("1048576") && text.contains("4194304"),
        "{text}"
    );

    // Into the very device, it is the merge that was meant.
    let origin = part("-f");
    let merged = MergeOptions::new()
        .any_origin(true)
        .merge(&origin, &cow, |_| ControlFlow::Continue(()));
    println!("merge into {origin}: {merged:?}");
    assert!(matches!(merged, Ok(MergeOutcome::Complete { .. })));
    run!("blockdev", "--flushbufs", &origin);
    run!("losetup", "-d", &origin);
    let (from, to) = (arg("if=", &changed), arg("of=", &copy));
    run!("dd", from, to, "bs=4096", "seek=256", "conv=notrunc");
    run!("cmp", &disk, &copy);
}

fn arg(key: &str, path: &Path) -> OsString {
    let mut arg = OsString::from(key);
    arg.push(path);
    arg
}

/// A FAT16 file system of 64 MiB, of clusters of 4 KiB, as the boot sector and the heads of two tables make it.
fn make_fat(image: &Path) {
    let mut head = vec![0; 512 * 133];
    head[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
    // Bytes a sector, sectors a cluster, reserved sectors, tables, root entries, sectors (below), medium, table sectors.
    head[11..24].copy_from_slice(&[0, 2, 8, 1, 0, 2, 0, 2, 0, 0, 0xf8, 66, 0]);
    head[32..36].copy_from_slice(&131_072u32.to_le_bytes());
    head[510..512].copy_from_slice(&[0x55, 0xaa]);
    for table in [512, 512 * 67] {
        head[table..table + 4].copy_from_slice(&[0xf8, 0xff, 0xff, 0xff]);
    }
    fs::write(image, head).expect("room");
    run!("truncate", "-s", "64M", image);
}

// vfat has neither nameless files nor links: all was copied and synced, then "Operation not permitted".
#[test]
fn an_export_onto_vfat_gets_its_name() {
    let scene = Scene::new();
    let image = scene.path("fat");
    make_fat(&image);
    let disk = Losetup::attach(&image);
    let device = disk.device.display().to_string();
    let mounted = Mounted::mount(["-t", "vfat", &device], &scene.path("fat-at"));
    let cow = scene.cow("cow");
    let snapshot = SnapshotOptions::new().create(scene.image(), &cow, &scene.name());
    snapshot
        .expect("a snapshot")
        .cleanup()
        .expect("nobody has it open");
    let out = mounted.at().join("out");
    let mut options = ExportOptions::new();
    options
        .export(scene.image(), &cow, &out)
        .expect("it works without --replace");
    run!("cmp", scene.image(), &out);
    let text = options
        .export(scene.image(), &cow, &out)
        .expect_err("it exists")
        .to_string();
    assert!(text.contains("exists"), "{text}");
    options
        .replace(true)
        .export(scene.image(), &cow, &out)
        .expect("replaced");
    // An entry keeps its directory open, and the file system from being unmounted.
    let entries = fs::read_dir(mounted.at()).expect("a directory").flatten();
    let left: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    println!("on vfat: {left:?}");
    assert_eq!(left.len(), 1);
    drop(mounted);
    drop(disk);
}

#[test]
fn the_store_of_a_live_snapshot_names_it_and_says_how_to_export_it() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let snapshot = SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let text = ExportOptions::new().export(scene.image(), &cow, scene.path("out"));
    let text = text.expect_err("it is live").to_string();
    println!("{text}");
    assert!(text.contains(&format!("export {name}")), "{text}");
    snapshot.cleanup().expect("nobody has it open");
}

// It was learnt at the threshold, with the guest's writes about to fail.
#[test]
fn a_watch_that_is_to_grow_a_file_on_ramfs_says_at_once_that_it_cannot() {
    let scene = Scene::new();
    let mounted = Mounted::mount(["-t", "ramfs", "none"], &scene.path("ram"));
    let cow = mounted.at().join("cow");
    run!("truncate", "-s", "8M", &cow);
    let name = scene.name();
    let snapshot = SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let probed = dmsnap::snapshot::GrowOptions::new().probe(DeviceId::Name(name.clone()));
    let text = probed.expect_err("ramfs has no fallocate").to_string();
    println!("probe: {text}");
    let watch = finish(dmsnap().args(["watch", "--grow-by", "4M", &name]));
    let said = String::from_utf8_lossy(&watch.stderr);
    println!("watch: {said}");
    assert!(
        !watch.status.success() && said.contains("set aside space"),
        "{said}"
    );
    snapshot.cleanup().expect("nobody has it open");
    drop(mounted);
}
