//! The errno policy: it decides what an errno means at the step that met it.
//!
//! No other place in the crate decides on an errno. Nothing here makes a system call.

use nix::errno::Errno;

use super::Step;

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
/// | Remove, Query, Status, Rename, Clear | ENXIO, ENOENT, ENODEV | Gone |
/// | InspectLoop, DetachLoop | ENXIO, ENOENT, ENODEV | Gone |
/// | FindData | ENXIO | Gone |
/// | Unlink, MoveFile | ENOENT | Gone |
/// | Create, SetUuid, Rename | EBUSY | NameTaken |
/// | Link, MakeFile, MoveFile, AddLoop | EEXIST | NameTaken |
/// | Load, OpenFile | EBUSY | InUse |
/// | OpenFile, MakeFile, InspectFile | ENOENT, ENOTDIR | Missing |
/// | OpenFile | EISDIR | NotAFile |
/// | OpenFile | ELOOP | SymbolicLink |
/// | OpenLoopControl, OpenMapper | ENOENT, ENODEV, ENXIO | Unsupported |
/// | ReadDiskseq, TargetVersion, SyncFile, Link | EINVAL, ENOTTY, ENOSYS | Unsupported |
/// | AttachLoop | ENOTTY, ENOSYS | Unsupported |
/// | PunchHole | EOPNOTSUPP, ENODEV, ENOSYS | Unsupported |
/// | MeasureFile | ENODATA, EINVAL, ENOTTY, EOPNOTSUPP, ENOSYS | Unsupported |
/// | * | EPERM, EACCES | NoPermission |
/// | * | ENOMEM, ENOSPC, ENFILE, EMFILE, EDQUOT | Exhausted |
/// | * | * | Fatal |
///
/// Sources: `LOOP_CONFIGURE` answers EBUSY when another process took the device that `LOOP_CTL_GET_FREE` had
/// named (`drivers/block/loop.c`, `loop_configure`), and opening a loop device that is being deleted answers ENXIO
/// (`lo_open`, 5.14 and later). `DM_DEV_CREATE` answers EBUSY for a name or uuid that exists, `DM_DEV_REMOVE` for
/// an open device, and every lookup answers ENXIO for one that is not there (`drivers/md/dm-ioctl.c`).
/// `LOOP_CONFIGURE` answers EINVAL for a file that cannot back a loop device, and kernels before 5.8 answer it too.
/// `renameat2` with `RENAME_NOREPLACE` answers EINVAL where the file system has no such thing (rename(2)).
/// `SEEK_DATA` answers ENXIO where a file has no more data (lseek(2)). `FS_IOC_MEASURE_VERITY` answers ENODATA for a file
/// without fs-verity, and ENOTTY or EOPNOTSUPP where the file system or the kernel has none (fsverity.rst).
/// `DM_TABLE_LOAD` answers EBUSY when a mount or an exclusive opener holds a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    /// Another process took the loop device first: take another device, and leave that one alone.
    TakeAnother,
    /// The call did nothing: repeat it at once, at most [`AT_ONCE`] times.
    Again,
    /// Somebody has the device open; waiting for that helps.
    Busy,
    /// The device or file that was to be removed or asked about is not there.
    Gone,
    /// Another device, or another file, has the name.
    NameTaken,
    /// Somebody else has the file or the loop device in use, and waiting will not help.
    InUse,
    /// The image, the COW file or its directory does not exist.
    Missing,
    /// The path is a directory's.
    NotAFile,
    /// The path is a symbolic link where none is followed, or leads through too many of them.
    SymbolicLink,
    /// This kernel, this file system or this container does not have what was asked for.
    Unsupported,
    /// The caller lacks a capability or a permission.
    NoPermission,
    /// Memory, space or file descriptors ran out.
    Exhausted,
    /// The errno is none of the above: the operation fails.
    Fatal,
}

