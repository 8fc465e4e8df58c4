//! What a watch that grows COW files must not be stopped by: a log on a full disk, one file system of many.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dmsnap::{SnapshotOptions, Store};

use crate::common::filling::{Direct, usage_of};
use crate::common::fixtures::{Losetup, Mounted};
use crate::common::scene::ext4;
use crate::common::tools::start;
use crate::common::{Scene, dmsnap, eventually, run};

const SMALL: u64 = 256 << 10;
/// More than four fifths of it.
const MOST: u64 = 224 << 10;
const SOON: Duration = Duration::from_secs(60);

fn full(scene: &Scene, cow: PathBuf) -> (dmsnap::Snapshot, String) {
    let name = scene.name();
    fs::File::create_new(&cow)
        .and_then(|file| file.set_len(SMALL))
        .expect("a sparse file");
    let options = SnapshotOptions::new()
        .store(Store::PersistentOverflow)
        .clone();
    let snapshot = options.create(scene.image(), cow, &name);
    (snapshot.expect("a snapshot"), name)
}

fn total(name: &str) -> u64 {
    usage_of(name).total.count() * 512
}

// The first line that could not be written ended the watch, and the guest's writes failed.
#[test]
fn a_watch_whose_log_is_full_grows_on_and_says_so_at_the_end() {
    let scene = Scene::new();
    let (snapshot, name) = full(&scene, scene.path("cow"));
    let ours = dmsnap();
    let mut watch = std::process::Command::new("sh");
    watch.args(["-c", "exec \"$0\" watch --grow-by 256K \"$1\" >/dev/full"]);
    let watch = start(watch.arg(ours.get_program()).arg(&name));
    let device = Direct::open(snapshot.device());
    for round in 0..3 {
        let before = total(&name);
        device
            .write(0x11, round * SMALL, MOST)
            .expect("there is room");
        assert!(
            eventually(SOON, || total(&name) > before),
            "round {round}: grown"
        );
    }
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
    let ended = watch.join();
    let said = String::from_utf8_lossy(&ended.stderr);
    println!("watch with a full log: {}: {said}", ended.status);
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(said.matches("No space left on device").count(), 1, "{said}");
}

/// A frozen file system, thawed with the value.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn freeze(at: &'a Path) -> Self {
        run!("fsfreeze", "--freeze", at);
        Self(at)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run!("fsfreeze", "--unfreeze", self.0);
    }
}

// All stood still for the one whose file system was frozen.
#[test]
fn a_watch_over_many_is_not_held_up_by_one_on_a_frozen_file_system() {
    let scene = Scene::new();
    let disk = scene.path("host");
    ext4(&disk, 16 << 20);
    let disk = Losetup::attach(&disk);
    let device = disk.device.display().to_string();
    let host = Mounted::mount([device.as_str()], &scene.path("at"));
    let (there, stuck) = full(&scene, host.at().join("cow"));
    let (here, well) = full(&scene, scene.path("cow"));
    let watch = start(dmsnap().args(["watch", "--grow-by", "256K", &stuck, &well]));
    let before = (total(&stuck), total(&well));
    // Once it has grown one, it has probed both file systems, and a freeze does not stop it there.
    let writer = Direct::open(here.device());
    writer.write(0x11, 0, MOST).expect("there is room");
    assert!(eventually(SOON, || total(&well) > before.1), "grown");

    let frozen = Frozen::freeze(host.at());
    // What the kernel gives out for it counts before it is written.
    let to = format!("of={}", there.device().display());
    let mut dd = std::process::Command::new("dd");
    let dd = start(dd.args(["if=/dev/zero", &to, "bs=224K", "count=1", "oflag=direct"]));
    let usage = || usage_of(&stuck);
    assert!(
        eventually(SOON, || usage().percent() >= 80),
        "{:?}",
        usage()
    );
    // The watch comes to it within a second; no later than that it was held up.
    std::thread::sleep(Duration::from_secs(2));
    let now = total(&well);
    writer.write(0x22, SMALL, MOST).expect("there is room");
    assert!(
        eventually(SOON, || total(&well) > now),
        "the other is grown"
    );
    assert_eq!(total(&stuck), before.0, "it is frozen");
    drop(frozen);

    assert!(
        eventually(SOON, || total(&stuck) > before.0),
        "grown when it can be"
    );
    assert!(dd.join().status.success());
    drop(writer);
    there.cleanup().expect("nobody has it open");
    here.cleanup().expect("nobody has it open");
    let ended = watch.join();
    let said = String::from_utf8_lossy(&ended.stdout);
    println!(
        "watch over a frozen one and another: {}:\n{said}",
        ended.status
    );
    assert!(ended.status.success());
    for name in [&stuck, &well] {
        assert!(said.contains(&format!("{name}: grown: ")), "{said}");
    }
    drop(host);
    drop(disk);
}
