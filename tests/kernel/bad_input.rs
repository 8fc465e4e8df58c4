//! Bad input: files that cannot serve as origin image or COW file.

use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use dmsnap::error::Refusal;
use dmsnap::{Error, ErrorKind, SnapshotOptions};

use crate::common::reading::loops_below;
use crate::common::rows::Row;
use crate::common::scene::{IMAGE_BYTES, content, patterned};
use crate::common::{Mounted, Scene, run};

fn refused(scene: &Scene, what: &str, origin: &Path, cow: &Path) -> (Error, String) {
    Row::new(scene, what, origin, cow).refused(&SnapshotOptions::new())
}

#[test]
fn missing_files() {
    let scene = Scene::new();
    let (cow, missing) = (scene.cow("cow"), scene.path("missing"));
    for (what, origin, cow) in [
        ("image missing", missing.as_path(), cow.as_path()),
        ("COW missing", scene.image(), &missing),
        ("image below a file", &cow.join("x"), &cow),
    ] {
        let (error, message) = refused(&scene, what, origin, cow);
        assert_eq!(error.kind(), ErrorKind::Gone, "{message}");
    }
    let (_, message) = refused(&scene, "image missing, again", &missing, &cow);
    let expected = format!(
        "cannot open {}: No such file or directory (os error 2)",
        missing.display()
    );
    assert_eq!(message, expected);
}

#[test]
fn things_that_are_no_files() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let (directory, fifo) = (scene.path("directory"), scene.path("fifo"));
    fs::create_dir(&directory).expect("a directory");
    run!("mkfifo", &fifo);
    let null = Path::new("/dev/null");

    let (_, message) = refused(&scene, "image is a directory", &directory, &cow);
    assert_eq!(
        message,
        format!("{directory:?} is a directory, not a file or a block device")
    );
    let (error, message) = refused(&scene, "COW is a directory", scene.image(), &directory);
    assert!(
        matches!(error, Error::Refused(Refusal::NotAFile { .. })) || error.errno() == Some(21),
        "{message}"
    );
    for (what, origin, cow) in [
        ("image is a FIFO", fifo.as_path(), cow.as_path()),
        ("COW is a FIFO", scene.image(), &fifo),
    ] {
        let (_, message) = refused(&scene, what, origin, cow);
        assert_eq!(
            message,
            format!("{fifo:?} is a FIFO, not a file or a block device")
        );
    }
    for (what, origin, cow) in [
        ("image is a character device", null, cow.as_path()),
        ("COW is a character device", scene.image(), null),
    ] {
        let (_, message) = refused(&scene, what, origin, cow);
        assert_eq!(
            message,
            "\"/dev/null\" is a character device, not a file or a block device"
        );
    }
}

#[test]
fn images_without_a_whole_sector() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    for (what, bytes) in [("image empty", 0), ("image shorter than a sector", 511)] {
        let image = scene.sparse(format!("{bytes}.img"), bytes);
        let (_, message) = refused(&scene, what, &image, &cow);
        assert_eq!(
            message,
            format!("origin image {image:?} has {bytes} bytes, less than one 512-byte sector")
        );
    }
}

#[test]
fn cow_files_too_small() {
    let scene = Scene::new();
    for (what, bytes) in [
        ("COW empty", 0),
        ("COW shorter than a sector", 100),
        ("COW too small", 3 * 4096 - 1),
    ] {
        let cow = scene.sparse(format!("{bytes}.cow"), bytes);
        let (_, message) = refused(&scene, what, scene.image(), &cow);
        assert_eq!(
            message,
            format!(
                "COW file {cow:?} has {bytes} bytes, too small: chunks of 8 sectors need at least 12288 bytes"
            )
        );
    }
    // The least that is taken works, and holds one chunk.
    let cow = scene.sparse("least.cow", 3 * 4096);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("it is large enough");
    let written = File::options()
        .write(true)
        .open(snapshot.device())
        .and_then(|device| {
            std::os::unix::fs::FileExt::write_all_at(&device, &[1; 4096], 0)?;
            device.sync_all()
        });
    written.expect("one chunk fits");
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_cow_file_that_is_no_multiple_of_a_sector_loses_its_tail() {
    let scene = Scene::new();
    let cow = scene.sparse("cow", (8 << 20) + 100);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    println!(
        "bad input: COW not a multiple of 512: (works) {:?}",
        snapshot.warnings()
    );
    snapshot.cleanup().expect("nobody has it open");
    let length = fs::metadata(&cow).expect("the COW file").len();
    assert_eq!(length, (8 << 20) + 100);
}

#[test]
fn unreadable_files() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    // Root may read everything, so the kernel's answer is put into its mouth.
    for (what, path) in [
        ("image unreadable", scene.image()),
        ("COW unreadable", cow.as_path()),
    ] {
        let row = Row::new(&scene, what, scene.image(), &cow);
        let path = path.to_str().expect("UTF-8");
        let log = scene.path("strace.log");
        let message = row.refused_under(&[
            "strace",
            "-o",
            log.to_str().expect("UTF-8"),
            "-P",
            path,
            "-e",
            "inject=openat:error=EACCES",
        ]);
        assert_eq!(
            message,
            format!("cannot open {path}: Permission denied (os error 13)")
        );
    }
}

