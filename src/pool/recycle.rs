//! Releases snapshots to a pool, and makes their dm devices ready for another one.

use std::path::{Path, PathBuf};

use super::CowFate;
use super::ready::{self, Site};
use crate::backing::{Binding, binding, note_free};
use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Handles, KEPT, Kind, LoopHandle, Sectors};
use crate::call::{absent, ask, patiently};
use crate::dm::{Target, TargetLine};
use crate::error::{Error, Leftover, Refusal, Result, Retry, Step, Verdict, policy};
use crate::find::Bound;
use crate::kernel::{DevId, Device, Host};
use crate::snapshot::{MappedDevice, load};
use crate::teardown::{Subject, When};
use crate::{find, teardown};

/// How a release ended.
pub(crate) enum Ending<F> {
    /// The device is the pool's again, and still has its table, which [`empty`] takes away.
    TakenBack(TakenBack),
    /// The device is a spare one already, and the COW file is the caller's.
    Spare(MappedDevice, Option<CowFile<F>>),
    /// The device was removed, was gone already, or will be removed at its last close.
    Gone(Option<CowFile<F>>),
}

/// A dm device that was taken back: it has a name of the pool's, and still the table of the released snapshot.
#[derive(Debug)]
pub(crate) struct TakenBack {
    pub(crate) made: MappedDevice,
    cow_loop: Option<LoopHandle>,
}

impl TakenBack {
    fn handles(&self) -> Handles {
        let mut handles = self.made.handles();
        handles.cow_loop.clone_from(&self.cow_loop);
        handles
    }
}

/// The open COW file of a released snapshot, and the kernel's path for it.
pub(crate) struct CowFile<F> {
    pub(crate) path: PathBuf,
    pub(crate) file: F,
}

/// Gives the handles' dm device the name `to`, by which it is the pool's, or removes it, and deletes its COW file if
/// `fate` says so. If the COW file is to stay, the device does not use it any more when this returns.
pub(crate) fn release<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    handles: &Handles,
    to: Option<&DeviceName>,
    fate: CowFate,
    retry: &Retry,
) -> Result<Ending<H::File>> {
    let Some(subject) = Subject::of(host, handles)? else {
        teardown::clean(host, handles, retry)?;
        return Ok(Ending::Gone(None));
    };
    let idle = patiently(host, retry, Verdict::Busy, || idle(host, &subject))?;
    let cow = match &idle {
        Some(device) => find_cow(host, &subject, device, handles.cow_loop.as_ref(), fate)?,
        // The loop device of the handles may be another snapshot's by now.
        None => None,
    };
    let fitting = idle.as_ref().and_then(|device| fitting(site, device));
    let doomed = cow.as_ref().filter(|_| fate == CowFate::Delete);
    let (Some(to), Some(made)) = (to, fitting) else {
        // The file is deleted last: if somebody has opened the device meanwhile, writes still go there. With the pool's mark
        // in its name, the next pool deletes it if this process dies in between.
        let marked = match doomed {
            Some(cow) => mark(host, site, cow)?,
            None => None,
        };
        let cleaned = teardown::clean(host, handles, retry);
        if let (Err(error), Some(path), Some(cow)) = (&cleaned, &marked, doomed) {
            let back = || host.move_file(path, &cow.path);
            return Err(match ask(Step::MoveFile, &cow.path, back) {
                Ok(()) => error.clone(),
                Err(why) => error.clone().leaving(vec![Leftover::new(path, why)]),
            });
        }
        cleaned?;
        match &marked {
            Some(path) => unlink(host, path)?,
            None => delete(host, doomed)?,
        }
        return Ok(Ending::Gone(cow));
    };
    // The name says whether the COW file is to be kept, for sweeps after a kill.
    let way = match fate {
        CowFate::Delete => to.clone(),
        CowFate::Keep | CowFate::HandBack => DeviceName::new(format!("{to}{KEPT}"))?,
    };
    let Some(made) = take_back(host, made, &way)? else {
        teardown::clean(host, handles, retry)?;
        return Ok(Ending::Gone(cow));
    };
    let cow_loop = handles.cow_loop.clone();
    let taken = TakenBack { made, cow_loop };
    let rest = || match fate {
        // The device will be gone, and with it the way by which a sweep finds the file.
        CowFate::Delete => delete(host, doomed).map(|()| true).map_err(|error| {
            let left = doomed.map(|cow| Leftover::new(&cow.path, error.clone()));
            error.leaving(left.into_iter().collect())
        }),
        CowFate::Keep | CowFate::HandBack => rid(host, site, &taken, to, retry),
    };
    match (rest(), fate) {
        (Ok(_), CowFate::Delete) => Ok(Ending::TakenBack(taken)),
        (Ok(true), _) => Ok(Ending::Spare(taken.made.named(to), cow)),
        (Ok(false), _) => Ok(Ending::Gone(cow)),
        (Err(error), _) => Err(removed(host, &taken, error, retry)),
    }
}

