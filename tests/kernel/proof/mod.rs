//! The proof that nothing leaks and nothing foreign is touched: kills and faults at every system call, contention,
//! scale, soak, a full disk, a stuck udevd, and races between processes.
//!
//! Each proof has a short form, for every run of the kernel tests, and a long one, `DMSNAP_TEST_LONG=1`, which
//! `tests/vm/run soak` asks for. Both assert the same; they differ in how many and how often: of the system calls to
//! die or fail at, the short form takes every fifth one, and which ones depends on the run, so that the five of
//! `tests/vm/run test` take all of them between them. The tables are printed: `--show-output` shows them of tests that
//! pass.

mod contention;
mod fault;
mod faulty;
mod forks;
mod full_disk;
mod identity;
mod kill;
mod meddling;
mod races;
mod scale;
mod soak;
mod stuck_udev;
mod thousands;
mod trace;
pub(crate) mod worker;
mod world;

use std::time::{Duration, Instant};

use crate::common::{guard, stated_kernel, udev};

/// Whether the long form was asked for.
pub(crate) fn long() -> bool {
    std::env::var_os("DMSNAP_TEST_LONG").is_some_and(|value| value == "1")
}

/// `short`, or `long` in the long form.
pub(crate) fn short_or_long<T>(short: T, in_full: T) -> T {
    if long() { in_full } else { short }
}

/// How often; in the short form less where udevd runs, which takes longer over a snapshot than we do, and whatever test
/// comes next waits for it.
pub(crate) fn repeated(short: usize, in_full: usize) -> usize {
    match (long(), udev()) {
        (true, _) => in_full,
        (false, false) => short,
        (false, true) => short.div_ceil(3),
    }
}

/// All of the points to stop a process at, or in the short form every other one, the same in every other run.
fn stops<'a>(points: &[&'a str]) -> impl Iterator<Item = &'a str> {
    let turn = turn(&stated_kernel(), udev());
    let has_its_turn = move |nth: usize| long() || nth % 2 == turn % 2;
    let numbered = points.iter().enumerate();
    numbered
        .filter(move |(nth, _)| has_its_turn(*nth))
        .map(|(_, point)| *point)
}

/// How many runs share what the short form deals out.
const TURNS: usize = 5;

/// Whether the call of that place in a run has its turn here.
fn has_its_turn(nth: usize) -> bool {
    long() || nth % TURNS == turn(&stated_kernel(), udev())
}

/// The turn of a run: the older kernels', the newest one's, and that with udevd, each have their own.
fn turn(kernel: &str, udev: bool) -> usize {
    let older = ["5.10", "6.1", "6.12"];
    let place = older.iter().position(|each| *each == kernel);
    if udev { 4 } else { place.unwrap_or(3) }
}

/// What `work` returns, and how long it took.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

#[test]
fn the_kernels_take_every_call_between_them() {
    guard();
    let mut turns = ["5.10", "6.1", "6.12", "7.3"]
        .map(|kernel| turn(kernel, false))
        .to_vec();
    turns.push(turn("6.12", true));
    turns.sort_unstable();
    assert_eq!(turns, (0..TURNS).collect::<Vec<_>>());
}