#[test]
fn read_only_cow_files() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    fs::set_permissions(&cow, Permissions::from_mode(0o444)).expect("it is ours");
    let (_, message) = refused(&scene, "COW read-only by its mode", scene.image(), &cow);
    assert_eq!(
        message,
        format!("COW file {cow:?} is read-only (mode 0444)")
    );

    let at = scene.path("mnt");
    let mounted = Mounted::mount(["-t", "tmpfs", "none"], &at);
    let cow = mounted.at().join("cow");
    let file = File::create(&cow).expect("a new file");
    file.set_len(8 << 20).expect("room for a sparse file");
    drop(file);
    run!("mount", "-o", "remount,ro", mounted.at());
    let (error, message) = refused(&scene, "COW on a read-only mount", scene.image(), &cow);
    assert_eq!(
        message,
        format!(
            "cannot open {}: Read-only file system (os error 30)",
            cow.display()
        )
    );
    assert_eq!(error.errno(), Some(30));
}

#[test]
fn a_read_only_image_is_the_best_of_images() {
    let scene = Scene::new();
    fs::set_permissions(scene.image(), Permissions::from_mode(0o444)).expect("it is ours");
    scene.snapshot().cleanup().expect("nobody has it open");
}

#[test]
fn one_file_as_both() {
    let scene = Scene::new();
    let image = scene.image();
    let (hard, soft) = (scene.path("hard"), scene.path("soft"));
    fs::hard_link(image, &hard).expect("a hard link");
    symlink(image, &soft).expect("a symlink");
    let bound = scene.file("bound", "");
    let _bind = Mounted::bind(image, &bound);
    for (what, cow) in [
        ("COW is the image", image),
        ("COW is a hard link to the image", &hard),
        ("COW is a symlink to the image", &soft),
        ("COW is a bind mount of the image", &bound),
    ] {
        let (_, message) = refused(&scene, what, image, cow);
        assert_eq!(
            message,
            format!("COW file {cow:?} and origin image {image:?} are the same file")
        );
    }
}

#[test]
fn an_image_that_changed_since() {
    let scene = Scene::new();
    let (cow, image) = (scene.cow("cow"), scene.path("another.img"));
    patterned(&image, IMAGE_BYTES);
    let first = SnapshotOptions::new()
        .create(&image, &cow, &scene.name())
        .expect("a snapshot")
        .into_handles();
    dmsnap::cleanup(&first).expect("nobody has it open");
    let mut options = SnapshotOptions::new();
    options.expect_origin(first.origin.expect("an identity"));
    let again = options
        .create(&image, &cow, &scene.name())
        .expect("it is still the same");
    again.cleanup().expect("nobody has it open");

    patterned(&image, IMAGE_BYTES * 2);
    let row = Row::new(&scene, "image changed since", &image, &cow);
    let (error, message) = row.refused(&options);
    assert!(
        matches!(error, Error::Refused(Refusal::OriginChanged { .. })),
        "{message}"
    );
    assert!(
        message.starts_with(&format!(
            "origin image {image:?} has changed: {} bytes modified at ",
            IMAGE_BYTES * 2
        )),
        "{message}"
    );
}

#[test]
fn odd_paths_work() {
    let scene = Scene::new();
    let odd = PathBuf::from(std::ffi::OsString::from_vec(b"a b\n'\xff\xfe\"".to_vec()));
    for name in [Path::new("a b"), &odd] {
        let directory = scene.path(name);
        fs::create_dir(&directory).expect("any bytes name a directory");
        let image = directory.join("an image");
        patterned(&image, IMAGE_BYTES);
        let cow = scene.cow(Path::new(name).join("a COW file"));
        let snapshot = SnapshotOptions::new()
            .create(&image, &cow, &scene.name())
            .expect("a snapshot");
        assert_eq!(content(snapshot.device()), content(&image));
        let backing: Vec<_> = loops_below(&directory)
            .into_iter()
            .map(|bound| bound.backing)
            .collect();
        assert!(
            backing.contains(&image) && backing.contains(&cow),
            "{backing:?}"
        );
        println!("bad input: path {name:?}: (works)");
        snapshot.cleanup().expect("nobody has it open");
    }
}
