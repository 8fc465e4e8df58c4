//! Whether a process is at work on a device: it holds a lock on the COW file's loop device, which the kernel frees with
//! its holder.

use std::path::Path;
use std::time::Duration;

use super::SnapshotInfo;
use crate::base::loop_node;
use crate::call::{absent, ask, patiently};
use crate::error::{Result, Retry, Step, Verdict};
use crate::kernel::Host;

/// Beside a busy udevd, exclusive locks for a moment were seen that were no maker's: systemd takes one around a new
/// look at a partition table (`REREADPT_BSD_LOCK`). A maker at work is not waited for longer.
pub(crate) const MAKER_RETRY: Retry = Retry::until(Duration::from_millis(500));

/// Whether somebody is at work on the snapshot: its maker holds a lock on the COW file's loop device, an exclusive one,
/// or one beside a probe's (udev's, say) and a mark.
///
/// The device that the uuid names may serve somebody else by now, whose lock is taken for the maker's: then the
/// snapshot stays until the next sweep. The one that the table has is looked at too, where that is another.
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

/// Takes the lock of an operation on a loop device; `None` when somebody else is at work with it. The kernel frees it
/// with its holder.
pub(crate) fn lock<H: Host>(host: &H, path: &Path) -> Result<Option<H::Loop>> {
    // For reading: its close wakes no udev watch.
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, false));
    let Some(device) = absent(opened)? else {
        return Ok(None);
    };
    if !take(host, &device, path, &MAKER_RETRY)? {
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
