//! Takes down what handles name: the dm device and its loop devices, each only if it still is the same one.

use std::path::{Path, PathBuf};

use super::remove::{self, Outcome, Subject, When};
use crate::backing::{Binding, binding, diskseq};
use crate::base::{DeviceUuid, Handles, Kind, LoopHandle};
use crate::call::{absent, ask, patiently, spans};
use crate::dm::Address;
use crate::error::{Error, Leftover, Result, Retry, Step, Verdict, policy};
use crate::kernel::{Host, MACHINE, MAPPER_CONTROL};

/// Takes down what the handles name: the dm device, then the COW file's loop device, then the origin's.
///
/// What is already gone, or is another device or file by now, counts as success. If one of them cannot be removed, the
/// others still are. It waits up to 15 seconds in all while something is busy. A shared [`Origin`](crate::Origin)'s
/// loop device stays for its other users. The image and the COW file stay; delete the COW file yourself.
///
/// # Errors
///
/// [`Error::Debris`] lists what remains, each with the reason; its source is the first one.
pub fn cleanup(handles: &Handles) -> Result<()> {
    clean(&MACHINE, handles, &Retry::default()).map(drop)
}

/// Does what [`clean`] does, but leaves a dm device that somebody has open to the kernel (deferred removal).
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

/// Sets autoclear on loop devices that lack it, so that they are detached when the dm device that holds them goes.
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

/// The loop devices that handles name, each with what identifies it from now on.
pub(crate) type Claims<'a> = Vec<(&'a LoopHandle, Result<Option<Claim>>)>;

/// Looks up the loop devices that the handles name. One without an identity gets that of the file that it has now: once
/// the dm device is gone, another process may have its number.
pub(crate) fn claims<'a, H: Host>(host: &H, handles: &'a Handles) -> Claims<'a> {
    own_loops(handles)
        .map(|handle| (handle, claim(host, handle)))
        .collect()
}

/// Does what [`clean`] does, with loop devices that were looked up before.
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

/// Detaches the loop devices after a dm device's removal, or after that failed.
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
            // A dm device that is in use holds its loop devices: they are not touched, and remain for the same reason.
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

/// Returns the COW file's loop device, and the origin's unless that is shared, as then its last user's end detaches it.
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

/// A loop device that is to be detached, with the identity of its file.
pub(crate) struct Claim {
    handle: LoopHandle,
    /// True if the handle had an identity: then dmsnap attached the device, with autoclear.
    is_ours: bool,
}

/// Looks up a loop device; `None` if it is not there.
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

/// Detaches the loop device if it still has the claimed file.
///
/// If other dm devices than `gone` use it, as with a shared origin, it is left to autoclear, which detaches it when the
/// last of them is gone.
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

/// Has the kernel detach it when nobody has it open any more; returns true if it was attached.
fn detach<H: Host>(host: &H, claim: &Claim) -> Result<bool> {
    let path = &claim.handle.path;
    let (device, status) = match binding(host, &claim.handle)? {
        Binding::Bound(device, status) => (device, status),
        Binding::LettingGo => return Ok(true),
        Binding::Gone => return Ok(false),
    };
    if status.autoclear {
        // A shared origin's stays attached for its other users. Handles without a uuid do not tell that it is one.
        return Ok(!status.label.is_shared());
    }
    if claim.is_ours {
        // Another program attached it to the same file: dmsnap's have autoclear.
        return Ok(false);
    }
    // While `device` is open no other file can be attached. As it is open twice, `LOOP_CLR_FD` only sets autoclear, and
    // the last close detaches it, which before 6.11 is faster than detaching in the ioctl.
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, true));
    let Some(writable) = absent(opened)? else {
        return Ok(false);
    };
    let detached = ask(Step::DetachLoop, path, || host.detach_loop(&writable));
    drop((device, writable));
    absent(detached).map(|found| found.is_some())
}

/// True if other dm devices than the handles' own, which is gone, use the loop device.
///
/// The kernel forgets a device's name before it destroys the table (`__dm_destroy`), so for a moment a removed device
/// still holds its loop devices, under a number that cannot be asked about any more. One that was released to a pool
/// has another name by then, and its own uuid.
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

/// Waits until nothing of what the handles name is left. It removes nothing.
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
