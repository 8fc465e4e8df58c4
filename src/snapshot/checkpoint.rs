//! The story of a checkpoint: a live snapshot's table is handed over to a layer, and the snapshot goes on over that.
//!
//! V is the live snapshot, B the layer, C0 the COW file that V has, C1 the one that it goes on with. Everything that can
//! fail or take long comes before the pause, and the pause is three calls: suspend V, resume B, resume V.

use std::path::Path;
use std::time::Duration;

use super::build::{MappedDevice, load};
use super::create::{link, open_controls};
use super::layer::{Layer, attach_layer, base, facts, hold};
use super::{Base, Origin, Snapshot, fingerprint};
use crate::backing::{
    Attached, Backing, Cow, CowOptions, CowSize, DEEPEST, Evidence, attach, open_cow, probe_store,
    unmake, valid,
};
use crate::base::{
    DeviceId, DeviceName, DeviceUuid, Handles, Kind, OriginIdentity, SectorSize, Sectors,
};
use crate::call::{absent, ask, ask_unobserved, end_flushes, ends_flushes, patiently, resume};
use crate::dm::{Address, SnapshotParams, SnapshotStatus, Target, TargetLine};
use crate::error::{Error, FreezeObstacle, Leftover, Refusal, Result, Retry, Step, Verdict};
use crate::find::{Live, locked, reach, whole};
use crate::kernel::{Host, LO_AUTOCLEAR, LO_DIRECT_IO, MACHINE};
use crate::store::{self, CHAIN_AT, Chain, Content, Header, MARK_AT};
use crate::teardown::rebuilt;

/// Options for a checkpoint, which freezes what a live snapshot has as a [`Layer`] while its VM runs, and for going back
/// to it; and the calls that do both.
///
/// ```no_run
/// use dmsnap::snapshot::CheckpointOptions;
/// use dmsnap::{CowSize, SnapshotOptions};
///
/// let layer = CheckpointOptions::new()
///     .make_cow(CowSize::WorstCase)
///     .checkpoint("vm-42", "vm-42-noon", "/run/vm-42.cow2")?;
/// let fork = SnapshotOptions::new()
///     .make_cow(CowSize::WorstCase)
///     .create_on(layer.origin(), "/run/vm-43.cow", "vm-43")?;
/// # fork.cleanup()?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct CheckpointOptions {
    pub(super) cow: CowOptions,
    pub(super) keep: bool,
    pub(super) retry: Retry,
}

/// Nobody knows the layer yet, so only a probe can hold it, and not for long.
const UNDO_RETRY: Retry = Retry::until(Duration::from_secs(2));

impl CheckpointOptions {
    /// Makes the default options: over a blank COW file that is there, a layer that goes with its last user, and up to
    /// 15 seconds for whoever else is at work on the snapshot.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the new COW file too, as [`SnapshotOptions::make_cow`](crate::SnapshotOptions::make_cow) does.
    pub fn make_cow(&mut self, size: CowSize) -> &mut Self {
        self.cow.make = Some(size);
        self
    }

    /// Says how much the snapshot is expected to change from now on, where the new COW file is made, as
    /// [`SnapshotOptions::expected_changes`](crate::SnapshotOptions::expected_changes) does.
    pub fn expected_changes(&mut self, expected: CowSize) -> &mut Self {
        self.cow.expected = Some(expected);
        self
    }

    /// Sets whether the made COW file's space is allocated at once (`fallocate`), as
    /// [`SnapshotOptions::reserve`](crate::SnapshotOptions::reserve) does.
    pub fn reserve(&mut self, reserve: bool) -> &mut Self {
        self.cow.reserve = reserve;
        self
    }

    /// Sets whether the layer stays when nobody stands on it any more, until it is removed. It goes with its last user
    /// unless set.
    pub fn keep(&mut self, keep: bool) -> &mut Self {
        self.keep = keep;
        self
    }

