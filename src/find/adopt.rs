//! Takes over a snapshot that another program made.

use super::list::{LoopFacts, SnapshotInfo, State, loop_facts, status_of};
use crate::base::{DeviceId, DeviceName, DeviceUuid, Handles, Kind, OriginIdentity, loop_number};
use crate::call::ask;
use crate::dm::Target;
use crate::error::{AdoptObstacle, Error, Refusal, Result, Step};
use crate::kernel::{DevId, Host, MACHINE};

/// Returns complete handles of a live snapshot, read from the kernel: for a control plane that has lost them, or kept
/// only a name.
///
/// A snapshot that another program (`dmsetup`) made over two loop devices, and that has no uuid, is taken over: it gets
/// a uuid of dmsnap's, and its loop devices are set to detach when it is removed. From then on it is listed, reaped and
/// cleaned up like any other.
///
/// # Errors
///
/// Those of [`status`](crate::status); [`Refusal::NotOurs`] for a device that has another program's uuid,
/// [`Refusal::NotAdoptable`] with the reason for one that is no snapshot over two loop devices, [`Refusal::NotLive`]
/// for one of dmsnap's that is half-made or suspended. No device is changed on an error of these.
pub fn adopt(device: impl Into<DeviceId>) -> Result<Handles> {
    adopt_on(&MACHINE, &device.into())
}

pub(crate) fn adopt_on<H: Host>(host: &H, device: &DeviceId) -> Result<Handles> {
    let info = match status_of(host, device) {
        Err(Error::Refused(Refusal::NotOurs { name, uuid })) if uuid.is_empty() => {
            take_over(host, &DeviceName::new(name)?)?
        }
        found => found?,
    };
    if info.state != State::Live || info.params.is_none() {
        return Err(Refusal::NotLive { name: info.name }.into());
    }
    detach_with(host, &info)?;
    Ok(info.handles())
}

/// Gives the device a uuid of dmsnap's. Everything is checked before the device is changed.
fn take_over<H: Host>(host: &H, name: &DeviceName) -> Result<SnapshotInfo> {
    let path = name.mapper_path();
    let refused = |why| Refusal::NotAdoptable {
        name: name.to_string(),
        why,
    };
    let table = || ask(Step::Status, &path, || host.table(DevId::Name(name), false));
    let Some(line) = table()? else {
        return Err(refused(AdoptObstacle::NoLiveTable).into());
    };
    let params = match Target::parse(&line.0, &line.1) {
        Ok(Target::Snapshot(params)) => params,
        _ => {
            let target = line.0;
            return Err(refused(AdoptObstacle::Target { target }).into());
        }
    };
    let number = params.origin;
    let origin = loop_facts(host, number);
    let origin = origin.ok_or_else(|| refused(AdoptObstacle::OriginNotALoop { number }))?;
    let number = params.cow;
    let cow = loop_facts(host, number);
    let cow = cow.ok_or_else(|| refused(AdoptObstacle::CowNotALoop { number }))?;
    let cow_loop = loop_number(&cow.device);
    let cow_loop = cow_loop.ok_or_else(|| refused(AdoptObstacle::CowNotALoop { number }))?;
    // While they are open, no other file can be attached to them. What was read before is read again.
    let _open = [&origin, &cow].map(|facts| host.open_loop(&facts.device, false));
    let now = [params.origin, params.cow].map(|number| loop_facts(host, number));
    if table()?.as_ref() != Some(&line) || now != [Some(origin.clone()), Some(cow)] {
        return Err(refused(AdoptObstacle::TableChanged).into());
    }
    let random = ask(Step::Random, &path, || host.random())?;
    let unknown = OriginIdentity {
        size_bytes: 0,
        mtime_ns: 0,
    };
    let identity = origin_identity(host, &origin).unwrap_or(unknown);
    let uuid = DeviceUuid::fresh(random, identity, cow_loop, Kind::Adopted);
    ask(Step::SetUuid, &path, || host.set_uuid(name, &uuid))?;
    status_of(host, &DeviceId::from(&uuid))
}

/// Sets autoclear on a snapshot's loop devices, so that they detach when it is removed: `LOOP_CLR_FD` on a device that
/// the dm table holds does just that. If the process is killed before this, the next [`adopt`] of the snapshot does it.
fn detach_with<H: Host>(host: &H, info: &SnapshotInfo) -> Result<()> {
    for facts in [&info.origin, &info.cow].into_iter().flatten() {
        if facts.autoclear != Some(false) {
            continue;
        }
        let device = ask(Step::OpenLoop, &facts.device, || {
            host.open_loop(&facts.device, true)
        });
        let detached = device.and_then(|device| {
            ask(Step::DetachLoop, &facts.device, || {
                host.detach_loop(&device)
            })
        });
        detached.map_err(|error| {
            error.noted("the snapshot is adopted, and this loop device will outlive it")
        })?;
    }
    Ok(())
}

/// Returns the origin image's present size and time, if it still is at the path that the kernel has for it.
fn origin_identity<H: Host>(host: &H, origin: &LoopFacts) -> Option<OriginIdentity> {
    let file = host.open_file(origin.path.as_deref()?, false).ok()?;
    let facts = host.inspect_file(&file).ok()?;
    (Some(facts.id) == origin.backing).then(|| facts.identity())
}
