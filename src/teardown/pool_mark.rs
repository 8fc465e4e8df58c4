//! Tells by their names whether unclaimed devices and COW files are a live or a dead pool's.

use std::path::Path;

use crate::base::{KEPT, MAPPER_DIR, POOLED};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Error, Result, Step};
use crate::find::{self, SnapshotInfo};
use crate::kernel::Host;

/// True if the pool of the unclaimed device or COW file `name` is alive: its process has the pool's keeper open.
pub(crate) fn is_alive<H: Host>(host: &H, name: &str) -> Result<bool> {
    let Some(id) = name
        .strip_prefix(POOLED)
        .and_then(|rest| rest.rsplit_once('-'))
    else {
        return Ok(false);
    };
    let keeper = format!("{POOLED}{}-keeper", id.0);
    let path = Path::new(MAPPER_DIR).join(&keeper);
    let found = absent(ask(Step::Query, &path, || {
        host.query(Address::Name(&keeper))
    }))?;
    Ok(found.is_some_and(|device| device.open_count > 0))
}

/// Deletes the COW file of a dead pool's unclaimed device, by the path that the kernel has for it. Call this while the
/// device is there, by which the file is found. A file that a cut-off release was to keep stays.
pub(crate) fn forget_cow<H: Host>(host: &H, info: &SnapshotInfo) -> Result<()> {
    let cow = info.params.as_ref().map(|params| params.cow);
    let unclaimed = info.name.starts_with(POOLED) && !info.name.ends_with(KEPT);
    let Some(number) = cow.filter(|_| unclaimed) else {
        return Ok(());
    };
    let Some(bound) = absent(find::bound(host, number))? else {
        return Ok(());
    };
    // Another sweep may have removed the device, and the loop device may be another snapshot's. While it is open here,
    // no other file can be attached to it; and as the dm device is still there, it is the right one.
    let path = Path::new(MAPPER_DIR).join(&info.name);
    let address = Address::Uuid(info.uuid.as_str());
    let now = absent(ask(Step::Query, &path, || host.query(address)))?;
    if now.is_none_or(|now| now.name != info.name) {
        return Ok(());
    }
    match find::reach(host, &bound, &info.name, false) {
        Ok(_) => absent(ask(Step::Unlink, &bound.path, || host.unlink(&bound.path))).map(drop),
        // The file has no name any more, or never had one.
        Err(Error::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
