//! The story of an export: origin image and COW file to a raw image.
//!
//! No data goes through device-mapper, so neither a suspended device nor a full one can hold an export up.

mod copy;
mod flatten;
#[cfg(test)]
mod flatten_tests;
mod live;
mod output;
mod stack;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use copy::Copier;
pub use flatten::{FlattenOptions, Flattened};
use output::Output;

use crate::backing::{
    Backing, CowOptions, Reader, Sample, check_header, check_identity, open_origin, open_store,
    sample, unsound,
};
pub use crate::base::Progress;
use crate::base::{DeviceId, SECTOR_BYTES, Sectors};
use crate::call::ask;
use crate::error::{Error, Refusal, Result, Step};
use crate::find;
use crate::kernel::{Host, MACHINE};
use crate::store::{ExceptionStore, Extent, Piece, overlay};

/// Options for writing a snapshot's disk to a file of its own.
///
/// The result is a raw image: what a guest sees, without device-mapper. Its length is the origin's in whole 512-byte
/// sectors, since the guest sees no others. It is sparse where the origin and the COW file are, and where they hold
/// 4 KiB of zeroes. Where the file system can (`FICLONE`: XFS, btrfs), the origin is shared and not copied.
///
/// It is written under no name, or a temporary one where the file system has no nameless files, given its name when it
/// is complete, and synced to disk with its directory. Its mode is 0600, as a COW file's.
///
/// ```no_run
/// let done = dmsnap::export::ExportOptions::new().export("/images/base.ext4", "/run/vm-42.cow", "/images/vm-42.ext4")?;
/// println!("{} of {} bytes had changed", done.changed_bytes, done.bytes);
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ExportOptions {
    replace: bool,
    any_origin: bool,
    invalid_store: bool,
    reflink: bool,
    deadline: Option<Duration>,
}

/// What was exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Exported {
    /// The image's length, in bytes.
    pub bytes: u64,
    /// How much of it comes from the COW file, in bytes.
    pub changed_bytes: u64,
    /// How much was written: neither what is a hole nor what is shared with the origin.
    pub written_bytes: u64,
    /// Whether the rest is shared with the origin.
    pub reflinked: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            replace: false,
            any_origin: false,
            invalid_store: false,
            reflink: true,
            deadline: None,
        }
    }
}

impl ExportOptions {
    /// Nothing is replaced, origin and store are what they should be, and the origin is shared where it can be.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the output where it exists and is a regular file. It stays as it is until the new one is complete.
    pub fn replace(&mut self, replace: bool) -> &mut Self {
        self.replace = replace;
        self
    }

    /// Takes the origin as it is, as [`SnapshotOptions::any_origin`](crate::SnapshotOptions::any_origin) does: over a changed one the result is garbage.
    pub fn any_origin(&mut self, any_origin: bool) -> &mut Self {
        self.any_origin = any_origin;
        self
    }

    /// Takes a store that the kernel has marked invalid: a `P` store that overflowed, or one whose COW file could not
    /// be written.
    ///
    /// The kernel gives nothing of it back, and marks no more than that a write was lost. What was written before is
    /// still in the file. The result is the disk as it was when the store gave up, without the writes that failed and
    /// without all later ones: a disk after a power cut, which wants a file system check.
    pub fn invalid_store(&mut self, invalid_store: bool) -> &mut Self {
        self.invalid_store = invalid_store;
        self
    }

    /// Whether to share the origin with the result where the file system can. On unless turned off, as for a result
    /// that must not depend on the origin's blocks.
    pub fn reflink(&mut self, reflink: bool) -> &mut Self {
        self.reflink = reflink;
        self
    }

    /// Sets for how long others are waited for: who has a lock on a file (a second unless set), and who is at work on the
    /// snapshot (15 seconds).
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    /// Exports what a COW file that is not in use makes of an origin. Needs no device-mapper and no privilege beyond
    /// reading both. Both are locked (shared `flock`) meanwhile, so that no snapshot is made on the COW file.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for a COW file that a snapshot has, a store that is damaged or
    /// invalid, an origin that has changed since the store was made, or an output that exists.
    /// [`Error::Failed`] names the step that failed; the output is then as it was before, unless
    /// it was the last step of all, the sync of the output's directory. [`Error::Debris`] when a
    /// temporary file could not be removed.
    pub fn export(
        &self,
        origin: impl AsRef<Path>,
        cow: impl AsRef<Path>,
        output: impl AsRef<Path>,
    ) -> Result<Exported> {
        let whole = self.export_with(origin, cow, output, &mut |_| ControlFlow::Continue(()))?;
        Ok(whole.unwrap_or_default())
    }

