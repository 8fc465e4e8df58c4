//! What a COW file is to be.

use std::time::Duration;

use crate::base::{ChunkSize, OriginIdentity, Store};
use crate::error::Retry;

/// How large a COW file is to be made. Rounded up to whole chunks, and by one more where the kernel would invalidate
/// the full store instead of only filling it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CowSize {
    /// This many bytes.
    Bytes(u64),
    /// This share of the origin's size, in percent; more than 100 is allowed.
    Percent(u32),
    /// As much as overwriting the whole origin takes: slightly more than its size.
    WorstCase,
}

/// What a COW file is to be, whether it is there already or made.
#[derive(Clone, Debug, Default)]
pub(crate) struct CowOptions {
    pub(crate) store: Store,
    pub(crate) chunk: ChunkSize,
    /// The origin that the store has to be over.
    pub(crate) expected_origin: Option<OriginIdentity>,
    /// Takes any origin.
    pub(crate) any_origin: bool,
    /// Makes the COW file, of this size.
    pub(crate) make: Option<CowSize>,
    /// Makes it over a file that is there.
    pub(crate) replace: bool,
    /// Sets its space aside.
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
