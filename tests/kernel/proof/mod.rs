//! The proof that nothing leaks and nothing foreign is touched: kills and faults at every system call, contention,
//! scale, soak, a full disk, a stuck udevd, and races between processes.
//!
//! Each proof has a short form, for every run of the kernel tests, and a long one, `DMSNAP_TEST_LONG=1`, which
//! `tests/vm/run soak` asks for. Both assert the same; they differ in how many and how often: of the system calls to
//! die or fail at, the short form takes every other one, and which ones depends on the kernel. The tables are printed:
//! `--show-output` shows them of tests that pass.

mod contention;
mod fault;
mod faulty;
mod full_disk;
mod identity;
mod kill;
mod races;
mod scale;
mod soak;
mod stuck_udev;
mod trace;
pub(crate) mod worker;
mod world;

use std::time::{Duration, Instant};

use crate::common::udev;

/// Whether the long form was asked for.
fn long() -> bool {
    std::env::var_os("DMSNAP_TEST_LONG").is_some_and(|value| value == "1")
}

/// `short`, or `long` in the long form.
pub(crate) fn short_or_long<T>(short: T, in_full: T) -> T {
    if long() { in_full } else { short }
}

/// Whether the call of that place in a run has its turn here.
fn has_its_turn(nth: usize) -> bool {
    let stated = std::env::var("DMSNAP_TEST_KERNEL").unwrap_or_default();
    let digits = stated.bytes().filter(u8::is_ascii_digit);
    let here = digits.map(|digit| usize::from(digit - b'0')).sum::<usize>() + usize::from(udev());
    long() || (nth + here).is_multiple_of(2)
}

/// What `work` returns, and how long it took.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

pub(crate) fn median(mut of: Vec<Duration>) -> Duration {
    of.sort_unstable();
    of[of.len() / 2]
}
