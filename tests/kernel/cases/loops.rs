//! Loop devices that others have a hand on, and a /dev that lacks their nodes.

use std::fs::{self, File};
use std::path::Path;

use dmsnap::SnapshotOptions;

use crate::common::reading::{dm_exists, loops_below};
use crate::common::tools::{start, success};
use crate::common::{Scene, dmsnap, eventually, run};

// LOOP_CTL_GET_FREE names the same device as long as nobody binds it, and this one's lock does not go.
#[test]
fn a_free_loop_device_that_somebody_has_locked_is_passed_over() {
    let scene = Scene::new();
    let free = run!("losetup", "-f");
    // The image takes the first one, read-only, which asks for no lock; the COW file is to meet the next.
    let number: u32 = free
        .trim_start_matches("/dev/loop")
        .parse()
        .expect("a number");
    let next = format!("/dev/loop{}", number + 1);
    assert!(Path::new(&next).exists(), "{next}");
    let mark = scene.path("locked");
    let mut holder = std::process::Command::new("flock");
    holder.args(["-x", &next, "sh", "-c", "touch \"$0\"; exec sleep 20"]);
    let holder = start(holder.arg(&mark));
    assert!(eventually(std::time::Duration::from_secs(60), || mark.exists()));
    let snapshot = SnapshotOptions::new().create(scene.image(), scene.cow("cow"), &scene.name());
    let ended = run!("kill", holder.id().to_string());
    drop((ended, holder.join()));
    let snapshot = snapshot.expect("there are other loop devices");
    let bound = loops_below(scene.dir());
    println!("{next} is locked: {bound:?}");
    assert_eq!(bound.len(), 2);
    snapshot.cleanup().expect("nobody has it open");
}

/// A /dev as a container engine makes it: a tmpfs with copies of some nodes, which the kernel adds nothing to.
fn in_container(scene: &Scene, command: &str) -> String {
    let script = scene.file(
        "in-container",
        "set -e\n\
         mkdir -p /tmp/dev-$$\n\
         mount -t tmpfs none /tmp/dev-$$\n\
         mkdir /tmp/dev-$$/mapper\n\
         for node in null zero urandom loop-control mapper/control; do cp -a /dev/$node /tmp/dev-$$/$node; done\n\
         mount --move /tmp/dev-$$ /dev\n\
         rmdir /tmp/dev-$$\n\
         eval \"$1\"\n",
    );
    let mut contained = std::process::Command::new("unshare");
    contained.args(["-m", "sh"]).arg(script).arg(command);
    success(&mut contained)
}

#[test]
fn a_dev_without_the_kernels_nodes_gets_them_and_loses_them() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let (image, handles) = (scene.image(), scene.path("handles"));
    let ours = dmsnap();
    let ours = Path::new(ours.get_program()).display().to_string();
    let command = format!(
        "ls -R /dev >{before}; {ours} create {image} {cow} {name} >{handles}; \
         cmp {image} /dev/mapper/{name}; dd if=/dev/zero of=/dev/mapper/{name} bs=4096 count=1 conv=fsync 2>&1; \
         ls -l /dev /dev/mapper; {ours} reap --dry-run || true; {ours} list; \
         {ours} cleanup {handles}; ls -R /dev >{after}; diff {before} {after} && echo as before",
        before = scene.path("before").display(),
        after = scene.path("after").display(),
        image = image.display(),
        cow = cow.display(),
        handles = handles.display(),
    );
    let said = in_container(&scene, &command);
    println!("a /dev of its own:\n{said}");
    assert!(said.ends_with("as before"), "{said}");
    assert!(
        fs::read_to_string(&handles)
            .expect("printed")
            .contains(&name)
    );
    assert!(!dm_exists(&name));
    File::open(&cow).expect("the COW file stays");
}
