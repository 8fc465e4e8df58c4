//! The state that a pool's callers and its threads share, and what the threads do.

use std::collections::VecDeque;
use std::mem::take;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::ready::{self, Ready, Site};
use super::recycle::{self, TakenBack};
use super::{Claimed, CowFate, WhenEmpty, pool_name};
use crate::base::{DeviceName, Durability, POOLED};
use crate::call::in_parallel;
use crate::error::{Error, Leftover, Refusal, Result, Retry};
use crate::kernel::{Clock, LoopDevice, MACHINE};
use crate::snapshot;
use crate::snapshot::{MappedDevice, Origin, SnapshotOptions};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: SnapshotOptions,
    pub(super) when_empty: WhenEmpty,
    pub(super) retry: Retry,
    pub(super) size: usize,
    pub(super) origin: Origin,
    pub(super) dir: PathBuf,
    pub(super) id: u64,
    pub(super) state: Mutex<State>,
    /// Notified when a snapshot was claimed.
    pub(super) claimed: Condvar,
    /// Notified when a snapshot was released.
    pub(super) released: Condvar,
    /// Notified when a snapshot was made that is to be settled.
    pub(super) made: Condvar,
    /// Notified when a snapshot became ready, a device spare, or either failed.
    pub(super) changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) ready: VecDeque<Ready>,
    /// Snapshots that were made, and are to be settled.
    pub(super) made: Vec<Ready>,
    /// How many are in `made`, or were taken from there by the thread and are not ready yet.
    pub(super) settling: usize,
    pub(super) taken_back: Vec<TakenBack>,
    pub(super) spares: Vec<MappedDevice>,
    /// How many were popped from `ready`, and are neither claimed nor put back yet.
    pub(super) leaving: usize,
    /// How many releases are under way that may each add a spare device.
    pub(super) reserved: usize,
    /// How many devices are in `taken_back`, or were taken from there by the thread and are not done yet.
    pub(super) recycling: usize,
    /// The number in the last name that was given.
    pub(super) next: u64,
    pub(super) failures: u32,
    pub(super) last_error: Option<Error>,
    pub(super) retry_at: Option<Instant>,
    pub(super) recycle_error: Option<Error>,
    /// The devices and files that failures left.
    pub(super) left: Vec<Leftover>,
    pub(super) closing: bool,
    /// When a snapshot was claimed or released last.
    pub(super) last_call: Option<Instant>,
}

/// The pause between two looks whether a loop device is detached from its COW file.
const UNBINDING: Duration = Duration::from_millis(2);

/// What became of a device that was taken back: a spare one, none, or a failure.
type Settled = Result<Option<MappedDevice>>;

/// The pool's threads begin their work when nobody has claimed or released anything for so long: in the middle of a burst
/// they would take the cores and the kernel's locks from the calls that a VM waits for.
const QUIET: Duration = Duration::from_millis(2);

/// So long they put it off at most.
const PUT_OFF: Duration = Duration::from_millis(20);

