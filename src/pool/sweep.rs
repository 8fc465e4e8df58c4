//! Takes down what dead pools left: unclaimed devices, and COW files that nobody has written to.

use std::path::Path;

use crate::base::{MAPPER_DIR, POOLED};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Leftover, Result, Step, Verdict};
use crate::kernel::Host;
use crate::teardown::{ReapOptions, is_alive};

/// Takes down what dead pools left on this host and in `dir`. Failures are ignored: the next pool tries again, and a
/// reap says why.
pub(crate) fn sweep<H: Host + Sync>(host: &H, dir: &Path) -> Result<()> {
    ReapOptions::new().reap_on(host, |info| !info.name.starts_with(POOLED))?;
    for path in host.entries(dir) {
        let _ = delete_leftover(host, &path);
    }
    Ok(())
}

/// Sweeps once more for what the failures of a closed pool have left; returns what is still there.
pub(crate) fn sweep_again<H: Host + Sync>(
    host: &H,
    dir: &Path,
    left: Vec<Leftover>,
) -> Vec<Leftover> {
    let _ = sweep(host, dir);
    let remains = |leftover: &Leftover| match leftover.object.strip_prefix(MAPPER_DIR) {
        Ok(name) => {
            let name = name.to_string_lossy();
            let found = ask(Step::Query, &leftover.object, || {
                host.query(Address::Name(&name))
            });
            !matches!(absent(found), Ok(None))
        }
        // Loop devices are detached with their last user.
        Err(_) => leftover.object.starts_with(dir) && leftover.object.exists(),
    };
    left.into_iter().filter(remains).collect()
}

/// Deletes a COW file that a dead pool was making. It is known by its name, by the dead pool's number in it, and by not
/// being locked, as a file in use is.
pub(super) fn delete_leftover<H: Host>(host: &H, path: &Path) -> Result<()> {
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