    /// The same, telling `progress` at least once for each MiB. When that breaks it off, the answer is `None` and
    /// nothing is left of the output.
    ///
    /// # Errors
    ///
    /// As [`export`](Self::export).
    pub fn export_with(
        &self,
        origin: impl AsRef<Path>,
        cow: impl AsRef<Path>,
        output: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Exported>> {
        let output = output.as_ref();
        let origin = open_origin(&MACHINE, origin.as_ref(), &self.origin_options())?;
        let cow = open_store(&MACHINE, cow.as_ref(), &self.origin_options());
        let cow = cow.map_err(|error| whose(&MACHINE, error))?;
        let source = Source {
            host: &MACHINE,
            origin,
            cows: vec![cow],
            end: None,
        };
        source.export(self, output, progress, || Ok(()))
    }

    /// Exports a running snapshot: flushes it, then copies beside the guest, which goes on.
    ///
    /// The flush writes out what the host has cached of the device and suspends the snapshot for as long as the writes
    /// in flight take, a few milliseconds on an idle one. A file system of the snapshot that is mounted on this host is
    /// frozen for that moment. While data is copied nothing is suspended.
    ///
    /// What was written before the flush is in the result. A chunk that is written to later is old, new or mixed, if it
    /// had been written to before, and as it was at the flush otherwise. For one point in time, pause the VM until this
    /// returns; have its file systems synced or frozen first.
    ///
    /// Of a `PO` store that is full, what the host has cached cannot be written out, and this fails: take the snapshot
    /// down and export the COW file.
    ///
    /// A process that is killed within the flush leaves the snapshot suspended, and its guest waiting:
    /// [`State::Suspended`](crate::find::State::Suspended) in [`list`](crate::list). [`repair`](crate::repair()) lets it go on.
    ///
    /// # Errors
    ///
    /// As [`export`](Self::export). [`Refusal::NotExportable`] for a snapshot that is not working, as when somebody
    /// else has suspended it, or has a transient store. [`Error::Debris`] names a snapshot that
    /// could not be resumed.
    pub fn export_live(
        &self,
        snapshot: impl Into<DeviceId>,
        output: impl AsRef<Path>,
    ) -> Result<Exported> {
        let go_on = &mut |_| ControlFlow::Continue(());
        let whole = self.export_live_with(snapshot, output, go_on)?;
        Ok(whole.unwrap_or_default())
    }

    /// The same with `progress`, as [`export_with`](Self::export_with) has it.
    ///
    /// # Errors
    ///
    /// As [`export_live`](Self::export_live).
    pub fn export_live_with(
        &self,
        snapshot: impl Into<DeviceId>,
        output: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Exported>> {
        live::export(&MACHINE, self, &snapshot.into(), output.as_ref(), progress)
    }

    fn origin_options(&self) -> CowOptions {
        CowOptions {
            any_origin: self.any_origin,
            deadline: self.deadline,
            ..CowOptions::default()
        }
    }
}

/// Names the snapshot that has the COW file, if it is one of ours.
fn whose<H: Host>(host: &H, error: Error) -> Error {
    let Error::Refused(Refusal::CowInUse { path }) = &error else {
        return error;
    };
    let Ok(facts) = host.look(path, true) else {
        return error;
    };
    let snapshots = find::all(host).unwrap_or_default();
    let has_it = |info: &find::SnapshotInfo| {
        let cow = info.cow.as_ref();
        cow.is_some_and(|cow| cow.backing == Some(facts.id))
    };
    let name = snapshots
        .into_iter()
        .find_map(|(name, info)| info.ok().filter(has_it).map(|_| name));
    match name {
        Some(name) => Refusal::CowOfSnapshot {
            path: path.clone(),
            name,
        }
        .into(),
        None => error,
    }
}

/// What is exported.
struct Source<'a, H: Host> {
    host: &'a H,
    origin: Backing<'a, H::File>,
    /// From the bottom up; one, unless it is a stack's.
    cows: Vec<Backing<'a, H::File>>,
    /// The COW chunk from which on the store is not looked at.
    end: Option<u64>,
}

impl<H: Host> Source<'_, H> {
    /// Writes the output and gives it its name, unless `still` fails at the end.
    fn export(
        self,
        options: &ExportOptions,
        output: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
        still: impl FnOnce() -> Result<()>,
    ) -> Result<Option<Exported>> {
        let image = self.origin.facts.id;
        if let Some(same) = self.cows.iter().find(|cow| cow.facts.id == image) {
            let (origin, cow) = (self.origin.path.to_owned(), same.path.to_owned());
            return Err(Refusal::SameFile { origin, cow }.into());
        }
        let cows = self.cows.iter().map(|cow| cow.facts.id);
        let inputs: Vec<_> = [image].into_iter().chain(cows).collect();
        output::admit(self.host, output, options.replace, &inputs)?;
        let length = Sectors::from_bytes_floor(self.origin.facts.size_bytes).count() * SECTOR_BYTES;
        let pieces = self.pieces(options, length)?;
        let output = Output::make(self.host, output)?;
        let reflinked = options.reflink && output.clone_of(&self.origin.file);
        let mut copier = Copier {
            host: self.host,
            cows: self.cows.iter().map(|cow| (&cow.file, cow.path)).collect(),
            output: (output.file(), output.path()),
            progress,
            written: 0,
        };
        let changed_bytes = pieces.iter().map(|piece| piece.extent.length).sum();
        let origin = (&self.origin.file, self.origin.path);
        let copied = copier.copy(origin, length, pieces, reflinked);
        let written_bytes = copier.written;
        let checked = copied.and_then(|copied| {
            still()?;
            self.check_unchanged(options)?;
            Ok(copied)
        });
        match checked {
            Ok(ControlFlow::Continue(())) => output.publish(options.replace)?,
            Ok(ControlFlow::Break(())) => return output.discard(None).map(|()| None),
            Err(error) => return output.discard(Some(error)).map(|()| None),
        }
        Ok(Some(Exported {
            bytes: length,
            changed_bytes,
            written_bytes,
            reflinked,
        }))
    }

