//! The faults that a COW file can have.

use std::io;

/// Why an exception store could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file could not be read.
    #[error("cannot read at byte {offset}")]
    #[non_exhaustive]
    Read {
        /// The offset of the read, in bytes.
        offset: u64,
        /// The reader's error.
        source: io::Error,
    },
    /// The file was read, and its store has a fault.
    #[error(transparent)]
    Fault(#[from] StoreFault),
}

/// A fault of a COW file's exception store. Offsets are in bytes from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreFault {
    /// The file begins with zeroes: no snapshot with a persistent store was ever made on it.
    #[error("at byte 0: blank, no persistent snapshot was made on it")]
    Blank,
    /// The file begins with zeroes, and has something further on: no file for a new snapshot, nor a store.
    #[error("at byte {offset}: data behind zeroes, and no header of an exception store before it")]
    Headless {
        /// The first block of 4 KiB that is not zeroes.
        offset: u64,
    },
    /// The file begins with something else than a store.
    #[error("at byte 0: no exception store")]
    Foreign,
    /// A field of the header has a value that no kernel writes.
    #[error("at byte {offset}: {field} is {value}")]
    Header {
        /// The field's offset.
        offset: u64,
        /// The field's name in the kernel's `struct disk_header`.
        field: &'static str,
        /// The field's value.
        value: u32,
    },
    /// The kernel would read a metadata area there, and the file ends before the area does.
    #[error("at byte {offset}: a metadata area is missing, the file has {bytes} bytes")]
    CutShort {
        /// The offset at which the area begins.
        offset: u64,
        /// The file's length in bytes.
        bytes: u64,
    },
    /// An exception points to a chunk that is not wholly within the file.
    #[error("at byte {offset}: COW chunk {chunk} is outside of the file")]
    CowChunk {
        /// Where the exception is.
        offset: u64,
        /// The chunk's number in the COW file.
        chunk: u64,
    },
    /// An exception points to a chunk that is a metadata area.
    #[error("at byte {offset}: COW chunk {chunk} is a metadata area")]
    MetadataChunk {
        /// Where the exception is.
        offset: u64,
        /// The chunk's number in the COW file.
        chunk: u64,
    },
    /// An exception is for a chunk behind the origin's end, or behind the end of any origin.
    #[error("at byte {offset}: origin chunk {chunk} is behind the origin's end")]
    OriginChunk {
        /// Where the exception is.
        offset: u64,
        /// The chunk's number in the origin.
        chunk: u64,
    },
    /// Two exceptions point to one chunk of the COW file.
    #[error("at byte {offset}: COW chunk {chunk} is used twice")]
    CowChunkTwice {
        /// Where the second exception is.
        offset: u64,
        /// The chunk's number in the COW file.
        chunk: u64,
    },
    /// Two exceptions are for one chunk of the origin.
    #[error("at byte {offset}: origin chunk {chunk} has two exceptions")]
    OriginChunkTwice {
        /// Where the second exception is.
        offset: u64,
        /// The chunk's number in the origin.
        chunk: u64,
    },
}

impl StoreFault {
    /// Returns where the fault is, in bytes from the start of the file.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Blank | Self::Foreign => 0,
            Self::Headless { offset }
            | Self::Header { offset, .. }
            | Self::CutShort { offset, .. }
            | Self::CowChunk { offset, .. }
            | Self::MetadataChunk { offset, .. }
            | Self::OriginChunk { offset, .. }
            | Self::CowChunkTwice { offset, .. }
            | Self::OriginChunkTwice { offset, .. } => *offset,
        }
    }
}
