//! Snapshots made ready beforehand, so that a boot path pays for a rename only.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Leftover, Result};
use crate::handles::Handles;
use crate::host::{MACHINE, Machine};
use crate::loop_device::LoopDevice;
use crate::name::{DeviceName, POOLED};
use crate::options::SnapshotOptions;
use crate::origin::Origin;
use crate::overlap::overlapped;
use crate::policy::{Retry, Verdict};
use crate::refusal::Refusal;
use crate::snapshot::{self, Made, Snapshot};
use crate::sys;
use keeper::Keeper;
use ready::{Ready, Site};
use recycle::TakenBack;

pub(crate) mod keeper;
mod options;
pub(crate) mod ready;
pub(crate) mod recycle;
mod sweep;

pub use options::{PoolOptions, WhenEmpty};
pub(crate) use sweep::{forget_cow, is_alive};

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
    pub recycled: bool,
    /// The COW file, unless it is deleted or is nowhere to be found any more.
    pub cow: Option<PathBuf>,
    /// The COW file, if it was to be handed back.
    pub file: Option<File>,
}

/// How a pool is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Snapshots to be claimed.
    pub ready: usize,
    /// dm devices that wait for their next COW file.
    pub spare: usize,
    /// dm devices that were taken back, and still have the table and COW file of their last snapshot.
    pub recycling: usize,
    /// How many snapshots are to be ready.
    pub size: usize,
    /// How many attempts to make one, or to recycle a device, have failed since the last one was made.
    pub failures: u32,
    /// Why the last attempt failed; `None` once one is made again.
    pub last_error: Option<Error>,
    /// How long the next attempt is put off after a failure.
    pub retry_in: Option<Duration>,
}

/// Snapshots of one origin, COW files included, that wait to be claimed.
///
/// A thread keeps [`PoolOptions::size`] of them ready. [`claim`](Self::claim) renames one: that rename, which is one
/// ioctl, is the moment at which it becomes the caller's, so that by its name alone a device is known as claimed or not,
/// also after a kill. [`release`](Self::release) renames it back; another thread then deletes its COW file and swaps its
/// table instead of removing it, and the device serves another snapshot later.
///
/// Until then everything carries the pool's mark: names begin with `dmsnap-pool-`. One device of the pool is open for as
/// long as the pool's process lives, so what a killed pool leaves is known for it: the next pool that is opened on the
/// host takes it down, as any [`reap`](crate::ReapOptions::reap) does, and never touches what was claimed.
///
/// Dropping the pool drains it, and hides what could not be taken down; [`drain`](Self::drain) names it.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    keeper: Option<Keeper<Machine>>,
}

#[derive(Debug)]
struct Shared {
    options: SnapshotOptions,
    when_empty: WhenEmpty,
    size: usize,
    origin: Origin,
    dir: PathBuf,
    id: u64,
    state: Mutex<State>,
    /// Something was claimed.
    claimed: Condvar,
    /// Something was released.
    released: Condvar,
    /// Something became ready, spare, or worse.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Ready>,
    taken_back: Vec<TakenBack>,
    spares: Vec<Made>,
    /// Popped from `ready`, and neither claimed nor back yet.
    leaving: usize,
    /// Devices that are to be among the spares, and are still on their way.
    coming: usize,
    /// The number of the next name.
    next: u64,
    failures: u32,
    last_error: Option<Error>,
    retry_at: Option<Instant>,
    /// What failures left behind.
    left: Vec<Leftover>,
    closing: bool,
}

/// After the first failure, and at most.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];

fn pool_name(id: u64, what: impl std::fmt::Display) -> Result<DeviceName> {
    Ok(DeviceName::new(format!("{POOLED}{id:016x}-{what}"))?)
}

impl Pool {
    /// Hands a snapshot over under the name `name`: a device's rename and an alias, if one is ready.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for a bad name; [`Refusal::PoolEmpty`] when none became ready in the time that it was to wait.
    /// [`Verdict::NameTaken`] when there is such a device; the pool keeps what it had. When it has to make one, as
    /// [`SnapshotOptions::create_on`].
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
                    let failed = ready::discard(&MACHINE, &ready).err();
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

