//! A dm device between two snapshots.

use std::path::PathBuf;

use crate::ask::{absent, ask, patiently};
use crate::binding::{Binding, binding};
use crate::error::{Error, Result, Step};
use crate::handles::Handles;
use crate::host::Host;
use crate::lookup;
use crate::mapper::Device;
use crate::name::DeviceName;
use crate::policy::{self, Retry, Verdict};
use crate::removal::{self, Subject, When};
use crate::snapshot::{Made, load};
use crate::table::{Target, TargetLine};
use crate::teardown;
use crate::units::Sectors;
use crate::uuid::{DeviceUuid, Kind};

use super::CowFate;
use super::ready::Site;

/// What became of a released snapshot's dm device.
pub(crate) enum Recycled {
    /// It has an `error` table, a name of the pool's, and nobody has it open.
    Spare(Made),
    /// It was removed, or was gone already, or goes at its last close.
    Gone,
}

/// The COW file of a released snapshot, open, where the kernel's path leads to it.
pub(crate) struct CowFile<F> {
    path: PathBuf,
    file: F,
}

/// Makes the handles' dm device a spare one named `to`, or removes it.
pub(crate) fn release<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    handles: &Handles,
    to: Option<&DeviceName>,
    retry: &Retry,
) -> Result<(Recycled, Option<CowFile<H::File>>)> {
    let Some(subject) = Subject::of(host, handles)? else {
        teardown::clean(host, handles, retry)?;
        return Ok((Recycled::Gone, None));
    };
    let idle = patiently(host, retry, Verdict::Busy, || idle(host, &subject))?;
    let cow = find_cow(host, handles)?;
    let fitting = idle.as_ref().and_then(|device| fitting(site, device));
    let (Some(to), Some(made)) = (to, fitting) else {
        teardown::clean(host, handles, retry)?;
        return Ok((Recycled::Gone, cow));
    };
    Ok((swap_out(host, site, made, handles, to, retry)?, cow))
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

/// From the rename on it is the pool's again, and a leftover of it if the process dies.
///
/// The kernel drops what it has cached of a block device at its last close, so a device that nobody has open while its
/// table is `error` has nothing of the old snapshot any more, and whoever opens it from then on can read nothing into the
/// cache: that nobody has it open is asked for in the answer to the swap itself.
fn swap_out<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    old: Made,
    handles: &Handles,
    to: &DeviceName,
    retry: &Retry,
) -> Result<Recycled> {
    ask(Step::Unlink, &old.mapper, || {
        host.remove_alias(&old.mapper, old.dev)
    })?;
    let renamed = ask(Step::Rename, &old.mapper, || host.rename(&old.name, to));
    let renamed = absent(renamed).inspect_err(|_| {
        // It stays, so it should be found; if the alias cannot be had back, /dev/dm-N still leads there.
        let _ = host.make_alias(&old.mapper, old.dev);
    });
    if renamed?.is_none() {
        teardown::clean(host, handles, retry)?;
        return Ok(Recycled::Gone);
    }
    let made = Made {
        mapper: to.mapper_path(),
        name: to.clone(),
        ..old
    };
    let mut renamed = made.handles();
    renamed.cow_loop.clone_from(&handles.cow_loop);
    let swapped = swap(host, site, &made);
    match swapped {
        Ok(0) => {
            wait_unbound(host, handles, retry)?;
            Ok(Recycled::Spare(made))
        }
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

/// The COW file's loop device clears itself as the table goes, or a moment later.
fn wait_unbound<H: Host>(host: &H, handles: &Handles, retry: &Retry) -> Result<()> {
    let Some(handle) = handles.cow_loop.as_ref().filter(|it| it.has_identity()) else {
        return Ok(());
    };
    patiently(host, retry, Verdict::Busy, || {
        match binding(host, handle)? {
            Binding::Gone => Ok(()),
            _ => Err(Error::failed(Step::DetachLoop, &handle.path, policy::BUSY)),
        }
    })
}

/// Opens the COW file while its loop device still says which it is; `None` when its path leads to it no more.
fn find_cow<H: Host>(host: &H, handles: &Handles) -> Result<Option<CowFile<H::File>>> {
    let Some(handle) = &handles.cow_loop else {
        return Ok(None);
    };
    let number = ask(Step::Query, &handle.path, || {
        host.device_number(&handle.path)
    });
    let Some(number) = absent(number)?.flatten() else {
        return Ok(None);
    };
    let bound = lookup::bound(host, number)?;
    let name = handles.name.as_ref().map_or("", DeviceName::as_str);
    match lookup::reach(host, &bound, name, true) {
        Ok((file, _)) => Ok(Some(CowFile {
            path: bound.path,
            file,
        })),
        Err(Error::Refused(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Deals with a COW file as asked.
pub(crate) fn dispose<H: Host>(
    host: &H,
    cow: Option<CowFile<H::File>>,
    fate: CowFate,
) -> Result<(Option<PathBuf>, Option<H::File>)> {
    let Some(CowFile { path, file }) = cow else {
        return Ok((None, None));
    };
    match fate {
        CowFate::Delete => {
            absent(ask(Step::Unlink, &path, || host.unlink(&path)))?;
            Ok((None, None))
        }
        CowFate::Keep => Ok((Some(path), None)),
        CowFate::HandBack => Ok((Some(path), Some(file))),
    }
}

pub(crate) fn remove_spare<H: Host>(host: &H, spare: &Made) -> Result<()> {
    teardown::clean(host, &spare.handles(), &Retry::default())
}