/// The pause before the next attempt: after the first failure, and at most.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panics with the lock held leaves no half-changed state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `what` is notified, at most for the given time.
    pub(super) fn wait<'a>(
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

    pub(super) fn wait_until(&self, deadline: Duration, is_so: impl Fn(&State) -> bool) -> bool {
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

    pub(super) fn site(&self) -> Site<'_, LoopDevice> {
        Site {
            options: &self.options,
            base: &self.origin.0,
            dir: &self.dir,
        }
    }

    /// Reserves a name for one more device that is taken back. `None` if its COW file is to stay, so that it becomes a
    /// spare at once, and there are enough; where the file is deleted, the thread removes what is too many, and no VM's
    /// end waits for that.
    pub(super) fn reserve(&self, fate: CowFate) -> Result<Option<DeviceName>> {
        let mut state = self.lock();
        let coming = state.reserved + state.recycling;
        let wanted = fate == CowFate::Delete || state.spares.len() + coming < self.size;
        let name = wanted.then(|| self.next_name(&mut state)).transpose()?;
        state.reserved += usize::from(wanted);
        Ok(name)
    }

    pub(super) fn next_name(&self, state: &mut State) -> Result<DeviceName> {
        state.next += 1;
        pool_name(self.id, state.next)
    }

    /// Takes the snapshot that has been ready for longest; `None` if the claim is to make one instead.
    pub(super) fn take(&self) -> Result<Option<Ready>> {
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

    /// Ends a failed claim: the snapshot that it took is ready again, or lost.
    pub(super) fn came_to_nothing(&self, put_back: Option<Ready>) {
        let mut state = self.lock();
        state.leaving -= 1;
        if let Some(ready) = put_back {
            state.ready.push_front(ready);
        }
        drop(state);
        self.claimed.notify_one();
        self.changed.notify_all();
    }

    pub(super) fn create(&self, name: &DeviceName) -> Result<Claimed> {
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

    /// Waits for the end of a burst of claims or releases, unless `is_urgent`. The thread sleeps, so that no call has to
    /// wake it.
    fn stand_aside<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        is_urgent: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let begin = Instant::now();
        while begin.elapsed() < PUT_OFF && !state.closing && !is_urgent(&state) {
            let since = state.last_call.map(|at| at.elapsed());
            let Some(left) = since.and_then(|since| QUIET.checked_sub(since)) else {
                break;
            };
            drop(state);
            thread::sleep(left);
            state = self.lock();
        }
        state
    }

    /// Runs the thread that keeps the pool full; it makes one snapshot at a time.
    pub(super) fn refill(&self) {
        // As a batch thread it does not take the core from the claim that wakes it. If that fails, claims take longer.
        let _ = MACHINE.stand_back();
        let mut state = self.lock();
        while !state.closing {
            let now = Instant::now();
            let put_off = state.retry_at.filter(|at| *at > now);
            let coming = state.settling + state.leaving;
            if state.ready.len() + coming >= self.size || put_off.is_some() {
                let left = put_off.map(|at| at - now);
                state = self.wait(&self.claimed, state, left);
                continue;
            }
            // Who waits for one, or has to make it, is not helped by a pause.
            state = self.stand_aside(state, |state| state.ready.is_empty());
            if state.closing {
                return;
            }
            let name = self.next_name(&mut state);
            drop(state);
            let spare = || self.lock().spares.pop();
            let made = name.and_then(|name| ready::make(&MACHINE, &self.site(), &name, spare));
            state = self.lock();
            match made {
                Ok(ready) => {
                    if self.settles() {
                        state.settling += 1;
                        state.made.push(ready);
                        self.made.notify_one();
                    } else {
                        state.ready.push_back(ready);
                    }
                    (state.failures, state.last_error, state.retry_at) = (0, None, None);
                }
                Err(error) => state.fail(error),
            }
            self.changed.notify_all();
        }
    }

    /// True if there is something to settle of each snapshot that was made.
    pub(super) fn settles(&self) -> bool {
        self.options.named_durability() != Durability::PowerCuts
    }

    /// Runs the thread that settles snapshots: all that were made meanwhile side by side, so that they take one grace
    /// period of RCU together, and the refill none.
    pub(super) fn settle(&self) {
        let _ = MACHINE.stand_back();
        let mut state = self.lock();
        loop {
            while state.made.is_empty() && !state.closing {
                state = self.wait(&self.made, state, None);
            }
            // What is made later is taken down with the rest.
            if state.made.is_empty() {
                return;
            }
            let mut made = take(&mut state.made);
            drop(state);
            let warnings =
                in_parallel(&made, |ready| ready::settle(&MACHINE, &self.options, ready));
            for (ready, warning) in made.iter_mut().zip(warnings) {
                ready.warnings.extend(warning);
            }
            state = self.lock();
            state.settling -= made.len();
            state.ready.extend(made);
            self.changed.notify_all();
        }
    }

    /// Runs the thread that recycles devices. All that were released meanwhile lose their tables side by side, and each
    /// becomes a spare when its loop device is detached, without waiting for the others. When the pool closes, it
    /// returns those that are not done.
    pub(super) fn recycle(&self) -> Vec<TakenBack> {
        let _ = MACHINE.stand_back();
        let (site, retry) = (self.site(), self.retry);
        let empty = |taken: &TakenBack| recycle::empty(&MACHINE, &site, taken, &retry);
        let is_in_time = |since: Instant| retry.pause(0, 1, since.elapsed()).is_some();
        let mut bound: Vec<(TakenBack, Instant)> = Vec::new();
        let mut state = self.lock();
        loop {
            while state.taken_back.is_empty() && bound.is_empty() && !state.closing {
                state = self.wait(&self.released, state, None);
            }
            if !state.taken_back.is_empty() {
                state = self.stand_aside(state, |_| false);
            }
            let taken_back = take(&mut state.taken_back);
            if state.closing {
                let bound = bound.into_iter().map(|(taken, _)| taken);
                return taken_back.into_iter().chain(bound).collect();
            }
            drop(state);
            let emptied = in_parallel(&taken_back, empty);
            let mut settled = Vec::new();
            for (taken, emptied) in taken_back.into_iter().zip(emptied) {
                match emptied {
                    Ok(true) => bound.push((taken, Instant::now())),
                    Ok(false) => settled.push(Ok(None)),
                    Err(error) => settled.push(Err(error)),
                }
            }
            for (taken, since) in take(&mut bound) {
                match recycle::unbound(&MACHINE, &taken) {
                    Ok(()) => settled.push(Ok(Some(taken.made))),
                    Err(_) if is_in_time(since) => bound.push((taken, since)),
                    Err(error) => {
                        settled.push(Err(recycle::removed(&MACHINE, &taken, error, &Retry::ONCE)));
                    }
                }
            }
            self.remove_surplus(&mut settled);
            state = self.lock();
            if !settled.is_empty() {
                state.settle(settled);
                self.changed.notify_all();
            }
            if state.taken_back.is_empty() && !bound.is_empty() && !state.closing {
                state = self.wait(&self.released, state, Some(UNBINDING));
            }
        }
    }
}

