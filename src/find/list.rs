//! What there is: our snapshots, read from the kernel's state alone.

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

/// One of our snapshots, as the kernel has it now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// The dm device's name.
    pub name: String,
    /// Its uuid.
    pub uuid: DeviceUuid,
    /// Its number.
    pub dev: DeviceNumber,
    /// `/dev/dm-N`, which nobody renames.
    pub device: PathBuf,
    /// How far it got.
    pub state: State,
    /// Whether it merges its COW file into its image: [`MergeOptions`](crate::merge::MergeOptions) made it, and the kernel
    /// goes on even if the process that did is dead.
    pub merging: bool,
    /// Whether it goes at its last close.
    pub deferred_remove: bool,
    /// Whether a killed process left it half-way, suspended for example, so that its guest hangs:
    /// [`repair`](crate::repair()) it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub interrupted: bool,
    /// How many users have it open.
    pub open_count: u32,
    /// Store and chunk size; `None` without a table, or with one that is no snapshot's.
    pub params: Option<SnapshotParams>,
    /// What the loop device of the origin is bound to.
    pub origin: Option<LoopFacts>,
    /// What the loop device of the COW file is bound to.
    pub cow: Option<LoopFacts>,
    /// What the kernel says of it; `None` without a live table, and in the moment in which a checkpoint swaps the table.
    pub status: Option<SnapshotStatus>,
}

/// How far a snapshot got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum State {
    /// Created, and never given a table: left by a process that died.
    NoTable,
    /// Given a table, and never resumed: left by a process that died.
    Loaded,
    /// Working.
    Live,
    /// Holding back all I/O.
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
    /// The backing file's path, as the kernel has it: with ` (deleted)` behind it once it is unlinked.
    #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::known"))]
    pub path: Option<PathBuf>,
    /// The backing file's identity.
    pub backing: Option<FileId>,
    /// The number of this binding (Linux 5.15 and later).
    pub diskseq: Option<u64>,
    /// Where in the backing file the device begins, and how much of it it shows at most (0: all); both 0 for ours.
    pub part_bytes: Option<[u64; 2]>,
    /// Whether it detaches itself when nobody uses it any more.
    pub autoclear: Option<bool>,
}

impl SnapshotInfo {
    /// Whole handles, with the identity of everything, from the kernel's state alone.
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
    /// `None` when the device could not be read: a handle that is a number alone would be taken at its word.
    fn handle(&self) -> Option<LoopHandle> {
        let (path, diskseq) = (self.device.clone(), self.diskseq);
        self.backing.map(|backing| LoopHandle {
            path,
            diskseq,
            backing: Some(backing),
        })
    }
}

/// Every snapshot of ours, half-built ones included, in the order of their names.
///
/// A snapshot that cannot be read is an `Err` in the list and hides no other. One that goes away meanwhile is
/// left out.
///
/// # Errors
///
/// [`Error::Failed`] when device-mapper cannot be asked at all.
pub fn list() -> Result<Vec<Result<SnapshotInfo>>> {
    Ok(ours(&MACHINE)?.into_iter().map(|(_, info)| info).collect())
}

/// What there is of one snapshot.
///
/// # Errors
///
/// [`Error::Failed`] of kind [`Gone`](crate::ErrorKind::Gone) when there is no such device, [`Error::Refused`] when it is none of ours.
pub fn status(device: impl Into<DeviceId>) -> Result<SnapshotInfo> {
    status_of(&MACHINE, &device.into())
}

/// As [`status`].
pub(crate) fn status_of<H: Host>(host: &H, device: &DeviceId) -> Result<SnapshotInfo> {
    let (device, uuid) = lookup::find(host, device)?;
    read(host, device, uuid).map(|read| read.info)
}

/// Our devices by name, each with what could be read of it.
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
    let known = devices.into_iter().filter_map(|device| {
        let address = match &device.uuid {
            Some(uuid) if !uuid.starts_with(DeviceUuid::PREFIX) => return None,
            Some(uuid) => Address::Uuid(uuid),
            None => Address::Name(&device.name),
        };
        match look(host, address, &device.name) {
            Err(Error::Refused(Refusal::NotOurs { .. })) => None,
            Err(error) if error.verdict() == Some(Verdict::Gone) => None,
            info => Some((device.name, info)),
        }
    });
    Ok(known.collect())
}

fn look<H: Host>(host: &H, address: Address<'_>, name: &str) -> Result<Read> {
    let path = Path::new(MAPPER_DIR).join(name);
    let (device, uuid) = lookup::ours(host, address, &path)?;
    read(host, device, uuid)
}

fn read<H: Host>(host: &H, device: Device, uuid: DeviceUuid) -> Result<Read> {
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
    let half_way = (devices.is_some() || uuid.kind() == Kind::Layer)
        && is_half_way(host, &device, &uuid, &path)?;
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
        origin: devices.and_then(|[origin, _]| loop_facts(host, origin)),
        cow: devices.and_then(|[_, cow]| loop_facts(host, cow)),
        params,
        status: status.and_then(|(_, text)| {
            let Ok(status) = text.parse();
            // A checkpoint takes the old table's exceptions away before the new one is swapped in.
            let swapping = device.inactive_table && status == SnapshotStatus::Invalid;
            (!swapping).then_some(status)
        }),
    };
    if half_way && !at_work::in_progress(host, &info, &Retry::ONCE)? {
        // Whoever was at work may just have come to the end.
        let query = || host.query(Address::Uuid(info.uuid.as_str()));
        let now = absent(ask(Step::Query, &path, query))?;
        let tables = |device: &Device| (device.suspended, device.live_table, device.inactive_table);
        info.interrupted = now.is_some_and(|now| tables(&now) == tables(&device));
    }
    let origin = devices.map(|[origin, _]| origin);
    Ok(Read { info, origin })
}

/// Whether the device is between two steps of something: a snapshot that is suspended or has a second table, a layer
/// that is suspended or has none yet.
fn is_half_way<H: Host>(host: &H, device: &Device, uuid: &DeviceUuid, path: &Path) -> Result<bool> {
    if uuid.kind() == Kind::Layer {
        return Ok(device.suspended || !device.live_table);
    }
    if !device.live_table || device.suspended || !device.inactive_table {
        return Ok(device.live_table && device.suspended);
    }
    let next = ask(Step::Status, path, || host.table(DevId::Uuid(uuid), true))?;
    Ok(next.is_some_and(|(kind, _)| kind == "snapshot"))
}

/// `None` when the device is no loop device.
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
