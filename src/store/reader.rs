//! Reads a persistent store as the kernel does (`read_exceptions`, `drivers/md/dm-snap-persistent.c`).

use std::io::{self, Read, Seek, SeekFrom};

use super::extents::{Extent, Extents, in_origin_order};
use super::fault::{StoreError, StoreFault};
use super::header::{BLANK_BYTES, Header, PROBE_BYTES, Probe, probe};
use super::place::StackPlace;
use super::sizing::{EXCEPTION_BYTES, least_bytes};
use crate::base::{ChunkSize, OriginIdentity, Sectors, Store};

/// How many bytes of a metadata area are in memory at a time, as a header may claim areas of 1 GiB.
const WINDOW_BYTES: u64 = 64 << 10;

/// The exception store in a COW file: which chunks of the origin a snapshot has changed, and where they are.
///
/// It reads any `Read + Seek`, needs no device-mapper and no privilege, and trusts nothing that it reads: every chunk
/// number is checked against the file's length, and what no kernel would write is a [`StoreFault`]. Except for
/// [`changed_extents`](Self::changed_extents) it takes 64 KiB of memory, however long the file is.
///
/// Do not use it on the COW file of a live snapshot, which changes while it is read; [`ExportOptions::export_live`] can
/// read that.
///
/// ```
/// use std::io::Cursor;
/// use dmsnap::store::{ExceptionStore, Extent};
///
/// // Chunks of one sector: a header, one metadata area, one chunk of data that stands for the origin's chunk 7.
/// let mut file = vec![0u8; 3 * 512];
/// file[..13].copy_from_slice(b"SnAp\x01\0\0\0\x01\0\0\0\x01");
/// file[512] = 7;
/// file[520] = 2;
/// let mut store = ExceptionStore::open(Cursor::new(file))?;
/// let changed = store.changed_extents()?;
/// assert_eq!(changed, [Extent { origin_offset: 7 * 512, length: 512, cow_offset: 2 * 512 }]);
/// # Ok::<(), dmsnap::store::StoreError>(())
/// ```
///
/// [`ExportOptions::export_live`]: crate::export::ExportOptions::export_live
#[derive(Debug)]
pub struct ExceptionStore<R> {
    reader: R,
    header: Header,
    bytes: u64,
    origin: Option<Sectors>,
    /// The COW chunk at which the scan ends; `None`: at the end of the store.
    end: Option<u64>,
}

/// One entry of the store: a chunk of the origin, and the chunk of the COW file that has its new content. Both are
/// chunk numbers, not sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The chunk's number in the origin.
    pub origin_chunk: u64,
    /// The chunk's number in the COW file.
    pub cow_chunk: u64,
}

/// A summary of a store: its parameters and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StoreSummary {
    /// The COW file's length.
    pub file_bytes: u64,
    /// The chunk size that the store was made with.
    #[cfg_attr(feature = "serde", serde(rename = "chunk_sectors"))]
    pub chunk: ChunkSize,
    /// True if the kernel takes the store: no `P` store that overflowed, and no write to it failed.
    pub valid: bool,
    /// The size and time of the image that it was made over, if dmsnap made it.
    pub origin: Option<OriginIdentity>,
    /// Its place in a stack of layers: see [`ExceptionStore::place`].
    pub place: Option<StackPlace>,
    /// How many chunks of the origin have been written to.
    pub exceptions: u64,
    /// How many metadata areas the kernel reads.
    pub areas: u64,
    /// How much of the file must be copied to move it, in bytes: see [`ExceptionStore::used_bytes`].
    pub used_bytes: u64,
}

/// What a file is whose first bytes are zeroes, by as much of it as has to be zeroes for it to be blank.
fn blank_or_headless<R: Read + Seek>(reader: &mut R) -> io::Result<StoreFault> {
    reader.seek(SeekFrom::Start(0))?;
    let mut start = Vec::new();
    let limit = u64::try_from(BLANK_BYTES).unwrap_or(u64::MAX);
    reader.by_ref().take(limit).read_to_end(&mut start)?;
    let blocks = start.chunks(PROBE_BYTES).zip((0..).step_by(PROBE_BYTES));
    let mut data = blocks.filter(|(block, _)| !block.iter().all(|byte| *byte == 0));
    Ok(match data.next() {
        Some((_, offset)) => StoreFault::Headless { offset },
        None => StoreFault::Blank,
    })
}

