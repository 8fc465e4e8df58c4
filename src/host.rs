//! The seam between the stories and the kernel: one method per kernel call, each answering with its bare errno.
//!
//! [`Machine`] is the real one. The stories are generic over [`Host`], so that a test can fail the n-th call for
//! every n and look at what stays behind.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, futimens};
use nix::sys::time::TimeSpec;

use crate::alias;
use crate::closes::Closes;
use crate::dm_message::{Address, Listed};
use crate::handles::FileId;
use crate::holders;
use crate::loop_device::{self, LoopControl, LoopDevice, LoopStatus};
use crate::mapper::{DevId, Device, Mapper, TargetVersion};
use crate::name::{DeviceName, DeviceNumber};
use crate::origin_identity::OriginIdentity;
use crate::status::SnapshotStatus;
use crate::sys;
use crate::table::TargetLine;
use crate::uuid::DeviceUuid;

/// What `fstat` says of an image or a COW file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileFacts {
    pub(crate) id: FileId,
    pub(crate) kind: FileKind,
    pub(crate) mode: u32,
    pub(crate) size_bytes: u64,
    pub(crate) mtime_ns: i64,
    /// How many paths lead to it; 0 once it is unlinked.
    pub(crate) links: u64,
    /// Whether anything was ever written to it.
    pub(crate) has_blocks: bool,
}

impl FileFacts {
    pub(crate) fn identity(&self) -> OriginIdentity {
        OriginIdentity {
            size_bytes: self.size_bytes,
            mtime_ns: self.mtime_ns,
        }
    }
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    BlockDevice(DeviceNumber),
    Other(&'static str),
}

/// Every kernel call that a story makes.
pub(crate) trait Host {
    type File;
    type Loop;
    /// What tells of closes.
    type Watch;

    fn open_file(&self, path: &Path, writable: bool) -> Result<Self::File, Errno>;
    fn make_file(&self, path: &Path) -> Result<Self::File, Errno>;
    fn make_memory_file(&self) -> Result<Self::File, Errno>;
    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno>;
    fn size_file(&self, file: &Self::File, bytes: u64, reserve: bool) -> Result<(), Errno>;
    fn open_backing(&self, path: &Path, writable: bool) -> Result<Self::File, Errno>;
    fn lengthen_file(&self, file: &Self::File, bytes: u64, reserve: bool) -> Result<(), Errno>;
    fn inspect_file(&self, file: &Self::File) -> Result<FileFacts, Errno>;
    fn lock_file(&self, file: &Self::File, exclusive: bool) -> Result<(), Errno>;
    fn read_at(&self, file: &Self::File, buffer: &mut [u8], at: usize) -> Result<usize, Errno>;

    fn write_at(&self, file: &Self::File, bytes: &[u8], at: usize) -> Result<(), Errno>;
    fn sync_file(&self, file: &Self::File) -> Result<(), Errno>;
    fn date_file(&self, file: &Self::File, mtime_ns: Option<i64>) -> Result<(), Errno>;

    fn open_loop_control(&self) -> Result<(), Errno>;
    fn find_loop(&self) -> Result<u32, Errno>;
    fn open_loop(&self, path: &Path, writable: bool) -> Result<Self::Loop, Errno>;
    fn attach_loop(
        &self,
        device: &Self::Loop,
        backing: &Self::File,
        flags: u32,
        path: &Path,
    ) -> Result<(), Errno>;
    fn lock_loop(&self, device: &Self::Loop, exclusive: bool) -> Result<(), Errno>;
    fn mark_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn loop_is_marked(&self, device: &Self::Loop) -> Result<bool, Errno>;
    fn loop_number(&self, device: &Self::Loop) -> Result<DeviceNumber, Errno>;
    fn loop_diskseq(&self, device: &Self::Loop) -> Result<u64, Errno>;
    fn loop_status(&self, device: &Self::Loop) -> Result<LoopStatus, Errno>;
    fn loop_size_bytes(&self, device: &Self::Loop) -> Result<u64, Errno>;
    fn detach_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn read_only_loops(&self) -> Vec<u32>;
    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber>;
    fn shows_backing(&self, path: &Path) -> bool;
    fn resize_loop(&self, device: &Self::Loop) -> Result<(), Errno>;
    fn backing_of(&self, number: DeviceNumber) -> Result<(PathBuf, PathBuf), Errno>;