    /// What the COW files change, if they hold stores that are to be believed.
    fn pieces(&self, options: &ExportOptions, length: u64) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for (nth, cow) in self.cows.iter().enumerate() {
            let extents = self.extents(options, length, cow, nth == 0)?;
            pieces = overlay(pieces, extents, nth);
        }
        Ok(pieces)
    }

    /// What one of them changes; the lowest has to be over this image.
    fn extents(
        &self,
        options: &ExportOptions,
        length: u64,
        cow: &Backing<'_, H::File>,
        lowest: bool,
    ) -> Result<Vec<Extent>> {
        let path = cow.path;
        let store = ExceptionStore::open(Reader::of(self.host, cow));
        let mut store = store.map_err(|error| unsound(path, error))?;
        if !store.is_valid() && !options.invalid_store {
            let path = path.to_owned();
            return Err(Refusal::CowInvalid { path }.into());
        }
        let fingerprint = Sample {
            take: &|| sample(self.host, &self.origin),
            marks: false,
        };
        if lowest {
            let (header, any) = (store.header(), options.any_origin);
            check_header(&self.origin, cow, header, fingerprint, any)?;
        }
        store = store.over(Sectors::from_bytes_floor(length));
        if let Some(end) = self.end {
            store = store.ending_at(end);
        }
        store
            .changed_extents()
            .map_err(|error| unsound(path, error))
    }

    /// Whoever takes no locks may have written to the image meanwhile.
    fn check_unchanged(&self, options: &ExportOptions) -> Result<()> {
        let before = self.origin.identity();
        let facts = ask(Step::InspectFile, self.origin.path, || {
            self.host.inspect_file(&self.origin.file)
        })?;
        let path = self.origin.path;
        check_identity(path, facts.identity(), Some(before), options.any_origin)
    }
}
