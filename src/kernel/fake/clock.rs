//! Time on the fake machine, which passes only where somebody waits.

use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

use super::Script;
use crate::error::Step;
use crate::kernel::Clock;

impl Clock for Script {
    type Watch = ();

    fn now(&self) -> Duration {
        self.world.borrow().now
    }

    fn sleep(&self, pause: Duration) {
        let mut world = self.world.borrow_mut();
        world.now += pause;
        world.settle();
    }

    fn watch_closes(&self, _nodes: &[PathBuf]) -> Result<(), Errno> {
        Ok(())
    }

    /// The users' close is seen as it happens.
    fn wait_for_close(&self, (): &(), pause: Duration) -> bool {
        let left = {
            let world = self.world.borrow();
            world.busy_until.checked_sub(world.now)
        };
        let seen = left.filter(|left| !left.is_zero() && *left <= pause);
        self.sleep(seen.unwrap_or(pause));
        seen.is_some()
    }

    fn stand_back(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn random(&self) -> Result<u128, Errno> {
        self.call(Step::Random)?;
        Ok(42)
    }
}
