//! The machine's files.

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, FcntlArg, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, futimens, lstat, stat};
use nix::sys::time::TimeSpec;
use nix::unistd::Whence;

use super::Machine;
use crate::base::{DeviceNumber, FileId};
use crate::kernel::seam::{FileFacts, FileKind, Files};
use crate::kernel::sys;

impl Machine {
    /// A file of ours as a caller would have opened it, to be handed out.
    pub(crate) fn handed_out(file: OwnedFd) -> File {
        // `O_NONBLOCK` is the only one of our flags that can be taken off, and of an open file that cannot fail.
        let flags = fcntl(&file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let _ = flags.and_then(|flags| fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)));
        File::from(file)
    }
}

impl Files for Machine {
    type File = OwnedFd;

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

    fn open_replaced(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_RDWR | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        open(path, flags, Mode::empty())
    }

    /// Opens it without `O_EXCL`, as the loop device over it has claimed a block device already.
    fn open_backing(&self, path: &Path, writable: bool) -> Result<OwnedFd, Errno> {
        let access = if writable {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        open(path, access | flags, Mode::empty())
    }

    fn make_file(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        open(path, flags, Mode::S_IRUSR | Mode::S_IWUSR)
    }

    /// Makes a file without a name (`memfd_create`), which goes with its last user.
    fn make_memory_file(&self) -> Result<OwnedFd, Errno> {
        nix::sys::memfd::memfd_create(c"dmsnap", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
    }

    /// Fails where /proc is missing: the file could be given no name later.
    fn make_nameless(&self, directory: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let file = open(directory, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        stat(&magic_link(&file)).map(|_| file)
    }

    fn name_file(&self, file: &OwnedFd, path: &Path) -> Result<(), Errno> {
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        nix::unistd::linkat(AT_FDCWD, &magic_link(file), AT_FDCWD, path, flags)
    }

    fn link_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        nix::unistd::linkat(AT_FDCWD, from, AT_FDCWD, to, AtFlags::empty())
    }

    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        nix::fcntl::renameat(AT_FDCWD, from, AT_FDCWD, to)
    }

    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        sys::move_file(from, to)
    }

    fn size_file(&self, file: &OwnedFd, bytes: u64, reserve: bool) -> Result<(), Errno> {
        let length = length_within_limit(bytes)?;
        if reserve {
            nix::fcntl::fallocate(file, FallocateFlags::empty(), 0, length)
        } else {
            nix::unistd::ftruncate(file, length)
        }
    }

    /// Allocates the last byte alone, or all bytes (`fallocate`). Unlike `ftruncate` this never makes a file shorter
    /// that somebody else has just made longer, and it leaves what is there as it is.
    fn lengthen_file(&self, file: &OwnedFd, bytes: u64, reserve: bool) -> Result<(), Errno> {
        let length = length_within_limit(bytes)?;
        let from = if reserve { 0 } else { (length - 1).max(0) };
        nix::fcntl::fallocate(file, FallocateFlags::empty(), from, length - from)
    }

    fn inspect_file(&self, file: &OwnedFd) -> Result<FileFacts, Errno> {
        let facts = facts(&fstat(file)?);
        match facts.kind {
            FileKind::BlockDevice(_) => {
                let size_bytes = sys::block_size_bytes(file.as_fd())?;
                let read_only = sys::block_is_read_only(file.as_fd())?;
                // Any write through a node changes the node's time, which thus says nothing about the content.
                Ok(FileFacts {
                    size_bytes,
                    read_only,
                    mtime_ns: 0,
                    has_blocks: true,
                    ..facts
                })
            }
            _ => Ok(facts),
        }
    }

    fn look(&self, path: &Path, follow: bool) -> Result<FileFacts, Errno> {
        let found = if follow { stat(path) } else { lstat(path) };
        found.map(|found| facts(&found))
    }

    fn try_punch(&self, file: &OwnedFd, at: u64) -> Result<(), Errno> {
        let at = libc::off_t::try_from(at).map_err(|_| Errno::EFBIG)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(file, flags, at, 4096)
    }

