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
    /// From now on the calling thread, waking, takes no core from an ordinary one.
    fn stand_back(&self) -> Result<(), Errno>;
    fn random(&self) -> Result<u128, Errno>;
}
