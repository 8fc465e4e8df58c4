//! How a removal notices that the device's holder has closed it, and what waiting costs. How soon it does is the bench's
//! (`busy`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dmsnap::error::Retry;
use dmsnap::timings::Timings;
use dmsnap::{ErrorKind, Snapshot, Teardown};

use crate::common::reading::number;
use crate::common::tools::start;
use crate::common::{Scene, dmsnap_under, eventually, run};
use crate::proof::short_or_long;

/// Nothing takes this long that does not hang.
const HANGS: Duration = Duration::from_secs(60);

fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

/// A node of the device's own that nobody watches, as a jailed hypervisor has one.
fn jailed(scene: &Scene, snapshot: &Snapshot) -> PathBuf {
    let node = scene.path(format!("{}.node", name_of(snapshot)));
    let number = number(snapshot.device());
    let (major, minor) = number.split_once(':').expect("two numbers");
    run!("mknod", &node, "b", major, minor);
    node
}

/// The pauses of a `dmsnap remove` whose holder closes `node` once closes are watched for: whether each was ended by a
/// close. The pauses before the watch are plain sleeps.
fn pauses(scene: &Scene, snapshot: &Snapshot, node: &Path) -> Vec<bool> {
    let log = scene.path("pauses.log");
    let _ = fs::remove_file(&log);
    let holder = File::open(node).expect("the device opens");
    let word = log.to_str().expect("ASCII");
    let calls = "trace=inotify_add_watch,poll,ppoll";
    let mut command: Command = dmsnap_under(&["strace", "-o", word, "-e", calls]);
    let running = start(command.args(["remove", "--deadline", "100s", &name_of(snapshot)]));
    let logged = || fs::read_to_string(&log).unwrap_or_default();
    let watched = || logged().contains("inotify_add_watch");
    assert!(eventually(HANGS, watched), "closes are not watched for");
    drop(holder);
    let done = running.join();
    assert!(done.status.success(), "{done:?}");
    let text = logged();
    let (_, after) = text.split_once("inotify_add_watch").expect("it was there");
    let polls = after.lines().filter(|line| line.contains("poll("));
    polls.map(|line| line.contains(" = 1 ")).collect()
}

/// The event may come while nobody waits for it, and then it ends the next pause at once.
#[test]
fn a_removal_is_told_of_its_holders_close() {
    let scene = Scene::new();
    // A close that comes between two pauses ends none: on a busy host that may be the first one, and the second.
    let ended = (0..10).any(|_| {
        let seen = scene.snapshot();
        let by_the_node = pauses(&scene, &seen, seen.device());
        println!("closed: {by_the_node:?}");
        by_the_node.contains(&true)
    });
    assert!(ended, "no pause was ended by it");
    let unseen = scene.snapshot();
    let by_another = pauses(&scene, &unseen, &jailed(&scene, &unseen));
    println!("another node closed: {by_another:?}");
    assert!(!by_another.contains(&true), "whose close was that");
}

/// What a wait costs is its looks. They are bounded from above: a pause may take longer than it is to, never shorter.
#[test]
fn a_long_wait_looks_a_bounded_number_of_times() {
    let scene = Scene::new();
    let wait = short_or_long(Duration::from_secs(3), Duration::from_secs(15));
    let snapshot = scene.snapshot();
    let holder = File::open(snapshot.device()).expect("the device opens");
    let (removed, timings) = Timings::of(|| {
        Teardown::new()
            .retry(Retry::until(wait))
            .remove(name_of(&snapshot))
    });
    let error = removed.expect_err("it stays open");
    assert_eq!(error.kind(), ErrorKind::Busy);
    // 250 us between two looks in the first second, then 10 ms; and at the end, who has it open.
    let second = Duration::from_secs(1);
    let looks = |from: Duration| {
        let calls = timings.calls.iter();
        calls.filter(|call| call.start >= from).count()
    };
    let (all, later) = (looks(Duration::ZERO), looks(second));
    let allowed = usize::try_from((wait - second).as_millis() / 10).expect("few") + 40;
    println!("{wait:.1?} of waiting: {all} calls, {later} after the first second");
    assert!(later <= allowed, "{later} calls, and {allowed} allowed");
    assert!(all <= allowed + 4100, "{all} calls");
    drop(holder);
    snapshot.cleanup().expect("nobody has it open");
}
