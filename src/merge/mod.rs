//! Merges a COW file's changes into its origin image, by the kernel's snapshot-merge target.
//!
//! The kernel merges by itself once the device is resumed: it copies some chunks to the image, flushes the image, and
//! only then takes their exceptions out of the store. So image and COW file make the same disk at any moment, also if
//! the merge is cut off. A mark in the COW file keeps the two known as a pair meanwhile.

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use crate::backing::{
    Backing, CowOptions, Reader, attach, open_locked_origin, open_merged_cow, unsound,
};
pub use crate::base::Progress;
use crate::base::{
    ChunkSize, DeviceName, Digest, Handles, Kind, MERGING, OriginIdentity, SectorSize, Sectors,
    Store,
};
use crate::call::{absent, ask, timings};
use crate::dm::{Discard, SnapshotParams, SnapshotStatus, Target, TargetLine};
use crate::error::{Error, Refusal, Result, Retry, Step, policy};
use crate::kernel::LO_AUTOCLEAR;
use crate::kernel::{FileKind, Host, LOOP_CONTROL, MACHINE, MAPPER_CONTROL};
use crate::snapshot::{MappedDevice, make_device, undone};
use crate::store::{ExceptionStore, MARK_AT};
use crate::{store, teardown};

/// Options for merging a COW file's changes into the image that it was made over, and the call that does it.
///
/// ```no_run
/// use std::ops::ControlFlow;
///
/// let outcome = dmsnap::merge::MergeOptions::new().merge("/images/base.ext4", "/run/vm-42.cow", |progress| {
///     println!("{} of {} bytes", progress.done_bytes, progress.total_bytes);
///     ControlFlow::Continue(())
/// })?;
/// println!("{outcome:?}");
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct MergeOptions {
    digest: Option<Digest>,
    any_origin: bool,
    name: Option<String>,
    deadline: Option<Duration>,
}

/// How a merge ended. The numbers count the changed chunks only, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "outcome", rename_all = "kebab-case")
)]
#[must_use = "a merge that was stopped is still to be finished"]
#[non_exhaustive]
pub enum MergeOutcome {
    /// All changes are in the image. The store is empty and belongs to the image as it is now: use the COW file for a
    /// new snapshot over the image, or delete it.
    Complete {
        /// How many bytes this call merged.
        merged_bytes: u64,
    },
    /// The callback stopped the merge. The COW file has the rest: a later merge goes on, and a snapshot over the two
    /// files shows the same disk as before.
    Stopped {
        /// How many bytes this call merged.
        merged_bytes: u64,
        /// How many bytes are still in the COW file.
        left_bytes: u64,
    },
}

impl MergeOptions {
    /// Makes the default options: only the image that the COW file was made over is taken, and the dm device is named
    /// after the COW file's device and inode.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says what the image holds before the merge, as [`SnapshotOptions::digest`](crate::SnapshotOptions::digest) does. A
    /// merge that was cut off goes on without: the image holds something else by then.
    pub fn digest(&mut self, digest: impl Into<Digest>) -> &mut Self {
        self.digest = Some(digest.into());
        self
    }

    /// Takes the image as it is, whatever the COW file was made over, as
    /// [`SnapshotOptions::any_origin`](crate::SnapshotOptions::any_origin) does. If the image has been changed, the
    /// result is garbage.
    pub fn any_origin(&mut self, any_origin: bool) -> &mut Self {
        self.any_origin = any_origin;
        self
    }

    /// Names the dm device that exists while the kernel merges. The default is `dmsnap-merge-<major>:<minor>-<inode>`,
    /// of the COW file.
    pub fn name(&mut self, name: impl Into<String>) -> &mut Self {
        self.name = Some(name.into());
        self
    }