/// Returns the verdict on `errno` at `step`, by the table of [`Verdict`].
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
        (
            S::Remove | S::Query | S::Status | S::Rename | S::Clear,
            E::ENXIO | E::ENOENT | E::ENODEV,
        ) => Verdict::Gone,
        (S::InspectLoop | S::DetachLoop, E::ENXIO | E::ENOENT | E::ENODEV) => Verdict::Gone,
        (S::FindData, E::ENXIO) => Verdict::Gone,
        (S::Unlink | S::MoveFile, E::ENOENT) => Verdict::Gone,
        (S::Create | S::SetUuid | S::Rename, E::EBUSY) => Verdict::NameTaken,
        (S::Link | S::MakeFile | S::MoveFile | S::AddLoop, E::EEXIST) => Verdict::NameTaken,
        (S::Load | S::OpenFile, E::EBUSY) => Verdict::InUse,
        (S::OpenFile | S::MakeFile | S::InspectFile, E::ENOENT | E::ENOTDIR) => Verdict::Missing,
        (S::OpenFile, E::EISDIR) => Verdict::NotAFile,
        (S::OpenFile, E::ELOOP) => Verdict::SymbolicLink,
        (S::OpenLoopControl | S::OpenMapper, E::ENOENT | E::ENODEV | E::ENXIO) => {
            Verdict::Unsupported
        }
        (
            S::ReadDiskseq | S::TargetVersion | S::SyncFile | S::Link,
            E::EINVAL | E::ENOTTY | E::ENOSYS,
        ) => Verdict::Unsupported,
        (S::AttachLoop, E::ENOTTY | E::ENOSYS) => Verdict::Unsupported,
        (S::PunchHole, E::EOPNOTSUPP | E::ENODEV | E::ENOSYS) => Verdict::Unsupported,
        (S::MeasureFile, E::ENODATA | E::EINVAL | E::ENOTTY | E::EOPNOTSUPP | E::ENOSYS) => {
            Verdict::Unsupported
        }
        (_, E::EPERM | E::EACCES) => Verdict::NoPermission,
        (_, E::ENOMEM | E::ENOSPC | E::ENFILE | E::EMFILE | E::EDQUOT) => Verdict::Exhausted,
        _ => Verdict::Fatal,
    }
}

/// The errno in the message about a device that was seen to be in use, so that the kernel was not even asked.
pub(crate) const BUSY: Errno = Errno::EBUSY;

/// The errno in the message about a device that serves another snapshot by now: the kernel's own for one that is not
/// there.
pub(crate) const GONE: Errno = Errno::ENXIO;

/// The errno in the message about a merge that the kernel gave up, which it says in a status line only.
pub(crate) const MERGE_FAILED: Errno = Errno::EIO;

/// The errno in the message about a device that was removed to be made anew, if making it is refused.
pub(crate) const NOT_REMADE: Errno = Errno::ECANCELED;

/// The errno in the message about a file that is shorter than what is known to be in it.
pub(crate) const CUT_SHORT: Errno = Errno::EIO;

/// How often a call is repeated at once on [`Verdict::Again`] before it counts as failed.
///
/// Of the ioctls in use only a suspension sleeps interruptibly, and an interrupted one has suspended nothing; so one
/// repetition is already rare. The bound keeps a kernel or a sandbox that always answers EINTR from hanging the caller.
pub(crate) const AT_ONCE: u32 = 16;

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
        assert_eq!(rows.len(), 23);
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
        let guide = include_str!("../guide/errors.md");
        let table = include_str!("policy.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("/// | "));
        for row in table {
            assert!(
                guide.contains(&format!("\n| {row}\n")),
                "the guide lacks: {row}"
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
    fn the_guide_says_what_kind_each_verdict_becomes() {
        let guide = include_str!("../guide/errors.md");
        for step in Step::ALL {
            for errno in (1..=133).map(Errno::from_raw) {
                let verdict = verdict(*step, errno);
                let (begin, kind) = (format!("| {verdict:?} |"), crate::ErrorKind::from(verdict));
                let row = guide.lines().find(|line| line.starts_with(&begin));
                let last = row.and_then(|row| row.trim_end_matches(" |").rsplit("| ").next());
                let last = last.and_then(|cell| cell.split(',').next());
                assert_eq!(last, Some(format!("{kind:?}").as_str()), "{begin}");
            }
        }
    }
}
