//! Lengths in 512-byte sectors, the unit of every device-mapper table.

use std::fmt;
use std::num::NonZeroU32;

/// Bytes in one sector, whatever the device's logical block size is.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// A length or an offset in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(transparent)
)]
pub struct Sectors(u64);

impl Sectors {
    /// Wraps a number of 512-byte sectors.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// Whole sectors in `bytes`; what is left over is dropped, as the loop driver drops it.
    #[must_use]
    pub const fn from_bytes_floor(bytes: u64) -> Self {
        Self(bytes / SECTOR_BYTES)
    }

    /// How many sectors this is.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.0
    }

    /// The same length in bytes; `None` where that does not fit 64 bits.
    #[must_use]
    pub const fn to_bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_BYTES)
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The unit of copying: a power of two of 512-byte sectors, from 1 to 2^21 (1 GiB).
///
/// The kernel copies a whole chunk from the origin on the first partial write to it. The upper bound is the
/// largest power of two that `dm_exception_store_set_chunk_size` takes (its cap is `INT_MAX >> 9`).
///
/// Which one: a write of 4 KiB to a chunk that was not written yet takes a whole chunk of the COW file, so room grows
/// with the chunk, 16 times at 128 sectors (64 KiB). Against that stand the kernel's memory for a snapshot, which is
/// lower by more than half at 64 to 256 sectors over a COW file of 1 GiB (some 3 MiB at 8, under 1.5 MiB there), and
/// long sequential writes, which took half the time from 64 sectors on. So stay at 8 where small random writes prevail
/// or the COW file must stay small; take 64 or 128 for large COW files, many snapshots or streams. Chunks of 1 MiB cost
/// more memory than they save, and twice the time to create. The README has the table, which the bench `chunk_size`
/// measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "u64", into = "u64")
)]
pub struct ChunkSize(NonZeroU32);

impl ChunkSize {
    /// 8 sectors, 4 KiB: one page of the guest.
    pub const DEFAULT: Self = Self(NonZeroU32::new(8).unwrap());

    const MAX_SECTORS: u32 = 1 << 21;

    /// Checks a number of 512-byte sectors.
    ///
    /// # Errors
    ///
    /// [`InvalidChunkSize`] unless it is a power of two from 1 to 2^21.
    pub fn new(sectors: u64) -> Result<Self, InvalidChunkSize> {
        u32::try_from(sectors)
            .ok()
            .filter(|count| count.is_power_of_two() && *count <= Self::MAX_SECTORS)
            .and_then(NonZeroU32::new)
            .map(Self)
            .ok_or(InvalidChunkSize { sectors })
    }

    /// The chunk in sectors.
    #[must_use]
    pub const fn sectors(self) -> Sectors {
        Sectors(self.0.get() as u64)
    }

    /// The chunk in bytes, at most 1 GiB.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.get() as u64 * SECTOR_BYTES
    }
}

/// Not a chunk size that device-mapper takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use chunks of {sectors} sectors: need a power of two from 1 to 2097152")]
pub struct InvalidChunkSize {
    /// The size as given, in 512-byte sectors.
    pub sectors: u64,
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<u64> for ChunkSize {
    type Error = InvalidChunkSize;

    fn try_from(sectors: u64) -> Result<Self, InvalidChunkSize> {
        Self::new(sectors)
    }
}

impl From<ChunkSize> for u64 {
    fn from(chunk: ChunkSize) -> u64 {
        chunk.sectors().count()
    }
}

/// The sector size that a guest's disk shows (its logical block size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SectorSize {
    /// 512 bytes, as images are made for unless told otherwise.
    #[default]
    Bytes512,
    /// 4096 bytes, for images made so: a GPT with LBAs of 4096 bytes, say.
    Bytes4096,
}

impl SectorSize {
    /// That of a device whose sectors have so many bytes.
    pub(crate) const fn of(bytes: u32) -> Self {
        if bytes == 4096 {
            Self::Bytes4096
        } else {
            Self::Bytes512
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_are_powers_of_two_up_to_one_gib() {
        for good in [1, 2, 8, 32, 128, 2048, 1 << 21] {
            assert_eq!(ChunkSize::new(good).map(u64::from), Ok(good));
        }
        for bad in [0, 3, 24, 1 << 22, 1 << 31, 1 << 32, u64::MAX] {
            assert_eq!(ChunkSize::new(bad), Err(InvalidChunkSize { sectors: bad }));
        }
    }

    #[test]
    fn bytes_round_down_to_sectors() {
        assert_eq!(Sectors::from_bytes_floor(1023), Sectors::new(1));
        assert_eq!(Sectors::new(u64::MAX).to_bytes(), None);
        assert_eq!(Sectors::new(3).to_bytes(), Some(1536));
    }
}
