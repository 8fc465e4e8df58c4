//! A COW file that dmsetup's snapshot wrote to: nothing in it says over what.

use std::fs;
use std::path::Path;

use dmsnap::error::Refusal;
use dmsnap::export::ExportOptions;
use dmsnap::{Error, SnapshotOptions};

use crate::common::fixtures::{Foreign, Losetup};
use crate::common::reading::number;
use crate::common::tools::{complaint, finish, success};
use crate::common::{Scene, chain, dmsnap, run};

/// 6 KiB of something over the beginning of a disk.
fn write(device: &Path) {
    let to = format!("of={}", device.display());
    run!(
        "dd",
        "if=/proc/self/exe",
        to,
        "bs=2048",
        "count=3",
        "conv=fsync,notrunc"
    );
}

/// What losetup and dmsetup make of the two, written to and taken down.
fn written(scene: &Scene, origin: Losetup, cow: &Path) {
    let name = scene.name();
    let cow = Losetup::attach(cow);
    let sectors = run!("blockdev", "--getsz", &origin.device);
    let (over, store) = (number(&origin.device), number(&cow.device));
    let device = Foreign::create(&name, &format!("0 {sectors} snapshot {over} {store} P 8"));
    write(&Path::new("/dev/mapper").join(&name));
    drop(device);
    drop((origin, cow));
}

fn refusal(error: Error) -> (u64, u64) {
    println!("message: an unmarked store: {}", chain(&error));
    match error {
        Error::Refused(Refusal::OriginUnknown {
            bytes, end_bytes, ..
        }) => (bytes, end_bytes),
        other => panic!("{other:?}"),
    }
}

// Made over a partition, its changes were shown and exported at the beginning of the whole disk; and the snapshot marked
// the store as the disk's, so that a merge would have destroyed that.
#[test]
fn what_was_made_over_a_part_is_neither_shown_nor_exported_over_the_whole() {
    let scene = Scene::new();
    let (disk, cow, out) = (scene.image(), scene.cow("cow"), scene.path("out"));
    let part = || {
        let device = run!(
            "losetup",
            "-rf",
            "--show",
            "-o",
            "1048576",
            "--sizelimit",
            "1048576",
            disk
        );
        Losetup {
            device: device.into(),
            backing: disk.to_owned(),
        }
    };
    written(&scene, part(), &cow);
    let before = fs::read(&cow).expect("it is there");

    let export = ExportOptions::new().export(disk, &cow, &out);
    assert_eq!(
        refusal(export.expect_err("not the disk's")),
        (4 << 20, 8192)
    );
    let name = scene.name();
    let create = SnapshotOptions::new().create(disk, &cow, &name);
    assert_eq!(
        refusal(create.expect_err("not the disk's")),
        (4 << 20, 8192)
    );
    let (mut create, mut export) = (dmsnap(), dmsnap());
    create.arg("create").arg(disk).arg(&cow).arg(&name);
    export
        .args(["export", "--origin"])
        .arg(disk)
        .arg("--cow")
        .arg(&cow)
        .arg(&out);
    for command in [&mut create, &mut export] {
        let line = complaint(&finish(command));
        assert!(line.contains("allow any origin"), "{line}");
    }
    assert!(!out.exists() && fs::read(&cow).expect("it is there") == before);

    // Over the very device it is what dd makes.
    let origin = part();
    let expected = scene.path("expected");
    let from = format!("if={}", origin.device.display());
    run!("dd", from, format!("of={}", expected.display()), "bs=1M");
    write(&expected);
    let mut any = ExportOptions::new();
    any.any_origin(true)
        .export(&origin.device, &cow, &out)
        .expect("the very one");
    run!("cmp", &expected, &out);
    let mut any = SnapshotOptions::new();
    any.any_origin(true);
    let snapshot = any
        .create(&origin.device, &cow, &name)
        .expect("the very one");
    run!("cmp", &expected, snapshot.device());
    snapshot.cleanup().expect("idle");
    drop(origin);

    // Marked by now, it is the disk's no more than before.
    let error = ExportOptions::new().replace(true).export(disk, &cow, &out);
    println!(
        "message: a marked one: {}",
        chain(&error.expect_err("not the disk's"))
    );
    let error = SnapshotOptions::new().create(disk, &cow, &name);
    println!(
        "message: a marked one: {}",
        chain(&error.expect_err("not the disk's"))
    );
}

// A store that nobody has written to is as good over any image: a create that was killed before its mark leaves one.
#[test]
fn a_store_without_changes_is_taken_over_any_image() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let (origin, store) = (
        Losetup::attach_read_only(scene.image()),
        Losetup::attach(&cow),
    );
    let over = (number(&origin.device), number(&store.device));
    let table = format!("0 8192 snapshot {} {} P 8", over.0, over.1);
    drop(Foreign::create(&name, &table));
    drop((origin, store));
    let out = scene.path("out");
    ExportOptions::new()
        .export(scene.image(), &cow, &out)
        .expect("no changes");
    run!("cmp", scene.image(), &out);
    let snapshot = SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("no changes");
    run!("cmp", scene.image(), snapshot.device());
    snapshot.cleanup().expect("idle");
}

// Of a live one the kernel tells the origin, also when it is exported, and made anew after an overflow.
#[test]
fn of_a_live_one_the_origin_is_known() {
    let scene = Scene::new();
    let (cow, name) = (scene.sparse("cow", 64 << 10), scene.name());
    let (origin, store) = (
        Losetup::attach_read_only(scene.image()),
        Losetup::attach(&cow),
    );
    let over = (number(&origin.device), number(&store.device));
    let table = format!("0 8192 snapshot {} {} PO 8", over.0, over.1);
    let device = Foreign::create(&name, &table);
    let mapper = Path::new("/dev/mapper").join(&name);
    write(&mapper);
    success(dmsnap().args(["adopt", &name]));
    let out = scene.path("out");
    let exported = ExportOptions::new().export_live(name.as_str(), &out);
    exported.unwrap_or_else(|error| panic!("{}", chain(&error)));
    run!("cmp", &mapper, &out);
    let to = format!("of={}", mapper.display());
    let full = crate::common::output!(
        "dd",
        "if=/dev/zero",
        to,
        "bs=4096",
        "count=64",
        "seek=4",
        "conv=fsync"
    );
    assert!(!full.status.success(), "it does not fit");
    let recovered = dmsnap::snapshot::recover(name.as_str(), 1 << 20);
    let recovered = recovered.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let head = |from: &Path| fs::read(from).expect("readable")[..4096].to_vec();
    let same = head(recovered.device()) == head(&out);
    assert!(same, "what was written before is there");
    recovered.cleanup().expect("idle");
    drop((device, origin, store));
}
