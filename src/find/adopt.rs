//! A snapshot that another program made, taken over.

use super::list::{LoopFacts, loop_facts, status_of};
use crate::base::{DeviceId, DeviceName, DeviceUuid, Handles, Kind, OriginIdentity};
use crate::call::ask;
use crate::dm::Target;
use crate::error::{Error, Refusal, Result, Step};
use crate::kernel::{DevId, Host, MACHINE};

/// Whole handles of a live snapshot, so that a control plane that has saved nothing, or only a name, can go on.
///
/// A snapshot that another program made over two loop devices, and that has no uuid, is taken over: its loop devices
/// are set to detach themselves with it, and it is given one of our uuids. From then on it is ours like any other.
///
/// # Errors
///
/// As [`status`](crate::status). [`Refusal::NotOurs`] for a device that has another program's uuid,
/// [`Refusal::NotAdoptable`] for one that is no snapshot over two loop devices. Nothing is changed then.
pub fn adopt(device: impl Into<DeviceId>) -> Result<Handles> {
    adopt_on(&MACHINE, &device.into())
}

pub(crate) fn adopt_on<H: Host>(host: &H, device: &DeviceId) -> Result<Handles> {
    match status_of(host, device) {
        Err(Error::Refused(Refusal::NotOurs { name, uuid })) if uuid.is_empty() => {
            take_over(host, &DeviceName::new(name)?)?;
            status_of(host, device).map(|info| info.handles())
        }
        found => found.map(|info| info.handles()),
    }
}

fn take_over<H: Host>(host: &H, name: &DeviceName) -> Result<()> {
    let path = name.mapper_path();
    let not_adoptable = |why: &str| {
        Error::from(Refusal::NotAdoptable {
            name: name.to_string(),
            why: why.to_owned(),
        })
    };
    let table = ask(Step::Status, &path, || host.table(DevId::Name(name), false))?;
    let params = match table.map(|(kind, text)| (Target::parse(&kind, &text), kind)) {
        Some((Ok(Target::Snapshot(params)), _)) => params,
        Some((_, kind)) => return Err(not_adoptable(&format!("its target is {kind}"))),
        None => return Err(not_adoptable("it has no table")),
    };
    let under = |what, number| {
        let why = || format!("its {what}, {number}, is no loop device");
        loop_facts(host, number).ok_or_else(|| not_adoptable(&why()))
    };
    let (origin, cow) = (
        under("origin", params.origin)?,
        under("COW device", params.cow)?,
    );
    let cow_loop = cow.device.to_string_lossy();
    let cow_loop = cow_loop.strip_prefix("/dev/loop").map(str::parse);
    let Some(Ok(cow_loop)) = cow_loop else {
        return Err(not_adoptable("its COW loop device has no number"));
    };
    let open = |facts: &LoopFacts| {
        ask(Step::OpenLoop, &facts.device, || {
            host.open_loop(&facts.device, true)
        })
    };
    let opened = [(&origin, open(&origin)?), (&cow, open(&cow)?)];
    // Open, they cannot change hands; the same table now means that they are the ones that were opened.
    let again = ask(Step::Status, &path, || host.table(DevId::Name(name), false))?;
    let same = again.map(|(kind, text)| Target::parse(&kind, &text));
    if same != Some(Ok(Target::Snapshot(params))) {
        return Err(not_adoptable("its table changed meanwhile"));
    }
    let random = ask(Step::Random, &path, || host.random())?;
    let unknown = OriginIdentity {
        size_bytes: 0,
        mtime_ns: 0,
    };
    let identity = origin_identity(host, &origin).unwrap_or(unknown);
    let uuid = DeviceUuid::fresh(random, identity, cow_loop, Kind::Own);
    ask(Step::SetUuid, &path, || host.set_uuid(name, &uuid))?;
    // Nothing of theirs was touched up to here. While the dm table holds them, `LOOP_CLR_FD` only sets autoclear.
    for (facts, device) in &opened {
        ask(Step::DetachLoop, &facts.device, || host.detach_loop(device))?;
    }
    Ok(())
}

/// What the origin image is now, if it still is where the kernel says it was.
fn origin_identity<H: Host>(host: &H, origin: &LoopFacts) -> Option<OriginIdentity> {
    let file = host.open_file(origin.path.as_deref()?, false).ok()?;
    let facts = host.inspect_file(&file).ok()?;
    (Some(facts.id) == origin.backing).then(|| facts.identity())
}
