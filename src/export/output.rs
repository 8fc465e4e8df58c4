//! The output of an export: nameless until it is complete.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;

use super::copy::failed;
use crate::base::{DeviceNumber, FileId};
use crate::call::ask;
use crate::error::{Error, Leftover, Refusal, Result, Step};
use crate::kernel::sys;

/// Refuses an output that is there and must not be replaced.
pub(super) fn admit(path: &Path, replace: bool, inputs: &[FileId]) -> Result<()> {
    // Whatever else is wrong with the path, making the file tells.
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let id = FileId {
        dev: DeviceNumber::from_dev_t(found.dev()),
        inode: found.ino(),
    };
    let (path, kind) = (path.to_owned(), found.file_type());
    let refusal = if inputs.contains(&id) {
        Refusal::OutputIsInput { path }
    } else if !kind.is_file() {
        let kind = match kind {
            _ if kind.is_dir() => "a directory",
            _ if kind.is_symlink() => "a symbolic link",
            _ if kind.is_block_device() => "a block device",
            _ => "no regular file",
        };
        Refusal::OutputNotAFile { path, kind }
    } else if !replace {
        Refusal::OutputExists { path }
    } else {
        return Ok(());
    };
    Err(refusal.into())
}

/// A file that does not have its name yet, and goes away with this value until it has.
pub(super) struct Output<'a> {
    path: &'a Path,
    file: File,
    /// Where the file system has no nameless files, or nothing could give them a name.
    temporary: Option<PathBuf>,
}

impl<'a> Output<'a> {
    pub(super) fn make(path: &'a Path) -> Result<Self> {
        let nameless = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).mode(0o600);
            options.custom_flags(OFlag::O_TMPFILE.bits());
            let file = options.open(directory(path)).ok()?;
            magic_link(&file).exists().then_some(file)
        };
        match nameless() {
            Some(file) => Ok(Self {
                path,
                file,
                temporary: None,
            }),
            None => Self::make_named(path),
        }
    }

    fn make_named(path: &'a Path) -> Result<Self> {
        let temporary = beside(path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).create_new(true);
        let file = options.open(&temporary);
        Ok(Self {
            path,
            file: file.map_err(|error| failed(Step::MakeFile, &temporary, &error))?,
            temporary: Some(temporary),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Shares the origin's blocks, if the file system can: `FICLONE`.
    pub(super) fn clone_of(&self, origin: &File) -> bool {
        sys::clone_file(self.file.as_fd(), origin.as_fd()).is_ok()
    }

    /// Gives the file its name, with everything on disk.
    pub(super) fn publish(mut self, replace: bool) -> Result<()> {
        match self.place(replace) {
            Ok(()) => self.sync_directory(),
            Err(error) => self.discard(Some(error)),
        }
    }

    fn place(&mut self, replace: bool) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|error| failed(Step::SyncFile, self.path, &error))?;
        if !replace {
            // A link, unlike a renaming, replaces nothing.
            match self.temporary.take() {
                None => self.link(self.path)?,
                Some(temporary) => {
                    let linked = fs::hard_link(&temporary, self.path);
                    self.temporary = Some(temporary);
                    linked.map_err(|error| failed(Step::Link, self.path, &error))?;
                    self.unlink().map_err(debris)?;
                }
            }
            return Ok(());
        }
        if self.temporary.is_none() {
            let temporary = beside(self.path)?;
            self.link(&temporary)?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, self.path)
                .map_err(|error| failed(Step::Link, self.path, &error))?;
        }
        self.temporary = None;
        Ok(())
    }

    fn link(&self, path: &Path) -> Result<()> {
        let (from, flags) = (magic_link(&self.file), AtFlags::AT_SYMLINK_FOLLOW);
        ask(Step::Link, path, || {
            linkat(AT_FDCWD, &from, AT_FDCWD, path, flags)
        })
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = directory(self.path);
        File::open(directory)
            .and_then(|opened| opened.sync_all())
            .map_err(|error| failed(Step::SyncFile, directory, &error))
    }

    /// Leaves nothing of the file; the failure, if there is one, is the answer.
    pub(super) fn discard(mut self, error: Option<Error>) -> Result<()> {
        let Err(unlinked) = self.unlink().map_err(debris) else {
            return error.map_or(Ok(()), Err);
        };
        Err(match error {
            Some(first) => first.leaving(unlinked.left().to_vec()),
            None => unlinked,
        })
    }

    fn unlink(&mut self) -> Result<()> {
        match self.temporary.take() {
            None => Ok(()),
            Some(temporary) => fs::remove_file(&temporary)
                .map_err(|error| failed(Step::Unlink, &temporary, &error)),
        }
    }
}

