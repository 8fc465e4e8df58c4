//! The exception store: any bytes, and a good store with damage done to it.

use std::collections::BTreeSet;
use std::io::{Cursor, Read, Result as IoResult, Seek, SeekFrom};

use dmsnap::store::{Exception, ExceptionStore, Extent, StoreError, StoreFault};

use crate::made_store::{MadeStore, plain_reading};
use crate::{Numbers, check_message};

/// Any bytes as a COW file, and as the metadata of one that claims to be of any length.
///
/// # Panics
///
/// When a demand is not met.
pub fn store_reader(data: &[u8]) {
    check_against_plain_reading(data);
    let mut file = Claiming::new(data);
    let opened = ExceptionStore::open(&mut file);
    let mut store = opened.expect("a good header");
    let _ = store.summary().map_err(|error| check_fault(&error));
    match store.changed_extents() {
        Ok(extents) => check_extents(&extents),
        Err(error) => check_fault(&error),
    }
    // Twice as far as there is anything to read, and a window at the end, for each of three scans: the third looks for
    // the offset of what is there twice.
    let bound = 4096 + 3 * (2 * data.len() + (128 << 10));
    assert!(file.read <= bound, "{} bytes read", file.read);
}

/// A good store reads as it was made; damaged, it reads as it is by the plain reading, or is a fault at the same place.
///
/// # Panics
///
/// When a demand is not met.
pub fn store_damage(data: &[u8]) {
    let mut numbers = Numbers(data);
    let chunk_sectors = 1 << (numbers.short() % 3);
    let count = numbers.short() % 300;
    let spare = usize::from(numbers.short() % 3);
    let origin_chunks: Vec<u64> = (0..count)
        .map(|nth| u64::from(numbers.short()) + u64::from(nth / 7))
        .collect();
    let made = MadeStore::new(chunk_sectors, &origin_chunks, spare);
    check_whole(&made);
    let mut file = made.file;
    while !numbers.0.is_empty() {
        let at = usize::from(numbers.short()) * 16 % file.len();
        match numbers.short() {
            // A zero ends the file there, any other number is put into an exception or a header field.
            0 => file.truncate(at),
            number => file[at..]
                .iter_mut()
                .take(16)
                .step_by(1 + usize::from(number % 16))
                .for_each(|byte| *byte ^= number.to_le_bytes()[1]),
        }
        if file.is_empty() {
            break;
        }
    }
    check_against_plain_reading(&file);
}

fn check_whole(made: &MadeStore) {
    let chunk = made.chunk as u64;
    let mut store = ExceptionStore::open(Cursor::new(&made.file)).expect("a good store");
    let pair = |found: Result<Exception, StoreError>| {
        let found = found.expect("a good exception");
        (found.origin_chunk, found.cow_chunk)
    };
    let read: Vec<_> = store.exceptions().map(pair).collect();
    assert_eq!(read, made.exceptions);
    let extents = store.changed_extents().expect("a good store");
    check_extents(&extents);
    check_covers(&extents, &made.exceptions, chunk);
    let used = store.used_bytes().expect("a good store");
    let length = made.used().min(made.file.len());
    assert_eq!(used, length as u64);
    let mut cut = ExceptionStore::open(Cursor::new(&made.file[..length])).expect("a good store");
    assert_eq!(cut.changed_extents().expect("all of it"), extents);
}

fn check_against_plain_reading(file: &[u8]) {
    let plain = plain_reading(file);
    let mut store = match ExceptionStore::open(Cursor::new(file)) {
        Ok(store) => store,
        Err(error) => {
            let offset = plain.expect_err("refused, and the plain reading has none of it");
            check_fault_at(&error, offset);
            return;
        }
    };
    let read: Result<Vec<_>, _> = store.exceptions().collect();
    let sorted = store.changed_extents();
    match (read, plain) {
        (Ok(read), Ok(plain)) => {
            let pairs = read
                .iter()
                .map(|found| (found.origin_chunk, found.cow_chunk));
            assert!(pairs.eq(plain.iter().copied()), "{read:?} {plain:?}");
            check_sorted(sorted, &plain, store.chunk_size().bytes());
        }
        (Err(error), Err(offset)) => {
            check_fault_at(&error, offset);
            check_fault_at(&sorted.expect_err("the same fault"), offset);
        }
        (read, plain) => panic!("{read:?} {plain:?}"),
    }
}

