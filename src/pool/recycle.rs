//! A dm device between two snapshots.

use std::path::PathBuf;

use super::CowFate;
use super::ready::{self, Site};
use crate::backing::{Binding, binding};
use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Handles, KEPT, Kind, LoopHandle, Sectors};
use crate::call::{absent, ask, patiently};
use crate::dm::{Target, TargetLine};
use crate::error::{Error, Leftover, Result, Retry, Step, Verdict, policy};
use crate::find::Bound;
use crate::kernel::{DevId, Device, Host};
use crate::snapshot::{MappedDevice, load};
use crate::teardown::{Subject, When};
use crate::{find, teardown};

/// What became of a released snapshot.
pub(crate) enum Ending<F> {
    /// Its device is the pool's again; its table is to follow ([`empty`]).
    TakenBack(TakenBack),
    /// Its device is a spare one already, and its COW file the caller's.
    Spare(MappedDevice, Option<CowFile<F>>),
    /// It was removed, or was gone already, or goes at its last close.
    Gone(Option<CowFile<F>>),
}

/// A dm device that has a name of the pool's, and still the table of a snapshot that was released.
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

/// The COW file of a released snapshot, open, where the kernel's path leads to it.
pub(crate) struct CowFile<F> {
    pub(crate) path: PathBuf,
    pub(crate) file: F,
}

/// Gives the handles' dm device the name `to`, by which it is the pool's, or removes it; and deletes its COW file if
/// that is to go. One whose COW file is to stay is rid of it before this returns.
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
        Some(device) => find_cow(host, &subject, device, handles.cow_loop.as_ref())?,
        // Its loop device may be another snapshot's by now.
        None => None,
    };
    let fitting = idle.as_ref().and_then(|device| fitting(site, device));
    let doomed = cow.as_ref().filter(|_| fate == CowFate::Delete);
    let (Some(to), Some(made)) = (to, fitting) else {
        // The file goes last: whoever has opened the device meanwhile still has its writes there.
        teardown::clean(host, handles, retry)?;
        delete(host, doomed)?;
        return Ok(Ending::Gone(cow));
    };
    // A leftover that has a COW file to be kept has a name that says so.
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
        // Its device goes, and with it what a sweep would find it by.
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

/// Takes its table away, waits for the COW file, and gives the device the name `to`, unless somebody has it open: then
/// it goes at its last close.
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

/// Takes the table away from a device that was taken back. Says whether it may serve again, once its old COW file's
/// loop device is [`unbound`]. Otherwise it goes at its last close, or is gone.
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

/// The device, if it is one that may serve again over the pool's image.
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

/// From the rename on it is the pool's again, and a leftover of it if the process dies. `None` when it is gone
/// meanwhile.
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
        // It stays, so it should be found; if the alias cannot be had back, /dev/dm-N still leads there.
        let node = host.find_node(made.dev);
        let _ = host.make_alias(&made.mapper, made.dev, node.as_deref());
    });
    Ok(renamed?.map(|()| made.named(to)))
}

/// The failure, with what removing the device leaves.
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

/// While the device is there: a sweep after a kill finds the file by the table alone.
fn delete<H: Host>(host: &H, cow: Option<&CowFile<H::File>>) -> Result<()> {
    let unlink = |cow: &CowFile<_>| {
        absent(ask(Step::Unlink, &cow.path, || host.unlink(&cow.path))).map(drop)
    };
    cow.map_or(Ok(()), unlink)
}

/// Puts an `error` table in the snapshot's place. Says whether nobody had the device open; otherwise has it removed at
/// its last close.
///
/// The kernel drops what it has cached of a block device at its last close, so a device that nobody has open while its
/// table is `error` has nothing of the old snapshot any more, and whoever opens it from then on can read nothing into
/// the cache: that nobody has it open is asked for in the answer to the swap itself.
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

/// [`Verdict::Busy`] until the COW file's loop device has let go of it. It clears itself as the table goes, or when
/// udevd has closed it. Before that the old handles would take the device for theirs under its next name, if that is
/// the same.
pub(crate) fn unbound<H: Host>(host: &H, taken: &TakenBack) -> Result<()> {
    let handle = taken.cow_loop.as_ref().filter(|it| it.has_identity());
    match handle.filter(|handle| host.shows_backing(&handle.path)) {
        Some(handle) if !matches!(binding(host, handle)?, Binding::Gone) => {
            Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY))
        }
        _ => Ok(()),
    }
}

/// Opens the COW file that the device's table has; `None` when its path leads to it no more, or the device is gone
/// meanwhile. What a handle says of a loop device would not do: the file is about to be deleted.
fn find_cow<H: Host>(
    host: &H,
    subject: &Subject,
    device: &Device,
    handle: Option<&LoopHandle>,
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
    let open = |bound: Bound<H::Loop>| {
        // It is there now, so the loop device was held by it when it was opened, and is the one meant.
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

/// The COW file's loop device, with the path that the pool has given to the file. The kernel makes a loop device's
/// entries in sysfs anew at each binding: asking there for the path took 1 of a release's 5.5 ms (ftrace in the guest,
/// 6.12).
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
