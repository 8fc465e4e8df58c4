//! Cases of taking over and taking down that others' bug reports tell of.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::{Flock, FlockArg};

use dmsnap::base::LoopHandle;
use dmsnap::error::Retry;
use dmsnap::teardown::{Fate, Outcome};
use dmsnap::{Handles, ReapOptions, Teardown, WhenBusy};

use crate::common::reading::{alias_exists, dm_exists, dm_info, loop_at, number};
use crate::common::scene::IMAGE_BYTES;
use crate::common::tools::{complaint, finish, start, success};
use crate::common::{
    Foreign, Losetup, Mounted, Scene, chain, dmsnap, eventually, output, run, settle,
};
use crate::witness::{Fio, goes_on, interrupt};

/// What cannot be taken over was told as another program's device with an empty uuid; now it says why.
#[test]
fn what_cannot_be_adopted_says_why_and_is_left_as_it_is() {
    let scene = Scene::new();
    let name = scene.name();
    let origin = Losetup::attach_read_only(scene.image());
    let linear = format!("0 2048 linear {} 0", number(&origin.device));
    let device = Foreign::create(&name, &linear);
    let line = complaint(&finish(dmsnap().args(["adopt", &name])));
    println!("message: adopt a linear device: {line}");
    assert_eq!(line, format!("cannot adopt {name:?}: its target is linear"));
    let upper = scene.name();
    let cow = Losetup::attach(&scene.cow("cow"));
    let table = format!(
        "0 2048 snapshot {} {} P 8",
        number(&Path::new("/dev").join(format!("dm-{}", dm_info(&name, "minor")))),
        number(&cow.device)
    );
    let over = Foreign::create(&upper, &table);
    let line = complaint(&finish(dmsnap().args(["adopt", &upper])));
    println!("message: adopt a snapshot over no loop device: {line}");
    assert!(
        line.ends_with("is no loop device") && line.contains("its origin "),
        "{line}"
    );
    assert_eq!(dm_info(&upper, "uuid"), "");
    assert!(loop_at(&cow.device).is_some_and(|bound| !bound.autoclear));
    drop(over);
    drop(device);
}

/// What `ls` says of the link or node below /dev/mapper, and where it leads to.
fn link_of(name: &str) -> String {
    run!("ls", "-l", format!("/dev/mapper/{name}"))
}

/// Mounted and written to, it was renamed, and its link vanished.
#[test]
fn a_mounted_device_is_adopted_by_the_command_line_while_fio_writes_to_it() {
    let scene = Scene::ext4();
    let name = scene.name();
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.sparse("cow", 32 << 20));
    let sectors = (16 << 20) / 512;
    let table = format!(
        "0 {sectors} snapshot {} {} P 8",
        number(&origin.device),
        number(&cow.device)
    );
    let device = Foreign::create(&name, &table);
    settle();
    let mapper = format!("/dev/mapper/{name}");
    let mounted = Mounted::mount([mapper.as_str()], &scene.path("mnt"));
    let node = Path::new("/dev").join(format!("dm-{}", dm_info(&name, "minor")));
    let (link, file) = (link_of(&name), mounted.at().join("file"));
    let deep = [
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=4",
        "--fsync=4",
        "--do_verify=0",
    ];
    success(&mut Fio::new(&scene).job("randwrite", &file, 0, 1, &deep).0);
    let endless = [&deep[..], &["--time_based", "--runtime=100000"]].concat();
    let writer = start(&mut Fio::new(&scene).job("randwrite", &file, 0, 1, &endless).0);
    goes_on(&node);

    let json = success(dmsnap().args(["adopt", &name]));
    goes_on(&node);
    settle();
    let handles: Handles = serde_json::from_str(&json).expect("handles");
    let uuid = dm_info(&name, "uuid");
    println!(
        "adopted: {} {uuid}: {}",
        dm_info(&name, "name"),
        link_of(&name)
    );
    assert!(uuid.starts_with("DMSNAP-"), "{uuid}");
    assert_eq!(dm_info(&name, "name"), name);
    assert_eq!(link_of(&name), link);
    let its = |at| loop_at(at).is_some_and(|bound| bound.autoclear);
    assert!(its(&origin.device) && its(&cow.device));
    let again = success(dmsnap().args(["adopt", &name]));
    assert_eq!(again, json, "it is ours by now");

    interrupt(writer);
    success(&mut Fio::new(&scene).reads(&file, 0, 1).0);
    drop(mounted);
    run!("e2fsck", "-f", "-n", &mapper);
    let log = run!("dmesg");
    let its = [format!("{} ", node.display()), format!("{name} ")];
    let complaint = |line: &&str| {
        let at_fault = ["error", "Invalidating", "lost"];
        let names = |which: &String| line.contains(which.trim_start_matches("/dev/"));
        its.iter().any(names) && at_fault.iter().any(|word| line.contains(word))
    };
    assert_eq!(log.lines().find(complaint), None);

    let file = scene.file("handles.json", json);
    success(dmsnap().arg("cleanup").arg(file));
    settle();
    assert!(!dm_exists(&name) && !alias_exists(&name));
    assert!(loop_at(&origin.device).is_none() && loop_at(&cow.device).is_none());
    assert_eq!(handles.name.as_ref().map(ToString::to_string), Some(name));
    scene.assert_clean();
    drop(device);
}

