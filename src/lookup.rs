//! Finding one of our dm devices by what a caller calls it, and a live snapshot with the files behind it.

use std::path::{Path, PathBuf};

use crate::ask::{absent, ask};
use crate::dm_message::Address;
use crate::error::{Result, Step};
use crate::host::{FileFacts, Host};
use crate::loop_device::LoopStatus;
use crate::mapper::{Device, MAPPER_CONTROL};
use crate::name::{DeviceName, DeviceNumber, MAPPER_DIR};
use crate::policy::Verdict;
use crate::refusal::Refusal;
use crate::status::SnapshotStatus;
use crate::table::{SnapshotParams, Target};
use crate::uuid::DeviceUuid;

/// Our device of that name or uuid.
///
/// # Errors
///
/// [`Verdict::Gone`] when there is none, [`Refusal::NotOurs`] when the name is another program's device.
pub(crate) fn find<H: Host>(host: &H, text: &str) -> Result<(Device, DeviceUuid)> {
    let uuid = DeviceUuid::new(text).ok();
    let name = DeviceName::new(text);
    if let (None, Err(refusal)) = (&uuid, &name) {
        return Err(refusal.clone().into());
    }
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    if let Some(uuid) = uuid {
        if let Some(found) = absent(ours(host, Address::Uuid(uuid.as_str()), text))? {
            return Ok(found);
        }
    }
    ours(host, Address::Name(name?.as_str()), text)
}

/// The device at `address`, which `name` stands for in messages, if it is ours.
pub(crate) fn ours<H: Host>(
    host: &H,
    address: Address<'_>,
    name: &str,
) -> Result<(Device, DeviceUuid)> {
    let path = Path::new(MAPPER_DIR).join(name);
    let device = ask(Step::Query, &path, || host.query(address))?;
    match DeviceUuid::new(device.uuid.as_str()) {
        Ok(uuid) => Ok((device, uuid)),
        Err(_) => Err(Refusal::NotOurs {
            name: device.name,
            uuid: device.uuid,
        }
        .into()),
    }
}

/// A live snapshot, with the loop device of its COW file open: from here on the binding cannot change hands.
pub(crate) struct Live<L> {
    pub(crate) device: Device,
    pub(crate) uuid: DeviceUuid,
    pub(crate) params: SnapshotParams,
    pub(crate) status: SnapshotStatus,
    pub(crate) cow: Bound<L>,
}

/// A loop device, open, and what it is bound to.
pub(crate) struct Bound<L> {
    pub(crate) node: PathBuf,
    /// The backing file's path, as the kernel has it.
    pub(crate) path: PathBuf,
    pub(crate) device: L,
    pub(crate) status: LoopStatus,
}

/// The live snapshot of that name or uuid.
pub(crate) fn live<H: Host>(host: &H, text: &str) -> Result<Live<H::Loop>> {
    let (device, uuid) = find(host, text)?;
    let path = Path::new(MAPPER_DIR).join(&device.name);
    let not_live = || Refusal::NotLive {
        name: device.name.clone(),
    };
    let table = ask(Step::Status, &path, || host.live_table(&uuid))?;
    let Some(Ok(Target::Snapshot(params))) = table.map(|(kind, text)| Target::parse(&kind, &text))
    else {
        return Err(not_live().into());
    };
    let cow = bound(host, params.cow)?;
    // The uuid still has a live table now, so the loop device was held by it when it was opened, and is the one meant.
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
    let (node, path) = ask(Step::InspectLoop, &sysfs, || host.backing_of(number))?;
    // For reading: its close wakes no udev watch.
    let device = ask(Step::InspectLoop, &node, || host.open_loop(&node, false))?;
    let status = ask(Step::InspectLoop, &node, || host.loop_status(&device))?;
    Ok(Bound {
        node,
        path,
        device,
        status,
    })
}

/// Opens the file behind a loop device by the path that the kernel has for it, and makes sure that it is the one.
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
