//! The progress of long operations.

/// The progress of an export or a merge, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Progress {
    /// How much is done.
    pub done_bytes: u64,
    /// How much there is to do. An export counts the whole image, or the changes alone if the rest is shared with the
    /// origin (reflink); a merge counts the chunks that were changed when it began.
    pub total_bytes: u64,
}
