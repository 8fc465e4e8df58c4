//! The files behind a snapshot: inspected and locked before any device is touched.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;

use crate::ask::{ask, patiently};
use crate::error::{Result, Step};
use crate::exception_store::{self, Header};
use crate::host::{FileFacts, FileKind, Host};
use crate::made_cow::{self, unmake};
use crate::options::SnapshotOptions;
use crate::origin_identity::OriginIdentity;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
use crate::store_check::{check_header, check_identity, check_store, probe_store, valid};
use crate::table::Store;
use crate::units::{SECTOR_BYTES, Sectors};

/// An image or COW file that passed inspection, locked for as long as it is open or a loop device has it.
pub(crate) struct Backing<'a, F> {
    pub(crate) path: &'a Path,
    pub(crate) file: F,
    pub(crate) facts: FileFacts,
}

impl<F> Backing<'_, F> {
    pub(crate) fn identity(&self) -> OriginIdentity {
        self.facts.identity()
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
    /// The COW file was made a chunk longer. At its old size the kernel invalidates a full `PO` store instead of only
    /// stopping its writes: there is no room for the metadata area behind the last full one.
    CowLengthened {
        /// The size it had.
        bytes: u64,
        /// The size it has now.
        sound_bytes: u64,
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
            Self::CowLengthened { bytes, sound_bytes } => {
                write!(
                    f,
                    "the COW file was made {sound_bytes} bytes long: one of {bytes} ends invalid when full"
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
    let origin = open_locked_origin(host, path, false)?;
    check_identity(
        path,
        origin.identity(),
        options.expected_origin,
        options.any_origin,
    )?;
    Ok(origin)
}

/// Opens the origin image, with a shared lock, or writable with an exclusive one: against that stands the lock of every
/// snapshot over it.
pub(crate) fn open_locked_origin<'a, H: Host>(
    host: &H,
    path: &'a Path,
    writable: bool,
) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::OriginInUse {
        path: path.to_owned(),
    };
    let file = open(host, path, writable, in_use_by)?;
    let locked = lock(host, path, &file, writable);
    let origin = inspect(host, path, file)?;
    let bytes = origin.facts.size_bytes;
    if bytes < SECTOR_BYTES {
        return Err(Refusal::OriginTooShort {
            path: path.to_owned(),
            bytes,
        }
        .into());
    }
    in_use(locked, in_use_by)?;
    Ok(origin)
}

/// A COW file that a snapshot can be made over.
pub(crate) struct Cow<'a, F> {
    pub(crate) backing: Backing<'a, F>,
    /// Whether the store is to be marked as made over this origin.
    pub(crate) mark: bool,
    /// What was done to it.
    pub(crate) warning: Option<Warning>,
}

/// Opens the COW file, or makes it, and locks it against a second snapshot.
pub(crate) fn open_cow<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, O>,
    options: &SnapshotOptions,
) -> Result<Cow<'a, H::File>> {
    let Some(size) = options.make_cow else {
        let (mut backing, locked) = open_made_cow(host, path)?;
        admit_file(&backing, origin)?;
        let mark = admit_cow(host, &backing, locked, origin, options)?;
        let warning = mend_size(host, &mut backing, options)?;
        return Ok(Cow {
            backing,
            mark,
            warning,
        });
    };
    let made = made_cow::make(host, path, size, origin, options)?;
    match admit_cow(host, &made, Ok(()), origin, options) {
        Ok(mark) => Ok(Cow {
            backing: made,
            mark,
            warning: None,
        }),
        // `made` is still open here, and with it locked.
        Err(error) => Err(unmake(host, error, path)),
    }
}

/// Opens a COW file that is there; says whether it could be locked.
pub(crate) fn open_made_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
) -> Result<(Backing<'a, H::File>, Result<()>)> {
    let file = open(host, path, true, || Refusal::CowInUse {
        path: path.to_owned(),
    })?;
    let locked = lock(host, path, &file, true);
    Ok((inspect(host, path, file)?, locked))
}

/// Opens the COW file for a merge, locked against every snapshot, with its header: a valid store's, made over this
/// origin.
pub(crate) fn open_merged_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, H::File>,
    any_origin: bool,
) -> Result<(Backing<'a, H::File>, Header)> {
    let (cow, locked) = open_made_cow(host, path)?;
    admit_file(&cow, origin)?;
    in_use(locked, || Refusal::CowInUse {
        path: path.to_owned(),
    })?;
    let header = match probe_store(host, &cow)? {
        Some(header) => valid(&cow, header)?,
        None => {
            return Err(Refusal::CowBlank {
                path: path.to_owned(),
            }
            .into());
        }
    };
    check_header(origin, &cow, &header, any_origin)?;
    Ok((cow, header))
}

/// Opens a COW file that is only to be read, and locks it against becoming a snapshot's meanwhile.
pub(crate) fn open_store<'a, H: Host>(host: &H, path: &'a Path) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::CowInUse {
        path: path.to_owned(),
    };
    let file = open(host, path, false, in_use_by)?;
    let locked = lock(host, path, &file, false);
    let cow = inspect(host, path, file)?;
    in_use(locked, in_use_by)?;
    Ok(cow)
}

/// Opens a COW file that a snapshot has locked, only to read it.
pub(crate) fn open_unlocked<'a, H: Host>(host: &H, path: &'a Path) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::CowInUse {
        path: path.to_owned(),
    };
    inspect(host, path, open(host, path, false, in_use_by)?)
}

