//! The machine's clock, waits and random numbers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Machine;
use super::closes::Closes;
use crate::kernel::seam::Clock;
use crate::kernel::sys;

impl Clock for Machine {
    type Watch = Closes;

    fn now(&self) -> Duration {
        self.start.get_or_init(Instant::now).elapsed()
    }

    fn sleep(&self, pause: Duration) {
        std::thread::sleep(pause);
    }

    fn watch_closes(&self, nodes: &[PathBuf]) -> Result<Closes, Errno> {
        Closes::of(nodes)
    }

    fn wait_for_close(&self, watch: &Closes, pause: Duration) -> bool {
        watch.wait(pause)
    }

    fn stand_back(&self) -> Result<(), Errno> {
        sys::make_batch_thread()
    }

    fn random(&self) -> Result<u128, Errno> {
        sys::random()
    }
}
