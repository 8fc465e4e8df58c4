//! The examples of README, the crate's page and the guide, run as they are written there (`tests/api/documented.rs` holds
//! them to the text), each in a process of its own, and judged by dmsetup, losetup and what was printed.

#![allow(clippy::print_stderr, reason = "the examples print")]

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dmsnap::{CowSize, Origin, PoolOptions, SnapshotOptions, Store};

use crate::common::filling::Direct;
use crate::common::reading::{dm_exists, dm_info, dm_names, loops_below};
use crate::common::scene::{content, patterned};
use crate::common::tools::success;
use crate::common::{Scene, chain, dmsnap, eventually, output, run, stated_kernel};
use crate::proof::worker::Process;

#[path = "../../../examples/demo.rs"]
mod demo;

/// What makes this binary the player of an example, and says of which.
const EXAMPLE: &str = "DMSNAP_TEST_EXAMPLE";

const PATIENCE: Duration = Duration::from_secs(60);

/// Where the examples have their files.
const IMAGES: &str = "/images";
const VMS: &str = "/var/lib/vms";
const IMAGE: &str = "/images/base.ext4";
const COW: &str = "/var/lib/vms/vm-42.cow";
const RUN_COW: &str = "/run/vm-42.cow";

fn play(name: &str) -> Result<(), Box<dyn Error>> {
    match name {
        "readme_1" => include!("readme_1.rs")?,
        "readme_2" => include!("readme_2.rs")?,
        "readme_3" => include!("readme_3.rs")?,
        "lib_1" => include!("lib_1.rs")?,
        "checkpoint_1" => include!("checkpoint_1.rs")?,
        "checkpoint_2" => include!("checkpoint_2.rs")?,
        "checkpoint_3" => include!("checkpoint_3.rs")?,
        "choosing_1" => include!("choosing_1.rs")?,
        "choosing_2" => include!("choosing_2.rs")?,
        "choosing_3" => include!("choosing_3.rs")?,
        "errors_1" => include!("errors_1.rs"),
        "firecracker_1" => include!("firecracker_1.rs")?,
        "kernels_1" => include!("kernels_1.rs")?,
        "merging_and_export_1" => include!("merging_and_export_1.rs")?,
        "operating_1" => include!("operating_1.rs")?,
        "operating_2" => include!("operating_2.rs")?,
        "operating_3" => include!("operating_3.rs")?,
        "operating_4" => include!("operating_4.rs")?,
        "a pool's process" => pools_process()?,
        "demo" => demo::main()?,
        _ => return Err(format!("no such example: {name}").into()),
    }
    Ok(())
}

/// A control plane that gives two disks out of its pool, and dies.
fn pools_process() -> dmsnap::Result<()> {
    let origin = Origin::open(IMAGE)?;
    let pool = PoolOptions::new().size(2).open(&origin, VMS)?;
    assert!(pool.wait_ready(2, PATIENCE), "{:?}", pool.status());
    for name in ["acme-vm-1", "acme-vm-2"] {
        pool.claim(name)?;
    }
    println!("claimed");
    std::process::abort()
}

/// The directories that the examples name, which lead into a scene.
struct Host {
    scene: Scene,
}

/// What has this binary play an example. With one thread, as on one CPU, libtest would print the test's name before it,
/// on the line of its first words.
const PLAYER: [&str; 4] = [
    "--exact",
    "documented::an_example_is_played",
    "--nocapture",
    "--test-threads=2",
];

impl Host {
    fn new() -> Self {
        let scene = Scene::new();
        for (link, dir) in [(IMAGES, "images"), (VMS, "vms")] {
            let dir = scene.path(dir);
            fs::create_dir(&dir).expect("a new directory");
            fs::create_dir_all(Path::new(link).parent().expect("a parent")).expect("it is made");
            symlink(&dir, link).expect("nobody else has the directory that the examples name");
        }
        patterned(Path::new(IMAGE), 4 << 20);
        Self { scene }
    }

    fn start(name: &str) -> Process {
        let this = env::current_exe().expect("this binary");
        Process::start(Command::new(this).args(PLAYER).env(EXAMPLE, name))
    }

