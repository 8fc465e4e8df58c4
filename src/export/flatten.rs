//! The story of a flattening: the COW files of a stack become one, chunk by chunk the newest.
//!
//! Files only, as in an export: no device is touched, and the output has no name until it is complete.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::copy::Copier;
use super::output::{self, Output};
use super::stack::in_stack_order;
use crate::backing::{Backing, CowOptions, Reader, open_store, unsound};
use crate::base::{ChunkSize, Progress, Sectors, Store};
use crate::call::ask;
use crate::error::{Refusal, Result, Step};
use crate::kernel::{Host, MACHINE};
use crate::store::{self, Chain, ExceptionStore, Extent, Header, Layout, MARK_AT, Piece, overlay};

/// Options for making one COW file of those of a stack, and the calls that do it.
///
/// The files are given in any order, without the image: their marks say which was made over which. The result stands on
/// what the lowest stood on, and is what the topmost was: a layer, over which everything fits that was made over the
/// topmost; or, where that was never frozen, the disk's own COW file, as long as it may ever have to be.
///
/// ```no_run
/// use dmsnap::export::FlattenOptions;
///
/// FlattenOptions::new().flatten(["/vms/42.0.cow", "/vms/42.1.cow"], "/vms/42.flat.cow")?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct FlattenOptions {
    replace: bool,
    deadline: Option<Duration>,
}

/// The result of a flattening.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Flattened {
    /// The new COW file's length, in bytes.
    pub bytes: u64,
    /// How much of a disk it changes, in bytes.
    pub changed_bytes: u64,
    /// How much was written, in bytes; the rest is holes.
    pub written_bytes: u64,
}

impl FlattenOptions {
    /// Makes the default options: an output that exists is refused.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether an output that exists and is a regular file is replaced. It stays as it is until the new one is
    /// complete.
    pub fn replace(&mut self, replace: bool) -> &mut Self {
        self.replace = replace;
        self
    }

    /// Sets for how long whoever has a lock on a file is waited for: a second unless set.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    /// Makes `output` of the COW files, which are locked (shared `flock`) meanwhile and stay as they are. Needs no
    /// device-mapper and no privilege.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](crate::Error::Refused) with nothing done, and the file's name in it: [`Refusal::CowInUse`],
    /// [`LayerRefusal`](crate::error::LayerRefusal)'s `Missing`, `Apart` and `Twice` for files that are not one stack,
    /// [`Refusal::CowChunkSize`] where their chunks are not of one size, and a store that is damaged or invalid.
    /// [`Error::Failed`](crate::Error::Failed) and [`Error::Debris`](crate::Error::Debris) as
    /// [`export`](super::ExportOptions::export) has them.
    pub fn flatten<P: AsRef<Path>>(
        &self,
        cows: impl IntoIterator<Item = P>,
        output: impl AsRef<Path>,
    ) -> Result<Flattened> {
        let go_on = &mut |_| ControlFlow::Continue(());
        let whole = self.flatten_with(cows, output, go_on)?;
        Ok(whole.unwrap_or_default())
    }

