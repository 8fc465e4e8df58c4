//! The story of a snapshot: the order of its steps, and their undoing.
//!
//! Undoing is short by construction. Loop devices are attached with autoclear in the same call that binds them,
//! so closing a descriptor detaches them, and so does a SIGKILL; only the dm device has to be removed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ask::{ask, patiently};
use crate::backing::{Backing, Cow, Warning, note_sizes, open_cow, open_origin};
use crate::error::{Error, Result, Step};
use crate::exception_store::{self, MARK_AT};
use crate::handles::{Handles, LoopHandle};
use crate::host::{FileFacts, Host};
use crate::loop_device::{self, LOOP_CONTROL};
use crate::made_cow::unmake;
use crate::mapper::{MAPPER_CONTROL, TargetVersion};
use crate::name::{DeviceName, DeviceNumber};
use crate::options::SnapshotOptions;
use crate::origin::Base;
use crate::origin_identity::OriginIdentity;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
use crate::spans;
use crate::status::SnapshotStatus;
use crate::store_check::check_identity;
use crate::sys::{LO_AUTOCLEAR, LO_DIRECT_IO, LO_READ_ONLY};
use crate::table::{Discard, SnapshotParams, Target, TargetLine};
use crate::teardown;
use crate::units::Sectors;
use crate::uuid::{DeviceUuid, Kind};

/// A live snapshot.
///
/// It belongs to the kernel, not to this process: dropping this value leaves it alone, so that a restarted control
/// plane finds its VMs' disks as they were. Take it down with [`Snapshot::cleanup`], or from any process with
/// [`cleanup`](crate::cleanup) and the [`Handles`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a snapshot stays until it is cleaned up"]
pub struct Snapshot {
    handles: Handles,
    warnings: Vec<Warning>,
}

impl Snapshot {
    pub(crate) fn of(handles: Handles, warnings: Vec<Warning>) -> Self {
        Self { handles, warnings }
    }

    /// The path for the hypervisor: `/dev/dm-N`, or where /dev is no devtmpfs, `/dev/mapper/<name>`. It can be
    /// opened at once.
    #[must_use]
    pub fn device(&self) -> &Path {
        self.handles.device.as_deref().unwrap_or(Path::new(""))
    }

    /// What to keep of it.
    #[must_use]
    pub fn handles(&self) -> &Handles {
        &self.handles
    }

    /// What to keep of it, without the rest.
    #[must_use]
    pub fn into_handles(self) -> Handles {
        self.handles
    }

    /// What is worth knowing about it.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Makes its COW file at least `bytes` long while it works, as [`grow`](crate::grow()) does.
    ///
    /// # Errors
    ///
    /// As [`grow`](crate::grow()).
    pub fn grow(&self, bytes: u64) -> Result<SnapshotStatus> {
        // A pool's device keeps its uuid for another snapshot.
        let lasting = self.handles.uuid.as_ref();
        let lasting = lasting.filter(|uuid| uuid.kind() != Kind::Pooled);
        let name = self.handles.name.as_ref().map(DeviceName::as_str);
        let device = lasting.map(DeviceUuid::as_str).or(name);
        crate::grow::grow(device.unwrap_or_default(), bytes)
    }

    /// Takes it down, as [`cleanup`](crate::cleanup) does. The COW file stays.
    ///
    /// # Errors
    ///
    /// [`Error::Debris`] names everything that remains.
    pub fn cleanup(self) -> Result<()> {
        teardown::cleanup(&self.handles)
    }
}

/// A loop device that is ours for as long as `device` is open or a dm table holds it.
#[derive(Debug)]
pub(crate) struct Attached<L> {
    pub(crate) path: PathBuf,
    /// The N of `/dev/loopN`.
    pub(crate) number: u32,
    pub(crate) dev: DeviceNumber,
    pub(crate) device: L,
}

/// What a snapshot is made over: the image, and the loop device that has it.
pub(crate) struct Over<'a> {
    /// The image as it was inspected.
    pub(crate) facts: &'a FileFacts,
    pub(crate) device: DeviceNumber,
    pub(crate) length: Sectors,
}

/// Which dm device a snapshot becomes.
pub(crate) enum Onto<'a> {
    New {
        name: &'a DeviceName,
        kind: Kind,
    },
    /// One that is there and has a table that nobody uses.
    Recycled(&'a Made),
}