/// Makes a `PO` store's file a chunk longer where its size is a trap ([`exception_store::sound`]). Longer, not shorter:
/// of a store that was in use, the last chunk may hold data. It stays so whatever comes of the snapshot.
fn mend_size<H: Host>(
    host: &H,
    cow: &mut Backing<'_, H::File>,
    options: &SnapshotOptions,
) -> Result<Option<Warning>> {
    let bytes = cow.facts.size_bytes;
    let sound = exception_store::sound_from(bytes, options.store, options.chunk);
    if options.store != Store::PersistentOverflow || sound == Some(bytes) {
        return Ok(None);
    }
    let path = || cow.path.to_owned();
    let sound_bytes = sound.ok_or_else(|| Refusal::CowTooLarge { path: path() })?;
    if cow.facts.kind != FileKind::Regular {
        return Err(Refusal::CowSizeTrap {
            path: path(),
            bytes,
            sound_bytes,
        }
        .into());
    }
    ask(Step::SizeFile, cow.path, || {
        host.size_file(&cow.file, sound_bytes, false)
    })?;
    cow.facts.size_bytes = sound_bytes;
    Ok(Some(Warning::CowLengthened { bytes, sound_bytes }))
}

/// What no snapshot and no merge takes as a COW file, whatever it holds.
pub(crate) fn admit_file<F, O>(cow: &Backing<'_, F>, origin: &Backing<'_, O>) -> Result<()> {
    let path = || cow.path.to_owned();
    if cow.facts.id == origin.facts.id {
        return Err(Refusal::SameFile {
            origin: origin.path.to_owned(),
            cow: path(),
        }
        .into());
    }
    if cow.facts.kind == FileKind::Regular && cow.facts.mode & 0o222 == 0 {
        return Err(Refusal::CowReadOnly {
            path: path(),
            mode: cow.facts.mode,
        }
        .into());
    }
    Ok(())
}

/// Says whether the store is to be marked.
fn admit_cow<H: Host, O>(
    host: &H,
    cow: &Backing<'_, H::File>,
    locked: Result<()>,
    origin: &Backing<'_, O>,
    options: &SnapshotOptions,
) -> Result<bool> {
    let path = || cow.path.to_owned();
    let needed = exception_store::least_bytes(options.store, options.chunk);
    if cow.facts.size_bytes < needed {
        let (bytes, chunk) = (cow.facts.size_bytes, options.chunk);
        return Err(Refusal::CowTooSmall {
            path: path(),
            bytes,
            chunk,
            needed,
        }
        .into());
    }
    in_use(locked, || Refusal::CowInUse { path: path() })?;
    if cow.facts.links == 0 {
        return Err(Refusal::CowUnlinked { path: path() }.into());
    }
    check_store(host, cow, origin, options)
}

fn open<H: Host>(
    host: &H,
    path: &Path,
    writable: bool,
    in_use: impl FnOnce() -> Refusal,
) -> Result<H::File> {
    match ask(Step::OpenFile, path, || host.open_file(path, writable)) {
        Err(error) if error.verdict() == Some(Verdict::NotAFile) => Err(Refusal::NotAFile {
            path: path.to_owned(),
            kind: "a directory",
        }
        .into()),
        Err(error) if error.verdict() == Some(Verdict::InUse) => Err(in_use().into()),
        opened => opened,
    }
}

fn inspect<'a, H: Host>(host: &H, path: &'a Path, file: H::File) -> Result<Backing<'a, H::File>> {
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
/// same file, gets a COW file that a snapshot has. What is inspected afterwards is not changed by who takes locks.
pub(crate) fn lock<H: Host>(host: &H, path: &Path, file: &H::File, exclusive: bool) -> Result<()> {
    patiently(host, &LOCK_RETRY, Verdict::InUse, || {
        ask(Step::LockFile, path, || host.lock_file(file, exclusive))
    })
}

/// The lock of a killed maker's, or of a deferred removal's, loop device is dropped a moment after the device is gone:
/// the kernel puts the file off (`delayed_fput`), and a probing udev may be the last to close the node.
const LOCK_RETRY: Retry = Retry::until(Duration::from_secs(1));

pub(crate) fn in_use(locked: Result<()>, refusal: impl FnOnce() -> Refusal) -> Result<()> {
    match locked {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Err(refusal().into()),
        locked => locked,
    }
}

/// What the files' sizes are worth a warning for.
pub(crate) fn note_sizes(
    options: &SnapshotOptions,
    length: Sectors,
    origin: &FileFacts,
    cow: &FileFacts,
) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if origin.size_bytes % SECTOR_BYTES != 0 {
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
    warnings
}

/// Reads a COW file through the seam.
pub(crate) struct Reader<'a, H: Host> {
    host: &'a H,
    cow: &'a Backing<'a, H::File>,
    at: u64,
}

impl<'a, H: Host> Reader<'a, H> {
    pub(crate) fn of(host: &'a H, cow: &'a Backing<'a, H::File>) -> Self {
        Self { host, cow, at: 0 }
    }
}

impl<H: Host> Read for Reader<'_, H> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Behind the last offset of any file there is nothing.
        let Ok(at) = usize::try_from(self.at) else {
            return Ok(0);
        };
        let length = self.host.read_at(&self.cow.file, buffer, at)?;
        self.at = self.at.saturating_add(length as u64);
        Ok(length)
    }
}

impl<H: Host> Seek for Reader<'_, H> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.cow.facts.size_bytes.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or(Errno::EINVAL)?;
        Ok(self.at)
    }
}