    /// Sets for how long others are waited for: who has a lock on a file (a second unless set), and who has opened the
    /// device that the kernel merged by, as a probe may (15 seconds). The merge itself takes as long as it takes, or as
    /// `progress` lets it.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    fn retry(&self) -> Retry {
        self.deadline.map_or_else(Retry::default, Retry::until)
    }

    /// Merges the changes in the COW file `cow` into the image `origin`; returns when all are there or `progress`
    /// breaks off.
    ///
    /// Nobody may use either file meanwhile: both are locked exclusively. While any of dmsnap's snapshots over the
    /// image is live, on this COW file or another, the merge is refused: clean them up first.
    ///
    /// The image changes, so every other COW file made over it is refused from then on, whether the merge ends or not
    /// (an image that is a block device has no modification time to know that by).
    ///
    /// `progress` is called at the beginning and then at least every 50 ms. When it returns `Break`, the device is
    /// removed as soon as the kernel has finished the chunks that it is at (at most one metadata area).
    ///
    /// If the process is killed, the kernel goes on by itself: the device stays, [`list`](crate::list) shows it as
    /// [`merging`](crate::find::SnapshotInfo::merging), and [`ReapOptions::reap`](crate::ReapOptions::reap) removes it
    /// at any moment without loss. Afterwards, as after a power cut, a merge of the same two files goes on, and a
    /// snapshot over them shows the disk as it was. The pair is recognised by the image's inode and size, and by its
    /// modification time, which must be no earlier than the merge's beginning and at most a minute later than the COW
    /// file's.
    ///
    /// Handles from before the merge have the image's old size and time:
    /// [`SnapshotOptions::expect_origin`](crate::SnapshotOptions::expect_origin) with those refuses the merged image.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] before anything is touched: [`Refusal::OriginInUse`] for an image with live snapshots,
    /// [`Refusal::CowInUse`], [`Refusal::OriginChanged`], [`Refusal::OriginReadOnly`], [`Refusal::OriginUnknown`] for a
    /// store that dmsnap has not marked (it may have been made over a part of the image), and for
    /// a COW file that has no valid store [`Refusal::CowBlank`], [`Refusal::CowForeign`], [`Refusal::CowInvalid`],
    /// [`Refusal::CowDamaged`] or [`Refusal::CowUnsound`].
    /// [`Error::Failed`] names the first step that failed; no device is left, and what was merged stays merged. With
    /// [`Step::Merge`] the kernel could not write the image or the COW file, perhaps for lack of space.
    /// [`Error::Debris`] lists what is left, if undoing failed too.
    pub fn merge(
        &self,
        origin: impl AsRef<Path>,
        cow: impl AsRef<Path>,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<MergeOutcome> {
        merge(&MACHINE, self, origin.as_ref(), cow.as_ref(), &mut progress)
    }
}

type Tell<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

pub(crate) fn merge<H: Host>(
    host: &H,
    options: &MergeOptions,
    origin: &Path,
    cow: &Path,
    progress: &mut Tell<'_>,
) -> Result<MergeOutcome> {
    let name = options.name.as_deref().map(DeviceName::given).transpose()?;
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })?;
    let admitted = CowOptions {
        digest: options.digest,
        any_origin: options.any_origin,
        deadline: options.deadline,
        ..CowOptions::default()
    };
    let origin = open_locked_origin(host, origin, true, &admitted)?;
    let (kind, mode) = (origin.facts.kind, origin.facts.mode);
    if kind == FileKind::Regular && mode & 0o222 == 0 {
        let path = origin.path.to_owned();
        return Err(Refusal::OriginReadOnly { path, mode }.into());
    }
    let (cow, header) = open_merged_cow(host, cow, &origin, &admitted)?;
    let name = name.map_or_else(|| name_after(&cow), Ok)?;
    let pair = Pair {
        host,
        origin,
        cow,
        chunk: header.chunk,
    };
    let (total, end) = pair.left()?;
    if header.origin.is_none() && !options.any_origin && end > 0 {
        return Err(Refusal::OriginUnknown {
            origin: pair.origin.path.to_owned(),
            bytes: pair.origin.facts.size_bytes,
            cow: pair.cow.path.to_owned(),
            end_bytes: end,
        }
        .into());
    }

    let mut handles = Handles::default();
    let mut stage = Stage::Untouched;
    let ran = pair.run(&name, total, &mut handles, &mut stage, progress);
    let ran = match ran {
        Ok(()) => teardown::clean(host, &handles, &options.retry()),
        Err(error) => Err(undone(host, error, &handles)),
    };
    let ran = match ran {
        // The kernel may be at it still, and the mark says so.
        Err(debris @ Error::Debris { .. }) => return Err(debris),
        ran => ran,
    };
    let left = match stage {
        Stage::Untouched => Ok(total),
        Stage::Announced => pair.take_back(),
        Stage::Begun => pair.settle(),
    };
    ran?;
    let left = left?;
    let merged_bytes = bytes(total.count().saturating_sub(left.count()));
    Ok(match bytes(left.count()) {
        0 => MergeOutcome::Complete { merged_bytes },
        left_bytes => MergeOutcome::Stopped {
            merged_bytes,
            left_bytes,
        },
    })
}

