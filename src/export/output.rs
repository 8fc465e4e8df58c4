//! The output of an export: nameless until it is complete.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;

use super::copy::failed;
use crate::ask::ask;
use crate::error::{Error, Leftover, Result, Step};
use crate::handles::FileId;
use crate::name::DeviceNumber;
use crate::refusal::Refusal;
use crate::sys;

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
        let open = |flags: i32| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).mode(0o600);
            options.custom_flags(flags);
            options
        };
        let nameless = || {
            let flags = OFlag::O_TMPFILE.bits();
            let file = open(flags).open(directory(path)).ok()?;
            magic_link(&file).exists().then_some(file)
        };
        if let Some(file) = nameless() {
            return Ok(Self {
                path,
                file,
                temporary: None,
            });
        }
        let temporary = beside(path)?;
        let file = open(0).create_new(true).open(&temporary);
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
                    self.unlink()?;
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
        let Err(unlinked) = self.unlink() else {
            return error.map_or(Ok(()), Err);
        };
        let left = match &unlinked {
            Error::Failed { on, .. } => Leftover::new(on, unlinked.clone()),
            _ => Leftover::new(self.path, unlinked.clone()),
        };
        Err(error.unwrap_or(unlinked).leaving(vec![left]))
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
