//! Lists dmsnap's snapshots from the kernel's state alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{at_work, lookup};
#[cfg(feature = "serde")]
use crate::base::lossy;
use crate::base::{
    DeviceId, DeviceName, DeviceNumber, DeviceUuid, FileId, Handles, Kind, LoopHandle, MAPPER_DIR,
};
use crate::call::{absent, ask};
use crate::dm::{Address, SnapshotParams, SnapshotStatus, Target};
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict};
use crate::kernel::{DevId, Device, Host, MACHINE, MAPPER_CONTROL};

/// The state of one of dmsnap's snapshots, as the kernel has it now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// The dm device's name.
    pub name: String,
    /// The dm device's uuid.
    pub uuid: DeviceUuid,
    /// The dm device's number (major and minor).
    pub dev: DeviceNumber,
    /// The dm device's node, `/dev/dm-N`, which stays the same when the device is renamed.
    pub device: PathBuf,
    /// How far its making got, or that it is suspended.
    pub state: State,
    /// True if the device merges its COW file into its image. [`MergeOptions`](crate::merge::MergeOptions) made it; the
    /// kernel goes on even if the process that asked for it is dead.
    pub merging: bool,
    /// True if the kernel removes the device when its last user closes it.
    pub deferred_remove: bool,
    /// True if a killed process left the device in the middle of an operation, for example suspended, so that its guest
    /// hangs; and for a layer that a snapshot stands on, if it was not made to its end or has no data for it.
    /// [`repair`](crate::repair()) lets it go on.
    #[cfg_attr(feature = "serde", serde(default))]
    pub interrupted: bool,
    /// How many users have it open.
    pub open_count: u32,
    /// The parameters of its snapshot table (store, chunk size, devices); `None` if it has no table or another one.
    pub params: Option<SnapshotParams>,
    /// The origin's loop device; `None` if the origin is another device, or there is no table.
    pub origin: Option<LoopFacts>,
    /// The COW file's loop device; `None` if the COW device is another one, or there is no table.
    pub cow: Option<LoopFacts>,
    /// The snapshot's status line; `None` without a live table, and while a checkpoint swaps the table.
    pub status: Option<SnapshotStatus>,
}

/// The state of a snapshot's dm device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum State {
    /// The device was created and never got a table: the process that made it died, or is still at it.
    NoTable,
    /// The device got a table and was never resumed: the process that made it died, or is still at it.
    Loaded,
    /// The disk works.
    Live,
    /// The device holds back all I/O.
    Suspended,
}

/// A loop device and the file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LoopFacts {
    /// `/dev/loopN`.
    #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::path"))]
    pub device: PathBuf,
    /// The backing file's path, as the kernel has it, with ` (deleted)` at its end if the file has been unlinked.
    #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::known"))]
    pub path: Option<PathBuf>,
    /// The backing file's identity: its file system's device and its inode.
    pub backing: Option<FileId>,
    /// The device's `diskseq`, a number that is new each time a file is attached (Linux 5.15 and later).
    pub diskseq: Option<u64>,
    /// The device's offset in the backing file and its size limit (0: none), in bytes; both are 0 for dmsnap's own.
    pub part_bytes: Option<[u64; 2]>,
    /// True if the kernel detaches the file when nobody has the device open any more.
    pub autoclear: Option<bool>,
}

impl SnapshotInfo {
    /// Returns true for a layer, which snapshots may stand on, and false for a disk.
    #[must_use]
    pub fn is_layer(&self) -> bool {
        self.uuid.kind() == Kind::Layer
    }

    /// Returns complete handles, with the identity of each device and file, from what was read here.
    #[must_use]
    pub fn handles(&self) -> Handles {
        let name = DeviceName::new(self.name.as_str()).ok();
        Handles {
            mapper: name.as_ref().map(DeviceName::mapper_path),
            name,
            uuid: Some(self.uuid.clone()),
            dev: Some(self.dev),
            device: Some(self.device.clone()),
            cow_loop: self.cow.as_ref().and_then(LoopFacts::handle),
            origin_loop: self.origin.as_ref().and_then(LoopFacts::handle),
            origin: self.uuid.origin(),
        }
    }
}

impl LoopFacts {
    /// Returns the loop device's handle; `None` if its file's identity could not be read. A handle without that would
    /// match whatever file the device is attached to later.
    fn handle(&self) -> Option<LoopHandle> {
        let (path, diskseq) = (self.device.clone(), self.diskseq);
        self.backing.map(|backing| LoopHandle {
            path,
            diskseq,
            backing: Some(backing),
        })
    }
}

