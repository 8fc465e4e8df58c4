//! The proof that nothing leaks and nothing foreign is touched: kills and faults at every system call, contention,
//! scale, soak, a full disk, a stuck udevd, and races between processes.
//!
//! Each proof has a short form, for every run of the kernel tests, and a long one, `DMSNAP_TEST_LONG=1`, which
//! `tests/vm/run soak` asks for. Both assert the same; they differ in how many and how often. The tables are
//! printed: `--show-output` shows them of tests that pass.

mod contention;
mod fault;
mod full_disk;
mod identity;
mod kill;
mod races;
mod scale;
mod soak;
mod stuck_udev;
mod trace;
mod worker;
mod world;

use std::time::{Duration, Instant};

use crate::common::{output, udev};

/// Whether the long form was asked for.
fn long() -> bool {
    std::env::var_os("DMSNAP_TEST_LONG").is_some_and(|value| value == "1")
}

/// `short`, or `long` in the long form.
pub(crate) fn short_or_long<T>(short: T, in_full: T) -> T {
    if long() { in_full } else { short }
}

/// Waits for udevd, if there is one, to come to the end of what some hundred snapshots have it look at. That takes it
/// longer than other tests wait, and is not theirs to wait for.
fn drain() {
    let settle = || output!("udevadm", "settle", "--timeout=40");
    let drained = !udev() || (0..10).any(|_| settle().status.success());
    assert!(drained, "udevd does not settle");
}

/// What `work` returns, and how long it took.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort_unstable();
    of[of.len() / 2]
}
