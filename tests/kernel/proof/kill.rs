//! SIGKILL at every system call of create, cleanup, reap and of putting layers together: one sweep afterwards leaves
//! nothing. At every ioctl of a live export, a checkpoint and a repair: one repair afterwards has the disk go on.
//!
//! strace delivers the signal on entering the call, and the kernel does not begin a call with a fatal signal pending
//! (`syscall_trace_enter`, `ptrace_report_syscall`): a process killed at call n has done all up to n - 1 and no more.
//! Since nothing happens between two calls, death right after call n is death at n + 1, which has its own row.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use super::trace::{self, Call, Injected};
use super::world::World;
use super::{has_its_turn, long};
use crate::common::filling::Direct;
use crate::common::reading::dm_info;
use crate::common::run;

/// The calls to die at. In the short form not at one that changes nothing, as death at the next leaves the same, and at
/// a fifth of the others.
fn fatal(calls: Vec<Call>) -> Vec<(usize, Call)> {
    let last = calls.len();
    let numbered = calls
        .into_iter()
        .enumerate()
        .map(|(nth, call)| (nth + 1, call));
    let changing = numbered.filter(|(nth, call)| long() || *nth == last || !call.only_looks());
    let some = changing
        .enumerate()
        .filter(|(place, _)| has_its_turn(*place));
    some.map(|(_, call)| call).collect()
}

/// How often one and the same call is aimed at: what waits makes some calls more or fewer from run to run.
const AIMS: usize = 5;

/// For every call of `dmsnap ARGUMENTS`: `prepare`, die there, `reap` once, look around.
fn kill_at_each(world: &World, what: &str, prepare: impl Fn() -> Vec<String>) {
    let log = world.scene.path("strace.log");
    let arguments = prepare();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let calls = trace::calls(&log, &arguments);
    world.reap_once();
    world.assert_as_before("after the run without a kill");

    let fatal = fatal(calls);
    println!(
        "SIGKILL at {} calls of {what}: n, call, what was left, what reap did",
        fatal.len()
    );
    for (nth, call) in fatal {
        let dies = |_: &usize| {
            let arguments = prepare();
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let Injected { done, hit } = trace::with(&log, &call, "signal=KILL", "", &arguments);
            if hit {
                assert_eq!(done.status.signal(), Some(9), "{what}, {call:?}: {done:?}");
            } else {
                world.reap_once();
            }
            hit
        };
        let died = (0..AIMS).find(dies);
        assert!(died.is_some() || call.only_looks(), "not reached: {call:?}");
        let left = world.left();
        let reaped = world.reap_once();
        let missed = if died.is_some() {
            ""
        } else {
            "  (never come by again)"
        };
        println!("{nth:4}  {:40}  {left:24}  {reaped}{missed}", call.brief());
        world.assert_as_before(&format!("{what}, killed at {nth}, {call:?}"));
    }
}

fn words(words: &[&str], paths: &[&Path]) -> Vec<String> {
    let paths = paths
        .iter()
        .map(|path| path.to_str().expect("ASCII").to_owned());
    words
        .iter()
        .map(|word| (*word).to_owned())
        .chain(paths)
        .collect()
}

#[test]
fn sigkill_at_every_call_of_create() {
    let world = World::new();
    kill_at_each(&world, "create", || {
        let mut create = words(&["create"], &[world.scene.image(), &world.fresh_cow()]);
        create.push(world.victim().to_owned());
        create
    });
}

#[test]
fn sigkill_at_every_call_of_create_over_a_stale_alias() {
    let world = World::new();
    let alias = Path::new("/dev/mapper").join(world.victim());
    let log = world.scene.path("strace.log");
    let create = || {
        symlink("/dev/mapper/../dm-987654", &alias).expect("a stale alias");
        let mut create = words(&["create"], &[world.scene.image(), &world.fresh_cow()]);
        create.push(world.victim().to_owned());
        create
    };
    let arguments = create();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let calls = trace::calls(&log, &arguments);
    world.reap_once();
    // Up to the alias it is a create like any other.
    let from = calls
        .iter()
        .position(|call| call.name.starts_with("symlink"));
    for (place, call) in calls[from.expect("create makes an alias")..]
        .iter()
        .enumerate()
    {
        if !has_its_turn(place) {
            continue;
        }
        create();
        let injected = trace::with(&log, call, "signal=KILL", "", &arguments);
        assert!(injected.hit, "not reached: {call:?}");
        let left = world.left();
        let reaped = world.reap_once();
        println!("      {:40}  {left:24}  {reaped}", call.brief());
        world.assert_as_before(&format!("killed at {call:?}"));
    }
}

