//! How things are to be taken down.

use std::time::Duration;

use remove::{Outcome, When};

use super::{cleanup, many, remove};
use crate::base::{DeviceId, Handles};
use crate::call::in_parallel;
use crate::error::{Result, Retry};
use crate::kernel::MACHINE;

/// How to take snapshots down: for how long a busy device is waited for, and what becomes of it then.
///
/// [`cleanup`](crate::cleanup()) and [`remove`](crate::remove()) are this with 15 seconds, and fail at the end.
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

/// What becomes of a dm device that somebody has open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenBusy {
    /// It is waited for until the deadline; then the teardown fails with the holders' names, as
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    #[default]
    Fail,
    /// The kernel removes it at its last close (`DM_DEFERRED_REMOVE`), and its loop devices then; its users are not waited
    /// for. Until then it works on, and its name stays taken. `cleanup` of one that nobody has open still waits, to its
    /// deadline, for a probe that has a loop device open.
    Defer,
}

impl Teardown {
    /// Waits for up to 15 seconds, and fails then.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets for how long a busy device is waited for. Zero is one attempt, for event loops.
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
    /// As [`remove`](crate::remove()).
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
    /// As [`cleanup`](crate::cleanup()).
    pub fn cleanup(&self, handles: &Handles) -> Result<Outcome> {
        match self.when_busy {
            WhenBusy::Fail => cleanup::clean(&MACHINE, handles, &self.retry),
            WhenBusy::Defer => cleanup::clean_deferred(&MACHINE, handles, &self.retry),
        }
    }

    /// Takes down what each of the handles names, side by side; results in the order given.
    ///
    /// A removal mostly waits for the kernel, so many are waited for at once, by at most 16 threads, which end before
    /// this returns. One busy device keeps no other waiting: what can be removed is, and then all busy ones together
    /// are waited for. The deadline is one for all.
    ///
    /// ```no_run
    /// # let fleet: Vec<dmsnap::Handles> = Vec::new();
    /// for (handles, result) in fleet.iter().zip(dmsnap::Teardown::new().cleanup_all(&fleet)) {
    ///     if let Err(error) = result {
    ///         eprintln!("{:?}: {error}", handles.name);
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

    /// Waits until nothing of what the handles name is left: for after a deferred removal, which takes the dm device
    /// away at its last close and its loop devices a little later. It removes nothing itself.
    ///
    /// An origin loop device that other snapshots use as well is not waited for, nor is a loop device without identity.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`](crate::Error::Failed) of kind [`Busy`](crate::ErrorKind::Busy) names what is still there at
    /// the deadline.
    pub fn wait_gone(&self, handles: &Handles) -> Result<()> {
        cleanup::wait_gone(&MACHINE, handles, &self.retry)
    }
}