    /// Sets for how long others are waited for: who is at work on the snapshot (15 seconds unless set), and who has a
    /// lock on a file (a second). What is held back is resumed whatever the deadline.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.retry = Retry::until(deadline);
        self.cow.deadline = Some(deadline);
        self
    }

    /// Freezes what the snapshot has now as the layer `layer`, and has the snapshot go on over that, with its writes in
    /// `cow`. Whoever has it open notices a pause: its node, open descriptors and mounts stay.
    ///
    /// The new COW file gets the store, the chunk size and the way with discards of the old one, which is not written
    /// again but for its mark. What the host has cached of the device is written out first. A file system of the
    /// snapshot that is mounted on this host is frozen for the pause. The snapshot's handles stay good; `list` and
    /// [`adopt`](crate::adopt()) have it with its new COW file.
    ///
    /// A process that is killed in the pause leaves the snapshot with its I/O held back, until a
    /// [`repair`](crate::repair()). If that says `Undone` there is no layer, and the COW file that was made is to be
    /// deleted before the next try; if it says `Finished` the layer is there, and [`Layer::open`] has it.
    ///
    /// # Errors
    ///
    /// Those of [`status`](crate::status). [`Error::Refused`] with nothing done: [`Refusal::NotFreezable`] with the
    /// reason, also for one that was claimed from a pool, [`Refusal::NotLive`], [`Refusal::Overflowed`],
    /// [`Refusal::Invalid`], [`Refusal::AtWork`], [`Refusal::FileElsewhere`] for a COW file that has no path any more,
    /// and what [`create`](crate::SnapshotOptions::create) refuses of a COW file. [`Error::Failed`] names the first
    /// step that failed; the snapshot goes on as it was. [`Error::Debris`] says what is left, when undoing failed too:
    /// the snapshot, if it is held back, or the layer, if the snapshot goes on over it and it could not be made known.
    /// A [`repair`](crate::repair()) finishes either.
    pub fn checkpoint(
        &self,
        snapshot: impl Into<DeviceId>,
        layer: &str,
        cow: impl AsRef<Path>,
    ) -> Result<Layer> {
        let name = DeviceName::given(layer)?;
        checkpoint(&MACHINE, self, &snapshot.into(), &name, cow.as_ref()).map(Layer::over)
    }
}

impl CheckpointOptions {
    /// Puts a layer that is gone together again, from what it stood on and its COW file: after a reboot, or when its
    /// last user was taken down. `origin` is the image, or the layer below ([`Layer::origin`]). Snapshots over it are
    /// then made over [`Layer::origin`] with the COW files that they had.
    ///
    /// # Errors
    ///
    /// [`LayerRefusal`](crate::error::LayerRefusal)'s `NotFrozen` for a file that no checkpoint made a layer of, `Foreign` and
    /// [`Refusal::OriginChanged`] over anything but what it stood on, [`Refusal::CowInUse`] where the layer is there.
    /// [`Error::Failed`] names the first step that failed; nothing is left behind.
    pub fn attach_layer(
        &self,
        origin: &Origin,
        cow: impl AsRef<Path>,
        layer: &str,
    ) -> Result<Layer> {
        let name = DeviceName::given(layer)?;
        attach_layer(&MACHINE, &origin.0, cow.as_ref(), &name, self).map(Layer::over)
    }
}

impl Snapshot {
    /// Freezes what it has, over a blank COW file, as [`CheckpointOptions::checkpoint`] does.
    ///
    /// # Errors
    ///
    /// As [`CheckpointOptions::checkpoint`].
    pub fn checkpoint(&self, layer: &str, cow: impl AsRef<Path>) -> Result<Layer> {
        CheckpointOptions::new().checkpoint(self, layer, cow)
    }
}

