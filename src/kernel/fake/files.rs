//! Files of the fake machine.

use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::Script;
use super::world::{FILE_BYTES, file_id, inode};
use crate::error::Step;
use crate::kernel::{FileFacts, FileKind, Files};

/// The inode of every file that has no name.
const NAMELESS: u64 = 1000;

impl Files for Script {
    type File = u64;

    fn open_file(&self, path: &Path, _writable: bool) -> Result<u64, Errno> {
        self.call(Step::OpenFile)?;
        let moved = self.world.borrow().moved.get(path).copied();
        Ok(moved.unwrap_or_else(|| inode(path)))
    }

    fn open_replaced(&self, path: &Path) -> Result<u64, Errno> {
        self.open_file(path, true)
    }

    fn open_backing(&self, path: &Path, writable: bool) -> Result<u64, Errno> {
        self.open_file(path, writable)
    }

    fn make_file(&self, path: &Path) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        self.world.borrow_mut().made_files.insert(path.to_owned());
        Ok(inode(path))
    }

    fn make_nameless(&self, _directory: &Path) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        Ok(NAMELESS)
    }

    fn name_file(&self, _file: &u64, path: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        self.world.borrow_mut().take_path(path)
    }

    fn link_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        let mut world = self.world.borrow_mut();
        if !world.made_files.contains(from) {
            return Err(Errno::ENOENT);
        }
        world.take_path(to)
    }

    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        let mut world = self.world.borrow_mut();
        if !world.made_files.remove(from) {
            return Err(Errno::ENOENT);
        }
        world.made_files.insert(to.to_owned());
        Ok(())
    }

    fn make_memory_file(&self) -> Result<u64, Errno> {
        self.call(Step::MakeFile)?;
        Ok(0)
    }

    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::MoveFile)?;
        let mut world = self.world.borrow_mut();
        if world.made_files.contains(to) {
            return Err(Errno::EEXIST);
        }
        if !world.made_files.remove(from) {
            return Err(Errno::ENOENT);
        }
        world.made_files.insert(to.to_owned());
        let inode = world.moved.remove(from).unwrap_or_else(|| inode(from));
        world.moved.insert(to.to_owned(), inode);
        let bound = world.loops.values_mut().filter(|each| each.path == from);
        bound.for_each(|each| each.path = to.to_owned());
        Ok(())
    }

    fn size_file(&self, _file: &u64, _bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)
    }

    fn lengthen_file(&self, file: &u64, bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)?;
        let mut world = self.world.borrow_mut();
        let size = world.sizes.entry(*file).or_insert(FILE_BYTES);
        *size = bytes.max(*size);
        Ok(())
    }

    fn inspect_file(&self, file: &u64) -> Result<FileFacts, Errno> {
        self.call(Step::InspectFile)?;
        let mtime = self.world.borrow().mtimes.get(file).copied();
        Ok(FileFacts {
            id: file_id(*file),
            kind: FileKind::Regular,
            mode: 0o600,
            size_bytes: *self.world.borrow().sizes.get(file).unwrap_or(&FILE_BYTES),
            mtime_ns: mtime.unwrap_or(1),
            links: 1,
            read_only: false,
            has_blocks: false,
        })
    }

    fn look(&self, path: &Path, _follow: bool) -> Result<FileFacts, Errno> {
        let moved = {
            let world = self.world.borrow();
            if world.missing.contains(path) && !world.made_files.contains(path) {
                return Err(Errno::ENOENT);
            }
            world.moved.get(path).copied()
        };
        self.inspect_file(&moved.unwrap_or_else(|| inode(path)))
    }

    fn try_punch(&self, _file: &u64, _at: u64) -> Result<(), Errno> {
        self.call(Step::PunchHole)
    }

    fn lock_file(&self, _file: &u64, _exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockFile)
    }

    fn read_at(&self, _file: &u64, buffer: &mut [u8], at: usize) -> Result<usize, Errno> {
        self.call(Step::ReadFile)?;
        buffer.fill(0);
        if let Some(stored) = self.world.borrow().store.get(at..at + buffer.len()) {
            buffer.copy_from_slice(stored);
        }
        Ok(buffer.len())
    }

    fn write_at(&self, _file: &u64, bytes: &[u8], at: usize) -> Result<(), Errno> {
        self.call(Step::MarkFile)?;
        let mut world = self.world.borrow_mut();
        if let Some(stored) = world.store.get_mut(at..at + bytes.len()) {
            stored.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn write_data(&self, _file: &u64, _bytes: &[u8], _at: u64) -> Result<(), Errno> {
        self.call(Step::WriteFile)
    }

    /// All of it is data.
    fn find_data(&self, file: &u64, at: u64, hole: bool) -> Result<u64, Errno> {
        self.call(Step::FindData)?;
        let world = self.world.borrow();
        let end = *world.sizes.get(file).unwrap_or(&FILE_BYTES);
        match (at < end, hole) {
            (true, false) => Ok(at),
            (true, true) => Ok(end),
            (false, _) => Err(Errno::ENXIO),
        }
    }

    fn punch(&self, _file: &u64, _range: Range<u64>) -> Result<(), Errno> {
        self.call(Step::PunchHole)
    }

    /// It has no shared blocks.
    fn clone_file(&self, _file: &u64, _source: &u64) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn start_writeback(&self, _file: &u64, _range: Range<u64>) -> Result<(), Errno> {
        Ok(())
    }

    fn sync_directory(&self, _directory: &Path) -> Result<(), Errno> {
        self.call(Step::SyncFile)
    }

    fn sync_file(&self, _file: &u64) -> Result<(), Errno> {
        self.call(Step::SyncFile)
    }

    fn date_file(&self, file: &u64, mtime_ns: Option<i64>) -> Result<(), Errno> {
        self.call(Step::DateFile)?;
        let now = 1_000_000;
        let mut world = self.world.borrow_mut();
        world.mtimes.insert(*file, mtime_ns.unwrap_or(now));
        Ok(())
    }

    fn unlink(&self, path: &Path) -> Result<(), Errno> {
        self.call(Step::Unlink)?;
        let mut world = self.world.borrow_mut();
        let found = world.aliases.remove(path) || world.made_files.remove(path);
        if found { Ok(()) } else { Err(Errno::ENOENT) }
    }

    fn entries(&self, directory: &Path) -> Vec<PathBuf> {
        let world = self.world.borrow();
        let all = world.aliases.iter().chain(&world.made_files);
        all.filter(|path| path.parent() == Some(directory))
            .cloned()
            .collect()
    }
}