    /// Runs an example to its end; returns what it printed to stdout and stderr.
    fn play(&self, name: &str) -> (String, String) {
        let done = Self::start(name).join(PATIENCE);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = (text(&done.stdout), text(&done.stderr));
        assert!(done.status.success(), "{name}: {}: {said:?}", done.status);
        said
    }

    /// Runs an example that leaves neither dm device, loop device nor COW file behind.
    fn play_clean(&self, name: &str) -> (String, String) {
        let said = self.play(name);
        self.scene.assert_clean();
        assert_eq!(dm_names(), [""; 0]);
        assert!(!fs::exists(COW).expect("it can be asked"), "{name}: {COW}");
        said
    }

    /// A disk of the library's, made by a process that is no more.
    fn disk(&self, name: &str, options: &SnapshotOptions) {
        let cow = Path::new(VMS).join(format!("{name}.cow"));
        let made = options.create(IMAGE, cow, name);
        drop(made.unwrap_or_else(|error| panic!("{}", chain(&error))));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let ours = ["acme-", "evil-", "vm-", "dmsnap-pool-", "demo-"];
        for name in dm_names() {
            if ours.iter().any(|start| name.starts_with(start)) {
                output!("dmsetup", "remove", "--retry", &name);
                let _ = fs::remove_file(Path::new("/dev/mapper").join(name));
            }
        }
        for path in [IMAGES, VMS, RUN_COW] {
            let _ = fs::remove_file(path);
        }
    }
}

fn worst_case() -> SnapshotOptions {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase);
    options
}

/// Whether `said` has a line that begins with `boot from /dev/dm-`.
fn boots(said: &str) -> bool {
    said.lines()
        .any(|line| line.starts_with("boot from /dev/dm-"))
}

/// Called with an example's name in the environment it is the player; otherwise README's first one is played.
#[test]
fn an_example_is_played() {
    if let Some(name) = env::var_os(EXAMPLE) {
        let done = play(&name.to_string_lossy());
        if let Err(why) = &done {
            let _ = writeln!(io::stderr(), "{}", chain(why.as_ref()));
        }
        std::process::exit(done.map_or(1, |()| 0));
    }
    let host = Host::new();
    let (said, _) = host.play_clean("readme_1");
    assert!(boots(&said), "{said}");
}

#[test]
fn disks_that_are_made_and_cleaned_up() {
    let host = Host::new();
    let (said, _) = host.play_clean("lib_1");
    assert!(boots(&said), "{said}");
    fs::remove_file(RUN_COW).expect("a COW file is the caller's");
    let (said, _) = host.play_clean("readme_2");
    assert!(boots(&said), "{said}");
    assert_eq!(
        fs::read_dir(VMS).expect("a directory").count(),
        0,
        "a pool's files"
    );
    host.play("choosing_1");
    fs::remove_file(COW).expect("a COW file is the caller's");
    host.play_clean("choosing_2");
    assert!(!fs::exists(RUN_COW).expect("it can be asked"));
}

/// The errors' example names a COW file that is not there: it prints why.
#[test]
fn what_a_kernel_or_a_caller_cannot() {
    let host = Host::new();
    let (_, said) = host.play_clean("errors_1");
    let expected = format!("cannot open {RUN_COW}: No such file or directory (os error 2)");
    assert_eq!(said.lines().collect::<Vec<_>>(), [expected]);
    // New kernels crash on such a table, and are never given one.
    let discards = ["5.10", "6.1", "6.12"].contains(&stated_kernel().as_str());
    let (_, said) = host.play_clean("kernels_1");
    assert_eq!(said.contains("without discard"), !discards, "{said}");
    fs::remove_file(RUN_COW).expect("a COW file is the caller's");
    File::create_new(RUN_COW)
        .and_then(|file| file.set_len(8 << 20))
        .expect("a sparse file");
    let done = Host::start("choosing_3").join(PATIENCE);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.success(), discards, "{said}");
}

