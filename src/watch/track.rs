//! Tracks one watched snapshot: which changes are returned, and when it is read again. It makes no system call.

use std::time::Duration;

use crate::base::ChunkSize;
use crate::dm::{SnapshotStatus, Usage};
use crate::watch::Change;

/// The shortest pause between two reads of a store.
const SHORTEST: Duration = Duration::from_millis(2);

/// The longest pause between two reads of a store.
pub(crate) const LONGEST: Duration = Duration::from_secs(1);

/// The settings of a watch, which all its snapshots share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The usage from which on a snapshot is above, in percent.
    pub(crate) threshold: u8,
    /// The greatest rate at which a guest writes to new chunks, in bytes per second.
    pub(crate) peak_rate: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            threshold: 80,
            peak_rate: 1 << 30,
        }
    }
}

/// What is known about one snapshot.
#[derive(Debug)]
pub(crate) struct Track {
    chunk: ChunkSize,
    /// When it is to be read next.
    due: Duration,
    /// How much earlier it may be read, together with others.
    early: Duration,
    /// When it was read last, and its status then.
    last: Option<(Duration, SnapshotStatus)>,
    /// The rate at which it fills, in bytes per second.
    rate: u64,
    told: Option<Told>,
    /// How many reads have shown no change since it was returned as above.
    calm: u32,
    unreadable: bool,
}

/// What was returned last about a snapshot that is above the threshold.
#[derive(Clone, Copy, Debug)]
struct Told {
    usage: Usage,
}

impl Told {
    /// True if it is to be returned once more: it was grown and is still above, or half of the room that it had is
    /// gone. The caller may be able to help now, even if not the first time.
    fn again(self, usage: Usage) -> bool {
        let half_gone = usage.room().count() <= self.usage.room().count() / 2;
        usage.total != self.usage.total || (half_gone && usage.allocated > self.usage.allocated)
    }
}

impl Track {
    pub(crate) fn new(chunk: ChunkSize) -> Self {
        Self {
            chunk,
            due: Duration::ZERO,
            early: Duration::ZERO,
            last: None,
            rate: 0,
            told: None,
            calm: 0,
            unreadable: false,
        }
    }

    pub(crate) fn due(&self) -> Duration {
        self.due
    }