/// Lists all of dmsnap's dm devices on the host, sorted by name: snapshots, also half-made ones, layers, and what pools
/// have ready.
///
/// They are those whose uuid begins with `DMSNAP-`, whichever process made them. A device that cannot be read is an
/// `Err` in the list and hides no other. One that goes away meanwhile is left out.
///
/// # Errors
///
/// [`Error::Failed`] if device-mapper cannot be asked at all.
pub fn list() -> Result<Vec<Result<SnapshotInfo>>> {
    Ok(ours(&MACHINE)?.into_iter().map(|(_, info)| info).collect())
}

/// Returns the state of one of dmsnap's devices.
///
/// # Errors
///
/// [`Error::Failed`] of kind [`Gone`](crate::ErrorKind::Gone) if there is no such device; [`Error::Refused`] if another
/// program made it.
pub fn status(device: impl Into<DeviceId>) -> Result<SnapshotInfo> {
    status_of(&MACHINE, &device.into())
}

/// Does what [`status`] does, on a host.
pub(crate) fn status_of<H: Host>(host: &H, device: &DeviceId) -> Result<SnapshotInfo> {
    let (device, uuid) = lookup::find(host, device)?;
    read(host, device, uuid, &mut Origins::new()).map(|read| read.info)
}

/// Returns dmsnap's devices by name, each with its state or why that could not be read.
pub(crate) fn ours<H: Host>(host: &H) -> Result<Vec<(String, Result<SnapshotInfo>)>> {
    let all = read_all(host)?.into_iter();
    Ok(all
        .map(|(name, read)| (name, read.map(|read| read.info)))
        .collect())
}

/// A device of ours as it was read.
pub(super) struct Read {
    pub(super) info: SnapshotInfo,
    /// What its table stands on.
    pub(super) origin: Option<DeviceNumber>,
}

/// As [`ours`], with what each stands on.
pub(super) fn read_all<H: Host>(host: &H) -> Result<Vec<(String, Result<Read>)>> {
    let control = Path::new(MAPPER_CONTROL);
    ask(Step::OpenMapper, control, || host.open_mapper())?;
    let mut devices = ask(Step::List, control, || host.list())?;
    devices.sort_by(|one, other| one.name.cmp(&other.name));
    let mut origins = Origins::new();
    let known = devices.into_iter().filter_map(|device| {
        let address = match &device.uuid {
            Some(uuid) if !uuid.starts_with(DeviceUuid::PREFIX) => return None,
            Some(uuid) => Address::Uuid(uuid),
            None => Address::Name(&device.name),
        };
        match look(host, address, &device.name, &mut origins) {
            Err(Error::Refused(Refusal::NotOurs { .. })) => None,
            Err(error) if error.verdict() == Some(Verdict::Gone) => None,
            info => Some((device.name, info)),
        }
    });
    Ok(known.collect())
}

/// What the loop devices of shared origins are attached to. They are read once for all that stand on them: each keeps its
/// loop device attached.
type Origins = BTreeMap<DeviceNumber, LoopFacts>;

fn look<H: Host>(
    host: &H,
    address: Address<'_>,
    name: &str,
    origins: &mut Origins,
) -> Result<Read> {
    let path = Path::new(MAPPER_DIR).join(name);
    let (device, uuid) = lookup::ours(host, address, &path)?;
    read(host, device, uuid, origins)
}

/// Returns what the origin's loop device is attached to, from `origins` if it was read before.
fn origin_facts<H: Host>(
    host: &H,
    kind: Kind,
    number: DeviceNumber,
    origins: &mut Origins,
) -> Option<LoopFacts> {
    if !matches!(kind, Kind::Shared | Kind::Pooled) {
        return loop_facts(host, number);
    }
    if let Some(known) = origins.get(&number) {
        return Some(known.clone());
    }
    let facts = loop_facts(host, number)?;
    origins.insert(number, facts.clone());
    Some(facts)
}

