//! Opens, inspects and locks an image or a COW file, before any device is touched.

use std::path::Path;

use super::{CowOptions, check_identity};
use crate::base::{OriginIdentity, SECTOR_BYTES};
use crate::call::{ask, patiently};
use crate::error::{Refusal, Result, Step, Verdict};
use crate::kernel::{FileFacts, FileKind, Host};
use crate::store::Chain;

/// An image or COW file that was inspected. Its lock is held as long as it is open here or attached to a loop device.
pub(crate) struct Backing<'a, F> {
    pub(crate) path: &'a Path,
    pub(crate) file: F,
    pub(crate) facts: FileFacts,
    /// The place in the stack of what is made over it, if it is an origin that is a layer.
    pub(crate) above: Option<Chain>,
}

impl<F> Backing<'_, F> {
    pub(crate) fn identity(&self) -> OriginIdentity {
        self.facts.identity()
    }
}

/// Opens the origin image with a shared lock: nobody can use it as a COW file, or merge into it, while it is held.
pub(crate) fn open_origin<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &CowOptions,
) -> Result<Backing<'a, H::File>> {
    let origin = open_locked_origin(host, path, false, options)?;
    check_identity(
        path,
        origin.identity(),
        options.expected_origin,
        options.any_origin,
    )?;
    Ok(origin)
}

/// Opens the origin image with a shared lock, or writable with an exclusive one, which fails while a snapshot over the
/// image is alive.
pub(crate) fn open_locked_origin<'a, H: Host>(
    host: &H,
    path: &'a Path,
    writable: bool,
    options: &CowOptions,
) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::OriginInUse {
        path: path.to_owned(),
    };
    let file = open(host, path, writable, in_use_by)?;
    let locked = lock(host, path, &file, writable, options);
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

/// Opens a COW file for reading, with a lock that keeps snapshots from using it meanwhile.
pub(crate) fn open_store<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &CowOptions,
) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::CowInUse {
        path: path.to_owned(),
    };
    let file = open(host, path, false, in_use_by)?;
    let locked = lock(host, path, &file, false, options);
    let cow = inspect(host, path, file)?;
    in_use(locked, in_use_by)?;
    Ok(cow)
}

/// Opens a COW file for reading without a lock, as a live snapshot has it locked.
pub(crate) fn open_unlocked<'a, H: Host>(host: &H, path: &'a Path) -> Result<Backing<'a, H::File>> {
    open_cow_file(host, path, false)
}

/// Opens a COW file that is not to be locked yet.
pub(crate) fn open_cow_file<'a, H: Host>(
    host: &H,
    path: &'a Path,
    writable: bool,
) -> Result<Backing<'a, H::File>> {
    let in_use_by = || Refusal::CowInUse {
        path: path.to_owned(),
    };
    inspect(host, path, open(host, path, writable, in_use_by)?)
}

pub(super) fn open<H: Host>(
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

/// Opens a COW file that is to be emptied. It follows no symbolic link, so that no other file is emptied.
pub(super) fn open_replaced<H: Host>(host: &H, path: &Path) -> Result<H::File> {
    let kind = |kind| Refusal::NotAFile {
        path: path.to_owned(),
        kind,
    };
    let in_use = || Refusal::CowInUse {
        path: path.to_owned(),
    };
    let opened = ask(Step::OpenFile, path, || host.open_replaced(path));
    opened.map_err(|error| match error.verdict() {
        Some(Verdict::SymbolicLink) => kind("a symbolic link").into(),
        Some(Verdict::NotAFile) => kind("a directory").into(),
        Some(Verdict::InUse) => in_use().into(),
        _ => error,
    })
}

pub(super) fn inspect<'a, H: Host>(
    host: &H,
    path: &'a Path,
    file: H::File,
) -> Result<Backing<'a, H::File>> {
    let facts = ask(Step::InspectFile, path, || host.inspect_file(&file))?;
    match facts.kind {
        FileKind::Other(kind) => Err(Refusal::NotAFile {
            path: path.to_owned(),
            kind,
        }
        .into()),
        _ => Ok(Backing {
            path,
            file,
            facts,
            above: None,
        }),
    }
}

/// Locks the file (`flock`). The loop device that is given the file keeps the lock, so that no other process gets the
/// COW file of a live snapshot, by whatever path. Inspect the file afterwards: nobody who takes locks changes it then.
pub(crate) fn lock<H: Host>(
    host: &H,
    path: &Path,
    file: &H::File,
    exclusive: bool,
    options: &CowOptions,
) -> Result<()> {
    patiently(host, &options.lock_retry(), Verdict::InUse, || {
        ask(Step::LockFile, path, || host.lock_file(file, exclusive))
    })
}

pub(crate) fn in_use(locked: Result<()>, refusal: impl FnOnce() -> Refusal) -> Result<()> {
    match locked {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Err(refusal().into()),
        locked => locked,
    }
}
