//! Exports a snapshot's disk, from its origin image and COW file, as a raw image.
//!
//! The files are read directly and not through the dm device, so a suspended or full device does not stop an export.

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
    Backing, CowOptions, Evidence, Reader, check_header, check_identity, check_unmarked, content,
    open_origin, open_store, unsound,
};
pub use crate::base::Progress;
use crate::base::{DeviceId, Digest, SECTOR_BYTES, Sectors};
use crate::call::ask;
use crate::error::{Error, Refusal, Result, Step};
use crate::find;
use crate::kernel::{Host, MACHINE};
use crate::store::{ExceptionStore, Extent, Piece, overlay};

/// Options for exporting a snapshot's disk as a raw image, and the calls that do it.
///
/// The result has what the guest sees, and is used without device-mapper. Its length is the origin's in whole 512-byte
/// sectors. It is sparse where the origin and the COW file are, and where they hold 4 KiB of zeroes. Where the file
/// system can (`FICLONE`: XFS, btrfs), it shares the origin's blocks instead of copying them.
///
/// The file gets its name only when it is complete and synced; until then it has none, or a temporary one where the
/// file system has no nameless files. Its mode is 0600.
///
/// ```no_run
/// let done = dmsnap::export::ExportOptions::new().export("/images/base.ext4", "/run/vm-42.cow", "/images/vm-42.ext4")?;
/// println!("{} of {} bytes had changed", done.changed_bytes, done.bytes);
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ExportOptions {
    replace: bool,
    digest: Option<Digest>,
    any_origin: bool,
    invalid_store: bool,
    reflink: bool,
    deadline: Option<Duration>,
}

/// The result of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Exported {
    /// The exported image's length, in bytes.
    pub bytes: u64,
    /// How much of it comes from the COW file, in bytes.
    pub changed_bytes: u64,
    /// How much was written, in bytes; holes and what is shared with the origin do not count.
    pub written_bytes: u64,
    /// True if the rest is shared with the origin (reflink).
    pub reflinked: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            replace: false,
            digest: None,
            any_origin: false,
            invalid_store: false,
            reflink: true,
            deadline: None,
        }
    }
}

impl ExportOptions {
    /// Makes the default options: an existing output is refused, the origin must be the one that the COW file was made
    /// over, the store must be valid, and the origin's blocks are shared where that is possible.
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

    /// Says what the origin holds, as [`SnapshotOptions::digest`](crate::SnapshotOptions::digest) does.
    pub fn digest(&mut self, digest: impl Into<Digest>) -> &mut Self {
        self.digest = Some(digest.into());
        self
    }

    /// Takes the origin as it is, whatever the COW file was made over, as
    /// [`SnapshotOptions::any_origin`](crate::SnapshotOptions::any_origin) does. With a changed origin the result is
    /// garbage.
    pub fn any_origin(&mut self, any_origin: bool) -> &mut Self {
        self.any_origin = any_origin;
        self
    }

    /// Takes a store that the kernel has marked invalid: a `P` store that overflowed, or one whose COW file could not
    /// be written.
    ///
    /// The kernel reads such a store no more, but what was written before is still in the file. What the store was made
    /// over is not checked. The result is the disk as it was when the store became invalid, without the writes that
    /// failed and all later ones. It is like a disk after a power cut: check its file systems.
    pub fn invalid_store(&mut self, invalid_store: bool) -> &mut Self {
        self.invalid_store = invalid_store;
        self
    }

    /// Sets whether the result shares the origin's blocks where the file system can do that; true by default.
    pub fn reflink(&mut self, reflink: bool) -> &mut Self {
        self.reflink = reflink;
        self
    }

    /// Sets for how long others are waited for: who has a lock on a file (a second unless set), and who is at work on
    /// the snapshot (15 seconds).
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    /// Exports the disk that an origin and an idle COW file make. This needs no device-mapper, and no privilege beyond
    /// reading both files. Both are locked (shared `flock`) meanwhile, so that no snapshot is made on the COW file.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for a COW file that a snapshot uses, a store that is damaged or invalid, an origin that has
    /// changed since the store was made, or an output that exists; [`Refusal::OriginUnknown`] for a store that dmsnap
    /// has not marked, as it may have been made over a part of the image ([`any_origin`](Self::any_origin) takes it).
    /// [`Error::Failed`] names the step that failed; the output is then as it was before, except after a failure of the
    /// last step, the sync of the output's directory. [`Error::Debris`] if a temporary file could not be removed.
    pub fn export(
        &self,
        origin: impl AsRef<Path>,
        cow: impl AsRef<Path>,
        output: impl AsRef<Path>,
    ) -> Result<Exported> {
        let whole = self.export_with(origin, cow, output, &mut |_| ControlFlow::Continue(()))?;
        Ok(whole.unwrap_or_default())
    }

