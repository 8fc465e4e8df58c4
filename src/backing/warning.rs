//! Warnings about a snapshot that was made.

use std::path::PathBuf;

use super::CowOptions;
#[cfg(feature = "serde")]
use crate::base::lossy;
use crate::base::{SECTOR_BYTES, Sectors};
use crate::kernel::FileFacts;
use crate::store;

/// A warning about a snapshot that was made and works: something about it is not as was asked for, or may fail later.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Warning {
    /// The image's size is no multiple of 512 bytes: its last bytes are not visible through the snapshot.
    OriginTail {
        /// How many bytes are not visible.
        bytes: u64,
    },
    /// The COW file cannot hold an overwrite of the whole origin: a guest that writes enough fills it.
    CowBelowWorstCase {
        /// The COW file's size in bytes.
        bytes: u64,
        /// The size in bytes at which a full overwrite fits.
        worst_case_bytes: u64,
    },
    /// The COW file was made a chunk longer. At its old size the kernel invalidates a full `PO` store instead of only
    /// stopping its writes: there is no room for the metadata area behind the last full one.
    CowLengthened {
        /// The size that it had, in bytes.
        bytes: u64,
        /// The size that it has now, in bytes.
        sound_bytes: u64,
    },
    /// Direct I/O was asked for, and the COW file's file system cannot do it in sectors of the disk's size: the page
    /// cache is used.
    DirectIoUnavailable,
    /// Discard was asked for, and the COW file's file system cannot punch holes: the disk takes no discards.
    DiscardUnavailable,
    /// `/dev/mapper/<name>` could not be made. The disk is reached by [`Snapshot::device`](crate::Snapshot::device).
    NoAlias {
        /// The alias that is missing.
        #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::path"))]
        alias: PathBuf,
        /// The errno.
        errno: i32,
    },
    /// A durability below [`PowerCuts`](crate::Durability::PowerCuts) was asked for, and the dm device's
    /// `queue/write_cache` in sysfs could not be set: the guest's flushes reach the COW file. The disk is slower than
    /// asked for, and no less safe.
    FlushesKept {
        /// The errno.
        errno: i32,
    },
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OriginTail { bytes } => {
                write!(
                    f,
                    "the last {bytes} bytes of the origin image are no whole sector and not visible"
                )
            }
            Self::CowBelowWorstCase {
                bytes,
                worst_case_bytes,
            } => {
                write!(
                    f,
                    "the COW file has {bytes} bytes; overwriting the whole origin takes {worst_case_bytes}"
                )
            }
            Self::CowLengthened { bytes, sound_bytes } => {
                write!(
                    f,
                    "the COW file was made {sound_bytes} bytes long: one of {bytes} ends invalid when full"
                )
            }
            Self::DirectIoUnavailable => {
                f.write_str(
                    "the COW file's file system cannot do direct I/O in the disk's sectors: it is buffered",
                )
            }
            Self::DiscardUnavailable => f.write_str(
                "the COW file's file system cannot punch holes: the disk takes no discard",
            ),
            Self::NoAlias { alias, errno } => {
                let why = std::io::Error::from_raw_os_error(*errno);
                write!(f, "cannot make {}: {why}", alias.display())
            }
            Self::FlushesKept { errno } => {
                let why = std::io::Error::from_raw_os_error(*errno);
                write!(f, "cannot end the guest's flushes at the dm device: {why}")
            }
        }
    }
}

/// Adds the warnings that follow from the files' sizes.
pub(crate) fn note_sizes(
    options: &CowOptions,
    length: Sectors,
    origin: &FileFacts,
    cow_bytes: u64,
) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if origin.size_bytes % SECTOR_BYTES != 0 {
        warnings.push(Warning::OriginTail {
            bytes: origin.size_bytes % SECTOR_BYTES,
        });
    }
    let worst_case = store::worst_case(length, options.store, options.chunk).unwrap_or(u64::MAX);
    if cow_bytes < worst_case {
        warnings.push(Warning::CowBelowWorstCase {
            bytes: cow_bytes,
            worst_case_bytes: worst_case,
        });
    }
    warnings
}
