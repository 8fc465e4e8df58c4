//! Files: images, COW files, exports and their directories.

use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::base::{DeviceNumber, FileId, OriginIdentity};

/// What `fstat` tells about an image or a COW file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileFacts {
    pub(crate) id: FileId,
    pub(crate) kind: FileKind,
    pub(crate) mode: u32,
    pub(crate) size_bytes: u64,
    pub(crate) mtime_ns: i64,
    /// The number of its hard links; 0 once it is unlinked.
    pub(crate) links: u64,
    /// True if it is a block device that takes no writes.
    pub(crate) read_only: bool,
    /// True if it has allocated blocks; always for a block device.
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

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    BlockDevice(DeviceNumber),
    Other(&'static str),
}

/// Calls on files.
pub(crate) trait Files {
    type File;

    /// Opens an image or a COW file for a loop device; a writable block device is claimed exclusively.
    fn open_file(&self, path: &Path, writable: bool) -> Result<Self::File, Errno>;
    /// Opens a file that is to be emptied; ELOOP for a symbolic link.
    fn open_replaced(&self, path: &Path) -> Result<Self::File, Errno>;
    /// Opens the file behind a loop device, without claiming it: the loop device has claimed it.
    fn open_backing(&self, path: &Path, writable: bool) -> Result<Self::File, Errno>;
    fn make_file(&self, path: &Path) -> Result<Self::File, Errno>;
    /// Makes a file without a name in the directory (`O_TMPFILE`), mode 0600.
    fn make_nameless(&self, directory: &Path) -> Result<Self::File, Errno>;
    /// Gives a nameless file its name; EEXIST if that is taken.
    fn name_file(&self, file: &Self::File, path: &Path) -> Result<(), Errno>;
    fn make_memory_file(&self) -> Result<Self::File, Errno>;
    /// Makes another hard link to a file; EEXIST if the path is taken, EPERM where the file system has no hard links.
    fn link_file(&self, from: &Path, to: &Path) -> Result<(), Errno>;
    /// Moves a file to a path, and replaces the file that is there.
    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), Errno>;
    /// Moves a file; EEXIST if the path is taken, EINVAL where the file system cannot check that.
    fn move_file(&self, from: &Path, to: &Path) -> Result<(), Errno>;
    fn size_file(&self, file: &Self::File, bytes: u64, reserve: bool) -> Result<(), Errno>;
    fn lengthen_file(&self, file: &Self::File, bytes: u64, reserve: bool) -> Result<(), Errno>;
    fn inspect_file(&self, file: &Self::File) -> Result<FileFacts, Errno>;
    /// Inspects the file at the path; with `follow` false, a symbolic link itself.
    fn look(&self, path: &Path, follow: bool) -> Result<FileFacts, Errno>;
    /// Punches a hole at `at`, behind the file's end, where it changes nothing: it tells whether holes can be punched.
    fn try_punch(&self, file: &Self::File, at: u64) -> Result<(), Errno>;
    /// Returns the digest of a file with fs-verity, and the number of its algorithm.
    fn measure_file(&self, file: &Self::File) -> Result<(u16, Vec<u8>), Errno>;
    fn lock_file(&self, file: &Self::File, exclusive: bool) -> Result<(), Errno>;
    fn read_at(&self, file: &Self::File, buffer: &mut [u8], at: usize) -> Result<usize, Errno>;
    fn write_at(&self, file: &Self::File, bytes: &[u8], at: usize) -> Result<(), Errno>;
    /// Writes all of the bytes at that offset.
    fn write_data(&self, file: &Self::File, bytes: &[u8], at: u64) -> Result<(), Errno>;
    /// Returns where data, or with `hole` a hole, begins at or behind `at`; ENXIO if there is no more.
    fn find_data(&self, file: &Self::File, at: u64, hole: bool) -> Result<u64, Errno>;
    /// Punches a hole: the range reads as zeroes, and its space is free.
    fn punch(&self, file: &Self::File, range: Range<u64>) -> Result<(), Errno>;
    /// Makes the empty file share all of the other's blocks.
    fn clone_file(&self, file: &Self::File, source: &Self::File) -> Result<(), Errno>;
    /// Starts writing the range's dirty pages out, and does not wait for it.
    fn start_writeback(&self, file: &Self::File, range: Range<u64>) -> Result<(), Errno>;
    fn sync_directory(&self, directory: &Path) -> Result<(), Errno>;
    fn sync_file(&self, file: &Self::File) -> Result<(), Errno>;
    fn date_file(&self, file: &Self::File, mtime_ns: Option<i64>) -> Result<(), Errno>;
    fn unlink(&self, path: &Path) -> Result<(), Errno>;
    /// Returns the paths of a directory's entries; none if it cannot be read.
    fn entries(&self, directory: &Path) -> Vec<PathBuf>;
}
