//! A COW file before use: opened or made, locked, and held against what a snapshot or a merge can take.

use std::path::Path;

use super::check::{Sample, check_header, check_store, probe_store, thawed, valid};
use super::file::{in_use, inspect, lock, open, open_replaced};
use super::make::{self, unmake};
use super::sample::sample;
use super::{Attached, Backing, CowOptions, Warning};
use crate::base::Store;
use crate::call::ask;
use crate::error::{Refusal, Result, Step};
use crate::kernel::{FileKind, Host};
use crate::store::{self, Chain, Header};

/// A COW file that a snapshot can be made over.
pub(crate) struct Cow<'a, F> {
    pub(crate) backing: Backing<'a, F>,
    /// How the store is to be marked as made over this origin, if it is not.
    pub(crate) mark: Option<Mark>,
    /// What was done to it.
    pub(crate) warning: Option<Warning>,
    /// How long it is to be once the table is loaded, if it is shorter until then.
    grows_to: Option<u64>,
}

impl<F> Cow<'_, F> {
    /// How long the file is, or is going to be.
    pub(crate) fn bytes(&self) -> u64 {
        self.grows_to.unwrap_or(self.backing.facts.size_bytes)
    }

    /// Makes the file as long as it is to be, behind its loop device and a table that is loaded.
    pub(crate) fn lengthen<H: Host<File = F>>(
        &self,
        host: &H,
        device: &Attached<H::Loop>,
    ) -> Result<()> {
        let Some(bytes) = self.grows_to else {
            return Ok(());
        };
        ask(Step::SizeFile, self.backing.path, || {
            host.lengthen_file(&self.backing.file, bytes, false)
        })?;
        ask(Step::ResizeLoop, &device.path, || {
            host.resize_loop(&device.device)
        })
    }
}

/// What is to be noted in a store of the origin that it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    /// The origin's fingerprint.
    pub(crate) sample: Option<u128>,
    /// Whether the store is a new one, with nothing behind its header.
    pub(crate) fresh: bool,
    /// Its place in a stack, where that is to be another one.
    pub(crate) chain: Option<Chain>,
}

/// Opens the COW file, or makes it, and locks it against a second snapshot.
pub(crate) fn open_cow<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, O>,
    sample: Sample<'_>,
    options: &CowOptions,
) -> Result<Cow<'a, H::File>> {
    let Some(size) = options.make else {
        let (mut backing, locked) = open_made_cow(host, path, options)?;
        admit_file(&backing, origin)?;
        let mark = admit_cow(host, &backing, locked, origin, sample, options)?;
        let warning = mend_size(host, &mut backing, options)?;
        return Ok(Cow {
            backing,
            mark,
            warning,
            grows_to: None,
        });
    };
    let made = make::make(host, path, size, origin, options)?;
    match admit_cow(host, &made.backing, Ok(()), origin, sample, options) {
        Ok(mark) => Ok(Cow {
            backing: made.backing,
            mark,
            warning: None,
            grows_to: made.grows_to,
        }),
        // `made` is still open here, and with it locked.
        Err(error) => Err(unmake(host, error, path, made.backing.facts.id)),
    }
}

/// Opens a COW file that is there; says whether it could be locked.
pub(crate) fn open_made_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Result<()>)> {
    let file = open(host, path, true, || Refusal::CowInUse {
        path: path.to_owned(),
    })?;
    locked(host, path, file, options)
}

/// The same of a file that is to be emptied.
pub(super) fn open_replaced_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Result<()>)> {
    locked(host, path, open_replaced(host, path)?, options)
}

fn locked<'a, H: Host>(
    host: &H,
    path: &'a Path,
    file: H::File,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Result<()>)> {
    let locked = lock(host, path, &file, true, options);
    Ok((inspect(host, path, file)?, locked))
}

/// Opens the COW file for a merge, locked against every snapshot, with its header: a valid store's, made over this
/// origin.
pub(crate) fn open_merged_cow<'a, H: Host>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, H::File>,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Header)> {
    let (cow, locked) = open_made_cow(host, path, options)?;
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
    let fingerprint = Sample {
        take: &|| sample(host, origin),
        marks: true,
    };
    thawed(&cow, &header)?;
    check_header(origin, &cow, &header, fingerprint, options.any_origin)?;
    Ok((cow, header))
}

/// Opens a layer's COW file, locked as every other, with its place in the stack: what was made over this origin.
pub(crate) fn open_layer_cow<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, O>,
    sample: Sample<'_>,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Header, Chain)> {
    let (cow, locked) = open_made_cow(host, path, options)?;
    admit_file(&cow, origin)?;
    in_use(locked, || Refusal::CowInUse {
        path: path.to_owned(),
    })?;
    let not_frozen = || Refusal::CowNotFrozen {
        path: path.to_owned(),
    };
    let header = probe_store(host, &cow)?.ok_or_else(not_frozen)?;
    let header = valid(&cow, header)?;
    let chain = header.chain.filter(|chain| chain.id != 0);
    let chain = chain.ok_or_else(not_frozen)?;
    check_header(origin, &cow, &header, sample, false)?;
    Ok((cow, header, chain))
}

/// Makes a `PO` store's file a chunk longer where its size is a trap ([`store::sound`]). Longer, not shorter:
/// of a store that was in use, the last chunk may hold data. It stays so whatever comes of the snapshot.
fn mend_size<H: Host>(
    host: &H,
    cow: &mut Backing<'_, H::File>,
    options: &CowOptions,
) -> Result<Option<Warning>> {
    let bytes = cow.facts.size_bytes;
    let sound = store::sound_from(bytes, options.store, options.chunk);
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
    if cow.facts.read_only {
        return Err(Refusal::CowDeviceReadOnly { path: path() }.into());
    }
    Ok(())
}

/// Says whether the store is to be marked.
fn admit_cow<H: Host, O>(
    host: &H,
    cow: &Backing<'_, H::File>,
    locked: Result<()>,
    origin: &Backing<'_, O>,
    sample: Sample<'_>,
    options: &CowOptions,
) -> Result<Option<Mark>> {
    let path = || cow.path.to_owned();
    let needed = store::least_bytes(options.store, options.chunk);
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
    check_store(host, cow, origin, sample, options)
}
