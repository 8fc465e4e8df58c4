//! The errno policy: what an errno means at the step that met it, and how long a busy device is waited for.
//!
//! The one place that decides on an errno. It is pure: it asks nothing and waits for nothing.

use std::time::Duration;

use nix::errno::Errno;

use crate::error::Step;

/// What an errno means, given the step that met it.
///
/// Rows are tried from the top; the first that fits decides. `*` is any step, or any errno.
///
/// | step | errno | verdict |
/// | --- | --- | --- |
/// | FindLoop, OpenLoop, LockLoop, AttachLoop | EBUSY, EAGAIN | TakeAnother |
/// | OpenLoop | ENXIO, ENOENT, ENODEV | TakeAnother |
/// | LockFile, TestLock | EAGAIN | InUse |
/// | * | EINTR, EAGAIN | Again |
/// | Remove, DetachLoop | EBUSY | Busy |
/// | Remove, Query, Status, Rename | ENXIO, ENOENT, ENODEV | Gone |
/// | InspectLoop, DetachLoop | ENXIO, ENOENT, ENODEV | Gone |
/// | FindData | ENXIO | Gone |
/// | Unlink, MoveFile | ENOENT | Gone |
/// | Create, SetUuid, Rename | EBUSY | NameTaken |
/// | Link, MakeFile, MoveFile | EEXIST | NameTaken |
/// | Load, OpenFile | EBUSY | InUse |
/// | OpenFile, MakeFile | ENOENT, ENOTDIR | Missing |
/// | OpenFile | EISDIR | NotAFile |
/// | OpenLoopControl, OpenMapper | ENOENT, ENODEV, ENXIO | Unsupported |
/// | AttachLoop, ReadDiskseq, TargetVersion | EINVAL, ENOTTY, ENOSYS | Unsupported |
/// | * | EPERM, EACCES | NoPermission |
/// | * | ENOMEM, ENOSPC, ENFILE, EMFILE, EDQUOT | Exhausted |
/// | * | * | Fatal |
///
/// Sources: `LOOP_CONFIGURE` answers EBUSY when another process took the device that `LOOP_CTL_GET_FREE` had
/// named (`drivers/block/loop.c`, `loop_configure`), and opening a loop device that is being deleted answers ENXIO
/// (`lo_open`, 5.14 and later). `DM_DEV_CREATE` answers EBUSY for a name or uuid that exists, `DM_DEV_REMOVE` for
/// an open device, and every lookup answers ENXIO for one that is not there (`drivers/md/dm-ioctl.c`).
/// `SEEK_DATA` answers ENXIO where a file has no more data (lseek(2)).
/// `DM_TABLE_LOAD` answers EBUSY when a mount or an exclusive opener holds a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// A race for a loop device was lost: take another one, and leave the lost one alone.
    TakeAnother,
    /// Nothing was done; ask again at once, a bounded number of times.
    Again,
    /// Somebody has the device open: worth waiting for.
    Busy,
    /// What was to be removed or asked about is not there.
    Gone,
    /// Another device, or another file, has the name.
    NameTaken,
    /// Somebody else holds the file or the loop device, and waiting will not help.
    InUse,
    /// The image, the COW file or its directory does not exist.
    Missing,
    /// It is a directory.
    NotAFile,
    /// This kernel, or this container, has no such thing.
    Unsupported,
    /// The caller lacks a capability or a permission.
    NoPermission,
    /// Out of memory, space or file descriptors.
    Exhausted,
    /// Anything else.
    Fatal,
}

/// Judges `errno` at `step`, as the table of [`Verdict`] says.
pub(crate) fn verdict(step: Step, errno: Errno) -> Verdict {
    use Errno as E;
    use Step as S;
    match (step, errno) {
        (S::FindLoop | S::OpenLoop | S::LockLoop | S::AttachLoop, E::EBUSY | E::EAGAIN) => {
            Verdict::TakeAnother
        }
        (S::OpenLoop, E::ENXIO | E::ENOENT | E::ENODEV) => Verdict::TakeAnother,
        (S::LockFile | S::TestLock, E::EAGAIN) => Verdict::InUse,
        (_, E::EINTR | E::EAGAIN) => Verdict::Again,
        (S::Remove | S::DetachLoop, E::EBUSY) => Verdict::Busy,
        (S::Remove | S::Query | S::Status | S::Rename, E::ENXIO | E::ENOENT | E::ENODEV) => {
            Verdict::Gone
        }
        (S::InspectLoop | S::DetachLoop, E::ENXIO | E::ENOENT | E::ENODEV) => Verdict::Gone,
        (S::FindData, E::ENXIO) => Verdict::Gone,
        (S::Unlink | S::MoveFile, E::ENOENT) => Verdict::Gone,
        (S::Create | S::SetUuid | S::Rename, E::EBUSY) => Verdict::NameTaken,
        (S::Link | S::MakeFile | S::MoveFile, E::EEXIST) => Verdict::NameTaken,
        (S::Load | S::OpenFile, E::EBUSY) => Verdict::InUse,
        (S::OpenFile | S::MakeFile, E::ENOENT | E::ENOTDIR) => Verdict::Missing,
        (S::OpenFile, E::EISDIR) => Verdict::NotAFile,
        (S::OpenLoopControl | S::OpenMapper, E::ENOENT | E::ENODEV | E::ENXIO) => {
            Verdict::Unsupported
        }
        (S::AttachLoop | S::ReadDiskseq | S::TargetVersion, E::EINVAL | E::ENOTTY | E::ENOSYS) => {
            Verdict::Unsupported
        }
        (_, E::EPERM | E::EACCES) => Verdict::NoPermission,
        (_, E::ENOMEM | E::ENOSPC | E::ENFILE | E::EMFILE | E::EDQUOT) => Verdict::Exhausted,
        _ => Verdict::Fatal,
    }
}