/// The device is in use, and that its loop devices are too was said twice more.
#[test]
fn cleanup_of_a_disk_in_use_says_so_once() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let holder = File::open(snapshot.device()).expect("the device opens");
    let mut teardown = Teardown::new();
    let error = teardown
        .retry(Retry::ONCE)
        .cleanup(snapshot.handles())
        .expect_err("it is open");
    assert_eq!(error.left().len(), 3, "{error:?}");
    let json = serde_json::to_string(snapshot.handles()).expect("JSON");
    let file = scene.file("handles.json", json);
    let mut cleanup = dmsnap();
    let line = complaint(&finish(
        cleanup.args(["cleanup", "--deadline", "0s"]).arg(file),
    ));
    println!("message: cleanup of a disk in use: {line}");
    assert_eq!(line.matches("resource busy").count(), 1, "{line}");
    drop(holder);
    snapshot.cleanup().expect("nobody has it open");
}

/// Of loop devices that losetup attached, a deferred cleanup by names alone left both behind.
#[test]
fn a_deferred_cleanup_takes_loops_without_autoclear_along() {
    let scene = Scene::new();
    let name = scene.name();
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.cow("cow"));
    let sectors = IMAGE_BYTES / 512;
    let table = format!(
        "0 {sectors} snapshot {} {} P 8",
        number(&origin.device),
        number(&cow.device)
    );
    let device = Foreign::create(&name, &table);
    let holder = File::open(format!("/dev/mapper/{name}")).expect("the device opens");
    let mut handles = Handles::default();
    handles.name = Some(name.parse().expect("a name"));
    handles.origin_loop = Some(LoopHandle::at(&origin.device));
    handles.cow_loop = Some(LoopHandle::at(&cow.device));
    let outcome = Teardown::new().when_busy(WhenBusy::Defer).cleanup(&handles);
    assert_eq!(outcome, Ok(Outcome::Deferred { open_count: 1 }));
    assert!(
        origin.is_bound() && cow.is_bound(),
        "the device still has them"
    );
    drop(holder);
    let soon = std::time::Duration::from_secs(60);
    assert!(eventually(soon, || !dm_exists(&name)), "removed at last");
    // The kernel removes the device; the node that dmsetup made is dmsetup's to remove.
    output!("dmsetup", "mknodes", &name);
    scene.assert_clean();
    drop(device);
}

/// A snapshot finished between `keep`'s answer and the test of its maker's lock was removed.
#[test]
fn what_is_being_made_is_not_offered_to_keep() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name").to_string();
    let cow = snapshot.handles().cow_loop.as_ref().expect("a loop device");
    let maker = File::open(&cow.path).expect("it opens");
    let lock = Flock::lock(maker, FlockArg::LockExclusiveNonblock);
    let mut maker = Some(lock.expect("nobody has it locked"));
    let reaped = ReapOptions::new().reap(|info| {
        if info.name == name {
            maker = None;
        }
        false
    });
    let reaped = reaped.expect("a sweep");
    let item = reaped.iter().find(|item| item.name == name);
    assert_eq!(item.expect("it is listed").fate, Ok(Fate::InProgress));
    assert!(maker.is_some(), "it was asked about");
    drop(maker);
    snapshot.cleanup().expect("nobody has it open");
}

