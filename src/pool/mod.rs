//! Snapshots made ready beforehand, so that a boot path pays for a rename only.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use keeper::Keeper;
use recycle::{Ending, TakenBack};
use shared::{Shared, State};

use crate::base::{DeviceName, Handles, POOLED};
use crate::call::in_parallel;
use crate::error::{Error, Leftover, Result, Verdict};
use crate::kernel::{MACHINE, Machine};
use crate::snapshot::Snapshot;

pub(crate) mod keeper;
mod options;
pub(crate) mod ready;
pub(crate) mod recycle;
mod shared;
mod sweep;
#[cfg(test)]
mod tests;

pub use options::{PoolOptions, WhenEmpty};

/// What becomes of the COW file of a snapshot that is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CowFate {
    /// It is deleted.
    Delete,
    /// It stays where it is.
    Keep,
    /// As `Keep`, and it is handed back open, for reading and writing.
    HandBack,
}

/// A snapshot that is the caller's from now on, like any other: same handles, same cleanup, from any process.
#[derive(Debug)]
#[non_exhaustive]
pub struct Claimed {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Its COW file, under a name in the pool's directory that no other ever has.
    pub cow: PathBuf,
    /// Whether it was ready. Otherwise it was made just now, as the pool was empty.
    pub warm: bool,
}

/// What became of a snapshot that was released.
#[derive(Debug)]
#[non_exhaustive]
pub struct Released {
    /// Whether the pool has the dm device back, for another snapshot. Otherwise it was removed, or was gone already.
    pub taken_back: bool,
    /// The COW file, unless it was deleted or is nowhere to be found any more.
    pub cow: Option<PathBuf>,
    /// The COW file, if it was to be handed back.
    pub file: Option<File>,
}

/// What a pool has, and what failed last.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Snapshots to be claimed.
    pub ready: usize,
    /// dm devices that wait for their next COW file.
    pub spare: usize,
    /// dm devices that were taken back, and still have the table or the loop device of their last snapshot.
    pub recycling: usize,
    /// How many snapshots are to be ready.
    pub size: usize,
    /// How many attempts to make one have failed since the last that did not.
    pub failures: u32,
    /// Why the last attempt failed; `None` after one that did not.
    pub last_error: Option<Error>,
    /// What is left of the pause before the next attempt, after a failure.
    pub retry_in: Option<Duration>,
    /// Why the last device that was taken back could not be recycled; `None` if it could. What
    /// [`Error::left`] lists is still there; the rest of it was removed.
    pub recycle_error: Option<Error>,
}

/// Snapshots of one origin, COW files included, that wait to be claimed.
///
/// A thread keeps [`PoolOptions::size`] of them ready. [`claim`](Self::claim) renames one: that rename, which is one
/// ioctl, is the moment at which it becomes the caller's, so that by its name alone a device is known as claimed or
/// not, also after a kill. [`release`](Self::release) renames it back and deletes its COW file; another thread then
/// swaps its table instead of removing it, and the device serves another snapshot later.
///
/// Until then everything carries the pool's mark: names begin with `dmsnap-pool-`. One device of the pool, its keeper,
/// is open for as long as the pool's process lives; once it is closed, the unclaimed devices are known to be a dead
/// pool's: the next pool that is opened on the host takes them down, as any [`reap`](crate::ReapOptions::reap) does,
/// and never touches what was claimed.
///
/// Threads may share a pool. Dropping it drains it, and hides what could not be taken down; [`drain`](Self::drain)
/// names it.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    refill: Option<JoinHandle<()>>,
    recycle: Option<JoinHandle<Vec<TakenBack>>>,
    keeper: Option<Keeper<Machine>>,
}

fn pool_name(id: u64, what: impl std::fmt::Display) -> Result<DeviceName> {
    Ok(DeviceName::new(format!("{POOLED}{id:016x}-{what}"))?)
}

