//! Makes a pool's ready snapshots, hands them over, and takes them down.

use std::ffi::OsStr;
use std::mem::take;
use std::path::{Path, PathBuf};

use crate::backing::Warning;
use crate::base::{DeviceName, Handles, Kind, POOLED};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Leftover, Result, Retry, Step};
use crate::kernel::{Device, Host};
use crate::snapshot::{
    Base, Destination, LiveDevice, MappedDevice, Snapshot, SnapshotOptions, build, prepare, unbuilt,
};
use crate::{snapshot, teardown};

/// The options, origin and directory with which a pool makes its snapshots.
pub(crate) struct Site<'a, L> {
    pub(crate) options: &'a SnapshotOptions,
    pub(crate) base: &'a Base<L>,
    pub(crate) dir: &'a Path,
}

/// A ready snapshot: live, under a name of the pool's, without an alias.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) made: MappedDevice,
    pub(crate) cow: PathBuf,
    /// The handles with the pool's names; a claim replaces those.
    pub(crate) handles: Handles,
    /// The device's node, kept so that a claim need not look for it.
    node: Option<PathBuf>,
    pub(crate) warnings: Vec<Warning>,
}

/// Returns the path of a ready or claimed snapshot's COW file. No two get the same `number`.
pub(crate) fn lasting_cow(dir: &Path, number: &str) -> PathBuf {
    dir.join(format!("dmsnap-{number}.cow"))
}

/// Returns the final path of the COW file that was made at `path`.
pub(crate) fn moved_to(path: &Path) -> PathBuf {
    let name = path.file_name().and_then(OsStr::to_str);
    let number = name.and_then(|name| name.strip_prefix(POOLED)?.strip_suffix(".cow"));
    match (path.parent(), number) {
        (Some(dir), Some(number)) => lasting_cow(dir, number),
        _ => path.to_owned(),
    }
}

/// Where the COW file was made that is at `path` in the pool's directory; `None` for any other.
pub(crate) fn made_at(dir: &Path, path: &Path) -> Option<PathBuf> {
    let name = path.file_name().and_then(OsStr::to_str)?;
    let number = name.strip_prefix("dmsnap-")?.strip_suffix(".cow")?;
    if name.starts_with(POOLED) {
        return None;
    }
    let made = dir.join(format!("{POOLED}{number}.cow"));
    (moved_to(&made) == path).then_some(made)
}

/// Makes a snapshot ready but for [`settle`], on a new dm device of the name `name` or on a spare one, which is asked for
/// when the COW file is there.
///
/// Until the device uses it, the COW file's name begins with `dmsnap-pool-`, and a later pool deletes it if this
/// process dies. Then it gets its final name, which the caller can keep; while the device is unclaimed, a sweep finds
/// the file through it.
pub(crate) fn make<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    name: &DeviceName,
    spare: impl FnOnce() -> Option<MappedDevice>,
) -> Result<Ready> {
    let options = site.options;
    let path = site.dir.join(format!("{name}.cow"));
    let number = name.as_str().strip_prefix(POOLED).unwrap_or_default();
    let lasting = lasting_cow(site.dir, number);
    let (cow, mut handles) = prepare(host, options, site.base, &path)?;
    let spare = spare();
    let kind = Kind::Pooled;
    let onto = match &spare {
        Some(made) => Destination::Recycled(made),
        None => Destination::New { name, kind },
    };
    let built = build(host, options, &site.base.over(), &cow, &onto, &mut handles);
    let moved = built.and_then(|built| {
        ask(Step::MoveFile, &lasting, || host.move_file(&path, &lasting)).map(|()| built)
    });
    match moved {
        Ok(LiveDevice { made, warnings, .. }) => Ok(Ready {
            cow: lasting,
            handles,
            node: host.find_node(made.dev),
            made,
            warnings,
        }),
        Err(error) => Err(unbuilt(host, options, &cow, error, &handles)),
    }
}

/// Does what is still to be done of a snapshot that was made ready, and may wait for the kernel.
pub(crate) fn settle<H: Host>(
    host: &H,
    options: &SnapshotOptions,
    ready: &Ready,
) -> Option<Warning> {
    snapshot::settle(host, options, &ready.made)
}

/// Hands a ready snapshot over to the caller. The device is the pool's until its rename, and the caller's from then on.
pub(crate) fn claim<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    ready: &mut Ready,
    name: &DeviceName,
) -> Result<Snapshot> {
    let made = &ready.made;
    let mapper = name.mapper_path();
    ask(Step::Rename, &mapper, || host.rename(&made.name, name))?;
    let node = ready.node.as_deref();
    let link = || host.make_alias(&mapper, made.dev, node);
    if let Err(error) = ask(Step::Link, &mapper, link) {
        let undo = || host.rename(name, &made.name);
        return Err(match ask(Step::Rename, &mapper, undo) {
            Ok(()) => error,
            Err(why) => error.leaving(vec![Leftover::new(&mapper, why)]),
        });
    }
    let device = node.unwrap_or(&mapper).to_owned();
    let handles = Handles {
        name: Some(name.clone()),
        mapper: Some(mapper),
        device: Some(device),
        origin_loop: site.base.handle.clone(),
        ..take(&mut ready.handles)
    };
    Ok(Snapshot::of(handles, take(&mut ready.warnings)))
}

/// Takes a ready snapshot down and deletes its COW file, which nobody has written to. If the device has been renamed
/// meanwhile, both stay. The file goes first: after a kill, a sweep finds it only by the device. If it cannot be deleted,
/// the device goes all the same.
pub(crate) fn discard<H: Host>(host: &H, ready: &Ready, retry: &Retry) -> Result<()> {
    let address = Address::Uuid(ready.made.uuid.as_str());
    let found = ask(Step::Query, &ready.made.mapper, || host.query(address));
    let is_ours = |device: Device| device.name == ready.made.name.as_str();
    let deleted = match absent(found)?.is_none_or(is_ours) {
        true => absent(ask(Step::Unlink, &ready.cow, || host.unlink(&ready.cow))).map(drop),
        false => Ok(()),
    };
    teardown::clean(host, &ready.handles, retry)?;
    deleted
}
