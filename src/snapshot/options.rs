//! Options for making a snapshot.

use std::time::Duration;

use crate::backing::{CowOptions, CowSize};
use crate::base::{ChunkSize, Digest, Durability, OriginIdentity, SectorSize, Store};
use crate::error::Refusal;

/// Options for making a snapshot, in the manner of [`std::fs::OpenOptions`].
///
/// ```no_run
/// use dmsnap::{ChunkSize, CowSize, Durability, SnapshotOptions};
///
/// let snapshot = SnapshotOptions::new()
///     .durability(Durability::ThrowAway)
///     .make_cow(CowSize::WorstCase)
///     .chunk_size(ChunkSize::new(32)?)
///     .create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?;
/// println!("{}", snapshot.device().display());
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct SnapshotOptions {
    pub(crate) cow: CowOptions,
    pub(crate) direct_io: bool,
    pub(crate) discard: bool,
    pub(crate) trust_discards: bool,
    pub(crate) sector_size: SectorSize,
    /// The durability that the caller named.
    durability: Option<Durability>,
    /// The caller named a store.
    store_given: bool,
}

impl SnapshotOptions {
    /// Makes the default options: a persistent store (`P`) with chunks of 8 sectors (4 KiB), through the page cache,
    /// without discard, on a COW file that exists.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the kind of exception store. Without it, [`durability`](Self::durability) does: a disk that is to be thrown
    /// away is named there, as a store alone does not end the guest's flushes.
    pub fn store(&mut self, store: Store) -> &mut Self {
        self.cow.store = store;
        self.store_given = true;
        self
    }

    /// Sets what the disk's writes are to outlive: nothing, processes, or power cuts (the default).
    ///
    /// [`ThrowAway`](Durability::ThrowAway) takes a transient store and [`Processes`](Durability::Processes) a persistent
    /// one, unless [`store`](Self::store) names one; one that contradicts, in whichever order they are set, is
    /// refused. With [`PowerCuts`](Durability::PowerCuts) any store is taken, and the guest's flushes reach it.
    ///
    /// A checkpoint, a rollback, a [`recover`](crate::snapshot::recover()) and a [`repair`](crate::repair()) keep what
    /// the disk has. A table that another program loads brings the guest's flushes back, which costs time and no data.
    /// Where sysfs cannot be written, [`Warning::FlushesKept`](crate::Warning::FlushesKept) says that they were not
    /// ended.
    pub fn durability(&mut self, durability: Durability) -> &mut Self {
        self.durability = Some(durability);
        if !self.store_given {
            self.cow.store = match durability {
                Durability::ThrowAway => Store::Transient,
                Durability::Processes | Durability::PowerCuts => Store::Persistent,
            };
        }
        self
    }

    /// Returns the durability that was named, or the default.
    pub(crate) fn named_durability(&self) -> Durability {
        self.durability.unwrap_or_default()
    }

    /// Sets the durability, unless the caller named one, or a store that is to be kept.
    pub(crate) fn default_durability(&mut self, durability: Durability) {
        if self.durability.is_none() && !(self.store_given && self.cow.store.is_persistent()) {
            self.durability(durability);
        }
    }

    /// Refuses a store that does not have the durability that was named.
    pub(crate) fn check_durability(&self) -> Result<(), Refusal> {
        let (durability, store) = (self.named_durability(), self.cow.store);
        let contradicts = match durability {
            Durability::ThrowAway => store.is_persistent(),
            Durability::Processes => !store.is_persistent(),
            Durability::PowerCuts => false,
        };
        match contradicts {
            true => Err(Refusal::StoreOfDurability { durability, store }),
            false => Ok(()),
        }
    }

    /// Sets the chunk size, the unit of copying.
    pub fn chunk_size(&mut self, chunk: ChunkSize) -> &mut Self {
        self.cow.chunk = chunk;
        self
    }

    /// Has the COW file's loop device bypass the page cache where its file system can
    /// (otherwise [`Warning::DirectIoUnavailable`](crate::Warning::DirectIoUnavailable)). The origin is always
    /// read through the page cache, which all snapshots over it share.
    pub fn direct_io(&mut self, direct_io: bool) -> &mut Self {
        self.direct_io = direct_io;
        self
    }

    /// Sets the sector size that the guest sees: 512 bytes, unless the image was made for another. Direct I/O keeps it:
    /// where the COW file's file system cannot do direct I/O in such sectors, as on a disk with sectors of 4096 bytes,
    /// the I/O is buffered, and [`Warning::DirectIoUnavailable`](crate::Warning::DirectIoUnavailable) says so.
    ///
    /// Refused where the chunk is smaller ([`Refusal::ChunkUnderSector`]), or the image no whole number of such sectors
    /// ([`Refusal::OriginPartSector`]).
    pub fn sector_size(&mut self, sector_size: SectorSize) -> &mut Self {
        self.sector_size = sector_size;
        self
    }

    /// Lets a guest's discard of whole written chunks zero them and give their space back to the COW file's file
    /// system (`discard_zeroes_cow`). A discarded chunk that was never written goes on reading the origin. Without the
    /// option the disk says that it takes no discards, and one that a guest sends all the same, as `fstrim` does, fails
    /// with EOPNOTSUPP; no harm is done, and a hypervisor may have to be told not to offer it.
    ///
    /// Where the COW file's file system cannot punch holes, the disk is made without it, and
    /// [`Warning::DiscardUnavailable`](crate::Warning::DiscardUnavailable) says so.
    ///
    /// Discards are never passed down to the origin: [`Discard::Passdown`](crate::dm::Discard::Passdown) says why.
    ///
    /// Refused ([`Refusal::DiscardUnaligned`]) unless chunks and logical sectors are of one size: on every kernel seen
    /// (5.10 to 7.3), a discard that crosses into another chunk destroys the data of a third one. With both of one size
    /// no discard can. [`trust_discards`](Self::trust_discards) takes other sizes.
    ///
    /// Refused ([`Refusal::DiscardChunk`]) with chunks under 512 sectors on kernels newer than 6.12: loading such a
    /// table crashes Linux 7.3.4.
    pub fn discard(&mut self, discard: bool) -> &mut Self {
        self.discard = discard;
        self
    }