fn check_sorted(sorted: Result<Vec<Extent>, StoreError>, plain: &[(u64, u64)], chunk: u64) {
    let mut origins = BTreeSet::new();
    let mut cows = BTreeSet::new();
    let twice = plain
        .iter()
        .filter(|(origin, cow)| !origins.insert(*origin) | !cows.insert(*cow))
        .count();
    match sorted {
        Ok(extents) => {
            assert_eq!(twice, 0, "two exceptions for one chunk");
            check_extents(&extents);
            check_covers(&extents, plain, chunk);
        }
        Err(StoreError::Fault(
            fault @ (StoreFault::CowChunkTwice { .. } | StoreFault::OriginChunkTwice { .. }),
        )) => {
            assert_ne!(twice, 0, "{fault}");
            check_message(&fault);
        }
        Err(error) => panic!("{error}"),
    }
}

/// In order, without overlap, and joined where they can be.
fn check_extents(extents: &[Extent]) {
    for pair in extents.windows(2) {
        let end = pair[0].origin_offset + pair[0].length;
        assert!(end <= pair[1].origin_offset, "{pair:?}");
        let follows = pair[0].cow_offset + pair[0].length == pair[1].cow_offset;
        assert!(end < pair[1].origin_offset || !follows, "{pair:?}");
    }
    assert!(extents.iter().all(|extent| extent.length > 0));
}

/// The extents are these exceptions, and no others.
fn check_covers(extents: &[Extent], exceptions: &[(u64, u64)], chunk: u64) {
    let mut expected: Vec<_> = exceptions.to_vec();
    expected.sort_unstable();
    let chunks = extents.iter().flat_map(|extent| {
        (0..extent.length / chunk).map(move |nth| {
            (
                extent.origin_offset / chunk + nth,
                extent.cow_offset / chunk + nth,
            )
        })
    });
    assert!(chunks.eq(expected));
}

fn check_fault(error: &StoreError) {
    check_message(error);
    assert!(matches!(error, StoreError::Fault(_)), "{error}");
}

fn check_fault_at(error: &StoreError, offset: u64) {
    check_message(error);
    match error {
        StoreError::Fault(fault) => assert_eq!(fault.offset(), offset, "{fault}"),
        other => panic!("{other}"),
    }
}

/// A COW file whose metadata areas are the bytes, one after the other, whose length is what the bytes claim, and which
/// holds zeroes everywhere else.
struct Claiming<'a> {
    header: [u8; 16],
    chunk: u64,
    length: u64,
    metadata: &'a [u8],
    position: u64,
    read: usize,
}

impl<'a> Claiming<'a> {
    fn new(data: &'a [u8]) -> Self {
        let mut numbers = Numbers(data);
        let sectors = 1u32 << (numbers.short() % 22);
        let length = numbers.next() >> (numbers.short() % 64);
        let mut header = [0; 16];
        header[..4].copy_from_slice(b"SnAp");
        header[4] = 1;
        header[8] = 1;
        header[12..].copy_from_slice(&sectors.to_le_bytes());
        Self {
            header,
            chunk: u64::from(sectors) * 512,
            length: length.max(16),
            metadata: numbers.0,
            position: 0,
            read: 0,
        }
    }

    /// What the bytes say from there on, up to the end of the chunk.
    fn metadata_at(&self, at: u64) -> &'a [u8] {
        let (chunk, per_area) = (at / self.chunk, self.chunk / 16);
        if chunk % (per_area + 1) != 1 {
            return &[];
        }
        let area = chunk / (per_area + 1);
        let nth = area
            .checked_mul(self.chunk)
            .and_then(|start| usize::try_from(start + at % self.chunk).ok());
        nth.and_then(|nth| self.metadata.get(nth..))
            .unwrap_or_default()
    }
}

impl Read for Claiming<'_> {
    /// At most to the end of the header or of a chunk.
    fn read(&mut self, buffer: &mut [u8]) -> IoResult<usize> {
        let at = self.position;
        let (content, end) = match self.header.get(usize::try_from(at).unwrap_or(16)..) {
            Some(header) if at < 16 => (header, 16),
            _ => (
                self.metadata_at(at),
                (at - at % self.chunk).saturating_add(self.chunk),
            ),
        };
        let left = self.length.min(end).saturating_sub(at);
        let length = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let told = content.len().min(length);
        buffer[..told].copy_from_slice(&content[..told]);
        buffer[told..length].fill(0);
        self.position += length as u64;
        self.read += length;
        Ok(length)
    }
}

impl Seek for Claiming<'_> {
    fn seek(&mut self, to: SeekFrom) -> IoResult<u64> {
        self.position = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(0) => self.length,
            other => panic!("{other:?} is not asked for"),
        };
        Ok(self.position)
    }
}
