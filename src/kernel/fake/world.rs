//! What the scripted machine has: loop devices, dm devices, aliases and files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::mapped::MAPPED;
pub(crate) use super::mapped::{ScriptDevice, Table};
use super::opens::{Object, Open};
use crate::base::{ChunkSize, DeviceNumber, FileId, Sectors, Store};
use crate::dm::{Discard, SnapshotParams, Target, TargetLine};
use crate::kernel::Label;

/// The chunk size of a store that a test puts into the COW file.
pub(crate) const CHUNK: usize = 4096;

#[derive(Default)]
pub(crate) struct World {
    /// Loop number to what it is bound to.
    pub(crate) loops: BTreeMap<u32, Binding>,
    pub(crate) next_diskseq: u64,
    pub(crate) devices: BTreeMap<String, ScriptDevice>,
    pub(crate) aliases: BTreeSet<PathBuf>,
    pub(crate) made_files: BTreeSet<PathBuf>,
    /// Devices that are removed by their name, and still hold their loop devices.
    pub(crate) dying: Vec<ScriptDevice>,
    /// Until when the kernel takes its time to destroy a removed device's table.
    pub(crate) dying_until: Duration,
    /// What every file holds that has no content of its own, if a test says so; zeroes without end otherwise.
    pub(crate) store: Vec<u8>,
    /// What files' modification times were set to, by inode.
    pub(crate) mtimes: BTreeMap<u64, i64>,
    /// When the users of each dm device close it.
    pub(crate) busy_until: Duration,
    /// When loop devices that are being cleared are done with it.
    pub(crate) letting_go_until: Duration,
    pub(crate) now: Duration,
    /// Which file each path leads to that was ever used: none, once it was unlinked.
    names: BTreeMap<PathBuf, Option<u64>>,
    next_inode: u64,
    /// Every open file and node, by a number of its own.
    pub(super) opens: BTreeMap<u64, Open>,
    pub(super) next_open: u64,
    /// Inode to what the file holds, of files whose content a test wants to tell from others'.
    pub(crate) contents: BTreeMap<u64, Vec<u8>>,
    /// Paths that lead nowhere until something is made there; every other one is a file's.
    pub(crate) missing: BTreeSet<PathBuf>,
    /// Inode to size, of files that are no longer as they were made.
    pub(crate) sizes: BTreeMap<u64, u64>,
    /// Loop devices that another program has set to end flushes.
    pub(crate) flushless: BTreeSet<DeviceNumber>,
    /// What every live device says of itself, if it is not in working order.
    pub(crate) status: Option<&'static str>,
}

/// The size of a file that nobody has made longer.
pub(crate) const FILE_BYTES: u64 = 1 << 20;

pub(crate) struct Binding {
    pub(crate) backing: FileId,
    pub(crate) path: PathBuf,
    pub(crate) label: Label,
    /// The size that the loop device has noticed.
    pub(crate) bytes: u64,
    pub(crate) autoclear: bool,
    pub(crate) diskseq: u64,
    /// The open backing file, unless another program bound it.
    pub(crate) open: Option<u64>,
}

pub(crate) fn label(name: &Path) -> Label {
    let mut label = [0; 64];
    let bytes = name.as_os_str().as_encoded_bytes();
    let kept = bytes.len().min(label.len() - 1);
    label[..kept].copy_from_slice(&bytes[..kept]);
    Label(label)
}

impl World {
    /// Everything that somebody would have to clean up, by path.
    pub(crate) fn residue(&self) -> BTreeSet<PathBuf> {
        let loops = self
            .loops
            .keys()
            .map(|n| PathBuf::from(format!("/dev/loop{n}")));
        let mapper = |device: &ScriptDevice| Path::new("/dev/mapper").join(&device.name);
        loops
            .chain(self.devices.values().map(mapper))
            .chain(self.aliases.iter().cloned())
            .chain(self.made_files.iter().cloned())
            .collect()
    }

