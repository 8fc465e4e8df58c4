//! Joins exceptions into extents, and sorts them by their place in the origin.

use std::io::{Read, Seek};

use super::fault::{StoreError, StoreFault};
use super::reader::{Exception, Exceptions};
use crate::base::{ChunkSize, Sectors};

/// A range of the origin that was changed, and where the COW file has its content. All three are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Extent {
    /// The range's offset in the origin.
    pub origin_offset: u64,
    /// The range's length.
    pub length: u64,
    /// The offset of its content in the COW file.
    pub cow_offset: u64,
}

impl Extent {
    pub(crate) fn origin_end(&self) -> u64 {
        self.origin_offset.saturating_add(self.length)
    }

    pub(crate) fn cow_end(&self) -> u64 {
        self.cow_offset.saturating_add(self.length)
    }

    /// Appends `next` if it follows this extent in the origin and in the COW file; returns true if it did.
    fn join(&mut self, next: &Self) -> bool {
        let follows = self.origin_end() == next.origin_offset && self.cow_end() == next.cow_offset;
        if follows {
            self.length += next.length;
        }
        follows
    }
}

/// An iterator over a store's extents in the order of the store: see
/// [`ExceptionStore::extents`](crate::store::ExceptionStore::extents).
#[derive(Debug)]
pub struct Extents<'a, R> {
    exceptions: Exceptions<'a, R>,
    chunk: ChunkSize,
    origin_bytes: u64,
    /// The extent that may still grow.
    open: Option<Extent>,
    /// The error that ended the scan; it is returned after the last extent.
    failure: Option<StoreError>,
}

impl<'a, R: Read + Seek> Extents<'a, R> {
    pub(super) fn new(
        exceptions: Exceptions<'a, R>,
        chunk: ChunkSize,
        origin: Option<Sectors>,
    ) -> Self {
        Self {
            exceptions,
            chunk,
            origin_bytes: origin.and_then(Sectors::to_bytes).unwrap_or(u64::MAX),
            open: None,
            failure: None,
        }
    }

    fn extent(&self, exception: Exception) -> Extent {
        let origin_offset = exception.origin_chunk * self.chunk.bytes();
        Extent {
            origin_offset,
            length: self.chunk.bytes().min(self.origin_bytes - origin_offset),
            cow_offset: exception.cow_chunk * self.chunk.bytes(),
        }
    }
}

impl<R: Read + Seek> Iterator for Extents<'_, R> {
    type Item = Result<Extent, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.failure.is_none() {
            match self.exceptions.next() {
                Some(Ok(exception)) => {
                    let next = self.extent(exception);
                    if self.open.as_mut().is_some_and(|open| open.join(&next)) {
                        continue;
                    }
                    if let Some(whole) = self.open.replace(next) {
                        return Some(Ok(whole));
                    }
                }
                Some(Err(error)) => self.failure = Some(error),
                None => break,
            }
        }
        let last = self.open.take().map(Ok);
        last.or_else(|| self.failure.take().map(Err))
    }
}

/// A chunk that two exceptions have, by its offset in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Twice {
    InCow(u64),
    InOrigin(u64),
}

impl Twice {
    pub(super) fn is(self, exception: Exception, chunk_bytes: u64) -> bool {
        match self {
            Self::InCow(at) => exception.cow_chunk == at / chunk_bytes,
            Self::InOrigin(at) => exception.origin_chunk == at / chunk_bytes,
        }
    }

    pub(super) fn fault(self, offset: u64, chunk_bytes: u64) -> StoreFault {
        match self {
            Self::InCow(at) => StoreFault::CowChunkTwice {
                offset,
                chunk: at / chunk_bytes,
            },
            Self::InOrigin(at) => StoreFault::OriginChunkTwice {
                offset,
                chunk: at / chunk_bytes,
            },
        }
    }
}

/// Sorts extents by their place in the origin and joins them; fails if a chunk is in two of them.
pub(super) fn in_origin_order(mut extents: Vec<Extent>) -> Result<Vec<Extent>, Twice> {
    extents.sort_unstable_by_key(|extent| extent.cow_offset);
    let overlap = |pair: &&[Extent]| pair[0].cow_end() > pair[1].cow_offset;
    if let Some(pair) = extents.windows(2).find(overlap) {
        return Err(Twice::InCow(pair[1].cow_offset));
    }
    extents.sort_unstable_by_key(|extent| extent.origin_offset);
    let overlap = |pair: &&[Extent]| pair[0].origin_end() > pair[1].origin_offset;
    if let Some(pair) = extents.windows(2).find(overlap) {
        return Err(Twice::InOrigin(pair[1].origin_offset));
    }
    extents.dedup_by(|next, kept| kept.join(next));
    Ok(extents)
}
