//! The reader of exception stores, over stores made from the description of the format.

use std::io::{Cursor, Error as IoError, Read, Seek, SeekFrom};

use dmsnap::base::{OriginIdentity, Sectors};
use dmsnap::store::{Exception, ExceptionStore, Extent, StoreError, StoreFault};
use proptest::prelude::*;

use super::made_store::{MadeStore, plain_reading};
use super::{cases, chain};

fn open(file: &[u8]) -> ExceptionStore<Cursor<&[u8]>> {
    ExceptionStore::open(Cursor::new(file)).expect("a good header")
}

fn pairs(store: &mut ExceptionStore<Cursor<&[u8]>>) -> Vec<(u64, u64)> {
    let pair = |found: Result<Exception, StoreError>| {
        let found = found.expect("a good exception");
        (found.origin_chunk, found.cow_chunk)
    };
    store.exceptions().map(pair).collect()
}

fn fault(error: StoreError) -> StoreFault {
    match error {
        StoreError::Fault(fault) => fault,
        other => panic!("{other}"),
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_store_reads_as_it_was_written(
        power in 0..5u32,
        origin_chunks in prop::collection::vec(0..5000u64, 0..700),
        spare in 0..3usize,
    ) {
        let made = MadeStore::new(1 << power, &origin_chunks, spare);
        let mut store = open(&made.file);
        prop_assert_eq!(pairs(&mut store), made.exceptions.clone());
        prop_assert_eq!(plain_reading(&made.file), Ok(made.exceptions.clone()));

        let chunk = made.chunk as u64;
        let mut sorted = made.exceptions.clone();
        sorted.sort_unstable();
        let extents = store.changed_extents().expect("a good store");
        let chunks = extents.iter().flat_map(|extent| {
            (0..extent.length / chunk)
                .map(move |nth| (extent.origin_offset / chunk + nth, extent.cow_offset / chunk + nth))
        });
        prop_assert!(chunks.eq(sorted));

        let summary = store.summary().expect("a good store");
        prop_assert_eq!(summary.exceptions, made.exceptions.len() as u64);
        let used = made.used().min(made.file.len());
        prop_assert_eq!(summary.used_bytes, used as u64);
        let again = open(&made.file[..used]).changed_extents().expect("all that is used");
        prop_assert_eq!(again, extents);
    }

    #[test]
    fn a_file_cut_shorter_than_what_is_used_is_a_fault(
        origin_chunks in prop::collection::vec(0..5000u64, 1..100),
        cut in 0.0..1.0f64,
    ) {
        let made = MadeStore::new(1, &origin_chunks, 0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a small file")]
        let length = (made.used() as f64 * cut) as usize;
        let read = ExceptionStore::open(Cursor::new(&made.file[..length]))
            .and_then(|mut store| store.changed_extents());
        prop_assert!(read.is_err() || length > 2 * made.chunk && made.used() == 3 * made.chunk);
    }
}

#[test]
fn neighbours_are_joined_and_the_last_chunk_ends_where_the_origin_does() {
    let made = MadeStore::new(8, &[4, 5, 0, 6], 0);
    let mut store = open(&made.file).over(Sectors::new(6 * 8 + 3));
    let extent = |origin: u64, length, cow: u64| Extent {
        origin_offset: origin * 4096,
        length,
        cow_offset: cow * 4096,
    };
    let lazily: Vec<_> = store.extents().map(|each| each.expect("good")).collect();
    assert_eq!(
        lazily,
        [
            extent(4, 8192, 2),
            extent(0, 4096, 4),
            extent(6, 3 * 512, 5)
        ]
    );
    assert_eq!(
        store.changed_extents().expect("good"),
        [
            extent(0, 4096, 4),
            extent(4, 8192, 2),
            extent(6, 3 * 512, 5)
        ]
    );
    let mut short = open(&made.file).over(Sectors::new(6 * 8));
    let found = fault(short.changed_extents().expect_err("no chunk 6"));
    let expected = StoreFault::OriginChunk {
        offset: 4096 + 3 * 16,
        chunk: 6,
    };
    assert_eq!(found, expected);
    let extents: Vec<_> = short.extents().collect();
    assert_eq!(extents.len(), 3, "what came before is told: {extents:?}");
    assert!(extents[2].is_err());
}

#[test]
fn what_an_area_that_is_full_is_followed_by_is_used_too() {
    let chunks: Vec<u64> = (0..32).collect();
    let made = MadeStore::new(1, &chunks, 5);
    let mut store = open(&made.file);
    assert_eq!(store.summary().expect("good").areas, 2);
    assert_eq!(store.used_bytes().expect("good"), 35 * 512);
    let cut = open(&made.file[..34 * 512])
        .summary()
        .expect_err("no second area");
    let expected = StoreFault::CutShort {
        offset: 34 * 512,
        bytes: 34 * 512,
    };
    assert_eq!(fault(cut), expected);
    let empty = MadeStore::new(1, &[], 9);
    assert_eq!(open(&empty.file).used_bytes().expect("good"), 3 * 512);
}

/// A store of chunks of one sector with these exceptions, whatever they are.
fn with(exceptions: &[(u64, u64)]) -> Vec<u8> {
    let mut file = MadeStore::new(1, &[], 20).file;
    for (nth, (origin, cow)) in exceptions.iter().enumerate() {
        let at = 512 + nth * 16;
        file[at..at + 8].copy_from_slice(&origin.to_le_bytes());
        file[at + 8..at + 16].copy_from_slice(&cow.to_le_bytes());
    }
    file
}

#[test]
fn damage_is_told_with_its_place() {
    let changed = |file: &[u8]| fault(open(file).changed_extents().expect_err("damaged"));
    let second = 512 + 16;
    for (exceptions, expected, message) in [
        (
            [(1, 2), (2, 22)],
            StoreFault::CowChunk {
                offset: second,
                chunk: 22,
            },
            "at byte 528: COW chunk 22 is outside of the file",
        ),
        (
            [(1, 2), (2, u64::MAX)],
            StoreFault::CowChunk {
                offset: second,
                chunk: u64::MAX,
            },
            "at byte 528: COW chunk 18446744073709551615 is outside of the file",
        ),
        (
            [(1, 2), (2, 1)],
            StoreFault::MetadataChunk {
                offset: second,
                chunk: 1,
            },
            "at byte 528: COW chunk 1 is a metadata area",
        ),
        (
            [(1, 2), (1 << 55, 3)],
            StoreFault::OriginChunk {
                offset: second,
                chunk: 1 << 55,
            },
            "at byte 528: origin chunk 36028797018963968 is behind the origin's end",
        ),
        (
            [(1, 2), (9, 2)],
            StoreFault::CowChunkTwice {
                offset: second,
                chunk: 2,
            },
            "at byte 528: COW chunk 2 is used twice",
        ),
        (
            [(1, 2), (1, 3)],
            StoreFault::OriginChunkTwice {
                offset: second,
                chunk: 1,
            },
            "at byte 528: origin chunk 1 has two exceptions",
        ),
    ] {
        let found = changed(&with(&exceptions));
        assert_eq!(found, expected);
        assert_eq!(
            (found.offset(), found.to_string()),
            (second, message.to_owned())
        );
    }
}

#[test]
fn what_is_no_store_is_told_from_one() {
    let opened = |file: &[u8]| fault(ExceptionStore::open(Cursor::new(file)).expect_err("none"));
    assert_eq!(opened(&[]), StoreFault::Blank);
    assert_eq!(opened(&[0; 8192]), StoreFault::Blank);
    assert_eq!(opened(b"a disk image of some sort"), StoreFault::Foreign);
    let good = MadeStore::new(8, &[1], 0).file;
    for (field, offset, value) in [("valid", 4, 2), ("version", 8, 2), ("chunk_size", 12, 24)] {
        let mut file = good.clone();
        file[offset] = u8::try_from(value).expect("small");
        let found = opened(&file);
        let offset = offset as u64;
        assert_eq!(
            found,
            StoreFault::Header {
                offset,
                field,
                value
            }
        );
        assert_eq!(
            found.to_string(),
            format!("at byte {offset}: {field} is {value}")
        );
    }
    assert_eq!(
        StoreFault::Blank.to_string(),
        "at byte 0: blank, no persistent snapshot was made on it"
    );
    assert_eq!(
        StoreFault::Foreign.to_string(),
        "at byte 0: no exception store"
    );
    let cut = StoreFault::CutShort {
        offset: 4096,
        bytes: 4097,
    };
    assert_eq!(
        cut.to_string(),
        "at byte 4096: a metadata area is missing, the file has 4097 bytes"
    );
}

#[test]
fn an_invalid_store_and_a_mark_are_told_and_read_all_the_same() {
    let mut file = MadeStore::new(1, &[3], 0).file;
    let store = open(&file);
    assert!(store.is_valid());
    assert_eq!((store.origin(), store.file_bytes()), (None, 3 * 512));
    assert_eq!(u64::from(store.chunk_size()), 1);
    file[4] = 0;
    file[64..80].copy_from_slice(b"dmsnap origin 1\0");
    file[80..88].copy_from_slice(&4096u64.to_le_bytes());
    file[88..96].copy_from_slice(&(-5i64).to_le_bytes());
    let mut store = open(&file);
    assert!(!store.is_valid());
    let origin = OriginIdentity {
        size_bytes: 4096,
        mtime_ns: -5,
    };
    assert_eq!(store.origin(), Some(origin));
    assert_eq!(pairs(&mut store), [(3, 2)]);
    assert_eq!(store.into_inner().into_inner().len(), file.len());
}

/// A file of 1 GiB without a byte in memory: its areas are full, with the exceptions that a kernel would write there.
struct Gibibyte {
    position: u64,
    largest_read: usize,
}

impl Gibibyte {
    const BYTES: u64 = 1 << 30;

    fn byte(at: u64) -> u8 {
        const PER_AREA: u64 = 256;
        let header = b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0";
        if let Some(byte) = usize::try_from(at).ok().and_then(|at| header.get(at)) {
            return *byte;
        }
        let chunk = at / 4096;
        if chunk % (PER_AREA + 1) != 1 {
            return 0xa5;
        }
        let nth = (at % 4096) / 16;
        let cow = chunk + 1 + nth;
        let area = chunk / (PER_AREA + 1);
        let entry = if cow >= Self::BYTES / 4096 {
            [0; 2]
        } else {
            // No two neighbours: what takes the most memory to sort.
            [(area * PER_AREA + nth) * 2, cow]
        };
        let number = entry[usize::try_from(at % 16 / 8).expect("0 or 1")];
        number.to_le_bytes()[usize::try_from(at % 8).expect("small")]
    }
}

impl Read for Gibibyte {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, IoError> {
        let left = Self::BYTES.saturating_sub(self.position);
        let length = buffer.len().min(usize::try_from(left).expect("64 bits"));
        for (at, byte) in (self.position..).zip(&mut buffer[..length]) {
            *byte = Self::byte(at);
        }
        self.position += length as u64;
        self.largest_read = self.largest_read.max(length);
        Ok(length)
    }
}

impl Seek for Gibibyte {
    fn seek(&mut self, to: SeekFrom) -> Result<u64, IoError> {
        self.position = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(_) => Self::BYTES,
            SeekFrom::Current(by) => self.position.saturating_add_signed(by),
        };
        Ok(self.position)
    }
}

#[test]
fn a_full_gibibyte_is_read_in_constant_memory() {
    let file = Gibibyte {
        position: 0,
        largest_read: 0,
    };
    let mut store = ExceptionStore::open(file).expect("a good header");
    let (read, most) = super::memory::most(|| {
        store
            .extents()
            .map(|extent| extent.expect("good").length)
            .sum::<u64>()
    });
    let summary = store.summary().expect("good");
    assert_eq!(summary.exceptions, read / 4096);
    assert_eq!(summary.exceptions, (1 << 30) / 4096 - 1 - 1021);
    assert!(most <= 64 << 10, "{most} bytes");

    let (extents, most) = super::memory::most(|| store.changed_extents().expect("good").len());
    let metadata = summary.exceptions * 16;
    assert_eq!(extents as u64, summary.exceptions);
    // A vector that grows holds its old half for a moment.
    assert!(most as u64 <= metadata * 3 / 2 * 3 + (64 << 10), "{most}");
    assert!(store.into_inner().largest_read <= 4096);
}

#[test]
fn a_header_that_claims_chunks_of_a_gibibyte_allocates_no_chunk() {
    let mut file = MadeStore::new(1, &[], 0).file;
    file[12..16].copy_from_slice(&(1u32 << 21).to_le_bytes());
    let (read, most) = super::memory::most(|| open(&file).changed_extents().map(drop));
    assert_eq!(
        fault(read.expect_err("the file is too short")),
        StoreFault::CutShort {
            offset: 1 << 30,
            bytes: 2 * 512
        }
    );
    assert!(most <= 128 << 10, "{most} bytes");
}

#[test]
fn a_reader_that_fails_is_quoted_with_the_place() {
    #[derive(Debug)]
    struct Failing(Cursor<Vec<u8>>);
    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize, IoError> {
            if self.0.position() >= 512 {
                return Err(IoError::from_raw_os_error(5));
            }
            self.0.read(&mut buffer[..16])
        }
    }
    impl Seek for Failing {
        fn seek(&mut self, to: SeekFrom) -> Result<u64, IoError> {
            self.0.seek(to)
        }
    }
    let file = MadeStore::new(1, &[1], 0).file;
    let error = ExceptionStore::open(Failing(Cursor::new(file))).expect_err("it fails");
    let said = "cannot read at byte 0: Input/output error (os error 5)";
    assert_eq!(chain(&error), said);
}
