//! Builds the dm device of a snapshot from its attached parts: creates, loads and resumes it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::SnapshotOptions;
use crate::backing::{Attached, Backing, Cow, Mark, Warning, attach, note_sizes};
use crate::base::{
    DeviceName, DeviceNumber, DeviceUuid, Durability, Handles, Kind, OriginIdentity, Sectors,
};
use crate::call::{ask, end_flushes, patiently};
use crate::dm::{Discard, SnapshotParams, Target, TargetLine};
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict};
use crate::kernel::{FileFacts, FileKind, Host, MAPPER_CONTROL, TargetVersion};
use crate::kernel::{LO_AUTOCLEAR, LO_DIRECT_IO};
use crate::store::{self, CHAIN_AT, CONTENT_AT, Chain, MARK_AT};
use crate::teardown;

/// The origin as a device: the image, and the loop device that serves it.
pub(crate) struct OriginDevice<'a> {
    /// The image as it was inspected.
    pub(crate) facts: &'a FileFacts,
    pub(crate) device: DeviceNumber,
    pub(crate) length: Sectors,
    /// The place in the stack of what is made over a layer.
    pub(crate) above: Option<Chain>,
}

/// The dm device that a snapshot's table is loaded into.
pub(crate) enum Destination<'a> {
    New {
        name: &'a DeviceName,
        kind: Kind,
    },
    /// One that exists and has a table that nobody uses.
    Recycled(&'a MappedDevice),
}

/// A live dm device that has no alias yet.
pub(crate) struct LiveDevice<L> {
    pub(crate) made: MappedDevice,
    pub(crate) warnings: Vec<Warning>,
    /// The COW file's loop device, locked as long as this value lives. Without the lock, a `reap` by another process
    /// takes the device for abandoned.
    _lock: Attached<L>,
}

/// Attaches the COW file, loads the snapshot's table and resumes it; [`settle`] is still to come. `handles` names at any
/// moment what there is to undo.
pub(crate) fn build<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    origin: &OriginDevice<'_>,
    cow: &Cow<'_, H::File>,
    destination: &Destination<'_>,
    handles: &mut Handles,
) -> Result<LiveDevice<H::Loop>> {
    let whole = cow;
    let Cow {
        backing: cow,
        mark,
        warning,
        ..
    } = whole;
    if let Destination::Recycled(made) = destination {
        made.note(handles);
    }
    let direct_io = if options.direct_io { LO_DIRECT_IO } else { 0 };
    let flags = LO_AUTOCLEAR | direct_io;
    let cow_loop = attach(
        host,
        cow,
        flags,
        options.sector_size,
        cow.path,
        &mut handles.cow_loop,
    )?;
    let mut warnings = note_sizes(&options.cow, origin.length, origin.facts, whole.bytes());
    warnings.extend(warning.clone());
    if options.direct_io {
        let status = || host.loop_status(&cow_loop.device);
        if !ask(Step::InspectLoop, &cow_loop.path, status)?.direct_io {
            warnings.push(Warning::DirectIoUnavailable);
        }
    }

    let discard = if !options.discard {
        Discard::Unsupported
    } else if takes_holes(host, cow)? {
        Discard::ZeroesCow
    } else {
        warnings.push(Warning::DiscardUnavailable);
        Discard::Unsupported
    };
    let params = SnapshotParams {
        origin: origin.device,
        cow: cow_loop.dev,
        store: options.cow.store,
        chunk: options.cow.chunk,
        discard,
    };
    let line = TargetLine {
        start: Sectors::default(),
        length: origin.length,
        target: Target::Snapshot(params),
    };

    let identity = origin.facts.identity();
    let made = match destination {
        Destination::New { name, kind } => {
            make_device(host, name, identity, *kind, &cow_loop, &line, handles)?
        }
        Destination::Recycled(made) => {
            load(host, made, &line)?;
            (*made).clone()
        }
    };
    whole.lengthen(host, &cow_loop)?;
    if let Some(mark) = mark {
        write_mark(host, cow, identity, origin.above, mark)?;
    }
    ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
    Ok(LiveDevice {
        made,
        warnings,
        _lock: cow_loop,
    })
}