    /// Takes back a snapshot that nobody has open any more; waits up to 15 seconds for that.
    ///
    /// Its dm device is kept for another snapshot if the pool made it, over this image, and lacks one: renaming it is all
    /// that the caller waits for. From then on nobody finds it under its name, and a COW file that is to be deleted is as
    /// good as gone: the pool's other thread deletes it and takes its table away, and the next pool or any
    /// [`reap`](crate::ReapOptions::reap) does after a kill. [`wait_recycled`](Self::wait_recycled) waits for that. The
    /// device is removed after all if somebody has opened it meanwhile, as a page of it may be cached.
    ///
    /// A COW file that is kept is the caller's alone when this returns; a device that is not kept is removed, as by
    /// [`cleanup`](crate::cleanup).
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] when it is still busy at the deadline: it stays as it is, and claimed.
    /// [`Error::Debris`] names what remains otherwise. What fails in the thread is told by [`status`](Self::status), and
    /// tried again by [`drain`](Self::drain), which names it.
    pub fn release(&self, handles: &Handles, fate: CowFate) -> Result<Released> {
        let host = &MACHINE;
        let site = self.shared.site();
        let to = {
            let mut state = self.shared.lock();
            let wanted = state.spares.len() + state.coming < self.shared.size;
            let to = wanted.then(|| self.shared.next_name(&mut state));
            let to = to.transpose()?;
            state.coming += usize::from(wanted);
            to
        };
        let released = recycle::release(host, &site, handles, to.as_ref(), fate, &Retry::default());
        let mut state = self.shared.lock();
        if !matches!(released, Ok(recycle::Released::TakenBack(_))) {
            state.coming -= usize::from(to.is_some());
        }
        let (recycled, cow) = match released? {
            recycle::Released::TakenBack(taken) => {
                state.taken_back.push(taken);
                drop(state);
                self.shared.released.notify_one();
                (true, None)
            }
            recycle::Released::Spare(made, cow) => {
                state.spares.push(made);
                (true, cow)
            }
            recycle::Released::Gone(cow) => (false, cow),
        };
        let cow = cow.filter(|_| fate != CowFate::Delete);
        let (cow, file) = cow.map(|cow| (cow.path, cow.file)).unzip();
        let file = file.filter(|_| fate == CowFate::HandBack);
        Ok(Released {
            recycled,
            cow,
            file: file.map(File::from),
        })
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let state = self.shared.lock();
        let now = Instant::now();
        PoolStatus {
            ready: state.ready.len(),
            spare: state.spares.len(),
            recycling: state.coming,
            size: self.shared.size,
            failures: state.failures,
            last_error: state.last_error.clone(),
            retry_in: state.retry_at.map(|at| at.saturating_duration_since(now)),
        }
    }

    /// Waits until so many are ready, or all that there are to be; says whether they are.
    pub fn wait_ready(&self, count: usize, deadline: Duration) -> bool {
        let count = count.min(self.shared.size);
        self.shared
            .wait_until(deadline, |state| state.ready.len() >= count)
    }

    /// Waits until nothing of what was released is left but spare dm devices: COW files are deleted, and their loop devices
    /// gone, so that their file system can be unmounted. Says whether it is so.
    pub fn wait_recycled(&self, deadline: Duration) -> bool {
        self.shared.wait_until(deadline, |state| state.coming == 0)
    }

    /// Takes everything down that was not claimed, what earlier failures left included.
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
        for thread in self.threads.drain(..) {
            // It does not panic; if it did, what it left is in the state all the same.
            let _ = thread.join();
        }
        let State {
            ready,
            spares,
            left: old,
            ..
        } = std::mem::take(&mut *self.shared.lock());
        let mut left = Vec::new();
        let mut note = |path: &Path, done: Result<()>| {
            if let Err(error) = done {
                left.push(Leftover::new(path, error));
            }
        };
        let ready = Vec::from(ready);
        let discarded = overlapped(&ready, |ready| ready::discard(&MACHINE, ready));
        for (ready, discarded) in ready.iter().zip(discarded) {
            note(&ready.made.mapper, discarded);
        }
        let removed = overlapped(&spares, |spare| recycle::remove_spare(&MACHINE, spare));
        for (spare, removed) in spares.iter().zip(removed) {
            note(&spare.mapper, removed);
        }
        if let Some(keeper) = self.keeper.take() {
            let path = keeper.made.mapper.clone();
            note(&path, keeper.remove(&MACHINE));
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock leaves the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until `what` is told of, or some time later.
    fn wait<'a>(
        &self,
        what: &Condvar,
        state: MutexGuard<'a, State>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match at_most {
            Some(time) => {
                let waited = what.wait_timeout(state, time);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => what.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn wait_until(&self, deadline: Duration, is_so: impl Fn(&State) -> bool) -> bool {
        let begin = Instant::now();
        let mut state = self.lock();
        while !is_so(&state) {
            let Some(left) = deadline.checked_sub(begin.elapsed()) else {
                return false;
            };
            state = self.wait(&self.changed, state, Some(left));
        }
        true
    }

    fn site(&self) -> Site<'_, LoopDevice> {
        Site {
            options: &self.options,
            base: &self.origin.0,
            dir: &self.dir,
        }
    }

    fn next_name(&self, state: &mut State) -> Result<DeviceName> {
        state.next += 1;
        pool_name(self.id, state.next)
    }

    /// The one that has been ready for longest; `None` when one is to be made instead.
    fn take(&self) -> Result<Option<Ready>> {
        let mut state = self.lock();
        let mut begin = None;
        loop {
            if let Some(ready) = state.ready.pop_front() {
                state.leaving += 1;
                return Ok(Some(ready));
            }
            let WhenEmpty::Wait(patience) = self.when_empty else {
                return Ok(None);
            };
            let begin = begin.get_or_insert_with(Instant::now);
            let Some(left) = patience.checked_sub(begin.elapsed()) else {
                let why = state.last_error.clone();
                return Err(why.unwrap_or_else(|| Refusal::PoolEmpty.into()));
            };
            state = self.wait(&self.changed, state, Some(left));
        }
    }

    /// A claim has failed: the one that it had is ready again, or lost.
    fn came_to_nothing(&self, put_back: Option<Ready>) {
        let mut state = self.lock();
        state.leaving -= 1;
        if let Some(ready) = put_back {
            state.ready.push_front(ready);
        }
        drop(state);
        self.claimed.notify_one();
        self.changed.notify_all();
    }

    fn create(&self, name: &DeviceName) -> Result<Claimed> {
        let pooled = self.next_name(&mut self.lock())?;
        let number = pooled.as_str().strip_prefix(POOLED).unwrap_or_default();
        let cow = ready::lasting_cow(&self.dir, number);
        let snapshot = snapshot::create_on(&MACHINE, &self.options, &self.origin.0, &cow, name)?;
        Ok(Claimed {
            snapshot,
            cow,
            warm: false,
        })
    }

    /// The life of the thread that keeps the pool full: one snapshot at a time.
    fn refill(&self) {
        // A claim that wakes it does not lose its core to it. Without that it only costs the claim some time.
        let _ = sys::make_batch_thread();
        let mut state = self.lock();
        while !state.closing {
            let now = Instant::now();
            let put_off = state.retry_at.filter(|at| *at > now);
            if state.ready.len() + state.leaving >= self.size || put_off.is_some() {
                let left = put_off.map(|at| at - now);
                state = self.wait(&self.claimed, state, left);
                continue;
            }
            let name = self.next_name(&mut state);
            drop(state);
            let spare = || self.lock().spares.pop();
            let made = name.and_then(|name| ready::make(&MACHINE, &self.site(), &name, spare));
            state = self.lock();
            match made {
                Ok(ready) => {
                    state.ready.push_back(ready);
                    (state.failures, state.last_error, state.retry_at) = (0, None, None);
                }
                Err(error) => state.fail(error),
            }
            self.changed.notify_all();
        }
    }

    /// The life of the thread that recycles devices: all that were released meanwhile, side by side, as each mostly waits
    /// for the kernel, or for a udevd that looks at its loop device. It ends when there is nothing more to come.
    fn recycle(&self) {
        let _ = sys::make_batch_thread();
        let mut state = self.lock();
        loop {
            let taken_back = std::mem::take(&mut state.taken_back);
            if taken_back.is_empty() {
                if state.closing {
                    return;
                }
                state = self.wait(&self.released, state, None);
                continue;
            }
            drop(state);
            let (site, retry) = (self.site(), Retry::default());
            let one = |taken: &TakenBack| recycle::recycle(&MACHINE, &site, taken, &retry);
            let recycled = overlapped(&taken_back, one);
            state = self.lock();
            state.coming -= taken_back.len();
            for made in recycled {
                match made {
                    Ok(made) => state.spares.extend(made),
                    Err(error) => state.fail(error),
                }
            }
            self.changed.notify_all();
        }
    }
}

impl State {
    fn fail(&mut self, error: Error) {
        let [first, most] = BACK_OFF;
        let pause = first.saturating_mul(2u32.saturating_pow(self.failures.min(16)));
        self.retry_at = Some(Instant::now() + pause.min(most));
        self.failures = self.failures.saturating_add(1);
        self.left.extend(error.left().iter().cloned());
        self.last_error = Some(error);
    }
}
