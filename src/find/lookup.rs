//! Finds one of dmsnap's dm devices by name, uuid, number or path, and the files behind a live snapshot.

use std::path::{Path, PathBuf};

use super::select::select;
use crate::base::{DeviceId, DeviceNumber, DeviceUuid, Kind, MAPPER_DIR};
use crate::call::ask;
use crate::dm::{Address, SnapshotParams, SnapshotStatus, Target};
use crate::error::{Error, Refusal, Result, Step, Verdict, policy};
use crate::kernel::{DevId, Device, FileFacts, Host, LoopStatus, MAPPER_CONTROL};

/// Finds the device of dmsnap's that `id` means.
///
/// # Errors
///
/// [`Verdict::Gone`] if there is none, [`Refusal::NotOurs`] if another program made it.
pub(crate) fn find<H: Host>(host: &H, id: &DeviceId) -> Result<(Device, DeviceUuid)> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    let path = match id {
        DeviceId::Path(path) => path.clone(),
        other => Path::new(MAPPER_DIR).join(other.to_string()),
    };
    match select(host, id)? {
        Some(key) => ours(host, key.address(), &path),
        None => Err(Error::failed(Step::Query, path, policy::GONE)),
    }
}

/// Finds the device like [`find`], but refuses a pool's uuid: the pool's device keeps it while it serves one snapshot
/// after another, so it names none of them.
pub(crate) fn find_snapshot<H: Host>(host: &H, id: &DeviceId) -> Result<(Device, DeviceUuid)> {
    let (device, uuid) = find(host, id)?;
    match id {
        DeviceId::Uuid(asked) if uuid.kind() == Kind::Pooled && device.name != *asked => {
            let uuid = uuid.to_string();
            Err(Refusal::PooledUuid { uuid }.into())
        }
        _ => Ok((device, uuid)),
    }
}

/// Fails unless the device of that uuid still has that name: a pool's device has another name for each snapshot.
pub(crate) fn still<H: Host>(host: &H, uuid: &DeviceUuid, name: &str) -> Result<()> {
    let path = Path::new(MAPPER_DIR).join(name);
    ask(Step::Query, &path, || {
        let device = host.query(Address::Uuid(uuid.as_str()))?;
        let another = uuid.kind() == Kind::Pooled && device.name != name;
        if another { Err(policy::GONE) } else { Ok(()) }
    })
}

/// Returns the device at `address` if dmsnap made it. Messages name it by `path`.
pub(crate) fn ours<H: Host>(
    host: &H,
    address: Address<'_>,
    path: &Path,
) -> Result<(Device, DeviceUuid)> {
    let device = ask(Step::Query, path, || host.query(address))?;
    match DeviceUuid::new(device.uuid.as_str()) {
        Ok(uuid) => Ok((device, uuid)),
        Err(_) => Err(Refusal::NotOurs {
            name: device.name,
            uuid: device.uuid,
        }
        .into()),
    }
}

/// A live snapshot, with the loop device of its COW file open: while it is, no other file can be attached to it.
pub(crate) struct Live<L> {
    pub(crate) device: Device,
    pub(crate) uuid: DeviceUuid,
    pub(crate) params: SnapshotParams,
    pub(crate) status: SnapshotStatus,
    pub(crate) cow: Bound<L>,
}

/// An open loop device and the file that is attached to it.
pub(crate) struct Bound<L> {
    pub(crate) node: PathBuf,
    /// The backing file's path, as the kernel has it.
    pub(crate) path: PathBuf,
    pub(crate) device: L,
    pub(crate) status: LoopStatus,
}

/// Finds the live snapshot that `id` means, and opens its COW file's loop device.
pub(crate) fn live<H: Host>(host: &H, id: &DeviceId) -> Result<Live<H::Loop>> {
    let (device, uuid) = find_snapshot(host, id)?;
    let path = Path::new(MAPPER_DIR).join(&device.name);
    let not_live = || Refusal::NotLive {
        name: device.name.clone(),
    };
    let table = ask(Step::Status, &path, || {
        host.table(DevId::Uuid(&uuid), false)
    })?;
    let Some(Ok(Target::Snapshot(params))) = table.map(|(kind, text)| Target::parse(&kind, &text))
    else {
        return Err(not_live().into());
    };
    let cow = bound(host, params.cow)?;
    if uuid.kind() == Kind::Pooled {
        still(host, &uuid, &device.name)?;
    }
    // The uuid still has a live table, so that table held the loop device when it was opened: it is the right one.
    let status = ask(Step::Status, &path, || host.status(&uuid))?;
    let (_, text) = status.ok_or_else(not_live)?;
    let Ok(status) = text.parse();
    Ok(Live {
        device,
        uuid,
        params,
        status,
        cow,
    })
}

/// Opens the loop device of that number.
pub(crate) fn bound<H: Host>(host: &H, number: DeviceNumber) -> Result<Bound<H::Loop>> {
    let sysfs = PathBuf::from(format!("/sys/dev/block/{number}"));
    let node = ask(Step::InspectLoop, &sysfs, || host.loop_node_of(number))?;
    let path = ask(Step::InspectLoop, &sysfs, || host.backing_path(number))?;
    // Opened for reading, so that its close does not wake udev's watch.
    let device = ask(Step::InspectLoop, &node, || host.open_loop(&node, false))?;
    let status = ask(Step::InspectLoop, &node, || host.loop_status(&device))?;
    Ok(Bound {
        node,
        path,
        device,
        status,
    })
}

/// Refuses a loop device that shows only a part of its file (an offset or a size limit), as callers read, write and
/// lengthen the file itself.
pub(crate) fn whole<L>(bound: &Bound<L>) -> Result<()> {
    let status = &bound.status;
    whole_file(
        &bound.node,
        &bound.path,
        [status.offset_bytes, status.limit_bytes],
    )
}

/// Does what [`whole`] does, for an offset and a size limit in bytes.
pub(crate) fn whole_file(device: &Path, path: &Path, part: [u64; 2]) -> Result<()> {
    match part {
        [0, 0] => Ok(()),
        [offset_bytes, limit_bytes] => Err(Refusal::PartOfFile {
            device: device.to_owned(),
            path: path.to_owned(),
            offset_bytes,
            limit_bytes,
        }
        .into()),
    }
}

/// Opens the file behind a loop device by the path that the kernel has for it, and checks that it is the same file.
pub(crate) fn reach<H: Host>(
    host: &H,
    bound: &Bound<H::Loop>,
    name: &str,
    writable: bool,
) -> Result<(H::File, FileFacts)> {
    let path = &bound.path;
    let elsewhere = || Refusal::FileElsewhere {
        name: name.to_owned(),
        path: path.clone(),
    };
    let opened = ask(Step::OpenFile, path, || host.open_backing(path, writable));
    let file = match opened {
        Err(error) if error.verdict() == Some(Verdict::Missing) => return Err(elsewhere().into()),
        opened => opened?,
    };
    let facts = ask(Step::InspectFile, path, || host.inspect_file(&file))?;
    if facts.id == bound.status.backing {
        Ok((file, facts))
    } else {
        Err(elsewhere().into())
    }
}