/// Has the guest's flushes end at the live device, unless they are wanted, and warns if they do not. A hypervisor may read
/// the setting when it opens the device, which nobody knows of yet.
///
/// From Linux 6.11 on, the write to sysfs freezes the queue (`queue_attr_store`, block/blk-sysfs.c), which takes a grace
/// period of RCU.
pub(crate) fn settle<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    made: &MappedDevice,
) -> Option<Warning> {
    if options.named_durability() == Durability::PowerCuts {
        return None;
    }
    let error = end_flushes(host, made.dev, &made.mapper).err()?;
    let errno = error.errno().unwrap_or_default();
    Some(Warning::FlushesKept { errno })
}

/// Ties the store to its origin. The kernel has written the header by now, and does not write it again while the store
/// is valid.
fn write_mark<H: Host>(
    host: &H,
    cow: &Backing<'_, H::File>,
    origin: OriginIdentity,
    above: Option<Chain>,
    mark: &Mark,
) -> Result<()> {
    let write = |bytes: &[u8], at| {
        ask(Step::MarkFile, cow.path, || {
            host.write_at(&cow.file, bytes, at)
        })
    };
    let first = store::mark(origin, None);
    let second = mark.content.map(|content| store::content(origin, content));
    if mark.fresh {
        let (whole, length) = store::marks(first, above.map(store::chain), second);
        return write(&whole[..length], MARK_AT);
    }
    if let Some(chain) = mark.chain {
        write(&store::chain(chain), CHAIN_AT)?;
    }
    let Some(second) = second else {
        return write(&first, MARK_AT);
    };
    // What is between the two stays. Torn apart, the second one is void.
    write(&second, CONTENT_AT)?;
    write(&first, MARK_AT)
}

/// Whether a discard of the guest's can become a hole in the COW file: asked for behind its end.
fn takes_holes<H: Host>(host: &H, cow: &Backing<'_, H::File>) -> Result<bool> {
    if cow.facts.kind != FileKind::Regular {
        return Ok(true);
    }
    let punch = || host.try_punch(&cow.file, cow.facts.size_bytes);
    match ask(Step::PunchHole, cow.path, punch) {
        Err(error) if error.verdict() == Some(Verdict::Unsupported) => Ok(false),
        punched => punched.map(|()| true),
    }
}

/// A dm device that dmsnap made.
#[derive(Clone, Debug)]
pub(crate) struct MappedDevice {
    pub(crate) name: DeviceName,
    pub(crate) uuid: DeviceUuid,
    /// `/dev/mapper/<name>`, whether or not it exists.
    pub(crate) mapper: PathBuf,
    pub(crate) dev: DeviceNumber,
}

impl MappedDevice {
    /// Returns the same device under the name that it was given since.
    pub(crate) fn named(self, name: &DeviceName) -> Self {
        Self {
            mapper: name.mapper_path(),
            name: name.clone(),
            ..self
        }
    }

    pub(crate) fn handles(&self) -> Handles {
        let mut handles = Handles::default();
        self.note(&mut handles);
        handles
    }

    pub(super) fn note(&self, handles: &mut Handles) {
        handles.name = Some(self.name.clone());
        handles.dev = Some(self.dev);
        handles.mapper = Some(self.mapper.clone());
        handles.uuid = Some(self.uuid.clone());
    }
}

/// Creates the dm device and loads its one table line.
pub(crate) fn make_device<H: Host>(
    host: &H,
    name: &DeviceName,
    origin: OriginIdentity,
    kind: Kind,
    cow_loop: &Attached<H::Loop>,
    line: &TargetLine,
    handles: &mut Handles,
) -> Result<MappedDevice> {
    let mapper = name.mapper_path();
    let random = ask(Step::Random, &mapper, || host.random())?;
    let uuid = DeviceUuid::fresh(random, origin, cow_loop.number, kind);
    let dev =
        ask(Step::Create, &mapper, || host.create(name, &uuid)).map_err(|error| {
            match error.verdict() {
                Some(Verdict::NameTaken) => {
                    error.noted("there is a dm device of that name already")
                }
                _ => error,
            }
        })?;
    let made = MappedDevice {
        name: name.clone(),
        uuid,
        mapper,
        dev,
    };
    made.note(handles);
    load(host, &made, line)?;
    Ok(made)
}