/// Takes the device's table away, waits until its loop device does not use the COW file any more, and names the device
/// `to`. If somebody has the device open, it is removed at its last close instead.
fn rid<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    taken: &TakenBack,
    to: &DeviceName,
    retry: &Retry,
) -> Result<bool> {
    let made = &taken.made;
    let is_idle = swap_out(host, site, made)?;
    patiently(host, retry, Verdict::Busy, || unbound(host, taken))?;
    if is_idle {
        ask(Step::Rename, &made.mapper, || host.rename(&made.name, to))?;
    }
    Ok(is_idle)
}

/// Takes the table away from a device that was taken back. Returns true if it can be used again, once its old COW
/// file's loop device is [`unbound`]; false if it is gone, or will be removed at its last close.
pub(crate) fn empty<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    taken: &TakenBack,
    retry: &Retry,
) -> Result<bool> {
    let subject = Subject::ours(taken.made.uuid.clone(), &taken.made.name);
    let swapped = subject.query(host).and_then(|found| match found {
        Some(_) => swap_out(host, site, &taken.made),
        None => Ok(false),
    });
    swapped.map_err(|error| removed(host, taken, error, retry))
}

fn idle<H: Host>(host: &H, subject: &Subject) -> Result<Option<Device>> {
    let device = subject.query(host)?;
    match device.as_ref().map_or(0, |device| device.open_count) {
        0 => Ok(device),
        open_count => {
            let busy = Error::failed(Step::Remove, &subject.path, policy::BUSY);
            Err(busy.noted(format!("open count {open_count}")))
        }
    }
}

/// Returns the device if it can be used again: it came ready from a pool, and is over this pool's image.
fn fitting<L>(site: &Site<'_, L>, device: &Device) -> Option<MappedDevice> {
    let uuid = DeviceUuid::new(device.uuid.as_str()).ok()?;
    let name = DeviceName::new(device.name.as_str()).ok()?;
    let same_image = uuid.origin() == Some(site.base.image().identity());
    let usable = device.live_table && !device.inactive_table && !device.deferred_remove;
    (uuid.kind() == Kind::Pooled && same_image && usable).then(|| MappedDevice {
        mapper: name.mapper_path(),
        dev: device.number,
        name,
        uuid,
    })
}

/// Renames the device: from then on it is the pool's, and a dead pool's if the process dies. `None` if it is gone.
fn take_back<H: Host>(
    host: &H,
    made: MappedDevice,
    to: &DeviceName,
) -> Result<Option<MappedDevice>> {
    ask(Step::Unlink, &made.mapper, || {
        host.remove_alias(&made.mapper, made.dev)
    })?;
    let renamed = ask(Step::Rename, &made.mapper, || host.rename(&made.name, to));
    let renamed = absent(renamed).inspect_err(|_| {
        // The device stays, so it gets its alias back. If that fails, /dev/dm-N still leads to it.
        let node = host.find_node(made.dev);
        let _ = host.make_alias(&made.mapper, made.dev, node.as_deref());
    });
    Ok(renamed?.map(|()| made.named(to)))
}

/// Removes the device after a failure; returns the failure, with what could not be removed.
pub(crate) fn removed<H: Host>(host: &H, taken: &TakenBack, error: Error, retry: &Retry) -> Error {
    match remove(host, taken, retry) {
        Err(Error::Debris { left, .. }) => error.leaving(left),
        _ => error,
    }
}

/// Removes a device that was taken back, and waits for its COW file's loop device.
pub(crate) fn remove<H: Host>(host: &H, taken: &TakenBack, retry: &Retry) -> Result<()> {
    teardown::clean(host, &taken.handles(), retry).map(drop)
}

/// Deletes the COW file. This happens while the device is there: after a kill, a sweep finds the file only by its
/// table.
fn delete<H: Host>(host: &H, cow: Option<&CowFile<H::File>>) -> Result<()> {
    cow.map_or(Ok(()), |cow| unlink(host, &cow.path))
}

fn unlink<H: Host>(host: &H, path: &Path) -> Result<()> {
    absent(ask(Step::Unlink, path, || host.unlink(path))).map(drop)
}

