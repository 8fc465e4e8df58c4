//! The story of a snapshot: the order of its steps, and their undoing.
//!
//! Undoing is short by construction. Loop devices are attached with autoclear in the same call that binds them,
//! so closing a descriptor detaches them, and so does a SIGKILL; only the dm device has to be removed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ask::{ask, patiently};
use crate::error::{Error, Leftover, Result, Step};
use crate::exception_store::{self, PROBE_BYTES, Probe};
use crate::handles::{Handles, LoopHandle};
use crate::host::{FileFacts, FileKind, Host};
use crate::loop_device::LOOP_CONTROL;
use crate::mapper::MAPPER_CONTROL;
use crate::name::{DeviceName, DeviceNumber, DeviceUuid};
use crate::options::SnapshotOptions;
use crate::origin_identity::OriginIdentity;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
use crate::sys::{LO_AUTOCLEAR, LO_DIRECT_IO, LO_READ_ONLY};
use crate::table::{Discard, SnapshotParams, Target, TargetLine};
use crate::teardown;
use crate::units::{SECTOR_BYTES, Sectors};

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

/// Something that is worth knowing about a snapshot that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// The image is no multiple of 512 bytes: its last bytes are not visible through the snapshot.
    OriginTail {
        /// How many bytes.
        bytes: u64,
    },
    /// The COW file cannot hold an overwrite of the whole origin: a guest that writes enough fills it.
    CowBelowWorstCase {
        /// The COW file's size.
        bytes: u64,
        /// The size at which a full overwrite fits.
        worst_case_bytes: u64,
    },
    /// Direct I/O was asked for, and the COW file's file system cannot do it.
    DirectIoUnavailable,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OriginTail { bytes } => {
                write!(
                    f,
                    "the last {bytes} bytes of the origin image are no whole sector and not visible"
                )
            }
            Self::CowBelowWorstCase {
                bytes,
                worst_case_bytes,
            } => {
                write!(
                    f,
                    "the COW file has {bytes} bytes; overwriting the whole origin takes {worst_case_bytes}"
                )
            }
            Self::DirectIoUnavailable => {
                f.write_str("the COW file's file system cannot do direct I/O")
            }
        }
    }
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

/// An image or COW file that passed inspection.
struct Backing<'a, F> {
    path: &'a Path,
    file: F,
    facts: FileFacts,
}

/// A loop device that is ours for as long as `device` is open or a dm table holds it.
struct Attached<L> {
    handle: LoopHandle,
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
    let cow = open_cow(host, cow, &origin, options)?;
    let mut warnings = Vec::new();

    let origin_loop = attach(host, &origin, LO_READ_ONLY | LO_AUTOCLEAR)?;
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
    let uuid = DeviceUuid::from_random(ask(Step::Random, &mapper, || host.random())?);
    let number = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
    let device = match bring_up(host, &uuid, number, &line, &mapper) {
        Ok(device) => device,
        Err(error) => {
            drop((origin_loop, cow_loop));
            return Err(error.leaving(undo(host, &uuid, &mapper)));
        }
    };
    let handles = Handles {
        name: Some(name.clone()),
        uuid: Some(uuid),
        dev: Some(number),
        device: Some(device.clone()),
        mapper: Some(mapper),
        cow_loop: Some(cow_loop.handle),
        origin_loop: Some(origin_loop.handle),
        origin: Some(identity(&origin.facts)),
    };
    Ok(Snapshot {
        handles,
        device,
        warnings,
    })
}

/// From a dm device without a table to one that can be opened.
fn bring_up<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
    number: DeviceNumber,
    line: &TargetLine,
    mapper: &Path,
) -> Result<PathBuf> {
    ask(Step::Load, mapper, || host.load(uuid, line)).map_err(|error| explain_load(host, error))?;
    ask(Step::Resume, mapper, || host.resume(uuid))?;
    ask(Step::Link, mapper, || host.make_alias(mapper, number))
}

/// A refused table may mean that the kernel has no snapshot target; otherwise only the kernel log knows more.
fn explain_load<H: Host>(host: &H, error: Error) -> Error {
    match target_version(host) {
        Err(missing) => missing,
        Ok(_) => error.noted("the kernel log has the target's reason"),
    }
}

