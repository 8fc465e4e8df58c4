//! Pools: snapshots that are made ready beforehand, so that giving one to a VM takes a rename only.

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

/// What becomes of the COW file when its snapshot is released.
///
/// One over a transient store can only be deleted: without its dm device nothing tells what is where in it.
/// [`PoolOptions::durability`] says what a pool's disks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CowFate {
    /// The COW file is deleted.
    Delete,
    /// The COW file stays where it is, and is the caller's.
    Keep,
    /// The COW file stays, and is returned open for reading and writing ([`Released::file`]).
    HandBack,
}

/// A snapshot that was claimed. It is the caller's like any other: with the same handles, and taken down by the same
/// calls from any process.
#[derive(Debug)]
#[non_exhaustive]
pub struct Claimed {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// The path of its COW file, in the pool's directory. No other COW file ever gets that name.
    pub cow: PathBuf,
    /// True if it was ready. False for a cold claim: the pool was empty, and the snapshot was made just now, which
    /// takes as long as a `create`.
    pub warm: bool,
}

/// The result of a release.
#[derive(Debug)]
#[non_exhaustive]
pub struct Released {
    /// True if the pool has the dm device back: it uses it for another snapshot, or removes it where it has enough spare
    /// ones. Otherwise the device was removed, or was gone already.
    pub taken_back: bool,
    /// The COW file's path, unless the file was deleted or cannot be found any more.
    pub cow: Option<PathBuf>,
    /// The open COW file, with [`CowFate::HandBack`].
    pub file: Option<File>,
}

/// The state of a pool, and its last failures.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolStatus {
    /// How many snapshots are ready to be claimed.
    pub ready: usize,
    /// How many spare dm devices it has: they are without a snapshot, and get the next COW file.
    pub spare: usize,
    /// How many dm devices were taken back and still have the table or the loop device of their last snapshot.
    pub recycling: usize,
    /// How many snapshots it keeps ready ([`PoolOptions::size`]).
    pub size: usize,
    /// How many attempts to make a snapshot ready have failed since the last success.
    pub failures: u32,
    /// Why the last attempt failed; `None` after a success.
    pub last_error: Option<Error>,
    /// After a failure: how long it still takes until the next attempt.
    pub retry_in: Option<Duration>,
    /// Why the last device that was taken back could not be recycled; `None` after a success. What [`Error::left`]
    /// lists is still there; the rest was removed.
    pub recycle_error: Option<Error>,
}

/// A stock of ready snapshots over one origin, with their COW files.
///
/// A thread of the pool keeps [`PoolOptions::size`] of them ready, and where their flushes are to end
/// ([`PoolOptions::durability`]) another one sees to that. [`claim`](Self::claim) gives one to the caller by
/// renaming its dm device, which is one ioctl: so the name alone says whether a device is claimed, also after a kill.
/// [`release`](Self::release) renames it back and deletes its COW file. Another thread then takes the device's table
/// away, and the device, a spare one now, gets another snapshot later.
///
/// Names of unclaimed devices begin with `dmsnap-pool-`. One of them is the pool's keeper: a dm device without data
/// that the pool's process has open as long as it lives. When it is not open any more, the pool is known to be dead:
/// the next pool that is opened on the host takes down the dead pool's unclaimed devices, as any
/// [`reap`](crate::ReapOptions::reap) does.
///
/// What was claimed is the pool's no more, but a snapshot like any other: a `reap` takes it down while nobody has it open,
/// unless its `keep` is true for the name. So write the name to your database before the claim. It can be grown, and
/// exported unless it is thrown away; it cannot be checkpointed or rolled back, as its dm device is to go back to a pool.
///
/// Threads may share a pool. Dropping it does what [`drain`](Self::drain) does, but hides its errors: all that was not
/// claimed is taken down, and claimed snapshots stay.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    refill: Option<JoinHandle<()>>,
    settle: Option<JoinHandle<()>>,
    recycle: Option<JoinHandle<Vec<TakenBack>>>,
    keeper: Option<Keeper<Machine>>,
}

fn pool_name(id: u64, what: impl std::fmt::Display) -> Result<DeviceName> {
    Ok(DeviceName::new(format!("{POOLED}{id:016x}-{what}"))?)
}

