//! The story of a snapshot: the order of its steps, and their undoing.
//!
//! Undoing is short by construction. Loop devices are attached with autoclear in the same call that binds them,
//! so closing a descriptor detaches them, and so does a SIGKILL; only the dm device has to be removed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ask::{ask, patiently};
use crate::backing::{self, Backing, Warning, note_sizes, open_cow, open_origin};
use crate::error::{Error, Leftover, Result, Step};
use crate::exception_store::{self, MARK_AT};
use crate::handles::{Handles, LoopHandle};
use crate::host::Host;
use crate::loop_device::LOOP_CONTROL;
use crate::mapper::MAPPER_CONTROL;
use crate::name::{DeviceName, DeviceNumber};
use crate::options::SnapshotOptions;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
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
struct Attached<L> {
    handle: LoopHandle,
    /// The N of `/dev/loopN`.
    node: u32,
    number: DeviceNumber,
    device: L,
}

/// Makes a snapshot and brings it live, or leaves nothing.
pub(crate) fn create<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Path,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })?;
    check_target(host, options)?;
    let origin = open_origin(host, origin, options)?;
    if let Some(size) = options.make_cow {
        backing::make_cow(host, cow, size, &origin, options)?;
    }
    let created = create_over(host, options, &origin, cow, name);
    match created {
        Err(error) if options.make_cow.is_some() => Err(unmade(host, error, cow)),
        created => created,
    }
}

/// A failure after the COW file was made. The file goes too, unless something that remains has it in use: without the
/// path, nobody would know what fills the disk.
fn unmade<H: Host>(host: &H, error: Error, cow: &Path) -> Error {
    let kept_by = error.left().first().map(|leftover| leftover.error.clone());
    let unlink = || ask(Step::Unlink, cow, || host.unlink(cow)).err();
    match kept_by.or_else(unlink) {
        None => error,
        Some(why) => error.leaving(vec![Leftover::new(cow, why)]),
    }
}

fn create_over<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Backing<'_, H::File>,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let (cow, is_new) = open_cow(host, cow, origin, options)?;
    let mut warnings = Vec::new();

    let origin_loop = attach(host, origin, LO_READ_ONLY | LO_AUTOCLEAR)?;
    let direct_io = if options.direct_io { LO_DIRECT_IO } else { 0 };
    let cow_loop = attach(host, &cow, LO_AUTOCLEAR | direct_io)?;
    let size_of = |backing: &Attached<H::Loop>| {
        ask(Step::SizeLoop, &backing.handle.path, || {
            host.loop_size_bytes(&backing.device)
        })
    };
    let length = Sectors::from_bytes_floor(size_of(&origin_loop)?);
    if length == Sectors::default() {
        return Err(Refusal::OriginTooShort {
            path: origin.path.to_owned(),
            bytes: origin.facts.size_bytes,
        }
        .into());
    }
    note_sizes(options, length, &origin.facts, &cow.facts, &mut warnings);
    if options.direct_io
        && !ask(Step::InspectLoop, &cow_loop.handle.path, || {
            host.loop_status(&cow_loop.device)
        })?
        .direct_io
    {
        warnings.push(Warning::DirectIoUnavailable);
    }

    let discard = if options.discard {
        Discard::ZeroesCow
    } else {
        Discard::Unsupported
    };
    let (store, chunk) = (options.store, options.chunk);
    let params = SnapshotParams {
        origin: origin_loop.number,
        cow: cow_loop.number,
        store,
        chunk,
        discard,
    };
    let line = TargetLine {
        start: Sectors::default(),
        length,
        target: Target::Snapshot(params),
    };

    let mapper = name.mapper_path();
    let random = ask(Step::Random, &mapper, || host.random())?;
    let uuid = DeviceUuid::fresh(random, origin.identity(), cow_loop.node);
    let number = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
    let bring_up = || {
        ask(Step::Load, &mapper, || host.load(&uuid, &line))
            .map_err(|error| explain_load(host, error))?;
        if is_new {
            // The kernel has written the header just now, and does not write it again while the store is valid.
            let mark = exception_store::mark(origin.identity());
            ask(Step::MarkFile, cow.path, || {
                host.write_at(&cow.file, &mark, MARK_AT)
            })?;
        }
        ask(Step::Resume, &mapper, || host.resume(&uuid))?;
        ask(Step::Link, &mapper, || host.make_alias(&mapper, number))
    };
    let brought_up = bring_up();
    let mut handles = Handles {
        name: Some(name.clone()),
        uuid: Some(uuid),
        dev: Some(number),
        device: None,
        mapper: Some(mapper),
        cow_loop: Some(cow_loop.handle),
        origin_loop: Some(origin_loop.handle),
        origin: Some(origin.identity()),
    };
    // From here on the dm table alone holds the loop devices, if there is one.
    drop((origin_loop.device, cow_loop.device));
    match brought_up {
        Ok(device) => {
            handles.device = Some(device.clone());
            Ok(Snapshot {
                handles,
                device,
                warnings,
            })
        }
        Err(error) => Err(undone(host, error, &handles)),
    }
}