    /// True if it is to be read now, or so soon that it is read with those that are: thousands that are due one after the
    /// other are read in a few batches, and each look at all of them serves many.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        self.due <= now.saturating_add(self.early)
    }

    fn pause_from(&mut self, now: Duration, pause: Duration) {
        self.due = now + pause;
        self.early = pause / 8;
    }

    /// Takes the status that was read at `now`; returns the change, if there is one to return.
    pub(crate) fn see(
        &mut self,
        now: Duration,
        status: Option<SnapshotStatus>,
        bounds: Bounds,
    ) -> Option<Change> {
        self.unreadable = false;
        let Some(status) = status else {
            // It is not live yet, or has no snapshot table for the moment.
            self.last = None;
            self.pause_from(now, LONGEST);
            return None;
        };
        let change = match &status {
            SnapshotStatus::Usage(usage) => {
                self.measure(now, *usage);
                self.judge(*usage, bounds).then_some(Change::Above(*usage))
            }
            other if self.last.as_ref().is_some_and(|(_, last)| last == other) => None,
            SnapshotStatus::Overflow => Some(Change::Overflow),
            SnapshotStatus::Invalid => Some(Change::Invalid),
            SnapshotStatus::MergeFailed => Some(Change::MergeFailed),
            SnapshotStatus::Unknown(text) => Some(Change::Unknown(text.clone())),
        };
        self.pause_from(now, self.pause(&status, bounds));
        self.last = Some((now, status));
        change
    }

    /// Notes that it could not be read; returns true if that was not returned before.
    pub(crate) fn miss(&mut self, now: Duration) -> bool {
        self.pause_from(now, LONGEST);
        !std::mem::replace(&mut self.unreadable, true)
    }

    fn measure(&mut self, now: Duration, usage: Usage) {
        let Some((then, SnapshotStatus::Usage(before))) = &self.last else {
            return;
        };
        let sectors = usage
            .allocated
            .count()
            .saturating_sub(before.allocated.count());
        let micros = now.saturating_sub(*then).as_micros().max(1);
        let rate = u128::from(sectors) * 512 * 1_000_000 / micros;
        // If the writer pauses, the rate falls slowly.
        self.rate = u64::try_from(rate).unwrap_or(u64::MAX).max(self.rate / 2);
        let same = usage == *before;
        self.calm = if same { self.calm.saturating_add(1) } else { 0 };
    }

    /// True if [`Change::Above`](super::Change::Above) is to be returned.
    fn judge(&mut self, usage: Usage, bounds: Bounds) -> bool {
        if !reaches(usage, bounds.threshold, self.chunk) {
            self.told = None;
            return false;
        }
        let news = self.told.is_none_or(|told| told.again(usage));
        if news {
            self.told = Some(Told { usage });
            self.calm = 0;
        }
        news
    }

    /// Returns the pause until the next read: half the time in which the room would fill at the greatest rate, so that
    /// at least half of it is left when the change is returned.
    ///
    /// After a snapshot was returned as above, the caller is likely to act: it is read often at first, and less and
    /// less while nothing changes.
    fn pause(&self, status: &SnapshotStatus, bounds: Bounds) -> Duration {
        let SnapshotStatus::Usage(usage) = status else {
            return LONGEST;
        };
        let rate = bounds.peak_rate.max(self.rate.saturating_mul(2)).max(1);
        let room = u128::from(usage.room().count()) * 512;
        let lasts = room * 1_000_000 / u128::from(rate) / 2;
        let pause = Duration::from_micros(u64::try_from(lasts).unwrap_or(u64::MAX));
        let least = match self.told {
            Some(_) => SHORTEST.saturating_mul(2u32.saturating_pow(self.calm.min(16))),
            None => SHORTEST,
        };
        pause.max(least).min(LONGEST)
    }
}