/// What stands in a message for a device that was seen to be in use, so that the kernel was not even asked.
pub(crate) const BUSY: Errno = Errno::EBUSY;

/// What the kernel answers about a device that is not there, for one that is another snapshot's by now.
pub(crate) const GONE: Errno = Errno::ENXIO;

/// What stands in a message for a merge that the kernel gave up, which it says in a status line only.
pub(crate) const MERGE_FAILED: Errno = Errno::EIO;

/// How often a call is repeated at once on [`Verdict::Again`] before it counts as failed.
///
/// None of our ioctls sleeps interruptibly, so one repetition is already rare; the bound keeps a kernel or a
/// sandbox that answers EINTR for ever from hanging the caller.
pub(crate) const AT_ONCE: u32 = 16;

/// How long a busy device is waited for, and how often it is asked meanwhile.
///
/// The first pause is short because the usual holder (a VMM that has just exited, a probing udev) is gone within
/// a millisecond; each pause is twice the one before, up to 250 us. After a second they become 10 ms, and the device's
/// node is watched (inotify, `IN_CLOSE`), so that a close ends the pause and brings the short ones back. So a removal
/// follows its holder's last close at once, and a wait of 15 s takes some 5,400 looks.
///
/// A holder that opened another node of the same device (one made by `mknod` in a jail), and one without a node (a
/// mount, swap), closes unseen: after the first second, that is noticed within 10 ms. [`Retry::pauses`] keeps to its
/// own ceiling instead, and nothing is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    deadline: Duration,
    first: Duration,
    ceiling: Duration,
    /// The pause while a close would be told of; no longer than `ceiling` if nothing is to be watched.
    watching: Duration,
}

/// For how long short pauses go on, from the beginning and from each close that was seen: the event of a close comes
/// before the release, which may have pages to write first.
///
/// A watch is for long waits only: the kernel ends one with a grace period (`fsnotify_destroy_group`), 10 to 25 ms by
/// which a removal returns later.
const RESTLESS: Duration = Duration::from_secs(1);

impl Retry {
    /// One attempt, no waiting.
    pub const ONCE: Self = Self::until(Duration::ZERO);

    /// One attempt, at a deadline that has come: unlike [`Retry::ONCE`] it counts as having waited.
    pub(crate) const LAST: Self = Self::until(Duration::from_nanos(1));

    /// Repeats for at most `deadline`, pausing 100 us at first, and 250 us or, from the second second on, 10 ms at
    /// most.
    #[must_use]
    pub const fn until(deadline: Duration) -> Self {
        Self {
            deadline,
            first: Duration::from_micros(100),
            ceiling: Duration::from_micros(250),
            watching: Duration::from_millis(10),
        }
    }

    /// Sets the first pause and the longest one. The device is not watched then.
    #[must_use]
    pub const fn pauses(mut self, first: Duration, ceiling: Duration) -> Self {
        self.first = first;
        self.ceiling = ceiling;
        self.watching = ceiling;
        self
    }

    /// For questions that cost more than a look at an open count, and are answered by no close: with the longer pauses
    /// from the beginning.
    pub(crate) const fn sparing(mut self) -> Self {
        self.ceiling = self.watching;
        self
    }

    /// What is left of it when so much time has gone.
    pub(crate) fn less(mut self, elapsed: Duration) -> Self {
        self.deadline = self.deadline.saturating_sub(elapsed);
        self
    }

    /// Whether to be told of closes, so long after the beginning or the last of them.
    pub(crate) fn watches(&self, still: Duration) -> bool {
        self.watching > self.ceiling && still >= RESTLESS
    }

