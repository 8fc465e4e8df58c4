//! COW files that are made for the caller.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use dmsnap::error::Refusal;
use dmsnap::{CowSize, Error, ErrorKind, SnapshotOptions};

use crate::common::fixtures::Mounted;
use crate::common::{Scene, chain, run};

fn options(replace: bool) -> SnapshotOptions {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Percent(50)).replace_cow(replace);
    options
}

#[test]
fn a_made_cow_file_is_private_sparse_and_new() {
    let scene = Scene::new();
    let cow = scene.path("made.cow");
    let snapshot = options(false).create(scene.image(), &cow, &scene.name());
    let snapshot = snapshot.expect("a snapshot");
    let made = fs::metadata(&cow).expect("it is made");
    let half = fs::metadata(scene.image()).expect("an image").len() / 2;
    assert_eq!(made.mode() & 0o7777, 0o600);
    assert!((half..half + 8192).contains(&made.len()), "{}", made.len());
    assert!(made.blocks() * 512 < 64 << 10, "{} blocks", made.blocks());
    snapshot.cleanup().expect("nobody has it open");
    let again = options(false).create(scene.image(), &cow, &scene.name());
    let error = again.expect_err("it is there");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
}

/// Such a file gets its length in two steps; neither may ask for more than the file system has.
#[test]
fn a_large_cow_file_is_made_where_no_space_can_be_set_aside_and_takes_none() {
    let scene = Scene::new();
    let name = scene.name();
    let bytes = 80 << 20;
    let large = || {
        let mut options = SnapshotOptions::new();
        options.make_cow(CowSize::Bytes(bytes));
        options
    };
    let mounted = Mounted::mount(["-t", "ramfs", "none"], &scene.path("ram"));
    let on_ramfs = mounted.at().join("cow");
    let sparse = scene.path("large.cow");
    for cow in [&on_ramfs, &sparse] {
        let snapshot = large().create(scene.image(), cow, &name);
        let snapshot =
            snapshot.unwrap_or_else(|error| panic!("{}: {}", cow.display(), chain(&error)));
        let made = fs::metadata(cow).expect("it is made");
        assert_eq!(made.len(), bytes, "{}", cow.display());
        let status = run!("dmsetup", "status", &name);
        let room = format!("/{} ", bytes / 512);
        assert!(status.contains(&room), "all of it is the disk's: {status}");
        if cow == &sparse {
            assert!(made.blocks() * 512 < 64 << 10, "{} blocks", made.blocks());
            // Its end is a hole, too.
            let file = fs::File::open(cow).expect("it is there");
            let data = nix::unistd::lseek(&file, 64 << 20, nix::unistd::Whence::SeekData);
            assert_eq!(data, Err(nix::errno::Errno::ENXIO));
        }
        snapshot.cleanup().expect("nobody has it open");
    }
    drop(mounted);
}

#[test]
fn a_cow_file_is_replaced_only_when_told_and_only_when_it_is_nobodys() {
    let scene = Scene::new();
    let create = |cow: &Path| options(true).create(scene.image(), cow, &scene.name());
    let cow = scene.file("old.cow", vec![0xa5; 1 << 20]);
    let snapshot = create(&cow).expect("a snapshot over a file of something else");
    let again = create(&cow);
    let path = || cow.clone();
    assert_eq!(again, Err(Refusal::CowInUse { path: path() }.into()));
    let bytes = fs::read(snapshot.device()).expect("the device reads");
    assert!(bytes == fs::read(scene.image()).expect("an image"), "blank");
    snapshot.cleanup().expect("nobody has it open");

    let link = scene.path("link");
    fs::hard_link(scene.image(), &link).expect("a hard link");
    let image = create(&link);
    assert!(
        matches!(image, Err(Error::Refused(Refusal::SameFile { .. }))),
        "{image:?}"
    );
    // The scene's end holds the image against what it was.
}
