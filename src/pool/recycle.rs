//! A dm device between two snapshots.

use std::path::{Path, PathBuf};

use crate::ask::{absent, ask, patiently};
use crate::binding::{Binding, binding};
use crate::error::{Error, Result, Step};
use crate::handles::{Handles, LoopHandle};
use crate::host::Host;
use crate::lookup::{self, Bound};
use crate::mapper::Device;
use crate::name::{DeviceName, DeviceNumber, KEPT};
use crate::policy::{self, Retry, Verdict};
use crate::removal::{self, Subject, When};
use crate::snapshot::{Made, load};
use crate::table::{Target, TargetLine};
use crate::teardown;
use crate::units::Sectors;
use crate::uuid::{DeviceUuid, Kind};

use super::CowFate;
use super::ready::{self, Site};

/// What became of a released snapshot's dm device.
pub(crate) enum Recycled {
    /// It has an `error` table, a name of the pool's, and nobody has it open.
    Spare(Made),
    /// It was removed, or was gone already, or goes at its last close.
    Gone,
}

/// The COW file of a released snapshot, open, where the kernel's path leads to it.
pub(crate) struct CowFile<F> {
    pub(crate) path: PathBuf,
    pub(crate) file: F,
}

/// Makes the handles' dm device a spare one named `to`, or removes it, and its COW file if that is to go.
pub(crate) fn release<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    handles: &Handles,
    to: Option<&DeviceName>,
    fate: CowFate,
    retry: &Retry,
) -> Result<(Recycled, Option<CowFile<H::File>>)> {
    let Some(subject) = Subject::of(host, handles)? else {
        teardown::clean(host, handles, retry)?;
        return Ok((Recycled::Gone, None));
    };
    let idle = patiently(host, retry, Verdict::Busy, || idle(host, &subject))?;
    let cow = match &idle {
        Some(device) => find_cow(host, &subject, device, handles.cow_loop.as_ref())?,
        // Its loop device may be another snapshot's by now.
        None => None,
    };
    let fitting = idle.as_ref().and_then(|device| fitting(site, device));
    let doomed = cow.as_ref().filter(|_| fate == CowFate::Delete);
    let doomed = doomed.map(|cow| cow.path.as_path());
    let (Some(to), Some(made)) = (to, fitting) else {
        delete(host, doomed)?;
        teardown::clean(host, handles, retry)?;
        return Ok((Recycled::Gone, cow));
    };
    let way = match fate {
        CowFate::Delete => to.clone(),
        CowFate::Keep | CowFate::HandBack => DeviceName::new(format!("{to}{KEPT}"))?,
    };
    let names = [&way, to];
    let recycled = swap_out(host, site, made, handles, names, doomed, retry)?;
    Ok((recycled, cow))
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
fn fitting<L>(site: &Site<'_, L>, device: &Device) -> Option<Made> {
    let uuid = DeviceUuid::new(device.uuid.as_str()).ok()?;
    let name = DeviceName::new(device.name.as_str()).ok()?;
    let same_image = uuid.origin() == Some(site.base.image().identity());
    let usable = device.live_table && !device.inactive_table && !device.deferred_remove;
    (uuid.kind() == Kind::Pooled && same_image && usable).then(|| Made {
        mapper: name.mapper_path(),
        dev: device.number,
        name,
        uuid,
    })
}

/// From the rename on it is the pool's again, and a leftover of it if the process dies. With a COW file that is to be kept
/// it has a name in between that says so, until it has nothing to do with the file any more.
///
/// The kernel drops what it has cached of a block device at its last close, so a device that nobody has open while its
/// table is `error` has nothing of the old snapshot any more, and whoever opens it from then on can read nothing into the
/// cache: that nobody has it open is asked for in the answer to the swap itself.
fn swap_out<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    old: Made,
    handles: &Handles,
    [way, to]: [&DeviceName; 2],
    doomed: Option<&Path>,
    retry: &Retry,
) -> Result<Recycled> {
    ask(Step::Unlink, &old.mapper, || {
        host.remove_alias(&old.mapper, old.dev)
    })?;
    let renamed = ask(Step::Rename, &old.mapper, || host.rename(&old.name, way));
    let renamed = absent(renamed).inspect_err(|_| {
        // It stays, so it should be found; if the alias cannot be had back, /dev/dm-N still leads there.
        let _ = host.make_alias(&old.mapper, old.dev);
    });
    if renamed?.is_none() {
        teardown::clean(host, handles, retry)?;
        return Ok(Recycled::Gone);
    }
    let mut made = Made {
        mapper: way.mapper_path(),
        name: way.clone(),
        ..old
    };
    let mut renamed = made.handles();
    renamed.cow_loop.clone_from(&handles.cow_loop);
    let swapped = delete(host, doomed).and_then(|()| swap(host, site, &made));
    let swapped = swapped.and_then(|open_count| {
        if open_count == 0 {
            wait_unbound(host, handles, retry)?;
        }
        if open_count == 0 && way != to {
            ask(Step::Rename, &made.mapper, || host.rename(way, to))?;
            (made.mapper, made.name) = (to.mapper_path(), to.clone());
        }
        Ok(open_count)
    });
    match swapped {
        Ok(0) => Ok(Recycled::Spare(made)),
        Ok(_) => {
            let subject = Subject::ours(made.uuid, &made.name);
            removal::remove_subject(host, &subject, &Retry::ONCE, When::LastClose)?;
            Ok(Recycled::Gone)
        }
        Err(error) => Err(match teardown::clean(host, &renamed, retry) {
            Err(Error::Debris { left, .. }) => error.leaving(left),
            _ => error,
        }),
    }
}

/// While the device is there: a sweep after a kill finds the file by the table alone.
fn delete<H: Host>(host: &H, cow: Option<&Path>) -> Result<()> {
    let unlink = |path: &Path| absent(ask(Step::Unlink, path, || host.unlink(path))).map(drop);
    cow.map_or(Ok(()), unlink)
}

/// Says how many have it open with the new table.
fn swap<H: Host>(host: &H, site: &Site<'_, H::Loop>, made: &Made) -> Result<u32> {
    let line = TargetLine {
        start: Sectors::default(),
        length: site.base.over().length,
        target: Target::Error,
    };
    load(host, made, &line)?;
    ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))
}

/// The COW file's loop device clears itself as the table goes, or when udevd has closed it. Before that the old handles
/// would take the device for theirs under its next name, if that is the same.
fn wait_unbound<H: Host>(host: &H, handles: &Handles, retry: &Retry) -> Result<()> {
    let Some(handle) = handles.cow_loop.as_ref().filter(|it| it.has_identity()) else {
        return Ok(());
    };
    if !host.shows_backing(&handle.path) {
        return Ok(());
    }
    patiently(host, retry, Verdict::Busy, || {
        match binding(host, handle)? {
            Binding::Gone => Ok(()),
            _ => Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY)),
        }
    })
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
    let table = ask(Step::Status, &subject.path, || host.live_table(&uuid));
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
        match lookup::reach(host, &bound, &device.name, true) {
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
    absent(lookup::bound(host, params.cow))?.map_or(Ok(None), open)
}

/// The COW file's loop device, with the path that the pool has given to the file. The kernel makes a loop device's entries
/// in sysfs anew at each binding: asking there for the path took 1 of a release's 5.5 ms (ftrace in the guest, 6.12).
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

pub(crate) fn remove_spare<H: Host>(host: &H, spare: &Made) -> Result<()> {
    teardown::clean(host, &spare.handles(), &Retry::default())
}