/// Gives a COW file that is to be deleted the name of one that a dead pool was making, if it is in the pool's directory
/// and has a name of the pool's. Its lock keeps it from being swept for as long as it is attached.
fn mark<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    cow: &CowFile<H::File>,
) -> Result<Option<PathBuf>> {
    let Some(marked) = ready::made_at(site.dir, &cow.path) else {
        return Ok(None);
    };
    let moved = ask(Step::MoveFile, &marked, || {
        host.move_file(&cow.path, &marked)
    });
    Ok(absent(moved)?.map(|()| marked))
}

/// Replaces the snapshot's table with an `error` table. Returns true if nobody had the device open; otherwise the
/// kernel removes it at its last close.
///
/// The kernel drops the page cache of a block device at its last close. So a device that nobody has open while its
/// table is `error` has nothing of the old snapshot in the cache, and nothing can be read into it any more. The open
/// count is taken from the answer to the very ioctl that swaps the table.
fn swap_out<H: Host>(host: &H, site: &Site<'_, H::Loop>, made: &MappedDevice) -> Result<bool> {
    let line = TargetLine {
        start: Sectors::default(),
        length: site.base.over().length,
        target: Target::Error,
    };
    load(host, made, &line)?;
    let open_count = ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
    if open_count > 0 {
        let subject = Subject::ours(made.uuid.clone(), &made.name);
        teardown::remove_subject(host, &subject, &Retry::ONCE, When::LastClose)?;
    }
    Ok(open_count == 0)
}

/// Fails with [`Verdict::Busy`] until the loop device is detached from the COW file: autoclear does that when the table
/// is gone, and udevd has closed it. Until then old handles would match the device if its next name were the same.
pub(crate) fn unbound<H: Host>(host: &H, taken: &TakenBack) -> Result<()> {
    let handle = taken.cow_loop.as_ref().filter(|it| it.has_identity());
    match handle {
        Some(handle) if !host.shows_backing(&handle.path) => note_free(host, &handle.path),
        Some(handle) if !matches!(binding(host, handle)?, Binding::Gone) => {
            return Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY));
        }
        _ => (),
    }
    Ok(())
}

/// Opens the COW file that the device's table has; `None` if its path does not lead to it any more, or the device is
/// gone. The handles' loop device is not trusted for this, as the file is about to be deleted. Refuses to keep one that
/// is of no use without the device.
fn find_cow<H: Host>(
    host: &H,
    subject: &Subject,
    device: &Device,
    handle: Option<&LoopHandle>,
    fate: CowFate,
) -> Result<Option<CowFile<H::File>>> {
    let Ok(uuid) = DeviceUuid::new(device.uuid.as_str()) else {
        return Ok(None);
    };
    let table = ask(Step::Status, &subject.path, || {
        host.table(DevId::Uuid(&uuid), false)
    });
    let target = absent(table)?
        .flatten()
        .and_then(|(kind, text)| Target::parse(&kind, &text).ok());
    let Some(Target::Snapshot(params)) = target else {
        return Ok(None);
    };
    if fate != CowFate::Delete && !params.store.is_persistent() {
        let name = device.name.clone();
        return Err(Refusal::NothingToKeep { name }.into());
    }
    let open = |bound: Bound<H::Loop>| {
        // The device is still there, so its table held the loop device when it was opened: it is the right one.
        if subject.query(host)?.is_none() {
            return Ok(None);
        }
        match find::reach(host, &bound, &device.name, true) {
            Ok((file, _)) => Ok(Some(CowFile {
                path: bound.path,
                file,
            })),
            Err(Error::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    };
    let expected = handle.and_then(|handle| expected(host, handle, params.cow));
    if let Some(cow) = expected.and_then(|bound| open(bound).ok().flatten()) {
        return Ok(Some(cow));
    }
    absent(find::bound(host, params.cow))?.map_or(Ok(None), open)
}

/// Opens the COW file's loop device, with the path that the pool gave to the file. Asking sysfs for the path takes
/// longer, as the kernel makes a loop device's entries there anew each time: 1 of a release's 5.5 ms (ftrace in the
/// guest, 6.12).
fn expected<H: Host>(
    host: &H,
    handle: &LoopHandle,
    number: DeviceNumber,
) -> Option<Bound<H::Loop>> {
    let node = handle.path.clone();
    let device = host.open_loop(&node, false).ok()?;
    let is_meant = host.loop_number(&device).is_ok_and(|found| found == number);
    let status = host.loop_status(&device).ok().filter(|_| is_meant)?;
    let path = ready::moved_to(status.label.path());
    Some(Bound {
        node,
        path,
        device,
        status,
    })
}

pub(crate) fn remove_spare<H: Host>(host: &H, spare: &MappedDevice, retry: &Retry) -> Result<()> {
    teardown::clean(host, &spare.handles(), retry).map(drop)
}
