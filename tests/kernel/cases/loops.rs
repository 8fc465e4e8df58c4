//! Loop devices that others have a hand on, and a /dev that lacks their nodes.

use std::fs::{self, File};
use std::path::Path;

use dmsnap::pool::CowFate;
use dmsnap::{CowSize, Origin, PoolOptions, SnapshotOptions, Store};

use crate::common::reading::{dm_exists, loops_below};
use crate::common::tools::{start, success};
use crate::common::{Scene, chain, dmsnap, eventually, output, run};

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

/// What a container is given that may do no more than dmsnap has to.
const FEW: &str = "/dev/null /dev/zero /dev/urandom /dev/loop-control /dev/mapper/control";

/// What a privileged one is given: every node that there is as it begins.
const ALL: &str = "/dev/* /dev/mapper/*";

/// A /dev as a container engine makes it: a tmpfs with copies of some nodes, which the kernel adds nothing to.
fn in_container(scene: &Scene, nodes: &str, command: &str) -> String {
    let script = scene.file(
        "in-container",
        "set -e\n\
         dev=/tmp/dev-$$\n\
         mkdir -p $dev\n\
         mount -t tmpfs none $dev\n\
         mkdir $dev/mapper\n\
         for node in $1; do\n\
             if [ -b $node ] || [ -c $node ]; then cp -a $node $dev/${node#/dev/}; fi\n\
         done\n\
         mount --move $dev /dev\n\
         rmdir $dev\n\
         eval \"$2\"\n",
    );
    let mut contained = std::process::Command::new("unshare");
    contained
        .args(["-m", "sh"])
        .arg(script)
        .args([nodes, command]);
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
    let said = in_container(&scene, FEW, &command);
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

/// What makes this binary the control plane in the container, and says where its files are.
const CONTAINED: &str = "DMSNAP_TEST_CONTAINED";

/// README's two examples, in a directory of its own; what they print is judged by other programs on the way.
fn one_vm_and_a_fleet(dir: &Path) -> dmsnap::Result<()> {
    let (image, cow) = (dir.join("origin.img"), dir.join("vm-42.cow"));
    let boot = |device: &Path| {
        println!("boot from {}", run!("ls", "-l", device));
        run!("cmp", &image, device);
        let to = format!("of={}", device.display());
        let zeroes = run!(
            "dd",
            "if=/dev/zero",
            &to,
            "bs=4096",
            "count=16",
            "conv=fsync"
        );
        println!("{zeroes}{}", run!("blockdev", "--getsize64", device));
        let other = output!("cmp", "-s", &image, device);
        assert_eq!(other.status.code(), Some(1));
    };
    let snapshot = SnapshotOptions::new()
        .store(Store::PersistentOverflow)
        .make_cow(CowSize::WorstCase)
        .create(&image, &cow, &name_of("vm-42"))?;
    boot(snapshot.device());
    let handles = snapshot.into_handles();
    dmsnap::cleanup(&handles)?;

    let origin = Origin::open(&image)?;
    let pool = PoolOptions::new().size(2).open(&origin, dir)?;
    for _ in 0..3 {
        let claimed = pool.claim(&name_of("vm-43"))?;
        boot(claimed.snapshot.device());
        pool.release(claimed.snapshot.handles(), CowFate::Delete)?;
    }
    pool.drain()
}

/// A name that the scene answers for.
fn name_of(vm: &str) -> String {
    format!("{}{vm}", crate::common::scene::prefix())
}

#[test]
fn readmes_examples_work_where_dev_is_a_copy() {
    if let Some(dir) = std::env::var_os(CONTAINED) {
        let done = one_vm_and_a_fleet(Path::new(&dir));
        return done.unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
    let scene = Scene::new();
    let this = std::env::current_exe().expect("this binary");
    let command = format!(
        "ls -R /dev >{before}; {CONTAINED}={dir} {this} --nocapture --exact \
         cases::loops::readmes_examples_work_where_dev_is_a_copy; \
         ls -R /dev >{after}; diff {before} {after} && echo as before",
        before = scene.path("before").display(),
        after = scene.path("after").display(),
        dir = scene.dir().display(),
        this = this.display(),
    );
    for nodes in [FEW, ALL] {
        let said = in_container(&scene, nodes, &command);
        println!("README's examples, with {nodes}:\n{said}");
        assert!(
            said.contains("1 passed") && said.ends_with("as before"),
            "{said}"
        );
        assert_eq!(said.matches("boot from b").count(), 4, "{said}");
        scene.assert_clean();
        fs::remove_file(scene.path("vm-42.cow")).expect("the COW file stays");
    }
}