fn read<H: Host>(
    host: &H,
    device: Device,
    uuid: DeviceUuid,
    origins: &mut Origins,
) -> Result<Read> {
    let path = Path::new(MAPPER_DIR).join(&device.name);
    let state = match (device.live_table, device.inactive_table) {
        (false, false) => State::NoTable,
        (false, true) => State::Loaded,
        (true, _) if device.suspended => State::Suspended,
        (true, _) => State::Live,
    };
    let table = match state {
        State::NoTable => None,
        _ => ask(Step::Status, &path, || {
            host.table(DevId::Uuid(&uuid), !device.live_table)
        })?,
    };
    let line = table.as_ref();
    let target = line.and_then(|(kind, params)| Target::parse(kind, params).ok());
    let devices = line.and_then(|(kind, params)| SnapshotParams::devices(kind, params));
    let merging = matches!(target, Some(Target::SnapshotMerge(_)));
    let params = target.and_then(|target| match target {
        Target::Snapshot(params) | Target::SnapshotMerge(params) => Some(params),
        _ => None,
    });
    let status = match device.live_table {
        true => ask(Step::Status, &path, || host.status(&uuid))?,
        false => None,
    };
    let invalid = status
        .as_ref()
        .is_some_and(|(_, text)| text.parse() == Ok(SnapshotStatus::Invalid));
    let half_way = match uuid.kind() {
        Kind::Layer => {
            device.suspended || !device.live_table || is_unfinished(host, &device, invalid)
        }
        _ => devices.is_some() && is_half_way(host, &device, &uuid, &path)?,
    };
    let kind = uuid.kind();
    let mut info = SnapshotInfo {
        name: device.name.clone(),
        uuid,
        interrupted: false,
        dev: device.number,
        device: device.number.dm_node(),
        state,
        merging,
        deferred_remove: device.deferred_remove,
        open_count: device.open_count,
        origin: devices.and_then(|[origin, _]| origin_facts(host, kind, origin, origins)),
        cow: devices.and_then(|[_, cow]| loop_facts(host, cow)),
        params,
        status: status.and_then(|(_, text)| {
            let Ok(status) = text.parse();
            // A checkpoint takes the old table's exceptions away before it swaps in the new table.
            let swapping = device.inactive_table && status == SnapshotStatus::Invalid;
            (!swapping).then_some(status)
        }),
    };
    if half_way && !at_work::in_progress(host, &info, &Retry::ONCE)? {
        // The process that was at work may just have finished.
        let query = || host.query(Address::Uuid(info.uuid.as_str()));
        let now = absent(ask(Step::Query, &path, query))?;
        let tables = |device: &Device| (device.suspended, device.live_table, device.inactive_table);
        info.interrupted = now.is_some_and(|now| tables(&now) == tables(&device));
    }
    let origin = devices.map(|[origin, _]| origin);
    Ok(Read { info, origin })
}

/// True if a snapshot stands on the layer, and the layer has no data for it, or nobody said when it is to go.
fn is_unfinished<H: Host>(host: &H, layer: &Device, invalid: bool) -> bool {
    layer.open_count > 0 && (invalid || !is_finished(host, layer))
}

/// True if the checkpoint that made the layer came to its end: the layer will be removed with its last user, or has an
/// alias, as a kept one has.
pub(crate) fn is_finished<H: Host>(host: &H, layer: &Device) -> bool {
    layer.deferred_remove || host.is_our_alias(&Path::new(MAPPER_DIR).join(&layer.name))
}

/// True if the snapshot is in the middle of an operation: it is suspended or has a second table.
fn is_half_way<H: Host>(host: &H, device: &Device, uuid: &DeviceUuid, path: &Path) -> Result<bool> {
    if !device.live_table || device.suspended || !device.inactive_table {
        return Ok(device.live_table && device.suspended);
    }
    let next = ask(Step::Status, path, || host.table(DevId::Uuid(uuid), true))?;
    Ok(next.is_some_and(|(kind, _)| kind == "snapshot"))
}

/// Reads what a loop device is attached to; `None` if the device is no loop device.
pub(super) fn loop_facts<H: Host>(host: &H, number: DeviceNumber) -> Option<LoopFacts> {
    let device = host.loop_node_of(number).ok()?;
    let path = host.backing_path(number).ok();
    let open = host.open_loop(&device, false).ok();
    let status = open.as_ref().and_then(|open| host.loop_status(open).ok());
    let diskseq = open.as_ref().and_then(|open| host.loop_diskseq(open).ok());
    Some(LoopFacts {
        device,
        path,
        backing: status.as_ref().map(|status| status.backing),
        part_bytes: status
            .as_ref()
            .map(|status| [status.offset_bytes, status.limit_bytes]),
        autoclear: status.as_ref().map(|status| status.autoclear),
        diskseq,
    })
}
