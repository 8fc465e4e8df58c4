//! The floor: the ioctls alone, with no check, no lock, no identity and no alias below /dev/mapper.

#![allow(
    unsafe_code,
    reason = "the floor is the bare ioctls, written down without the library's own"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Contestant, Job, Result, names};

const LOOP_CONFIGURE: u32 = 0x4C0A;
const LOOP_CTL_GET_FREE: u32 = 0x4C82;
const BLKGETSIZE64: u32 = 0x8008_1272;
const DM_DEV_CREATE: u32 = 0xC138_FD03;
const DM_DEV_REMOVE: u32 = 0xC138_FD04;
const DM_DEV_SUSPEND: u32 = 0xC138_FD06;
const DM_TABLE_LOAD: u32 = 0xC138_FD09;

const LO_READ_ONLY: u32 = 1;
const LO_AUTOCLEAR: u32 = 4;

/// `struct loop_config`: the backing fd first, and the flags in the `loop_info64` at 8.
const LOOP_CONFIG_BYTES: usize = 304;
const LOOP_CONFIG_FLAGS: usize = 8 + 52;

/// `struct dm_ioctl`, and `struct dm_target_spec` behind it.
const DM_HEAD_BYTES: usize = 312;
const DM_SPEC_BYTES: usize = 40;

#[derive(Debug)]
pub(super) struct Ioctls {
    loops: File,
    mapper: File,
}

impl Ioctls {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            loops: File::open("/dev/loop-control")?,
            mapper: read_write("/dev/mapper/control".as_ref())?,
        })
    }

    /// Another thread may be faster at a free device: then the next one.
    fn attach(&self, backing: &File, flags: u32) -> Result<File> {
        loop {
            let free = plain(&self.loops, LOOP_CTL_GET_FREE)?;
            let node = format!("/dev/loop{free}");
            let device = if flags & LO_READ_ONLY != 0 {
                File::open(node)?
            } else {
                read_write(node.as_ref())?
            };
            let mut config = [0; LOOP_CONFIG_BYTES];
            put(&mut config, 0, u32::try_from(backing.as_raw_fd())?);
            put(&mut config, LOOP_CONFIG_FLAGS, flags);
            match with_buffer(&device, LOOP_CONFIGURE, &mut config) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                answer => return answer.map(|_| device).map_err(Into::into),
            }
        }
    }

    fn ask(&self, request: u32, name: &str, table: Option<(u64, String)>) -> Result<()> {
        let mut message = vec![0; DM_HEAD_BYTES];
        put(&mut message, 0, 4);
        put(&mut message, 16, u32::try_from(DM_HEAD_BYTES)?);
        message[48..48 + name.len()].copy_from_slice(name.as_bytes());
        if let Some((sectors, params)) = table {
            put(&mut message, 20, 1);
            let mut spec = [0; DM_SPEC_BYTES];
            spec[8..16].copy_from_slice(&sectors.to_ne_bytes());
            spec[24..32].copy_from_slice(b"snapshot");
            message.extend(spec);
            message.extend(params.bytes().chain([0]));
            message.resize(message.len().next_multiple_of(8), 0);
        }
        let size = u32::try_from(message.len())?;
        put(&mut message, 12, size);
        with_buffer(&self.mapper, request, &mut message)?;
        Ok(())
    }
}

impl Contestant for Ioctls {
    fn name(&self) -> &'static str {
        names::IOCTLS
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let image = File::open(job.image)?;
        let origin = self.attach(&image, LO_READ_ONLY | LO_AUTOCLEAR)?;
        let cow = self.attach(&read_write(job.cow)?, LO_AUTOCLEAR)?;
        let mut bytes = [0; 8];
        with_buffer(&origin, BLKGETSIZE64, &mut bytes)?;
        let table = format!(
            "{} {} {}",
            number(&origin)?,
            number(&cow)?,
            job.store_and_chunk()
        );
        self.ask(DM_DEV_CREATE, job.name, None)?;
        let sectors = u64::from_ne_bytes(bytes) / 512;
        self.ask(DM_TABLE_LOAD, job.name, Some((sectors, table)))?;
        self.ask(DM_DEV_SUSPEND, job.name, None)
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        self.ask(DM_DEV_REMOVE, job.name, None)
    }
}

fn read_write(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// `major:minor` of a loop device; its minors all fit 8 bits here.
fn number(device: &File) -> io::Result<String> {
    let dev = device.metadata()?.rdev();
    Ok(format!("{}:{}", libc::major(dev), libc::minor(dev)))
}

fn put(buffer: &mut [u8], at: usize, value: u32) {
    buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn plain(file: &File, request: u32) -> io::Result<i32> {
    // SAFETY: `file` is open for as long as it is borrowed; the one request sent so, LOOP_CTL_GET_FREE, has no
    // argument, so no memory is involved; any other kind of file answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request as _) })
}

fn with_buffer(file: &File, request: u32, buffer: &mut [u8]) -> io::Result<i32> {
    // SAFETY: `file` is open for as long as it is borrowed; the kernel reads and writes no more than the request's
    // own size (8 or 304 bytes) or the dm message's `data_size`, and each caller's buffer is that long; any other
    // kind of file answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request as _, buffer.as_mut_ptr()) })
}

fn check(answer: i32) -> io::Result<i32> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}
