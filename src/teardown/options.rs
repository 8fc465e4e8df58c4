//! Options for taking snapshots down.

use std::time::Duration;

use remove::{Outcome, When};

use super::{cleanup, many, remove};
use crate::base::{DeviceId, Handles};
use crate::call::in_parallel;
use crate::error::{Result, Retry};
use crate::kernel::MACHINE;

/// Options for taking snapshots down, and the calls that do it: how long to wait for a busy device, and what to do with
/// it.
///
/// [`cleanup`](crate::cleanup()) and [`remove`](crate::remove()) do the same with the default options: they wait 15
/// seconds and then fail.
///
/// ```no_run
/// use std::time::Duration;
///
/// use dmsnap::{Teardown, WhenBusy};
///
/// let outcome = Teardown::new().deadline(Duration::from_secs(1)).remove("vm-42")?;
/// // In an event loop: one attempt, and what is busy goes at its last close.
/// let outcome = Teardown::new().when_busy(WhenBusy::Defer).remove("vm-43")?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Teardown {
    retry: Retry,
    when_busy: WhenBusy,
}

/// What to do with a dm device that somebody has open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenBusy {
    /// The teardown waits until the deadline. Then it fails with [`ErrorKind::Busy`](crate::ErrorKind::Busy), and the
    /// error names who has the device open.
    #[default]
    Fail,
    /// The kernel removes the device at its last close (`DM_DEFERRED_REMOVE`), and detaches its loop devices then. The
    /// teardown does not wait for that. Until then the disk works, and its name stays taken. If nobody has the dm
    /// device open, `cleanup` still waits, up to its deadline, for a probe that has a loop device open.
    Defer,
}

impl Teardown {
    /// Makes the default options: wait for up to 15 seconds, then fail.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how long to wait for a busy device. Zero makes one attempt, for event loops.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.retry = Retry::until(deadline);
        self
    }

    /// Sets the deadline and the pauses between attempts.
    pub fn retry(&mut self, retry: Retry) -> &mut Self {
        self.retry = retry;
        self
    }

    /// Sets what becomes of a busy device.
    pub fn when_busy(&mut self, when_busy: WhenBusy) -> &mut Self {
        self.when_busy = when_busy;
        self
    }

    /// Removes a dm device, as [`remove`](crate::remove()) does.
    ///
    /// # Errors
    ///
    /// Those of [`remove`](crate::remove()).
    pub fn remove(&self, device: impl Into<DeviceId>) -> Result<Outcome> {
        let (retry, when) = match self.when_busy {
            WhenBusy::Fail => (&self.retry, When::Now),
            WhenBusy::Defer => (&Retry::ONCE, When::LastClose),
        };
        remove::remove_id(&MACHINE, &device.into(), retry, when)
    }

    /// Takes down what the handles name, as [`cleanup`](crate::cleanup()) does.
    ///
    /// # Errors
    ///
    /// Those of [`cleanup`](crate::cleanup()).
    pub fn cleanup(&self, handles: &Handles) -> Result<Outcome> {
        match self.when_busy {
            WhenBusy::Fail => cleanup::clean(&MACHINE, handles, &self.retry),
            WhenBusy::Defer => cleanup::clean_deferred(&MACHINE, handles, &self.retry),
        }
    }

    /// Takes down what each of the handles names, side by side; the results have the order of the handles.
    ///
    /// It uses at most 16 threads, which end before this returns. A busy device delays no other: first all that can be
    /// removed is removed, then it waits for the busy ones together. There is one deadline for all.
    ///
    /// ```no_run
    /// # let fleet: Vec<dmsnap::Handles> = Vec::new();
    /// for (handles, result) in fleet.iter().zip(dmsnap::Teardown::new().cleanup_all(&fleet)) {
    ///     if let Err(error) = result {
    ///         eprintln!("{:?}: {}", handles.name, error.one_line());
    ///     }
    /// }
    /// ```
    pub fn cleanup_all<'a>(
        &self,
        handles: impl IntoIterator<Item = &'a Handles>,
    ) -> Vec<Result<Outcome>> {
        let all: Vec<&Handles> = handles.into_iter().collect();
        match (self.when_busy, &all[..]) {
            (_, []) => Vec::new(),
            (WhenBusy::Fail, [one]) => vec![self.cleanup(one)],
            (WhenBusy::Fail, _) => many::clean_all(&MACHINE, &all, &self.retry),
            (WhenBusy::Defer, _) => in_parallel(&all, |one| self.cleanup(one)),
        }
    }

    /// Waits, at most to the deadline, until nothing of what the handles name is left, and removes nothing. Use it after a
    /// deferred removal, in which the dm device goes at its last close and its loop devices a little later.
    ///
    /// It waits neither for an origin's loop device that other snapshots use too, nor for a loop device without
    /// identity.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`](crate::Error::Failed) of kind [`Busy`](crate::ErrorKind::Busy) names what is still there at
    /// the deadline.
    pub fn wait_gone(&self, handles: &Handles) -> Result<()> {
        cleanup::wait_gone(&MACHINE, handles, &self.retry)
    }
}
