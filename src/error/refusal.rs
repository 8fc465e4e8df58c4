//! Bad input, told before any device is touched.

use std::path::PathBuf;

use super::{AdoptObstacle, ExportObstacle, FreezeObstacle, LayerRefusal, RepairObstacle};
use crate::base::{
    ChunkSize, Durability, InvalidChunkSize, InvalidName, InvalidNumber, InvalidUuid,
    OriginIdentity, Store,
};
use crate::store::StoreFault;

/// Why a request was turned down before any loop or dm device was touched.
///
/// Match a variant's fields with `..`: more may come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A dm name that the kernel, udev or a path would not keep as it is.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A uuid that is not one of a dmsnap device.
    #[error(transparent)]
    Uuid(#[from] InvalidUuid),
    /// Not a device number.
    #[error(transparent)]
    DeviceNumber(#[from] InvalidNumber),
    /// Not a chunk size that device-mapper takes.
    #[error(transparent)]
    ChunkSize(#[from] InvalidChunkSize),
    /// A directory, FIFO, socket or character device where a file or block device is needed.
    #[error("{path:?} is {kind}, not a file or a block device")]
    NotAFile {
        /// The path as given.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// A block device that is no dm device, where one of those is needed.
    #[error("{path:?} is not a dm device")]
    NotADmDevice {
        /// The path as given.
        path: PathBuf,
    },
    /// Not a block device where one is needed.
    #[error("{path:?} is not a block device")]
    NotABlockDevice {
        /// The path as given.
        path: PathBuf,
    },
    /// The uuid of a pool's device, which serves one snapshot after another and does not say which one is meant.
    #[error(
        "{uuid:?} is a pool's device, which serves one snapshot after another: say which by its name"
    )]
    PooledUuid {
        /// The uuid.
        uuid: String,
    },
    /// A dm device that another program made.
    #[error("{name:?} is not a dmsnap device: its uuid is {uuid:?}")]
    NotOurs {
        /// The device's name.
        name: String,
        /// Its uuid; empty without one.
        uuid: String,
    },
    /// A dm device without a uuid that cannot be taken over as a snapshot.
    #[error("cannot adopt {name:?}: {why}")]
    NotAdoptable {
        /// The device's name.
        name: String,
        /// What it is instead, or what is in the way.
        why: AdoptObstacle,
    },
    /// A snapshot that a killed process left half-way, in a state that a repair cannot end.
    #[error("cannot repair {name:?}: {why}")]
    Irreparable {
        /// The device's name.
        name: String,
        /// What happened to it.
        why: RepairObstacle,
    },
    /// The origin image holds no whole sector.
    #[error("origin image {path:?} has {bytes} bytes, less than one 512-byte sector")]
    OriginTooShort {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Somebody holds an exclusive `flock` on the origin image: it serves as COW file, is merged into, or is being
    /// written. Or it is to be merged into and has live snapshots, each of which holds a shared one.
    #[error(
        "origin image {path:?} is locked: by another process, as a COW file, by a merge, or against one by the snapshots over it, which must be cleaned up first"
    )]
    OriginInUse {
        /// The image.
        path: PathBuf,
    },
    /// The image is not the one that the COW file's exceptions were made over.
    #[error(
        "origin image {path:?} has changed: {found}, where the snapshot was made over {expected}"
    )]
    OriginChanged {
        /// The image.
        path: PathBuf,
        /// What it was.
        expected: OriginIdentity,
        /// What it is.
        found: OriginIdentity,
    },
    /// The image has the size and modification time of the one that the COW file's exceptions were made over, and other
    /// content.
    #[error(
        "origin image {path:?} is another one: its size and modification time are those of the image that the snapshot was made over, its content is not"
    )]
    OriginDiffers {
        /// The image.
        path: PathBuf,
    },
    /// The store has changes and does not say which image it was made over, as dmsnap's do: another program made it,
    /// perhaps over a partition of this image, or a loop device with an offset. Over the whole image, its changes would
    /// be seen at the image's beginning, exported there, and merged into what is there.
    #[error(
        "COW file {cow:?} does not say what it was made over: its changes end at byte {end_bytes} of that, and {origin:?} has {bytes} bytes; name the very device that it was made over, and allow any origin"
    )]
    OriginUnknown {
        /// The image.
        origin: PathBuf,
        /// Its size.
        bytes: u64,
        /// The COW file.
        cow: PathBuf,
        /// Where the last changed chunk ends, which is the least size of what the store was made over.
        end_bytes: u64,
    },
    /// The COW file is the origin image, by whatever path (hard link, symlink, bind mount).
    #[error("COW file {cow:?} and origin image {origin:?} are the same file")]
    SameFile {
        /// The image.
        origin: PathBuf,
        /// The COW file.
        cow: PathBuf,
    },
    /// The COW file has no write permission for anybody: somebody wants it kept.
    #[error("COW file {path:?} is read-only (mode {mode:04o})")]
    CowReadOnly {
        /// The COW file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The COW file is a block device that takes no writes.
    #[error("COW device {path:?} is read-only")]
    CowDeviceReadOnly {
        /// The device.
        path: PathBuf,
    },
    /// The COW file begins with zeroes, which the kernel takes for blank, and goes on with something: another file
    /// system or RAID, or a store whose header was lost.
    #[error(
        "COW file {path:?} begins with zeroes and has data at byte {at}: it is not blank, and has no header of a snapshot's exception store"
    )]
    CowHeadless {
        /// The COW file.
        path: PathBuf,
        /// The first 4 KiB block that is not zeroes.
        at: u64,
    },
    /// The disk's sectors are larger than the chunks.
    #[error(
        "chunks of {chunk} sectors ({} bytes) are smaller than the disk's sectors of {sector_bytes} bytes", .chunk.sectors().count() * 512
    )]
    ChunkUnderSector {
        /// The chunk size asked for.
        chunk: ChunkSize,
        /// The sector size asked for.
        sector_bytes: u32,
    },
    /// The COW file was to be kept of a disk whose store is transient: what is where in it goes with the dm device.
    #[error("nothing of {name:?} can be kept: its store is transient, and goes with the device")]
    NothingToKeep {
        /// The dm device's name.
        name: String,
    },
    /// The store that was named does not have the durability that was asked for.
    #[error("a disk of durability {durability} cannot have a store {:?}", .store.letters())]
    StoreOfDurability {
        /// What the disk is to outlive.
        durability: Durability,
        /// The store that was named.
        store: Store,
    },
    /// The image is no whole number of the disk's sectors.
    #[error(
        "origin image {path:?} has {bytes} bytes, no multiple of the disk's sectors of {sector_bytes} bytes"
    )]
    OriginPartSector {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The sector size asked for.
        sector_bytes: u32,
    },
    /// The COW file cannot hold the store's header, its first metadata area and one chunk of data.
    #[error(
        "COW file {path:?} has {bytes} bytes, too small: chunks of {chunk} sectors need at least {needed} bytes"
    )]
    CowTooSmall {
        /// The COW file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The chunk size asked for.
        chunk: ChunkSize,
        /// The least size that works.
        needed: u64,
    },
    /// The COW file was removed by somebody while it was being opened.
    #[error("COW file {path:?} was removed meanwhile")]
    CowUnlinked {
        /// The COW file.
        path: PathBuf,
    },
    /// The COW file to be made would be longer than any file.
    #[error("COW file {path:?} would be too large for any file system")]
    CowTooLarge {
        /// The COW file.
        path: PathBuf,
    },
    /// A `PO` store on a block device of this very size ends invalid instead of full, and devices are not made longer
    /// here.
    #[error(
        "COW device {path:?} has {bytes} bytes, and a full store of that size ends invalid: make it {sound_bytes} bytes or a chunk shorter"
    )]
    CowSizeTrap {
        /// The COW device.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The least size above it that is sound.
        sound_bytes: u64,
    },
    /// A COW device that is no file has to be made longer by whoever made it, and is then taken at its new size.
    #[error(
        "COW device {path:?} has {bytes} bytes, less than the {asked} asked for: only files are made longer here"
    )]
    CowDeviceShort {
        /// The COW device.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The size asked for.
        asked: u64,
    },
    /// The loop device was attached with an offset or a size limit, as for a partition of an image: what is read or made
    /// longer here is the file, and would be another disk's.
    #[error(
        "loop device {device:?} shows a part of {path:?}, from byte {offset_bytes}{}: only whole files are exported, grown or recovered", Limit(*.limit_bytes)
    )]
    PartOfFile {
        /// The loop device.
        device: PathBuf,
        /// Its backing file.
        path: PathBuf,
        /// Where the part begins.
        offset_bytes: u64,
        /// How long it is at most; 0 without a limit.
        limit_bytes: u64,
    },
    /// A COW file that is to be exported is a live snapshot's, which has to be flushed first.
    #[error("COW file {path:?} is in use by the snapshot {name:?}: export {name}")]
    CowOfSnapshot {
        /// The COW file.
        path: PathBuf,
        /// The dm device's name.
        name: String,
    },
    /// Another snapshot has the COW file: its loop device holds the `flock`. Or it is a block device that is mounted.
    #[error("COW file {path:?} is in use by another snapshot")]
    CowInUse {
        /// The COW file.
        path: PathBuf,
    },
    /// The COW file begins with something that is not an exception store.
    #[error("COW file {path:?} holds foreign data: neither blank nor a snapshot's exception store")]
    CowForeign {
        /// The COW file.
        path: PathBuf,
    },
    /// The kernel has marked the store invalid: it overflowed, or its writes failed.
    #[error(
        "COW file {path:?} holds a snapshot that the kernel has marked invalid (it overflowed or a write failed)"
    )]
    CowInvalid {
        /// The COW file.
        path: PathBuf,
    },
    /// A header whose fields no kernel writes.
    #[error("COW file {path:?} holds a damaged exception store: {field} is {value}")]
    CowDamaged {
        /// The COW file.
        path: PathBuf,
        /// Which field of the header.
        field: &'static str,
        /// What it says.
        value: u32,
    },
    /// The exception store is damaged behind its header, was made over a longer origin, or there is none to export.
    #[error("COW file {path:?} holds no sound exception store: {fault}")]
    CowUnsound {
        /// The COW file.
        path: PathBuf,
        /// What is wrong with it.
        fault: StoreFault,
    },
    /// The store was made with another chunk size; the kernel would silently use that one.
    #[error("COW file {path:?} was made with chunks of {found} sectors, not {asked}")]
    CowChunkSize {
        /// The COW file.
        path: PathBuf,
        /// The store's own chunk size.
        found: ChunkSize,
        /// The chunk size asked for.
        asked: ChunkSize,
    },
    /// The COW file holds no store, so there is nothing to merge: no snapshot with a persistent store was made on it.
    #[error("COW file {path:?} is blank: it holds no exception store to merge")]
    CowBlank {
        /// The COW file.
        path: PathBuf,
    },
    /// The image has no write permission for anybody: somebody wants it kept.
    #[error("origin image {path:?} is read-only (mode {mode:04o})")]
    OriginReadOnly {
        /// The image.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A transient store would overwrite what the COW file holds; a rollback would bring it along.
    #[error("COW file {path:?} is not blank (truncate it to reuse it)")]
    CowNotBlank {
        /// The COW file.
        path: PathBuf,
    },
    /// The file that an export is to make is there, and was not said to be replaceable.
    #[error("output {path:?} exists")]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// An export would replace what it reads.
    #[error("output {path:?} is the origin image or the COW file")]
    OutputIsInput {
        /// The output.
        path: PathBuf,
    },
    /// An export makes regular files, and replaces nothing else.
    #[error("output {path:?} is {kind}, not a regular file")]
    OutputNotAFile {
        /// The output.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// A snapshot that cannot be exported while it is there.
    #[error("cannot export {name:?} live: {why}")]
    NotExportable {
        /// The dm device's name.
        name: String,
        /// What is in the way.
        why: ExportObstacle,
    },
    /// Discard with such small chunks crashes this kernel, whoever asks for it.
    #[error(
        "discard with chunks of {chunk} sectors crashes kernels as new as this one: use 512 or more"
    )]
    DiscardChunk {
        /// The chunk size asked for.
        chunk: ChunkSize,
    },
    /// A discard that crosses into another chunk destroys a third one's data: only where no discard can is it safe.
    #[error(
        "discard with chunks of {chunk} sectors on a disk with sectors of {sector_bytes} bytes is not safe: the kernel lets a discard that crosses two chunks destroy a third; make chunks and sectors of one size, or say that the guest's discards are aligned to chunks"
    )]
    DiscardUnaligned {
        /// The chunk size asked for.
        chunk: ChunkSize,
        /// The logical sector size of the disk, in bytes.
        sector_bytes: u64,
    },
    /// What a COW file or a device is in a stack of layers does not fit.
    #[error(transparent)]
    Layer(#[from] LayerRefusal),
    /// A snapshot that cannot be frozen, or not now.
    #[error("cannot freeze {name:?}: {why}")]
    NotFreezable {
        /// The dm device's name.
        name: String,
        /// What is in the way.
        why: FreezeObstacle,
    },
    /// Somebody has the device open.
    #[error("{name:?} is in use: {open_count} have it open")]
    InUse {
        /// The dm device's name.
        name: String,
        /// How many.
        open_count: u32,
    },
    /// Another process is at work on the device.
    #[error("another process is at work on {name:?}")]
    AtWork {
        /// The dm device's name.
        name: String,
    },
    /// The device has no live table, or one of another target.
    #[error("{name:?} is not a live snapshot")]
    NotLive {
        /// The dm device's name.
        name: String,
    },
    /// The path that the kernel has for an image or COW file leads to it no more, or not in this mount namespace.
    #[error(
        "{path:?} is not the file that {name:?} has: it was removed, replaced or is mounted elsewhere"
    )]
    FileElsewhere {
        /// The dm device's name.
        name: String,
        /// The path, with ` (deleted)` behind it once the file is unlinked.
        path: PathBuf,
    },
    /// A longer COW file does not bring the device's writes back: it has to be removed and made again, which
    /// [`recover`](crate::snapshot::recover) does.
    #[error(
        "{name:?} has overflowed: its writes fail until it is removed and made again (recover)"
    )]
    Overflowed {
        /// The dm device's name.
        name: String,
    },
    /// A `P` or `N` store has overflowed, or the COW file's writes have failed: the kernel gives nothing of it back.
    #[error(
        "{name:?} is invalid: it overflowed or a write to its COW file failed, and the kernel has given it up"
    )]
    Invalid {
        /// The dm device's name.
        name: String,
    },
    /// There is nothing to recover from.
    #[error("{name:?} has not overflowed: it can be grown as it is")]
    NotOverflowed {
        /// The dm device's name.
        name: String,
    },
    /// No device became ready in the time that the pool was to wait, and no refill has failed meanwhile.
    #[error("no device of the pool is ready")]
    PoolEmpty,
    /// The snapshot target of this kernel cannot do what was asked.
    #[error("the kernel's snapshot target {version} lacks {feature}")]
    TargetLacks {
        /// The target's version.
        version: String,
        /// What it lacks.
        feature: &'static str,
    },
}

/// How a size limit is told of; nothing without one.
struct Limit(u64);

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, ", {bytes} bytes"),
        }
    }
}
