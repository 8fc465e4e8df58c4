//! Time, waits and random numbers.

use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

/// Calls that are neither about files nor about devices.
pub(crate) trait Clock {
    /// A watch of device nodes, which reports closes.
    type Watch;

    fn now(&self) -> Duration;
    fn sleep(&self, pause: Duration);
    fn watch_closes(&self, nodes: &[PathBuf]) -> Result<Self::Watch, Errno>;
    /// Waits for a close, at most for `pause`; returns true if there was one.
    fn wait_for_close(&self, watch: &Self::Watch, pause: Duration) -> bool;
    /// Makes the calling thread a batch one (`SCHED_BATCH`): when it wakes, it takes no core from an ordinary thread.
    fn stand_back(&self) -> Result<(), Errno>;
    fn random(&self) -> Result<u128, Errno>;
}