    /// Binds a loop device as another program does: without autoclear, and nobody holds it open.
    pub(crate) fn bind_foreign(&mut self, number: u32, inode: u64) {
        let binding = Binding {
            backing: file_id(inode),
            label: label(Path::new("/foreign")),
            path: PathBuf::from("/foreign"),
            bytes: FILE_BYTES,
            autoclear: false,
            diskseq: 0,
            open: None,
        };
        self.loops.insert(number, binding);
    }

    /// Makes a live snapshot over two bound loop devices as another program does: without a uuid.
    pub(crate) fn make_foreign(&mut self, name: &str, origin: u32, cow: u32) {
        let number = |minor| DeviceNumber::at(7, minor);
        let params = SnapshotParams {
            origin: number(origin),
            cow: number(cow),
            store: Store::Persistent,
            chunk: ChunkSize::DEFAULT,
            discard: Discard::Unsupported,
        };
        let number = DeviceNumber::at(MAPPED, 200);
        let line = TargetLine {
            start: Sectors::default(),
            length: Sectors::new(2048),
            target: Target::Snapshot(params),
        };
        let mut device = ScriptDevice::new(name.to_owned(), number);
        device.live = Some(Table::live(line));
        self.devices.insert(String::new(), device);
    }

    /// The file that a path leads to. One that nobody has used yet leads to a file all the same, unless it is missing.
    pub(crate) fn file_at(&mut self, path: &Path) -> Option<u64> {
        let known = self.names.get(path).copied();
        match known {
            Some(inode) => inode,
            None if self.missing.contains(path) && !self.made_files.contains(path) => None,
            None => Some(self.name_first(path)),
        }
    }

    /// A path's first file.
    fn name_first(&mut self, path: &Path) -> u64 {
        let first = inode(path);
        let taken = |inode| self.names.values().any(|known| *known == Some(inode));
        let inode = if taken(first) {
            self.fresh_inode()
        } else {
            first
        };
        self.names.insert(path.to_owned(), Some(inode));
        inode
    }

    /// The inode of a file that no path has led to yet.
    pub(super) fn fresh_inode(&mut self) -> u64 {
        self.next_inode += 1;
        1000 + self.next_inode
    }

    /// How many paths lead to the file.
    pub(super) fn links(&self, inode: u64) -> u64 {
        let names = self.names.values().filter(|known| **known == Some(inode));
        names.count() as u64
    }

    /// Makes a file at a path that is free. The path of one that was unlinked leads to another file then.
    pub(super) fn make(&mut self, path: &Path) -> u64 {
        self.made_files.insert(path.to_owned());
        match self.names.get(path) {
            Some(None) => {
                let inode = self.fresh_inode();
                self.names.insert(path.to_owned(), Some(inode));
                inode
            }
            Some(Some(inode)) => *inode,
            None => self.name_first(path),
        }
    }

    /// Gives a file that path, which is to be free.
    pub(super) fn link(&mut self, inode: u64, path: &Path) -> Result<(), Errno> {
        if !self.made_files.insert(path.to_owned()) {
            return Err(Errno::EEXIST);
        }
        self.names.insert(path.to_owned(), Some(inode));
        Ok(())
    }

