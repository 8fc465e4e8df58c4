//! One origin loop device for many snapshots.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use dmsnap::error::Refusal;
use dmsnap::timings::Timings;
use dmsnap::{Origin, ReapOptions, Snapshot, SnapshotOptions, adopt, cleanup};

use crate::common::reading::loops_over;
use crate::common::{Scene, eventually};

fn snapshot(scene: &Scene, origin: &Origin) -> Snapshot {
    let name = scene.name();
    let cow = scene.cow(format!("{name}.cow"));
    SnapshotOptions::new()
        .create_on(origin, cow, &name)
        .expect("a snapshot")
}

fn first_bytes(path: &Path) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    let file = fs::File::open(path).expect("it can be opened");
    file.read_exact_at(&mut bytes, 4096)
        .expect("it has so much");
    bytes
}

#[test]
fn snapshots_share_the_loop_device_and_the_last_user_takes_it_along() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let snapshots = [(); 3].map(|()| snapshot(&scene, &origin));
    assert_eq!(loops_over(scene.image()), 1);
    for each in &snapshots {
        assert_eq!(first_bytes(each.device()), first_bytes(scene.image()));
        let handle = each.handles().origin_loop.as_ref().expect("a loop");
        assert_eq!(handle.path, origin.device());
    }
    let [first, second, third] = snapshots;
    first.cleanup().expect("nobody has it open");
    assert_eq!(loops_over(scene.image()), 1, "others use it");
    drop(origin);
    second.cleanup().expect("nobody has it open");
    assert_eq!(loops_over(scene.image()), 1, "the third uses it");
    let adopted = adopt(third.handles().name.as_ref().expect("a name")).expect("it is ours");
    assert_eq!(&adopted, third.handles());
    cleanup(&adopted).expect("nobody has it open");
    assert!(
        eventually(Duration::from_secs(60), || loops_over(scene.image()) == 0),
        "autoclear"
    );
}

#[test]
fn an_origin_that_is_open_outlives_its_snapshots_and_keeps_nobody_waiting() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    for _ in 0..2 {
        let made = snapshot(&scene, &origin);
        let (cleaned, timings) = Timings::of(|| made.cleanup());
        cleaned.expect("nobody has it open");
        let about = timings
            .calls
            .iter()
            .filter(|call| call.on == origin.device());
        let looks = about.count();
        assert!(looks <= 4, "it waited for the origin:\n{timings}");
        assert_eq!(loops_over(scene.image()), 1);
    }
    let made = snapshot(&scene, &origin);
    let name = made.handles().name.clone().expect("a name");
    let reaped = ReapOptions::new().reap(|info| info.name != name.as_str());
    assert!(
        reaped
            .expect("a sweep")
            .iter()
            .all(|item| item.fate.is_ok())
    );
}

#[test]
fn the_image_is_known_by_what_it_is_and_not_by_its_path() {
    let scene = Scene::new();
    let other_name = scene.path("hard link.img");
    fs::hard_link(scene.image(), &other_name).expect("the same directory");
    let origin = Origin::open(scene.image()).expect("an image");
    let again = Origin::open(&other_name).expect("the same image");
    assert_eq!(origin.device(), again.device());
    // A snapshot of the ordinary kind has a loop device of its own, and its removal waits for that one only.
    let own = scene.snapshot();
    assert_eq!(loops_over(scene.image()), 2);
    own.cleanup().expect("nobody has it open");
    assert_eq!(loops_over(scene.image()), 1);
    // Another file at the same path is another image.
    let moved = scene.path("moved.img");
    fs::rename(scene.image(), &moved).expect("the same directory");
    fs::copy(&moved, scene.image()).expect("room for a copy");
    let copy = Origin::open(scene.image()).expect("another image");
    assert_ne!(copy.device(), origin.device());
    drop(copy);
    fs::rename(&moved, scene.image()).expect("the same directory");
}

#[test]
fn what_a_create_refuses_a_create_on_a_shared_origin_refuses_too() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let refused = |cow: &Path, name: &str| {
        let made = SnapshotOptions::new().create_on(&origin, cow, name);
        match made.expect_err("refused") {
            dmsnap::Error::Refused(refusal) => refusal,
            other => panic!("{other}"),
        }
    };
    let link = scene.path("link");
    fs::hard_link(scene.image(), &link).expect("the same directory");
    assert!(matches!(
        refused(&link, "dmsnap-test-x"),
        Refusal::SameFile { .. }
    ));
    let pooled = refused(&scene.cow("cow"), "dmsnap-pool-x");
    assert!(matches!(pooled, Refusal::Name(_)));
    let live = snapshot(&scene, &origin);
    let its = scene.path(format!(
        "{}.cow",
        live.handles().name.as_ref().expect("a name")
    ));
    assert!(matches!(
        refused(&its, "dmsnap-test-y"),
        Refusal::CowInUse { .. }
    ));
    live.cleanup().expect("nobody has it open");
    // The marked store goes on over the same image, shared or not.
    let again = SnapshotOptions::new().create(scene.image(), &its, &scene.name());
    again
        .expect("the same image")
        .cleanup()
        .expect("nobody has it open");
}
