//! How far a long operation is.

/// How far an export or a merge is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Progress {
    /// What has been dealt with.
    pub done_bytes: u64,
    /// All there is to deal with. An export counts the image, or the changes alone where the rest is shared with the
    /// origin; a merge counts the changed chunks that there were when it began.
    pub total_bytes: u64,
}