    /// Moves a file that was made to a path, which leads to no other from then on.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> Result<(), Errno> {
        let inode = self.file_at(from).ok_or(Errno::ENOENT)?;
        if !self.made_files.remove(from) {
            return Err(Errno::ENOENT);
        }
        self.made_files.insert(to.to_owned());
        self.names.insert(from.to_owned(), None);
        self.names.insert(to.to_owned(), Some(inode));
        // The kernel knows a backing file by its path of now.
        let bound = self.loops.values_mut().filter(|each| each.path == from);
        bound.for_each(|each| each.path = to.to_owned());
        Ok(())
    }

    /// Takes a path away that was made; whoever has the file open keeps it.
    pub(super) fn unlink(&mut self, path: &Path) -> Result<(), Errno> {
        if self.made_files.remove(path) {
            self.names.insert(path.to_owned(), None);
            return Ok(());
        }
        let found = self.aliases.remove(path);
        if found { Ok(()) } else { Err(Errno::ENOENT) }
    }

    /// The dm device that a node or an alias leads to.
    pub(super) fn mapped_at(&self, path: &Path) -> Option<DeviceNumber> {
        let leads = |device: &&ScriptDevice| {
            let alias = Path::new("/dev/mapper").join(&device.name);
            path == device.number.dm_node() || (path == alias && self.aliases.contains(path))
        };
        self.devices
            .values()
            .find(leads)
            .map(|device| device.number)
    }

    /// The loop device or dm device that a node leads to.
    pub(super) fn number_of(&self, path: &Path) -> Option<DeviceNumber> {
        let minor = loop_at(path).map(|minor| DeviceNumber::at(7, minor));
        minor.or_else(|| self.mapped_at(path))
    }

    /// What a file begins with; `None` for one of zeroes.
    pub(super) fn content(&self, inode: u64) -> &[u8] {
        self.contents.get(&inode).unwrap_or(&self.store)
    }

    pub(super) fn content_mut(&mut self, inode: u64) -> &mut [u8] {
        self.contents.get_mut(&inode).unwrap_or(&mut self.store)
    }

    /// Whether the kernel takes what the COW device holds for a store in order: its `valid` word is not 0.
    pub(super) fn is_valid_store(&self, cow: DeviceNumber) -> bool {
        let bound = self.loops.get(&cow.minor()).filter(|_| cow.major() == 7);
        let content = bound.map(|bound| self.content(bound.backing.inode));
        content
            .and_then(|content| content.get(..8))
            .is_none_or(|start| start[..4] == [0; 4] || start[4..] != [0; 4])
    }

    /// How long the file of that path is.
    pub(crate) fn file_bytes(&self, path: &Path) -> u64 {
        let known = self.names.get(path).copied().flatten();
        let size = self.sizes.get(&known.unwrap_or_else(|| inode(path)));
        size.copied().unwrap_or(FILE_BYTES)
    }

    /// What a look at a merging device finds: since the last one, one exception more has left the store.
    pub(crate) fn merge_on(&mut self) -> String {
        let area = self.store.get_mut(CHUNK..2 * CHUNK).unwrap_or_default();
        let exceptions = || area.chunks(16).take_while(|each| each[8..] != [0; 8]);
        let left = exceptions().count().saturating_sub(1);
        if let Some(last) = area.get_mut(left * 16..left * 16 + 16) {
            last.fill(0);
        }
        format!("{}/2048 16", 16 + 8 * left)
    }

    /// A loop device that is to go with its last user goes when nobody has it open and no table holds it.
    pub(super) fn let_go_of_loops(&mut self) {
        let is_idle = |number: &u32, binding: &Binding| {
            let device = DeviceNumber::at(7, *number);
            binding.autoclear
                && self.openers(Object::Loop(*number)) == 0
                && self.holding(device).next().is_none()
        };
        let all = self.loops.iter();
        let idle: Vec<u32> = all
            .filter(|(number, binding)| is_idle(number, binding))
            .map(|(number, _)| *number)
            .collect();
        for number in idle {
            let open = self.loops.remove(&number).and_then(|bound| bound.open);
            open.into_iter().for_each(|open| self.close(open));
        }
    }
}

/// The number of the loop device that a node is of.
pub(super) fn loop_at(path: &Path) -> Option<u32> {
    let digits = path.to_str()?.strip_prefix("/dev/loop")?;
    digits.parse().ok()
}

pub(crate) fn file_id(inode: u64) -> FileId {
    FileId {
        dev: DeviceNumber::at(8, 1),
        inode,
    }
}

/// The inode of a path's first file: the length of the path, unless another path was first with it.
pub(crate) fn inode(path: &Path) -> u64 {
    path.as_os_str().len() as u64
}
