//! Opens or makes a COW file, locks it, and checks that a snapshot or a merge can use it.

use std::path::Path;

use super::check::{Evidence, check_header, check_store, probe_store, thawed, valid};
use super::content::content;
use super::file::{in_use, inspect, lock, open, open_replaced};
use super::make::{self, unmake};
use super::{Attached, Backing, CowOptions, Warning};
use crate::base::Store;
use crate::call::ask;
use crate::error::{LayerRefusal, Refusal, Result, Step};
use crate::kernel::{FileKind, Host};
use crate::store::{self, Chain, Content, Header};

/// A COW file that was opened, locked and checked: a snapshot can use it.
pub(crate) struct Cow<'a, F> {
    pub(crate) backing: Backing<'a, F>,
    /// What is to be written into the store's header, if it does not say yet over which origin it was made.
    pub(crate) mark: Option<Mark>,
    /// Set if the file's size was changed.
    pub(crate) warning: Option<Warning>,
    /// How long it is to be once the table is loaded, if it is shorter until then.
    grows_to: Option<u64>,
}

impl<F> Cow<'_, F> {
    /// How long the file is, or is going to be.
    pub(crate) fn bytes(&self) -> u64 {
        self.grows_to.unwrap_or(self.backing.facts.size_bytes)
    }

    /// Makes the file as long as it is to be, behind its loop device and a table that is loaded. Nobody else knows of it
    /// yet, so it can be sized as it was made: without space for its last byte, which not every file system sets aside.
    pub(crate) fn lengthen<H: Host<File = F>>(
        &self,
        host: &H,
        device: &Attached<H::Loop>,
    ) -> Result<()> {
        let Some(bytes) = self.grows_to else {
            return Ok(());
        };
        ask(Step::SizeFile, self.backing.path, || {
            host.size_file(&self.backing.file, bytes, false)
        })?;
        ask(Step::ResizeLoop, &device.path, || {
            host.resize_loop(&device.device)
        })
    }
}

/// What is written into a store's header about the origin that it is made over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    /// What is known of the origin's content.
    pub(crate) content: Option<Content>,
    /// True if the store is new, with nothing behind its header.
    pub(crate) fresh: bool,
    /// The store's new place in a stack of layers, if that changes.
    pub(crate) chain: Option<Chain>,
}

/// Opens the COW file, or makes it, and locks it against a second snapshot.
pub(crate) fn open_cow<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, O>,
    evidence: Evidence<'_>,
    options: &CowOptions,
) -> Result<Cow<'a, H::File>> {
    let Some(size) = options.make else {
        let (mut backing, locked) = open_made_cow(host, path, options)?;
        admit_file(&backing, origin)?;
        let mark = admit_cow(host, &backing, locked, origin, evidence, options)?;
        let warning = mend_size(host, &mut backing, options)?;
        return Ok(Cow {
            backing,
            mark,
            warning,
            grows_to: None,
        });
    };
    let made = make::make(host, path, size, origin, options)?;
    match admit_cow(host, &made.backing, Ok(()), origin, evidence, options) {
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

/// Opens an existing COW file. The second value is the error if it could not be locked.
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

/// Opens a COW file that is to be emptied. The second value is the error if it could not be locked.
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

/// Opens the COW file for a merge, locked against every snapshot, and returns its header. A store that is invalid, or
/// was made over another origin, is refused.
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
    let evidence = Evidence {
        given: options.digest,
        take: &|| content(host, origin),
        marks: true,
    };
    thawed(&cow, &header)?;
    check_header(origin, &cow, &header, evidence, options.any_origin)?;
    Ok((cow, header))
}

/// Opens and locks a layer's COW file, and returns its place in the stack. One that was made over another origin is
/// refused.
pub(crate) fn open_layer_cow<'a, H: Host, O>(
    host: &H,
    path: &'a Path,
    origin: &Backing<'_, O>,
    evidence: Evidence<'_>,
    options: &CowOptions,
) -> Result<(Backing<'a, H::File>, Header, Chain)> {
    let (cow, locked) = open_made_cow(host, path, options)?;
    admit_file(&cow, origin)?;
    in_use(locked, || Refusal::CowInUse {
        path: path.to_owned(),
    })?;
    let not_frozen = || LayerRefusal::NotFrozen {
        path: path.to_owned(),
    };
    let header = probe_store(host, &cow)?.ok_or_else(not_frozen)?;
    let header = valid(&cow, header)?;
    let chain = header.chain.filter(|chain| chain.id != 0);
    let chain = chain.ok_or_else(not_frozen)?;
    check_header(origin, &cow, &header, evidence, false)?;
    Ok((cow, header, chain))
}

/// Makes a `PO` store's file a chunk longer if its size is one at which the kernel invalidates a full store
/// ([`store::sound`]). It never makes the file shorter, as the last chunk of a used store may hold data. The file keeps
/// its new length even if `create` fails afterwards.
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

/// Refuses files that no snapshot and no merge takes as a COW file, whatever they hold.
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

/// Checks everything about a COW file that was opened. Returns the mark to write into the store, if it needs one.
fn admit_cow<H: Host, O>(
    host: &H,
    cow: &Backing<'_, H::File>,
    locked: Result<()>,
    origin: &Backing<'_, O>,
    evidence: Evidence<'_>,
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
    check_store(host, cow, origin, evidence, options)
}
