//! What pools leave whose process was killed: unclaimed devices, and COW files that nobody has written to.

use std::fs;
use std::path::Path;

use crate::ask::{absent, ask};
use crate::dm_message::Address;
use crate::error::{Error, Leftover, Result, Step};
use crate::host::Host;
use crate::inventory::SnapshotInfo;
use crate::lookup;
use crate::name::{KEPT, MAPPER_DIR, POOLED};
use crate::policy::Verdict;
use crate::reap::ReapOptions;

/// Whether the process of the pool that the unclaimed device or COW file `name` is of lives: it has the pool's keeper
/// open.
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

/// Takes down what dead pools left on this host, and in `dir`. Whatever cannot be taken down now is so by the next
/// pool, or by a reap that says why.
pub(crate) fn sweep<H: Host>(host: &H, dir: &Path) -> Result<()> {
    ReapOptions::new().reap(|info| !info.name.starts_with(POOLED))?;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = delete_leftover(host, &entry.path());
    }
    Ok(())
}

/// Sweeps once more for what failures of a pool, which is closed by now, have left. Says what still is there.
pub(crate) fn sweep_again<H: Host>(host: &H, dir: &Path, left: Vec<Leftover>) -> Vec<Leftover> {
    let _ = sweep(host, dir);
    let remains = |leftover: &Leftover| match leftover.object.strip_prefix(MAPPER_DIR) {
        Ok(name) => {
            let name = name.to_string_lossy();
            let found = ask(Step::Query, &leftover.object, || {
                host.query(Address::Name(&name))
            });
            !matches!(absent(found), Ok(None))
        }
        // Loop devices go with what they are used by.
        Err(_) => leftover.object.starts_with(dir) && leftover.object.exists(),
    };
    left.into_iter().filter(remains).collect()
}

/// Deletes the COW file of a dead pool's device that nobody has claimed, by the path that the kernel has for it. To be
/// called while the device is there: it is how the file is known. One that a cut-off release was to keep stays.
pub(crate) fn forget_cow<H: Host>(host: &H, info: &SnapshotInfo) -> Result<()> {
    let cow = info.params.as_ref().map(|params| params.cow);
    let unclaimed = info.name.starts_with(POOLED) && !info.name.ends_with(KEPT);
    let Some(number) = cow.filter(|_| unclaimed) else {
        return Ok(());
    };
    let Some(bound) = absent(lookup::bound(host, number))? else {
        return Ok(());
    };
    // Another sweep may have taken the device away, and the loop device may be another snapshot's. While it is open
    // here it cannot change hands, and as the dm device is there now, it is the one meant.
    let path = Path::new(MAPPER_DIR).join(&info.name);
    let address = Address::Uuid(info.uuid.as_str());
    let now = absent(ask(Step::Query, &path, || host.query(address)))?;
    if now.is_none_or(|now| now.name != info.name) {
        return Ok(());
    }
    match lookup::reach(host, &bound, &info.name, false) {
        Ok(_) => absent(ask(Step::Unlink, &bound.path, || host.unlink(&bound.path))).map(drop),
        // It has no name any more, or never had one.
        Err(Error::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes a COW file that a dead pool was making: known by its name, and by its lock, which no loop device has. A live
/// pool's may have no lock yet.
fn delete_leftover<H: Host>(host: &H, path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with(POOLED) || !name.ends_with(".cow") || is_alive(host, &name)? {
        return Ok(());
    }
    let opened = ask(Step::OpenFile, path, || host.open_file(path, true));
    let file = match opened {
        Err(error) if error.verdict() == Some(Verdict::Missing) => return Ok(()),
        opened => opened?,
    };
    match ask(Step::LockFile, path, || host.lock_file(&file, true)) {
        Err(error) if error.verdict() == Some(Verdict::InUse) => Ok(()),
        locked => {
            locked?;
            absent(ask(Step::Unlink, path, || host.unlink(path))).map(drop)
        }
    }
}
