//! An image known again where its modification time says nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dmsnap::base::Digest;
use dmsnap::error::Refusal;
use dmsnap::snapshot::OriginOptions;
use dmsnap::{Origin, Snapshot, SnapshotOptions};

use crate::common::tools::{complaint, finish, success};
use crate::common::{Mounted, Scene, dmsnap, run};

fn image(scene: &Scene, name: &str, first: u8, dated: Option<u64>) -> PathBuf {
    let mut bytes = vec![0; 1 << 20];
    bytes[0] = first;
    let path = scene.file(name, bytes);
    // The kernel's own clock for files hits a whole second now and then.
    let time = dated.map_or_else(SystemTime::now, |seconds| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    });
    let file = File::options().write(true).open(&path).expect("writable");
    file.set_modified(time).expect("it can be set");
    path
}

fn create(scene: &Scene, image: &Path, cow: &Path) -> dmsnap::Result<Snapshot> {
    SnapshotOptions::new().create(image, cow, &scene.name())
}

fn written(snapshot: Snapshot) {
    run!(
        "dd",
        "if=/dev/urandom",
        format!("of={}", snapshot.device().display()),
        "bs=4096",
        "seek=9",
        "count=1"
    );
    snapshot.cleanup().expect("nobody has it open");
}

// Images of a Nix or OSTree store all have one modification time, and so have reproducible builds.
#[test]
fn another_image_of_equal_size_and_time_is_refused() {
    let scene = Scene::new();
    for dated in [0, 1, 1_700_000_000] {
        let a = image(&scene, &format!("a{dated}"), b'A', Some(dated));
        let b = image(&scene, &format!("b{dated}"), b'B', Some(dated));
        let cow = scene.cow(format!("cow{dated}"));
        written(create(&scene, &a, &cow).expect("a snapshot"));
        let error = create(&scene, &b, &cow).expect_err("another image");
        println!("equal size and time: {error}");
        assert!(
            matches!(
                &error,
                dmsnap::Error::Refused(Refusal::OriginDiffers { .. })
            ),
            "{error:?}"
        );
        written(create(&scene, &a, &cow).expect("the same image"));
        let shared = Origin::open(&b).expect("an origin");
        let made = SnapshotOptions::new().create_on(&shared, &cow, &scene.name());
        made.expect_err("another image");
    }
}

#[test]
fn a_faithful_copy_with_another_time_is_taken_and_a_changed_one_is_not() {
    let scene = Scene::new();
    let a = image(&scene, "a", b'A', None);
    let cow = scene.cow("cow");
    // An origin that is opened has a fingerprint; a create alone reads no more of an image whose time says enough.
    let origin = Origin::open(&a).expect("an origin");
    let made = SnapshotOptions::new().create_on(&origin, &cow, &scene.name());
    written(made.expect("a snapshot"));
    drop(origin);
    let copy = scene.path("copy");
    fs::copy(&a, &copy).expect("room");
    let later = SystemTime::now() + Duration::from_secs(100);
    let file = File::options().write(true).open(&copy).expect("writable");
    file.set_modified(later).expect("it can be set");
    drop(file);
    written(create(&scene, &copy, &cow).expect("a faithful copy"));
    let origin = Origin::open(&copy).expect("an origin");
    let made = SnapshotOptions::new().create_on(&origin, &cow, &scene.name());
    written(made.expect("a faithful copy"));
    let changed = image(&scene, "changed", b'C', None);
    let error = create(&scene, &changed, &cow).expect_err("another image");
    println!("changed image: {error}");
}

// The image is written in place while an Origin is open: what its COW files were marked with was no longer so.
#[test]
fn an_origin_whose_image_was_rewritten_makes_no_snapshot() {
    let scene = Scene::new();
    let a = image(&scene, "a", b'A', None);
    let origin = Origin::open(&a).expect("an origin");
    let file = File::options().write(true).open(&a).expect("writable");
    let modified = || {
        file.metadata()
            .and_then(|now| now.modified())
            .expect("a time")
    };
    let before = modified();
    // The kernel's file times go by its ticks, some milliseconds each: it may be the same one still.
    while modified() == before {
        std::os::unix::fs::FileExt::write_all_at(&file, b"changed", 5000).expect("it is there");
    }
    drop(file);
    let cow = scene.cow("cow");
    let made = SnapshotOptions::new().create_on(&origin, &cow, &scene.name());
    let error = made.expect_err("the image is another one");
    println!("rewritten: {error}");
    assert!(matches!(
        error,
        dmsnap::Error::Refused(Refusal::OriginChanged { .. })
    ));
}

/// fsverity, which the guest has with fio.
fn fsverity(verb: &str, file: &Path) -> String {
    let program = std::env::current_dir()
        .expect("there is one")
        .join("fsverity");
    assert!(
        fs::exists(&program).expect("it can be looked for"),
        "no fsverity here: `tests/vm/run exec --fio` and `test` bring it"
    );
    run!(program, verb, file)
}

/// An image with one byte in a place that the fingerprint leaves out.
fn image_in(dir: &Path, name: &str, byte: u8, seconds: u64) -> PathBuf {
    let mut bytes = vec![0; 1 << 20];
    bytes[100_000] = byte;
    let path = dir.join(name);
    fs::write(&path, bytes).expect("room");
    run!("touch", "-d", format!("@{seconds}"), &path);
    path
}

fn has_changed(error: &dmsnap::Error) -> bool {
    matches!(error, dmsnap::Error::Refused(Refusal::OriginChanged { .. }))
}

