//! Files of the fake machine.

use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::opens::Object;
use super::world::{FILE_BYTES, file_id};
use super::{Script, ScriptFile};
use crate::base::{DeviceNumber, FileId};
use crate::error::Step;
use crate::kernel::{FileFacts, FileKind, Files};

/// The identity of dm devices' nodes: they lie on a file system of their own.
const NODES: DeviceNumber = DeviceNumber::at(0, 6);

impl ScriptFile {
    fn object(&self) -> Object {
        let world = self.0.world.borrow();
        world.opens[&self.0.open].object
    }

    /// That of a file; 0 for a node.
    pub(super) fn inode(&self) -> u64 {
        match self.object() {
            Object::File(inode) => inode,
            Object::Loop(_) | Object::Mapped(_) => 0,
        }
    }
}

impl Script {
    fn file(&self, inode: u64) -> ScriptFile {
        ScriptFile(self.opened(Object::File(inode)))
    }

    fn facts(&self, object: Object) -> FileFacts {
        let world = self.world.borrow();
        let (id, kind, size, links) = match object {
            Object::File(inode) => {
                let size = *world.sizes.get(&inode).unwrap_or(&FILE_BYTES);
                (file_id(inode), FileKind::Regular, size, world.links(inode))
            }
            Object::Loop(minor) => node_facts(DeviceNumber::at(7, minor)),
            Object::Mapped(number) => node_facts(number),
        };
        FileFacts {
            id,
            kind,
            mode: 0o600,
            size_bytes: size,
            mtime_ns: world.mtimes.get(&id.inode).copied().unwrap_or(1),
            links,
            read_only: false,
            has_blocks: false,
        }
    }
}

fn node_facts(number: DeviceNumber) -> (FileId, FileKind, u64, u64) {
    let id = FileId {
        dev: NODES,
        inode: u64::from(number.major()) << 32 | u64::from(number.minor()),
    };
    (id, FileKind::BlockDevice(number), 0, 1)
}

impl Files for Script {
    type File = ScriptFile;

    fn open_file(&self, path: &Path, _writable: bool) -> Result<ScriptFile, Errno> {
        self.call(Step::OpenFile)?;
        let mapped = self.world.borrow().mapped_at(path);
        if let Some(number) = mapped {
            return Ok(ScriptFile(self.opened(Object::Mapped(number))));
        }
        let found = self.world.borrow_mut().file_at(path);
        found.map(|inode| self.file(inode)).ok_or(Errno::ENOENT)
    }

    fn open_replaced(&self, path: &Path) -> Result<ScriptFile, Errno> {
        self.open_file(path, true)
    }

    fn open_backing(&self, path: &Path, writable: bool) -> Result<ScriptFile, Errno> {
        self.open_file(path, writable)
    }

    fn make_file(&self, path: &Path) -> Result<ScriptFile, Errno> {
        self.call(Step::MakeFile)?;
        let inode = self.world.borrow_mut().make(path);
        Ok(self.file(inode))
    }

    fn make_nameless(&self, _directory: &Path) -> Result<ScriptFile, Errno> {
        self.call(Step::MakeFile)?;
        let inode = self.world.borrow_mut().fresh_inode();
        Ok(self.file(inode))
    }

    fn name_file(&self, file: &ScriptFile, path: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        let inode = file.inode();
        self.world.borrow_mut().link(inode, path)
    }

