//! The only unsafe code: one safe function per ioctl that nix has not, and that loopdev and devicemapper, where they are
//! used, have not as it is wanted.
//!
//! Functions are grouped by the file descriptor they act on. They borrow it, return the bare errno, and hold no
//! path, no retry and no policy. Request codes and layouts are pinned to the kernel's numbers by the tests below.

#![allow(
    unsafe_code,
    reason = "ioctls that no safe crate offers; every other file denies unsafe code"
)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

use crate::dm::HEAD_BYTES;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "dmsnap is for 64-bit Linux: the kernel's ioctls are declared here with the layouts they have there"
);

#[cfg(any(
    target_arch = "mips64",
    target_arch = "mips64r6",
    target_arch = "powerpc64",
    target_arch = "sparc64"
))]
compile_error!(
    "dmsnap has not this architecture's ioctl numbers: it encodes them in a way of its own"
);

/// What glibc and musl call an ioctl's request differs in type; the kernel's is 32 bits.
type Request = u32;

#[cfg(any(test, not(feature = "loopdev")))]
const LOOP_CLR_FD: Request = 0x4C01;
const LOOP_GET_STATUS64: Request = 0x4C05;
const LOOP_SET_CAPACITY: Request = 0x4C07;
const LOOP_CONFIGURE: Request = 0x4C0A;
const LOOP_CTL_ADD: Request = 0x4C80;
const LOOP_CTL_GET_FREE: Request = 0x4C82;
const BLKROGET: Request = 0x125E;
const BLKSSZGET: Request = 0x1268;
const BLKGETSIZE64: Request = 0x8008_1272;
const BLKGETDISKSEQ: Request = 0x8008_1280;
const FICLONE: Request = 0x4004_9409;
const FS_IOC_MEASURE_VERITY: Request = 0xC004_6686;
const DM_IOCTL: Request = 0xC138_FD00;

/// `LO_FLAGS_READ_ONLY`.
pub(crate) const LO_READ_ONLY: u32 = 1;
/// `LO_FLAGS_AUTOCLEAR`.
pub(crate) const LO_AUTOCLEAR: u32 = 4;
/// `LO_FLAGS_DIRECT_IO`.
pub(crate) const LO_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoopInfo {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) rdevice: u64,
    pub(crate) offset: u64,
    pub(crate) sizelimit: u64,
    pub(crate) number: u32,
    pub(crate) encrypt_type: u32,
    pub(crate) encrypt_key_size: u32,
    pub(crate) flags: u32,
    pub(crate) file_name: [u8; 64],
    pub(crate) crypt_name: [u8; 64],
    pub(crate) encrypt_key: [u8; 32],
    pub(crate) init: [u64; 2],
}