pub(crate) fn checkpoint<H: Host>(
    host: &H,
    options: &CheckpointOptions,
    id: &DeviceId,
    name: &DeviceName,
    cow: &Path,
) -> Result<(Base<H::Loop>, Handles)> {
    open_controls(host)?;
    let live = locked(host, id, &options.retry)?;
    admit(&live)?;
    whole(&live.cow)?;
    let v_name = DeviceName::new(live.device.name.as_str())?;
    let v = MappedDevice {
        mapper: v_name.mapper_path(),
        name: v_name,
        uuid: live.uuid.clone(),
        dev: live.device.number,
    };
    let refused = |why| Refusal::NotFreezable {
        name: v.name.to_string(),
        why,
    };
    // Open, it keeps everybody from removing the device.
    let node = host.find_node(v.dev).unwrap_or_else(|| v.mapper.clone());
    let held = ask(Step::OpenFile, &node, || host.open_backing(&node, false))?;

    let (file, c0_facts) = reach(host, &live.cow, v.name.as_str(), true)?;
    let c0 = Backing {
        path: &live.cow.path,
        file,
        facts: c0_facts,
        above: None,
    };
    let header = probe_store(host, &c0)?.ok_or_else(|| refused(FreezeObstacle::NoHeader))?;
    let header = valid(&c0, header)?;
    let below = header.chain.unwrap_or_default();
    if below.depth + 1 > DEEPEST {
        return Err(refused(FreezeObstacle::TooDeep).into());
    }

    // Over an image, the first time: by it a copy with another modification time is known.
    let content = match (header.content, header.origin) {
        (None, Some(image)) if below.parent == 0 => fingerprint::of_image(host, &live, image),
        (content, _) => content,
    };
    let id = ask(Step::Random, &v.mapper, || host.random())?;
    let origin = Backing {
        path: &v.mapper,
        file: (),
        facts: facts(&v.uuid, v.dev)
            .filter(|facts| facts.size_bytes > 0)
            .ok_or_else(|| refused(FreezeObstacle::ImageUnknown))?,
        above: Some(Chain {
            parent: id,
            depth: below.depth + 1,
            ..Chain::default()
        }),
    };
    let mut cow_options = options.cow.clone();
    (cow_options.store, cow_options.chunk) = (live.params.store, live.params.chunk);
    let c1 = open_cow(host, cow, &origin, Evidence::NONE, &cow_options)?;
    let unmade = |error| match cow_options.make {
        Some(_) => unmake(host, error, cow, c1.backing.facts.id),
        None => error,
    };
    // Each would wait for the other.
    if c1.backing.facts.id.dev == v.dev {
        return Err(unmade(refused(FreezeObstacle::OwnFileSystem).into()));
    }
    let c1_loop = attach_next(host, &live, &c1.backing).map_err(unmade)?;

    let parts = Parts {
        host,
        v: &v,
        identity: origin.identity(),
        params: &live.params,
        length: Sectors::from_bytes_floor(origin.facts.size_bytes),
        c0: &c0,
        header: &header,
        content,
        held: (&node, &held),
        c1: (&c1, &c1_loop),
        named: Chain { id, ..below },
        keep: options.keep,
        ends_flushes: ends_flushes(host, v.dev, live.params.cow),
    };
    let mut done = Done::default();
    match parts.freeze(name, &mut done) {
        Ok(b) => parts.finish(&b).map_err(|error| {
            // The snapshot stands on it already.
            let left = vec![Leftover::new(&b.mapper, error.clone())];
            error.leaving(left)
        }),
        Err(error) if done.handed_over => {
            let left = vec![Leftover::new(&v.mapper, error.clone())];
            Err(error.leaving(left))
        }
        Err(error) => {
            let error = parts.undo(error, &done);
            drop(c1_loop);
            Err(unmade(error))
        }
    }
}

/// Attaches the COW file that a snapshot is to go on with, in the manner of the one that it has.
pub(super) fn attach_next<H: Host>(
    host: &H,
    live: &Live<H::Loop>,
    next: &Backing<'_, H::File>,
) -> Result<Attached<H::Loop>> {
    let sectors = || host.loop_sector_bytes(&live.cow.device);
    let sectors = SectorSize::of(ask(Step::InspectLoop, &live.cow.node, sectors)?);
    let direct_io = if live.cow.status.direct_io {
        LO_DIRECT_IO
    } else {
        0
    };
    let flags = LO_AUTOCLEAR | direct_io;
    attach(host, next, flags, sectors, next.path, &mut None)
}

