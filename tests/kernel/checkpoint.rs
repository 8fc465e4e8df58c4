//! Checkpoints of running disks, and forks of what they froze.
//!
//! What a layer and a fork hold is said by md5sum, e2fsck and a mount, what the kernel has by dmsetup.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dmsnap::error::{FreezeObstacle, LayerRefusal, Refusal};
use dmsnap::snapshot::{CheckpointOptions, Layer};
use dmsnap::store::ExceptionStore;
use dmsnap::{CowSize, Error, ErrorKind, Origin, Snapshot, SnapshotOptions};

use crate::common::reading::{dm_exists, dm_info, loops_over};
use crate::common::tools::{finish, success};
use crate::common::{Mounted, Scene, chain, dmsnap, dmsnap_under, eventually, output, run, settle};
use crate::facts::handover::{Writer, assert_files};

const COW: CowSize = CowSize::WorstCase;

/// Nothing that is waited for here takes so long.
pub(crate) const SOON: std::time::Duration = std::time::Duration::from_secs(60);

pub(crate) fn snapshot(scene: &Scene) -> Snapshot {
    let name = scene.name();
    let cow = scene.path(format!("{name}.cow"));
    let made = SnapshotOptions::new()
        .make_cow(COW)
        .create(scene.image(), cow, &name);
    made.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

pub(crate) fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

pub(crate) fn freeze(scene: &Scene, snapshot: &Snapshot) -> (String, Layer) {
    let name = scene.name();
    let cow = scene.path(format!("{name}.cow"));
    let frozen = CheckpointOptions::new()
        .make_cow(COW)
        .checkpoint(snapshot, &name, cow);
    (
        name,
        frozen.unwrap_or_else(|error| panic!("{}", chain(&error))),
    )
}

pub(crate) fn fork(scene: &Scene, layer: &Layer) -> Snapshot {
    let name = scene.name();
    let cow = scene.path(format!("{name}.cow"));
    let made = SnapshotOptions::new()
        .make_cow(COW)
        .create_on(layer.origin(), cow, &name);
    made.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The MD5 of a device, read past the page cache.
pub(crate) fn sum(device: &Path) -> String {
    let device = device.to_str().expect("UTF-8");
    run!(
        "sh",
        "-c",
        format!("dd if={device} bs=1M iflag=direct 2>/dev/null | md5sum")
    )
}

/// The device's own node.
pub(crate) fn node(name: &str) -> PathBuf {
    let minor = run!("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name);
    PathBuf::from(format!("/dev/dm-{}", minor.trim()))
}

pub(crate) fn mounted(device: &Path, at: &Path, options: &str) -> Mounted {
    Mounted::mount(["-o", options, device.to_str().expect("UTF-8")], at)
}

/// Live table, inactive table, suspended, writable.
fn attributes(name: &str) -> String {
    dm_info(name, "attr")
}

/// A writer on a mounted file system sees no error, each layer stays what it was, and each fork of it is that, clean.
#[test]
fn a_mounted_snapshot_is_frozen_three_times_under_writes_and_each_fork_is_what_it_was() {
    let scene = Scene::ext4();
    let v = snapshot(&scene);
    let at = mounted(v.device(), &scene.path("v"), "rw");
    let dir = at.at().join("files");
    fs::create_dir(&dir).expect("room for a directory");
    let writer = Writer::start(dir);
    let mut frozen = Vec::new();
    for _ in 0..3 {
        writer.go_on();
        let synced = writer.synced();
        let (name, layer) = freeze(&scene, &v);
        let forks = [fork(&scene, &layer), fork(&scene, &layer)];
        frozen.push((name, layer, synced, forks));
    }
    writer.go_on();
    let written = writer.stop();
    let before: Vec<_> = frozen.iter().map(|(name, ..)| sum(&node(name))).collect();
    for (_, _, synced, forks) in &frozen {
        for each in forks {
            run!("e2fsck", "-f", "-n", each.device());
            let there = mounted(each.device(), &scene.path("fork"), "rw");
            let dir = there.at().join("files");
            assert_files(&dir, *synced);
            fs::write(dir.join("own"), "a fork's").expect("it takes writes");
        }
    }
    drop(at);
    settle();
    run!("e2fsck", "-f", "-n", v.device());
    let at = mounted(v.device(), &scene.path("v"), "ro");
    assert_files(&at.at().join("files"), written);
    assert!(!at.at().join("files/own").exists(), "a fork's writes");
    drop(at);
    for ((name, ..), before) in frozen.iter().zip(&before) {
        assert_eq!(sum(&node(name)), *before, "a layer has changed");
        assert_eq!(attributes(name), "L--w");
    }

    // The layers go with their last users: the topmost first, as the others are under it.
    v.cleanup()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    for (name, layer, _, forks) in frozen.into_iter().rev() {
        assert!(dm_exists(&name), "forks stand on it");
        for each in forks {
            each.cleanup()
                .unwrap_or_else(|error| panic!("{}", chain(&error)));
        }
        drop(layer);
        assert!(eventually(SOON, || !dm_exists(&name)), "{name} stays");
    }
    scene.assert_clean();
}

/// The command freezes and forks, and what comes between the suspension and the last resume is three calls.
#[test]
fn the_command_freezes_in_a_pause_of_three_calls_and_forks() {
    let scene = Scene::new();
    let v = snapshot(&scene);
    let (name, layer) = (name_of(&v), scene.name());
    let cow = scene.path("c1");
    let log = scene.path("strace.log");
    let traced = ["strace", "-f", "-o", log.to_str().expect("UTF-8")];
    let json = success(
        dmsnap_under(&traced)
            .args([
                "checkpoint",
                "--keep",
                "--make-cow",
                "worst-case",
                &name,
                &layer,
            ])
            .arg(&cow),
    );
    let handles: dmsnap::Handles = serde_json::from_str(&json).expect("handles");
    assert_eq!(
        handles.name.as_ref().map(ToString::to_string),
        Some(layer.clone())
    );
    let log = fs::read_to_string(&log).expect("strace wrote it");
    let pauses = |line: &&&str| line.contains("DM_DEV_SUSPEND");
    // Reading the clock enters the kernel only where the clock is a slow one, as under emulation on 5.10.
    let calls: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("clock_gettime("))
        .collect();
    let first = calls
        .iter()
        .position(|line| pauses(&line))
        .expect("a suspension");
    let last = calls
        .iter()
        .rposition(|line| pauses(&line))
        .expect("a resume");
    println!("the pause:\n{}", calls[first..=last].join("\n"));
    assert_eq!(calls.iter().filter(pauses).count(), 3);
    assert_eq!(last - first, 2, "nothing else in between");

    let forked = scene.name();
    success(
        dmsnap()
            .args(["create", "--make-cow", "worst-case"])
            .arg(Path::new("/dev/mapper").join(&layer))
            .arg(scene.path("c2"))
            .arg(&forked),
    );
    let below = |name: &str| run!("dmsetup", "deps", "-o", "devname", name);
    assert!(
        below(&forked).contains(&format!("({layer})")),
        "{}",
        below(&forked)
    );
    assert!(
        below(&name).contains(&format!("({layer})")),
        "{}",
        below(&name)
    );
    assert_eq!(sum(&node(&forked)), sum(v.device()));

    // A layer that somebody stands on stays, and says on whom it waits.
    let refused = finish(dmsnap().args(["remove", "--deadline", "50ms", &layer]));
    let line = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("message: a layer with a fork: {line}");
    assert!(!refused.status.success(), "{line}");
    for stands in [&forked, &name] {
        let named = format!("dm device {stands:?} stands on it");
        assert!(line.contains(&named), "{line}");
    }
    success(dmsnap().args(["remove", &forked]));
    v.cleanup().expect("nobody has it open");
    assert!(dm_exists(&layer), "it was to be kept");
    let file = scene.file("layer.json", json);
    success(dmsnap().arg("cleanup").arg(file));
    scene.assert_clean();
}

/// Over anything but what it was made over, a COW file of a stack is garbage; and a frozen one is others' ground.
#[test]
fn the_files_of_a_stack_are_refused_where_they_do_not_belong() {
    let scene = Scene::new();
    let v = snapshot(&scene);
    let name = name_of(&v);
    let c0 = scene.path(format!("{name}.cow"));
    let (layer_name, layer) = freeze(&scene, &v);
    let c1 = scene.path(format!("{layer_name}.cow"));
    v.cleanup().expect("nobody has it open");
    // Its handles are from before the checkpoint, and udevd may still look into the loop device that it got there.
    assert!(eventually(SOON, || loops_over(&c1) == 0));

    let other = scene.name();
    let create = |origin: &Path, cow: &Path| SnapshotOptions::new().create(origin, cow, &other);
    let refused = |made: dmsnap::Result<Snapshot>| match made {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let refusal = refused(create(scene.image(), &c1));
    assert!(
        matches!(refusal, Refusal::Layer(LayerRefusal::Foreign { .. })),
        "{refusal}"
    );
    let out = scene.path("out");
    let export = output!(
        dmsnap_path(),
        "export",
        "--origin",
        scene.image(),
        "--cow",
        &c1,
        &out
    );
    assert!(!export.status.success() && !out.exists(), "{export:?}");
    // Over its layer it goes on where it was.
    let again = SnapshotOptions::new().create_on(layer.origin(), &c1, &other);
    again.expect("it is its own").cleanup().expect("idle");

    drop(layer);
    assert!(eventually(SOON, || !dm_exists(&layer_name)));
    assert!(eventually(SOON, || loops_over(&c0) == 0));
    let refusal = refused(create(scene.image(), &c0));
    assert!(
        matches!(refusal, Refusal::Layer(LayerRefusal::Frozen { .. })),
        "{refusal}"
    );

    let transient = SnapshotOptions::new()
        .store(dmsnap::Store::Transient)
        .make_cow(COW)
        .create(scene.image(), scene.path("transient"), &other)
        .expect("a snapshot");
    let blank = scene.path("blank");
    let error =
        CheckpointOptions::new()
            .make_cow(COW)
            .checkpoint(&transient, "dmsnap-test-x", &blank);
    let error = error.expect_err("nothing of it is on the disk");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(!blank.exists() && attributes(&other) == "L--w");
    transient.cleanup().expect("idle");
    scene.assert_clean();
}

/// Asked while nothing is attached, each file says whose it is; the ids are those in the devices' uuids, by dmsetup.
fn assert_places(files: [(&Path, u32); 3], uuids: &[String; 2]) {
    let mut below = None;
    for ((cow, depth), uuid) in files.into_iter().zip(uuids.iter().map(Some).chain([None])) {
        let store = ExceptionStore::open(fs::File::open(cow).expect("a file")).expect("a store");
        let place = store.place().expect("it is of a stack");
        let id = place.id.map(|id| id.to_string());
        assert_eq!((place.frozen, place.depth), (uuid.is_some(), depth));
        assert_eq!(place.parent.map(|id| id.to_string()), below);
        assert_eq!(id.is_some(), uuid.is_some());
        if let (Some(id), Some(uuid)) = (&id, uuid) {
            assert!(uuid.starts_with(&format!("DMSNAP-{id}-")), "{uuid}");
        }
        let said = success(dmsnap().args(["cow", "inspect"]).arg(cow));
        let layer = id.clone().unwrap_or_else(|| "no".to_owned());
        let over = match &below {
            Some(id) => format!("layer {id} ({depth} below)"),
            None => "an image".to_owned(),
        };
        let lines = format!("layer       {layer}\nover        {over}\n");
        assert!(said.contains(&lines), "{said}");
        below = id;
    }
}

/// After a reboot, or a cleanup of all: a disk that was frozen twice is put together from its image and three files.
#[test]
fn a_stack_is_put_together_again_from_its_files() {
    let scene = Scene::new();
    let v = snapshot(&scene);
    let (name, device) = (name_of(&v), v.device().to_owned());
    let write = |with: u8, at: u64| {
        let disk = fs::File::options()
            .write(true)
            .open(&device)
            .expect("a device");
        disk.write_all_at(&[with; 8192], at).expect("room");
        disk.sync_all().expect("it takes a flush");
    };
    write(b'a', 0);
    let (first, one) = freeze(&scene, &v);
    write(b'b', 4096);
    let (second, two) = freeze(&scene, &v);
    write(b'c', 1 << 20);
    let (disk, below) = (sum(&device), sum(&node(&second)));
    let uuids = [&first, &second].map(|name| dm_info(name, "uuid"));
    v.cleanup().expect("nobody has it open");
    drop((one, two));
    assert!(eventually(SOON, || !dm_exists(&first) && !dm_exists(&second)));
    let file = |of: &str| scene.path(format!("{of}.cow"));
    // Whose writes each file has: the image's snapshot, the first layer's, the second one's.
    let (c0, c1, c2) = (file(&name), file(&first), file(&second));
    assert!(eventually(SOON, || [&c0, &c1, &c2]
        .iter()
        .all(|cow| loops_over(cow) == 0)));
    assert_places([(&c0, 0), (&c1, 1), (&c2, 2)], &uuids);

    let image = Origin::open(scene.image()).expect("an image");
    let options = CheckpointOptions::new();
    let attach = |origin: &Origin, cow: &Path, name: &str| options.attach_layer(origin, cow, name);
    let refused = |made: dmsnap::Result<Layer>| match made {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    for (cow, frozen) in [(&c2, false), (&c1, true)] {
        let refusal = refused(attach(&image, cow, &first));
        match frozen {
            true => assert!(
                matches!(refusal, Refusal::Layer(LayerRefusal::Foreign { .. })),
                "{refusal}"
            ),
            false => assert!(
                matches!(refusal, Refusal::Layer(LayerRefusal::NotFrozen { .. })),
                "{refusal}"
            ),
        }
    }
    let one = attach(&image, &c0, &first).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let refusal = refused(attach(&image, &c0, &second));
    assert!(matches!(refusal, Refusal::CowInUse { .. }), "{refusal}");
    let two =
        attach(one.origin(), &c1, &second).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(&node(&second)), below);
    let v = SnapshotOptions::new().create_on(two.origin(), &c2, &name);
    let v = v.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(v.device()), disk);
    drop((one, two));
    v.cleanup().expect("nobody has it open");
    assert!(eventually(SOON, || !dm_exists(&first) && !dm_exists(&second)));

    // The same by the command, which keeps layers as it ends.
    success(
        dmsnap()
            .arg("layer")
            .arg(scene.image())
            .arg(&c0)
            .arg(&first),
    );
    let on = Path::new("/dev/mapper").join(&first);
    success(dmsnap().arg("layer").arg(on).arg(&c1).arg(&second));
    let on = Path::new("/dev/mapper").join(&second);
    success(dmsnap().arg("create").arg(on).arg(&c2).arg(&name));
    assert_eq!(sum(&node(&name)), disk);
    for each in [&name, &second, &first] {
        success(dmsnap().args(["remove", each]));
    }
    drop(image);
    assert!(eventually(SOON, || loops_over(&c0) == 0));
    scene.assert_clean();
}

/// What was written since the checkpoint is gone from the disk, and in the old COW file; nothing changes under a user.
#[test]
fn a_snapshot_goes_back_to_its_last_checkpoint_while_nobody_has_it_open() {
    let scene = Scene::new();
    let v = snapshot(&scene);
    let (name, device) = (name_of(&v), v.device().to_owned());
    let rollback = |cow: &Path| {
        let mut command = dmsnap();
        command.args(["rollback", "--make-cow", "worst-case", &name]);
        finish(command.arg(cow))
    };
    let no_layer = rollback(&scene.path("early"));
    let line = String::from_utf8_lossy(&no_layer.stderr).into_owned();
    assert!(line.contains("stands on no layer"), "{line}");

    let write = |with: &str| {
        run!(
            "sh",
            "-c",
            format!(
                "head -c 65536 /dev/zero | tr '\\0' {with} | dd of={} conv=fsync 2>/dev/null",
                device.display()
            )
        )
    };
    write("a");
    let (layer_name, layer) = freeze(&scene, &v);
    let frozen = sum(&device);
    write("b");
    assert_ne!(sum(&device), frozen);
    let holder = fs::File::open(&device).expect("the device opens");
    let refused = rollback(&scene.path("back"));
    let line = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("message: a rollback of an open disk: {line}");
    assert!(line.contains("is in use: 1 have it open"), "{line}");
    assert!(!scene.path("back").exists() && attributes(&name) == "L--w");
    drop(holder);
    // A probing udevd may have it open for a moment.
    let back = scene.path("back");
    assert!(eventually(SOON, || rollback(&back).status.success()));
    // One that has writes already would bring them along.
    let used = rollback_over(&name, &scene.path(format!("{layer_name}.cow")));
    println!("message: a rollback over a used COW file: {used}");
    assert!(used.contains("blank"), "{used}");
    assert_eq!(sum(&device), frozen);
    assert_eq!(attributes(&name), "L--w");
    assert_eq!(loops_over(&back), 1);
    let old = scene.path(format!("{layer_name}.cow"));
    assert!(
        eventually(SOON, || loops_over(&old) == 0),
        "its old COW file"
    );
    write("c");
    assert_ne!(sum(&device), frozen);
    assert_eq!(sum(&node(&layer_name)), frozen);
    // The handles of before are good for it.
    v.cleanup()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    drop(layer);
    assert!(eventually(SOON, || !dm_exists(&layer_name)));
    scene.assert_clean();
}

/// What a rollback over a COW file that is there complains of.
fn rollback_over(name: &str, cow: &Path) -> String {
    let done = finish(dmsnap().args(["rollback", name]).arg(cow));
    assert!(!done.status.success());
    String::from_utf8_lossy(&done.stderr).into_owned()
}

/// A write to the snapshot would need one to its COW file, which would need one to the snapshot.
#[test]
fn a_cow_file_on_the_snapshots_own_file_system_is_refused() {
    let scene = Scene::ext4();
    let v = snapshot(&scene);
    let at = mounted(v.device(), &scene.path("v"), "rw");
    let within = at.at().join("next.cow");
    let refused = CheckpointOptions::new()
        .make_cow(CowSize::Bytes(1 << 20))
        .checkpoint(&v, &scene.name(), &within);
    assert!(
        matches!(
            refused,
            Err(Error::Refused(Refusal::NotFreezable {
                why: FreezeObstacle::OwnFileSystem,
                ..
            }))
        ),
        "{refused:?}"
    );
    assert!(!within.exists());
    fs::write(at.at().join("file"), "it goes on").expect("a write");
    drop(at);
    v.cleanup().expect("idle");
    scene.assert_clean();
}

fn dmsnap_path() -> PathBuf {
    dmsnap().get_program().into()
}
