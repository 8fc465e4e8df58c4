//! What the scripted machine has: loop devices, dm devices, aliases and files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

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
    /// What the COW file holds, if a test says so; zeroes without end otherwise.
    pub(crate) store: Vec<u8>,
    /// What files' modification times were set to, by inode.
    pub(crate) mtimes: BTreeMap<u64, i64>,
    /// When the users of each dm device close it.
    pub(crate) busy_until: Duration,
    /// When loop devices that are being cleared are done with it.
    pub(crate) letting_go_until: Duration,
    /// The inodes of files that were moved.
    pub(crate) moved: BTreeMap<PathBuf, u64>,
    /// Paths that lead nowhere until something is made there; every other one is a file's.
    pub(crate) missing: BTreeSet<PathBuf>,
    /// Inode to size, of files that are no longer as they were made.
    pub(crate) sizes: BTreeMap<u64, u64>,
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
    pub(crate) opens: usize,
}

pub(crate) fn label(name: &Path) -> Label {
    let mut label = [0; 64];
    let bytes = name.as_os_str().as_encoded_bytes();
    let kept = bytes.len().min(label.len() - 1);
    label[..kept].copy_from_slice(&bytes[..kept]);
    Label(label)
}

pub(crate) struct ScriptDevice {
    pub(crate) name: String,
    pub(crate) number: DeviceNumber,
    pub(crate) table: Option<TargetLine>,
    pub(crate) live: bool,
    pub(crate) suspended: bool,
}

impl ScriptDevice {
    pub(crate) fn params(&self) -> Option<&SnapshotParams> {
        match &self.table.as_ref()?.target {
            Target::Snapshot(params) | Target::SnapshotMerge(params) => Some(params),
            _ => None,
        }
    }

    pub(crate) fn merges(&self) -> bool {
        let line = self.table.as_ref();
        line.is_some_and(|line| matches!(line.target, Target::SnapshotMerge(_)))
    }

    pub(crate) fn holds(&self, number: u32) -> bool {
        self.params()
            .is_some_and(|params| [params.origin.minor, params.cow.minor].contains(&number))
    }
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
            opens: 0,
        };
        self.loops.insert(number, binding);
    }

    /// Makes a live snapshot over two bound loop devices as another program does: without a uuid.
    pub(crate) fn make_foreign(&mut self, name: &str, origin: u32, cow: u32) {
        let number = |minor| DeviceNumber { major: 7, minor };
        let params = SnapshotParams {
            origin: number(origin),
            cow: number(cow),
            store: Store::Persistent,
            chunk: ChunkSize::DEFAULT,
            discard: Discard::Unsupported,
        };
        let device = ScriptDevice {
            name: name.to_owned(),
            number: DeviceNumber {
                major: 254,
                minor: 200,
            },
            table: Some(TargetLine {
                start: Sectors::default(),
                length: Sectors::new(2048),
                target: Target::Snapshot(params),
            }),
            live: true,
            suspended: false,
        };
        self.devices.insert(String::new(), device);
    }

    pub(crate) fn holding(&self, number: u32) -> impl Iterator<Item = DeviceNumber> {
        let holds = move |device: &&ScriptDevice| device.holds(number);
        self.devices
            .values()
            .chain(&self.dying)
            .filter(holds)
            .map(|device| device.number)
    }

    /// Gives a new file that path.
    pub(crate) fn take_path(&mut self, path: &Path) -> Result<(), Errno> {
        match self.made_files.insert(path.to_owned()) {
            true => Ok(()),
            false => Err(Errno::EEXIST),
        }
    }

    /// How long the file of that path is.
    pub(crate) fn file_bytes(&self, path: &Path) -> u64 {
        let size = self.sizes.get(&inode(path));
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

    pub(crate) fn settle(&mut self) {
        let idle: Vec<u32> = self
            .loops
            .iter()
            .filter(|(number, binding)| {
                binding.autoclear && binding.opens == 0 && self.holding(**number).next().is_none()
            })
            .map(|(number, _)| *number)
            .collect();
        self.loops.retain(|number, _| !idle.contains(number));
    }
}

pub(crate) fn file_id(inode: u64) -> FileId {
    FileId {
        dev: DeviceNumber { major: 8, minor: 1 },
        inode,
    }
}

/// The length of the path, so that two paths are two files.
pub(crate) fn inode(path: &Path) -> u64 {
    path.as_os_str().len() as u64
}