fn reaches(usage: Usage, threshold: u8, chunk: ChunkSize) -> bool {
    let [allocated, total] = [usage.allocated, usage.total].map(|each| u128::from(each.count()));
    usage.is_full(chunk) || allocated * 100 >= total * u128::from(threshold)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Sectors;

    fn usage(allocated: u64, total: u64) -> Usage {
        Usage {
            allocated: Sectors::new(allocated),
            total: Sectors::new(total),
            metadata: Sectors::new(16),
        }
    }

    fn track() -> Track {
        Track::new(ChunkSize::DEFAULT)
    }

    /// Sees each fill in turn, a millisecond apart; returns the fills that were told.
    fn told(track: &mut Track, fills: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut now = Duration::ZERO;
        let mut news = Vec::new();
        for (allocated, total) in fills {
            now += Duration::from_millis(1);
            let status = SnapshotStatus::Usage(usage(*allocated, *total));
            if track.see(now, Some(status), Bounds::default()).is_some() {
                news.push((*allocated, *total));
            }
        }
        news
    }

    #[test]
    fn above_is_told_once_and_again_when_half_of_the_room_is_gone_or_it_has_grown() {
        let fills = [
            (16, 1000),
            (799, 1000),
            (800, 1000),
            (801, 1000),
            (899, 1000),
            (900, 1000),
            (949, 1000),
            (952, 1000),
            (952, 1000),
            (952, 1100),
            (952, 2000),
            (1600, 2000),
        ];
        let news = [
            (800, 1000),
            (900, 1000),
            (952, 1000),
            (952, 1100),
            (1600, 2000),
        ];
        assert_eq!(told(&mut track(), &fills), news);
        assert_eq!(told(&mut track(), &[(1000, 1000); 5]), [(1000, 1000)]);
        assert_eq!(
            told(&mut track(), &[(8, 24), (16, 24), (24, 24)]),
            [(24, 24)]
        );
    }

    #[test]
    fn at_100_percent_a_store_that_no_chunk_fits_in_is_told() {
        let bounds = Bounds {
            threshold: 100,
            ..Bounds::default()
        };
        let mut track = track();
        let mut see = |allocated| {
            let status = SnapshotStatus::Usage(usage(allocated, 1007));
            track.see(Duration::ZERO, Some(status), bounds)
        };
        assert_eq!(see(992), None);
        assert_eq!(see(1000), Some(Change::Above(usage(1000, 1007))));
    }

    #[test]
    fn the_end_of_a_store_is_told_once() {
        let unknown = || SnapshotStatus::Unknown("Odd".to_owned());
        for (status, change) in [
            (SnapshotStatus::Overflow, Change::Overflow),
            (SnapshotStatus::Invalid, Change::Invalid),
            (SnapshotStatus::MergeFailed, Change::MergeFailed),
            (unknown(), Change::Unknown("Odd".to_owned())),
        ] {
            let mut track = track();
            let mut see = |status| track.see(Duration::ZERO, status, Bounds::default());
            assert_eq!(see(None), None);
            assert_eq!(see(Some(status.clone())), Some(change));
            assert_eq!(see(Some(status)), None);
        }
        let mut track = track();
        let news = [1, 2, 3].map(|now| track.miss(Duration::from_secs(now)));
        assert_eq!(news, [true, false, false]);
        assert_eq!(track.due(), Duration::from_secs(4));
    }

    /// A writer at the peak rate never gets from one look past half of the room that it was seen to have.
    #[test]
    fn who_is_told_has_half_of_the_room_left_at_any_rate_up_to_the_peak() {
        let bounds = Bounds::default();
        for total in [64 << 11, 1 << 21, 1 << 25] {
            for rate in [0, 1 << 20, 1 << 28, bounds.peak_rate] {
                let (mut track, mut now, mut allocated) = (track(), Duration::ZERO, 16);
                for _ in 0..100_000 {
                    let seen = usage(allocated, total);
                    let change = track.see(now, Some(SnapshotStatus::Usage(seen)), bounds);
                    if change.is_some() {
                        assert!(seen.room().count() >= total / 10, "{total} {rate} {seen:?}");
                        break;
                    }
                    let pause = track.due() - now;
                    assert!(pause >= SHORTEST && pause <= LONGEST);
                    now = track.due();
                    let written = u128::from(rate) * pause.as_micros() / 1_000_000 / 512;
                    allocated += u64::try_from(written).expect("small");
                }
            }
        }
    }

    #[test]
    fn one_that_fills_faster_than_any_is_looked_at_more_often() {
        let bounds = Bounds {
            peak_rate: 1 << 20,
            ..Bounds::default()
        };
        let mut track = track();
        let total = 1 << 21;
        let mut pause = |millis, allocated| {
            let now = Duration::from_millis(millis);
            let status = SnapshotStatus::Usage(usage(allocated, total));
            track.see(now, Some(status), bounds);
            track.due() - now
        };
        assert_eq!(pause(0, 16), LONGEST);
        // 300 MiB in a second, and 724 MiB are left: 1.2 s at twice that, of which half.
        let fast = pause(1000, 300 << 11).as_millis();
        assert!((590..620).contains(&fast), "{fast}");
        let faster = pause(1100, 500 << 11);
        assert!(faster < Duration::from_millis(100), "{faster:?}");
        let later: Vec<_> = (2..12)
            .map(|second| pause(second * 1000, 500 << 11))
            .collect();
        assert!(
            later.is_sorted() && later.last() == Some(&LONGEST),
            "{later:?}"
        );
    }

    #[test]
    fn one_that_nobody_helps_is_looked_at_less_and_less() {
        let mut track = track();
        let status = || Some(SnapshotStatus::Usage(usage(2040, 2048)));
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            track.see(now, status(), Bounds::default());
            pauses.push(track.due() - now);
            now = track.due();
        }
        assert_eq!(pauses[..3], [2, 4, 8].map(Duration::from_millis));
        assert_eq!(pauses.last(), Some(&LONGEST));
    }
}
