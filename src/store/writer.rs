//! A persistent store as the kernel writes one, for what is put together from others.
//!
//! A header chunk, then areas: a metadata chunk of E exceptions and the E chunks of data that they lead to
//! (`area_location`, `drivers/md/dm-snap-persistent.c`).

use super::header::{MAGIC, VERSION};
use super::sizing::{EXCEPTION_BYTES, least_bytes};
use crate::base::{ChunkSize, Store};

/// How many exceptions are written at a time.
const WINDOW: u64 = 4096;

/// Where a new store has its exceptions and their data: in the order in which they are given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    chunk: ChunkSize,
}

impl Layout {
    pub(crate) fn new(chunk: ChunkSize) -> Self {
        Self { chunk }
    }

    fn per_area(self) -> u64 {
        self.chunk.bytes() / EXCEPTION_BYTES
    }

    /// The COW chunk that the n-th exception leads to.
    fn data_chunk(self, nth: u64) -> u64 {
        2 + nth + nth / self.per_area()
    }

    /// Where the data of the n-th exception is, in bytes.
    pub(crate) fn data(self, nth: u64) -> u64 {
        self.data_chunk(nth) * self.chunk.bytes()
    }

    /// How many exceptions from the n-th on have their data in one piece.
    pub(crate) fn in_one_piece(self, nth: u64) -> u64 {
        self.per_area() - nth % self.per_area()
    }

    /// How long a file with so many exceptions is at least: behind an area that is full, the kernel reads the next.
    pub(crate) fn bytes(self, exceptions: u64) -> u64 {
        let area = 1 + exceptions / self.per_area() * (self.per_area() + 1);
        let data = exceptions
            .checked_sub(1)
            .map_or(0, |last| self.data_chunk(last));
        let used = (area.max(data) + 1) * self.chunk.bytes();
        used.max(least_bytes(Store::Persistent, self.chunk))
    }

    /// The header's four words.
    pub(crate) fn header(self) -> [u8; 16] {
        let chunk = u32::try_from(self.chunk.sectors().count()).unwrap_or(0);
        let mut header = [0; 16];
        for (word, at) in [MAGIC, 1, VERSION, chunk].iter().zip((0..).step_by(4)) {
            header[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    /// The metadata of the origin's chunks in that order: pieces of it, and where each is to be.
    pub(crate) fn metadata(
        self,
        chunks: impl IntoIterator<Item = u64>,
    ) -> impl Iterator<Item = (u64, Vec<u8>)> {
        let mut chunks = (0..).zip(chunks).peekable();
        std::iter::from_fn(move || {
            let (first, _) = *chunks.peek()?;
            let (area, within) = (first / self.per_area(), first % self.per_area());
            let at = (1 + area * (self.per_area() + 1)) * self.chunk.bytes();
            let most = WINDOW.min(self.in_one_piece(first));
            let mut bytes = Vec::new();
            while let Some((nth, origin)) = chunks.next_if(|(nth, _)| nth - first < most) {
                bytes.extend_from_slice(&u64::to_le_bytes(origin));
                bytes.extend_from_slice(&self.data_chunk(nth).to_le_bytes());
            }
            Some((at + within * EXCEPTION_BYTES, bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::store::ExceptionStore;

    #[test]
    fn a_store_that_is_written_reads_back_and_is_as_long_as_it_must_be() {
        for sectors in [1, 2, 8] {
            let chunk = ChunkSize::new(sectors).expect("a chunk size");
            let layout = Layout::new(chunk);
            let area = chunk.bytes() / EXCEPTION_BYTES;
            for count in [0, 1, area - 1, area, area + 1, 2 * area, 5 * area + 3] {
                let bytes = usize::try_from(layout.bytes(count)).expect("small");
                let mut file = vec![0; bytes];
                file[..16].copy_from_slice(&layout.header());
                for (at, part) in layout.metadata((0..count).map(|nth| nth * 3)) {
                    let at = usize::try_from(at).expect("small");
                    file[at..at + part.len()].copy_from_slice(&part);
                }
                let mut store = ExceptionStore::open(Cursor::new(file)).expect("a header");
                let summary = store.summary().expect("a sound store");
                let found = (summary.exceptions, summary.used_bytes);
                assert_eq!(found, (count, bytes as u64), "{count} of {sectors}");
                for (nth, exception) in (0..).zip(store.exceptions()) {
                    let exception = exception.expect("sound");
                    assert_eq!(exception.origin_chunk, nth * 3);
                    assert_eq!(exception.cow_chunk * chunk.bytes(), layout.data(nth));
                }
            }
        }
    }
}