impl Shared {
    /// Removes those of the settled devices that are more than the pool is to have spare.
    fn remove_surplus(&self, settled: &mut Vec<Settled>) {
        let mut room = self.size.saturating_sub(self.lock().spares.len());
        let mut surplus = Vec::new();
        settled.retain_mut(|device| {
            let Ok(made @ Some(_)) = device else {
                return true;
            };
            let stays = room > 0;
            match stays {
                true => room -= 1,
                false => surplus.extend(made.take()),
            }
            stays
        });
        let removed = in_parallel(&surplus, |made| {
            recycle::remove_spare(&MACHINE, made, &self.retry)
        });
        settled.extend(removed.into_iter().map(|removed| removed.map(|()| None)));
    }
}

impl State {
    /// Notes what became of devices that were taken back: spare, gone, or failed.
    fn settle(&mut self, devices: Vec<Settled>) {
        self.recycling -= devices.len();
        for device in devices {
            match device {
                Ok(made) => {
                    self.spares.extend(made);
                    self.recycle_error = None;
                }
                Err(error) => {
                    self.left.extend(error.left().iter().cloned());
                    self.recycle_error = Some(error);
                }
            }
        }
    }

    pub(super) fn fail(&mut self, error: Error) {
        let [first, most] = BACK_OFF;
        let pause = first.saturating_mul(2u32.saturating_pow(self.failures.min(16)));
        self.retry_at = Some(Instant::now() + pause.min(most));
        self.failures = self.failures.saturating_add(1);
        self.left.extend(error.left().iter().cloned());
        self.last_error = Some(error);
    }
}