fn differs(error: &dmsnap::Error) -> bool {
    matches!(error, dmsnap::Error::Refused(Refusal::OriginDiffers { .. }))
}

// fs-verity knows every byte.
#[test]
fn an_image_with_fs_verity_is_known_by_the_kernels_digest() {
    let scene = Scene::new();
    let disk = scene.sparse("verity.ext4", 32 << 20);
    run!(
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "verity", &disk
    );
    let disk = disk.to_str().expect("UTF-8");
    let mounted = Mounted::mount(["-o", "loop", disk], &scene.path("verity"));
    let measured = |name: &str, byte, seconds| {
        let image = image_in(mounted.at(), name, byte, seconds);
        fsverity("enable", &image);
        run!("touch", "-d", format!("@{seconds}"), &image);
        image
    };
    let cow = scene.cow("cow");
    let a = measured("a", b'A', 1);
    written(create(&scene, &a, &cow).expect("a snapshot"));
    let digest = fsverity("measure", &a);
    let digest = digest
        .trim_start_matches("sha256:")
        .split(' ')
        .next()
        .unwrap_or_default();
    let bytes = fs::read(&cow).expect("readable");
    let kept: String = bytes[296..328]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    println!("fs-verity's digest in the COW file: {kept}");
    assert_eq!(kept, digest, "as fsverity measures it");

    let other = measured("other", b'B', 1);
    let error = create(&scene, &other, &cow).expect_err("another image");
    println!("fs-verity, equal size and time: {error}");
    assert!(differs(&error), "{error:?}");
    let shared = Origin::open(&other).expect("an origin");
    let made = SnapshotOptions::new().create_on(&shared, &cow, &scene.name());
    assert!(differs(&made.expect_err("another image")));
    drop(shared);
    let later = measured("later", b'B', 2);
    let error = create(&scene, &later, &cow).expect_err("another image");
    assert!(has_changed(&error), "{error:?}");
    written(create(&scene, &measured("copy", b'A', 2), &cow).expect("a faithful copy"));
    // Where there is no fs-verity, the fingerprint has to do.
    let plain = image_in(scene.dir(), "plain", b'A', 3);
    written(create(&scene, &plain, &cow).expect("a faithful copy"));
    let changed = image(&scene, "changed", b'C', Some(3));
    let error = create(&scene, &changed, &cow).expect_err("another image");
    assert!(differs(&error), "{error:?}");
    drop(mounted);
}

#[test]
fn a_digest_of_the_callers_decides_whatever_the_times_say() {
    let scene = Scene::new();
    let (one, two) = (Digest::from([1; 32]), Digest::from([2; 64]));
    let with = |digest: Digest| {
        let mut options = SnapshotOptions::new();
        options.digest(digest);
        options
    };
    let a = image(&scene, "a", b'A', None);
    let cow = scene.cow("cow");
    written(create(&scene, &a, &cow).expect("a snapshot"));
    // The COW file is marked with it when it is first given.
    let made = with(one).create(&a, &cow, &scene.name());
    written(made.expect("the same image"));
    let copy = scene.path("copy");
    fs::copy(&a, &copy).expect("room");
    let error = create(&scene, &copy, &cow).expect_err("nothing says that it is the same");
    assert!(has_changed(&error), "{error:?}");
    let made = with(one).create(&copy, &cow, &scene.name());
    written(made.expect("a faithful copy"));
    // Now it is marked with the copy's time, which is said to be another image's.
    let other = Digest::from([2; 32]);
    let error = with(other).create(&copy, &cow, &scene.name());
    let error = error.expect_err("another image");
    println!("another digest: {error}");
    assert!(differs(&error), "{error:?}");
    let origin = OriginOptions::new().digest(other).open(&copy);
    let origin = origin.expect("an origin");
    let made = SnapshotOptions::new().create_on(&origin, &cow, &scene.name());
    assert!(differs(&made.expect_err("another image")));
    drop(origin);
    // One of another length says nothing about it: the times do, and the fingerprint.
    let made = with(two).create(&copy, &cow, &scene.name());
    written(made.expect("the same image"));
    let made = with(one).create(&a, &cow, &scene.name());
    written(made.expect("a faithful copy"));

    // The command line: every job over the two files.
    let (hex, wrong) = (one.to_string(), other.to_string());
    let export = |digest: &str, out: &str| {
        let mut export = dmsnap();
        export.args(["export", "--digest", digest, "--origin"]);
        export.arg(&a).arg("--cow").arg(&cow).arg(scene.path(out));
        export
    };
    success(&mut export(&hex, "out"));
    let line = complaint(&finish(&mut export(&wrong, "none")));
    println!("message: an export with another digest: {line}");
    assert!(line.contains("is another one"), "{line}");
    let name = scene.name();
    let mut made = dmsnap();
    made.args(["create", "--digest", &hex]).arg(&a).arg(&cow);
    success(made.arg(&name));
    success(dmsnap().args(["remove", &name]));
    let mut merge = dmsnap();
    merge.args(["merge", "--digest", &wrong, "--origin"]);
    let line = complaint(&finish(merge.arg(&a).arg("--cow").arg(&cow)));
    println!("message: a merge with another digest: {line}");
    assert!(line.contains("is another one"), "{line}");
    let line = String::from_utf8_lossy(&finish(dmsnap().args(["create", "--digest", "12"])).stderr)
        .into_owned();
    assert!(line.contains("64 or 128 hexadecimal digits"), "{line}");
}