    fn link_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        let mut world = self.world.borrow_mut();
        if !world.made_files.contains(from) {
            return Err(Errno::ENOENT);
        }
        let inode = world.file_at(from).ok_or(Errno::ENOENT)?;
        world.link(inode, to)
    }

    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::Link)?;
        self.world.borrow_mut().rename(from, to)
    }

    fn make_memory_file(&self) -> Result<ScriptFile, Errno> {
        self.call(Step::MakeFile)?;
        Ok(self.file(0))
    }

    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.call(Step::MoveFile)?;
        let mut world = self.world.borrow_mut();
        if world.made_files.contains(to) {
            return Err(Errno::EEXIST);
        }
        world.rename(from, to)
    }

    fn size_file(&self, _file: &ScriptFile, _bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)
    }

    fn lengthen_file(&self, file: &ScriptFile, bytes: u64, _reserve: bool) -> Result<(), Errno> {
        self.call(Step::SizeFile)?;
        let inode = file.inode();
        let mut world = self.world.borrow_mut();
        let size = world.sizes.entry(inode).or_insert(FILE_BYTES);
        *size = bytes.max(*size);
        Ok(())
    }

    fn inspect_file(&self, file: &ScriptFile) -> Result<FileFacts, Errno> {
        self.call(Step::InspectFile)?;
        Ok(self.facts(file.object()))
    }

    fn look(&self, path: &Path, _follow: bool) -> Result<FileFacts, Errno> {
        let found = self.world.borrow_mut().file_at(path);
        let inode = found.ok_or(Errno::ENOENT)?;
        self.call(Step::InspectFile)?;
        Ok(self.facts(Object::File(inode)))
    }

    fn try_punch(&self, _file: &ScriptFile, _at: u64) -> Result<(), Errno> {
        self.call(Step::PunchHole)
    }

    /// Its file system has no fs-verity.
    fn measure_file(&self, _file: &ScriptFile) -> Result<(u16, Vec<u8>), Errno> {
        self.call(Step::MeasureFile)?;
        Err(Errno::ENOTTY)
    }

    fn lock_file(&self, file: &ScriptFile, exclusive: bool) -> Result<(), Errno> {
        self.call(Step::LockFile)?;
        self.world.borrow_mut().lock(file.0.open, exclusive)
    }

    fn read_at(&self, file: &ScriptFile, buffer: &mut [u8], at: usize) -> Result<usize, Errno> {
        self.call(Step::ReadFile)?;
        buffer.fill(0);
        let inode = file.inode();
        let world = self.world.borrow();
        if let Some(stored) = world.content(inode).get(at..at + buffer.len()) {
            buffer.copy_from_slice(stored);
        }
        Ok(buffer.len())
    }

    fn write_at(&self, file: &ScriptFile, bytes: &[u8], at: usize) -> Result<(), Errno> {
        self.call(Step::MarkFile)?;
        let inode = file.inode();
        let mut world = self.world.borrow_mut();
        if let Some(stored) = world.content_mut(inode).get_mut(at..at + bytes.len()) {
            stored.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn write_data(&self, _file: &ScriptFile, _bytes: &[u8], _at: u64) -> Result<(), Errno> {
        self.call(Step::WriteFile)
    }

    /// All of it is data.
    fn find_data(&self, file: &ScriptFile, at: u64, hole: bool) -> Result<u64, Errno> {
        self.call(Step::FindData)?;
        let inode = file.inode();
        let world = self.world.borrow();
        let end = *world.sizes.get(&inode).unwrap_or(&FILE_BYTES);
        match (at < end, hole) {
            (true, false) => Ok(at),
            (true, true) => Ok(end),
            (false, _) => Err(Errno::ENXIO),
        }
    }

    fn punch(&self, _file: &ScriptFile, _range: Range<u64>) -> Result<(), Errno> {
        self.call(Step::PunchHole)
    }

    /// It has no shared blocks.
    fn clone_file(&self, _file: &ScriptFile, _source: &ScriptFile) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn start_writeback(&self, _file: &ScriptFile, _range: Range<u64>) -> Result<(), Errno> {
        Ok(())
    }

    fn sync_directory(&self, _directory: &Path) -> Result<(), Errno> {
        self.call(Step::SyncFile)
    }

    fn sync_file(&self, _file: &ScriptFile) -> Result<(), Errno> {
        self.call(Step::SyncFile)
    }

    fn date_file(&self, file: &ScriptFile, mtime_ns: Option<i64>) -> Result<(), Errno> {
        self.call(Step::DateFile)?;
        let now = 1_000_000;
        let inode = file.inode();
        let mut world = self.world.borrow_mut();
        world.mtimes.insert(inode, mtime_ns.unwrap_or(now));
        Ok(())
    }

    fn unlink(&self, path: &Path) -> Result<(), Errno> {
        self.call(Step::Unlink)?;
        self.world.borrow_mut().unlink(path)
    }

    fn entries(&self, directory: &Path) -> Vec<PathBuf> {
        let world = self.world.borrow();
        let all = world.aliases.iter().chain(&world.made_files);
        all.filter(|path| path.parent() == Some(directory))
            .cloned()
            .collect()
    }
}
