//! Makes a COW file for the caller, and removes it again if `create` fails.

use std::path::Path;

use super::cow::{admit_file, open_replaced_cow};
use super::file::{in_use, lock};
use super::{Backing, CowOptions, CowSize};
use crate::base::{FileId, Sectors};
use crate::call::{absent, ask};
use crate::error::{Error, Leftover, Refusal, Result, Step, Verdict};
use crate::kernel::{FileKind, Host};
use crate::store;

/// A COW file that was made.
pub(super) struct Made<'a, F> {
    pub(super) backing: Backing<'a, F>,
    /// How long it is to be once the table is loaded, if it is shorter until then.
    pub(super) grows_to: Option<u64>,
}

/// Makes the COW file and locks it against a second snapshot. With `replace` it empties an existing one instead.
pub(super) fn make<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    size: CowSize,
    origin: &Backing<'_, O>,
    options: &CowOptions,
) -> Result<Made<'a, H::File>> {
    let whole = made_bytes(path, size, origin, options)?;
    let first = first_bytes(path, whole, origin, options)?;
    let file = match ask(Step::MakeFile, path, || host.make_file(path)) {
        Err(error) if options.replace && error.verdict() == Some(Verdict::NameTaken) => {
            empty(host, path, origin, options)?
        }
        made => lock_made(host, path, made?, options)?,
    };
    let sized = ask(Step::SizeFile, path, || {
        host.size_file(&file, first, options.reserve)
    });
    let inspected = ask(Step::InspectFile, path, || host.inspect_file(&file));
    let id = inspected.as_ref().ok().map(|facts| facts.id);
    let facts = sized
        .and(inspected)
        .map_err(|error| unmake(host, error, path, id))?;
    let backing = Backing {
        path,
        file,
        facts,
        above: None,
    };
    Ok(Made {
        backing,
        grows_to: (first < whole).then_some(whole),
    })
}

fn lock_made<H: Host>(
    host: &H,
    path: &Path,
    file: H::File,
    options: &CowOptions,
) -> Result<H::File> {
    match lock(host, path, &file, true, options) {
        Ok(()) => Ok(file),
        // Another snapshot may be given the path before we have the lock: then the file is that one's, and stays.
        Err(error) if error.verdict() == Some(Verdict::InUse) => Err(Refusal::CowInUse {
            path: path.to_owned(),
        }
        .into()),
        Err(error) => Err(unmake(host, error, path, None)),
    }
}

/// Empties the file that is there. A COW file in use, and the image itself, are refused.
fn empty<H: Host, O>(
    host: &H,
    path: &Path,
    origin: &Backing<'_, O>,
    options: &CowOptions,
) -> Result<H::File> {
    let (found, locked) = open_replaced_cow(host, path, options)?;
    let path = || path.to_owned();
    admit_file(&found, origin)?;
    in_use(locked, || Refusal::CowInUse { path: path() })?;
    let refusal = match found.facts.kind {
        FileKind::Regular if found.facts.links > 0 => None,
        FileKind::Regular => Some(Refusal::CowUnlinked { path: path() }),
        _ => Some(Refusal::NotAFile {
            path: path(),
            kind: "a block device",
        }),
    };
    match refusal {
        Some(refusal) => Err(refusal.into()),
        None => ask(Step::SizeFile, found.path, || {
            host.size_file(&found.file, 0, false)
        })
        .map(|()| found.file),
    }
}

/// Removes the COW file that was made before `error` happened, unless a device that remains uses it: the error names the
/// file then, as it takes space. Call this while the file is open, and thus locked.
///
/// If `made` says which file was made, another one that is found under the path is left alone.
pub(crate) fn unmake<H: Host>(
    host: &H,
    error: Error,
    path: &Path,
    made: impl Into<Option<FileId>>,
) -> Error {
    let made = made.into();
    let kept_by = error.left().first().map(|leftover| leftover.error.clone());
    let is_made = || match ask(Step::InspectFile, path, || host.look(path, false)) {
        Err(error) if error.verdict() == Some(Verdict::Missing) => Ok(false),
        found => found.map(|found| made.is_none_or(|made| made == found.id)),
    };
    let unlink = || match is_made() {
        Ok(true) => absent(ask(Step::Unlink, path, || host.unlink(path))).err(),
        Ok(false) => None,
        Err(error) => Some(error),
    };
    match kept_by.or_else(unlink) {
        None => error,
        Some(why) => error.leaving(vec![Leftover::new(path, why)]),
    }
}

fn made_bytes<F>(
    path: &Path,
    size: CowSize,
    origin: &Backing<'_, F>,
    options: &CowOptions,
) -> Result<u64> {
    let (store, chunk, origin_bytes) = (options.store, options.chunk, origin.facts.size_bytes);
    let asked = match size {
        CowSize::Bytes(bytes) => Some(bytes),
        CowSize::Percent(percent) => {
            u64::try_from(u128::from(origin_bytes) * u128::from(percent) / 100).ok()
        }
        CowSize::WorstCase => {
            store::worst_case(Sectors::from_bytes_floor(origin_bytes), store, chunk)
        }
    };
    asked
        .and_then(|bytes| store::sound(bytes, store, chunk))
        .ok_or_else(|| {
            Refusal::CowTooLarge {
                path: path.to_owned(),
            }
            .into()
        })
}

/// How long the file is to be when the table is loaded: the kernel sizes its table of changed chunks by that
/// (`init_hash_tables`), at 8 bytes a chunk. Space that is set aside is set aside at once.
fn first_bytes<F>(
    path: &Path,
    whole: u64,
    origin: &Backing<'_, F>,
    options: &CowOptions,
) -> Result<u64> {
    if options.reserve {
        return Ok(whole);
    }
    let expected = made_bytes(path, options.expected(), origin, options)?;
    Ok(expected.clamp(
        store::least_bytes(options.store, options.chunk).min(whole),
        whole,
    ))
}
