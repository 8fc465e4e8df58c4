//! Computes how long a COW file must be.
//!
//! A persistent store with chunks of B bytes has a header chunk and then areas: each is one metadata chunk of E = B /
//! 16 exceptions and up to E data chunks (`drivers/md/dm-snap-persistent.c`, `area_location`).

use crate::base::{ChunkSize, Sectors, Store};

/// The size in bytes of one exception on disk: two 64-bit chunk numbers.
pub(super) const EXCEPTION_BYTES: u64 = 16;

/// Returns the smallest COW size in bytes that takes one write: for a persistent store its header, its first metadata
/// area and a chunk of data. With two chunks the kernel makes the snapshot, and the first write overflows it.
#[must_use]
pub fn least_bytes(store: Store, chunk: ChunkSize) -> u64 {
    let chunks = if store.is_persistent() { 3 } else { 1 };
    chunks * chunk.bytes()
}

/// Returns the COW size in bytes at which every chunk of the origin can be overwritten; lvm2's `_cow_max_size` gives
/// the same.
///
/// It includes a chunk behind the last full metadata area: the kernel zeroes the next area before it commits the last
/// exception of the current one, and invalidates the store, even a `PO` one, if there is no room for it.
///
/// `None` if the size does not fit 64 bits.
///
/// ```
/// use dmsnap::{ChunkSize, Store};
/// use dmsnap::base::Sectors;
///
/// let origin = Sectors::from_bytes_floor(8 << 20);
/// let bytes = dmsnap::store::worst_case_bytes(origin, Store::PersistentOverflow, ChunkSize::DEFAULT);
/// assert_eq!(bytes, Some(2058 * 4096));
/// ```
#[must_use]
pub fn worst_case(origin: Sectors, store: Store, chunk: ChunkSize) -> Option<u64> {
    let data = origin.count().div_ceil(chunk.sectors().count());
    let per_area = chunk.bytes() / EXCEPTION_BYTES;
    let metadata = if store.is_persistent() {
        2 + data / per_area
    } else {
        0
    };
    let bytes = data.checked_add(metadata)?.checked_mul(chunk.bytes())?;
    // Of no origin at all.
    Some(bytes.max(least_bytes(store, chunk)))
}

/// Returns the smallest COW size in bytes, from `bytes` on, that is whole chunks, takes a write, and at which a full
/// `PO` store stays valid.
///
/// If a persistent store's last chunk is the last data chunk of a metadata area, the kernel finds no room to zero the
/// next area when the store fills, and invalidates even a `PO` store. With one chunk more that does not happen.
///
/// `None` if the size does not fit 64 bits.
#[must_use]
pub fn sound(bytes: u64, store: Store, chunk: ChunkSize) -> Option<u64> {
    let chunks = bytes.max(least_bytes(store, chunk)).div_ceil(chunk.bytes());
    let area = chunk.bytes() / EXCEPTION_BYTES + 1;
    let trapped = store.is_persistent() && (chunks - 1) % area == 0;
    (chunks + u64::from(trapped)).checked_mul(chunk.bytes())
}

/// Returns the length that a COW file of `bytes` needs: the same if that is sound, a longer one otherwise. A last,
/// partial chunk is never used by the kernel (`persistent_prepare_exception`), so it does not count.
pub(crate) fn sound_from(bytes: u64, store: Store, chunk: ChunkSize) -> Option<u64> {
    let whole = bytes - bytes % chunk.bytes();
    match sound(whole, store, chunk)? {
        same if same == whole => Some(bytes),
        longer => Some(longer),
    }
}