/// What no checkpoint is made of.
fn admit<L>(live: &Live<L>) -> Result<()> {
    let name = || live.device.name.clone();
    let why = match &live.status {
        SnapshotStatus::Invalid => return Err(Refusal::Invalid { name: name() }.into()),
        SnapshotStatus::Overflow => return Err(Refusal::Overflowed { name: name() }.into()),
        _ if !live.params.store.is_persistent() => FreezeObstacle::Transient,
        _ if live.device.inactive_table => FreezeObstacle::InactiveTable,
        _ if live.device.suspended => FreezeObstacle::Suspended,
        _ if live.uuid.kind() == Kind::Layer => FreezeObstacle::Layer,
        // What the pool would take back is not what it gave.
        _ if live.uuid.kind() == Kind::Pooled => FreezeObstacle::Pooled,
        _ => return Ok(()),
    };
    Err(Refusal::NotFreezable { name: name(), why }.into())
}

/// What a checkpoint is made of.
struct Parts<'a, H: Host> {
    host: &'a H,
    v: &'a MappedDevice,
    identity: OriginIdentity,
    params: &'a SnapshotParams,
    length: Sectors,
    c0: &'a Backing<'a, H::File>,
    /// C0's, as it was.
    header: &'a Header,
    /// What is known of the image's content.
    content: Option<Content>,
    held: (&'a Path, &'a H::File),
    c1: (&'a Cow<'a, H::File>, &'a Attached<H::Loop>),
    /// C0's place under the layer's id. It is frozen only when the layer has it.
    named: Chain,
    keep: bool,
    /// The guest's flushes end at V, also over its new table.
    ends_flushes: bool,
}

/// How far it got, and what there is to undo.
#[derive(Default)]
struct Done {
    b: Option<MappedDevice>,
    loaded: bool,
    marked: bool,
    suspended: bool,
    /// The exceptions are the layer's: there is no way back.
    handed_over: bool,
}

