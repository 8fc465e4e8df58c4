//! What a COW file holds, and over which image that may be used.

use std::path::Path;

use super::half_merged::is_half_merged;
use super::{Backing, CowOptions};
use crate::base::OriginIdentity;
use crate::call::ask;
use crate::error::{Error, Refusal, Result, Step, errno_of};
use crate::kernel::Host;
use crate::store::{self, Header, HeaderFault, PROBE_BYTES, Probe, StoreError, StoreFault};

/// Holds the image against what a store's exceptions were made over.
pub(crate) fn check_identity(
    origin: &Path,
    found: OriginIdentity,
    expected: Option<OriginIdentity>,
    any_origin: bool,
) -> Result<()> {
    match expected {
        Some(expected) if expected != found && !any_origin => {
            let path = origin.to_owned();
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

/// Holds the COW file's first bytes against what is asked for, before the kernel looks at four of them. Says whether
/// the store is to be marked.
pub(crate) fn check_store<H: Host, O>(
    host: &H,
    cow: &Backing<'_, H::File>,
    origin: &Backing<'_, O>,
    options: &CowOptions,
) -> Result<bool> {
    let path = || cow.path.to_owned();
    let probed = probe_store(host, cow);
    if !options.store.is_persistent() {
        return match probed {
            Ok(None) => Ok(false),
            Ok(Some(_)) | Err(Error::Refused(_)) => {
                Err(Refusal::CowNotBlank { path: path() }.into())
            }
            Err(error) => Err(error),
        };
    }
    let Some(header) = probed? else {
        return Ok(true);
    };
    let header = valid(cow, header)?;
    if header.chunk != options.chunk {
        return Err(Refusal::CowChunkSize {
            path: path(),
            found: header.chunk,
            asked: options.chunk,
        }
        .into());
    }
    check_header(origin, cow, &header, options.any_origin)?;
    Ok(header.origin != Some(origin.identity()) || header.merging_into.is_some())
}

/// The header of the store in the COW file; `None` in a blank one.
pub(crate) fn probe_store<H: Host>(host: &H, cow: &Backing<'_, H::File>) -> Result<Option<Header>> {
    let mut start = [0; PROBE_BYTES];
    let length = read(host, cow, &mut start, 0)?;
    let path = cow.path.to_owned();
    let refusal = match store::probe(&start[..length]) {
        Probe::Blank if is_blank_further_on(host, cow)? => return Ok(None),
        Probe::Store(header) => return Ok(Some(header)),
        Probe::Damaged(HeaderFault { field, value }) => Refusal::CowDamaged { path, field, value },
        Probe::Blank | Probe::Foreign => Refusal::CowForeign { path },
    };
    Err(refusal.into())
}

pub(crate) fn valid<F>(cow: &Backing<'_, F>, header: Header) -> Result<Header> {
    match header.valid {
        true => Ok(header),
        false => Err(Refusal::CowInvalid {
            path: cow.path.to_owned(),
        }
        .into()),
    }
}

/// Holds the image against what the store was made over, or is half merged into.
pub(crate) fn check_header<O, F>(
    origin: &Backing<'_, O>,
    cow: &Backing<'_, F>,
    header: &Header,
    any_origin: bool,
) -> Result<()> {
    if is_half_merged(&origin.facts, &cow.facts, header) {
        return Ok(());
    }
    check_identity(origin.path, origin.identity(), header.origin, any_origin)
}

/// Whether a file that begins with zeroes goes on with them where file systems that leave their first sectors empty
/// have their signatures: ISO 9660 at 32 KiB, btrfs at 64 KiB. A file without any block, as a fresh COW file is, is not
/// read.
fn is_blank_further_on<H: Host>(host: &H, cow: &Backing<'_, H::File>) -> Result<bool> {
    if !cow.facts.has_blocks {
        return Ok(true);
    }
    let mut more = [0; PROBE_BYTES];
    for at in [0x8000, 0x1_0000] {
        let length = read(host, cow, &mut more, at)?;
        if more[..length].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn read<H: Host>(
    host: &H,
    cow: &Backing<'_, H::File>,
    buffer: &mut [u8],
    at: usize,
) -> Result<usize> {
    ask(Step::ReadFile, cow.path, || {
        host.read_at(&cow.file, buffer, at)
    })
}

/// Why a COW file's store is not taken.
pub(crate) fn unsound(path: &Path, error: StoreError) -> Error {
    let path = path.to_owned();
    match error {
        StoreError::Read { source, .. } => Error::failed(Step::ReadFile, path, errno_of(&source)),
        StoreError::Fault(StoreFault::Header { field, value, .. }) => {
            Refusal::CowDamaged { path, field, value }.into()
        }
        StoreError::Fault(StoreFault::Foreign) => Refusal::CowForeign { path }.into(),
        StoreError::Fault(fault) => Refusal::CowUnsound { path, fault }.into(),
    }
}