/// Makes a snapshot over an image of its own and brings it live, or leaves nothing.
pub(crate) fn create<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Path,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let _span = spans::create(origin, cow, name);
    open_controls(host)?;
    check_target(host, options)?;
    let origin = open_origin(host, origin, options)?;
    let cow = open_cow(host, cow, &origin, options)?;

    let mut handles = Handles {
        origin: Some(origin.identity()),
        ..Handles::default()
    };
    let mut attached = || -> Result<_> {
        let flags = LO_READ_ONLY | LO_AUTOCLEAR;
        let origin_loop = attach(host, &origin, flags, origin.path, &mut handles.origin_loop)?;
        let length = loop_length(host, &origin_loop)?;
        let over = Over {
            facts: &origin.facts,
            device: origin_loop.dev,
            length,
        };
        let kind = Kind::Own;
        let onto = Onto::New { name, kind };
        let built = build(host, options, &over, &cow, &onto, &mut handles)?;
        Ok((link(host, &built.made)?, built.warnings))
    };
    let built = attached();
    finish(host, options, &cow, built, handles)
}

/// Makes a snapshot over an image that is attached already.
pub(crate) fn create_on<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    base: &Base<H::Loop>,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let _span = spans::create(base.image().path, cow, name);
    open_controls(host)?;
    let (cow, mut handles) = prepare(host, options, base, cow)?;
    let mut live = || -> Result<_> {
        let kind = Kind::Shared;
        let onto = Onto::New { name, kind };
        let built = build(host, options, &base.over(), &cow, &onto, &mut handles)?;
        Ok((link(host, &built.made)?, built.warnings))
    };
    let built = live();
    if built.is_ok() {
        handles.origin_loop = Some(base.handle.clone());
    }
    finish(host, options, &cow, built, handles)
}

/// The COW file of a snapshot over an attached image, and the handles to fill.
pub(crate) fn prepare<'a, H: Host>(
    host: &H,
    options: &SnapshotOptions,
    base: &Base<H::Loop>,
    cow: &'a Path,
) -> Result<(Cow<'a, H::File>, Handles)> {
    check_target(host, options)?;
    let image = base.image();
    let (expected, any) = (options.expected_origin, options.any_origin);
    check_identity(image.path, image.identity(), expected, any)?;
    let handles = Handles {
        origin: Some(image.identity()),
        ..Handles::default()
    };
    Ok((open_cow(host, cow, &image, options)?, handles))
}

pub(crate) fn open_controls<H: Host>(host: &H) -> Result<()> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })
}

pub(crate) fn loop_length<H: Host>(host: &H, device: &Attached<H::Loop>) -> Result<Sectors> {
    let size = || host.loop_size_bytes(&device.device);
    ask(Step::SizeLoop, &device.path, size).map(Sectors::from_bytes_floor)
}

/// Makes the device's alias. The path that leads to it without that, where /dev has one.
pub(crate) fn link<H: Host>(host: &H, made: &Made) -> Result<PathBuf> {
    let node = host.find_node(made.dev);
    ask(Step::Link, &made.mapper, || {
        host.make_alias(&made.mapper, made.dev, node.as_deref())
    })?;
    Ok(node.unwrap_or_else(|| made.mapper.clone()))
}

/// A snapshot, or what undoing it left.
fn finish<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    cow: &Cow<'_, H::File>,
    built: Result<(PathBuf, Vec<Warning>)>,
    mut handles: Handles,
) -> Result<Snapshot> {
    match built {
        Ok((device, warnings)) => {
            handles.device = Some(device);
            Ok(Snapshot::of(handles, warnings))
        }
        Err(error) => Err(unbuilt(host, options, cow, error, &handles)),
    }
}

/// A failure after the COW file was opened or made, with what undoing left.
pub(crate) fn unbuilt<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    cow: &Cow<'_, H::File>,
    error: Error,
    handles: &Handles,
) -> Error {
    let error = undone(host, error, handles);
    if options.make_cow.is_some() {
        unmake(host, error, cow.backing.path)
    } else {
        error
    }
}

/// A live device, still without its alias.
pub(crate) struct Built<L> {
    pub(crate) made: Made,
    pub(crate) warnings: Vec<Warning>,
    /// The COW file's, locked while this is there: a sweep by another process takes the device for abandoned without
    /// it.
    _at_work: Attached<L>,
}

