//! What a failure means to the caller.

use super::{Refusal, Verdict};

/// What a failure means to a caller that has to decide what to do next. Stays as it is when errors get more variants.
///
/// | kind | what a control plane does |
/// | --- | --- |
/// | BadRequest | mend the call: the same one never succeeds |
/// | Conflict | another name, another COW file, or the other snapshot taken down first |
/// | Busy | wait and ask again: somebody has the device open |
/// | Gone | nothing, in a teardown; make it, in a create |
/// | Exhausted | free memory, space, descriptors or devices; grow the COW file |
/// | Unsupported | another kernel, module, file system or option |
/// | NoPermission | run with CAP_SYS_ADMIN in the initial user namespace |
/// | Lost | restore from elsewhere: the store is invalid, and the kernel gives nothing of it back |
/// | Other | read the message: an I/O error, or an errno that nothing is known about |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is wrong.
    BadRequest,
    /// Something that is there stands in the way: a device of that name, a file that another snapshot has.
    Conflict,
    /// Somebody has the device open, or is at work on it.
    Busy,
    /// What was named is not there.
    Gone,
    /// Out of memory, space, file descriptors or devices.
    Exhausted,
    /// The kernel, this /dev or the file system cannot do it.
    Unsupported,
    /// The caller lacks a capability or a permission.
    NoPermission,
    /// The data cannot be had back: the kernel has marked the store invalid, or it is damaged.
    Lost,
    /// Anything else.
    Other,
}

impl From<Verdict> for ErrorKind {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Busy => Self::Busy,
            Verdict::Gone | Verdict::Missing => Self::Gone,
            Verdict::NameTaken | Verdict::InUse | Verdict::TakeAnother => Self::Conflict,
            Verdict::NotAFile | Verdict::SymbolicLink => Self::BadRequest,
            Verdict::Unsupported => Self::Unsupported,
            Verdict::NoPermission => Self::NoPermission,
            Verdict::Exhausted => Self::Exhausted,
            Verdict::Again | Verdict::Fatal => Self::Other,
        }
    }
}

impl From<&Refusal> for ErrorKind {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::OriginInUse { .. }
            | Refusal::OriginChanged { .. }
            | Refusal::OriginDiffers { .. }
            | Refusal::OriginUnknown { .. }
            | Refusal::CowInUse { .. }
            | Refusal::CowOfSnapshot { .. }
            | Refusal::CowForeign { .. }
            | Refusal::CowNotBlank { .. }
            | Refusal::NotOurs { .. }
            | Refusal::NotAdoptable { .. }
            | Refusal::Irreparable { .. }
            | Refusal::NotExportable { .. }
            | Refusal::OutputExists { .. }
            | Refusal::CowFrozen { .. }
            | Refusal::CowNotFrozen { .. }
            | Refusal::LayerForeign { .. }
            | Refusal::LayerTwice { .. }
            | Refusal::LayersApart { .. }
            | Refusal::LayerMissing { .. }
            | Refusal::NotFreezable { .. }
            | Refusal::NotOnLayer { .. } => Self::Conflict,
            Refusal::AtWork { .. } | Refusal::InUse { .. } => Self::Busy,
            Refusal::CowUnlinked { .. } | Refusal::FileElsewhere { .. } => Self::Gone,
            Refusal::PoolEmpty | Refusal::Overflowed { .. } => Self::Exhausted,
            Refusal::CowInvalid { .. }
            | Refusal::CowDamaged { .. }
            | Refusal::CowHeadless { .. }
            | Refusal::CowUnsound { .. }
            | Refusal::Invalid { .. } => Self::Lost,
            Refusal::TargetLacks { .. }
            | Refusal::DiscardChunk { .. }
            | Refusal::DiscardUnaligned { .. } => Self::Unsupported,
            _ => Self::BadRequest,
        }
    }
}
