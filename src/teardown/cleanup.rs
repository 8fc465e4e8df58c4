//! The story of taking down: dm device, COW loop, origin loop, each only if it still is what it was.

use std::path::{Path, PathBuf};

use super::remove::{self, Outcome, Subject, When};
use crate::backing::{Binding, binding, diskseq};
use crate::base::{DeviceUuid, Handles, Kind, LoopHandle};
use crate::call::{absent, ask, patiently, spans};
use crate::dm::Address;
use crate::error::{Error, Leftover, Result, Retry, Step, Verdict, policy};
use crate::kernel::{Host, MACHINE, MAPPER_CONTROL};

/// Takes down what the handles name: the dm device, then the COW loop, then the origin loop.
///
/// What is already gone, or is by now something else, counts as success. A failure does not stop it: it goes on.
/// Waits up to 15 seconds in all while something is busy. The image and the COW file stay.
///
/// # Errors
///
/// [`Error::Debris`] names everything that remains, each with its reason; its source is the first one.
pub fn cleanup(handles: &Handles) -> Result<()> {
    clean(&MACHINE, handles, &Retry::default()).map(drop)
}

/// As [`clean`], but a dm device that somebody has open is left to the kernel.
pub(crate) fn clean_deferred<H: Host>(
    host: &H,
    handles: &Handles,
    retry: &Retry,
) -> Result<Outcome> {
    let _span = spans::cleanup(handles);
    let Some(subject) = Subject::of(host, handles)? else {
        return clean(host, handles, retry);
    };
    let claims = claims(host, handles);
    match remove::remove_subject(host, &subject, &Retry::ONCE, When::LastClose)? {
        Outcome::Deferred { open_count } => {
            defer_loops(host, &claims)?;
            Ok(Outcome::Deferred { open_count })
        }
        settled => clean_claimed(host, handles, &claims, retry).map(|_| settled),
    }
}

/// Has loop devices that do not clear themselves do so behind the dm device that still holds them.
fn defer_loops<H: Host>(host: &H, claims: &Claims<'_>) -> Result<()> {
    let mut left = Vec::new();
    for (handle, claim) in claims {
        let deferred = match claim {
            Ok(Some(claim)) if !claim.is_ours => detach(host, claim).map(drop),
            Ok(_) => Ok(()),
            Err(error) => Err(error.clone()),
        };
        if let Err(error) = deferred {
            left.push(Leftover::new(&handle.path, error));
        }
    }
    match left.first() {
        None => Ok(()),
        Some(first) => Err(first.error.clone().leaving(left)),
    }
}

pub(crate) fn clean<H: Host>(host: &H, handles: &Handles, retry: &Retry) -> Result<Outcome> {
    clean_claimed(host, handles, &claims(host, handles), retry)
}

/// The loop devices that handles name, each with what it is known by from now on.
pub(crate) type Claims<'a> = Vec<(&'a LoopHandle, Result<Option<Claim>>)>;

/// Loops without identity are taken at their word now: once the dm device is gone, their numbers may be others'.
pub(crate) fn claims<'a, H: Host>(host: &H, handles: &'a Handles) -> Claims<'a> {
    own_loops(handles)
        .map(|handle| (handle, claim(host, handle)))
        .collect()
}

/// [`clean`], of loop devices that were claimed before.
pub(crate) fn clean_claimed<H: Host>(
    host: &H,
    handles: &Handles,
    claims: &Claims<'_>,
    retry: &Retry,
) -> Result<Outcome> {
    let _span = spans::cleanup(handles);
    let start = host.now();
    let removed = remove_device(host, handles, retry);
    let retry = retry.less(host.now().saturating_sub(start));
    let released = release_loops(host, handles, removed, claims, &retry);
    host.sweep_nodes();
    released
}

/// What follows a dm device's removal, or the failure of it.
pub(crate) fn release_loops<H: Host>(
    host: &H,
    handles: &Handles,
    removed: Result<Outcome>,
    claims: &Claims<'_>,
    retry: &Retry,
) -> Result<Outcome> {
    let start = host.now();
    let mut left = Vec::new();
    let outcome = removed.unwrap_or_else(|error| {
        let object = handles.path().unwrap_or_else(|| object_of(&error));
        left.push(Leftover::new(object, error));
        Outcome::AlreadyGone
    });
    let removed = left.is_empty();
    let busy = left
        .first()
        .map(|device| device.error.clone())
        .filter(|error| error.verdict() == Some(Verdict::Busy));
    let in_use = busy.as_ref().and_then(|_| remove::look(host, handles));
    let holds = |path: &Path| {
        let number = in_use.as_ref().map(|device| device.number);
        number.is_some_and(|number| host.stacked_on(path).contains(&number))
    };
    for (handle, claim) in claims {
        let elapsed = host.now().saturating_sub(start);
        let patience = if removed {
            retry.less(elapsed)
        } else {
            Retry::ONCE
        };
        let released = match claim {
            // A device that is in use holds its loops: they are not touched, and remain for its reason.
            Ok(Some(claim)) if holds(&claim.handle.path) => match binding(host, &claim.handle) {
                Ok(Binding::Gone) => Ok(()),
                Ok(_) => busy.clone().map_or(Ok(()), Err),
                Err(error) => Err(error),
            },
            Ok(Some(claim)) => release_loop(host, claim, removed.then_some(handles), &patience),
            Ok(None) => Ok(()),
            Err(error) => Err(error.clone()),
        };
        if let Err(error) = released {
            left.push(Leftover::new(&handle.path, error));
        }
    }
    match left.first() {
        None => Ok(outcome),
        Some(first) => Err(first.error.clone().leaving(left)),
    }
}

