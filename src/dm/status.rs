//! Parses the status line of a snapshot.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use crate::base::{ChunkSize, Sectors};

/// The kernel's status line of a snapshot (`snapshot_status` in `drivers/md/dm-snap.c`).
///
/// ```
/// use dmsnap::base::Sectors;
/// use dmsnap::dm::SnapshotStatus;
///
/// let SnapshotStatus::Usage(usage) = "16/2048 16".parse()? else { unreachable!() };
/// assert_eq!(usage.total, Sectors::new(2048));
/// # Ok::<(), std::convert::Infallible>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SnapshotStatus {
    /// The snapshot works; this says how full it is.
    Usage(Usage),
    /// The snapshot is lost: a `P` or `N` store overflowed, or the COW device failed. All I/O fails, for good.
    Invalid,
    /// A `PO` store is full: reads work, every write fails. [`recover`](crate::snapshot::recover()) makes the COW file
    /// longer and the snapshot anew.
    Overflow,
    /// A merge failed, as the origin could not be written.
    MergeFailed,
    /// A text that this version does not know, as the kernel printed it.
    Unknown(String),
}

/// The three numbers of the status line: how full a snapshot's COW device is, in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Usage {
    /// The space that the header, metadata and data take; it may exceed `total` by one chunk when full.
    pub allocated: Sectors,
    /// The COW device's present size.
    pub total: Sectors,
    /// The space that the header and metadata alone take.
    pub metadata: Sectors,
}

impl Usage {
    /// Returns how much of the COW device is taken, in whole percent, rounded down, and at most 100; 100 also for a
    /// device of size 0.
    ///
    /// ```
    /// use dmsnap::base::Sectors;
    /// use dmsnap::dm::Usage;
    ///
    /// let mut usage = Usage { allocated: Sectors::new(1640), total: Sectors::new(2048), ..Usage::default() };
    /// assert_eq!(usage.percent(), 80);
    /// usage.allocated = Sectors::new(2056);
    /// assert_eq!(usage.percent(), 100);
    /// ```
    #[must_use]
    pub fn percent(&self) -> u8 {
        if self.allocated >= self.total {
            return 100;
        }
        let (allocated, total) = (self.allocated.count(), self.total.count());
        u8::try_from(u128::from(allocated) * 100 / u128::from(total)).unwrap_or(100)
    }

    /// True if the next new chunk overflows the COW device. The kernel takes whole chunks only, so `allocated` may stay
    /// below `total` (`persistent_prepare_exception` in `drivers/md/dm-snap-persistent.c`).
    #[must_use]
    pub fn is_full(&self, chunk: ChunkSize) -> bool {
        self.room() < chunk.sectors()
    }

    /// Returns the space that is not taken yet; it may be less than a chunk when the device is full.
    #[must_use]
    pub fn room(&self) -> Sectors {
        Sectors::new(self.total.count().saturating_sub(self.allocated.count()))
    }
}

impl FromStr for SnapshotStatus {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.trim() {
            "Invalid" => Self::Invalid,
            "Overflow" => Self::Overflow,
            "Merge failed" => Self::MergeFailed,
            line => usage(line).map_or_else(|| Self::Unknown(line.to_owned()), Self::Usage),
        })
    }
}

fn usage(line: &str) -> Option<Usage> {
    let (fill, metadata) = line.split_once(' ')?;
    let (allocated, total) = fill.split_once('/')?;
    let sectors = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten().map(Sectors::new)
    };
    Some(Usage {
        allocated: sectors(allocated)?,
        total: sectors(total)?,
        metadata: sectors(metadata)?,
    })
}

impl fmt::Display for SnapshotStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(usage) => {
                write!(f, "{}/{} {}", usage.allocated, usage.total, usage.metadata)
            }
            Self::Invalid => f.write_str("Invalid"),
            Self::Overflow => f.write_str("Overflow"),
            Self::MergeFailed => f.write_str("Merge failed"),
            Self::Unknown(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_reads_back_as_it_was() {
        for text in [
            "16/2048 16",
            "0/0 0",
            "Invalid",
            "Overflow",
            "Merge failed",
            "Unknown",
            "16/ 16",
            "1/2 x",
            "",
        ] {
            let Ok(status) = text.parse::<SnapshotStatus>();
            assert_eq!(status.to_string(), text);
            let known = !matches!(status, SnapshotStatus::Unknown(_));
            assert_eq!(
                known,
                !matches!(text, "Unknown" | "16/ 16" | "1/2 x" | ""),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_store_is_full_when_no_chunk_fits_any_more() {
        let usage = |allocated, total| Usage {
            allocated: Sectors::new(allocated),
            total: Sectors::new(total),
            metadata: Sectors::default(),
        };
        let chunk = ChunkSize::DEFAULT;
        for (allocated, total, percent, full, room) in [
            (16, 2048, 0, false, 2032),
            (2032, 2048, 99, false, 16),
            (2040, 2048, 99, false, 8),
            (2040, 2047, 99, true, 7),
            (2048, 2048, 100, true, 0),
            (2056, 2048, 100, true, 0),
            (0, 0, 100, true, 0),
            (u64::MAX - 1, u64::MAX, 99, true, 1),
        ] {
            let usage = usage(allocated, total);
            let found = (usage.percent(), usage.is_full(chunk), usage.room().count());
            assert_eq!(found, (percent, full, room), "{usage:?}");
        }
    }
}
