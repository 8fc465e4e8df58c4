//! An image known again where its modification time says nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dmsnap::error::Refusal;
use dmsnap::{Origin, Snapshot, SnapshotOptions};

use crate::common::{Scene, run};

fn image(scene: &Scene, name: &str, first: u8, dated: Option<u64>) -> PathBuf {
    let mut bytes = vec![0; 1 << 20];
    bytes[0] = first;
    let path = scene.file(name, bytes);
    if let Some(seconds) = dated {
        run!("touch", "-d", format!("@{seconds}"), &path);
    }
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