impl Pool {
    /// Hands a snapshot over under the name `name`: a device's rename and an alias, if one is ready.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for a bad name. When none became ready in the time that it was to wait ([`WhenEmpty::Wait`]):
    /// the refill's last error where refills fail, otherwise [`Refusal::PoolEmpty`](crate::error::Refusal::PoolEmpty).
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) when a device of that name exists; the pool keeps its
    /// snapshot. When it has to make one, as [`SnapshotOptions::create_on`](crate::SnapshotOptions::create_on).
    pub fn claim(&self, name: &str) -> Result<Claimed> {
        let name = DeviceName::given(name)?;
        loop {
            let Some(mut ready) = self.shared.take()? else {
                return self.shared.create(&name);
            };
            let claimed = ready::claim(&MACHINE, &self.shared.site(), &mut ready, &name);
            match claimed {
                Ok(snapshot) => {
                    self.shared.lock().leaving -= 1;
                    // Now, and not before: the refill asks the same kernel.
                    self.shared.claimed.notify_one();
                    return Ok(Claimed {
                        snapshot,
                        cow: ready.cow,
                        warm: true,
                    });
                }
                // Somebody else has removed it.
                Err(error) if error.verdict() == Some(Verdict::Gone) => {
                    let failed = ready::discard(&MACHINE, &ready, &self.shared.retry).err();
                    self.shared.lock().fail(failed.unwrap_or(error));
                    self.shared.came_to_nothing(None);
                }
                Err(error) => {
                    // One that could not be renamed back has the caller's name, and the error says so.
                    let put_back = error.left().is_empty().then_some(ready);
                    self.shared.came_to_nothing(put_back);
                    return Err(error);
                }
            }
        }
    }

    /// Takes back a snapshot that nobody has open any more; waits to the deadline ([`PoolOptions::deadline`]) for that. Then its COW file is
    /// deleted, or kept as asked.
    ///
    /// Its dm device is renamed, and from then on is the pool's, whose other thread takes its table away and keeps it
    /// for another snapshot; [`wait_recycled`](Self::wait_recycled) waits for that. It is removed after all if somebody
    /// has opened it meanwhile, as a page of it may be cached. A COW file that is kept is the caller's alone when this
    /// returns.
    ///
    /// A device is removed instead if no pool made it, if it is over another image, or if [`PoolOptions::size`] spare
    /// ones exist already, as by [`cleanup`](crate::cleanup).
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] when it is still busy at the deadline: it stays as it is, and claimed.
    /// [`Error::Debris`] names what remains otherwise. What fails in the thread is in
    /// [`PoolStatus::recycle_error`].
    pub fn release(&self, handles: &Handles, fate: CowFate) -> Result<Released> {
        let (host, site) = (&MACHINE, self.shared.site());
        let to = self.shared.reserve()?;
        let ended = recycle::release(host, &site, handles, to.as_ref(), fate, &self.shared.retry);
        let mut state = self.shared.lock();
        state.reserved -= usize::from(to.is_some());
        let (taken_back, cow) = match ended? {
            Ending::TakenBack(taken) => {
                state.recycling += 1;
                state.taken_back.push(taken);
                drop(state);
                self.shared.released.notify_one();
                (true, None)
            }
            Ending::Spare(made, cow) => {
                state.spares.push(made);
                (true, cow)
            }
            Ending::Gone(cow) => (false, cow),
        };
        let cow = cow.filter(|_| fate != CowFate::Delete);
        let (cow, file) = cow.map(|cow| (cow.path, cow.file)).unzip();
        let file = file.filter(|_| fate == CowFate::HandBack);
        Ok(Released {
            taken_back,
            cow,
            file: file.map(File::from),
        })
    }

    /// Returns what the pool has, and what failed last.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let state = self.shared.lock();
        let now = Instant::now();
        PoolStatus {
            ready: state.ready.len(),
            spare: state.spares.len(),
            recycling: state.recycling,
            size: self.shared.size,
            failures: state.failures,
            last_error: state.last_error.clone(),
            retry_in: state.retry_at.map(|at| at.saturating_duration_since(now)),
            recycle_error: state.recycle_error.clone(),
        }
    }

    /// Waits for up to `deadline` until `count` snapshots, or [`PoolOptions::size`] if that is less, are ready. Returns
    /// whether they are.
    ///
    /// Failed refills do not end the wait: [`PoolStatus::last_error`] has them.
    pub fn wait_ready(&self, count: usize, deadline: Duration) -> bool {
        let count = count.min(self.shared.size);
        self.shared
            .wait_until(deadline, |state| state.ready.len() >= count)
    }

    /// Waits until nothing that was released is on its way any more: what held the COW files has let go of them, so
    /// that their file system can be unmounted. Says whether it is so.
    pub fn wait_recycled(&self, deadline: Duration) -> bool {
        self.shared
            .wait_until(deadline, |state| state.recycling == 0)
    }

    /// Takes everything down that was not claimed, what earlier failures left included. A device that somebody has
    /// opened goes at its last close.
    ///
    /// # Errors
    ///
    /// [`Error::Debris`] names what remains.
    pub fn drain(mut self) -> Result<()> {
        self.close()
    }

    fn close(&mut self) -> Result<()> {
        self.shared.lock().closing = true;
        self.shared.claimed.notify_one();
        self.shared.released.notify_one();
        // They do not panic; if they did, what they had would be the next pool's to find.
        let _ = self.refill.take().map(JoinHandle::join);
        let on_the_way = self.recycle.take().map(JoinHandle::join);
        let on_the_way = on_the_way.and_then(std::result::Result::ok);
        let State {
            ready,
            mut taken_back,
            spares,
            left: old,
            ..
        } = std::mem::take(&mut *self.shared.lock());
        taken_back.extend(on_the_way.into_iter().flatten());
        let mut left = Vec::new();
        let mut note = |path: &Path, done: Result<()>| {
            if let Err(error) = done {
                left.push(Leftover::new(path, error));
            }
        };
        let retry = &self.shared.retry;
        let ready = Vec::from(ready);
        let discarded = in_parallel(&ready, |each| ready::discard(&MACHINE, each, retry));
        for (ready, discarded) in ready.iter().zip(discarded) {
            note(&ready.made.mapper, discarded);
        }
        let removed = in_parallel(&taken_back, |taken| recycle::remove(&MACHINE, taken, retry));
        for (taken, removed) in taken_back.iter().zip(removed) {
            note(&taken.made.mapper, removed);
        }
        let removed = in_parallel(&spares, |spare| {
            recycle::remove_spare(&MACHINE, spare, retry)
        });
        for (spare, removed) in spares.iter().zip(removed) {
            note(&spare.mapper, removed);
        }
        if let Some(keeper) = self.keeper.take() {
            let path = keeper.made.mapper.clone();
            note(&path, keeper.remove(&MACHINE, retry));
        }
        if !old.is_empty() {
            left.extend(sweep::sweep_again(&MACHINE, &self.shared.dir, old));
        }
        match left.first() {
            None => Ok(()),
            Some(first) => Err(first.error.clone().leaving(left)),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // What stays is found by the next pool, or by a reap: the keeper's descriptor is closed in any case.
        let _ = self.close();
    }
}
