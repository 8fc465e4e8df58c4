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
use crate::host::Host;
use crate::loop_device::{self, LOOP_CONTROL};
use crate::made_cow::unmake;
use crate::mapper::{MAPPER_CONTROL, TargetVersion};
use crate::name::{DeviceName, DeviceNumber};
use crate::options::SnapshotOptions;
use crate::origin_identity::OriginIdentity;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
use crate::spans;
use crate::status::SnapshotStatus;
use crate::sys::{LO_AUTOCLEAR, LO_DIRECT_IO, LO_READ_ONLY};
use crate::table::{Discard, SnapshotParams, Target, TargetLine};
use crate::teardown;
use crate::units::Sectors;
use crate::uuid::DeviceUuid;

/// A live snapshot.
///
/// It belongs to the kernel, not to this process: dropping this value leaves it alone, so that a restarted control
/// plane finds its VMs' disks as they were. Take it down with [`Snapshot::cleanup`], or from any process with
/// [`cleanup`](crate::cleanup) and the [`Handles`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a snapshot stays until it is cleaned up"]
pub struct Snapshot {
    handles: Handles,
    device: PathBuf,
    warnings: Vec<Warning>,
}

impl Snapshot {
    /// The path for the hypervisor: `/dev/dm-N`, or where /dev is no devtmpfs, `/dev/mapper/<name>`. It can be
    /// opened at once.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
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
        let uuid = self.handles.uuid.as_ref().map_or("", DeviceUuid::as_str);
        crate::grow::grow(uuid, bytes)
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
pub(crate) struct Attached<L> {
    pub(crate) path: PathBuf,
    /// The N of `/dev/loopN`.
    number: u32,
    pub(crate) dev: DeviceNumber,
    pub(crate) device: L,
}

/// Makes a snapshot and brings it live, or leaves nothing.
pub(crate) fn create<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Path,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let _span = spans::create(origin, cow, name);
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })?;
    check_target(host, options)?;
    let origin = open_origin(host, origin, options)?;
    let cow = open_cow(host, cow, &origin, options)?;

    let mut handles = Handles {
        origin: Some(origin.identity()),
        ..Handles::default()
    };
    match build(host, options, &origin, &cow, name, &mut handles) {
        Ok((device, warnings)) => {
            handles.device = Some(device.clone());
            Ok(Snapshot {
                handles,
                device,
                warnings,
            })
        }
        Err(error) => {
            let error = undone(host, error, &handles);
            Err(if options.make_cow.is_some() {
                unmake(host, error, cow.backing.path)
            } else {
                error
            })
        }
    }
}

/// From inspected files to a device that can be opened. `handles` names at any moment what there is to undo; the loop
/// devices are open until this returns, and from then on held by the dm table alone, if there is one.
fn build<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Backing<'_, H::File>,
    cow: &Cow<'_, H::File>,
    name: &DeviceName,
    handles: &mut Handles,
) -> Result<(PathBuf, Vec<Warning>)> {
    let origin_loop = attach(
        host,
        origin,
        LO_READ_ONLY | LO_AUTOCLEAR,
        &mut handles.origin_loop,
    )?;
    let Cow {
        backing: cow,
        mark,
        warning,
    } = cow;
    let direct_io = if options.direct_io { LO_DIRECT_IO } else { 0 };
    let cow_loop = attach(host, cow, LO_AUTOCLEAR | direct_io, &mut handles.cow_loop)?;
    let bytes = ask(Step::SizeLoop, &origin_loop.path, || {
        host.loop_size_bytes(&origin_loop.device)
    })?;
    let length = Sectors::from_bytes_floor(bytes);
    let mut warnings = note_sizes(options, length, &origin.facts, &cow.facts);
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
        origin: origin_loop.dev,
        cow: cow_loop.dev,
        store: options.store,
        chunk: options.chunk,
        discard,
    };
    let target = Target::Snapshot(params);
    let line = TargetLine {
        start: Sectors::default(),
        length,
        target,
    };

    let made = make_device(host, name, origin.identity(), &cow_loop, &line, handles)?;
    if *mark {
        // The kernel has written the header by now, and does not write it again while the store is valid.
        let mark = exception_store::mark(origin.identity(), None);
        ask(Step::MarkFile, cow.path, || {
            host.write_at(&cow.file, &mark, MARK_AT)
        })?;
    }
    let mapper = &made.mapper;
    ask(Step::Resume, mapper, || host.resume(&made.uuid))?;
    let device = ask(Step::Link, mapper, || host.make_alias(mapper, made.dev))?;
    Ok((device, warnings))
}

/// A dm device with a table that is not live yet.
pub(crate) struct Made {
    pub(crate) uuid: DeviceUuid,
    /// `/dev/mapper/<name>`, there or not.
    pub(crate) mapper: PathBuf,
    dev: DeviceNumber,
}

/// Makes the dm device and loads its one line.
pub(crate) fn make_device<H: Host>(
    host: &H,
    name: &DeviceName,
    origin: OriginIdentity,
    cow_loop: &Attached<H::Loop>,
    line: &TargetLine,
    handles: &mut Handles,
) -> Result<Made> {
    let mapper = name.mapper_path();
    let random = ask(Step::Random, &mapper, || host.random())?;
    let uuid = DeviceUuid::fresh(random, origin, cow_loop.number);
    let dev = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
    handles.name = Some(name.clone());
    handles.dev = Some(dev);
    handles.mapper = Some(mapper.clone());
    handles.uuid = Some(uuid.clone());
    patiently(host, &LOAD_RETRY, Verdict::Exhausted, || {
        ask(Step::Load, &mapper, || host.load(&uuid, line))
    })
    .map_err(|error| explain_load(host, error))?;
    Ok(Made { uuid, mapper, dev })
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

/// Reading several stores back at once, 6.1 and 6.12 were seen to answer ENOMEM: one load creates the slab of its buffers
/// while another one destroys it. Real shortage of memory lasts longer.
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

/// Finds a free loop device and binds `backing` to it. A device that was lost to another process is left alone.
pub(crate) fn attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
    handle: &mut Option<LoopHandle>,
) -> Result<Attached<H::Loop>> {
    patiently(host, &RACE_RETRY, Verdict::TakeAnother, || {
        try_attach(host, backing, flags, handle)
    })
}

fn try_attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
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
        host.attach_loop(&device, &backing.file, flags, backing.path)
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
/// maker is alive and at work. An exclusive lock also keeps udev from probing the device meanwhile; where udev is
/// there first, a shared one stands beside its. Where that cannot be had either, another maker is on the device.
fn hold<H: Host>(host: &H, device: &H::Loop, path: &Path) -> Result<()> {
    match ask(Step::LockLoop, path, || host.lock_loop(device, true)) {
        Err(error) if error.verdict() == Some(Verdict::TakeAnother) => {
            ask(Step::LockLoop, path, || host.lock_loop(device, false))
        }
        other => other,
    }
}
