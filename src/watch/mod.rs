//! Watching COW files fill up: a descriptor to poll, and a look at what has changed.

#[cfg(test)]
mod tests;
mod track;
mod watcher;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::base::{DeviceId, DeviceUuid};
use crate::dm::Usage;
#[expect(unused_imports, reason = "named in the documentation")]
use crate::error::Refusal;
use crate::error::{Error, Result};
use crate::kernel::{MACHINE, Machine};
use watcher::Watcher;

/// Watches snapshots, without a thread of its own: [`Watch::check`] says what is new, and whoever calls it waits in
/// between, until the descriptor is readable or [`Watch::pause`] has passed.
///
/// The descriptor (`DM_DEV_ARM_POLL`) wakes for removals and for stores that become invalid. It does not wake for the
/// one thing that can still be helped: the kernel raises no event while a store fills up, and none when a `PO` store
/// overflows. So there is the pause: half of what the room in the fullest store lasts at the peak rate, and no more
/// than a second. At the peak rate, half of the room above
/// the threshold is still free when [`Change::Above`] is returned.
///
/// Nothing is missed: what happens between a check and the wait wakes the wait, and each check compares what it sees
/// with what was told before. A process that starts anew is told everything anew.
///
/// ```no_run
/// use dmsnap::watch::{Change, Watch};
///
/// const MAX_BYTES: u64 = 8 << 30;
///
/// let mut watch = Watch::new()?;
/// watch.threshold(80);
/// watch.add("vm-42")?;
/// while !watch.is_empty() {
///     for event in watch.check()? {
///         match event.change {
///             Change::Above(usage) => {
///                 // A failure to grow one does not end the watch of the others, and growth has a maximum.
///                 let bytes = usage.total.to_bytes().unwrap_or(MAX_BYTES).saturating_mul(2);
///                 if let Err(error) = dmsnap::snapshot::grow(event.name.as_str(), bytes.min(MAX_BYTES)) {
///                     eprintln!("{}: {error}", event.name);
///                 }
///             }
///             // After `recover` the uuid is a new one: `add` the name again.
///             other => println!("{}: {other}", event.name),
///         }
///     }
///     watch.wait()?;
/// }
/// # Ok::<(), dmsnap::Error>(())
/// ```
pub struct Watch(Watcher<'static, Machine>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&self.0.watched).finish()
    }
}

/// Something new about a watched snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct WatchEvent {
    /// The dm device's name, as it was when the watch began.
    pub name: String,
    /// Its uuid.
    pub uuid: DeviceUuid,
    /// What is new.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub change: Change,
}

/// What is new about a watched snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Its use has reached the threshold, or no chunk fits any more. Told again whenever half of the room that was left
    /// is gone, and when it has become longer and is still above.
    Above(Usage),
    /// A `PO` store is full, and its writes fail: [`recover`](crate::snapshot::recover).
    Overflow,
    /// A `P` or `N` store has overflowed, or the COW file's writes have failed: it is lost.
    Invalid,
    /// Merging failed: the origin could not be written.
    MergeFailed,
    /// The dm device was removed, or released to a pool. It is watched no more.
    Gone,
    /// Its status is a text that this version does not know.
    Unknown(String),
    /// Its status cannot be read for the moment.
    Unreadable(Error),
}

/// `event`, and `usage`, `status` or `error` where the change has one.
#[cfg(feature = "serde")]
impl serde::Serialize for Change {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Flat<'a> {
            event: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            usage: Option<Usage>,
            #[serde(skip_serializing_if = "Option::is_none")]
            status: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<&'a Error>,
        }
        let (event, usage, status, error) = match self {
            Self::Above(usage) => ("above", Some(*usage), None, None),
            Self::Overflow => ("overflow", None, None, None),
            Self::Invalid => ("invalid", None, None, None),
            Self::MergeFailed => ("merge-failed", None, None, None),
            Self::Gone => ("gone", None, None, None),
            Self::Unknown(text) => ("unknown", None, Some(text.as_str()), None),
            Self::Unreadable(error) => ("unreadable", None, None, Some(error)),
        };
        let flat = Flat {
            event,
            usage,
            status,
            error,
        };
        flat.serialize(serializer)
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Above(usage) => write!(
                f,
                "{}% full, {} of {} sectors",
                usage.percent(),
                usage.allocated,
                usage.total
            ),
            Self::Overflow => f.write_str("overflowed: its writes fail until it is recovered"),
            Self::Invalid => f.write_str("invalid: it is lost"),
            Self::MergeFailed => f.write_str("merging failed"),
            Self::Gone => f.write_str("gone"),
            Self::Unknown(text) => write!(f, "unknown status {text:?}"),
            Self::Unreadable(error) => error.fmt(f),
        }
    }
}

impl Watch {
    /// A watch over nothing yet, with a threshold of 80 % and a peak rate of 1 GiB/s.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] when device-mapper's control node cannot be opened.
    pub fn new() -> Result<Self> {
        Watcher::new(&MACHINE).map(Self)
    }

    /// Sets from how many percent on [`Change::Above`] is told. From 100 on it is when no chunk fits any more.
    pub fn threshold(&mut self, percent: u8) -> &mut Self {
        self.0.bounds.threshold = percent;
        self
    }

    /// Sets how fast a guest can write to chunks that it has never written before, at most, in bytes per second. One
    /// that is seen to be faster is looked at more often by itself; this is for a first burst out of the blue.
    pub fn peak_rate(&mut self, bytes_per_second: u64) -> &mut Self {
        self.0.bounds.peak_rate = bytes_per_second;
        self
    }

    /// Watches that snapshot too. One that is watched already is told of anew.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] of kind [`Gone`](crate::ErrorKind::Gone) when there is no such device; [`Refusal::NotOurs`],
    /// [`Refusal::NotLive`].
    pub fn add(&mut self, device: impl Into<DeviceId>) -> Result<()> {
        self.0.add(&device.into())
    }

    /// How many snapshots are watched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.watched.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.watched.is_empty()
    }

    /// Watches that snapshot no more. Says whether it was watched.
    pub fn forget(&mut self, device: impl Into<DeviceId>) -> bool {
        self.0.forget(&device.into())
    }

    /// Looks at what is due, or after a dm event at everything, and says what is new. Never waits.
    ///
    /// Events of other dm devices have it look at everything too: it spends at most a quarter of the time on that.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] when the descriptor cannot be armed. A snapshot that cannot be read is
    /// [`Change::Unreadable`] and hides no other.
    pub fn check(&mut self) -> Result<Vec<WatchEvent>> {
        self.0.check()
    }

    /// For how long the next check can wait if the descriptor stays unreadable; at most a second.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.0.pause()
    }

    /// Waits until the next check is due, for who has nothing else to wait for. A signal that is caught ends it too.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] when the descriptor cannot be polled.
    pub fn wait(&self) -> Result<()> {
        self.0.poll(self.pause()).map(drop)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.events.as_fd()
    }
}