    /// What becomes of a pause from then on.
    pub(crate) fn watching(&self, pause: Duration, elapsed: Duration) -> Duration {
        let left = self.deadline.saturating_sub(elapsed);
        self.watching.max(pause).min(left)
    }

    /// The pause after attempt number `attempt` (from 0), `elapsed` after the first one began; `None` when the
    /// deadline has come. The last pause is cut so that one attempt falls on the deadline itself.
    ///
    /// An attempt at more than eight devices is as much rarer as it takes longer.
    pub(crate) fn pause(
        &self,
        attempt: u32,
        devices: usize,
        elapsed: Duration,
    ) -> Option<Duration> {
        let left = self
            .deadline
            .checked_sub(elapsed)
            .filter(|left| !left.is_zero())?;
        let grown = self
            .first
            .saturating_mul(2u32.saturating_pow(attempt.min(31)));
        let rarer = u32::try_from(devices.div_ceil(8)).unwrap_or(u32::MAX);
        Some(grown.min(self.ceiling).saturating_mul(rarer).min(left))
    }
}

impl Default for Retry {
    /// 15 seconds.
    fn default() -> Self {
        Self::until(Duration::from_secs(15))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the table in [`Verdict`]'s documentation, read from this file.
    fn documented() -> Vec<(Vec<String>, Vec<String>, String)> {
        let names = |cell: &str| cell.split(',').map(|name| name.trim().to_owned()).collect();
        include_str!("policy.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("/// | "))
            .skip(2)
            .map(|row| {
                let mut cells = row.trim_end_matches(" |").split(" | ");
                let mut next = || cells.next().expect("three cells");
                (names(next()), names(next()), next().to_owned())
            })
            .collect()
    }

    #[test]
    fn the_documented_table_is_the_policy_for_every_step_and_errno() {
        let rows = documented();
        assert_eq!(rows.len(), 19);
        let fits =
            |names: &[String], name: &str| names.iter().any(|each| each == "*" || each == name);
        for step in Step::ALL {
            for errno in (1..=133).map(Errno::from_raw) {
                let (step_name, errno_name) = (format!("{step:?}"), format!("{errno:?}"));
                let row = rows
                    .iter()
                    .find(|row| fits(&row.0, &step_name) && fits(&row.1, &errno_name));
                let expected = &row.expect("the last row fits all").2;
                assert_eq!(
                    &format!("{:?}", verdict(*step, errno)),
                    expected,
                    "{step_name} {errno_name}"
                );
            }
        }
        let readme = include_str!("../README.md");
        let table = include_str!("policy.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("/// | "));
        for row in table {
            assert!(
                readme.contains(&format!("\n| {row}\n")),
                "README lacks: {row}"
            );
        }
        for row in &rows {
            for step in row.0.iter().filter(|step| *step != "*") {
                assert!(
                    Step::ALL.iter().any(|each| format!("{each:?}") == *step),
                    "no step {step}"
                );
            }
        }
    }

    #[test]
    fn pauses_double_from_well_under_a_millisecond_to_the_ceiling_and_end_on_the_deadline() {
        let pauses_of = |retry: Retry| {
            let mut elapsed = Duration::ZERO;
            let mut pauses = Vec::new();
            let attempt = |pauses: &Vec<_>| u32::try_from(pauses.len()).expect("few");
            while let Some(pause) = retry.pause(attempt(&pauses), 1, elapsed) {
                elapsed += pause;
                pauses.push(pause.as_micros());
            }
            (pauses, elapsed)
        };
        let ms = Duration::from_millis;
        assert_eq!(
            pauses_of(Retry::until(ms(2))),
            (vec![100, 200, 250, 250, 250, 250, 250, 250, 200], ms(2))
        );
        assert_eq!(
            pauses_of(Retry::until(ms(30)).sparing()),
            (
                vec![100, 200, 400, 800, 1600, 3200, 6400, 10_000, 7300],
                ms(30)
            )
        );
        assert_eq!(Retry::ONCE.pause(0, 1, Duration::ZERO), None);
        let retry = Retry::default();
        let longest = |devices| retry.pause(u32::MAX, devices, Duration::ZERO);
        assert_eq!(
            [1, 8, 9, 64].map(longest),
            [250, 250, 500, 2000].map(|us| Some(Duration::from_micros(us)))
        );
    }

    #[test]
    fn closes_are_watched_for_unless_the_pauses_are_the_callers() {
        let ms = Duration::from_millis;
        let retry = Retry::default();
        assert!(!retry.watches(ms(999)) && retry.watches(ms(1000)));
        assert_eq!(retry.watching(ms(1), ms(2000)), ms(10));
        assert_eq!(retry.watching(ms(1), ms(14_997)), ms(3));
        assert!(!retry.sparing().watches(ms(5000)));
        assert!(!retry.pauses(ms(1), ms(50)).watches(ms(5000)));
    }
}