#[test]
fn sigkill_at_every_call_of_cleanup() {
    let world = World::new();
    let file = world.scene.path("handles.json");
    kill_at_each(&world, "cleanup", || {
        let handles = serde_json::to_string(&world.make_victim()).expect("plain data");
        fs::write(&file, handles).expect("room");
        words(&["cleanup"], &[&file])
    });
}

#[test]
fn sigkill_at_every_call_of_reap() {
    let world = World::new();
    let stale = Path::new("/dev/mapper").join(format!("{}-stale", world.victim()));
    kill_at_each(&world, "reap", || {
        let _ = fs::remove_file(&stale);
        world.make_victim();
        symlink("/dev/mapper/../dm-987654", &stale).expect("a stale alias");
        words(&["reap", "--keep", &world.live_name()], &[])
    });
}

/// Two layers from their files; what is there of them goes by itself or with the sweep, and the files are as they were.
#[test]
fn sigkill_at_every_call_of_putting_a_stack_together() {
    let world = World::new();
    let victim = world.victim().to_owned();
    let [one, two] = ["one.cow", "two.cow"].map(|name| world.scene.path(name));
    world.make_victim();
    for (nth, next) in [&one, &two].into_iter().enumerate() {
        let (layer, next) = (format!("{victim}-{nth}"), next.to_str().expect("ASCII"));
        let arguments = ["checkpoint", "--make-cow", "1M", &victim, &layer, next];
        let frozen = world.dmsnap(&arguments);
        assert!(frozen.status.success(), "{frozen:?}");
    }
    let removed = world.dmsnap(&["remove", &victim]);
    assert!(removed.status.success(), "{removed:?}");
    world.assert_as_before("frozen twice");
    let cows = [one, world.scene.path("victim.cow")];
    let read = || {
        cows.each_ref()
            .map(|cow| fs::read(cow).expect("a COW file"))
    };
    let before = read();
    kill_at_each(&world, "layer", || {
        let mut layer = words(&["layer"], &[world.scene.image(), &cows[0], &cows[1]]);
        layer.push(victim.clone());
        layer
    });
    assert!(read() == before, "a layer's COW file has changed");
}

/// For every ioctl of `dmsnap ARGUMENTS`: `prepare`, die there, `repair` once: the live snapshot goes on. Returns how
/// many deaths left it suspended.
fn kill_and_repair(world: &World, arguments: &[&str], prepare: impl Fn()) -> usize {
    let (log, name) = (world.scene.path("strace.log"), world.live_name());
    prepare();
    let calls = trace::calls(&log, arguments);
    let mut suspended = 0;
    let ioctls = calls.iter().filter(|call| call.name == "ioctl").enumerate();
    let fatal = ioctls.filter(|(place, call)| !call.only_looks() || has_its_turn(*place));
    for (_, call) in fatal {
        prepare();
        let injected = trace::with(&log, call, "signal=KILL", "", arguments);
        assert!(injected.hit, "not reached: {call:?}");
        let left = dm_info(&name, "attr");
        let repaired = world.dmsnap(&["repair", &name]);
        assert!(repaired.status.success(), "{call:?}: {repaired:?}");
        let said = String::from_utf8_lossy(&repaired.stdout);
        println!("      {:40}  {left}  {}", call.brief(), said.trim_end());
        suspended += usize::from(left == "L-sw");
        assert_eq!(dm_info(&name, "attr"), "L--w", "{call:?}");
        let again = world.dmsnap(&["repair", &name]);
        assert!(
            again.status.success() && again.stdout.is_empty(),
            "{call:?}"
        );
        world.assert_as_before(&format!("killed at {call:?}, and repaired"));
    }
    suspended
}

#[test]
fn sigkill_at_every_ioctl_of_a_live_export_and_a_repair() {
    let world = World::new();
    let output = world.scene.path("exported.img");
    let path = output.to_str().expect("ASCII");
    let remove = || drop(fs::remove_file(&output));
    let suspended = kill_and_repair(&world, &["export", &world.live_name(), path], remove);
    assert!(
        suspended > 0,
        "it dies between the suspension and the resume too"
    );
    remove();
}

#[test]
fn sigkill_at_every_ioctl_of_a_repair_and_another_one() {
    let world = World::new();
    let name = world.live_name();
    let suspend = || drop(run!("dmsetup", "suspend", &name));
    let suspended = kill_and_repair(&world, &["repair", &name], suspend);
    assert!(suspended > 0);
}