    fn open_mapper(&self) -> Result<(), Errno>;
    fn target_version(&self) -> Result<TargetVersion, Errno>;
    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno>;
    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno>;
    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno>;
    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno>;
    fn suspend(&self, uuid: &DeviceUuid) -> Result<(), Errno>;
    fn query(&self, address: Address<'_>) -> Result<Device, Errno>;
    fn live_table(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno>;
    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno>;
    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno>;

    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf>;
    fn make_alias(
        &self,
        path: &Path,
        number: DeviceNumber,
        node: Option<&Path>,
    ) -> Result<(), Errno>;
    fn remove_alias(&self, path: &Path, number: DeviceNumber) -> Result<bool, Errno>;
    fn is_our_alias(&self, path: &Path) -> bool;
    fn unlink(&self, path: &Path) -> Result<(), Errno>;
    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno>;

    fn is_present(&self, number: DeviceNumber) -> bool;
    fn holders(&self, number: DeviceNumber) -> Vec<String>;

    fn random(&self) -> Result<u128, Errno>;
    fn now(&self) -> Duration;
    fn sleep(&self, pause: Duration);
    fn watch_closes(&self, nodes: &[PathBuf]) -> Result<Self::Watch, Errno>;
    fn wait_for_close(&self, watch: &Self::Watch, pause: Duration) -> bool;
}

/// The machine we run on. Its two control nodes are opened on first use and stay open with the process.
#[derive(Debug)]
pub(crate) struct Machine {
    loops: OnceLock<LoopControl>,
    mapper: OnceLock<Mapper>,
    start: OnceLock<Instant>,
}

/// The one machine.
pub(crate) static MACHINE: Machine = Machine {
    loops: OnceLock::new(),
    mapper: OnceLock::new(),
    start: OnceLock::new(),
};

/// What a control node's methods need, opened if it is not yet. A failed open is tried again by the next call.
fn opened<T>(cell: &OnceLock<T>, open: impl FnOnce() -> Result<T, Errno>) -> Result<&T, Errno> {
    match cell.get() {
        Some(control) => Ok(control),
        None => {
            let control = open()?;
            Ok(cell.get_or_init(|| control))
        }
    }
}

impl Machine {
    fn loops(&self) -> Result<&LoopControl, Errno> {
        opened(&self.loops, LoopControl::open)
    }

    fn mapper(&self) -> Result<&Mapper, Errno> {
        opened(&self.mapper, Mapper::open)
    }

    pub(crate) fn list(&self) -> Result<Vec<Listed>, Errno> {
        self.mapper()?.list()
    }

    pub(crate) fn table(
        &self,
        id: DevId<'_>,
        inactive: bool,
    ) -> Result<Option<(String, String)>, Errno> {
        self.mapper()?.table(id, inactive)
    }

    pub(crate) fn glance(
        &self,
        uuid: &DeviceUuid,
        name: &str,
    ) -> Result<Option<SnapshotStatus>, Errno> {
        self.mapper()?.glance(uuid, name)
    }

    pub(crate) fn set_uuid(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.mapper()?.set_uuid(name, uuid)
    }
}

impl Host for Machine {
    type File = OwnedFd;
    type Loop = LoopDevice;
    type Watch = Closes;

    /// `O_EXCL` without `O_CREAT` claims a block device against mounts and other exclusive users, for as long as the
    /// loop device has it; it means nothing for a regular file. `O_NONBLOCK` keeps a FIFO from blocking the open; it
    /// has no effect on regular files and block devices (open(2)).
    fn open_file(&self, path: &Path, writable: bool) -> Result<OwnedFd, Errno> {
        let access = if writable {
            OFlag::O_RDWR | OFlag::O_EXCL
        } else {
            OFlag::O_RDONLY
        };
        open(
            path,
            access | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
            Mode::empty(),
        )
    }

    fn make_file(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        open(path, flags, Mode::S_IRUSR | Mode::S_IWUSR)
    }

    /// A file without a name, gone with its last user.
    fn make_memory_file(&self) -> Result<OwnedFd, Errno> {
        nix::sys::memfd::memfd_create(c"dmsnap", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
    }

    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        sys::move_file(from, to)
    }

    fn size_file(&self, file: &OwnedFd, bytes: u64, reserve: bool) -> Result<(), Errno> {
        let length = libc::off_t::try_from(bytes).map_err(|_| Errno::EFBIG)?;
        if reserve {
            nix::fcntl::fallocate(file, FallocateFlags::empty(), 0, length)
        } else {
            nix::unistd::ftruncate(file, length)
        }
    }

    /// Without `O_EXCL`: a block device is claimed by the loop device over it.
    fn open_backing(&self, path: &Path, writable: bool) -> Result<OwnedFd, Errno> {
        let access = if writable {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        open(path, access | flags, Mode::empty())
    }

    /// `fallocate` of the last byte alone, or of all: unlike `ftruncate` it never makes a file shorter that somebody
    /// else has just made longer still, and it leaves what is there as it is.
    fn lengthen_file(&self, file: &OwnedFd, bytes: u64, reserve: bool) -> Result<(), Errno> {
        let length = libc::off_t::try_from(bytes).map_err(|_| Errno::EFBIG)?;
        let from = if reserve { 0 } else { (length - 1).max(0) };
        nix::fcntl::fallocate(file, FallocateFlags::empty(), from, length - from)
    }

    fn inspect_file(&self, file: &OwnedFd) -> Result<FileFacts, Errno> {
        let facts = facts(&fstat(file)?);
        match facts.kind {
            FileKind::BlockDevice(_) => {
                let size_bytes = sys::block_size_bytes(file.as_fd())?;
                // Writing through the node changes its time, whoever writes and whatever.
                Ok(FileFacts {
                    size_bytes,
                    mtime_ns: 0,
                    has_blocks: true,
                    ..facts
                })
            }
            _ => Ok(facts),
        }
    }

    fn lock_file(&self, file: &OwnedFd, exclusive: bool) -> Result<(), Errno> {
        sys::lock(file.as_fd(), exclusive)
    }

    fn read_at(&self, file: &OwnedFd, buffer: &mut [u8], at: usize) -> Result<usize, Errno> {
        nix::sys::uio::pread(file, buffer, offset(at)?)
    }

    fn write_at(&self, file: &OwnedFd, bytes: &[u8], at: usize) -> Result<(), Errno> {
        let written = nix::sys::uio::pwrite(file, bytes, offset(at)?)?;
        if written == bytes.len() {
            Ok(())
        } else {
            Err(Errno::EIO)
        }
    }

    fn sync_file(&self, file: &OwnedFd) -> Result<(), Errno> {
        nix::unistd::fsync(file)
    }

    /// `None` is now. The access time stays.
    fn date_file(&self, file: &OwnedFd, mtime_ns: Option<i64>) -> Result<(), Errno> {
        let time = mtime_ns.map_or(TimeSpec::UTIME_NOW, |ns| {
            TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
        });
        futimens(file, &TimeSpec::UTIME_OMIT, &time)
    }

    fn open_loop_control(&self) -> Result<(), Errno> {
        self.loops().map(drop)
    }

    fn find_loop(&self) -> Result<u32, Errno> {
        self.loops()?.find_free()
    }

    fn open_loop(&self, path: &Path, writable: bool) -> Result<LoopDevice, Errno> {
        LoopDevice::open(path, writable)
    }

    fn attach_loop(
        &self,
        device: &LoopDevice,
        backing: &OwnedFd,
        flags: u32,
        path: &Path,
    ) -> Result<(), Errno> {
        device.attach(backing.as_fd(), flags, path)
    }

    fn lock_loop(&self, device: &LoopDevice, exclusive: bool) -> Result<(), Errno> {
        device.lock(exclusive)
    }

    fn mark_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.mark()
    }

    fn loop_is_marked(&self, device: &LoopDevice) -> Result<bool, Errno> {
        device.is_marked()
    }

    fn loop_number(&self, device: &LoopDevice) -> Result<DeviceNumber, Errno> {
        device.number()
    }

    fn loop_diskseq(&self, device: &LoopDevice) -> Result<u64, Errno> {
        device.diskseq()
    }

    fn loop_status(&self, device: &LoopDevice) -> Result<LoopStatus, Errno> {
        device.status()
    }

    fn loop_size_bytes(&self, device: &LoopDevice) -> Result<u64, Errno> {
        device.size_bytes()
    }

    fn detach_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.detach()
    }

    fn resize_loop(&self, device: &LoopDevice) -> Result<(), Errno> {
        device.resize()
    }

    fn backing_of(&self, number: DeviceNumber) -> Result<(PathBuf, PathBuf), Errno> {
        Ok((
            loop_device::node_of(number)?,
            loop_device::backing_path(number)?,
        ))
    }

    fn read_only_loops(&self) -> Vec<u32> {
        loop_device::read_only()
    }

    fn stacked_on(&self, path: &Path) -> Vec<DeviceNumber> {
        let number = self.device_number(path).ok().flatten();
        number.map(holders::stacked_on).unwrap_or_default()
    }

    /// Whether sysfs names a backing file for the loop device: it does until the device has let go of it.
    fn shows_backing(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default();
        let attributes = Path::new("/sys/block").join(name).join("loop");
        attributes.exists()
    }

    fn open_mapper(&self) -> Result<(), Errno> {
        self.mapper().map(drop)
    }

    fn target_version(&self) -> Result<TargetVersion, Errno> {
        self.mapper()?.target_version()
    }

    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno> {
        self.mapper()?.create(name, uuid)
    }

    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        self.mapper()?.load(uuid, line)
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        self.mapper()?.resume(uuid)
    }

    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno> {
        self.mapper()?.rename(from, to)
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.mapper()?.suspend(uuid)
    }