impl<H: Host> Parts<'_, H> {
    fn freeze(&self, name: &DeviceName, done: &mut Done) -> Result<MappedDevice> {
        let Self { host, v, .. } = self;
        let (next, cow_loop) = self.c1;
        let cow = &next.backing;
        let mapper = name.mapper_path();
        let uuid = DeviceUuid::of_layer(self.named.id, self.identity, cow_loop.number, self.keep);
        let dev = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
        let b = MappedDevice {
            name: name.clone(),
            uuid,
            mapper,
            dev,
        };
        done.b = Some(b.clone());
        let line = |params| TargetLine {
            start: Sectors::default(),
            length: self.length,
            target: Target::Snapshot(params),
        };
        load(*host, &b, &line(self.params.clone()))?;
        // B's node comes with its resume: until then the kernel knows it by number alone.
        let over = SnapshotParams {
            origin: b.dev,
            cow: cow_loop.dev,
            ..self.params.clone()
        };
        load(*host, v, &line(over))?;
        done.loaded = true;
        next.lengthen(*host, cow_loop)?;
        // A power cut must not leave a layer whose upper store is not known to be over it.
        done.marked = true;
        let image = self.header.origin;
        let content = image
            .zip(self.content)
            .map(|(image, content)| store::content(image, content));
        let (marks, length) = store::marks([0; 64], Some(store::chain(self.named)), content);
        self.write(self.c0, &marks[CHAIN_AT - MARK_AT..length], CHAIN_AT)?;
        let above = Chain {
            parent: self.named.id,
            depth: self.named.depth + 1,
            ..Chain::default()
        };
        let content = self
            .content
            .map(|content| store::content(self.identity, content));
        let first = store::mark(self.identity, None);
        let (marks, length) = store::marks(first, Some(store::chain(above)), content);
        self.write(cow, &marks[..length], MARK_AT)?;
        // What a VMM without O_DIRECT has in the page cache is not to be written in the pause.
        let (node, held) = self.held;
        ask(Step::SyncFile, node, || host.sync_file(held))?;

        // From here to the last resume the guest waits: nothing else may come in between.
        let paused = ask_unobserved(Step::Suspend, &v.mapper, || host.suspend(&v.uuid))?;
        done.suspended = true;
        if paused.inactive_table {
            ask_unobserved(Step::Resume, &b.mapper, || host.resume(&b.uuid))?;
            done.handed_over = true;
            resume(*host, &v.uuid, &v.mapper)?;
            // Whoever resumed V before B had the exceptions has lost them for B.
            let handed = ask(Step::Status, &b.mapper, || host.status(&b.uuid))?;
            if handed.is_some_and(|(_, text)| text.parse() == Ok(SnapshotStatus::Invalid)) {
                rebuilt(*host, &v.uuid)?;
            }
        } else {
            // Somebody cleared it, or swapped it in by a resume: then V reads a layer that never gets the exceptions.
            if !rebuilt(*host, &v.uuid)? {
                let name = v.name.to_string();
                let why = FreezeObstacle::TableTaken;
                return Err(Refusal::NotFreezable { name, why }.into());
            }
            done.handed_over = true;
        }
        if self.ends_flushes {
            // Where it fails, flushes reach the COW file: it takes longer, and nothing is lost.
            let _ = end_flushes(*host, v.dev, &v.mapper);
        }
        Ok(b)
    }

    /// Writes a mark through to the disk.
    fn write(&self, cow: &Backing<'_, H::File>, mark: &[u8], at: usize) -> Result<()> {
        ask(Step::MarkFile, cow.path, || {
            self.host.write_at(&cow.file, mark, at)
        })?;
        ask(Step::SyncFile, cow.path, || self.host.sync_file(&cow.file))
    }

    /// Takes back what was done, so that V works again as soon as can be. A cleared V does not resume while B's table
    /// waits for its exceptions.
    fn undo(&self, error: Error, done: &Done) -> Error {
        let Self { host, v, .. } = self;
        let mut left = Vec::new();
        let mut undone = |object: &Path, result: Result<()>| {
            if let Err(error) = result {
                left.push(Leftover::new(object, error));
            }
        };
        if done.loaded {
            let cleared = ask(Step::Clear, &v.mapper, || host.clear(&v.uuid));
            undone(&v.mapper, absent(cleared).map(drop));
        }
        if let Some(b) = &done.b {
            let address = Address::Uuid(b.uuid.as_str());
            let removed = patiently(*host, &UNDO_RETRY, Verdict::Busy, || {
                absent(ask(Step::Remove, &b.mapper, || host.remove(address, false)))
            });
            undone(&b.mapper, removed.map(drop));
        }
        if done.suspended {
            undone(&v.mapper, resume(*host, &v.uuid, &v.mapper));
        }
        if done.marked {
            let before = self
                .header
                .chain
                .map(store::chain)
                .unwrap_or([0; store::CHAIN_BYTES]);
            undone(self.c0.path, self.write(self.c0, &before, CHAIN_AT));
        }
        error.leaving(left)
    }

    /// Makes the layer known. One that goes with its last user gets no alias where it has a node: the kernel, which
    /// takes it away, knows of none.
    fn finish(&self, b: &MappedDevice) -> Result<(Base<H::Loop>, Handles)> {
        let Self { host, keep, .. } = *self;
        let node = host.find_node(b.dev);
        let mark = store::chain(Chain {
            frozen: true,
            ..self.named
        });
        self.write(self.c0, &mark, CHAIN_AT)?;
        let device = match node {
            Some(node) if !keep => node,
            _ => link(host, b)?,
        };
        let open = hold(host, &device)?;
        if !keep {
            // Somebody stands on it, so this is for later.
            let address = Address::Uuid(b.uuid.as_str());
            ask(Step::Remove, &b.mapper, || host.remove(address, true))?;
        }
        let mut handles = b.handles();
        handles.origin = Some(self.identity);
        let base = base(host, device.clone(), &b.uuid, b.dev, self.named.depth, open)?;
        handles.device = Some(device);
        Ok((base, handles))
    }
}