impl LoopInfo {
    const ZERO: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct fsverity_digest`, with room for the longest digest.
#[repr(C)]
struct VerityDigest {
    algorithm: u16,
    size: u16,
    digest: [u8; 64],
}

fn check(answer: libc::c_int) -> Result<libc::c_int, Errno> {
    Errno::result(answer)
}

// --- /dev/loop-control ---

/// `LOOP_CTL_GET_FREE` (3.1): the number of a loop device that was free a moment ago. It is not reserved.
pub(crate) fn loop_find_free(control: BorrowedFd<'_>) -> Result<u32, Errno> {
    // SAFETY: `control` is open for as long as it is borrowed; the request has no argument, so the kernel touches
    // no memory of ours; any other kind of file answers ENOTTY or EINVAL.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    check(number).map(libc::c_int::unsigned_abs)
}

/// `LOOP_CTL_ADD` (3.1): makes the loop device of that number; EEXIST where there is one.
pub(crate) fn loop_add(control: BorrowedFd<'_>, number: u32) -> Result<(), Errno> {
    // SAFETY: `control` is open for as long as it is borrowed; the argument is a number, so the kernel touches no memory
    // of ours; any other kind of file answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_ADD as _, number) }).map(drop)
}

// --- /dev/loopN ---

/// `LOOP_CONFIGURE` (5.8): binds `backing` and sets `flags` and the logical block size in one step. The loop device keeps the open file
/// description, and with it any `flock` it holds, until it is cleared.
pub(crate) fn loop_configure(
    device: BorrowedFd<'_>,
    backing: BorrowedFd<'_>,
    flags: u32,
    block_size: u32,
    file_name: &[u8],
) -> Result<(), Errno> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    let mut info = LoopInfo {
        flags,
        ..LoopInfo::ZERO
    };
    let kept = file_name.len().min(info.file_name.len() - 1);
    info.file_name[..kept].copy_from_slice(&file_name[..kept]);
    let config = LoopConfig {
        fd,
        block_size,
        info,
        reserved: [0; 8],
    };
    // SAFETY: both descriptors are open for as long as they are borrowed; the kernel reads 304 bytes, the size of
    // `config`, and writes none; a file that is no loop device answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) })
        .map(drop)
}

/// `LOOP_CLR_FD`: unbinds the device, at its last close if anybody else has it open. ENXIO when nothing is bound.
#[cfg(not(feature = "loopdev"))]
pub(crate) fn loop_clear(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: `device` is open for as long as it is borrowed; the request has no argument, so the kernel touches no
    // memory of ours; a file that is no loop device answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _, 0) }).map(drop)
}

/// `LOOP_GET_STATUS64` (2.6): the backing file's device and inode, and the flags. ENXIO when nothing is bound.
pub(crate) fn loop_status(device: BorrowedFd<'_>) -> Result<LoopInfo, Errno> {
    let mut info = LoopInfo::ZERO;
    // SAFETY: `device` is open for as long as it is borrowed; the kernel writes 232 bytes, the size of `info`, all
    // of whose fields are integers; a file that is no loop device answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) })?;
    Ok(info)
}

/// `LOOP_SET_CAPACITY` (2.6.30): takes over the backing file's size. EPERM for a descriptor that is not open for
/// writing, unless the caller has CAP_SYS_ADMIN; ENXIO when nothing is bound.
pub(crate) fn loop_set_capacity(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: `device` is open for as long as it is borrowed; the request has no argument, so the kernel touches no
    // memory of ours; a file that is no loop device answers ENOTTY or EINVAL.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY as _) }).map(drop)
}

// --- any block device ---

/// `BLKGETSIZE64`: its size in bytes.
pub(crate) fn block_size_bytes(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    block_u64(device, BLKGETSIZE64)
}

/// `BLKGETDISKSEQ` (5.15): a number that no other binding of a loop device has, until the next boot. ENOTTY or
/// EINVAL on older kernels.
pub(crate) fn block_diskseq(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    block_u64(device, BLKGETDISKSEQ)
}

/// `BLKROGET`: whether it is read-only.
pub(crate) fn block_is_read_only(device: BorrowedFd<'_>) -> Result<bool, Errno> {
    block_int(device, BLKROGET).map(|value| value != 0)
}

/// `BLKSSZGET`: its logical block size in bytes.
pub(crate) fn block_sector_bytes(device: BorrowedFd<'_>) -> Result<u32, Errno> {
    block_int(device, BLKSSZGET).map(libc::c_int::unsigned_abs)
}

fn block_int(device: BorrowedFd<'_>, request: Request) -> Result<libc::c_int, Errno> {
    let mut value: libc::c_int = 0;
    // SAFETY: `device` is open for as long as it is borrowed; the kernel writes an `int`, which `value` is, for either
    // request; a file that is no block device answers ENOTTY.
    check(unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw mut value) })?;
    Ok(value)
}

fn block_u64(device: BorrowedFd<'_>, request: Request) -> Result<u64, Errno> {
    let mut value = 0u64;
    // SAFETY: `device` is open for as long as it is borrowed; the kernel writes 8 bytes, the size of `value`, for
    // either request; a file that is no block device answers ENOTTY.
    check(unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw mut value) })?;
    Ok(value)
}

// --- /dev/mapper/control ---

/// Sends a dm message: `struct dm_ioctl` and what lies behind it. The answer replaces it.
///
/// The message's `data_size` is set to its length here, which is what bounds the kernel's reading and writing.
pub(crate) fn dm_ioctl(
    control: BorrowedFd<'_>,
    command: u8,
    message: &mut [u8],
) -> Result<(), Errno> {
    let size = u32::try_from(message.len()).map_err(|_| Errno::E2BIG)?;
    if message.len() < HEAD_BYTES {
        return Err(Errno::EINVAL);
    }
    message[12..16].copy_from_slice(&size.to_ne_bytes());
    let request = DM_IOCTL | Request::from(command);
    // SAFETY: `control` is open for as long as it is borrowed; the kernel reads and writes at most `data_size`
    // bytes from the pointer, which was just set to the length of `message`; any other kind of file answers ENOTTY.
    check(unsafe { libc::ioctl(control.as_raw_fd(), request as _, message.as_mut_ptr()) }).map(drop)
}

// --- descriptors of loopdev's, which it hands out raw only ---

/// `/dev/loop-control` as the crate holds it open.
#[cfg(feature = "loopdev")]
pub(crate) fn fd_of_loop_control(control: &loopdev::LoopControl) -> BorrowedFd<'_> {
    // SAFETY: the crate's type owns a `File` that it closes when it is dropped, which cannot be while it is borrowed; no
    // memory is involved; what kind of file it is does not matter here.
    unsafe { BorrowedFd::borrow_raw(control.as_raw_fd()) }
}

/// A loop device's node as the crate holds it open.
#[cfg(feature = "loopdev")]
pub(crate) fn fd_of_loop_device(device: &loopdev::LoopDevice) -> BorrowedFd<'_> {
    // SAFETY: the crate's type owns a `File` that it closes when it is dropped, which cannot be while it is borrowed; no
    // memory is involved; what kind of file it is does not matter here.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

// --- any file ---

/// Takes a `flock` without waiting; EAGAIN when somebody else's is in the way. It belongs to the open file
/// description, so a loop device that is given the file holds it too.
pub(crate) fn lock(file: BorrowedFd<'_>, exclusive: bool) -> Result<(), Errno> {
    let kind = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: `file` is open for as long as it is borrowed; the call takes no pointer; files that cannot be locked
    // answer EBADF, EINVAL or ENOLCK.
    check(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }).map(drop)
}

/// `FICLONE` (4.5): makes `output` share all of `source`'s blocks. EOPNOTSUPP where the file system cannot, EXDEV
/// between two of them.
pub(crate) fn clone_file(output: BorrowedFd<'_>, source: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: both descriptors are open for as long as they are borrowed; the argument is a descriptor, so the kernel
    // touches no memory of ours; other kinds of files answer EINVAL, EISDIR, ENOTTY or EOPNOTSUPP.
    check(unsafe { libc::ioctl(output.as_raw_fd(), FICLONE as _, source.as_raw_fd()) }).map(drop)
}

/// `FS_IOC_MEASURE_VERITY` (5.4): the hash algorithm's number, and the digest of a file with fs-verity. ENODATA for another
/// file, ENOTTY or EOPNOTSUPP where its file system or the kernel has no fs-verity.
pub(crate) fn measure_verity(file: BorrowedFd<'_>) -> Result<(u16, Vec<u8>), Errno> {
    let mut measured = VerityDigest {
        algorithm: 0,
        size: 64,
        digest: [0; 64],
    };
    // SAFETY: `file` is open for as long as it is borrowed; the kernel writes the 4 bytes before `digest`, and of that at
    // most as many as `size` says, its length; other kinds of files answer ENOTTY.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            FS_IOC_MEASURE_VERITY as _,
            &raw mut measured,
        )
    })?;
    let digest = measured.digest.get(..usize::from(measured.size));
    let digest = digest.ok_or(Errno::EOVERFLOW)?;
    Ok((measured.algorithm, digest.to_vec()))
}

/// `sync_file_range` with `SYNC_FILE_RANGE_WRITE` (2.6.17): has what is dirty there written out, and waits for nothing.
pub(crate) fn start_writeback(
    file: BorrowedFd<'_>,
    range: std::ops::Range<u64>,
) -> Result<(), Errno> {
    let offset = |at| libc::off64_t::try_from(at).map_err(|_| Errno::EOVERFLOW);
    let (start, length) = (offset(range.start)?, offset(range.end - range.start)?);
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: `file` is open for as long as it is borrowed; the call takes no pointer; what cannot be synced answers
    // ESPIPE.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, flags) }).map(drop)
}

// --- a path ---

/// `statx` of a block device's node: its number, or `None` for any other file. Answers from what is cached, so that a
/// file on a dead network file system does not block the caller.
pub(crate) fn cached_block_number(path: &CStr) -> Result<Option<u64>, Errno> {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: no descriptor is involved; `path` is NUL-terminated; the kernel writes at most the 256 bytes of
    // `found`; a path to any kind of file answers alike.
    let answer = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_STATX_DONT_SYNC,
            libc::STATX_TYPE,
            found.as_mut_ptr(),
        )
    };
    check(answer)?;
    // SAFETY: all of it was zeroed above, and every field is an integer.
    let found = unsafe { found.assume_init() };
    let is_block = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    Ok(is_block.then(|| libc::makedev(found.stx_rdev_major, found.stx_rdev_minor)))
}

/// `renameat2` with `RENAME_NOREPLACE` (3.15): EEXIST when `to` is there, EINVAL where the file system cannot say so.
pub(crate) fn move_file(from: &Path, to: &Path) -> Result<(), Errno> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL);
    let (from, to) = (text(from)?, text(to)?);
    let here = libc::AT_FDCWD;
    // SAFETY: no descriptor is involved; both paths are NUL-terminated and live until the call returns; the kernel
    // writes no memory of ours; files of any kind answer alike.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            here,
            from.as_ptr(),
            here,
            to.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    Errno::result(answer).map(drop)
}

// --- the calling thread ---

/// `sched_setscheduler` with `SCHED_BATCH` (2.6.16): waking, it takes no core from an ordinary thread.
pub(crate) fn make_batch_thread() -> Result<(), Errno> {
    // SAFETY: no descriptor is involved; every field of the parameters is an integer, or padding.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel reads the parameters, which live until the call returns, and writes nothing; thread 0 is the
    // calling one.
    let answer = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    check(answer).map(drop)
}

// --- no file ---

/// 128 random bits.
pub(crate) fn random() -> Result<u128, Errno> {
    let mut bytes = [0u8; 16];
    // SAFETY: no descriptor is involved; the kernel writes at most 16 bytes, the length of `bytes`.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match Errno::result(got)? {
        16 => Ok(u128::from_ne_bytes(bytes)),
        _ => Err(Errno::EINTR),
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;
    use crate::kernel::headers;

    #[test]
    fn layouts_are_the_kernels() {
        let pins = [
            (size_of::<LoopInfo>(), "sizeof(struct loop_info64)"),
            (
                offset_of!(LoopInfo, device),
                "offsetof(struct loop_info64, lo_device)",
            ),
            (
                offset_of!(LoopInfo, inode),
                "offsetof(struct loop_info64, lo_inode)",
            ),
            (
                offset_of!(LoopInfo, rdevice),
                "offsetof(struct loop_info64, lo_rdevice)",
            ),
            (
                offset_of!(LoopInfo, offset),
                "offsetof(struct loop_info64, lo_offset)",
            ),
            (
                offset_of!(LoopInfo, sizelimit),
                "offsetof(struct loop_info64, lo_sizelimit)",
            ),
            (
                offset_of!(LoopInfo, number),
                "offsetof(struct loop_info64, lo_number)",
            ),
            (
                offset_of!(LoopInfo, flags),
                "offsetof(struct loop_info64, lo_flags)",
            ),
            (
                offset_of!(LoopInfo, file_name),
                "offsetof(struct loop_info64, lo_file_name)",
            ),
            (
                offset_of!(LoopInfo, crypt_name),
                "offsetof(struct loop_info64, lo_crypt_name)",
            ),
            (
                offset_of!(LoopInfo, encrypt_key),
                "offsetof(struct loop_info64, lo_encrypt_key)",
            ),
            (
                offset_of!(LoopInfo, init),
                "offsetof(struct loop_info64, lo_init)",
            ),
            (
                offset_of!(VerityDigest, algorithm),
                "offsetof(struct fsverity_digest, digest_algorithm)",
            ),
            (
                offset_of!(VerityDigest, size),
                "offsetof(struct fsverity_digest, digest_size)",
            ),
            (
                offset_of!(VerityDigest, digest),
                "offsetof(struct fsverity_digest, digest)",
            ),
            (size_of::<LoopConfig>(), "sizeof(struct loop_config)"),
            (
                offset_of!(LoopConfig, fd),
                "offsetof(struct loop_config, fd)",
            ),
            (
                offset_of!(LoopConfig, block_size),
                "offsetof(struct loop_config, block_size)",
            ),
            (
                offset_of!(LoopConfig, info),
                "offsetof(struct loop_config, info)",
            ),
            (
                offset_of!(LoopConfig, reserved),
                "offsetof(struct loop_config, __reserved)",
            ),
        ];
        headers::assert_agree(&pins.map(|(ours, theirs)| (ours as u64, theirs)));
    }

    #[test]
    fn request_codes_and_flags_are_the_kernels() {
        headers::assert_agree(&[
            (LOOP_CLR_FD, "LOOP_CLR_FD"),
            (LOOP_GET_STATUS64, "LOOP_GET_STATUS64"),
            (LOOP_SET_CAPACITY, "LOOP_SET_CAPACITY"),
            (LOOP_CONFIGURE, "LOOP_CONFIGURE"),
            (LOOP_CTL_GET_FREE, "LOOP_CTL_GET_FREE"),
            (BLKROGET, "BLKROGET"),
            (BLKSSZGET, "BLKSSZGET"),
            (BLKGETSIZE64, "BLKGETSIZE64"),
            (BLKGETDISKSEQ, "BLKGETDISKSEQ"),
            (FICLONE, "FICLONE"),
            (FS_IOC_MEASURE_VERITY, "FS_IOC_MEASURE_VERITY"),
            (DM_IOCTL | 9, "DM_TABLE_LOAD"),
            (LO_READ_ONLY, "LO_FLAGS_READ_ONLY"),
            (LO_AUTOCLEAR, "LO_FLAGS_AUTOCLEAR"),
            (LO_DIRECT_IO, "LO_FLAGS_DIRECT_IO"),
        ]);
    }

    #[test]
    fn a_dm_message_without_a_whole_head_is_refused_before_the_kernel_sees_it() {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let control = std::os::fd::AsFd::as_fd(&null);
        assert_eq!(
            dm_ioctl(control, 0, &mut [0; HEAD_BYTES - 1]),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            dm_ioctl(control, 0, &mut [0; HEAD_BYTES]),
            Err(Errno::ENOTTY)
        );
    }

    #[test]
    fn random_numbers_differ() {
        assert_ne!(random(), random());
    }
}
