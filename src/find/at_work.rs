//! Tells whether a process is at work on a snapshot: it then holds a lock (`flock`) on the COW file's loop device,
//! which the kernel frees when the process ends.

use std::path::Path;
use std::time::Duration;

use super::SnapshotInfo;
use crate::base::loop_node;
use crate::call::{absent, ask, patiently};
use crate::error::{Result, Retry, Step, Verdict};
use crate::kernel::Host;

/// How long a lock must be held to count as that of a process at work. Beside a busy udevd, others' exclusive locks
/// were seen for a moment: systemd takes one while it reads a partition table again (`REREADPT_BSD_LOCK`).
pub(crate) const MAKER_RETRY: Retry = Retry::until(Duration::from_millis(500));

/// True if a process is at work on the snapshot: the COW file's loop device is locked exclusively, or has a shared lock
/// and dmsnap's mark (where a probe, such as udev's, had locked it first).
///
/// It looks at the loop device that the uuid names, and at the table's if that is another one. The first may be
/// attached to somebody else's file by now, whose lock is then mistaken for this snapshot's: a sweep leaves the
/// snapshot for the next one.
pub(crate) fn in_progress<H: Host>(host: &H, info: &SnapshotInfo, retry: &Retry) -> Result<bool> {
    let made_with = info.uuid.cow_loop().map(loop_node);
    let has = info.cow.as_ref().map(|cow| cow.device.clone());
    let other = has.filter(|path| made_with.as_ref() != Some(path));
    for path in made_with.into_iter().chain(other) {
        if is_locked(host, &path, retry)? {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(crate) fn is_locked<H: Host>(host: &H, path: &Path, retry: &Retry) -> Result<bool> {
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, false));
    let Some(device) = absent(opened)? else {
        return Ok(false);
    };
    let beside = patiently(host, retry, Verdict::InUse, || {
        ask(Step::TestLock, path, || host.lock_loop(&device, false))
    });
    match beside {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Ok(true),
        Err(error) => Err(error),
        Ok(()) => ask(Step::TestLock, path, || host.loop_is_marked(&device)),
    }
}

/// Locks a loop device for an operation on its snapshot; `None` if another process is at work on it. The kernel frees
/// the lock when the process ends.
pub(crate) fn lock<H: Host>(host: &H, path: &Path, retry: &Retry) -> Result<Option<H::Loop>> {
    // Opened for reading, so that its close does not wake udev's watch.
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, false));
    let Some(device) = absent(opened)? else {
        return Ok(None);
    };
    if !take(host, &device, path, retry)? {
        return Ok(None);
    }
    let marked = ask(Step::TestLock, path, || host.loop_is_marked(&device))?;
    Ok((!marked).then_some(device))
}

/// Takes the lock of an operation on an open loop device; says whether nobody else had it to the deadline.
pub(crate) fn take<H: Host>(
    host: &H,
    device: &H::Loop,
    path: &Path,
    retry: &Retry,
) -> Result<bool> {
    let locked = patiently(host, retry, Verdict::InUse, || {
        ask(Step::TestLock, path, || host.lock_loop(device, true))
    });
    match locked {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Ok(false),
        locked => locked.map(|()| true),
    }
}