    /// Does what [`export`](Self::export) does, and calls `progress` at least once for each MiB. If that returns
    /// `Break`, this returns `None`, and nothing is left of the output.
    ///
    /// # Errors
    ///
    /// Those of [`export`](Self::export).
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
            live: false,
        };
        source.export(self, output, progress, || Ok(()))
    }

    /// Exports a running snapshot: flushes it, then copies while the guest goes on.
    ///
    /// The flush writes out what the host has cached of the device, and suspends the snapshot for as long as the writes
    /// in flight take, a few milliseconds on an idle one. A file system of the snapshot that is mounted on this host is
    /// frozen for that moment. Nothing is suspended while data is copied.
    ///
    /// All that was written before the flush is in the result. A chunk that is written to during the copy is as it was
    /// at the flush if it had never been written before; otherwise it is old, new or mixed. For one point in time,
    /// pause the VM until this returns, and have its file systems synced or frozen first.
    ///
    /// With a `PO` store that is full this fails, as what the host has cached cannot be written out: take the snapshot
    /// down and export the COW file.
    ///
    /// A process that is killed during the flush leaves the snapshot suspended and its guest waiting: it is
    /// [`State::Suspended`](crate::find::State::Suspended) in [`list`](crate::list). [`repair`](crate::repair()) lets
    /// it go on.
    ///
    /// # Errors
    ///
    /// Those of [`export`](Self::export) and [`status`](crate::status); [`Refusal::NotExportable`] with the reason,
    /// such as a transient store, or that somebody else has suspended it; [`Refusal::AtWork`] while another process is
    /// at work on it; [`Refusal::FileElsewhere`]; [`Error::Debris`] if the snapshot could not be resumed.
    pub fn export_live(
        &self,
        snapshot: impl Into<DeviceId>,
        output: impl AsRef<Path>,
    ) -> Result<Exported> {
        let go_on = &mut |_| ControlFlow::Continue(());
        let whole = self.export_live_with(snapshot, output, go_on)?;
        Ok(whole.unwrap_or_default())
    }

    /// Does what [`export_live`](Self::export_live) does, and calls `progress` as [`export_with`](Self::export_with)
    /// does.
    ///
    /// # Errors
    ///
    /// Those of [`export_live`](Self::export_live).
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

/// Adds the name of the snapshot that uses the COW file to the error, if it is one of dmsnap's.
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

/// The two files that an export reads.
struct Source<'a, H: Host> {
    host: &'a H,
    origin: Backing<'a, H::File>,
    /// From the bottom up; one, unless it is a stack's.
    cows: Vec<Backing<'a, H::File>>,
    /// The COW chunk from which on the store is not looked at.
    end: Option<u64>,
    /// Whether the kernel has told which origin and COW file belong together.
    live: bool,
}

impl<H: Host> Source<'_, H> {
    /// Writes the output, and gives it its name if `still` succeeds at the end.
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
        let evidence = Evidence {
            given: options.digest,
            take: &|| content(self.host, &self.origin),
            marks: false,
        };
        if lowest {
            let (header, any) = (store.header(), options.any_origin);
            check_header(&self.origin, cow, header, evidence, any)?;
            // The kernel writes over the mark as it marks a store invalid: then the caller's word has to do.
            let unmarked = header.origin.is_none() && store.is_valid();
            if unmarked && !any && !self.live {
                check_unmarked(self.host, &self.origin, cow)?;
            }
        }
        store = store.over(Sectors::from_bytes_floor(length));
        if let Some(end) = self.end {
            store = store.ending_at(end);
        }
        store
            .changed_extents()
            .map_err(|error| unsound(path, error))
    }

    /// Fails if the image was changed meanwhile, by a program that takes no locks.
    fn check_unchanged(&self, options: &ExportOptions) -> Result<()> {
        let before = self.origin.identity();
        let facts = ask(Step::InspectFile, self.origin.path, || {
            self.host.inspect_file(&self.origin.file)
        })?;
        let path = self.origin.path;
        check_identity(path, facts.identity(), Some(before), options.any_origin)
    }
}
