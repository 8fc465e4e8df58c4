//! A snapshot that is ready: made, claimed, or taken down again.

use std::path::{Path, PathBuf};

use crate::ask::{absent, ask};
use crate::backing::Warning;
use crate::error::{Error, Leftover, Result, Step};
use crate::handles::{Handles, LoopHandle};
use crate::host::Host;
use crate::name::DeviceName;
use crate::options::SnapshotOptions;
use crate::origin::Base;
use crate::policy::Retry;
use crate::snapshot::{Made, Onto, Snapshot, build, prepare, unbuilt};
use crate::teardown;
use crate::uuid::Kind;

/// Where a pool's snapshots are made, and how.
pub(crate) struct Site<'a, L> {
    pub(crate) options: &'a SnapshotOptions,
    pub(crate) base: &'a Base<L>,
    pub(crate) dir: &'a Path,
}

/// A live snapshot under a name of the pool's, without an alias.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) made: Made,
    pub(crate) cow: PathBuf,
    pub(crate) cow_loop: Option<LoopHandle>,
    warnings: Vec<Warning>,
}

impl Ready {
    pub(crate) fn handles(&self) -> Handles {
        let mut handles = self.made.handles();
        handles.cow_loop.clone_from(&self.cow_loop);
        handles
    }
}

/// The COW file of a snapshot that is claimed under that name.
pub(crate) fn claimed_cow(dir: &Path, name: &DeviceName) -> PathBuf {
    dir.join(format!("{name}.cow"))
}

/// Makes one ready: on a dm device of the name `name`, or on a spare one, which is asked for when the COW file is there.
pub(crate) fn make<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    name: &DeviceName,
    spare: impl FnOnce() -> Option<Made>,
) -> Result<Ready> {
    let options = site.options;
    let path = claimed_cow(site.dir, name);
    let (cow, mut handles) = prepare(host, options, site.base, &path)?;
    let spare = spare();
    let kind = Kind::Pooled;
    let onto = match &spare {
        Some(made) => Onto::Recycled(made),
        None => Onto::New { name, kind },
    };
    match build(host, options, &site.base.over(), &cow, &onto, &mut handles) {
        Ok((made, warnings)) => Ok(Ready {
            made,
            cow: path.clone(),
            cow_loop: handles.cow_loop,
            warnings,
        }),
        Err(error) => Err(unbuilt(host, options, &cow, error, &handles)),
    }
}

/// Hands it over. The COW file goes first: at the moment that the device's name says that it is claimed, the file's does
/// so too, and no later pool takes it for a leftover of this one.
pub(crate) fn claim<H: Host>(
    host: &H,
    site: &Site<'_, H::Loop>,
    ready: &Ready,
    name: &DeviceName,
) -> Result<(Snapshot, PathBuf)> {
    let cow = claimed_cow(site.dir, name);
    let made = &ready.made;
    let mapper = name.mapper_path();
    ask(Step::MoveFile, &cow, || host.move_file(&ready.cow, &cow))?;
    let back = |error: Error| {
        // Where the file cannot be had back, it is found through the loop device that has it.
        let _ = ask(Step::MoveFile, &ready.cow, || {
            host.move_file(&cow, &ready.cow)
        });
        error
    };
    ask(Step::Rename, &mapper, || host.rename(&made.name, name)).map_err(back)?;
    let linked = ask(Step::Link, &mapper, || host.make_alias(&mapper, made.dev));
    let device = match linked {
        Ok(device) => device,
        Err(error) => {
            let undo = || host.rename(name, &made.name);
            return Err(match ask(Step::Rename, &mapper, undo) {
                Ok(()) => back(error),
                Err(why) => error.leaving(vec![Leftover::new(&mapper, why)]),
            });
        }
    };
    let handles = Handles {
        name: Some(name.clone()),
        mapper: Some(mapper),
        device: Some(device),
        cow_loop: ready.cow_loop.clone(),
        origin_loop: Some(site.base.handle.clone()),
        origin: Some(site.base.image().identity()),
        ..made.handles()
    };
    Ok((Snapshot::of(handles, ready.warnings.clone()), cow))
}

/// Takes it down, and its COW file, in which nobody has written.
pub(crate) fn discard<H: Host>(host: &H, ready: &Ready) -> Result<()> {
    teardown::clean(host, &ready.handles(), &Retry::default())?;
    absent(ask(Step::Unlink, &ready.cow, || host.unlink(&ready.cow))).map(drop)
}
