//! The files behind a snapshot: inspected and locked before any device is touched.

use std::path::Path;

use crate::ask::ask;
use crate::error::{Leftover, Result, Step};
use crate::exception_store::{self, PROBE_BYTES, Probe};
use crate::host::{FileFacts, FileKind, Host};
use crate::options::{CowSize, SnapshotOptions};
use crate::origin_identity::OriginIdentity;
use crate::policy::Verdict;
use crate::refusal::Refusal;
use crate::units::{SECTOR_BYTES, Sectors};

/// An image or COW file that passed inspection, locked for as long as it is open or a loop device has it.
pub(crate) struct Backing<'a, F> {
    pub(crate) path: &'a Path,
    pub(crate) file: F,
    pub(crate) facts: FileFacts,
}

impl<F> Backing<'_, F> {
    pub(crate) fn identity(&self) -> OriginIdentity {
        OriginIdentity {
            size_bytes: self.facts.size_bytes,
            mtime_ns: self.facts.mtime_ns,
        }
    }
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

/// Opens the origin image, and locks it against becoming a COW file or being written by whoever takes locks.
pub(crate) fn open_origin<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &SnapshotOptions,
) -> Result<Backing<'a, H::File>> {
    let origin = open_backing(host, path, false)?;
    if origin.facts.size_bytes < SECTOR_BYTES {
        return Err(Refusal::OriginTooShort {
            path: path.to_owned(),
            bytes: origin.facts.size_bytes,
        }
        .into());
    }
    check_identity(&origin, options.expected_origin, options)?;
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

/// Makes a COW file that was not there, or leaves none.
pub(crate) fn make_cow<H: Host>(
    host: &H,
    path: &Path,
    size: CowSize,
    origin: &Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<()> {
    let (store, chunk, origin_bytes) = (options.store, options.chunk, origin.facts.size_bytes);
    let asked = match size {
        CowSize::Bytes(bytes) => Some(bytes),
        CowSize::Percent(percent) => {
            u64::try_from(u128::from(origin_bytes) * u128::from(percent) / 100).ok()
        }
        CowSize::WorstCase => {
            exception_store::worst_case(Sectors::from_bytes_floor(origin_bytes), store, chunk)
        }
    };
    let bytes = asked.and_then(|bytes| exception_store::sound(bytes, store, chunk));
    let bytes = bytes.unwrap_or(u64::MAX);
    let file = ask(Step::MakeFile, path, || host.make_file(path))?;
    let sized = ask(Step::SizeFile, path, || {
        host.size_file(&file, bytes, options.reserve)
    });
    sized.map_err(
        |error| match ask(Step::Unlink, path, || host.unlink(path)) {
            Ok(()) => error,
            Err(stays) => error.leaving(vec![Leftover::new(path, stays)]),
        },
    )
}

/// Opens the COW file, and locks it against a second snapshot. Says whether the kernel will write a new store.
pub(crate) fn open_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<(Backing<'a, H::File>, bool)> {
    let cow = open_backing(host, path, true)?;
    if cow.facts.id == origin.facts.id {
        return Err(Refusal::SameFile {
            origin: origin.path.to_owned(),
            cow: path.to_owned(),
        }
        .into());
    }
    if cow.facts.kind == FileKind::Regular && cow.facts.mode & 0o222 == 0 {
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
    lock(
        host,
        &cow,
        true,
        Refusal::CowInUse {
            path: path.to_owned(),
        },
    )?;
    let is_new = check_store(host, &cow, origin, options)?;
    Ok((cow, is_new))
}

/// Holds the image against what a store's exceptions were made over.
fn check_identity<F>(
    origin: &Backing<'_, F>,
    expected: Option<OriginIdentity>,
    options: &SnapshotOptions,
) -> Result<()> {
    let found = origin.identity();
    match expected {
        Some(expected) if expected != found && !options.any_origin => {
            let path = origin.path.to_owned();
            Err(Refusal::OriginChanged {
                path,
                expected,
                found,
            }
            .into())
        }
        _ => Ok(()),
    }
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
    origin: &Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<bool> {
    let mut start = [0; PROBE_BYTES];
    let length = ask(Step::ReadFile, cow.path, || {
        host.read_start(&cow.file, &mut start)
    })?;
    let path = || cow.path.to_owned();
    let refusal = match exception_store::probe(&start[..length]) {
        Probe::Blank => return Ok(options.store.is_persistent()),
        _ if !options.store.is_persistent() => Refusal::CowNotBlank { path: path() },
        Probe::Store(header) if !header.valid => Refusal::CowInvalid { path: path() },
        Probe::Store(header) if header.chunk != options.chunk => Refusal::CowChunkSize {
            path: path(),
            found: header.chunk,
            asked: options.chunk,
        },
        Probe::Store(header) => {
            return check_identity(origin, header.origin, options).map(|()| false);
        }
        Probe::Damaged(fault) => Refusal::CowDamaged {
            path: path(),
            field: fault.field,
            value: fault.value,
        },
        Probe::Foreign => Refusal::CowForeign { path: path() },
    };
    Err(refusal.into())
}

/// What the files' sizes are worth a warning for.
pub(crate) fn note_sizes(
    options: &SnapshotOptions,
    length: Sectors,
    origin: &FileFacts,
    cow: &FileFacts,
    warnings: &mut Vec<Warning>,
) {
    if !origin.size_bytes.is_multiple_of(SECTOR_BYTES) {
        warnings.push(Warning::OriginTail {
            bytes: origin.size_bytes % SECTOR_BYTES,
        });
    }
    let worst_case =
        exception_store::worst_case(length, options.store, options.chunk).unwrap_or(u64::MAX);
    if cow.size_bytes < worst_case {
        warnings.push(Warning::CowBelowWorstCase {
            bytes: cow.size_bytes,
            worst_case_bytes: worst_case,
        });
    }
}
