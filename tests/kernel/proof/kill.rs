//! SIGKILL at every system call of create, cleanup, reap and of putting layers together: one sweep afterwards leaves
//! nothing. At every ioctl of a live export, a checkpoint and a repair: one repair afterwards has the disk go on.
//!
//! strace delivers the signal on entering the call, and the kernel does not begin a call with a fatal signal pending
//! (`syscall_trace_enter`, `ptrace_report_syscall`): a process killed at call n has done all up to n - 1 and no more.
//! Since nothing happens between two calls, death right after call n is death at n + 1, which has its own row.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

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

#[test]
fn sigkill_at_every_ioctl_of_a_checkpoint_then_one_repair() {
    let world = World::new();
    let log = world.scene.path("strace.log");
    let (victim, layer) = (
        world.victim().to_owned(),
        format!("{}-layer", world.victim()),
    );
    let next = world.scene.path("next.cow");
    let path = next.to_str().expect("ASCII");
    let arguments = ["checkpoint", "--make-cow", "1M", &victim, &layer, path];
    let node = Path::new("/dev/mapper").join(&victim);
    let prepare = || {
        world.make_victim();
        Direct::open(&node).write(7, 8192, 4096).expect("room");
    };
    let end = |when: &str| {
        let removed = world.dmsnap(&["remove", &victim]);
        assert!(removed.status.success(), "{when}: {removed:?}");
        let _ = fs::remove_file(&next);
        world.assert_as_before(when);
    };
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
        let left = dm_info(&victim, "attr");
        let repaired = world.dmsnap(&["repair"]);
        assert!(repaired.status.success(), "{call:?}: {repaired:?}");
        let said = String::from_utf8_lossy(&repaired.stdout);
        println!("      {:40}  {left}  {}", call.brief(), said.trim_end());
        suspended += usize::from(left.ends_with("sw"));
        assert_eq!(dm_info(&victim, "attr"), "L--w", "{call:?}");
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