    fn query(&self, address: Address<'_>) -> Result<Device, Errno> {
        self.mapper()?.query(address)
    }

    fn live_table(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.mapper()?.table(DevId::Uuid(uuid), false)
    }

    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.mapper()?.status(uuid)
    }

    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        self.mapper()?.remove(address, deferred)
    }

    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf> {
        alias::find_node(number)
    }

    fn make_alias(
        &self,
        path: &Path,
        number: DeviceNumber,
        node: Option<&Path>,
    ) -> Result<(), Errno> {
        alias::make(path, number, node)
    }

    fn remove_alias(&self, path: &Path, number: DeviceNumber) -> Result<bool, Errno> {
        alias::remove(path, number)
    }

    fn is_our_alias(&self, path: &Path) -> bool {
        alias::is_ours(path)
    }

    fn unlink(&self, path: &Path) -> Result<(), Errno> {
        nix::unistd::unlink(path)
    }

    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        match facts(&nix::sys::stat::stat(path)?).kind {
            FileKind::BlockDevice(number) => Ok(Some(number)),
            _ => Ok(None),
        }
    }

    fn is_present(&self, number: DeviceNumber) -> bool {
        Path::new(&format!("/sys/dev/block/{number}")).exists()
    }

    fn holders(&self, number: DeviceNumber) -> Vec<String> {
        holders::holders(number)
    }

    fn random(&self) -> Result<u128, Errno> {
        sys::random()
    }

    fn now(&self) -> Duration {
        self.start.get_or_init(Instant::now).elapsed()
    }

    fn sleep(&self, pause: Duration) {
        std::thread::sleep(pause);
    }

    fn watch_closes(&self, nodes: &[PathBuf]) -> Result<Closes, Errno> {
        Closes::of(nodes)
    }

    fn wait_for_close(&self, watch: &Closes, pause: Duration) -> bool {
        watch.wait(pause)
    }
}

fn offset(at: usize) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(at).map_err(|_| Errno::EOVERFLOW)
}

fn facts(stat: &FileStat) -> FileFacts {
    let format = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let kind = match format {
        SFlag::S_IFREG => FileKind::Regular,
        SFlag::S_IFBLK => FileKind::BlockDevice(DeviceNumber::from_dev_t(stat.st_rdev)),
        SFlag::S_IFDIR => FileKind::Other("a directory"),
        SFlag::S_IFIFO => FileKind::Other("a FIFO"),
        SFlag::S_IFCHR => FileKind::Other("a character device"),
        _ => FileKind::Other("a socket"),
    };
    FileFacts {
        id: FileId {
            dev: DeviceNumber::from_dev_t(stat.st_dev),
            inode: stat.st_ino,
        },
        kind,
        mode: stat.st_mode & 0o7777,
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_ns: stat
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(stat.st_mtime_nsec),
        #[allow(clippy::useless_conversion, reason = "its width is the architecture's")]
        links: stat.st_nlink.into(),
        has_blocks: stat.st_blocks != 0,
    }
}