/// Loads a table line into the device's inactive slot.
pub(crate) fn load<H: Host>(host: &H, made: &MappedDevice, line: &TargetLine) -> Result<()> {
    patiently(host, &LOAD_RETRY, Verdict::Exhausted, || {
        ask(Step::Load, &made.mapper, || host.load(&made.uuid, line))
    })
    .map_err(|error| explain_load(host, error))
}

/// Undoes what the handles name, and returns the failure with what could not be undone.
pub(crate) fn undone<H: Host>(host: &H, error: Error, handles: &Handles) -> Error {
    match teardown::clean(host, handles, &UNDO_RETRY) {
        Err(Error::Debris { left, .. }) => error.leaving(left),
        _ => error,
    }
}

/// Says why a table was refused: the kernel has no snapshot target, or only the kernel log knows more.
fn explain_load<H: Host>(host: &H, error: Error) -> Error {
    match target_version(host) {
        Err(missing) if missing.verdict() == Some(Verdict::Unsupported) => missing,
        _ => error.noted("the kernel log has the target's reason"),
    }
}

/// How long undoing waits for a busy device. Nobody knows the device yet, so only a probe can hold it, and not for
/// long.
const UNDO_RETRY: Retry = Retry::until(Duration::from_secs(2));

/// How long a load is tried again. Where several stores are read back at once, 6.1 and 6.12 were seen to answer ENOMEM:
/// one load creates the slab of its buffers while another one destroys it. Real shortage of memory lasts longer.
const LOAD_RETRY: Retry = Retry::until(Duration::from_millis(500)).sparing();

/// Refuses options that contradict each other, or that this kernel's snapshot target does not have.
pub(crate) fn check_target<H: Host>(host: &H, options: &SnapshotOptions) -> Result<()> {
    options.check_durability()?;
    if !options.discard {
        return Ok(());
    }
    let (chunk, sector_bytes) = (options.cow.chunk, u64::from(options.sector_size.bytes()));
    if chunk.bytes() != sector_bytes && !options.trust_discards {
        return Err(Refusal::DiscardUnaligned {
            chunk,
            sector_bytes,
        }
        .into());
    }
    let version = target_version(host)?;
    if version.target < [1, 16, 0] {
        let [major, minor, patch] = version.target;
        let version = format!("{major}.{minor}.{patch}");
        let feature = "discard_zeroes_cow (1.16.0)";
        return Err(Refusal::TargetLacks { version, feature }.into());
    }
    if version.interface_minor > LAST_SOUND_DISCARD
        && options.cow.chunk.sectors() < SOUND_DISCARD_CHUNK
    {
        return Err(Refusal::DiscardChunk {
            chunk: options.cow.chunk,
        }
        .into());
    }
    Ok(())
}

/// The last dm interface seen to take discards with chunks of any size. Linux 7.3.4 (interface 50) divides by zero in
/// `blk_stack_limits` when such a table is loaded, whoever loads it: the snapshot target states its discard granularity
/// in sectors where the block layer reads bytes. What lies between was not tried.
const LAST_SOUND_DISCARD: u32 = 48;

/// The least chunk at which 7.3.4 was seen to survive: its number of sectors, read as bytes, is a whole sector.
const SOUND_DISCARD_CHUNK: Sectors = Sectors::new(512);

fn target_version<H: Host>(host: &H) -> Result<TargetVersion> {
    let asked = ask(Step::TargetVersion, Path::new(MAPPER_CONTROL), || {
        host.target_version()
    });
    asked.map_err(|error| match error.verdict() {
        Some(Verdict::Unsupported) => error.noted("dm-snapshot is neither loaded nor loadable"),
        _ => error,
    })
}
