//! Makes a snapshot: the steps in their order, and how they are undone.
//!
//! Undoing is short by construction. Loop devices are attached with autoclear in the same call that binds them,
//! so closing a descriptor detaches them, and so does a SIGKILL; only the dm device has to be removed.

use std::path::{Path, PathBuf};

use super::build::{
    Destination, LiveDevice, MappedDevice, OriginDevice, build, check_target, settle, undone,
};
use super::{Base, Origin, Snapshot, SnapshotOptions};
use crate::backing::{
    Backing, Cow, Evidence, Warning, attach, check_identity, content, loop_length, open_cow,
    open_origin, unmake,
};
use crate::base::{DeviceName, Handles, Kind, SectorSize};
use crate::call::{ask, spans};
use crate::error::{Error, Refusal, Result, Step, Verdict};
use crate::kernel::{FileKind, Host, LOOP_CONTROL, MACHINE, MAPPER_CONTROL};
use crate::kernel::{LO_AUTOCLEAR, LO_READ_ONLY};

impl SnapshotOptions {
    /// Makes the snapshot `name` over `origin`, with its writes in `cow`, and brings it live.
    ///
    /// `origin` is attached read-only and `cow` read-write, each to a free loop device that clears itself when its
    /// last user is gone. Both may be regular files or block devices. Bytes of the image behind its last whole
    /// 512-byte sector are not visible to the guest ([`Warning::OriginTail`](crate::Warning::OriginTail)).
    ///
    /// A COW file of a size at which the kernel invalidates a full `PO` store is made a chunk longer, and stays so
    /// ([`Warning::CowLengthened`](crate::Warning::CowLengthened)); a block device of such a size is refused.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](crate::Error::Refused) for bad input, before any device is touched; the guide has the
    /// [refusals by kind](crate::guide::errors#what-is-refused). A file that somebody else
    /// has locked is tried again for a second: a lock that is being dropped may take that long.
    /// [`Error::Failed`](crate::Error::Failed) names the first step that failed; nothing is left behind.
    /// [`Error::Debris`](crate::Error::Debris) lists what is left, if undoing failed too.
    pub fn create(
        &self,
        origin: impl AsRef<Path>,
        cow: impl AsRef<Path>,
        name: &str,
    ) -> Result<Snapshot> {
        let name = DeviceName::given(name)?;
        create(&MACHINE, self, origin.as_ref(), cow.as_ref(), &name)
    }

    /// Does what [`create`](Self::create) does, over an image that is attached already, for control planes that make
    /// many disks over one image. [`cleanup`](crate::cleanup) leaves the origin's loop device to its other users.
    ///
    /// # Errors
    ///
    /// Those of [`create`](Self::create).
    pub fn create_on(
        &self,
        origin: &Origin,
        cow: impl AsRef<Path>,
        name: &str,
    ) -> Result<Snapshot> {
        let name = DeviceName::given(name)?;
        create_on(&MACHINE, self, &origin.0, cow.as_ref(), &name)
    }
}

/// Makes a snapshot over an image of its own and brings it live, or leaves nothing.
pub(crate) fn create<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &Path,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let _span = spans::create(origin, cow, name);
    open_controls(host)?;
    check_target(host, options)?;
    let origin = open_origin(host, origin, &options.cow)?;
    check_sectors(options, &origin)?;
    let evidence = Evidence {
        given: options.cow.digest,
        take: &|| content(host, &origin),
        marks: origin.identity().is_undated(),
    };
    let cow = open_cow(host, cow, &origin, evidence, &options.cow)?;

    let mut handles = Handles {
        origin: Some(origin.identity()),
        ..Handles::default()
    };
    let mut attached = || -> Result<_> {
        let flags = LO_READ_ONLY | LO_AUTOCLEAR;
        let origin_loop = attach(
            host,
            &origin,
            flags,
            SectorSize::Bytes512,
            origin.path,
            &mut handles.origin_loop,
        )?;
        let length = loop_length(host, &origin_loop)?;
        let origin_device = OriginDevice {
            facts: &origin.facts,
            device: origin_loop.dev,
            length,
            above: None,
        };
        let kind = Kind::Own;
        let destination = Destination::New { name, kind };
        let built = build(
            host,
            options,
            &origin_device,
            &cow,
            &destination,
            &mut handles,
        )?;
        linked(host, options, built)
    };
    let built = attached();
    finish(host, options, &cow, built, handles)
}

/// Makes a snapshot over an image that is attached already.
pub(crate) fn create_on<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    base: &Base<H::Loop>,
    cow: &Path,
    name: &DeviceName,
) -> Result<Snapshot> {
    let _span = spans::create(base.image().path, cow, name);
    open_controls(host)?;
    let (cow, mut handles) = prepare(host, options, base, cow)?;
    let mut live = || -> Result<_> {
        let kind = Kind::Shared;
        let destination = Destination::New { name, kind };
        let built = build(
            host,
            options,
            &base.over(),
            &cow,
            &destination,
            &mut handles,
        )?;
        linked(host, options, built)
    };
    let built = live();
    if built.is_ok() {
        handles.origin_loop.clone_from(&base.handle);
    }
    finish(host, options, &cow, built, handles)
}