/// From an attached image and an inspected COW file to a live device. `handles` names at any moment what there is to
/// undo.
pub(crate) fn build<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    over: &Over<'_>,
    cow: &Cow<'_, H::File>,
    onto: &Onto<'_>,
    handles: &mut Handles,
) -> Result<Built<H::Loop>> {
    let Cow {
        backing: cow,
        mark,
        warning,
    } = cow;
    if let Onto::Recycled(made) = onto {
        made.note(handles);
    }
    let direct_io = if options.direct_io { LO_DIRECT_IO } else { 0 };
    let flags = LO_AUTOCLEAR | direct_io;
    let cow_loop = attach(host, cow, flags, cow.path, &mut handles.cow_loop)?;
    let mut warnings = note_sizes(options, over.length, over.facts, &cow.facts);
    warnings.extend(warning.clone());
    if options.direct_io {
        let status = || host.loop_status(&cow_loop.device);
        if !ask(Step::InspectLoop, &cow_loop.path, status)?.direct_io {
            warnings.push(Warning::DirectIoUnavailable);
        }
    }

    let discard = if options.discard {
        Discard::ZeroesCow
    } else {
        Discard::Unsupported
    };
    let params = SnapshotParams {
        origin: over.device,
        cow: cow_loop.dev,
        store: options.store,
        chunk: options.chunk,
        discard,
    };
    let line = TargetLine {
        start: Sectors::default(),
        length: over.length,
        target: Target::Snapshot(params),
    };

    let identity = over.facts.identity();
    let made = match onto {
        Onto::New { name, kind } => {
            make_device(host, name, identity, *kind, &cow_loop, &line, handles)?
        }
        Onto::Recycled(made) => {
            load(host, made, &line)?;
            (*made).clone()
        }
    };
    if *mark {
        // The kernel has written the header by now, and does not write it again while the store is valid.
        let mark = exception_store::mark(identity, None);
        ask(Step::MarkFile, cow.path, || {
            host.write_at(&cow.file, &mark, MARK_AT)
        })?;
    }
    ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
    Ok(Built {
        made,
        warnings,
        _at_work: cow_loop,
    })
}

/// A dm device of ours.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) name: DeviceName,
    pub(crate) uuid: DeviceUuid,
    /// `/dev/mapper/<name>`, there or not.
    pub(crate) mapper: PathBuf,
    pub(crate) dev: DeviceNumber,
}

impl Made {
    /// The same device after a rename.
    pub(crate) fn named(self, name: &DeviceName) -> Self {
        Self {
            mapper: name.mapper_path(),
            name: name.clone(),
            ..self
        }
    }

    pub(crate) fn handles(&self) -> Handles {
        let mut handles = Handles::default();
        self.note(&mut handles);
        handles
    }

    fn note(&self, handles: &mut Handles) {
        handles.name = Some(self.name.clone());
        handles.dev = Some(self.dev);
        handles.mapper = Some(self.mapper.clone());
        handles.uuid = Some(self.uuid.clone());
    }
}

/// Makes the dm device and loads its one line.
pub(crate) fn make_device<H: Host>(
    host: &H,
    name: &DeviceName,
    origin: OriginIdentity,
    kind: Kind,
    cow_loop: &Attached<H::Loop>,
    line: &TargetLine,
    handles: &mut Handles,
) -> Result<Made> {
    let mapper = name.mapper_path();
    let random = ask(Step::Random, &mapper, || host.random())?;
    let uuid = DeviceUuid::fresh(random, origin, cow_loop.number, kind);
    let dev = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
    let made = Made {
        name: name.clone(),
        uuid,
        mapper,
        dev,
    };
    made.note(handles);
    load(host, &made, line)?;
    Ok(made)
}

/// Loads a line into the device's inactive slot.
pub(crate) fn load<H: Host>(host: &H, made: &Made, line: &TargetLine) -> Result<()> {
    patiently(host, &LOAD_RETRY, Verdict::Exhausted, || {
        ask(Step::Load, &made.mapper, || host.load(&made.uuid, line))
    })
    .map_err(|error| explain_load(host, error))
}

/// A failure, with what undoing the steps before it leaves.
pub(crate) fn undone<H: Host>(host: &H, error: Error, handles: &Handles) -> Error {
    match teardown::clean(host, handles, &UNDO_RETRY) {
        Err(Error::Debris { left, .. }) => error.leaving(left),
        _ => error,
    }
}

/// A refused table may mean that the kernel has no snapshot target; otherwise only the kernel log knows more.
fn explain_load<H: Host>(host: &H, error: Error) -> Error {
    match target_version(host) {
        Err(missing) if missing.verdict() == Some(Verdict::Unsupported) => missing,
        _ => error.noted("the kernel log has the target's reason"),
    }
}

