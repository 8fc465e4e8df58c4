//! What the library takes the kernel's word for, held against this kernel.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::common::reading::{loops_below, number};
use crate::common::tools::{finish, success};
use crate::common::{Losetup, Scene, dmsnap, dmsnap_under, output, run, udev};

/// Runs `dmsnap create` and kills it on the way into the `nth` call of `syscall`.
fn killed_at(scene: &Scene, name: &str, cow: &Path, syscall: &str, nth: usize) -> Output {
    let log = scene.path("killed.log");
    let inject = format!("inject={syscall}:signal=KILL:when={nth}");
    let log = log.to_str().expect("UTF-8");
    let mut command = dmsnap_under(&["strace", "-f", "-o", log, "-e", &inject]);
    finish(command.arg("create").args([scene.image(), cow]).arg(name))
}

/// The ioctls of one `dmsnap create`, in order.
fn ioctls(scene: &Scene) -> Vec<String> {
    let log = scene.path("ioctls.log");
    let word = log.to_str().expect("UTF-8");
    let (name, cow) = (scene.name(), scene.cow("ioctls.cow"));
    let mut command = dmsnap_under(&["strace", "-f", "-o", word, "-e", "trace=ioctl"]);
    success(command.arg("create").args([scene.image(), &cow]).arg(&name));
    success(dmsnap().args(["remove", &name]));
    let text = fs::read_to_string(&log).expect("strace wrote it");
    text.lines()
        .filter(|line| line.contains(" ioctl("))
        .map(str::to_owned)
        .collect()
}

// drivers/block/loop.c, lo_release: LO_FLAGS_AUTOCLEAR unbinds at the last close, a killed process's too.
#[test]
fn a_kill_between_attaching_and_the_table_unbinds_the_loops() {
    let scene = Scene::new();
    let ioctls = ioctls(&scene);
    let first = |what: &str| {
        let found = ioctls.iter().position(|call| call.contains(what));
        1 + found.unwrap_or_else(|| panic!("no {what} in {ioctls:#?}"))
    };
    // On the way into the call after LOOP_CONFIGURE, and on the way into the one that makes the dm device.
    let bound = first("LOOP_CONFIGURE");
    for nth in (bound + 1)..=first("DM_DEV_CREATE") {
        let (name, cow) = (scene.name(), scene.cow(format!("{nth}.cow")));
        let killed = killed_at(&scene, &name, &cow, "ioctl", nth);
        assert!(!killed.status.success(), "{killed:?}");
        assert!(
            loops_below(scene.dir()).is_empty() || udev(),
            "{nth}: {:?}",
            ioctls[nth - 1]
        );
        scene.assert_clean();
    }
}

// fs/locks.c: a flock belongs to the open file description, which the loop device keeps.
#[test]
fn a_loop_device_keeps_the_lock_of_a_process_that_is_gone() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let free = || {
        output!("flock", "--nonblock", &cow, "true")
            .status
            .success()
    };
    assert!(free());
    success(
        dmsnap()
            .arg("create")
            .args([scene.image(), &cow])
            .arg(&name),
    );
    assert!(!free(), "the creator has ended, and its lock lives on");
    assert!(
        !output!("flock", "--nonblock", scene.image(), "true")
            .status
            .success(),
        "the image has a shared one"
    );
    assert!(
        output!("flock", "--nonblock", "--shared", scene.image(), "true")
            .status
            .success()
    );
    success(dmsnap().args(["remove", &name]));
    scene.assert_clean();
    assert!(free(), "autoclear has closed the file");
}

// drivers/block/loop.c, loop_configure: a read-only flag or descriptor makes the loop device read-only.
#[test]
fn the_origins_loop_device_cannot_be_written() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let origin = snapshot.handles().origin_loop.clone().expect("a loop").path;
    let done = output!(
        "dd",
        "if=/dev/zero",
        format!("of={}", origin.display()),
        "count=1",
        "conv=fsync"
    );
    assert!(!done.status.success(), "{done:?}");
    assert_eq!(run!("blockdev", "--getro", &origin), "1");
    snapshot.cleanup().expect("nobody has it open");
}

// drivers/base/devtmpfs.c: the node is there when add_disk returns, which DM_TABLE_LOAD (5.15) or CREATE waits for.
#[test]
fn the_node_is_there_when_the_library_returns() {
    let scene = Scene::new();
    for _ in 0..10 {
        let snapshot = scene.snapshot();
        let node = snapshot.handles().dev.expect("a number").minor();
        let node = format!("/dev/dm-{node}");
        assert_eq!(snapshot.device(), Path::new(&node));
        assert_eq!(
            Some(number(snapshot.device())),
            snapshot.handles().dev.map(|dev| dev.to_string())
        );
        snapshot.cleanup().expect("nobody has it open");
        assert!(!Path::new(&node).exists(), "and gone when cleanup returns");
    }
}

// drivers/md/dm.c, close_table_device: DM_DEV_REMOVE is the last close of the loops, and it does not return before.
#[test]
fn removing_the_device_unbinds_the_loops_before_it_returns() {
    let scene = Scene::new();
    for _ in 0..10 {
        let name = scene.snapshot().into_handles().name.expect("a name");
        run!("dmsetup", "remove", name.as_str());
        // udevd may have them open for a moment.
        assert!(loops_below(scene.dir()).is_empty() || udev());
        dmsnap::remove(name.as_str())
            .map(drop)
            .expect("already gone");
        scene.assert_clean();
    }
}

// drivers/block/loop.c, loop_configure: EBUSY for a bound device, and the binding stays as it is.
#[test]
fn a_bound_loop_device_is_never_taken() {
    let scene = Scene::new();
    let theirs = Losetup::attach(&scene.cow("theirs"));
    let snapshot = scene.snapshot();
    let ours = loops_below(scene.dir());
    assert_eq!(ours.len(), 3, "{ours:?}");
    snapshot.cleanup().expect("nobody has it open");
    assert!(theirs.is_bound());
}

// drivers/md/dm-snap-persistent.c, persistent_read_metadata: the header is written when the table is loaded.
#[test]
fn a_fresh_cow_file_gets_its_header_at_once() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name");
    let cow = scene.path(format!("{name}.cow"));
    snapshot.cleanup().expect("nobody has it open");
    let header = fs::read(&cow).expect("readable");
    let word = |nth: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[nth * 4 + byte]));
    assert_eq!(&header[..4], b"SnAp");
    assert_eq!(
        [word(1), word(2), word(3)],
        [1, 1, 8],
        "valid, version, chunk"
    );
}
