//! Bad input: names and chunk sizes, refused before anything is asked of the kernel.

use dmsnap::{ChunkSize, ErrorKind, SnapshotOptions};

use crate::common::reading::{dm_info, dm_table};
use crate::common::rows::Row;
use crate::common::tools::{complaint, finish};
use crate::common::{Foreign, Scene, dmsnap};

#[test]
fn names_that_no_path_or_tool_would_keep() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let long = "x".repeat(128);
    let character =
        |c: &str| format!("it has the character {c} (allowed: 0-9 A-Z a-z # + - . : = @ _)");
    let reserved = "it is reserved below /dev/mapper".to_owned();
    for (what, name, fault) in [
        ("name empty", "", "it is empty".to_owned()),
        (
            "name of 128 bytes",
            &long,
            "it has 128 bytes, the kernel keeps 127".to_owned(),
        ),
        ("name with /", "a/b", character("'/'")),
        ("name with a space", "a b", character("' '")),
        ("name with a newline", "a\nb", character("'\\n'")),
        ("name with NUL", "a\0b", character("'\\0'")),
        ("name .", ".", reserved.clone()),
        ("name ..", "..", reserved.clone()),
        ("name control", "control", reserved),
        ("name not ASCII", "k\u{e4}se", character("'\u{e4}'")),
    ] {
        let mut row = Row::new(&scene, what, scene.image(), &cow);
        row.name = name.to_owned();
        let (_, message) = row.refused(&SnapshotOptions::new());
        assert_eq!(message, format!("cannot name a device {name:?}: {fault}"));
        if name.contains('\n') || name.is_empty() {
            assert_eq!(
                row.refused_under(&[]),
                message,
                "one line by the command too"
            );
        }
    }
}

#[test]
fn the_longest_name_works() {
    let scene = Scene::new();
    let mut name = scene.name();
    name.push_str(&"#+-.:=@_".repeat(20));
    name.truncate(127);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), scene.cow("cow"), &name)
        .expect("127 bytes fit");
    assert_eq!(dm_info(&name, "name"), name);
    assert!(
        snapshot
            .handles()
            .mapper
            .as_ref()
            .expect("an alias")
            .exists()
    );
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_name_that_a_foreign_device_has() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let row = Row::new(
        &scene,
        "name taken by a foreign dm device",
        scene.image(),
        &cow,
    );
    let theirs = Foreign::zero(&row.name);
    let (error, message) = row.refused(&SnapshotOptions::new());
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(
        message,
        format!(
            "cannot create /dev/mapper/{}: Device or resource busy (os error 16): there is a dm device of that name already",
            row.name
        )
    );
    assert_eq!(dm_table(&row.name), "0 2048 zero", "theirs is untouched");
    assert!(std::path::Path::new("/dev/mapper").join(&row.name).exists());
    drop(theirs);
}

#[test]
fn a_name_that_one_of_ours_has() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let cow = scene.cow("cow");
    let mut row = Row::new(&scene, "name taken by one of ours", scene.image(), &cow);
    row.name = snapshot.handles().name.clone().expect("a name").to_string();
    let (error, _) = row.refused(&SnapshotOptions::new());
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(
        snapshot
            .handles()
            .mapper
            .as_ref()
            .expect("an alias")
            .exists()
    );
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn chunk_sizes() {
    let scene = Scene::new();
    for sectors in [0u64, 3, 1 << 31] {
        let refusal = ChunkSize::new(sectors).expect_err("device-mapper takes no such chunks");
        let expected = format!(
            "cannot use chunks of {sectors} sectors: need a power of two from 1 to 2097152"
        );
        println!("bad input: chunk size {sectors}: {refusal}");
        assert_eq!(refusal.to_string(), expected);
        let done = finish(
            dmsnap()
                .args(["create", "--chunk-sectors", &sectors.to_string()])
                .arg(scene.image())
                .arg(scene.path("no COW file"))
                .arg(scene.name()),
        );
        assert_eq!(done.status.code(), Some(2), "wrong usage");
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(stderr.contains(&expected), "{stderr}");
    }
}

#[test]
fn the_command_refuses_names_everywhere() {
    for words in [["remove", "a b"], ["status", "a b"]] {
        let line = complaint(&finish(dmsnap().args(words)));
        assert!(line.starts_with("cannot name a device \"a b\": "), "{line}");
    }
}