/// A snapshot with data in it, to be frozen.
struct Freezing<'a> {
    world: &'a World,
    layer: String,
    next: PathBuf,
    back: PathBuf,
}

impl<'a> Freezing<'a> {
    fn new(world: &'a World) -> Self {
        Self {
            world,
            layer: format!("{}-layer", world.victim()),
            next: world.scene.path("next.cow"),
            back: world.scene.path("back.cow"),
        }
    }

    fn checkpoint(&self, keep: bool) -> Vec<&str> {
        let next = self.next.to_str().expect("ASCII");
        let mut words = vec!["checkpoint", "--make-cow", "1M", self.world.victim()];
        words.extend([self.layer.as_str(), next]);
        words.extend(keep.then_some("--keep"));
        words
    }

    fn node(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.world.victim())
    }

    fn prepare(&self) {
        self.world.make_victim();
        let disk = Direct::open(&self.node());
        disk.write(7, 8192, 4096).expect("room");
    }

    fn done(&self, arguments: &[&str], when: &str) {
        let done = self.world.dmsnap(arguments);
        assert!(done.status.success(), "{when}: {done:?}");
    }

    fn end(&self, when: &str) {
        self.done(&["remove", self.world.victim()], when);
        for file in [&self.next, &self.back] {
            let _ = fs::remove_file(file);
        }
        self.world.assert_as_before(when);
    }
}

/// Behind the last resume nobody waits; the sweep alone ends it all the same, and a layer that is to be kept is.
#[test]
fn a_checkpoint_that_was_killed_behind_its_pause_is_finished_by_a_sweep() {
    let world = World::new();
    let log = world.scene.path("strace.log");
    let freezing = Freezing::new(&world);
    let (victim, layer) = (world.victim(), freezing.layer.as_str());
    for (keep, last) in [(false, "DM_DEV_REMOVE"), (true, "symlink")] {
        let arguments = freezing.checkpoint(keep);
        freezing.prepare();
        let calls = trace::calls(&log, &arguments);
        if keep {
            freezing.done(&["remove", victim], "without a kill");
            freezing.done(&["remove", layer], "without a kill");
            let _ = fs::remove_file(&freezing.next);
            world.assert_as_before("without a kill");
        } else {
            freezing.end("without a kill");
        }
        let call = calls.iter().rfind(|call| call.is_about(last));
        let call = call.unwrap_or_else(|| panic!("no call about {last}: {calls:?}"));
        freezing.prepare();
        let injected = trace::with(&log, call, "signal=KILL", "", &arguments);
        assert!(injected.hit, "not reached: {call:?}");
        assert_eq!(dm_info(victim, "attr"), "L--w", "nobody waits");
        let reap = ["reap", "--keep", victim, "--keep", layer];
        freezing.done(&[&reap[..], &["--keep", &world.live_name()]].concat(), last);
        let state = run!("dmsetup", "info", layer);
        assert_eq!(state.contains("DEFERRED REMOVE"), !keep, "{state}");
        assert_eq!(Path::new("/dev/mapper").join(layer).is_symlink(), keep);
        if keep {
            freezing.done(&["remove", victim], last);
            assert_eq!(dm_info(layer, "attr"), "L--w", "it is kept");
            freezing.done(&["remove", layer], last);
            let _ = fs::remove_file(&freezing.next);
            world.assert_as_before(last);
        } else {
            freezing.end(last);
        }
    }
}

/// Back at the checkpoint, or as before, and nothing between.
#[test]
fn sigkill_at_every_ioctl_of_a_rollback_then_one_repair() {
    let world = World::new();
    let log = world.scene.path("strace.log");
    let freezing = Freezing::new(&world);
    let back = freezing.back.to_str().expect("ASCII");
    let rollback = ["rollback", "--make-cow", "1M", world.victim(), back];
    let prepare = || {
        freezing.prepare();
        freezing.done(&freezing.checkpoint(false), "frozen");
        let disk = Direct::open(&freezing.node());
        disk.write(8, 8192, 4096).expect("room");
        disk.write(8, 16384, 4096).expect("room");
    };
    prepare();
    let calls = trace::calls(&log, &rollback);
    freezing.end("after the run without a kill");
    let changing = calls
        .iter()
        .filter(|call| call.name == "ioctl" && !call.only_looks());
    for (place, call) in changing.enumerate() {
        let paused = call.is_about("DM_DEV_SUSPEND");
        if !has_its_turn(place) && !paused {
            continue;
        }
        prepare();
        let injected = trace::with(&log, call, "signal=KILL", "", &rollback);
        assert!(injected.hit, "not reached: {call:?}");
        let left = dm_info(world.victim(), "attr");
        let repaired = world.dmsnap(&["repair"]);
        assert!(repaired.status.success(), "{call:?}: {repaired:?}");
        let said = String::from_utf8_lossy(&repaired.stdout);
        println!("      {:40}  {left}  {}", call.brief(), said.trim_end());
        assert_eq!(dm_info(world.victim(), "attr"), "L--w", "{call:?}");
        let disk = Direct::open(&freezing.node());
        let before = disk.reads(8, 8192, 4096);
        assert!(before || disk.reads(7, 8192, 4096), "{call:?}");
        assert_eq!(disk.reads(8, 16384, 4096), before, "{call:?}: between");
        drop(disk);
        freezing.end(&format!("killed at {call:?}, and repaired"));
    }
}