#[test]
fn after_a_crash_what_is_in_the_database_stays() {
    let host = Host::new();
    for example in ["readme_3", "operating_1"] {
        // The last one is a stranger's.
        for name in [
            "acme-vm-1",
            "acme-vm-2",
            "acme-vm-3",
            "acme-vm-4",
            "evil-vm-1",
        ] {
            host.disk(name, worst_case().replace_cow(true));
        }
        let open = File::open("/dev/mapper/acme-vm-4").expect("it is there");
        let (said, _) = host.play(example);
        assert!(said.contains("acme-vm-3: Removed"), "{said}");
        assert!(said.contains("acme-vm-4: 1 have it open"), "{said}");
        drop(open);
        let mut names = dm_names();
        names.sort_unstable();
        assert_eq!(names, ["acme-vm-1", "acme-vm-2", "acme-vm-4", "evil-vm-1"]);
        for name in names {
            success(dmsnap().args(["remove", &name]));
        }
    }
    // A disk that the database has and the crash did not leave.
    let (said, _) = host.play_clean("readme_3");
    assert!(said.contains("its disk is gone"), "{said}");
}

#[test]
fn a_checkpoint_two_forks_and_the_stack_after_a_reboot() {
    let host = Host::new();
    host.disk("vm-42", &worst_case());
    let node = Path::new("/dev/mapper/vm-42");
    Direct::open(node).write(0x42, 0, 4096).expect("room");
    let at_noon = content(node);
    host.play("checkpoint_1");
    Direct::open(node).write(0x43, 0, 4096).expect("room");
    let afterwards = content(node);
    for fork in ["vm-43", "vm-44"] {
        assert!(
            content(&Path::new("/dev/mapper").join(fork)) == at_noon,
            "{fork}"
        );
    }
    assert_eq!(dm_info("vm-42-noon", "open"), "3");
    let evening = [
        "checkpoint",
        "--keep",
        "--make-cow",
        "worst-case",
        "vm-42",
        "vm-42-evening",
    ];
    success(dmsnap().args(evening).arg("/var/lib/vms/vm-42.2.cow"));
    // As a reboot leaves it: the files alone.
    for name in ["vm-44", "vm-43", "vm-42", "vm-42-evening", "vm-42-noon"] {
        success(dmsnap().args(["remove", name]));
    }
    host.scene.assert_clean();
    let (said, _) = host.play("checkpoint_2");
    assert!(
        said.contains("a layer's, with 0 below it: keep it"),
        "{said}"
    );
    host.play("checkpoint_3");
    assert!(content(node) == afterwards, "the disk goes on");
    for name in ["vm-42", "vm-42-evening"] {
        success(dmsnap().args(["remove", name]));
    }
}

/// What the node in the jail is, by stat, and what its owner reads by it.
#[test]
fn a_disk_in_a_jail() {
    let host = Host::new();
    let jail = Path::new("/srv/jailer/firecracker/vm-42/root");
    fs::create_dir_all(jail).expect("a jail, as the jailer makes it");
    host.play("firecracker_1");
    let node = jail.join("disk");
    let disk = Path::new("/dev/mapper/vm-42");
    let what = "%F %a %u:%g";
    let said = run!("stat", "-c", what, &node);
    assert_eq!(said.trim(), "block special file 600 123:100");
    let number = |path: &Path| run!("stat", "-L", "-c", "%t:%T", path);
    assert_eq!(number(&node), number(disk));
    assert!(content(&node) == content(disk), "the same disk");
    fs::remove_dir_all("/srv/jailer").expect("it is made here");
    success(dmsnap().args(["remove", "vm-42"]));
    host.scene.assert_clean();
}

#[test]
fn an_export_and_a_merge() {
    let host = Host::new();
    host.disk("vm-42", &worst_case());
    let node = Path::new("/dev/mapper/vm-42");
    Direct::open(node).write(0x42, 1 << 20, 4096).expect("room");
    let disk = content(node);
    success(dmsnap().args(["remove", "vm-42"]));
    host.scene.assert_clean();
    host.play("merging_and_export_1");
    assert!(
        content(Path::new("/images/vm-42.ext4")) == disk,
        "the export"
    );
    assert!(content(Path::new(IMAGE)) == disk, "the merge");
}

