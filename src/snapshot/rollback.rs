//! The story of a rollback: a snapshot over a layer begins anew with what the layer has, over another COW file.

use std::path::Path;

use super::build::{MappedDevice, load};
use super::checkpoint::attach_next;
use super::create::open_controls;
use super::layer;
use super::{Base, CheckpointOptions};
use crate::backing::{Evidence, open_cow, unmake};
use crate::base::{DeviceId, DeviceName, Handles, Kind, Sectors};
use crate::call::{absent, ask, ask_unobserved, end_flushes, ends_flushes, resume};
use crate::dm::{SnapshotParams, Target, TargetLine};
use crate::error::{Error, LayerRefusal, Leftover, Refusal, Result, Step, Verdict};
use crate::find::{Live, locked, status_of};
use crate::kernel::{Host, MACHINE};
use crate::store::{self, MARK_AT};

impl CheckpointOptions {
    /// Takes the snapshot back to its last checkpoint: what was written to it since is in its old COW file, which it
    /// has no more, and its writes go to `cow`, which has to be blank. Its new handles are returned; those of before
    /// stay good.
    ///
    /// Nobody may have it open: what a VMM or a mounted file system has in memory would be of another time.
    ///
    /// # Errors
    ///
    /// Those of [`status`](crate::status). [`Error::Refused`] with nothing done: [`Refusal::InUse`] when somebody has
    /// it open, [`LayerRefusal::NotOnLayer`], [`Refusal::AtWork`], and what [`create`](crate::SnapshotOptions::create)
    /// refuses of a COW file. [`Error::Failed`] names the first step that failed; the snapshot is as it was.
    /// [`Error::Debris`] names the snapshot if it could not be resumed: a [`repair`](crate::repair()) does.
    pub fn rollback(
        &self,
        snapshot: impl Into<DeviceId>,
        cow: impl AsRef<Path>,
    ) -> Result<Handles> {
        rollback(&MACHINE, self, &snapshot.into(), cow.as_ref())
    }
}

pub(crate) fn rollback<H: Host>(
    host: &H,
    options: &CheckpointOptions,
    id: &DeviceId,
    cow: &Path,
) -> Result<Handles> {
    open_controls(host)?;
    let live = locked(host, id, &options.retry)?;
    let name = DeviceName::new(live.device.name.as_str())?;
    let in_use = |open_count| Refusal::InUse {
        name: live.device.name.clone(),
        open_count,
    };
    if live.device.open_count > 0 {
        return Err(in_use(live.device.open_count).into());
    }
    let base = below(host, &live)?;
    let v = MappedDevice {
        mapper: name.mapper_path(),
        name,
        uuid: live.uuid.clone(),
        dev: live.device.number,
    };
    let mut cow_options = options.cow.clone();
    (cow_options.store, cow_options.chunk) = (live.params.store, live.params.chunk);
    let image = base.image();
    let next = open_cow(host, cow, &image, Evidence::NONE, &cow_options)?;
    let unmade = |error| match cow_options.make {
        Some(_) => unmake(host, error, cow, next.backing.facts.id),
        None => error,
    };
    if next.mark.is_none_or(|mark| !mark.fresh) {
        let path = cow.to_owned();
        return Err(unmade(Refusal::CowNotBlank { path }.into()));
    }
    let flushes_end = ends_flushes(host, v.dev, live.params.cow);
    let mut done = Done::default();
    let mut swap = || -> Result<()> {
        // Open, and with it locked, to the end.
        let next_loop = attach_next(host, &live, &next.backing)?;
        let origin = base.over();
        let params = SnapshotParams {
            cow: next_loop.dev,
            ..live.params.clone()
        };
        let line = TargetLine {
            start: Sectors::default(),
            length: origin.length,
            target: Target::Snapshot(params),
        };
        load(host, &v, &line)?;
        done.loaded = true;
        next.lengthen(host, &next_loop)?;
        let first = store::mark(image.identity(), None);
        let (marks, length) = store::marks(first, origin.above.map(store::chain), None);
        ask(Step::MarkFile, cow, || {
            host.write_at(&next.backing.file, &marks[..length], MARK_AT)
        })?;
        ask(Step::SyncFile, cow, || host.sync_file(&next.backing.file))?;
        // Whoever opens it from here on reads nothing before the resume, and then what the layer has.
        let paused = ask_unobserved(Step::Suspend, &v.mapper, || host.suspend(&v.uuid))?;
        done.suspended = true;
        if paused.open_count > 0 {
            return Err(in_use(paused.open_count).into());
        }
        resume(host, &v.uuid, &v.mapper)
    };
    if let Err(error) = swap() {
        return Err(unmade(undo(host, &v, error, &done)));
    }
    if flushes_end {
        // Where it fails, flushes reach the COW file: it takes longer, and nothing is lost.
        let _ = end_flushes(host, v.dev, &v.mapper);
    }
    Ok(status_of(host, &DeviceId::from(&v.uuid))?.handles())
}

/// The layer that the snapshot stands on, open.
fn below<H: Host>(host: &H, live: &Live<H::Loop>) -> Result<Base<H::Loop>> {
    let not_on_layer = || LayerRefusal::NotOnLayer {
        name: live.device.name.clone(),
    };
    let whole = !live.device.suspended && !live.device.inactive_table;
    if !whole || matches!(live.uuid.kind(), Kind::Pooled | Kind::Layer) {
        return Err(not_on_layer().into());
    }
    match layer::open(host, &DeviceId::Number(live.params.origin)) {
        Ok((base, _)) => Ok(base),
        Err(Error::Refused(
            Refusal::Layer(LayerRefusal::NotALayer { .. })
            | Refusal::NotOurs { .. }
            | Refusal::NotADmDevice { .. },
        )) => Err(not_on_layer().into()),
        // The image's loop device.
        Err(error) if error.verdict() == Some(Verdict::Gone) => Err(not_on_layer().into()),
        Err(error) => Err(error),
    }
}

/// How far it got.
#[derive(Default)]
struct Done {
    loaded: bool,
    suspended: bool,
}

fn undo<H: Host>(host: &H, v: &MappedDevice, error: Error, done: &Done) -> Error {
    let mut left = Vec::new();
    let mut undone = |result: Result<()>| {
        if let Err(error) = result {
            left.push(Leftover::new(&v.mapper, error));
        }
    };
    if done.loaded {
        let cleared = ask(Step::Clear, &v.mapper, || host.clear(&v.uuid));
        undone(absent(cleared).map(drop));
    }
    if done.suspended {
        undone(resume(host, &v.uuid, &v.mapper));
    }
    error.leaving(left)
}
