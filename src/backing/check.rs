//! Checks what a COW file holds, and that it was made over the given image.

use std::path::Path;

use super::cow::Mark;
use super::half_merged::is_half_merged;
use super::{Backing, CowOptions, Reader};
use crate::base::{Digest, OriginIdentity};
use crate::call::ask;
use crate::error::{Error, LayerRefusal, Refusal, Result, Step, errno_of};
use crate::kernel::Host;
use crate::store::{
    self, BLANK_BYTES, Chain, Content, ExceptionStore, Header, HeaderFault, PROBE_BYTES, Probe,
    StoreError, StoreFault,
};

/// Refuses an image of another size or modification time than `expected`, unless `any_origin` takes it.
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

/// Checks the COW file's header against the options: the kernel itself looks at four bytes of it. Returns the mark to
/// write into the store, if it needs one.
pub(crate) fn check_store<H: Host, O>(
    host: &H,
    cow: &Backing<'_, H::File>,
    origin: &Backing<'_, O>,
    evidence: Evidence<'_>,
    options: &CowOptions,
) -> Result<Option<Mark>> {
    let path = || cow.path.to_owned();
    let probed = probe_store(host, cow);
    if !options.store.is_persistent() {
        return match probed {
            Ok(None) => Ok(None),
            Ok(Some(_)) | Err(Error::Refused(_)) => {
                Err(Refusal::CowNotBlank { path: path() }.into())
            }
            Err(error) => Err(error),
        };
    }
    let Some(header) = probed? else {
        return Ok(Some(Mark {
            content: evidence.for_a_new_store()?,
            fresh: true,
            chain: None,
        }));
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
    thawed(cow, &header)?;
    check_header(origin, cow, &header, evidence, options.any_origin)?;
    if header.origin.is_none() && !options.any_origin && !options.known_origin {
        check_unmarked(host, origin, cow)?;
    }
    // A checkpoint that was cut off had named this file as a layer's. It is written from now on, so that name goes. Or some
    // of the layers that were below it are one by now.
    let depth = origin.above.map_or(0, |above| above.depth);
    let now = header.chain.map(|chain| Chain {
        id: 0,
        depth,
        ..chain
    });
    let chain = now.filter(|now| header.chain != Some(*now));
    let same = header.origin == Some(origin.identity()) && header.merging_into.is_none();
    let known = header.content.unwrap_or_default();
    let unmarked = known.with(evidence.given) != known;
    if same && chain.is_none() && !unmarked {
        return Ok(None);
    }
    let known = if same { known } else { (evidence.take)()? };
    Ok(Some(Mark {
        content: some(known.with(evidence.given)),
        fresh: false,
        chain,
    }))
}

/// Reads the header of the store in the COW file; `None` if the file is blank.
pub(crate) fn probe_store<H: Host>(host: &H, cow: &Backing<'_, H::File>) -> Result<Option<Header>> {
    let mut start = [0; PROBE_BYTES];
    let length = read(host, cow, &mut start, 0)?;
    let path = cow.path.to_owned();
    let refusal = match store::probe(&start[..length]) {
        Probe::Blank => match data_further_on(host, cow)? {
            None => return Ok(None),
            Some(at) => Refusal::CowHeadless { path, at },
        },
        Probe::Store(header) => return Ok(Some(header)),
        Probe::Damaged(HeaderFault { field, value }) => Refusal::CowDamaged { path, field, value },
        Probe::Foreign => Refusal::CowForeign { path },
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

/// Refuses a layer's COW file: one more write to it would destroy the disks that were made over the layer.
pub(crate) fn thawed<F>(cow: &Backing<'_, F>, header: &Header) -> Result<()> {
    if header.chain.is_some_and(|chain| chain.frozen) {
        let path = cow.path.to_owned();
        return Err(LayerRefusal::Frozen { path }.into());
    }
    Ok(())
}

/// Finds out what an image holds when that is needed, and says whether new stores are marked with it.
#[derive(Clone, Copy)]
pub(crate) struct Evidence<'a> {
    /// The caller's digest of it.
    pub(crate) given: Option<Digest>,
    pub(crate) take: &'a dyn Fn() -> Result<Content>,
    /// True if a new store is marked with what the image holds: it is known already, or the image's modification time is
    /// a whole second and thus no evidence. Otherwise a `create` saves the time of reading the image.
    pub(crate) marks: bool,
}

impl Evidence<'_> {
    /// Of what is known by other means: nothing is asked, and no new store is marked.
    pub(crate) const NONE: Evidence<'static> = Evidence {
        given: None,
        take: &|| Ok(Content::default()),
        marks: false,
    };

    fn for_a_new_store(&self) -> Result<Option<Content>> {
        let content = self.marks.then(self.take).transpose()?;
        Ok(some(content.unwrap_or_default().with(self.given)))
    }

    /// True if the image holds what the store was made over, by the caller's digest; `None` without one in both.
    fn given_for(&self, then: Content) -> Option<bool> {
        Content::default().with(self.given).has_digest_of(&then)
    }

    /// The same by whatever tells most.
    fn is_for(&self, then: Content) -> Result<Option<bool>> {
        match self.given_for(then) {
            None if then == Content::default() => Ok(None),
            None => (self.take)().map(|now| now.is_that_of(&then)),
            given => Ok(given),
        }
    }
}