    /// Takes the caller's word that no discard of the guest crosses into another chunk, so that
    /// [`discard`](Self::discard) is not refused where one could.
    ///
    /// **One that does destroys data**, without an error. Chunks of 8 sectors and a file system with blocks of 4096 bytes,
    /// on the whole disk or on partitions that begin at a multiple of 4096 bytes, keep the word: its discards begin and
    /// end with blocks, and the kernel hands them over in pieces of a chunk. A file system with smaller blocks, as
    /// `mke2fs` makes on small disks, does not; nor does any with larger chunks.
    pub fn trust_discards(&mut self, trust: bool) -> &mut Self {
        self.trust_discards = trust;
        self
    }

    /// Sets for how long whoever has a lock on the image or the COW file is waited for: a second unless set. Zero is one
    /// attempt. A longer one suits a disk that is taken up again while its last device still goes.
    ///
    /// Not of this deadline is what only the kernel's own work can take: another process that is given each loop device
    /// that was free a moment ago (5 seconds at most), a table load that lacks memory for a moment (half a second), and
    /// the undoing of what failed (2 seconds).
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.cow.deadline = Some(deadline);
        self
    }

    /// Refuses the origin image unless it is this one: pass [`Handles::origin`](crate::Handles::origin) of the first
    /// snapshot when its COW file is used again.
    ///
    /// A COW file that this library made carries the same in its header, and is held against the image without being
    /// asked; this is for COW files made elsewhere.
    pub fn expect_origin(&mut self, origin: OriginIdentity) -> &mut Self {
        self.cow.expected_origin = Some(origin);
        self
    }

    /// Says what the image holds, by a digest that the caller has of it, such as an image store's SHA-256.
    ///
    /// It is kept in the COW file's header. When that is used again and a digest is given, the two decide, whatever the
    /// modification time says: a faithful copy is taken, and another image of equal size and time is refused
    /// ([`Refusal::OriginDiffers`](crate::error::Refusal::OriginDiffers)). dmsnap takes the caller's word for it, and
    /// does not read the image. Over a layer it counts for nothing, as a layer has an id of its own.
    ///
    /// Without it, an image with another modification time, or with one that is no evidence (a whole second), is known
    /// by the digest of fs-verity where both the image and the one that the COW file was made over have one, and
    /// otherwise by a fingerprint of some blocks, where the COW file has that: if it was made over such an image, or
    /// over an [`Origin`](crate::Origin).
    pub fn digest(&mut self, digest: impl Into<Digest>) -> &mut Self {
        self.cow.digest = Some(digest.into());
        self
    }

    /// Takes the image as it is, whatever the COW file was made over. Right when the image is the same and only its
    /// modification time is not, as after a copy to another host, and for a COW file that another program has written
    /// to, which does not say what it was made over; over a changed image, or over all of an image of which the store
    /// was made over a part, the snapshot is garbage.
    pub fn any_origin(&mut self, any_origin: bool) -> &mut Self {
        self.cow.any_origin = any_origin;
        self
    }

    /// Makes the COW file too, with that size: mode 0600 and sparse. If the file exists, that is a
    /// [`Conflict`](crate::ErrorKind::Conflict) unless [`replace_cow`](Self::replace_cow) says otherwise. A size above
    /// the process's limit (RLIMIT_FSIZE) is an error (EFBIG), and raises no SIGXFSZ. If `create` fails afterwards, the
    /// file is removed again.
    pub fn make_cow(&mut self, size: CowSize) -> &mut Self {
        self.cow.make = Some(size);
        self
    }

    /// Says how much of the disk is expected to change, where the COW file is made: the kernel sizes its table of
    /// changed chunks by it, at 8 bytes a chunk, when the snapshot is made, and never again. Unless set, 64 MiB, which
    /// takes 128 KiB with chunks of 8 sectors; a worst-case COW file over 1 GiB took 2 MiB of kernel memory, whatever
    /// was written.
    ///
    /// More may change, up to the COW file's size: the guide has the time that six times as much took
    /// ([choosing](crate::guide::choosing#chunk-size)). A file whose space is set aside ([`reserve`](Self::reserve)),
    /// and one that is there, have the table of their whole size.
    pub fn expected_changes(&mut self, expected: CowSize) -> &mut Self {
        self.cow.expected = Some(expected);
        self
    }

    /// Sets whether [`make_cow`](Self::make_cow) empties and uses a file that exists, whatever it holds. A file that a
    /// snapshot uses, the image itself, a symbolic link and a block device are refused.
    pub fn replace_cow(&mut self, replace_cow: bool) -> &mut Self {
        self.cow.replace = replace_cow;
        self
    }

    /// Sets whether the made COW file's space is allocated at once (`fallocate`). If the file system has not enough,
    /// `create` fails now, instead of the snapshot later.
    pub fn reserve(&mut self, reserve: bool) -> &mut Self {
        self.cow.reserve = reserve;
        self
    }
}