/// What the undoing of everything since `DM_DEV_CREATE` leaves.
fn undo<H: Host>(host: &H, uuid: &DeviceUuid, mapper: &Path) -> Vec<Leftover> {
    let removed = teardown::remove_ours(host, uuid, mapper, &UNDO_RETRY);
    removed
        .err()
        .map(|error| Leftover::new(mapper, error))
        .into_iter()
        .collect()
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

fn open_origin<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &SnapshotOptions,
) -> Result<Backing<'a, H::File>> {
    let origin = open_backing(host, path, false)?;
    if origin.facts.kind == FileKind::Regular && origin.facts.size_bytes < SECTOR_BYTES {
        return Err(Refusal::OriginTooShort {
            path: path.to_owned(),
            bytes: origin.facts.size_bytes,
        }
        .into());
    }
    let found = identity(&origin.facts);
    if let Some(expected) = options
        .expected_origin
        .filter(|expected| *expected != found)
    {
        return Err(Refusal::OriginChanged {
            path: path.to_owned(),
            expected,
            found,
        }
        .into());
    }
    lock(
        host,
        &origin,
        false,
        Refusal::OriginInUse {
            path: path.to_owned(),
        },
    )?;
    Ok(origin)
}

fn open_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<Backing<'a, H::File>> {
    let cow = open_backing(host, path, true)?;
    if cow.facts.id == origin.facts.id {
        return Err(Refusal::SameFile {
            origin: origin.path.to_owned(),
            cow: path.to_owned(),
        }
        .into());
    }
    if cow.facts.kind == FileKind::Regular {
        if cow.facts.mode & 0o222 == 0 {
            return Err(Refusal::CowReadOnly {
                path: path.to_owned(),
                mode: cow.facts.mode,
            }
            .into());
        }
        let needed = exception_store::least_bytes(options.store, options.chunk);
        if cow.facts.size_bytes < needed {
            let (bytes, chunk) = (cow.facts.size_bytes, options.chunk);
            return Err(Refusal::CowTooSmall {
                path: path.to_owned(),
                bytes,
                chunk,
                needed,
            }
            .into());
        }
    }
    lock(
        host,
        &cow,
        true,
        Refusal::CowInUse {
            path: path.to_owned(),
        },
    )?;
    check_store(host, &cow, options)?;
    Ok(cow)
}

fn open_backing<'a, H: Host>(
    host: &H,
    path: &'a Path,
    writable: bool,
) -> Result<Backing<'a, H::File>> {
    let file = ask(Step::OpenFile, path, || host.open_file(path, writable))?;
    let facts = ask(Step::InspectFile, path, || host.inspect_file(&file))?;
    match facts.kind {
        FileKind::Other(kind) => Err(Refusal::NotAFile {
            path: path.to_owned(),
            kind,
        }
        .into()),
        _ => Ok(Backing { path, file, facts }),
    }
}

/// The lock lives as long as the loop device that is given the file: no other process, and no other path to the
/// same file, gets a COW file that a snapshot has.
fn lock<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    exclusive: bool,
    refusal: Refusal,
) -> Result<()> {
    match ask(Step::LockFile, backing.path, || {
        host.lock_file(&backing.file, exclusive)
    }) {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Err(refusal.into()),
        other => other,
    }
}

/// Holds the COW file's first bytes against what is asked for, before the kernel looks at four of them.
fn check_store<H: Host>(
    host: &H,
    cow: &Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<()> {
    let mut start = [0; PROBE_BYTES];
    let length = ask(Step::ReadFile, cow.path, || {
        host.read_start(&cow.file, &mut start)
    })?;
    let path = || cow.path.to_owned();
    let refusal = match exception_store::probe(&start[..length]) {
        Probe::Blank => return Ok(()),
        _ if !options.store.is_persistent() => Refusal::CowNotBlank { path: path() },
        Probe::Store(header) if !header.valid => Refusal::CowInvalid { path: path() },
        Probe::Store(header) if header.chunk != options.chunk => Refusal::CowChunkSize {
            path: path(),
            found: header.chunk,
            asked: options.chunk,
        },
        Probe::Store(_) => return Ok(()),
        Probe::Damaged(fault) => Refusal::CowDamaged {
            path: path(),
            field: fault.field,
            value: fault.value,
        },
        Probe::Foreign => Refusal::CowForeign { path: path() },
    };
    Err(refusal.into())
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
        number,
        device,
    })
}

fn note_sizes(
    options: &SnapshotOptions,
    length: Sectors,
    origin: &FileFacts,
    cow: &FileFacts,
    warnings: &mut Vec<Warning>,
) {
    if origin.kind == FileKind::Regular && !origin.size_bytes.is_multiple_of(SECTOR_BYTES) {
        warnings.push(Warning::OriginTail {
            bytes: origin.size_bytes % SECTOR_BYTES,
        });
    }
    let worst_case =
        exception_store::worst_case(length, options.store, options.chunk).unwrap_or(u64::MAX);
    if cow.kind == FileKind::Regular && cow.size_bytes < worst_case {
        warnings.push(Warning::CowBelowWorstCase {
            bytes: cow.size_bytes,
            worst_case_bytes: worst_case,
        });
    }
}

fn identity(facts: &FileFacts) -> OriginIdentity {
    OriginIdentity {
        size_bytes: facts.size_bytes,
        mtime_ns: facts.mtime_ns,
    }
}
