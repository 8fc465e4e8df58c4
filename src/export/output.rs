//! The output file of an export, which has no name until it is complete.

use std::path::{Path, PathBuf};

use crate::base::FileId;
use crate::call::ask;
use crate::error::{Error, ErrorKind, Leftover, Refusal, Result, Step};
use crate::kernel::{FileKind, Host};

/// Refuses an output that exists and must not be replaced.
pub(super) fn admit<H: Host>(
    host: &H,
    path: &Path,
    replace: bool,
    inputs: &[FileId],
) -> Result<()> {
    // Other faults of the path show when the file is made.
    let Ok(found) = ask(Step::InspectFile, path, || host.look(path, false)) else {
        return Ok(());
    };
    let path = path.to_owned();
    let refusal = match found.kind {
        _ if inputs.contains(&found.id) => Refusal::OutputIsInput { path },
        FileKind::Regular if replace => return Ok(()),
        FileKind::Regular => Refusal::OutputExists { path },
        FileKind::BlockDevice(_) => Refusal::OutputNotAFile {
            path,
            kind: "a block device",
        },
        FileKind::Other(kind) => Refusal::OutputNotAFile { path, kind },
    };
    Err(refusal.into())
}

/// A file that does not have its name yet. Dropping this before it has removes the file.
pub(super) struct Output<'a, H: Host> {
    host: &'a H,
    path: &'a Path,
    file: H::File,
    /// The temporary path, if the file system has no nameless files or they could be given no name.
    temporary: Option<PathBuf>,
}

impl<'a, H: Host> Output<'a, H> {
    pub(super) fn make(host: &'a H, path: &'a Path) -> Result<Self> {
        // It is no failure if there are no nameless files.
        match host.make_nameless(directory(path)) {
            Ok(file) => Ok(Self {
                host,
                path,
                file,
                temporary: None,
            }),
            Err(_) => Self::make_named(host, path),
        }
    }

    fn make_named(host: &'a H, path: &'a Path) -> Result<Self> {
        let temporary = beside(host, path)?;
        let file = ask(Step::MakeFile, &temporary, || host.make_file(&temporary))?;
        Ok(Self {
            host,
            path,
            file,
            temporary: Some(temporary),
        })
    }

    pub(super) fn file(&self) -> &H::File {
        &self.file
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Shares the origin's blocks (`FICLONE`); returns false if the file system cannot.
    pub(super) fn clone_of(&self, origin: &H::File) -> bool {
        self.host.clone_file(&self.file, origin).is_ok()
    }

    /// Syncs the file, gives it its name and syncs its directory.
    pub(super) fn publish(mut self, replace: bool) -> Result<()> {
        match self.place(replace) {
            Ok(()) => self.sync_directory(),
            Err(error) => self.discard(Some(error)),
        }
    }

    fn place(&mut self, replace: bool) -> Result<()> {
        let (host, path) = (self.host, self.path);
        ask(Step::SyncFile, path, || host.sync_file(&self.file))?;
        match (&self.temporary, replace) {
            (None, false) => return self.name(path),
            (None, true) => {
                let temporary = beside(host, path)?;
                self.name(&temporary)?;
                self.temporary = Some(temporary.clone());
                ask(Step::Link, path, || host.replace_file(&temporary, path))?;
            }
            (Some(temporary), true) => {
                ask(Step::Link, path, || host.replace_file(temporary, path))?;
            }
            (Some(temporary), false) => {
                let moved = ask(Step::Link, path, || host.move_file(temporary, path));
                match moved {
                    // A hard link never replaces a file, where `RENAME_NOREPLACE` is not to be had.
                    Err(error) if error.kind() == ErrorKind::Unsupported => {
                        ask(Step::Link, path, || host.link_file(temporary, path))?;
                        return self.unlink().map_err(debris);
                    }
                    moved => moved?,
                }
            }
        }
        self.temporary = None;
        Ok(())
    }

    fn name(&self, path: &Path) -> Result<()> {
        ask(Step::Link, path, || self.host.name_file(&self.file, path))
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = directory(self.path);
        ask(Step::SyncFile, directory, || {
            self.host.sync_directory(directory)
        })
    }

    /// Removes the file; returns the error that led here, if there is one.
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
            Some(temporary) => ask(Step::Unlink, &temporary, || self.host.unlink(&temporary)),
        }
    }
}