    fn measure_file(&self, file: &OwnedFd) -> Result<(u16, Vec<u8>), Errno> {
        sys::measure_verity(file.as_fd())
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

    fn write_data(&self, file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match nix::sys::uio::pwrite(file, bytes, offset(at)?)? {
                0 => return Err(Errno::EIO),
                written => {
                    bytes = &bytes[written..];
                    at += written as u64;
                }
            }
        }
        Ok(())
    }

    fn find_data(&self, file: &OwnedFd, at: u64, hole: bool) -> Result<u64, Errno> {
        let whence = if hole {
            Whence::SeekHole
        } else {
            Whence::SeekData
        };
        let found = nix::unistd::lseek(file, offset(at)?, whence)?;
        u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }

    fn punch(&self, file: &OwnedFd, range: Range<u64>) -> Result<(), Errno> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = range.end.saturating_sub(range.start);
        nix::fcntl::fallocate(file, flags, offset(range.start)?, offset(length)?)
    }

    fn clone_file(&self, file: &OwnedFd, source: &OwnedFd) -> Result<(), Errno> {
        sys::clone_file(file.as_fd(), source.as_fd())
    }

    fn start_writeback(&self, file: &OwnedFd, range: Range<u64>) -> Result<(), Errno> {
        sys::start_writeback(file.as_fd(), range)
    }

    fn sync_directory(&self, directory: &Path) -> Result<(), Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::unistd::fsync(open(directory, flags, Mode::empty())?)
    }

    fn sync_file(&self, file: &OwnedFd) -> Result<(), Errno> {
        nix::unistd::fsync(file)
    }

    /// Sets the modification time; `None` means now. The access time stays.
    fn date_file(&self, file: &OwnedFd, mtime_ns: Option<i64>) -> Result<(), Errno> {
        let time = mtime_ns.map_or(TimeSpec::UTIME_NOW, |ns| {
            TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
        });
        futimens(file, &TimeSpec::UTIME_OMIT, &time)
    }

    fn unlink(&self, path: &Path) -> Result<(), Errno> {
        nix::unistd::unlink(path)
    }

    fn entries(&self, directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }
}

/// Checks the length of a file that is made or lengthened against the process's limit (RLIMIT_FSIZE): above it the
/// kernel not only refuses but sends SIGXFSZ, which ends the process.
fn length_within_limit(bytes: u64) -> Result<libc::off_t, Errno> {
    let (soft, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if bytes > soft {
        return Err(Errno::EFBIG);
    }
    libc::off_t::try_from(bytes).map_err(|_| Errno::EFBIG)
}

/// Returns the path below /proc by which a nameless file can be linked without a capability (open(2), `O_TMPFILE`).
fn magic_link(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn offset(at: impl TryInto<libc::off_t>) -> Result<libc::off_t, Errno> {
    at.try_into().map_err(|_| Errno::EOVERFLOW)
}

pub(super) fn facts(found: &FileStat) -> FileFacts {
    let format = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits());
    let kind = match format {
        SFlag::S_IFREG => FileKind::Regular,
        SFlag::S_IFBLK => FileKind::BlockDevice(DeviceNumber::from_dev_t(found.st_rdev)),
        SFlag::S_IFDIR => FileKind::Other("a directory"),
        SFlag::S_IFIFO => FileKind::Other("a FIFO"),
        SFlag::S_IFCHR => FileKind::Other("a character device"),
        SFlag::S_IFLNK => FileKind::Other("a symbolic link"),
        _ => FileKind::Other("a socket"),
    };
    FileFacts {
        id: FileId {
            dev: DeviceNumber::from_dev_t(found.st_dev),
            inode: found.st_ino,
        },
        kind,
        mode: found.st_mode & 0o7777,
        size_bytes: u64::try_from(found.st_size).unwrap_or(0),
        mtime_ns: found
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(found.st_mtime_nsec),
        #[allow(clippy::useless_conversion, reason = "its width is the architecture's")]
        links: found.st_nlink.into(),
        read_only: false,
        has_blocks: found.st_blocks != 0,
    }
}
