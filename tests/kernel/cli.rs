//! The command line: what it prints, and how it ends.

use std::io::Read;
use std::process::{Command, Stdio};

use dmsnap::Handles;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::common::reading::{dm_exists, dm_table};
use crate::common::tools::{complaint, finish, success};
use crate::common::{Scene, dmsnap};

#[test]
fn create_prints_handles_that_cleanup_reads() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let mut create = dmsnap();
    create.args(["create", "--store", "persistent-overflow"]);
    create.args(["--chunk-sectors", "32"]).arg(scene.image());
    let json = success(create.args([&cow]).arg(&name));
    assert!(dm_table(&name).ends_with(" PO 32"));
    let handles: Handles = serde_json::from_str(&json).expect("handles");
    assert_eq!(handles.name.as_ref().expect("a name").as_str(), name);
    let keys: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&json).expect("an object");
    let mut keys: Vec<_> = keys.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "cow_loop",
            "dev",
            "device",
            "mapper",
            "name",
            "origin",
            "origin_loop",
            "uuid"
        ]
    );
    // By stdin, as `dmsnap create ... | dmsnap cleanup` would.
    let file = scene.file("handles.json", &json);
    let mut cleanup = dmsnap();
    cleanup.arg("cleanup");
    cleanup.stdin(std::fs::File::open(file).expect("it is there"));
    let status = cleanup.status().expect("it starts");
    assert!(status.success(), "{status}");
    assert!(!dm_exists(&name));
}

#[test]
fn list_and_status_print_json_and_tables() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name").to_string();
    let parse = |text: &str| -> serde_json::Value { serde_json::from_str(text).expect("JSON") };
    let listed = parse(&success(dmsnap().args(["list", "--json"])));
    let status = parse(&success(dmsnap().args(["status", "--json", &name])));
    assert_eq!(listed, serde_json::json!([status]));
    assert_eq!(status["name"], name);
    assert_eq!(status["state"], "live");
    assert_eq!(status["params"]["store"], "persistent");
    assert_eq!(status["params"]["chunk_sectors"], 8);
    assert_eq!(
        status["origin"]["path"],
        scene.image().to_str().expect("UTF-8")
    );
    let usage = &status["status"]["usage"];
    assert!(usage["allocated"].is_number());
    assert_eq!(usage["allocated"], usage["metadata"]);
    // What the command prints is what the library reads.
    let read: dmsnap::find::SnapshotInfo =
        serde_json::from_value(status.clone()).expect("it reads back");
    assert_eq!(Ok(read), dmsnap::status(&name));
    for table in [
        success(dmsnap().arg("list")),
        success(dmsnap().args(["status", &name])),
    ] {
        assert!(
            table.starts_with("NAME") && table.contains(&name),
            "{table}"
        );
    }
    snapshot.cleanup().expect("nobody has it open");
    assert_eq!(success(dmsnap().args(["list", "--json"])), "[]");
    let line = complaint(&finish(dmsnap().args(["status", &name])));
    println!("message: status of what is gone: {line}");
}

#[test]
fn remove_says_what_became_of_it() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name").to_string();
    let holder = std::fs::File::open(snapshot.device()).expect("the device opens");
    let line = complaint(&finish(dmsnap().args([
        "remove",
        "--deadline",
        "100ms",
        &name,
    ])));
    println!("message: remove an open device: {line}");
    assert!(line.contains(": open count 1"), "{line}");
    let text = success(dmsnap().args(["remove", "--defer", &name]));
    assert!(text.starts_with("deferred until its 1 user"), "{text}");
    drop(holder);
    scene.assert_clean();
    assert_eq!(success(dmsnap().args(["remove", &name])), "already gone");
    let another = scene.snapshot().into_handles();
    let name = another.name.expect("a name").to_string();
    assert_eq!(success(dmsnap().args(["remove", &name])), "removed");
}

#[test]
fn handles_that_are_none() {
    let scene = Scene::new();
    for (what, text) in [
        ("not JSON", "vm-42"),
        ("a name that no device has", "{\"name\": \"a b\"}"),
    ] {
        let file = scene.file("handles.json", text);
        let line = complaint(&finish(dmsnap().arg("cleanup").arg(&file)));
        println!("bad input: handles, {what}: {line}");
        assert!(
            line.starts_with(&format!("cannot read handles from {}: ", file.display())),
            "{line}"
        );
    }
    let line = complaint(&finish(dmsnap().args(["cleanup", "/no/such/file"])));
    println!("bad input: handles, missing: {line}");
    success(dmsnap().arg("cleanup").arg(scene.file("empty.json", "{}")));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    drop(reader);
    let mut list = dmsnap();
    list.arg("list").stdout(writer).stderr(Stdio::piped());
    let mut child = list.spawn().expect("it starts");
    drop(list);
    let mut stderr = String::new();
    let mut pipe = child.stderr.take().expect("it is piped");
    pipe.read_to_string(&mut stderr).expect("text");
    drop(pipe);
    let status = child.wait().expect("it ends");
    assert!(status.success() && stderr.is_empty(), "{status} {stderr}");
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn handles_that_nobody_gets_to_read_are_no_success() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let mut create: Command = dmsnap();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    create
        .arg("create")
        .arg(scene.image())
        .args([&cow])
        .arg(&name);
    let status = create
        .stdout(full)
        .stderr(Stdio::null())
        .status()
        .expect("it starts");
    assert_eq!(status.code(), Some(1), "a failed write is a failure");
    // What the caller cannot know of must still be found by its name.
    success(dmsnap().args(["remove", &name]));
}
