//! What is said of sizes, of a COW file whose head is gone, and of files in another mount namespace.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::common::tools::{complaint, finish, success};
use crate::common::{Scene, dmsnap, run};

// The worst case of no origin was below the least; `1k`, `1.5G` and `8E` were taken for names of files.
#[test]
fn sizes_that_are_none_are_said_to_be_none() {
    let scene = Scene::new();
    let said = success(dmsnap().args(["cow", "size", "--json", "--origin", "0"]));
    println!("cow size --origin 0: {said}");
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert!(said["worst_case_bytes"].as_u64() >= said["least_bytes"].as_u64());
    for size in ["1k", "1.5G", "8E"] {
        let line = complaint(&finish(dmsnap().args(["cow", "size", "--origin", size])));
        println!("message: cow size --origin {size}: {line}");
        assert!(
            line.contains("No such file") && line.contains("need bytes, or 512K"),
            "{line}"
        );
    }
    // A file of such a name is one.
    let mut named = dmsnap();
    std::fs::copy(scene.image(), scene.path("1k")).expect("room");
    success(
        named
            .current_dir(scene.dir())
            .args(["cow", "size", "--origin", "1k"]),
    );
}

// `inspect` called it blank, and `create` did not.
#[test]
fn a_store_whose_head_is_gone_is_not_said_to_be_blank() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let snapshot = dmsnap::SnapshotOptions::new().create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let to = format!("of={}", snapshot.device().display());
    run!(
        "dd",
        "if=/proc/self/exe",
        to,
        "bs=4096",
        "count=1",
        "conv=fsync"
    );
    snapshot.cleanup().expect("idle");
    let file = std::fs::File::options()
        .write(true)
        .open(&cow)
        .expect("it is ours");
    file.write_all_at(&[0; 4096], 0).expect("room");
    let out = scene.path("out");
    let (mut inspect, mut export, mut create) = (dmsnap(), dmsnap(), dmsnap());
    inspect.args(["cow", "inspect"]).arg(&cow);
    export
        .args(["export", "--origin"])
        .arg(scene.image())
        .arg("--cow")
        .arg(&cow)
        .arg(&out);
    create.arg("create").arg(scene.image()).arg(&cow).arg(&name);
    for command in [&mut inspect, &mut export, &mut create] {
        let line = complaint(&finish(command));
        println!("message: no head: {line}");
        assert!(
            line.contains("at byte 4096") && !line.contains("blank, no"),
            "{line}"
        );
    }
}

// ENOENT, where growing it said what is so.
#[test]
fn files_that_are_mounted_elsewhere_are_said_to_be_for_an_export_too() {
    let scene = Scene::new();
    let (name, there) = (scene.name(), scene.path("there"));
    std::fs::create_dir(&there).expect("a mount point");
    let ours = dmsnap();
    let script = format!(
        "mount -t tmpfs none {there} && truncate -s 8M {there}/cow && {ours} create {image} {there}/cow {name}",
        there = there.display(),
        ours = Path::new(ours.get_program()).display(),
        image = scene.image().display(),
    );
    success(Command::new("unshare").args(["-m", "sh", "-c", &script]));
    let out = scene.path("out");
    let (mut export, mut grow) = (dmsnap(), dmsnap());
    export.args(["export", &name]).arg(&out);
    grow.args(["grow", &name, "16M"]);
    for command in [&mut export, &mut grow] {
        let line = complaint(&finish(command));
        println!("message: files elsewhere: {line}");
        assert!(
            line.contains("removed, replaced or is mounted elsewhere"),
            "{line}"
        );
    }
    let handles = dmsnap::adopt(name.as_str()).expect("it is ours");
    dmsnap::cleanup(&handles).expect("idle");
}
