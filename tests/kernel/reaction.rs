//! How soon a removal notices that the device's holder has closed it, and what waiting costs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use dmsnap::error::{Retry, Step};
use dmsnap::teardown::Outcome;
use dmsnap::timings::Timings;
use dmsnap::{Snapshot, Teardown};

use crate::common::reading::number;
use crate::common::{Scene, run};
use crate::proof::{repeated, short_or_long};

fn name_of(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

/// Removes a snapshot whose holder closes `node` after `hold`. How long after the close `DM_DEV_REMOVE` was issued.
fn reaction(snapshot: &Snapshot, node: &Path, hold: Duration, retry: &Retry) -> Duration {
    let name = name_of(snapshot);
    let holder = File::open(node).expect("the device opens");
    thread::scope(|scope| {
        let closing = scope.spawn(move || {
            thread::sleep(hold);
            drop(holder);
            Instant::now()
        });
        let begin = Instant::now();
        let (removed, timings) = Timings::of(|| Teardown::new().retry(*retry).remove(&name));
        assert_eq!(removed, Ok(Outcome::Removed));
        let issued = timings.calls.iter().rfind(|call| call.step == Step::Remove);
        let issued = begin + issued.expect("it was removed").start;
        let closed = closing.join().expect("it only closes");
        // Below zero: the kernel was done with it before the holder got to its clock.
        issued.saturating_duration_since(closed)
    })
}

/// Numbers that look random, the same ones in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: Duration) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let share = u32::try_from(self.0 >> 33).unwrap_or(0);
        limit.mul_f64(f64::from(share) / f64::from(u32::MAX >> 1))
    }
}

fn percentile(sorted: &[Duration], share: usize) -> Duration {
    sorted[(sorted.len() * share / 100).min(sorted.len() - 1)]
}

/// Prints the distribution; returns its median.
fn told(what: &str, mut reactions: Vec<Duration>) -> Duration {
    reactions.sort_unstable();
    let [p50, p90, p99] = [50, 90, 99].map(|share| percentile(&reactions, share));
    println!(
        "{what}: {} removals, from the close to DM_DEV_REMOVE p50 {p50:.1?} p90 {p90:.1?} p99 {p99:.1?} max {:.1?}",
        reactions.len(),
        reactions.last().copied().unwrap_or_default()
    );
    p50
}

/// A node of the device's own that nobody watches, as a jailed hypervisor has one.
fn jailed(scene: &Scene, snapshot: &Snapshot) -> PathBuf {
    let node = scene.path(format!("{}.node", name_of(snapshot)));
    let (major, minor) = {
        let number = number(snapshot.device());
        let (major, minor) = number.split_once(':').expect("two numbers");
        (major.to_owned(), minor.to_owned())
    };
    run!("mknod", &node, "b", major, minor);
    node
}

#[test]
fn a_removal_follows_its_holders_close() {
    let scene = Scene::new();
    let mut dice = Dice(42);
    let mut reactions = |count, from, within, jail, retry: &Retry| -> Vec<_> {
        let one = |_| {
            let snapshot = scene.snapshot();
            let node = if jail {
                jailed(&scene, &snapshot)
            } else {
                snapshot.device().to_owned()
            };
            let took = reaction(&snapshot, &node, from + dice.below(within), retry);
            fs::remove_file(scene.path(format!("{}.cow", name_of(&snapshot)))).expect("it is idle");
            took
        };
        (0..count).map(one).collect()
    };
    let ms = Duration::from_millis;
    let most = repeated(16, 300);
    let few = repeated(3, 60);
    let retry = Retry::default();
    // The bounds leave room for a guest on a busy machine, whose pauses of 1 ms take 5.
    let soon = reactions(most, ms(0), ms(300), false, &retry);
    assert!(told("closed within 0.3 s", soon) < ms(25));
    let script = Retry::default().pauses(ms(100), ms(100));
    let polled = reactions(few, ms(0), ms(300), false, &script);
    told("closed within 0.3 s, looking every 100 ms", polled);
    let jailed = reactions(few, ms(0), ms(300), true, &retry);
    assert!(told("another node closed within 0.3 s", jailed) < ms(25));
    let watched = reactions(few, ms(1100), ms(300), false, &retry);
    assert!(told("closed after 1.1 to 1.4 s", watched) < ms(25));
    let unseen = reactions(few, ms(1100), ms(300), true, &retry);
    assert!(told("another node closed after 1.1 to 1.4 s", unseen) < ms(40));
}

/// What this thread has had of a CPU (/proc/thread-self/schedstat, the first number, in ns).
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel keeps it");
    let ns = text.split(' ').next().and_then(|ns| ns.parse().ok());
    Duration::from_nanos(ns.expect("a number"))
}

#[test]
fn a_long_wait_takes_next_to_no_cpu_time() {
    let scene = Scene::new();
    let wait = short_or_long(Duration::from_secs(3), Duration::from_secs(15));
    for (what, retry) in [
        ("as by default", Retry::until(wait)),
        (
            "every millisecond",
            Retry::until(wait).pauses(Duration::from_micros(100), Duration::from_millis(1)),
        ),
    ] {
        let snapshot = scene.snapshot();
        let holder = File::open(snapshot.device()).expect("the device opens");
        // Looking for the holders at the end is not part of the wait.
        let idle = cpu_time();
        Teardown::new()
            .retry(Retry::ONCE)
            .remove(name_of(&snapshot))
            .expect_err("it is open");
        let once = cpu_time().saturating_sub(idle);
        let hold = wait - Duration::from_millis(50);
        let spent = thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(hold);
                drop(holder);
            });
            let before = cpu_time();
            let removed = Teardown::new().retry(retry).remove(name_of(&snapshot));
            let spent = cpu_time().saturating_sub(before);
            assert_eq!(removed, Ok(Outcome::Removed));
            spent
        });
        println!(
            "{wait:.1?} of waiting, asking {what}: {spent:.1?} of CPU time; asking once: {once:.1?}"
        );
        // Emulated on a busy machine, and with the removal itself; asking every millisecond is there to compare.
        let bound = if retry == Retry::until(wait) { 4 } else { 1 };
        assert!(spent < wait / bound, "{spent:.1?}");
    }
}
