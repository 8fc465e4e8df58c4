//! Waiting for what is busy.

use std::path::PathBuf;
use std::time::Duration;

use super::timings;
use crate::error::{Result, Retry, Verdict};
use crate::kernel::Clock;

/// Repeats `attempt` for as long as it fails with `while_it_is` and `retry` allows.
pub(crate) fn patiently<H: Clock, T>(
    host: &H,
    retry: &Retry,
    while_it_is: Verdict,
    attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    watchfully(host, retry, while_it_is, Vec::new, attempt)
}

/// As [`patiently`]; once it takes long, `nodes` are watched for closes, and a close ends the pause.
pub(crate) fn watchfully<H: Clock, T>(
    host: &H,
    retry: &Retry,
    while_it_is: Verdict,
    nodes: impl Fn() -> Vec<PathBuf>,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut wait = Wait::new(host, retry);
    loop {
        match attempt() {
            Err(error) if error.verdict() == Some(while_it_is) => {
                if !wait.pause(1, &nodes) {
                    return Err(error);
                }
            }
            settled => return settled,
        }
    }
}

/// A wait for busy devices: pauses as the policy has them, between one attempt and the next.
pub(crate) struct Wait<'a, H: Clock> {
    host: &'a H,
    retry: &'a Retry,
    start: Duration,
    /// Since when no close was seen.
    still_since: Duration,
    attempts: u32,
    watch: Watching<H::Watch>,
}

enum Watching<W> {
    NotYet,
    By(W),
    /// There is no node, or no watching it.
    Never,
}

impl<'a, H: Clock> Wait<'a, H> {
    pub(crate) fn new(host: &'a H, retry: &'a Retry) -> Self {
        let start = host.now();
        Self {
            host,
            retry,
            start,
            still_since: start,
            attempts: 0,
            watch: Watching::NotYet,
        }
    }

    /// Pauses after an attempt at so many devices; `false` when the deadline has come. `nodes` are theirs.
    pub(crate) fn pause(&mut self, devices: usize, nodes: impl Fn() -> Vec<PathBuf>) -> bool {
        let now = self.host.now();
        let elapsed = now.saturating_sub(self.start);
        let Some(pause) = self.retry.pause(self.attempts, devices, elapsed) else {
            return false;
        };
        self.attempts = self.attempts.saturating_add(1);
        let still = now.saturating_sub(self.still_since);
        if !self.retry.watches(still) {
            timings::pause(|| self.host.sleep(pause));
            return true;
        }
        let longer = self.retry.watching(pause, elapsed);
        match &self.watch {
            Watching::NotYet => {
                // The last close may have come before the watch: the next attempt follows at once.
                let watch = Some(nodes())
                    .filter(|nodes| !nodes.is_empty())
                    .and_then(|nodes| self.host.watch_closes(&nodes).ok());
                self.watch = watch.map_or(Watching::Never, Watching::By);
            }
            Watching::By(watch) => {
                if timings::pause(|| self.host.wait_for_close(watch, longer)) {
                    self.attempts = 0;
                    self.still_since = self.host.now();
                }
            }
            Watching::Never => timings::pause(|| self.host.sleep(longer)),
        }
        true
    }
}
