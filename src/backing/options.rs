//! Options for the COW file.

use std::time::Duration;

use crate::base::{ChunkSize, Digest, OriginIdentity, Store};
use crate::error::Retry;

/// The size of a COW file that is made. It is rounded up to whole chunks, and by one more chunk where the kernel would
/// invalidate a full `PO` store instead of only failing its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CowSize {
    /// Makes it this many bytes long.
    Bytes(u64),
    /// Makes it this share of the origin's size, in percent; more than 100 is allowed.
    Percent(u32),
    /// Makes it so long that overwriting the whole disk does not fill it: slightly more than the origin's size. The file
    /// is sparse, so it costs only what is written.
    WorstCase,
}

/// What the COW file must be like, and whether it is made.
#[derive(Clone, Debug, Default)]
pub(crate) struct CowOptions {
    pub(crate) store: Store,
    pub(crate) chunk: ChunkSize,
    /// The origin over which the store must have been made.
    pub(crate) expected_origin: Option<OriginIdentity>,
    /// The caller's digest of the image.
    pub(crate) digest: Option<Digest>,
    /// Takes any origin.
    pub(crate) any_origin: bool,
    /// Takes a store that does not say what it was made over: the kernel has said that it is this one's.
    pub(crate) known_origin: bool,
    /// Makes the COW file with this size; `None`: it exists.
    pub(crate) make: Option<CowSize>,
    /// Empties and uses a file that exists, instead of refusing it.
    pub(crate) replace: bool,
    /// Allocates all of the made file's space at once.
    pub(crate) reserve: bool,
    /// How much of the disk is expected to change, where that is not [`EXPECTED`]: so large is a made COW file while the
    /// kernel sizes its table by it.
    pub(crate) expected: Option<CowSize>,
    /// For how long whoever has a lock on a file is waited for.
    pub(crate) deadline: Option<Duration>,
}

/// Of a worst-case COW file over 1 GiB, in chunks of 8 sectors, the kernel's table takes 2 MiB, whatever is written; of
/// this it takes 128 KiB.
const EXPECTED: CowSize = CowSize::Bytes(64 << 20);

impl CowOptions {
    pub(crate) fn expected(&self) -> CowSize {
        self.expected.unwrap_or(EXPECTED)
    }

    /// The lock of a killed maker's, or of a deferred removal's, loop device is dropped a moment after the device is
    /// gone: the kernel puts the file off (`delayed_fput`), and a probing udev may be the last to close the node. So a
    /// second, unless the caller has a deadline.
    pub(crate) fn lock_retry(&self) -> Retry {
        const MOMENT: Duration = Duration::from_secs(1);
        Retry::until(self.deadline.unwrap_or(MOMENT))
    }
}
