//! What identifies an origin image.

use std::fmt;

/// An origin image's size and modification time.
///
/// A COW file holds only the chunks that differ from the image it was made over. Over any other image it is garbage,
/// which neither the kernel nor its store's header can tell; these two values can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct OriginIdentity {
    /// The size in bytes.
    pub size_bytes: u64,
    /// The modification time, in nanoseconds since 1970.
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
    /// True if the modification time is no evidence, being a whole second: images from Nix and OSTree stores and from
    /// reproducible builds have such times, and block devices get one here.
    pub(crate) fn is_undated(self) -> bool {
        self.mtime_ns.rem_euclid(1_000_000_000) == 0
    }
}