/// The COW file of a snapshot over an attached image, and the handles to fill.
pub(crate) fn prepare<'a, H: Host>(
    host: &H,
    options: &SnapshotOptions,
    base: &Base<H::Loop>,
    cow: &'a Path,
) -> Result<(Cow<'a, H::File>, Handles)> {
    check_target(host, options)?;
    let image = base.image();
    let (expected, any) = (options.cow.expected_origin, options.cow.any_origin);
    check_identity(image.path, image.identity(), expected, any)?;
    check_sectors(options, &image)?;
    check_unchanged(host, &image)?;
    let handles = Handles {
        origin: Some(image.identity()),
        ..Handles::default()
    };
    let take = || Ok(base.content());
    let evidence = base.evidence(&take, options.cow.digest);
    let cow = open_cow(host, cow, &image, evidence, &options.cow)?;
    Ok((cow, handles))
}

/// Refuses a disk whose sectors are larger than what it is made of.
fn check_sectors<F>(options: &SnapshotOptions, origin: &Backing<'_, F>) -> Result<()> {
    let sector_bytes = options.sector_size.bytes();
    let chunk = options.cow.chunk;
    if chunk.sectors().to_bytes().unwrap_or(u64::MAX) < u64::from(sector_bytes) {
        return Err(Refusal::ChunkUnderSector {
            chunk,
            sector_bytes,
        }
        .into());
    }
    let bytes = origin.facts.size_bytes;
    if options.sector_size != SectorSize::default() && bytes % u64::from(sector_bytes) != 0 {
        return Err(Refusal::OriginPartSector {
            path: origin.path.to_owned(),
            bytes,
            sector_bytes,
        }
        .into());
    }
    Ok(())
}

/// Refuses an image that was written in place since it was attached: what a COW file is marked with would be what it
/// was. Another file under its path says nothing of the one that is attached.
fn check_unchanged<H: Host>(host: &H, image: &Backing<'_, ()>) -> Result<()> {
    if image.facts.kind != FileKind::Regular {
        return Ok(());
    }
    match ask(Step::InspectFile, image.path, || {
        host.look(image.path, true)
    }) {
        Ok(found) if found.id == image.facts.id => {
            check_identity(image.path, found.identity(), Some(image.identity()), false)
        }
        Err(error) if error.verdict() != Some(Verdict::Missing) => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn open_controls<H: Host>(host: &H) -> Result<()> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })
}

/// The path to the device, and what is worth knowing. An alias that cannot be made is that only, where the device has
/// a node.
fn linked<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    mut built: LiveDevice<H::Loop>,
) -> Result<(PathBuf, Vec<Warning>)> {
    let mut warnings = std::mem::take(&mut built.warnings);
    let made = &built.made;
    warnings.extend(settle(host, options, made));
    let node = host.find_node(made.dev);
    let make = || host.make_alias(&made.mapper, made.dev, node.as_deref());
    match (ask(Step::Link, &made.mapper, make), node) {
        (Ok(()), node) => Ok((node.unwrap_or_else(|| made.mapper.clone()), warnings)),
        (Err(error), Some(node)) => {
            warnings.push(Warning::NoAlias {
                alias: made.mapper.clone(),
                errno: error.errno().unwrap_or_default(),
            });
            Ok((node, warnings))
        }
        (Err(error), None) => Err(error.noted("this /dev does not get the kernel's nodes")),
    }
}

/// Makes the device's alias. The path that leads to it without that, where /dev has one.
pub(crate) fn link<H: Host>(host: &H, made: &MappedDevice) -> Result<PathBuf> {
    let node = host.find_node(made.dev);
    ask(Step::Link, &made.mapper, || {
        host.make_alias(&made.mapper, made.dev, node.as_deref())
    })?;
    Ok(node.unwrap_or_else(|| made.mapper.clone()))
}

/// A snapshot, or what undoing it left.
fn finish<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    cow: &Cow<'_, H::File>,
    built: Result<(PathBuf, Vec<Warning>)>,
    mut handles: Handles,
) -> Result<Snapshot> {
    match built {
        Ok((device, warnings)) => {
            handles.device = Some(device);
            Ok(Snapshot::of(handles, warnings))
        }
        Err(error) => Err(unbuilt(host, options, cow, error, &handles)),
    }
}

/// A failure after the COW file was opened or made, with what undoing left.
pub(crate) fn unbuilt<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    cow: &Cow<'_, H::File>,
    error: Error,
    handles: &Handles,
) -> Error {
    let error = undone(host, error, handles);
    if options.cow.make.is_some() {
        unmake(host, error, cow.backing.path, cow.backing.facts.id)
    } else {
        error
    }
}
