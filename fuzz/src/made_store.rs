//! A persistent store written as the kernel writes it, and a plain reading of one, in memory.
//!
//! Written from the description of the format, without the library: what it says is held against this.

use std::collections::BTreeSet;

/// Bytes of an exception.
const ENTRY: usize = 16;

/// A store, and what was put into it.
#[derive(Clone, Debug)]
pub struct MadeStore {
    /// Bytes in a chunk.
    pub chunk: usize,
    /// Origin chunk and COW chunk of each exception, in the order of the store.
    pub exceptions: Vec<(u64, u64)>,
    /// The COW file.
    pub file: Vec<u8>,
}

impl MadeStore {
    /// With an exception for each of the origin's chunks, in that order and each once, and so many unused chunks at the
    /// end. A chunk of data is filled with what [`content`] says.
    #[must_use]
    pub fn new(chunk_sectors: u32, origin_chunks: &[u64], spare_chunks: usize) -> Self {
        let chunk = chunk_sectors as usize * 512;
        let per_area = chunk / ENTRY;
        let mut seen = BTreeSet::new();
        let once = origin_chunks.iter().filter(|number| seen.insert(**number));
        // Data chunks follow the header and the first area, and leave out every later area.
        let mut free = 2u64;
        let exceptions: Vec<(u64, u64)> = once
            .map(|origin| {
                let cow = free;
                free += 1;
                if free % (per_area as u64 + 1) == 1 {
                    free += 1;
                }
                (*origin, cow)
            })
            .collect();
        let areas = exceptions.len() / per_area + 1;
        let last_area = 1 + (areas - 1) * (per_area + 1);
        let last_chunk = exceptions.last().map_or(1, |last| last.1 as usize);
        let chunks = last_area.max(last_chunk) + 1;
        let mut file = vec![0; (chunks + spare_chunks) * chunk];
        file[..4].copy_from_slice(b"SnAp");
        for (at, value) in [(4, 1), (8, 1), (12, chunk_sectors)] {
            file[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        for (nth, (origin, cow)) in exceptions.iter().enumerate() {
            let area = 1 + nth / per_area * (per_area + 1);
            let at = area * chunk + nth % per_area * ENTRY;
            file[at..at + 8].copy_from_slice(&origin.to_le_bytes());
            file[at + 8..at + 16].copy_from_slice(&cow.to_le_bytes());
            let data = *cow as usize * chunk;
            file[data..data + chunk].fill(content(*origin));
        }
        Self {
            chunk,
            exceptions,
            file,
        }
    }

    /// How long the file must be at least.
    #[must_use]
    pub fn used(&self) -> usize {
        let per_area = self.chunk / ENTRY;
        let last_area = 1 + self.exceptions.len() / per_area * (per_area + 1);
        let last_data = self.exceptions.iter().map(|(_, cow)| *cow as usize).max();
        (last_area.max(last_data.unwrap_or(0)) + 1).max(3) * self.chunk
    }
}

/// What fills the COW chunk that stands for an origin chunk; never zero.
#[must_use]
pub fn content(origin_chunk: u64) -> u8 {
    (origin_chunk % 255) as u8 + 1
}

/// Where a file is no sound store, in bytes.
pub type Fault = u64;

/// Reads a whole file: the exceptions in order, or where the first fault is.
///
/// # Errors
///
/// [`Fault`].
pub fn plain_reading(file: &[u8]) -> Result<Vec<(u64, u64)>, Fault> {
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("4 bytes"));
    let long = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes"));
    if file.len() < 16 || &file[..4] != b"SnAp" {
        return Err(0);
    }
    if word(8) != 1 {
        return Err(8);
    }
    let sectors = word(12) as usize;
    if word(4) > 1 {
        return Err(4);
    }
    if !sectors.is_power_of_two() || sectors > 1 << 21 {
        return Err(12);
    }
    let chunk = sectors * 512;
    let (chunks, per_area) = ((file.len() / chunk) as u64, chunk / ENTRY);
    let mut exceptions = Vec::new();
    let mut area = 1u64;
    loop {
        let start = area as usize * chunk;
        if area >= chunks {
            return Err(start as u64);
        }
        for nth in 0..per_area {
            let at = start + nth * ENTRY;
            let (origin, cow) = (long(at), long(at + 8));
            if cow == 0 {
                return Ok(exceptions);
            }
            let metadata = cow % (per_area as u64 + 1) == 1;
            // No file is longer than the largest signed offset, and no origin has a part of a sector.
            let behind = u128::from(origin) * chunk as u128 >= (1 << 63) - 512;
            if cow >= chunks || metadata || behind {
                return Err(at as u64);
            }
            exceptions.push((origin, cow));
        }
        area += per_area as u64 + 1;
    }
}
