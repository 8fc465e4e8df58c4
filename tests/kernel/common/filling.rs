//! Filling a snapshot past the page cache, so that a write says at once whether it fits.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use dmsnap::ChunkSize;
use dmsnap::dm::{SnapshotStatus, Usage};

/// Memory that direct I/O takes.
const ALIGNED: usize = 4096;

/// A device as a VMM has it open.
pub(crate) struct Direct(File);

impl Direct {
    pub(crate) fn open(device: &Path) -> Self {
        let mut options = File::options();
        options.read(true).write(true);
        let opened = options.custom_flags(libc::O_DIRECT).open(device);
        Self(opened.expect("the device opens"))
    }

    /// Writes `byte` over so many bytes from `at` on.
    pub(crate) fn write(&self, byte: u8, at: u64, bytes: u64) -> std::io::Result<()> {
        aligned(byte, bytes, |buffer| self.0.write_all_at(buffer, at))
    }

    /// Whether so many bytes from `at` on are all `byte`.
    pub(crate) fn reads(&self, byte: u8, at: u64, bytes: u64) -> bool {
        aligned(!byte, bytes, |buffer| {
            let read = self.0.read_exact_at(buffer, at);
            read.is_ok() && buffer.iter().all(|each| *each == byte)
        })
    }
}

fn aligned<T>(byte: u8, bytes: u64, work: impl FnOnce(&mut [u8]) -> T) -> T {
    let bytes = usize::try_from(bytes).expect("small");
    let mut memory = vec![byte; bytes + ALIGNED];
    let start = memory.as_ptr().align_offset(ALIGNED);
    work(&mut memory[start..start + bytes])
}

/// How many chunks of data a COW device of `bytes` takes: without the header, and without a metadata chunk for every
/// `chunk bytes / 16` of data (drivers/md/dm-snap-persistent.c, area_location).
pub(crate) fn data_chunks(bytes: u64, chunk: ChunkSize) -> u64 {
    let behind_header = bytes / chunk.bytes() - 1;
    behind_header - behind_header.div_ceil(chunk.bytes() / 16 + 1)
}

pub(crate) fn status_of(name: &str) -> SnapshotStatus {
    let info = dmsnap::status(name).expect("it is there");
    info.status.expect("it is live")
}

pub(crate) fn usage_of(name: &str) -> Usage {
    match status_of(name) {
        SnapshotStatus::Usage(usage) => usage,
        other => panic!("{name}: {other}"),
    }
}
