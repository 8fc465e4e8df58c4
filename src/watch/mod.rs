//! Watches snapshots whose COW files fill up: a descriptor to poll, and a call that returns what has changed.

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

/// Watches any number of snapshots, without a thread of its own. [`Watch::check`] returns what has changed. Call it
/// again when the descriptor is readable or [`Watch::pause`] has passed, or let [`Watch::wait`] wait for that.
///
/// The descriptor (`DM_DEV_ARM_POLL`) becomes readable when a device is removed or a store becomes invalid. The kernel
/// raises no event while a store fills up, though, and none when a `PO` store overflows, so the stores are also looked
/// at after each pause: half the time in which the room in the fullest store would fill at the peak rate, at most a
/// second. At the peak rate, half of the room above the threshold is still free when [`Change::Above`] is returned.
///
/// Nothing is missed: what happens between a check and the wait ends the wait, and each check compares what it sees
/// with what was returned before. A new `Watch` returns everything anew.
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
///                     eprintln!("{}: {}", event.name, error.one_line());
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

/// A change of a watched snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct WatchEvent {
    /// The dm device's name when it was added.
    pub name: String,
    /// The dm device's uuid.
    pub uuid: DeviceUuid,
    /// What has changed.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub change: Change,
}

/// What has changed about a watched snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Its usage has reached the threshold, or no chunk fits any more. This is returned again whenever half of the room
    /// that was left is gone, and if the COW file was grown and the usage is still above.
    Above(Usage),
    /// A `PO` store is full, and its writes fail. [`recover`](crate::snapshot::recover) makes it go on.
    Overflow,
    /// A `P` or `N` store has overflowed, or writing the COW file has failed: the disk is lost.
    Invalid,
    /// A merge failed, as the origin could not be written.
    MergeFailed,
    /// The dm device was removed, or released to a pool. It is not watched any more.
    Gone,
    /// Its status is a text that this version does not know.
    Unknown(String),
    /// Its status cannot be read for the moment.
    Unreadable(Error),
}

/// The serialised form: `event`, and `usage`, `status` or `error` if the change has one.
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
    /// Makes a watch without snapshots, with a threshold of 80 % and a peak rate of 1 GiB/s.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] if device-mapper's control node cannot be opened.
    pub fn new() -> Result<Self> {
        Watcher::new(&MACHINE).map(Self)
    }

    /// Sets the usage in percent from which on [`Change::Above`] is returned. With 100 or more that is when no chunk
    /// fits any more.
    pub fn threshold(&mut self, percent: u8) -> &mut Self {
        self.0.bounds.threshold = percent;
        self
    }

    /// Sets the greatest rate, in bytes per second, at which a guest is expected to write to chunks that it has never
    /// written before. A store that fills faster is looked at more often anyway; this matters for the first burst.
    pub fn peak_rate(&mut self, bytes_per_second: u64) -> &mut Self {
        self.0.bounds.peak_rate = bytes_per_second;
        self
    }

    /// Adds a snapshot. If it is watched already, its state is returned anew.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] of kind [`Gone`](crate::ErrorKind::Gone) if there is no such device; [`Refusal::NotOurs`] if
    /// another program made it; [`Refusal::NotLive`] if it is half-made or suspended.
    pub fn add(&mut self, device: impl Into<DeviceId>) -> Result<()> {
        self.0.add(&device.into())
    }

    /// Returns how many snapshots are watched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.watched.len()
    }

    /// True if no snapshot is watched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.watched.is_empty()
    }

    /// Removes a snapshot from the watch; returns true if it was watched.
    pub fn forget(&mut self, device: impl Into<DeviceId>) -> bool {
        self.0.forget(&device.into())
    }

    /// Reads the snapshots whose pause is over, or all of them after a dm event, and returns what has changed. It never
    /// waits.
    ///
    /// Events of other dm devices also make it read all snapshots. If they are frequent, it limits that to a quarter of
    /// the time.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] if the descriptor cannot be armed. A snapshot that cannot be read is [`Change::Unreadable`]
    /// and hides no other.
    pub fn check(&mut self) -> Result<Vec<WatchEvent>> {
        self.0.check()
    }

    /// Returns how long to wait until the next check if the descriptor does not become readable; at most a second.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.0.pause()
    }

    /// Waits until the next check is due, for callers without an event loop. A signal that is caught ends the wait too.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] if the descriptor cannot be polled.
    pub fn wait(&self) -> Result<()> {
        self.0.poll(self.pause()).map(drop)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.events.as_fd()
    }
}
