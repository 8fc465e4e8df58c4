//! Lengths in 512-byte sectors, the unit of device-mapper tables, and sizes of chunks and sectors.

use std::fmt;
use std::num::NonZeroU32;

/// The bytes in one sector, whatever the device's logical block size is.
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

    /// Converts from bytes. Bytes that fill no whole sector are dropped, as the loop driver drops them.
    #[must_use]
    pub const fn from_bytes_floor(bytes: u64) -> Self {
        Self(bytes / SECTOR_BYTES)
    }

    /// Returns the number of sectors.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.0
    }

    /// Converts to bytes; `None` if that does not fit 64 bits.
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

/// The chunk size, the unit of copying: a power of two of 512-byte sectors, from 1 to 2^21 (1 GiB).
///
/// The kernel copies a whole chunk from the origin on the first partial write to it. The upper bound is the
/// largest power of two that `dm_exception_store_set_chunk_size` takes (its cap is `INT_MAX >> 9`).
///
/// Which one to choose: keep 8 sectors (4 KiB) if small random writes prevail or the COW file must stay small. Take 64
/// or 128 for large COW files, many snapshots or long sequential writes. The first write to a chunk takes a whole chunk
/// of the COW file, so that random writes of 4 KiB take 16 times their size at 128 sectors. In exchange the kernel
/// needs less memory for each snapshot (over a COW file of 1 GiB some 3 MiB at 8 sectors, under 1.5 MiB at 64 to 256),
/// and sequential writes took half the time. Chunks of 1 MiB need more memory than they save, and twice the time to
/// create. [`guide::choosing`](crate::guide::choosing) has the table, which the bench `chunk_size` measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "u64", into = "u64")
)]
pub struct ChunkSize(NonZeroU32);

impl ChunkSize {
    /// The default: 8 sectors, 4 KiB, which is one page of the guest.
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

    /// Returns the chunk size in sectors.
    #[must_use]
    pub const fn sectors(self) -> Sectors {
        Sectors(self.0.get() as u64)
    }

    /// Returns the chunk size in bytes, at most 1 GiB.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.get() as u64 * SECTOR_BYTES
    }
}

/// The error for a chunk size that device-mapper does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use chunks of {sectors} sectors: need a power of two from 1 to 2097152")]
#[non_exhaustive]
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
    /// 512 bytes, which nearly all images are made for.
    #[default]
    Bytes512,
    /// 4096 bytes, for images that were made for such disks: for example with a GPT whose LBAs have 4096 bytes.
    Bytes4096,
}

impl SectorSize {
    /// Returns the sector size of a device whose sectors have that many bytes.
    pub(crate) const fn of(bytes: u32) -> Self {
        if bytes == 4096 {
            Self::Bytes4096
        } else {
            Self::Bytes512
        }
    }

    /// Returns the size in bytes.
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