    /// Does what [`flatten`](Self::flatten) does, and calls `progress` as
    /// [`export_with`](super::ExportOptions::export_with) does. If that returns `Break`, this returns `None`, and
    /// nothing is left of the output.
    ///
    /// # Errors
    ///
    /// As [`flatten`](Self::flatten).
    pub fn flatten_with<P: AsRef<Path>>(
        &self,
        cows: impl IntoIterator<Item = P>,
        output: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Flattened>> {
        let cows: Vec<_> = cows
            .into_iter()
            .map(|cow| cow.as_ref().to_owned())
            .collect();
        flatten(&MACHINE, self, &cows, output.as_ref(), progress)
    }
}

pub(super) fn flatten<H: Host>(
    host: &H,
    options: &FlattenOptions,
    cows: &[PathBuf],
    output: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Flattened>> {
    let lock = CowOptions {
        deadline: options.deadline,
        ..CowOptions::default()
    };
    let opened = cows.iter().map(|cow| open_store(host, cow, &lock));
    let files = in_stack_order(host, opened.collect::<Result<Vec<_>>>()?, None)?;
    let inputs: Vec<_> = files.iter().map(|file| file.facts.id).collect();
    let stack = read(host, &files)?;
    output::admit(host, output, options.replace, &inputs)?;

    let output = Output::make(host, output)?;
    let mut copier = Copier {
        host,
        cows: files.iter().map(|file| (&file.file, file.path)).collect(),
        output: (output.file(), output.path()),
        progress,
        written: 0,
    };
    let data = copier.patch(stack.data(), false);
    let written = match data {
        Ok(ControlFlow::Continue(())) => stack.write(host, &output),
        Ok(ControlFlow::Break(())) => return output.discard(None).map(|()| None),
        Err(error) => Err(error),
    };
    let written_bytes = copier.written;
    match written {
        Ok(()) => output.publish(options.replace)?,
        Err(error) => return output.discard(Some(error)).map(|()| None),
    }
    Ok(Some(Flattened {
        bytes: stack.bytes,
        changed_bytes: stack.exceptions() * stack.chunk.bytes(),
        written_bytes,
    }))
}

/// What the files hold together, and what the new one is to be.
struct Stack {
    chunk: ChunkSize,
    pieces: Vec<Piece>,
    lowest: Header,
    topmost: Header,
    bytes: u64,
}

/// Reads the stores, from the bottom up.
fn read<H: Host>(host: &H, files: &[Backing<'_, H::File>]) -> Result<Stack> {
    let (mut pieces, mut headers) = (Vec::new(), Vec::<Header>::new());
    for (nth, file) in files.iter().enumerate() {
        let path = file.path;
        let store = ExceptionStore::open(Reader::of(host, file));
        let mut store = store.map_err(|error| unsound(path, error))?;
        let path = || path.to_owned();
        if !store.is_valid() {
            return Err(Refusal::CowInvalid { path: path() }.into());
        }
        let (found, first) = (store.chunk_size(), headers.first());
        if let Some(asked) = first
            .map(|first| first.chunk)
            .filter(|asked| *asked != found)
        {
            return Err(Refusal::CowChunkSize {
                path: path(),
                found,
                asked,
            }
            .into());
        }
        headers.push(*store.header());
        let extents = store.changed_extents();
        let extents = extents.map_err(|error| unsound(file.path, error))?;
        pieces = overlay(pieces, extents, nth);
    }
    let (Some(lowest), Some(topmost)) = (headers.first(), headers.last()) else {
        let path = PathBuf::new();
        return Err(Refusal::CowBlank { path }.into());
    };
    let mut stack = Stack {
        chunk: lowest.chunk,
        pieces,
        lowest: *lowest,
        topmost: *topmost,
        bytes: 0,
    };
    let room = files.last().map_or(0, |file| file.facts.size_bytes);
    stack.bytes = stack.length(room);
    Ok(stack)
}

impl Stack {
    fn exceptions(&self) -> u64 {
        let bytes: u64 = self.pieces.iter().map(|piece| piece.extent.length).sum();
        bytes / self.chunk.bytes()
    }

    /// A layer's file is as long as what it holds; one that is written to has room for the whole disk, or where that is
    /// not known, for as much as the topmost had.
    fn length(&self, room: u64) -> u64 {
        let used = Layout::new(self.chunk).bytes(self.exceptions());
        if self.topmost.chain.is_some_and(|chain| chain.frozen) {
            return used;
        }
        let disk = self.lowest.origin.map(|origin| origin.size_bytes);
        let whole = disk.and_then(|bytes| {
            store::worst_case(
                Sectors::from_bytes_floor(bytes),
                Store::Persistent,
                self.chunk,
            )
        });
        let whole = whole.unwrap_or(used.saturating_add(room)).max(used);
        store::sound(whole, Store::Persistent, self.chunk).unwrap_or(used)
    }

    /// Which pieces of the files go where in the new one: what they change in the order of the disk, an area's worth in
    /// one piece.
    fn data(&self) -> Vec<Piece> {
        let (layout, chunk) = (Layout::new(self.chunk), self.chunk.bytes());
        let (mut nth, mut data) = (0, Vec::with_capacity(self.pieces.len()));
        for piece in &self.pieces {
            let mut done = 0;
            while done < piece.extent.length {
                let length = (layout.in_one_piece(nth) * chunk).min(piece.extent.length - done);
                let extent = Extent {
                    origin_offset: layout.data(nth),
                    length,
                    cow_offset: piece.extent.cow_offset + done,
                };
                let from = piece.from;
                data.push(Piece { extent, from });
                nth += length / chunk;
                done += length;
            }
        }
        data
    }

    /// Everything but the data: metadata, length, header and marks.
    fn write<H: Host>(&self, host: &H, output: &Output<'_, H>) -> Result<()> {
        let (file, path) = (output.file(), output.path());
        let write =
            |bytes: &[u8], at| ask(Step::WriteFile, path, || host.write_data(file, bytes, at));
        let (layout, chunk) = (Layout::new(self.chunk), self.chunk.bytes());
        let chunks = self.pieces.iter().flat_map(|piece| {
            let first = piece.extent.origin_offset / chunk;
            first..first + piece.extent.length / chunk
        });
        for (at, bytes) in layout.metadata(chunks) {
            write(&bytes, at)?;
        }
        ask(Step::WriteFile, path, || {
            host.size_file(file, self.bytes, false)
        })?;
        let (marks, length) = self.marks();
        write(&marks[..length], MARK_AT as u64)?;
        write(&layout.header(), 0)
    }

    /// It stands on what the lowest stood on, and is what the topmost was.
    fn marks(&self) -> (Vec<u8>, usize) {
        let (lowest, topmost) = (&self.lowest, &self.topmost);
        let first = lowest
            .origin
            .map(|origin| store::mark(origin, lowest.merging_into));
        let place = |header: &Header| header.chain.unwrap_or_default();
        let chain = Chain {
            id: place(topmost).id,
            frozen: place(topmost).frozen,
            ..place(lowest)
        };
        let chain = Some(chain).filter(|chain| *chain != Chain::default());
        let content = lowest.origin.zip(lowest.content);
        let content = content.map(|(origin, content)| store::content(origin, content));
        let (marks, length) =
            store::marks(first.unwrap_or([0; 64]), chain.map(store::chain), content);
        (marks.to_vec(), length)
    }
}