/// A watch grows what fills up, and ends when no snapshot is left.
#[test]
fn a_watch_grows_what_fills_up() {
    let host = Host::new();
    let mut small = SnapshotOptions::new();
    small
        .store(Store::PersistentOverflow)
        .make_cow(CowSize::Bytes(1 << 20));
    for name in ["vm-41", "vm-42"] {
        host.disk(name, &small);
    }
    let mut watch = Host::start("operating_4");
    Direct::open(Path::new("/dev/mapper/vm-42"))
        .write(0x42, 0, 900 << 10)
        .expect("room");
    let length = || fs::metadata(COW).expect("the COW file").len();
    let grown = eventually(PATIENCE, || length() == 2 << 20 || !watch.is_running());
    assert!(grown && watch.is_running(), "{:?}", watch.join(PATIENCE));
    for name in ["vm-41", "vm-42"] {
        run!("dmsetup", "remove", "--retry", name);
        let _ = fs::remove_file(Path::new("/dev/mapper").join(name));
    }
    let done = watch.join(PATIENCE);
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        said.contains("vm-41: ") && said.contains("vm-42: "),
        "{said}"
    );
}

/// What was claimed keeps its content, and what was ready is gone; the new pool takes the claimed ones back.
#[test]
fn a_new_pool_takes_back_what_a_dead_one_gave_out() {
    let host = Host::new();
    let (said, _) = host.play_clean("operating_2");
    for name in ["vm-41", "vm-42"] {
        let begin = format!("{name}: boot from /dev/dm-");
        assert!(said.lines().any(|line| line.starts_with(&begin)), "{said}");
        let begin = format!("{name}: its writes are in Some(");
        assert!(said.lines().any(|line| line.starts_with(&begin)), "{said}");
    }
    let kept = fs::read_dir(VMS).expect("a directory").flatten();
    let kept: Vec<_> = kept.map(|entry| entry.path()).collect();
    assert_eq!(kept.len(), 2, "{kept:?}");
    for file in kept {
        fs::remove_file(file).expect("it is the caller's");
    }

    let done = Host::start("a pool's process").join(PATIENCE);
    assert!(!done.status.success() && String::from_utf8_lossy(&done.stdout).contains("claimed"));
    let (ready, claimed): (Vec<_>, Vec<_>) = dm_names()
        .into_iter()
        .partition(|name| name.starts_with("dmsnap-pool-"));
    assert!(
        !ready.is_empty(),
        "the dead pool's keeper is there at least"
    );
    assert_eq!(claimed.len(), 2, "{claimed:?}");
    let (said, _) = host.play_clean("operating_3");
    let expected = [
        "acme-vm-1: recycled",
        "acme-vm-2: recycled",
        "acme-vm-3: gone already",
    ];
    assert_eq!(
        said.lines()
            .filter(|line| line.starts_with("acme-"))
            .collect::<Vec<_>>(),
        expected
    );
    assert_eq!(
        fs::read_dir(VMS).expect("a directory").count(),
        0,
        "COW files"
    );
}

/// The guide's commands, one line each.
#[test]
fn a_command_lets_a_hanging_guest_go_on() {
    let host = Host::new();
    host.disk("vm-42", &worst_case());
    run!("dmsetup", "suspend", "vm-42");
    let guide = include_str!("../../../src/guide/operating.md");
    let block = guide.split("```sh\n").nth(1).expect("a block of commands");
    for line in block.lines().take_while(|line| *line != "```") {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("dmsnap"), "{line}");
        let said = success(dmsnap().args(words));
        assert!(said.contains("resumed"), "{said}");
    }
    assert_eq!(dm_info("vm-42", "suspended"), "Active");
    success(dmsnap().args(["remove", "vm-42"]));
    assert!(
        loops_below(host.scene.dir()).is_empty()
            || eventually(PATIENCE, || loops_below(host.scene.dir()).is_empty())
    );
}

/// `./tests/vm/run demo` runs the same in a guest of its own.
#[test]
fn the_demo() {
    let scene = Scene::new();
    let mut player = Command::new(env::current_exe().expect("this binary"));
    player.args(PLAYER);
    let done =
        Process::start(player.env(EXAMPLE, "demo").current_dir(scene.dir())).join(PATIENCE * 2);
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&done.stderr)
    );
    assert!(
        said.contains("The image is as it was, and no dm device, loop device or link is left.")
    );
    assert!(!dm_exists("demo-crash-0"));
}