impl<R: Read + Seek> ExceptionStore<R> {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// [`StoreFault::Blank`], [`StoreFault::Headless`], [`StoreFault::Foreign`] or [`StoreFault::Header`] for a file that
    /// holds no store. [`StoreError::Read`] if the file cannot be read.
    pub fn open(mut reader: R) -> Result<Self, StoreError> {
        let read = |source| StoreError::Read { offset: 0, source };
        let bytes = reader.seek(SeekFrom::End(0)).map_err(read)?;
        reader.seek(SeekFrom::Start(0)).map_err(read)?;
        let mut start = Vec::with_capacity(PROBE_BYTES);
        let limit = u64::try_from(PROBE_BYTES).unwrap_or(0);
        let mut limited = reader.by_ref().take(limit);
        limited.read_to_end(&mut start).map_err(read)?;
        let header = match probe(&start) {
            Probe::Store(header) => header,
            Probe::Blank => return Err(blank_or_headless(&mut reader).map_err(read)?.into()),
            Probe::Foreign => return Err(StoreFault::Foreign.into()),
            Probe::Damaged(fault) => {
                return Err(StoreFault::Header {
                    offset: fault.offset(),
                    field: fault.field,
                    value: fault.value,
                }
                .into());
            }
        };
        Ok(Self {
            reader,
            header,
            bytes,
            origin: None,
            end: None,
        })
    }

    /// Sets the origin's length, in whole sectors: exceptions behind it are then faults, and the extent of a last chunk
    /// that the origin does not fill ends where the origin does.
    #[must_use]
    pub fn over(mut self, origin: Sectors) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Ends the scan at the first exception that points to this COW chunk or to one behind it.
    #[must_use]
    pub(crate) fn ending_at(mut self, chunk: u64) -> Self {
        self.end = Some(chunk);
        self
    }

    /// Returns the chunk size that the store was made with.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.header.chunk
    }

    /// True if the kernel takes the store. It clears this flag when a `P` store overflows or a write to the COW file
    /// fails, and never sets it again. The exceptions are still there; see [`ExportOptions::invalid_store`].
    ///
    /// [`ExportOptions::invalid_store`]: crate::export::ExportOptions::invalid_store
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.header.valid
    }

    /// Returns the size and time of the image that the store was made over, if dmsnap made it.
    #[must_use]
    pub fn origin(&self) -> Option<OriginIdentity> {
        self.header.origin
    }

    /// Returns the store's place in a stack of layers; `None` if it was made over an image and never checkpointed, or by
    /// another program.
    ///
    /// A layer's file is told from a disk's by [`StackPlace::frozen`], and what it was made over by
    /// [`StackPlace::parent`]. This is read by [`open`](Self::open), and may be asked of a file that is in use.
    #[must_use]
    pub fn place(&self) -> Option<StackPlace> {
        self.header.chain.map(StackPlace::from)
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the COW file's length in bytes when it was opened.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns an iterator over the exceptions, in the order in which the kernel committed them. It reads the file as
    /// it goes, and ends after the first error.
    pub fn exceptions(&mut self) -> Exceptions<'_, R> {
        let window = self.header.chunk.bytes().min(WINDOW_BYTES);
        Exceptions {
            store: self,
            area: 0,
            nth: 0,
            window: vec![0; usize::try_from(window).unwrap_or(0)],
            over: false,
        }
    }

    /// Returns an iterator over the changes as extents: exceptions that follow each other in the origin and in the COW
    /// file are joined. They come in the order of the store, and it takes constant memory.
    pub fn extents(&mut self) -> Extents<'_, R> {
        let (chunk, origin) = (self.header.chunk, self.origin);
        Extents::new(self.exceptions(), chunk, origin)
    }

    /// Returns what has changed as extents, sorted by their place in the origin.
    ///
    /// This method alone needs memory in proportion to the store: at most 24 bytes for an exception of 16, so 1.5 times
    /// the metadata that is really in the file; that is 6 MiB for 1 GiB of changes in scattered chunks of 4 KiB.
    ///
    /// # Errors
    ///
    /// [`StoreError`]. Only this method finds two exceptions for one origin chunk or for one COW chunk.
    pub fn changed_extents(&mut self) -> Result<Vec<Extent>, StoreError> {
        let extents = self.extents().collect::<Result<Vec<_>, _>>()?;
        let chunk = self.header.chunk.bytes();
        match in_origin_order(extents) {
            Ok(sorted) => Ok(sorted),
            Err(twice) => {
                let offset = self.second(|exception| twice.is(exception, chunk))?;
                Err(twice.fault(offset, chunk).into())
            }
        }
    }

    /// Counts the exceptions, in constant memory.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the file cannot be read or the store has a fault.
    pub fn summary(&mut self) -> Result<StoreSummary, StoreError> {
        let chunk = self.header.chunk;
        let mut scan = self.exceptions();
        let (mut exceptions, mut highest) = (0, 0);
        for exception in scan.by_ref() {
            highest = highest.max(exception?.cow_chunk);
            exceptions += 1;
        }
        // Behind a full area there is an empty one, which the kernel reads too.
        let last_area = scan.metadata_chunk();
        let areas = scan.area + 1;
        let used = (highest.max(last_area) + 1).saturating_mul(chunk.bytes());
        let least = least_bytes(Store::Persistent, chunk);
        Ok(StoreSummary {
            file_bytes: self.bytes,
            chunk,
            valid: self.header.valid,
            origin: self.header.origin,
            place: self.place(),
            exceptions,
            areas,
            used_bytes: used.max(least).min(self.bytes),
        })
    }

    /// Returns how much of the file must be copied to move it to another host, in bytes: a file cut to this length can
    /// be attached, and is exported the same. It ends behind the last chunk in use, or behind the metadata area that
    /// the kernel reads after a full one.
    ///
    /// A file that was cut has no room left: make it longer (`truncate -s`) before a snapshot writes to it.
    ///
    /// # Errors
    ///
    /// Those of [`summary`](Self::summary).
    pub fn used_bytes(&mut self) -> Result<u64, StoreError> {
        Ok(self.summary()?.used_bytes)
    }

    /// Returns the reader, at whatever position it is.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// Returns the offset of the second exception for which `fits` is true.
    fn second(&mut self, fits: impl Fn(Exception) -> bool) -> Result<u64, StoreError> {
        let mut scan = self.exceptions();
        let (mut seen, mut offset) = (0, 0);
        while let Some(exception) = scan.next() {
            if fits(exception?) {
                offset = scan.last_offset();
                seen += 1;
            }
            if seen == 2 {
                break;
            }
        }
        Ok(offset)
    }

    /// Returns the number of whole chunks in the file: the kernel neither reads nor allocates others.
    fn chunks(&self) -> u64 {
        self.bytes / self.header.chunk.bytes()
    }

    fn read_exact_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.seek(SeekFrom::Start(offset))?;
        self.reader.read_exact(buffer)
    }
}

