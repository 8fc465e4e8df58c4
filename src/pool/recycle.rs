//! A dm device between two snapshots.

use std::path::PathBuf;

use crate::ask::{absent, ask, patiently};
use crate::binding::{Binding, binding};
use crate::error::{Error, Leftover, Result, Step};
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

/// What became of a released snapshot.
pub(crate) enum Released<F> {
    /// Its device is the pool's again; [`recycle`] has the rest.
    TakenBack(TakenBack),
    /// Its device is a spare one already, and its COW file the caller's.
    Spare(Made, Option<CowFile<F>>),
    /// It was removed, or was gone already, or goes at its last close.
    Gone(Option<CowFile<F>>),
}

/// A dm device that has a name of the pool's, and still the table and COW file of a snapshot that was released.
#[derive(Debug)]
pub(crate) struct TakenBack {
    made: Made,
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

/// Gives the handles' dm device the name `to`, by which it is the pool's, or removes it, and its COW file if that is to go.
/// One whose COW file is to stay is rid of it before this returns.
pub(crate) fn release<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    handles: &Handles,
    to: Option<&DeviceName>,
    fate: CowFate,
    retry: &Retry,
) -> Result<Released<H::File>> {
    let Some(subject) = Subject::of(host, handles)? else {
        teardown::clean(host, handles, retry)?;
        return Ok(Released::Gone(None));
    };
    let idle = patiently(host, retry, Verdict::Busy, || idle(host, &subject))?;
    let fitting = idle.as_ref().and_then(|device| fitting(site, device));
    let cow_loop = handles.cow_loop.clone();
    let cow = match (fitting, to, fate) {
        (Some(made), Some(to), CowFate::Delete) => {
            if let Some(made) = take_back(host, made, to)? {
                return Ok(Released::TakenBack(TakenBack { made, cow_loop }));
            }
            None
        }
        (Some(made), Some(to), CowFate::Keep | CowFate::HandBack) => {
            let cow = find_cow(host, &subject, &made, cow_loop.as_ref())?;
            let way = DeviceName::new(format!("{to}{KEPT}"))?;
            if let Some(made) = take_back(host, made, &way)? {
                let taken = TakenBack { made, cow_loop };
                let spare = spare(host, &taken, retry, || {
                    let idle = swap_out(host, site, &taken, retry)?;
                    ask(Step::Rename, &taken.made.mapper, || host.rename(&way, to))?;
                    Ok(idle)
                })?;
                return Ok(match spare {
                    Some(made) => Released::Spare(made.named(to), cow),
                    None => Released::Gone(cow),
                });
            }
            cow
        }
        _ => {
            // A device that is gone may have left its loop device to another snapshot.
            let made = idle.as_ref().and_then(known);
            let found = made.map(|made| find_cow(host, &subject, &made, cow_loop.as_ref()));
            let cow = found.transpose()?.flatten();
            match fate {
                CowFate::Delete => delete(host, cow.as_ref())?,
                CowFate::Keep | CowFate::HandBack => {}
            }
            cow
        }
    };
    teardown::clean(host, handles, retry)?;
    Ok(Released::Gone(cow))
}

/// Makes a device that was taken back a spare one, without its COW file; `None` when somebody has opened it meanwhile: it
/// goes at its last close.
pub(crate) fn recycle<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    taken: &TakenBack,
    retry: &Retry,
) -> Result<Option<Made>> {
    let made = &taken.made;
    let subject = Subject::ours(made.uuid.clone(), &made.name);
    let found = find_cow(host, &subject, made, taken.cow_loop.as_ref());
    // With its table the device stays a leftover that has the file on it: by that alone a sweep finds it.
    found
        .and_then(|cow| delete(host, cow.as_ref()))
        .map_err(|why| {
            let left = Leftover::new(&made.mapper, why.clone());
            why.leaving(vec![left])
        })?;
    spare(host, taken, retry, || swap_out(host, site, taken, retry))
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
    let made = known(device)?;
    let same_image = made.uuid.origin() == Some(site.base.image().identity());
    let usable = device.live_table && !device.inactive_table && !device.deferred_remove;
    (made.uuid.kind() == Kind::Pooled && same_image && usable).then_some(made)
}

fn known(device: &Device) -> Option<Made> {
    let name = DeviceName::new(device.name.as_str()).ok()?;
    Some(Made {
        mapper: name.mapper_path(),
        uuid: DeviceUuid::new(device.uuid.as_str()).ok()?,
        dev: device.number,
        name,
    })
}

/// From the rename on it is the pool's again, and a leftover of it if the process dies. `None` when it is gone meanwhile.
fn take_back<H: Host>(host: &H, made: Made, to: &DeviceName) -> Result<Option<Made>> {
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

/// The device, if `empty` says that nobody had it open while it lost its table. If that fails it is removed.
fn spare<H: Host>(
    host: &H,
    taken: &TakenBack,
    retry: &Retry,
    empty: impl FnOnce() -> Result<bool>,
) -> Result<Option<Made>> {
    match empty() {
        Ok(true) => Ok(Some(taken.made.clone())),
        Ok(false) => {
            let made = &taken.made;
            let subject = Subject::ours(made.uuid.clone(), &made.name);
            removal::remove_subject(host, &subject, &Retry::ONCE, When::LastClose)?;
            Ok(None)
        }
        Err(error) => Err(match teardown::clean(host, &taken.handles(), retry) {
            Err(Error::Debris { left, .. }) => error.leaving(left),
            _ => error,
        }),
    }
}

/// While the device is there: a sweep after a kill finds the file by the table alone.
fn delete<H: Host>(host: &H, cow: Option<&CowFile<H::File>>) -> Result<()> {
    let unlink = |cow: &CowFile<_>| {
        absent(ask(Step::Unlink, &cow.path, || host.unlink(&cow.path))).map(drop)
    };
    cow.map_or(Ok(()), unlink)
}

/// Puts an `error` table in the snapshot's place, and waits until the COW file's loop device has let go of it. Says whether
/// nobody had the device open.
///
/// The kernel drops what it has cached of a block device at its last close, so a device that nobody has open while its
/// table is `error` has nothing of the old snapshot any more, and whoever opens it from then on can read nothing into the
/// cache: that nobody has it open is asked for in the answer to the swap itself.
fn swap_out<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    taken: &TakenBack,
    retry: &Retry,
) -> Result<bool> {
    let line = TargetLine {
        start: Sectors::default(),
        length: site.base.over().length,
        target: Target::Error,
    };
    let made = &taken.made;
    load(host, made, &line)?;
    let open_count = ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
    if open_count == 0 {
        wait_unbound(host, taken.cow_loop.as_ref(), retry)?;
    }
    Ok(open_count == 0)
}

/// The COW file's loop device clears itself as the table goes, or when udevd has closed it. Before that the old handles
/// would take the device for theirs under its next name, if that is the same.
fn wait_unbound<H: Host>(host: &H, handle: Option<&LoopHandle>, retry: &Retry) -> Result<()> {
    let Some(handle) = handle.filter(|it| it.has_identity()) else {
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
    made: &Made,
    handle: Option<&LoopHandle>,
) -> Result<Option<CowFile<H::File>>> {
    let table = ask(Step::Status, &subject.path, || host.live_table(&made.uuid));
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
        match lookup::reach(host, &bound, made.name.as_str(), true) {
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
