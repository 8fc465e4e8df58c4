//! The story of taking down: dm device, alias, COW loop, origin loop, each only if it still is what it was.

use std::path::{Path, PathBuf};

use crate::ask::{ask, patiently};
use crate::dm_message::Address;
use crate::error::{Error, Leftover, Result, Step};
use crate::handles::{Handles, LoopHandle};
use crate::host::{Host, MACHINE};
use crate::loop_device::LoopStatus;
use crate::mapper::{Device, MAPPER_CONTROL};
use crate::name::{DeviceName, DeviceNumber, MAPPER_DIR};
use crate::policy::{self, Retry, Verdict};
use crate::refusal::Refusal;
use crate::uuid::DeviceUuid;

/// What became of a dm device that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a deferred removal is still to come"]
pub enum Outcome {
    /// It is gone, and with it its node and its alias.
    Removed,
    /// There was no such device.
    AlreadyGone,
    /// The kernel removes it when its last user closes it. Until then it works on and its name stays taken.
    Deferred {
        /// How many users have it open.
        open_count: u32,
    },
}

/// Removes the dm device of that name, `/dev/mapper/<name>` path or other path to its node; waits up to 15 seconds
/// while it is busy.
///
/// A device that is not there counts as success. Its loop devices go too if they were attached with autoclear, as
/// ours are. Any dm device can be removed so, not only ours: the name is taken at its word.
///
/// # Errors
///
/// [`Error::Failed`] when it is still busy at the deadline, with its open count, or at once on anything else.
/// [`Error::Refused`] for a name or path that no dm device can have.
pub fn remove(target: impl AsRef<Path>) -> Result<Outcome> {
    remove_with(target, &Retry::default())
}

/// As [`remove`], waiting as `retry` says.
///
/// # Errors
///
/// As [`remove`].
pub fn remove_with(target: impl AsRef<Path>, retry: &Retry) -> Result<Outcome> {
    remove_target(&MACHINE, target.as_ref(), retry, When::Now)
}

/// As [`remove`], with one attempt and no waiting, for event loops.
///
/// # Errors
///
/// As [`remove`]; a busy device is [`Verdict::Busy`].
pub fn try_remove(target: impl AsRef<Path>) -> Result<Outcome> {
    remove_with(target, &Retry::ONCE)
}

/// Removes the device now if nobody has it open, and has the kernel remove it at the last close otherwise
/// (`DM_DEFERRED_REMOVE`).
///
/// # Errors
///
/// As [`remove`], but never because the device is busy.
pub fn remove_deferred(target: impl AsRef<Path>) -> Result<Outcome> {
    remove_target(&MACHINE, target.as_ref(), &Retry::ONCE, When::LastClose)
}

/// Takes down what the handles name: the dm device, then the COW loop, then the origin loop.
///
/// What is already gone, or is by now something else, counts as success. A failure does not stop it: it goes on.
/// Waits up to 15 seconds while the device is busy. The image and the COW file stay.
///
/// # Errors
///
/// [`Error::Debris`] names everything that remains, each with its reason; its source is the first one.
pub fn cleanup(handles: &Handles) -> Result<()> {
    cleanup_with(handles, &Retry::default())
}

/// As [`cleanup`], waiting as `retry` says.
///
/// # Errors
///
/// As [`cleanup`].
pub fn cleanup_with(handles: &Handles, retry: &Retry) -> Result<()> {
    clean(&MACHINE, handles, retry)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Now,
    LastClose,
}

pub(crate) fn clean<H: Host>(host: &H, handles: &Handles, retry: &Retry) -> Result<()> {
    let mut left = Vec::new();
    let device = device_of(handles);
    if let Err(error) = remove_device(host, handles, &device, retry) {
        left.push(Leftover::new(&device, error));
    }
    // A device that stays holds its loops; waiting for them would be in vain.
    let removed = left.is_empty();
    let patience = if removed { *retry } else { Retry::ONCE };
    for (handle, is_origin) in [(&handles.cow_loop, false), (&handles.origin_loop, true)] {
        let Some(handle) = handle else { continue };
        if let Err(error) = release_loop(host, handle, is_origin && removed, &patience) {
            left.push(Leftover::new(&handle.path, error));
        }
    }
    match left.first() {
        None => Ok(()),
        Some(first) => Err(first.error.clone().leaving(left)),
    }
}

/// The path that stands for the handles' dm device; empty when they name none.
fn device_of(handles: &Handles) -> PathBuf {
    let by_name = handles.name.as_ref().map(DeviceName::mapper_path);
    by_name
        .or_else(|| handles.mapper.clone())
        .or_else(|| handles.device.clone())
        .or_else(|| handles.dev.map(DeviceNumber::dm_node))
        .or_else(|| handles.uuid.as_ref().map(uuid_path))
        .unwrap_or_default()
}

/// Where udev would have put a link to the device, were it let; here it is a way to write a uuid as a path.
fn uuid_path(uuid: &DeviceUuid) -> PathBuf {
    Path::new("/dev/disk/by-id").join(format!("dm-uuid-{uuid}"))
}

