//! How much a store holds, and how far its exceptions reach.

use super::EXCEPTION_BYTES;
use crate::units::ChunkSize;

/// What a store's metadata areas say in sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// How many chunks are remapped.
    pub(crate) exceptions: u64,
    /// One past the last chunk of the origin that an exception is for.
    pub(crate) origin_chunks: u64,
    /// One past the last chunk of the COW device that is header, metadata or an exception's data.
    pub(crate) cow_chunks: u64,
}

/// How much of the metadata is read at a time: an area is one chunk, and that may be 1 GiB.
const READ_BYTES: u64 = 64 << 10;

/// Reads a store's metadata areas as the kernel does: area k stands at chunk 1 + k (E + 1), and the first empty exception
/// ends the last one (`read_exceptions`, `drivers/md/dm-snap-persistent.c`).
///
/// `read` fills the buffer from an offset in bytes and says how much there was. What is missing at the file's end ends
/// the store too, and shows in `cow_chunks`.
pub(crate) fn extent<E>(
    chunk: ChunkSize,
    mut read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
) -> Result<Extent, E> {
    let per_area = chunk.bytes() / EXCEPTION_BYTES;
    let mut extent = Extent::default();
    let mut buffer = vec![0; usize::try_from(READ_BYTES.min(chunk.bytes())).unwrap_or(0)];
    let mut area = 1u64;
    loop {
        extent.cow_chunks = extent.cow_chunks.max(area.saturating_add(1));
        for within in (0..chunk.bytes()).step_by(buffer.len()) {
            let Some(at) = area
                .checked_mul(chunk.bytes())
                .and_then(|at| at.checked_add(within))
            else {
                return Ok(extent);
            };
            let length = read(&mut buffer, at)?;
            for exception in buffer[..length].chunks_exact(16) {
                let (old, new) = (word(&exception[..8]), word(&exception[8..]));
                if new == 0 {
                    return Ok(extent);
                }
                extent.exceptions += 1;
                extent.origin_chunks = extent.origin_chunks.max(old.saturating_add(1));
                extent.cow_chunks = extent.cow_chunks.max(new.saturating_add(1));
            }
            if length < buffer.len() {
                return Ok(extent);
            }
        }
        area = area.saturating_add(per_area + 1);
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn of(file: &[u8], sectors: u64) -> Extent {
        let chunk = ChunkSize::new(sectors).expect("a power of two");
        let read = |buffer: &mut [u8], at| {
            let rest = usize::try_from(at).ok().and_then(|at| file.get(at..));
            let rest = rest.unwrap_or_default();
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            Ok::<_, Infallible>(length)
        };
        let Ok(extent) = extent(chunk, read);
        extent
    }

    fn put(file: &mut [u8], at: usize, old: u64, new: u64) {
        file[at..at + 8].copy_from_slice(&old.to_le_bytes());
        file[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
    }

    #[test]
    fn exceptions_are_counted_over_full_areas_to_the_first_empty_one() {
        let mut file = vec![0; 80 * 512];
        let empty = Extent {
            cow_chunks: 2,
            ..Extent::default()
        };
        assert_eq!(of(&file, 1), empty);
        for nth in 0..32 {
            put(&mut file, 512 + nth * 16, 100 - nth as u64, 2 + nth as u64);
        }
        let full = Extent {
            exceptions: 32,
            origin_chunks: 101,
            cow_chunks: 35,
        };
        assert_eq!(of(&file, 1), full, "the next area must be there");
        put(&mut file, 34 * 512, 7, 35);
        let more = Extent {
            exceptions: 33,
            origin_chunks: 101,
            cow_chunks: 36,
        };
        assert_eq!(of(&file, 1), more);
        assert_eq!(of(&file[..34 * 512], 1), full, "the second area is cut off");
    }

    #[test]
    fn hostile_numbers_neither_overflow_nor_run_on() {
        let mut file = vec![0xff; 4 * 512];
        let all = of(&file, 1);
        assert_eq!((all.origin_chunks, all.cow_chunks), (u64::MAX, u64::MAX));
        put(&mut file, 512, u64::MAX, 0);
        assert_eq!(of(&file, 1).exceptions, 0);
        assert_eq!(
            of(&file, 1 << 21).exceptions,
            0,
            "an area of 1 GiB is not there"
        );
    }
}