/// Nobody knows the device yet, so only a probe can hold it, and not for long.
const UNDO_RETRY: Retry = Retry::until(Duration::from_secs(2));

/// Reading several stores back at once, 6.1 and 6.12 were seen to answer ENOMEM: one load creates the slab of its
/// buffers while another one destroys it. Real shortage of memory lasts longer.
const LOAD_RETRY: Retry = Retry::until(Duration::from_millis(500)).sparing();

/// The next free loop device is another one already, so the first pauses are next to nothing.
const RACE_RETRY: Retry =
    Retry::until(Duration::from_secs(5)).pauses(Duration::from_micros(1), Duration::from_millis(1));

/// Refuses what this kernel's snapshot target cannot do.
pub(crate) fn check_target<H: Host>(host: &H, options: &SnapshotOptions) -> Result<()> {
    if !options.discard {
        return Ok(());
    }
    let version = target_version(host)?;
    if version.target < [1, 16, 0] {
        let [major, minor, patch] = version.target;
        let version = format!("{major}.{minor}.{patch}");
        let feature = "discard_zeroes_cow (1.16.0)";
        return Err(Refusal::TargetLacks { version, feature }.into());
    }
    if version.interface_minor > LAST_SOUND_DISCARD && options.chunk.sectors() < SOUND_DISCARD_CHUNK
    {
        return Err(Refusal::DiscardChunk {
            chunk: options.chunk,
        }
        .into());
    }
    Ok(())
}

/// The last dm interface seen to take discards with chunks of any size. Linux 7.3.4 (interface 50) divides by zero in
/// `blk_stack_limits` when such a table is loaded, whoever loads it: the snapshot target states its discard granularity
/// in sectors where the block layer reads bytes. What lies between was not tried.
const LAST_SOUND_DISCARD: u32 = 48;

/// The least chunk at which 7.3.4 was seen to survive: its number of sectors, read as bytes, is a whole sector.
const SOUND_DISCARD_CHUNK: Sectors = Sectors::new(512);

fn target_version<H: Host>(host: &H) -> Result<TargetVersion> {
    let asked = ask(Step::TargetVersion, Path::new(MAPPER_CONTROL), || {
        host.target_version()
    });
    asked.map_err(|error| match error.verdict() {
        Some(Verdict::Unsupported) => error.noted("dm-snapshot is neither loaded nor loadable"),
        _ => error,
    })
}

/// Finds a free loop device and binds `backing` to it; `label` is for people and for finding it again. A device that
/// was lost to another process is left alone.
pub(crate) fn attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
    label: &Path,
    handle: &mut Option<LoopHandle>,
) -> Result<Attached<H::Loop>> {
    patiently(host, &RACE_RETRY, Verdict::TakeAnother, || {
        try_attach(host, backing, flags, label, handle)
    })
}

fn try_attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
    label: &Path,
    handle: &mut Option<LoopHandle>,
) -> Result<Attached<H::Loop>> {
    let number = ask(Step::FindLoop, Path::new(LOOP_CONTROL), || host.find_loop())?;
    let path = loop_device::node(number);
    let writable = flags & LO_READ_ONLY == 0;
    let device = ask(Step::OpenLoop, &path, || host.open_loop(&path, writable))?;
    if writable {
        hold(host, &device, &path)?;
    }
    ask(Step::AttachLoop, &path, || {
        host.attach_loop(&device, &backing.file, flags, label)
    })?;
    let handle = handle.insert(LoopHandle::at(&path));
    handle.backing = Some(backing.facts.id);
    handle.diskseq = loop_device::diskseq(host, &device, &path)?;
    let dev = ask(Step::InspectLoop, &path, || host.loop_number(&device))?;
    Ok(Attached {
        path,
        number,
        dev,
        device,
    })
}

/// Locks the COW file's loop device for as long as we have it open: the sign, to whoever reaps, that the snapshot's
/// maker is alive and at work. An exclusive lock also keeps udev from probing the device meanwhile. Where udev is there
/// first, a shared one stands beside its, and a mark says that one of them is a maker's. Where that cannot be had
/// either, another maker is on the device.
fn hold<H: Host>(host: &H, device: &H::Loop, path: &Path) -> Result<()> {
    let lock = |exclusive| ask(Step::LockLoop, path, || host.lock_loop(device, exclusive));
    match lock(true) {
        Err(error) if error.verdict() == Some(Verdict::TakeAnother) => {
            lock(false)?;
            ask(Step::LockLoop, path, || host.mark_loop(device))
        }
        other => other,
    }
}