/// How far a merge has changed the two files, which outlast its devices.
enum Stage {
    /// Nothing has been changed.
    Untouched,
    /// The mark says that a merge has begun, and the image has another modification time.
    Announced,
    /// The kernel was told to merge.
    Begun,
}

fn name_after<F>(cow: &Backing<'_, F>) -> Result<DeviceName> {
    let id = cow.facts.id;
    Ok(DeviceName::new(format!(
        "{MERGING}{}-{}",
        id.dev, id.inode
    ))?)
}

/// The two files of a merge, which are open and locked as long as it takes.
struct Pair<'a, H: Host> {
    host: &'a H,
    origin: Backing<'a, H::File>,
    cow: Backing<'a, H::File>,
    chunk: ChunkSize,
}

impl<H: Host> Pair<'_, H> {
    /// Reads how much the store holds, and at which byte of the image the last of it ends. With a store that has
    /// faults, or reaches behind the image, the kernel would fail half-way or write behind the image's last chunk
    /// (`snapshot_merge_next_chunks` lets the length of the rest wrap).
    fn left(&self) -> Result<(Sectors, u64)> {
        let unsound = |error| unsound(self.cow.path, error);
        let origin = Sectors::from_bytes_floor(self.origin.facts.size_bytes);
        let store = ExceptionStore::open(Reader::of(self.host, &self.cow));
        let mut store = store.map_err(unsound)?.over(origin);
        let extents = store.changed_extents().map_err(unsound)?;
        let end = extents.last().map_or(0, |last| last.origin_end());
        let exceptions = store.summary().map_err(unsound)?.exceptions;
        let chunk = self.chunk.sectors().count();
        Ok((Sectors::new(exceptions.saturating_mul(chunk)), end))
    }

    /// Merges the inspected files. The loop devices are open until this returns, so that `reap` sees a merge in
    /// progress until then, and leaves it alone.
    fn run(
        &self,
        name: &DeviceName,
        total: Sectors,
        handles: &mut Handles,
        stage: &mut Stage,
        progress: &mut Tell<'_>,
    ) -> Result<()> {
        let host = self.host;
        let origin_loop = attach(
            host,
            &self.origin,
            LO_AUTOCLEAR,
            SectorSize::Bytes512,
            self.origin.path,
            &mut handles.origin_loop,
        )?;
        let cow_loop = attach(
            host,
            &self.cow,
            LO_AUTOCLEAR,
            SectorSize::Bytes512,
            self.cow.path,
            &mut handles.cow_loop,
        )?;
        let bytes = ask(Step::SizeLoop, &origin_loop.path, || {
            host.loop_size_bytes(&origin_loop.device)
        })?;
        let line = TargetLine {
            start: Sectors::default(),
            length: Sectors::from_bytes_floor(bytes),
            target: Target::SnapshotMerge(SnapshotParams {
                origin: origin_loop.dev,
                cow: cow_loop.dev,
                // What a full store does is of no account: a merge takes no room.
                store: Store::Persistent,
                chunk: self.chunk,
                discard: Discard::Unsupported,
            }),
        };
        let origin = self.origin.identity();
        let made = make_device(host, name, origin, Kind::Own, &cow_loop, &line, handles)?;
        *stage = Stage::Announced;
        self.announce()?;
        ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
        *stage = Stage::Begun;
        self.watch(&made, total, progress)
    }

    /// Marks the COW file: a merge begins. Then it changes the image's modification time, and marks the COW file with
    /// that. Each is on stable storage before the next, so that after a power cut no other COW file takes the changed
    /// image for its own, and this one still knows it. From the second mark on, a copy of the image with an earlier
    /// time is refused, as it lacks what the store no longer holds.
    fn announce(&self) -> Result<()> {
        let inode = Some(self.origin.facts.id.inode);
        self.mark(self.origin.identity(), inode)?;
        if self.origin.facts.kind == FileKind::Regular {
            self.date_origin(None)?;
        }
        self.sync(&self.origin)?;
        self.mark(self.identity_now()?, inode)
    }

    /// Undoes what [`Self::announce`] did, as far as it got.
    fn take_back(&self) -> Result<Sectors> {
        if self.origin.facts.kind == FileKind::Regular {
            self.date_origin(Some(self.origin.facts.mtime_ns))?;
        }
        self.settle()
    }

    /// Marks the store as made over the image as it is now, when the devices are gone. Returns how much the store still
    /// holds.
    fn settle(&self) -> Result<Sectors> {
        self.sync(&self.origin)?;
        let (left, _) = self.left()?;
        self.mark(self.identity_now()?, None)?;
        Ok(left)
    }

    fn mark(&self, origin: OriginIdentity, merging_into: Option<u64>) -> Result<()> {
        let mark = store::mark(origin, merging_into);
        ask(Step::MarkFile, self.cow.path, || {
            self.host.write_at(&self.cow.file, &mark, MARK_AT)
        })?;
        self.sync(&self.cow)
    }

    fn sync(&self, backing: &Backing<'_, H::File>) -> Result<()> {
        ask(Step::SyncFile, backing.path, || {
            self.host.sync_file(&backing.file)
        })
    }

    fn date_origin(&self, mtime_ns: Option<i64>) -> Result<()> {
        ask(Step::DateFile, self.origin.path, || {
            self.host.date_file(&self.origin.file, mtime_ns)
        })
    }

    fn identity_now(&self) -> Result<OriginIdentity> {
        let facts = ask(Step::InspectFile, self.origin.path, || {
            self.host.inspect_file(&self.origin.file)
        })?;
        Ok(facts.identity())
    }

    /// Polls the status until nothing is left or `progress` breaks off: the kernel raises no event at the end of a
    /// merge.
    fn watch(&self, made: &MappedDevice, total: Sectors, progress: &mut Tell<'_>) -> Result<()> {
        let mut pause = FIRST_PAUSE;
        loop {
            let asked = ask(Step::Status, &made.mapper, || self.host.status(&made.uuid));
            // Removed by somebody: what it did is in the files.
            let Some(line) = absent(asked)? else {
                return Ok(());
            };
            let line = line.map(|(_, text)| text).unwrap_or_default();
            let Ok(status) = line.parse();
            let SnapshotStatus::Usage(usage) = status else {
                let failed = Error::failed(Step::Merge, &made.mapper, policy::MERGE_FAILED);
                return Err(failed.noted(format!("{line:?}, the kernel log has the reason")));
            };
            // Data chunks alone: the metadata is that of the area in hand and those before it.
            let left = usage
                .allocated
                .count()
                .saturating_sub(usage.metadata.count());
            let seen = Progress {
                done_bytes: bytes(total.count().saturating_sub(left)),
                total_bytes: bytes(total.count()),
            };
            if progress(seen).is_break() || left == 0 {
                return Ok(());
            }
            timings::pause(|| self.host.sleep(pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

fn bytes(sectors: u64) -> u64 {
    Sectors::new(sectors).to_bytes().unwrap_or(u64::MAX)
}

/// The first pause between two looks at the status; a small merge is over by then.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The longest pause between two looks. Each takes the kernel's lock of the snapshot for a moment; twenty in a second
/// do not slow the merge down.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
