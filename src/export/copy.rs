//! Copies the data of an export; holes and zeroes become holes.

use std::ops::{ControlFlow, Range};
use std::path::Path;

use crate::base::Progress;
use crate::call::{absent, ask};
use crate::error::{Error, Result, Step, policy};
use crate::kernel::Host;
use crate::store::{Extent, Piece};

/// How many bytes are read, examined and written at a time.
const WINDOW_BYTES: u64 = 1 << 20;

/// How many bytes are written before the kernel is told to begin writing them to the disk.
const WRITEBACK_BYTES: u64 = 16 << 20;

/// The unit in bytes in which zeroes become holes: the block of most file systems.
const BLOCK: usize = 4096;

const ZEROES: [u8; BLOCK] = [0; BLOCK];

/// A file and the path by which errors name it.
pub(super) type Named<'a, F> = (&'a F, &'a Path);

/// The state of an export while it copies.
pub(super) struct Copier<'a, H: Host> {
    pub(super) host: &'a H,
    /// From the bottom up.
    pub(super) cows: Vec<Named<'a, H::File>>,
    pub(super) output: Named<'a, H::File>,
    pub(super) progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Bytes written so far.
    pub(super) written: u64,
}

impl<H: Host> Copier<'_, H> {
    /// Fills the output, of that many bytes: with everything, or with the changes alone where it is the origin's clone.
    pub(super) fn copy(
        &mut self,
        origin: Named<'_, H::File>,
        length: u64,
        pieces: Vec<Piece>,
        reflinked: bool,
    ) -> Result<ControlFlow<()>> {
        let flow = if reflinked {
            self.patch(pieces, true)?
        } else {
            self.assemble(origin, length, &pieces)?
        };
        // A new file may have to end in a hole, and a clone may be longer than whole sectors.
        let (file, path) = self.output;
        ask(Step::WriteFile, path, || {
            self.host.size_file(file, length, false)
        })?;
        Ok(flow)
    }

    /// Writes the image from its beginning to its end: each window is read from the origin, the changes are read over
    /// it, and what is not zero is written.
    fn assemble(
        &mut self,
        origin: Named<'_, H::File>,
        length: u64,
        pieces: &[Piece],
    ) -> Result<ControlFlow<()>> {
        let mut buffer = vec![0; as_length(WINDOW_BYTES.min(length))];
        let mut data = DataRanges::of(self.host, origin);
        let mut pieces = pieces.iter().copied().peekable();
        let (mut at, mut flushed) = (0, 0);
        loop {
            let next = pieces
                .peek()
                .map_or(length, |piece| piece.extent.origin_offset);
            let next = next.min(data.next_after(at)?.start).max(at);
            if next >= length {
                return Ok(self.tell(length, length));
            }
            // Windows begin at a multiple of the block size, so that a block of zeroes is a block of the file system.
            let start = next - next % BLOCK as u64;
            let end = length.min(start + WINDOW_BYTES);
            let window = &mut buffer[..as_length(end - start)];
            self.read_window(window, start, &mut data, &mut pieces)?;
            self.write_blocks(window, start, false)?;
            at = end;
            if at - flushed >= WRITEBACK_BYTES {
                // The disk begins to write early, and little is left for the sync at the end.
                let _ = self.host.start_writeback(self.output.0, flushed..at);
                flushed = at;
            }
            if self.tell(at, length).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    fn read_window(
        &self,
        window: &mut [u8],
        start: u64,
        data: &mut DataRanges<'_, H>,
        pieces: &mut std::iter::Peekable<impl Iterator<Item = Piece>>,
    ) -> Result<()> {
        let end = start + window.len() as u64;
        let mut filled = start;
        while filled < end {
            let range = data.next_after(filled)?;
            let (from, to) = (range.start.clamp(filled, end), range.end.min(end));
            window[as_length(filled - start)..as_length(from - start)].fill(0);
            if from < to {
                let part = &mut window[as_length(from - start)..as_length(to - start)];
                self.read(data.file, part, from)?;
            }
            filled = to.max(from);
        }
        while let Some(piece) = pieces
            .peek()
            .filter(|piece| piece.extent.origin_offset < end)
        {
            let extent = piece.extent;
            let (from, to) = (
                extent.origin_offset.max(start),
                extent.origin_end().min(end),
            );
            let part = &mut window[as_length(from - start)..as_length(to - start)];
            self.read(
                self.cows[piece.from],
                part,
                extent.cow_offset + (from - extent.origin_offset),
            )?;
            if extent.origin_end() > end {
                break;
            }
            pieces.next();
        }
        Ok(())
    }

    /// Writes the changes to where they belong, in the order of the COW files, which are read in large pieces that way.
    /// `over` says that there is something already, which zeroes have to hide.
    pub(super) fn patch(&mut self, mut all: Vec<Piece>, over: bool) -> Result<ControlFlow<()>> {
        all.sort_unstable_by_key(|piece| (piece.from, piece.extent.cow_offset));
        let total = all.iter().map(|piece| piece.extent.length).sum();
        let mut buffer = vec![0; as_length(WINDOW_BYTES)];
        let mut pieces = all.into_iter().flat_map(in_windows).peekable();
        let mut done = 0;
        while let Some(first) = pieces.next() {
            let (from, start) = (first.from, first.extent.cow_offset);
            let mut batch = vec![first.extent];
            let mut end = first.extent.cow_end();
            let fits = |piece: &Piece| {
                piece.from == from && piece.extent.cow_end() <= start + WINDOW_BYTES
            };
            // A metadata area in between is read with them; a longer gap is not.
            while let Some(piece) =
                pieces.next_if(|piece| fits(piece) && piece.extent.cow_offset < end + GAP_BYTES)
            {
                end = piece.extent.cow_end();
                batch.push(piece.extent);
            }
            let window = &mut buffer[..as_length(end - start)];
            self.read(self.cows[from], window, start)?;
            for extent in batch {
                let at = as_length(extent.cow_offset - start);
                let content = &window[at..at + as_length(extent.length)];
                self.write_blocks(content, extent.origin_offset, over)?;
                done += extent.length;
            }
            if self.tell(done, total).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Writes the blocks that are not zero. With `over`, blocks of zeroes are punched into what the file has there.
    fn write_blocks(&mut self, content: &[u8], start: u64, over: bool) -> Result<()> {
        let mut at = 0;
        while at < content.len() {
            let zero = is_zero(block(content, at));
            let mut end = at;
            while end < content.len() && is_zero(block(content, end)) == zero {
                end += block(content, end).len();
            }
            let offset = start + at as u64;
            if !zero {
                self.write(&content[at..end], offset)?;
            } else if over {
                self.punch(&content[at..end], offset)?;
            }
            at = end;
        }
        Ok(())
    }

    fn write(&mut self, content: &[u8], offset: u64) -> Result<()> {
        let (file, path) = self.output;
        ask(Step::WriteFile, path, || {
            self.host.write_data(file, content, offset)
        })?;
        self.written += content.len() as u64;
        Ok(())
    }

    fn punch(&mut self, zeroes: &[u8], offset: u64) -> Result<()> {
        let range = offset..offset + zeroes.len() as u64;
        // If no hole can be punched, for whatever reason, zeroes are written.
        if self.host.punch(self.output.0, range).is_ok() {
            Ok(())
        } else {
            self.write(zeroes, offset)
        }
    }

    fn tell(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        (self.progress)(Progress {
            done_bytes: done,
            total_bytes: total,
        })
    }

    /// Fills the buffer from the file, or fails if the file ends before.
    fn read(&self, (file, path): Named<'_, H::File>, into: &mut [u8], at: u64) -> Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            let from = usize::try_from(at + filled as u64).unwrap_or(usize::MAX);
            let read = || self.host.read_at(file, &mut into[filled..], from);
            match ask(Step::ReadFile, path, read)? {
                0 => return Err(Error::failed(Step::ReadFile, path, policy::CUT_SHORT)),
                got => filled += got,
            }
        }
        Ok(())
    }
}

/// The longest gap in bytes between two pieces of the COW file that is read instead of skipped.
const GAP_BYTES: u64 = 64 << 10;

/// Pieces of at most a window each.
fn in_windows(piece: Piece) -> impl Iterator<Item = Piece> {
    let (Piece { extent, from }, step) = (piece, as_length(WINDOW_BYTES));
    let window = move |at| Extent {
        origin_offset: extent.origin_offset + at,
        length: WINDOW_BYTES.min(extent.length - at),
        cow_offset: extent.cow_offset + at,
    };
    let extents = (0..extent.length).step_by(step).map(window);
    extents.map(move |extent| Piece { extent, from })
}

fn block(content: &[u8], at: usize) -> &[u8] {
    &content[at..content.len().min(at + BLOCK)]
}

fn is_zero(block: &[u8]) -> bool {
    ZEROES.starts_with(block)
}

/// Finds the ranges of a file that have data (`SEEK_DATA`), forwards. Where the file system or device cannot tell, the
/// whole file counts as data.
struct DataRanges<'a, H: Host> {
    host: &'a H,
    file: Named<'a, H::File>,
    known: Range<u64>,
}

impl<'a, H: Host> DataRanges<'a, H> {
    fn of(host: &'a H, file: Named<'a, H::File>) -> Self {
        Self {
            host,
            file,
            known: 0..0,
        }
    }

    /// Returns the first range with data that ends behind `at`; an empty one at the largest offset if there is none.
    fn next_after(&mut self, at: u64) -> Result<Range<u64>> {
        if at >= self.known.end {
            self.known = match self.seek(at, false) {
                Ok(Some(start)) => start..self.seek(start, true).ok().flatten().unwrap_or(u64::MAX),
                Ok(None) => u64::MAX..u64::MAX,
                Err(_) => at..u64::MAX,
            };
        }
        Ok(self.known.clone())
    }

    fn seek(&self, at: u64, hole: bool) -> Result<Option<u64>> {
        let (file, path) = self.file;
        absent(ask(Step::FindData, path, || {
            self.host.find_data(file, at, hole)
        }))
    }
}

/// Converts a length within a window.
fn as_length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