impl Pool {
    /// Gives a snapshot to the caller under the name `name`.
    ///
    /// If one is ready, this renames its device and makes the alias. Otherwise the claim is cold: it makes a snapshot,
    /// which takes as long as a `create`, or waits for the refill, as [`PoolOptions::when_empty`] says. A snapshot that
    /// a cold claim made is removed, and not recycled, when it is released.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for a bad name. [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) if a device of that name
    /// exists; the pool keeps its snapshot. If it waited ([`WhenEmpty::Wait`]) and none became ready in time: the
    /// refill's last error if refills fail, otherwise [`Refusal::PoolEmpty`](crate::error::Refusal::PoolEmpty). If it
    /// had to make one, those of [`SnapshotOptions::create_on`](crate::SnapshotOptions::create_on).
    pub fn claim(&self, name: &str) -> Result<Claimed> {
        let name = DeviceName::given(name)?;
        loop {
            let Some(mut ready) = self.shared.take()? else {
                return self.shared.create(&name);
            };
            let claimed = ready::claim(&MACHINE, &self.shared.site(), &mut ready, &name);
            match claimed {
                Ok(snapshot) => {
                    let mut state = self.shared.lock();
                    state.leaving -= 1;
                    state.last_call = Some(Instant::now());
                    drop(state);
                    // Now, and not before: the refill asks the same kernel.
                    self.shared.claimed.notify_one();
                    return Ok(Claimed {
                        snapshot,
                        cow: ready.cow,
                        warm: true,
                    });
                }
                // Another program has removed the device.
                Err(error) if error.verdict() == Some(Verdict::Gone) => {
                    let failed = ready::discard(&MACHINE, &ready, &self.shared.retry).err();
                    self.shared.lock().fail(failed.unwrap_or(error));
                    self.shared.came_to_nothing(None);
                }
                Err(error) => {
                    // If the device could not be renamed back, it has the caller's name, and the error says so.
                    let put_back = error.left().is_empty().then_some(ready);
                    self.shared.came_to_nothing(put_back);
                    return Err(error);
                }
            }
        }
    }

    /// Takes a snapshot back, and deletes or keeps its COW file as `fate` says. If somebody has the disk open, this
    /// waits until the deadline ([`PoolOptions::deadline`]).
    ///
    /// The snapshot may be one that another pool over the same image made, of this or of a dead process: handles are
    /// all that is needed. Forget them then: the device keeps its uuid for the next VM that gets it.
    ///
    /// The dm device is renamed and is the pool's from then on. A thread of the pool takes its table away and keeps
    /// it for another snapshot; [`wait_recycled`](Self::wait_recycled) waits for that. If somebody opens the device
    /// meanwhile it is removed, as the page cache may have data of the old disk. A COW file that is kept is the
    /// caller's alone when this returns.
    ///
    /// The device is removed instead, as by [`cleanup`](crate::cleanup), if it did not come ready from a pool or is over
    /// another image. A pool that has [`PoolOptions::size`] spare devices already removes it too: in its thread, or in
    /// this call if the COW file is to stay.
    ///
    /// # Errors
    ///
    /// [`Refusal::NothingToKeep`](crate::error::Refusal::NothingToKeep) if the COW file is to stay and its store is a
    /// transient one; [`Error::Failed`] of kind [`Busy`](crate::ErrorKind::Busy) if somebody still has the disk open at
    /// the deadline: it stays as it is, and claimed. [`Error::Debris`] lists what remains after another failure. What
    /// fails in the thread is in [`PoolStatus::recycle_error`].
    pub fn release(&self, handles: &Handles, fate: CowFate) -> Result<Released> {
        let (host, site) = (&MACHINE, self.shared.site());
        let to = self.shared.reserve(fate)?;
        let ended = recycle::release(host, &site, handles, to.as_ref(), fate, &self.shared.retry);
        let mut state = self.shared.lock();
        state.reserved -= usize::from(to.is_some());
        state.last_call = Some(Instant::now());
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
            file: file.map(Machine::handed_out),
        })
    }

    /// Returns the pool's state and its last failures.
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

    /// Waits until `count` snapshots, or [`PoolOptions::size`] if that is less, are ready; at most for `deadline`,
    /// which is a duration. Returns true if they are.
    ///
    /// Failed refills do not end the wait; [`PoolStatus::last_error`] has the last one.
    pub fn wait_ready(&self, count: usize, deadline: Duration) -> bool {
        let count = count.min(self.shared.size);
        self.shared
            .wait_until(deadline, |state| state.ready.len() >= count)
    }

    /// Waits until all that was released is recycled or removed, at most for `deadline`. No loop device has a released
    /// COW file open then, so that the file system can be unmounted. Returns true if it is so.
    pub fn wait_recycled(&self, deadline: Duration) -> bool {
        self.shared
            .wait_until(deadline, |state| state.recycling == 0)
    }

    /// Ends the pool: takes down all that was not claimed, also what earlier failures left. Claimed snapshots stay. A
    /// device that somebody has open is removed at its last close.
    ///
    /// # Errors
    ///
    /// [`Error::Debris`] lists what remains.
    pub fn drain(mut self) -> Result<()> {
        self.close()
    }

    fn close(&mut self) -> Result<()> {
        self.shared.lock().closing = true;
        self.shared.claimed.notify_one();
        self.shared.released.notify_one();
        self.shared.made.notify_one();
        // They do not panic; if they did, what they had would be the next pool's to find.
        let _ = self.refill.take().map(JoinHandle::join);
        let _ = self.settle.take().map(JoinHandle::join);
        let on_the_way = self.recycle.take().map(JoinHandle::join);
        let on_the_way = on_the_way.and_then(std::result::Result::ok);
        let State {
            mut ready,
            made,
            mut taken_back,
            spares,
            left: old,
            ..
        } = std::mem::take(&mut *self.shared.lock());
        taken_back.extend(on_the_way.into_iter().flatten());
        ready.extend(made);
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
        // What remains is taken down by the next pool or a reap, as the keeper's descriptor is closed in any case.
        let _ = self.close();
    }
}
