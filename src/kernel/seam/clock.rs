//! Time, waiting and chance.

use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

/// What a story asks of the machine besides files and devices.
pub(crate) trait Clock {
    /// Tells of closes of nodes.
    type Watch;

    fn now(&self) -> Duration;
    fn sleep(&self, pause: Duration);
    fn watch_closes(&self, nodes: &[PathBuf]) -> Result<Self::Watch, Errno>;
    /// Waits; says whether a close ended the wait.
    fn wait_for_close(&self, watch: &Self::Watch, pause: Duration) -> bool;
    fn random(&self) -> Result<u128, Errno>;
}
