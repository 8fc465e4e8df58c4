//! Bad input: machines that lack what a snapshot needs.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use dmsnap::{ChunkSize, ErrorKind, SnapshotOptions};

use crate::common::rows::Row;
use crate::common::scene::content;
use crate::common::tools::success;
use crate::common::{Scene, TempSetting, dmsnap, dmsnap_under, run};

const NOBODY: u32 = 65534;

#[test]
fn no_root() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    run!("chmod", "666", &cow);
    let mut nobody = dmsnap();
    nobody.uid(NOBODY).gid(NOBODY);
    let message = Row::new(&scene, "no root", scene.image(), &cow).refused_by(&mut nobody);
    assert_eq!(
        message,
        "cannot open device-mapper control /dev/mapper/control: Permission denied (os error 13)"
    );
}

#[test]
fn root_without_its_capabilities() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let row = Row::new(&scene, "root of a user namespace only", scene.image(), &cow);
    let message = row.refused_under(&["unshare", "--user", "--map-root-user"]);
    assert!(
        message.ends_with("Permission denied (os error 13)"),
        "{message}"
    );
}

/// A /dev of its own for a command: a directory with copies of the nodes in `nodes`, bound over /dev in a mount
/// namespace.
fn with_dev(scene: &Scene, nodes: &str) -> PathBuf {
    scene.file(
        "with-dev",
        format!(
            "set -e\n\
             dev={dir}/dev\n\
             mkdir -p $dev/mapper\n\
             for node in null zero urandom {nodes}; do cp -a /dev/$node $dev/$node; done\n\
             mount --bind $dev /dev\n\
             exec \"$@\"\n",
            dir = scene.dir().display()
        ),
    )
}

fn refused_with_dev(what: &str, nodes: &str) -> String {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let script = with_dev(&scene, nodes);
    let script = script.to_str().expect("UTF-8");
    Row::new(&scene, what, scene.image(), &cow).refused_under(&["unshare", "-m", "sh", script])
}

#[test]
fn no_control_nodes() {
    assert_eq!(
        refused_with_dev("no /dev/mapper/control", "loop-control"),
        "cannot open device-mapper control /dev/mapper/control: No such file or directory (os error 2)"
    );
    assert_eq!(
        refused_with_dev("no /dev/loop-control", "mapper/control"),
        "cannot open loop control /dev/loop-control: No such file or directory (os error 2)"
    );
}

#[test]
fn a_dev_directory_that_the_kernel_does_not_fill() {
    let scene = Scene::new();
    let script = with_dev(
        &scene,
        "loop-control mapper/control $(cd /dev && ls -d loop[0-9]*)",
    );
    let (name, cow) = (scene.name(), scene.cow("cow"));
    // All within one namespace: what is made below its /dev is seen there alone.
    let steps = scene.file(
        "steps",
        format!(
            "set -e\n\
             \"$3\" create \"$1\" \"$2\" {name} >{dir}/handles.json\n\
             test -b /dev/mapper/{name} && test ! -L /dev/mapper/{name}\n\
             test ! -e /dev/dm-0\n\
             grep '\"device\": \"/dev/mapper/{name}\"' {dir}/handles.json\n\
             cat /dev/mapper/{name} >{dir}/seen\n\
             \"$3\" cleanup {dir}/handles.json\n\
             test ! -e /dev/mapper/{name}\n",
            dir = scene.dir().display()
        ),
    );
    let ours = dmsnap().get_program().to_owned();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh"]).arg(script).arg("sh").arg(steps);
    success(command.arg(scene.image()).arg(&cow).arg(ours));
    assert_eq!(content(&scene.path("seen")), content(scene.image()));
}

#[test]
fn no_loop_device_left() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let log = scene.path("strace.log");
    let row = Row::new(&scene, "loop devices exhausted", scene.image(), &cow);
    let message = row.refused_under(&[
        "strace",
        "-o",
        log.to_str().expect("UTF-8"),
        "-P",
        "/dev/loop-control",
        "-e",
        "inject=ioctl:error=ENOSPC",
    ]);
    assert_eq!(
        message,
        "cannot find a free loop device through /dev/loop-control: No space left on device (os error 28)"
    );
}

#[test]
fn no_loop_device_left_for_the_second_file() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let log = scene.path("strace.log");
    let row = Row::new(&scene, "one loop device left", scene.image(), &cow);
    let message = row.refused_under(&[
        "strace",
        "-o",
        log.to_str().expect("UTF-8"),
        "-P",
        "/dev/loop-control",
        "-e",
        "inject=ioctl:error=ENOSPC:when=2",
    ]);
    assert!(message.ends_with("(os error 28)"), "{message}");
}

/// The snapshot target out of the kernel; with `false` for a loader, out of reach too.
struct WithoutTarget {
    _loader: Option<TempSetting>,
}

impl WithoutTarget {
    fn unload(loader: Option<&str>) -> Self {
        run!("modprobe", "-r", "dm-snapshot");
        assert!(!Path::new("/sys/module/dm_snapshot").exists());
        let _loader = loader.map(|path| TempSetting::set("/proc/sys/kernel/modprobe", path));
        Self { _loader }
    }
}

impl Drop for WithoutTarget {
    fn drop(&mut self) {
        self._loader = None;
        run!("modprobe", "dm-snapshot");
    }
}

#[test]
fn no_snapshot_target() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let without = WithoutTarget::unload(Some("/bin/false"));
    let mut options = SnapshotOptions::new();
    options.chunk_size(ChunkSize::new(512).expect("a chunk size on which no kernel trips"));
    for (what, discard) in [
        ("no snapshot target", false),
        ("no snapshot target, discard asked for", true),
    ] {
        options.discard(discard).trust_discards(true);
        let (error, message) = Row::new(&scene, what, scene.image(), &cow).refused(&options);
        assert_eq!(
            message,
            "cannot find the snapshot target through /dev/mapper/control: Invalid argument (os error 22): \
             dm-snapshot is neither loaded nor loadable"
        );
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    drop(without);
    scene.snapshot().cleanup().expect("it is back");
}

#[test]
fn a_target_that_is_not_loaded_yet_is_loaded() {
    let scene = Scene::new();
    for discard in [false, true] {
        let without = WithoutTarget::unload(None);
        let mut options = SnapshotOptions::new();
        let chunk = ChunkSize::new(512).expect("a chunk size on which no kernel trips");
        options
            .discard(discard)
            .trust_discards(true)
            .chunk_size(chunk);
        let snapshot = scene.snapshot_with(&options);
        assert!(Path::new("/sys/module/dm_snapshot").exists());
        snapshot.cleanup().expect("nobody has it open");
        drop(without);
    }
}

#[test]
fn wrong_usage_has_its_own_exit_status() {
    let done = crate::common::tools::finish(dmsnap_under(&[]).arg("create"));
    assert_eq!(done.status.code(), Some(2));
}