/// By uuid where there is one: then it is our device that goes, or none.
fn remove_device<H: Host>(host: &H, handles: &Handles, path: &Path, retry: &Retry) -> Result<()> {
    match (&handles.uuid, handles.dev) {
        (Some(uuid), _) => remove_ours(host, uuid, path, retry),
        (None, Some(number)) if path == number.dm_node() => {
            remove_addressed(host, Address::Number(number), path, retry, When::Now).map(drop)
        }
        (None, _) if path.as_os_str().is_empty() => Ok(()),
        (None, _) => remove_target(host, path, retry, When::Now).map(drop),
    }
}

/// Removes the device with that uuid, whatever its name is by now.
pub(crate) fn remove_ours<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
    on: &Path,
    retry: &Retry,
) -> Result<()> {
    remove_addressed(host, Address::Uuid(uuid.as_str()), on, retry, When::Now).map(drop)
}

/// Has the kernel remove the device with that uuid at its last close.
pub(crate) fn defer_ours<H: Host>(host: &H, uuid: &DeviceUuid, on: &Path) -> Result<Outcome> {
    remove_addressed(
        host,
        Address::Uuid(uuid.as_str()),
        on,
        &Retry::ONCE,
        When::LastClose,
    )
}

fn remove_target<H: Host>(host: &H, target: &Path, retry: &Retry, when: When) -> Result<Outcome> {
    let bare = target.components().count() <= 1 && !target.has_root();
    let below_mapper = target
        .strip_prefix(MAPPER_DIR)
        .ok()
        .filter(|rest| rest.components().count() == 1);
    if let Some(name) = if bare { Some(target) } else { below_mapper } {
        match DeviceName::new(name.to_string_lossy()) {
            Ok(name) => {
                let (address, path) = (Address::Name(name.as_str()), name.mapper_path());
                return remove_addressed(host, address, &path, retry, when);
            }
            Err(refusal) if bare => return Err(refusal.into()),
            // udev and libdm spell other names' paths their own way; the node knows which device it is.
            Err(_) => (),
        }
    }
    let number = match ask(Step::Query, target, || host.device_number(target)) {
        Ok(Some(number)) => number,
        Ok(None) => {
            return Err(Refusal::NotABlockDevice {
                path: target.to_owned(),
            }
            .into());
        }
        Err(error) if error.verdict() == Some(Verdict::Gone) => return Ok(Outcome::AlreadyGone),
        Err(error) => return Err(error),
    };
    remove_addressed(host, Address::Number(number), target, retry, when)
}

fn remove_addressed<H: Host>(
    host: &H,
    address: Address<'_>,
    on: &Path,
    retry: &Retry,
    when: When,
) -> Result<Outcome> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    let outcome = patiently(host, retry, Verdict::Busy, || {
        try_once(host, address, on, when)
    });
    match outcome {
        // Looking for holders takes far longer than an attempt: worth it for who has waited in vain, not for who asks
        // from an event loop.
        Err(error) if *retry != Retry::ONCE && error.verdict() == Some(Verdict::Busy) => {
            Err(name_holders(host, address, error))
        }
        outcome => outcome,
    }
}

fn name_holders<H: Host>(host: &H, address: Address<'_>, error: Error) -> Error {
    let device = host.query(address).ok();
    let holders = device
        .map(|device| host.holders(device.number))
        .unwrap_or_default();
    holders.into_iter().fold(error, Error::noted)
}

/// One attempt.
///
/// The alias goes before the device: from the moment that removal begins, the kernel lets others have the name, and
/// from then on the alias may be theirs.
fn try_once<H: Host>(host: &H, address: Address<'_>, on: &Path, when: When) -> Result<Outcome> {
    let device = match ask(Step::Query, on, || host.query(address)) {
        Ok(device) => device,
        Err(error) if error.verdict() == Some(Verdict::Gone) => {
            sweep_alias(host, on)?;
            return Ok(Outcome::AlreadyGone);
        }
        Err(error) => return Err(error),
    };
    let open_count = device.open_count;
    if open_count > 0 && when == When::Now {
        return Err(
            Error::failed(Step::Remove, on, policy::BUSY).noted(format!("open count {open_count}"))
        );
    }
    let alias = Path::new(MAPPER_DIR).join(&device.name);
    let unlinked = ask(Step::Unlink, &alias, || {
        host.remove_alias(&alias, device.number)
    })?;
    match ask(Step::Remove, on, || {
        host.remove(unchanging(&device), when == When::LastClose)
    }) {
        Ok(true) => Ok(Outcome::Deferred { open_count }),
        Ok(false) => Ok(Outcome::Removed),
        Err(error) if error.verdict() == Some(Verdict::Gone) => Ok(Outcome::AlreadyGone),
        Err(error) => {
            if unlinked {
                // The device stays, so it should be found; if the alias cannot be had back, /dev/dm-N still leads there.
                let _ = host.make_alias(&alias, device.number);
            }
            Err(error)
        }
    }
}