/// An iterator over a store's exceptions: see [`ExceptionStore::exceptions`].
///
/// It ends with any file: every area lies behind the one before, and the file has an end.
#[derive(Debug)]
pub struct Exceptions<'a, R> {
    store: &'a mut ExceptionStore<R>,
    /// The number of the metadata area that is being read.
    area: u64,
    /// The number of the next exception in it.
    nth: u64,
    window: Vec<u8>,
    over: bool,
}

impl<R: Read + Seek> Exceptions<'_, R> {
    fn per_area(&self) -> u64 {
        self.store.header.chunk.bytes() / EXCEPTION_BYTES
    }

    /// Returns the COW chunk of the area that is being read (`area_location`, `drivers/md/dm-snap-persistent.c`).
    fn metadata_chunk(&self) -> u64 {
        self.area
            .saturating_mul(self.per_area() + 1)
            .saturating_add(1)
    }

    /// Returns the offset of the exception that was read last.
    fn last_offset(&self) -> u64 {
        self.offset_of(self.nth.saturating_sub(1))
    }

    fn offset_of(&self, nth: u64) -> u64 {
        self.metadata_chunk()
            .saturating_mul(self.store.header.chunk.bytes())
            .saturating_add(nth * EXCEPTION_BYTES)
    }

    fn step(&mut self) -> Result<Option<Exception>, StoreError> {
        if self.nth == self.per_area() {
            self.area += 1;
            self.nth = 0;
        }
        if self.nth == 0 && self.metadata_chunk() >= self.store.chunks() {
            return Err(StoreFault::CutShort {
                offset: self.offset_of(0),
                bytes: self.store.bytes,
            }
            .into());
        }
        let offset = self.offset_of(self.nth);
        let within = usize::try_from(self.nth * EXCEPTION_BYTES).unwrap_or(0) % self.window.len();
        if within == 0 {
            self.store
                .read_exact_at(offset, &mut self.window)
                .map_err(|source| StoreError::Read { offset, source })?;
        }
        let number = |at: usize| {
            let bytes = self.window.get(at..at + 8)?.try_into().ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let (Some(origin_chunk), Some(cow_chunk)) = (number(within), number(within + 8)) else {
            return Ok(None);
        };
        if cow_chunk == 0 || self.store.end.is_some_and(|end| cow_chunk >= end) {
            return Ok(None);
        }
        self.check(offset, origin_chunk, cow_chunk)?;
        self.nth += 1;
        Ok(Some(Exception {
            origin_chunk,
            cow_chunk,
        }))
    }

    fn check(&self, offset: u64, origin_chunk: u64, cow_chunk: u64) -> Result<(), StoreFault> {
        let chunk = cow_chunk;
        if chunk >= self.store.chunks() {
            return Err(StoreFault::CowChunk { offset, chunk });
        }
        if chunk % (self.per_area() + 1) == 1 {
            return Err(StoreFault::MetadataChunk { offset, chunk });
        }
        let (chunk, sectors) = (origin_chunk, self.store.header.chunk.sectors().count());
        let longest = Sectors::from_bytes_floor(i64::MAX.unsigned_abs());
        let origin = self.store.origin.unwrap_or(longest);
        if chunk >= origin.count().min(longest.count()).div_ceil(sectors) {
            return Err(StoreFault::OriginChunk { offset, chunk });
        }
        Ok(())
    }
}

impl<R: Read + Seek> Iterator for Exceptions<'_, R> {
    type Item = Result<Exception, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let step = self.step().transpose();
        self.over = !matches!(step, Some(Ok(_)));
        step
    }
}