/// A sweep removed the upper one, told of the lower as busy, and exited with 0.
#[test]
fn a_snapshot_of_a_snapshot_is_reaped_from_the_top_down_in_one_sweep() {
    let scene = Scene::new();
    let names: Vec<_> = (0..3).map(|_| scene.name()).collect();
    let mut over = scene.image().to_owned();
    for name in &names {
        let cow = scene.cow(format!("{name}.cow"));
        let made = dmsnap::SnapshotOptions::new().create(&over, cow, name);
        over = made.expect("over a block device").device().to_owned();
    }
    let mut cleanup = dmsnap();
    cleanup.args(["remove", "--deadline", "100ms", &names[0]]);
    let line = complaint(&finish(&mut cleanup));
    println!("message: removal of what another stands on: {line}");
    let upper = format!("dm device {:?} stands on it through /dev/loop", names[1]);
    assert!(line.contains(&upper), "{line}");
    let top = Path::new("/dev").join(format!("dm-{}", dm_info(&names[2], "minor")));
    let mapped = scene.name();
    let linear = format!("0 8 linear {} 0", number(&top));
    let device = Foreign::create(&mapped, &linear);
    let mut remove = dmsnap();
    remove.args(["remove", "--deadline", "100ms", &names[2]]);
    let line = complaint(&finish(&mut remove));
    println!("message: removal of what a linear device stands on: {line}");
    assert!(
        line.contains(&format!("dm device {mapped:?} stands on it")),
        "{line}"
    );
    drop(device);

    let ours = |name: &str| names.iter().any(|each| each == name);
    let reaped = ReapOptions::new()
        .reap(|info| !ours(&info.name))
        .expect("a sweep");
    let fates = reaped.iter().filter(|item| ours(&item.name));
    let fates: Vec<_> = fates.map(|item| &item.fate).collect();
    println!("reaped: {fates:?}");
    assert_eq!(fates, [&Ok(Fate::Removed); 3]);
}

/// A FIFO in a loop device's place blocked the open for ever.
#[test]
fn a_fifo_in_place_of_a_loop_device_hangs_nothing() {
    let scene = Scene::new();
    let fifo = scene.path("fifo");
    run!("mkfifo", &fifo);
    let mut handles = Handles::default();
    handles.cow_loop = Some(LoopHandle::at(&fifo));
    let file = scene.file(
        "handles.json",
        serde_json::to_string(&handles).expect("JSON"),
    );
    let line = complaint(&finish(dmsnap().arg("cleanup").arg(file)));
    println!("message: cleanup of a FIFO: {line}");
}

/// `/proc/self/mountinfo` does not have a mount of another mount namespace.
#[test]
fn a_mount_in_another_namespace_is_named() {
    let scene = Scene::ext4();
    let snapshot = scene.snapshot_with(&dmsnap::SnapshotOptions::new());
    let (node, at) = (snapshot.device(), scene.path("mnt"));
    std::fs::create_dir(&at).expect("a mount point");
    let script = format!(
        "mount {} {} && echo ready && exec sleep 50",
        node.display(),
        at.display()
    );
    let mut command = std::process::Command::new("unshare");
    let mut there = command
        .args(["-m", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare starts");
    let mut ready = [0; 6];
    let stdout = there.stdout.as_mut().expect("it is piped");
    std::io::Read::read_exact(stdout, &mut ready).expect("it is mounted");
    let error = Teardown::new()
        .deadline(std::time::Duration::from_millis(1))
        .cleanup(snapshot.handles())
        .expect_err("it is mounted");
    println!("message: mounted elsewhere: {}", chain(&error));
    let expected = format!("mounted at {} in the mount namespace of pid ", at.display());
    assert!(chain(&error).contains(&expected), "{}", chain(&error));
    there.kill().expect("it runs");
    there.wait().expect("it ends");
    snapshot.cleanup().expect("nobody has it open");
}

/// `create | true` exited with 0: its handles were lost, and the snapshot stayed.
#[test]
fn handles_for_a_reader_that_is_gone_undo_the_snapshot() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let (reader, writer) = nix::unistd::pipe().expect("a pipe");
    drop(reader);
    let mut create = dmsnap();
    create.arg("create").arg(scene.image()).arg(&cow).arg(&name);
    let mut child = create
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
    assert!(!dm_exists(&name));
}