/// Whether `path` is an alias of ours whose device is gone.
pub(crate) fn stale_alias<H: Host>(host: &H, path: &Path) -> Result<bool> {
    let Some(name) = path.strip_prefix(MAPPER_DIR).ok().and_then(Path::to_str) else {
        return Ok(false);
    };
    Ok(host.is_our_alias(path)
        && absent(ask(Step::Query, path, || host.query(Address::Name(name))))?.is_none())
}

/// Removes an alias of ours whose device is gone, as another program's removal leaves it. Says whether there was one.
pub(crate) fn sweep_alias<H: Host>(host: &H, path: &Path) -> Result<bool> {
    if !stale_alias(host, path)? {
        return Ok(false);
    }
    absent(ask(Step::Unlink, path, || host.unlink(path))).map(|unlinked| unlinked.is_some())
}

/// The address that the device keeps for longest: its uuid, if it has one.
fn unchanging(device: &Device) -> Address<'_> {
    if device.uuid.is_empty() {
        Address::Name(&device.name)
    } else {
        Address::Uuid(&device.uuid)
    }
}

/// Sees to it that the loop device is detached, if it still is the handle's.
///
/// One that other dm devices stand on, as other snapshots may on the same origin, is left to autoclear behind the last
/// of them; so is one without identity, whose handle does not say enough to wait for.
fn release_loop<H: Host>(host: &H, handle: &LoopHandle, shared: bool, retry: &Retry) -> Result<()> {
    patiently(host, retry, Verdict::Busy, || {
        let is_known = handle.backing.is_some() || handle.diskseq.is_some();
        match release_once(host, handle)? {
            Bound::No => Ok(()),
            Bound::Yes if !is_known || (shared && host.is_stacked_on(&handle.path)) => Ok(()),
            Bound::Yes => Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY)),
        }
    })
}

enum Bound {
    No,
    /// It was, a moment ago: to be looked at again.
    Yes,
}

fn release_once<H: Host>(host: &H, handle: &LoopHandle) -> Result<Bound> {
    let Some((device, status)) = still_bound(host, handle)? else {
        return Ok(Bound::No);
    };
    if status.autoclear {
        return Ok(Bound::Yes);
    }
    // `device` keeps the binding from changing hands until `LOOP_CLR_FD` has been asked for. With two of us at it, it
    // only marks the device, and the last close clears it: faster, before 6.11, than clearing it in the ioctl.
    let path = &handle.path;
    let writable = ask(Step::InspectLoop, path, || host.open_loop(path, true))?;
    let detached = ask(Step::DetachLoop, path, || host.detach_loop(&writable));
    drop((device, writable));
    absent(detached).map(|found| found.map_or(Bound::No, |()| Bound::Yes))
}

/// The handle's loop device, if it is bound to what the handle says.
fn still_bound<H: Host>(host: &H, handle: &LoopHandle) -> Result<Option<(H::Loop, LoopStatus)>> {
    let path = &handle.path;
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, false));
    let Some(device) = absent(opened)? else {
        return Ok(None);
    };
    let asked = ask(Step::InspectLoop, path, || host.loop_status(&device));
    let Some(status) = absent(asked)? else {
        return Ok(None);
    };
    let same_file = handle
        .backing
        .is_none_or(|backing| backing == status.backing);
    let same_binding = || match (handle.diskseq, host.loop_diskseq(&device)) {
        (Some(then), Some(now)) => then == now,
        _ => true,
    };
    Ok((same_file && same_binding()).then_some((device, status)))
}

/// What was asked for, or `None` if it is not there.
fn absent<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Err(error) if error.verdict() == Some(Verdict::Gone) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Waits until nothing of what the handles name is left: for after a deferred removal, which takes the dm device
/// away at its last close and its loop devices a little later. It removes nothing itself.
///
/// An origin loop device that other snapshots use as well is not waited for.
///
/// # Errors
///
/// [`Error::Failed`] with [`Verdict::Busy`] names what is still there at `retry`'s deadline.
pub fn wait_gone(handles: &Handles, retry: &Retry) -> Result<()> {
    let host = &MACHINE;
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    patiently(host, retry, Verdict::Busy, || look_gone(host, handles))
}

fn look_gone<H: Host>(host: &H, handles: &Handles) -> Result<()> {
    let address = match (&handles.uuid, &handles.name, handles.dev) {
        (Some(uuid), _, _) => Some(Address::Uuid(uuid.as_str())),
        (None, Some(name), _) => Some(Address::Name(name.as_str())),
        (None, None, number) => number.map(Address::Number),
    };
    if let Some(address) = address {
        let path = device_of(handles);
        let queried = absent(ask(Step::Query, &path, || host.query(address)))?;
        if let Some(device) = queried {
            let note = format!("open count {}", device.open_count);
            return Err(Error::failed(Step::Remove, path, policy::BUSY).noted(note));
        }
    }
    for handle in [&handles.cow_loop, &handles.origin_loop]
        .into_iter()
        .flatten()
    {
        let shared =
            handles.origin_loop.as_ref() == Some(handle) && host.is_stacked_on(&handle.path);
        if !shared && still_bound(host, handle)?.is_some() {
            return Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY));
        }
    }
    Ok(())
}