/// Removes the file also if the caller's `progress` panics.
impl<H: Host> Drop for Output<'_, H> {
    fn drop(&mut self) {
        let _ = self.unlink();
    }
}

/// Turns the failure to unlink a temporary file into an error that lists the file as left.
fn debris(error: Error) -> Error {
    let left = match &error {
        Error::Failed { on, .. } => vec![Leftover::new(on, error.clone())],
        _ => Vec::new(),
    };
    error.leaving(left)
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Returns a random path in the same directory.
fn beside<H: Host>(host: &H, path: &Path) -> Result<PathBuf> {
    let random = ask(Step::Random, path, || host.random())?;
    Ok(directory(path).join(format!(".dmsnap-{random:032x}")))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::errno::Errno;

    use super::*;
    use crate::kernel::fake::Script;
    use crate::kernel::{Files, MACHINE, Machine};

    /// The names in the output's directory.
    fn names(path: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory(path)).expect("a directory");
        entries
            .map(|entry| entry.expect("an entry").path())
            .collect()
    }

    fn make(path: &Path, named: bool) -> Output<'_, Machine> {
        let made = if named {
            Output::make_named(&MACHINE, path)
        } else {
            Output::make(&MACHINE, path)
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
            MACHINE
                .write_data(output.file(), b"first", 0)
                .expect("room");
            output.publish(false).expect("nobody has the name");
            assert_eq!(names(&path), std::slice::from_ref(&path));

            let error = make(&path, named).publish(false);
            let error = error.expect_err("the name is taken");
            assert_eq!(error.errno(), Some(Errno::EEXIST as i32));
            assert_eq!(fs::read(&path).expect("kept"), b"first");
            assert_eq!(names(&path), std::slice::from_ref(&path));

            let output = make(&path, named);
            MACHINE
                .write_data(output.file(), b"second", 0)
                .expect("room");
            output.publish(true).expect("it may be replaced");
            assert_eq!(fs::read(&path).expect("replaced"), b"second");
            assert_eq!(names(&path), std::slice::from_ref(&path));
        }
    }

    #[test]
    fn a_file_that_is_not_published_goes_and_if_it_cannot_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("out");
        drop(Output::make_named(&MACHINE, &path).expect("a file"));
        let broken_off = Output::make_named(&MACHINE, &path)
            .expect("a file")
            .discard(None);
        assert_eq!(broken_off, Ok(()));
        assert!(names(&path).is_empty());

        let first = Error::failed(Step::WriteFile, &path, Errno::ENOSPC);
        let failed = Output::make_named(&MACHINE, &path).expect("a file");
        assert_eq!(failed.discard(Some(first.clone())), Err(first.clone()));
        let failed = Output::make_named(&MACHINE, &path).expect("a file");
        let temporary = names(&path).remove(0);
        fs::remove_file(&temporary).expect("it is there");
        let error = failed.discard(Some(first)).expect_err("two failures");
        assert_eq!(error.errno(), Some(Errno::ENOSPC as i32));
        assert_eq!(error.left()[0].object, temporary);
    }

    #[test]
    fn a_temporary_name_is_exchanged_where_there_are_no_links_and_linked_where_nothing_else_spares()
    {
        let path = Path::new("/exports/out");
        for (failing, errno) in [(Step::Link, Errno::EPERM), (Step::MoveFile, Errno::EINVAL)] {
            let script = Script::new(move |step, nth| match step {
                Step::MakeFile if nth == 1 => Some(Errno::EOPNOTSUPP),
                step => (step == failing).then_some(errno),
            });
            let output = Output::make(&script, path).expect("a named one");
            output.publish(false).expect("it gets its name");
            let residue = script.world.borrow().residue();
            assert_eq!(residue, [path.to_owned()].into());
        }
    }
}