/// A caller's `progress` may panic.
impl Drop for Output<'_> {
    fn drop(&mut self) {
        let _ = self.unlink();
    }
}

/// A temporary file that could not be unlinked, as what is left.
fn debris(error: Error) -> Error {
    let left = match &error {
        Error::Failed { on, .. } => vec![Leftover::new(on, error.clone())],
        _ => Vec::new(),
    };
    error.leaving(left)
}

/// The one way to a nameless file that takes no capability (open(2), `O_TMPFILE`).
fn magic_link(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A name in the same directory that nobody else draws.
fn beside(path: &Path) -> Result<PathBuf> {
    let random = ask(Step::Random, path, sys::random)?;
    Ok(directory(path).join(format!(".dmsnap-{random:032x}")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::errno::Errno;

    use super::*;

    /// The names in the output's directory.
    fn names(path: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory(path)).expect("a directory");
        entries
            .map(|entry| entry.expect("an entry").path())
            .collect()
    }

    fn make(path: &Path, named: bool) -> Output<'_> {
        let made = if named {
            Output::make_named(path)
        } else {
            Output::make(path)
        };
        made.expect("a file")
    }

    #[test]
    fn a_file_has_no_name_or_a_temporary_one_until_it_is_published() {
        for named in [false, true] {
            let dir = tempfile::tempdir().expect("a directory");
            let path = dir.path().join("out");
            let output = make(&path, named);
            assert_eq!(names(&path).len(), usize::from(named));
            output.file().write_all_at(b"first", 0).expect("room");
            output.publish(false).expect("nobody has the name");
            assert_eq!(names(&path), std::slice::from_ref(&path));

            let error = make(&path, named).publish(false);
            let error = error.expect_err("the name is taken");
            assert_eq!(error.errno(), Some(Errno::EEXIST as i32));
            assert_eq!(fs::read(&path).expect("kept"), b"first");
            assert_eq!(names(&path), std::slice::from_ref(&path));

            let output = make(&path, named);
            output.file().write_all_at(b"second", 0).expect("room");
            output.publish(true).expect("it may be replaced");
            assert_eq!(fs::read(&path).expect("replaced"), b"second");
            assert_eq!(names(&path), std::slice::from_ref(&path));
        }
    }

    #[test]
    fn a_file_that_is_not_published_goes_and_if_it_cannot_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("out");
        drop(Output::make_named(&path).expect("a file"));
        let broken_off = Output::make_named(&path).expect("a file").discard(None);
        assert_eq!(broken_off, Ok(()));
        assert!(names(&path).is_empty());

        let first = Error::failed(Step::WriteFile, &path, Errno::ENOSPC);
        let failed = Output::make_named(&path).expect("a file");
        assert_eq!(failed.discard(Some(first.clone())), Err(first.clone()));
        let failed = Output::make_named(&path).expect("a file");
        let temporary = names(&path).remove(0);
        fs::remove_file(&temporary).expect("it is there");
        let error = failed.discard(Some(first)).expect_err("two failures");
        assert_eq!(error.errno(), Some(Errno::ENOSPC as i32));
        assert_eq!(error.left()[0].object, temporary);
    }
}
