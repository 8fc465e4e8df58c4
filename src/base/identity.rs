//! Identifies an origin image.

use std::fmt;

/// An origin image's size and modification time.
///
/// A COW file holds only the chunks that differ from the image it was made over: over any other image it is
/// garbage, and neither the kernel nor the store's header can tell. These two values can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct OriginIdentity {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Modification time, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

impl fmt::Display for OriginIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (
            self.mtime_ns.div_euclid(1_000_000_000),
            self.mtime_ns.rem_euclid(1_000_000_000),
        );
        write!(
            f,
            "{} bytes modified at {seconds}.{nanos:09}",
            self.size_bytes
        )
    }
}

impl OriginIdentity {
    /// Whether the modification time says nothing: it is a whole second, as images of Nix and OSTree stores and of
    /// reproducible builds have it, and block devices here.
    pub(crate) fn is_undated(self) -> bool {
        self.mtime_ns.rem_euclid(1_000_000_000) == 0
    }
}