/// The COW file's loop device, and the origin's unless that is shared: then it is its last user's to go with.
fn own_loops(handles: &Handles) -> impl Iterator<Item = &LoopHandle> {
    let is_own = |uuid: &DeviceUuid| uuid.kind() == Kind::Own;
    let origin = handles.origin_loop.as_ref();
    let origin = origin.filter(|_| handles.uuid.as_ref().is_none_or(is_own));
    handles.cow_loop.iter().chain(origin)
}

pub(crate) fn remove_device<H: Host>(
    host: &H,
    handles: &Handles,
    retry: &Retry,
) -> Result<Outcome> {
    match Subject::of(host, handles)? {
        Some(subject) => remove::remove_subject(host, &subject, retry, When::Now),
        None => Ok(Outcome::AlreadyGone),
    }
}

fn object_of(error: &Error) -> PathBuf {
    match error {
        Error::Failed { on, .. } => on.clone(),
        _ => PathBuf::new(),
    }
}

/// A loop device that is to be detached, by an identity that is never empty.
pub(crate) struct Claim {
    handle: LoopHandle,
    /// Whether the handle had an identity: then the device was attached by us, with autoclear.
    is_ours: bool,
}

/// `None` for a loop device that is not there.
fn claim<H: Host>(host: &H, handle: &LoopHandle) -> Result<Option<Claim>> {
    if handle.has_identity() {
        return Ok(Some(Claim {
            handle: handle.clone(),
            is_ours: true,
        }));
    }
    let Binding::Bound(device, status) = binding(host, handle)? else {
        return Ok(None);
    };
    let mut handle = handle.clone();
    handle.backing = Some(status.backing);
    handle.diskseq = diskseq(host, &device, &handle.path)?;
    Ok(Some(Claim {
        handle,
        is_ours: false,
    }))
}

/// Sees to it that the loop device is detached, if it still is the one that is claimed.
///
/// With our dm device `gone`, other dm devices on it are other snapshots', as on a shared origin: autoclear detaches it
/// behind the last of them.
fn release_loop<H: Host>(
    host: &H,
    claim: &Claim,
    gone: Option<&Handles>,
    retry: &Retry,
) -> Result<()> {
    let path = &claim.handle.path;
    patiently(host, &retry.sparing(), Verdict::Busy, || {
        if !detach(host, claim)? || matches!(binding(host, &claim.handle)?, Binding::Gone) {
            return Ok(());
        }
        if let Some(gone) = gone {
            if is_shared(host, gone, path)? {
                return Ok(());
            }
        }
        Err(Error::failed(Step::DetachLoop, path, policy::BUSY))
    })
}

/// Has the kernel detach it when nobody has it open any more, us included. Says whether there was anything to detach.
fn detach<H: Host>(host: &H, claim: &Claim) -> Result<bool> {
    let path = &claim.handle.path;
    let (device, status) = match binding(host, &claim.handle)? {
        Binding::Bound(device, status) => (device, status),
        Binding::LettingGo => return Ok(true),
        Binding::Gone => return Ok(false),
    };
    if status.autoclear {
        // A shared origin's may be open for as long as it likes; handles without a uuid do not say that it is one.
        return Ok(!status.label.is_shared());
    }
    if claim.is_ours {
        // Attached to the same file, but not by us: ours clear themselves.
        return Ok(false);
    }
    // `device` keeps the binding from changing hands until `LOOP_CLR_FD` has been asked for. With two of us at it, it
    // only marks the device, and the last close clears it: faster, before 6.11, than clearing it in the ioctl.
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, true));
    let Some(writable) = absent(opened)? else {
        return Ok(false);
    };
    let detached = ask(Step::DetachLoop, path, || host.detach_loop(&writable));
    drop((device, writable));
    absent(detached).map(|found| found.is_some())
}

/// Whether other dm devices than the handles' own, which is gone by its name, stand on the loop device.
///
/// The kernel forgets a device's name before it destroys the table (`__dm_destroy`), so for a moment a removed device
/// still holds its loop devices, under a number by which it can no longer be asked about. One that was released to a
/// pool has another name by then, and its own uuid.
fn is_shared<H: Host>(host: &H, gone: &Handles, path: &Path) -> Result<bool> {
    for number in host.stacked_on(path) {
        let address = Address::Number(number);
        let alive = || ask(Step::Query, &number.dm_node(), || host.query(address));
        let own = |uuid: &str| gone.uuid.as_ref().is_some_and(|own| own.as_str() == uuid);
        if gone.dev != Some(number) || absent(alive())?.is_some_and(|it| !own(&it.uuid)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Waits until nothing of what the handles name is left. It removes nothing itself.
pub(super) fn wait_gone<H: Host>(host: &H, handles: &Handles, retry: &Retry) -> Result<()> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    patiently(host, &retry.sparing(), Verdict::Busy, || {
        look_gone(host, handles)
    })
}

fn look_gone<H: Host>(host: &H, handles: &Handles) -> Result<()> {
    if let Some(subject) = Subject::of(host, handles)? {
        if let Some(device) = subject.query(host)? {
            let busy = Error::failed(Step::Remove, subject.path, policy::BUSY);
            return Err(busy.noted(format!("open count {}", device.open_count)));
        }
    }
    for handle in own_loops(handles).filter(|handle| handle.has_identity()) {
        let gone = match binding(host, handle)? {
            Binding::Gone => true,
            Binding::Bound(_, status) => status.label.is_shared(),
            Binding::LettingGo => false,
        };
        if !gone && !is_shared(host, handles, &handle.path)? {
            return Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY));
        }
    }
    Ok(())
}