fn some(content: Content) -> Option<Content> {
    Some(content).filter(|content| *content != Content::default())
}

/// Refuses an image that the store was neither made over nor half merged into. It compares the caller's digest, if there
/// is one; without, size and modification time, and what the image holds if those differ or are no evidence.
pub(crate) fn check_header<O, F>(
    origin: &Backing<'_, O>,
    cow: &Backing<'_, F>,
    header: &Header,
    evidence: Evidence<'_>,
    any_origin: bool,
) -> Result<()> {
    let parent = header.chain.map_or(0, |chain| chain.parent);
    if parent != origin.above.map_or(0, |above| above.parent) {
        let (cow, origin) = (cow.path.to_owned(), origin.path.to_owned());
        return Err(LayerRefusal::Foreign { cow, origin }.into());
    }
    if origin.above.is_some() {
        // A layer is known by its id, which no other device has.
        return Ok(());
    }
    if any_origin || is_half_merged(&origin.facts, &cow.facts, header) {
        return Ok(());
    }
    let found = origin.identity();
    let content = header.content.filter(|_| header.merging_into.is_none());
    let content = content.unwrap_or_default();
    let same_content = || evidence.is_for(content);
    match header.origin {
        Some(then) if then == found => {
            let same = if found.is_undated() {
                same_content()?
            } else {
                evidence.given_for(content)
            };
            if same == Some(false) {
                let path = origin.path.to_owned();
                return Err(Refusal::OriginDiffers { path }.into());
            }
            Ok(())
        }
        // The image is a copy with the same content.
        Some(then) if then.size_bytes == found.size_bytes && same_content()? == Some(true) => {
            Ok(())
        }
        expected => check_identity(origin.path, found, expected, false),
    }
}

/// Refuses a store that does not say what it was made over, unless nothing in it has changed: then it is as good over
/// this image as over any other.
pub(crate) fn check_unmarked<H: Host, O>(
    host: &H,
    origin: &Backing<'_, O>,
    cow: &Backing<'_, H::File>,
) -> Result<()> {
    if origin.above.is_some() {
        return Ok(());
    }
    let unsound = |error| unsound(cow.path, error);
    let mut store = ExceptionStore::open(Reader::of(host, cow)).map_err(unsound)?;
    let extents = store.changed_extents().map_err(unsound)?;
    extents.last().map_or(Ok(()), |last| {
        Err(Refusal::OriginUnknown {
            origin: origin.path.to_owned(),
            bytes: origin.facts.size_bytes,
            cow: cow.path.to_owned(),
            end_bytes: last.origin_end(),
        }
        .into())
    })
}

/// Returns the offset of the first byte that is not zero in a file that begins with zeroes, looking as far as the
/// signatures of file systems and RAIDs that leave their first sectors empty: md 1.2, bcache and bcachefs at 4 KiB, ZFS
/// at 16 KiB, ISO 9660 at 32 KiB, swap up to 64 KiB, btrfs behind that. A file without any allocated block, such as a
/// new sparse one, is not read.
fn data_further_on<H: Host>(host: &H, cow: &Backing<'_, H::File>) -> Result<Option<u64>> {
    if !cow.facts.has_blocks {
        return Ok(None);
    }
    let mut more = vec![0; BLANK_BYTES - PROBE_BYTES];
    let length = read(host, cow, &mut more, PROBE_BYTES)?;
    let blocks = more[..length].chunks(PROBE_BYTES);
    let at = (PROBE_BYTES as u64..).step_by(PROBE_BYTES);
    let blank = |block: &[u8]| [0; PROBE_BYTES].starts_with(block);
    Ok(blocks
        .zip(at)
        .find(|(block, _)| !blank(block))
        .map(|(_, at)| at))
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

/// Turns a fault that was found in a COW file's store into the error for the caller.
pub(crate) fn unsound(path: &Path, error: StoreError) -> Error {
    let path = path.to_owned();
    match error {
        StoreError::Read { source, .. } => Error::failed(Step::ReadFile, path, errno_of(&source)),
        StoreError::Fault(StoreFault::Header { field, value, .. }) => {
            Refusal::CowDamaged { path, field, value }.into()
        }
        StoreError::Fault(StoreFault::Headless { offset: at }) => {
            Refusal::CowHeadless { path, at }.into()
        }
        StoreError::Fault(StoreFault::Foreign) => Refusal::CowForeign { path }.into(),
        StoreError::Fault(fault) => Refusal::CowUnsound { path, fault }.into(),
    }
}
