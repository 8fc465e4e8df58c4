//! How long a busy device is waited for.

use std::time::Duration;

/// How long a busy device is waited for, and how often it is asked meanwhile.
///
/// The first pause is short because the usual holder (a VMM that has just exited, a probing udev) is gone within
/// a millisecond; each pause is twice the one before, up to 250 us. After a second they become 10 ms, and the device's
/// node is watched (inotify, `IN_CLOSE`), so that a close ends the pause and brings the short ones back. So a removal
/// follows its holder's last close at once, and a wait of 15 s takes some 5,400 looks.
///
/// A holder that opened another node of the same device (one made by `mknod` in a jail), and one without a node (a
/// mount, swap), closes unseen: after the first second, that is noticed within 10 ms. [`Retry::pauses`] keeps to its
/// own ceiling instead, and nothing is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    deadline: Duration,
    first: Duration,
    ceiling: Duration,
    /// The pause while a close would be told of; no longer than `ceiling` if nothing is to be watched.
    watching: Duration,
}

/// For how long short pauses go on, from the beginning and from each close that was seen: the event of a close comes
/// before the release, which may have pages to write first.
///
/// A watch is for long waits only: the kernel ends one with a grace period (`fsnotify_destroy_group`), 10 to 25 ms by
/// which a removal returns later.
const RESTLESS: Duration = Duration::from_secs(1);

impl Retry {
    /// One attempt, no waiting.
    pub const ONCE: Self = Self::until(Duration::ZERO);

    /// One attempt, at a deadline that has come: unlike [`Retry::ONCE`] it counts as having waited.
    pub(crate) const LAST: Self = Self::until(Duration::from_nanos(1));

    /// Repeats for at most `deadline`, pausing 100 us at first, and 250 us or, from the second second on, 10 ms at
    /// most.
    #[must_use]
    pub const fn until(deadline: Duration) -> Self {
        Self {
            deadline,
            first: Duration::from_micros(100),
            ceiling: Duration::from_micros(250),
            watching: Duration::from_millis(10),
        }
    }

    /// Sets the first pause and the longest one. The device is not watched then.
    #[must_use]
    pub const fn pauses(mut self, first: Duration, ceiling: Duration) -> Self {
        self.first = first;
        self.ceiling = ceiling;
        self.watching = ceiling;
        self
    }

    /// For questions that cost more than a look at an open count, and are answered by no close: with the longer pauses
    /// from the beginning.
    pub(crate) const fn sparing(mut self) -> Self {
        self.ceiling = self.watching;
        self
    }

    /// Returns the same with `elapsed` taken off the deadline.
    pub(crate) fn less(mut self, elapsed: Duration) -> Self {
        self.deadline = self.deadline.saturating_sub(elapsed);
        self
    }

    /// True once the device has stayed busy for [`RESTLESS`]: closes are then watched for.
    pub(crate) fn watches(&self, still: Duration) -> bool {
        self.watching > self.ceiling && still >= RESTLESS
    }

    /// Returns the longer pause that is used while closes are watched for.
    pub(crate) fn watching(&self, pause: Duration, elapsed: Duration) -> Duration {
        let left = self.deadline.saturating_sub(elapsed);
        self.watching.max(pause).min(left)
    }

    /// The pause after attempt number `attempt` (from 0), `elapsed` after the first one began; `None` when the
    /// deadline has come. The last pause is cut so that one attempt falls on the deadline itself.
    ///
    /// An attempt at more than eight devices is as much rarer as it takes longer.
    pub(crate) fn pause(
        &self,
        attempt: u32,
        devices: usize,
        elapsed: Duration,
    ) -> Option<Duration> {
        let left = self
            .deadline
            .checked_sub(elapsed)
            .filter(|left| !left.is_zero())?;
        let grown = self
            .first
            .saturating_mul(2u32.saturating_pow(attempt.min(31)));
        let rarer = u32::try_from(devices.div_ceil(8)).unwrap_or(u32::MAX);
        Some(grown.min(self.ceiling).saturating_mul(rarer).min(left))
    }
}

impl Default for Retry {
    /// 15 seconds.
    fn default() -> Self {
        Self::until(Duration::from_secs(15))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_from_well_under_a_millisecond_to_the_ceiling_and_end_on_the_deadline() {
        let pauses_of = |retry: Retry| {
            let mut elapsed = Duration::ZERO;
            let mut pauses = Vec::new();
            let attempt = |pauses: &Vec<_>| u32::try_from(pauses.len()).expect("few");
            while let Some(pause) = retry.pause(attempt(&pauses), 1, elapsed) {
                elapsed += pause;
                pauses.push(pause.as_micros());
            }
            (pauses, elapsed)
        };
        let ms = Duration::from_millis;
        assert_eq!(
            pauses_of(Retry::until(ms(2))),
            (vec![100, 200, 250, 250, 250, 250, 250, 250, 200], ms(2))
        );
        assert_eq!(
            pauses_of(Retry::until(ms(30)).sparing()),
            (
                vec![100, 200, 400, 800, 1600, 3200, 6400, 10_000, 7300],
                ms(30)
            )
        );
        assert_eq!(Retry::ONCE.pause(0, 1, Duration::ZERO), None);
        let retry = Retry::default();
        let longest = |devices| retry.pause(u32::MAX, devices, Duration::ZERO);
        assert_eq!(
            [1, 8, 9, 64].map(longest),
            [250, 250, 500, 2000].map(|us| Some(Duration::from_micros(us)))
        );
    }

    #[test]
    fn closes_are_watched_for_unless_the_pauses_are_the_callers() {
        let ms = Duration::from_millis;
        let retry = Retry::default();
        assert!(!retry.watches(ms(999)) && retry.watches(ms(1000)));
        assert_eq!(retry.watching(ms(1), ms(2000)), ms(10));
        assert_eq!(retry.watching(ms(1), ms(14_997)), ms(3));
        assert!(!retry.sparing().watches(ms(5000)));
        assert!(!retry.pauses(ms(1), ms(50)).watches(ms(5000)));
    }
}