/// A failure after `DM_DEV_CREATE`, with what undoing it leaves.
fn undone<H: Host>(host: &H, error: Error, handles: &Handles) -> Error {
    match teardown::clean(host, handles, &UNDO_RETRY) {
        Err(Error::Debris { left, .. }) => error.leaving(left),
        _ => error,
    }
}

/// A refused table may mean that the kernel has no snapshot target; otherwise only the kernel log knows more.
fn explain_load<H: Host>(host: &H, error: Error) -> Error {
    match target_version(host) {
        Err(missing) => missing,
        Ok(_) => error.noted("the kernel log has the target's reason"),
    }
}

/// Nobody knows the device yet, so only a probe can hold it, and not for long.
const UNDO_RETRY: Retry = Retry::until(Duration::from_secs(2));

/// The next free loop device is another one already, so the first pauses are next to nothing.
const RACE_RETRY: Retry =
    Retry::until(Duration::from_secs(5)).pauses(Duration::from_micros(1), Duration::from_millis(1));

fn check_target<H: Host>(host: &H, options: &SnapshotOptions) -> Result<()> {
    if !options.discard {
        return Ok(());
    }
    let version = target_version(host)?;
    if version < [1, 16, 0] {
        let [major, minor, patch] = version;
        let version = format!("{major}.{minor}.{patch}");
        return Err(Refusal::TargetLacks {
            version,
            feature: "discard_zeroes_cow (1.16.0)",
        }
        .into());
    }
    Ok(())
}

fn target_version<H: Host>(host: &H) -> Result<[u32; 3]> {
    ask(Step::TargetVersion, Path::new(MAPPER_CONTROL), || {
        host.target_version()
    })
    .map_err(|error| error.noted("dm-snapshot is neither loaded nor loadable"))
}

/// Finds a free loop device and binds `backing` to it. A device that was lost to another process is left alone.
fn attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
) -> Result<Attached<H::Loop>> {
    patiently(host, &RACE_RETRY, Verdict::TakeAnother, || {
        try_attach(host, backing, flags)
    })
}

fn try_attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
) -> Result<Attached<H::Loop>> {
    let free = ask(Step::FindLoop, Path::new(LOOP_CONTROL), || host.find_loop())?;
    let path = PathBuf::from(format!("/dev/loop{free}"));
    let device = ask(Step::OpenLoop, &path, || {
        host.open_loop(&path, flags & LO_READ_ONLY == 0)
    })?;
    if flags & LO_READ_ONLY == 0 {
        hold(host, &device, &path)?;
    }
    ask(Step::AttachLoop, &path, || {
        host.attach_loop(&device, &backing.file, flags, backing.path)
    })?;
    let number = ask(Step::InspectLoop, &path, || host.loop_number(&device))?;
    let diskseq = host.loop_diskseq(&device);
    let handle = LoopHandle {
        path,
        diskseq,
        backing: Some(backing.facts.id),
    };
    Ok(Attached {
        handle,
        node: free,
        number,
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
