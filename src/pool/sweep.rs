//! What pools leave whose process was killed: unclaimed devices, and COW files that nobody has written to.

use std::fs;
use std::path::{Path, PathBuf};

use crate::ask::{absent, ask};
use crate::dm_message::Address;
use crate::error::{Result, Step};
use crate::host::{Host, Machine};
use crate::inventory::{self, SnapshotInfo};
use crate::name::POOLED;
use crate::policy::Verdict;
use crate::reap::ReapOptions;

/// Whether the process of the pool that the unclaimed device `name` is of lives: it has the pool's keeper open.
pub(crate) fn is_alive<H: Host>(host: &H, name: &str) -> Result<bool> {
    let Some(id) = name
        .strip_prefix(POOLED)
        .and_then(|rest| rest.rsplit_once('-'))
    else {
        return Ok(false);
    };
    let keeper = format!("{POOLED}{}-keeper", id.0);
    let path = Path::new("/dev/mapper").join(&keeper);
    let found = absent(ask(Step::Query, &path, || {
        host.query(Address::Name(&keeper))
    }))?;
    Ok(found.is_some_and(|device| device.open_count > 0))
}

/// Takes down what dead pools left on this host, and in `dir`.
pub(crate) fn sweep(machine: &Machine, dir: &Path) -> Result<()> {
    let unclaimed = |info: &SnapshotInfo| info.name.starts_with(POOLED);
    // The files are found before their devices go: they may be in another directory.
    let files: Vec<PathBuf> = inventory::list()?
        .into_iter()
        .flatten()
        .filter(unclaimed)
        .filter(|info| is_alive(machine, &info.name).is_ok_and(|alive| !alive))
        .filter_map(|info| info.cow?.path)
        .collect();
    // Whoever cannot be taken down now is so by the next pool, or by a reap that says why.
    ReapOptions::new().reap(|info| !unclaimed(info))?;
    let here = fs::read_dir(dir).into_iter().flatten().flatten();
    for path in files.into_iter().chain(here.map(|entry| entry.path())) {
        let _ = delete_leftover(machine, &path);
    }
    Ok(())
}

/// Deletes a COW file that a dead pool made, by its name, and that no loop device has, by its lock.
fn delete_leftover<H: Host>(host: &H, path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with(POOLED) || !name.ends_with(".cow") {
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