/// The output has no name until it is whole, and the files are as they were.
#[test]
fn sigkill_at_every_call_of_a_flattening() {
    let world = World::new();
    let log = world.scene.path("strace.log");
    let freezing = Freezing::new(&world);
    freezing.prepare();
    freezing.done(&freezing.checkpoint(false), "frozen");
    Direct::open(&freezing.node())
        .write(8, 16384, 4096)
        .expect("room");
    freezing.done(&["remove", world.victim()], "down");
    world.assert_as_before("frozen, and down");
    let flat = world.scene.path("flat.cow");
    let cows = [world.scene.path("victim.cow"), freezing.next.clone()];
    let [one, two] = cows.each_ref().map(|cow| cow.to_str().expect("ASCII"));
    let arguments = ["flatten", one, two, flat.to_str().expect("ASCII")];
    let read = || {
        cows.each_ref()
            .map(|cow| fs::read(cow).expect("a COW file"))
    };
    let before = read();
    let calls = trace::calls_from(&log, &arguments, &[one]);
    let whole = fs::read(&flat).expect("it was made");
    fs::remove_file(&flat).expect("ours");
    let mut named = 0;
    for (_, call) in fatal(calls) {
        let injected = trace::with(&log, &call, "signal=KILL", "", &arguments);
        assert!(injected.hit, "not reached: {call:?}");
        let made = fs::read(&flat).ok();
        println!("      {:40}  {}", call.brief(), made.is_some());
        if let Some(made) = made {
            assert!(made == whole, "{call:?}: not whole");
            fs::remove_file(&flat).expect("ours");
            named += 1;
        }
        assert!(read() == before, "{call:?}: a COW file has changed");
    }
    let left: Vec<_> = fs::read_dir(world.scene.dir())
        .expect("a directory")
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    println!("{named} of the deaths left the output: {left:?}");
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().contains("flat"))
    );
}

#[test]
fn sigkill_at_every_ioctl_of_a_checkpoint_then_one_repair() {
    let world = World::new();
    let log = world.scene.path("strace.log");
    let freezing = Freezing::new(&world);
    let (victim, node) = (world.victim(), freezing.node());
    let arguments = freezing.checkpoint(false);
    let prepare = || freezing.prepare();
    let end = |when: &str| freezing.end(when);
    prepare();
    let calls = trace::calls(&log, &arguments);
    end("after the run without a kill");
    let ioctls = calls.iter().filter(|call| call.name == "ioctl");
    let fatal = ioctls.filter(|call| !call.only_looks());
    let mut suspended = 0;
    for call in fatal {
        prepare();
        let injected = trace::with(&log, call, "signal=KILL", "", &arguments);
        assert!(injected.hit, "not reached: {call:?}");
        let left = dm_info(victim, "attr");
        let repaired = world.dmsnap(&["repair"]);
        assert!(repaired.status.success(), "{call:?}: {repaired:?}");
        let said = String::from_utf8_lossy(&repaired.stdout);
        println!("      {:40}  {left}  {}", call.brief(), said.trim_end());
        suspended += usize::from(left.ends_with("sw"));
        assert_eq!(dm_info(victim, "attr"), "L--w", "{call:?}");
        let again = world.dmsnap(&["repair"]);
        assert!(
            again.status.success() && again.stdout.is_empty(),
            "{call:?}: {again:?}"
        );
        assert!(Direct::open(&node).reads(7, 8192, 4096), "{call:?}");
        end(&format!("killed at {call:?}, and repaired"));
    }
    assert!(suspended >= 2, "it dies in the pause too");
}