/// Returns the sound length, no shorter than `asked`, to which a COW file of `bytes` is grown.
pub(crate) fn grown(bytes: u64, asked: u64, store: Store, chunk: ChunkSize) -> Option<u64> {
    if asked <= bytes {
        sound_from(bytes, store, chunk)
    } else {
        sound(asked, store, chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_match_what_kernels_were_seen_to_need() {
        let (chunk, store) = (ChunkSize::DEFAULT, Store::Persistent);
        let origin = Sectors::from_bytes_floor(8 << 20);
        assert_eq!(worst_case(origin, store, chunk), Some(2058 * 4096));
        assert_eq!(worst_case(origin, Store::Transient, chunk), Some(8 << 20));
        assert_eq!(worst_case(Sectors::new(9), store, chunk), Some(4 * 4096));
        assert_eq!(worst_case(Sectors::new(u64::MAX), store, chunk), None);
        assert_eq!(least_bytes(store, chunk), 3 * 4096);
        assert_eq!(least_bytes(Store::Transient, chunk), 4096);
    }

    #[test]
    fn sound_sizes_are_whole_chunks_and_never_traps() {
        let (chunk, store) = (ChunkSize::DEFAULT, Store::PersistentOverflow);
        for (asked, chunks) in [
            (0, 3),
            (1, 3),
            (257 * 4096, 257),
            (257 * 4096 + 1, 259),
            (258 * 4096, 259),
        ] {
            assert_eq!(sound(asked, store, chunk), Some(chunks * 4096), "{asked}");
        }
        assert_eq!(sound(258 * 4096, Store::Transient, chunk), Some(258 * 4096));
        assert_eq!(sound(u64::MAX, store, chunk), None);
        for origin in 1..3000 {
            let worst = worst_case(Sectors::new(origin * 8), store, chunk).expect("small");
            assert_eq!(
                sound(worst, store, chunk),
                Some(worst),
                "the worst case of {origin} chunks"
            );
        }
    }

    /// The store as the kernel fills it: whether the device of so many chunks is full before the kernel finds no room
    /// to zero a metadata area (`persistent_prepare_exception`, `persistent_commit_exception`).
    fn fills_soundly(chunks: u64, chunk: ChunkSize) -> bool {
        let per_area = chunk.bytes() / EXCEPTION_BYTES;
        let (mut next_free, mut committed) = (2, 0);
        while next_free < chunks {
            next_free += 1;
            if next_free % (per_area + 1) == 1 {
                next_free += 1;
            }
            committed += 1;
            if committed % per_area == 0 && 1 + committed / per_area * (per_area + 1) >= chunks {
                return false;
            }
        }
        true
    }

    #[test]
    fn a_size_is_sound_exactly_when_the_kernel_fills_it() {
        let store = Store::PersistentOverflow;
        for sectors in [1, 2, 8, 32] {
            let chunk = ChunkSize::new(sectors).expect("a chunk size");
            let areas = 4 * (chunk.bytes() / EXCEPTION_BYTES + 1);
            for chunks in 3..areas {
                let bytes = chunks * chunk.bytes();
                let sound = sound(bytes, store, chunk) == Some(bytes);
                assert_eq!(sound, fills_soundly(chunks, chunk), "{chunks} of {sectors}");
                let partial = bytes + chunk.bytes() - 1;
                let mended = sound_from(partial, store, chunk).expect("small");
                let same = mended == partial;
                assert!(same == sound && (same || mended == bytes + chunk.bytes()));
            }
        }
    }

    #[test]
    fn growth_ends_on_sound_sizes_and_is_never_shorter() {
        let (chunk, store) = (ChunkSize::DEFAULT, Store::PersistentOverflow);
        let trap = 258 * 4096;
        for (bytes, asked, then) in [
            (3 * 4096, trap, trap + 4096),
            (trap, 0, trap + 4096),
            (trap + 100, trap, trap + 4096),
            (trap + 100, trap + 100, trap + 4096),
            (trap - 1, 0, trap - 1),
            (4 * 4096, 3 * 4096, 4 * 4096),
            (4 * 4096 + 1, 3 * 4096, 4 * 4096 + 1),
            (4 * 4096 + 1, 4 * 4096 + 2, 5 * 4096),
        ] {
            assert_eq!(
                grown(bytes, asked, store, chunk),
                Some(then),
                "{bytes} {asked}"
            );
        }
        assert_eq!(grown(4096, u64::MAX, store, chunk), None);
    }
}
