//! What a failure means to the caller.

use super::{LayerRefusal, Refusal, Verdict};

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
            | Refusal::NotFreezable { .. }
            | Refusal::OutputExists { .. }
            | Refusal::Layer(LayerRefusal::Frozen { .. })
            | Refusal::Layer(LayerRefusal::NotFrozen { .. })
            | Refusal::Layer(LayerRefusal::Foreign { .. })
            | Refusal::Layer(LayerRefusal::Twice { .. })
            | Refusal::Layer(LayerRefusal::Apart { .. })
            | Refusal::Layer(LayerRefusal::Missing { .. })
            | Refusal::Layer(LayerRefusal::NotOnLayer { .. }) => Self::Conflict,
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

#[cfg(test)]
mod tests {
    /// The variants below each kind, as the words in backquotes of the guide's rows and as the arms above.
    #[test]
    fn the_guide_has_every_refusal_that_is_no_bad_request_in_its_kinds_row() {
        let guide = include_str!("../guide/errors.md");
        let table = guide.split("| kind | refusals |").nth(1);
        let table = table.and_then(|rest| rest.split("\n\n").next());
        let code = include_str!("kind.rs").split("match refusal {").nth(1);
        let code = code.and_then(|rest| rest.split("_ =>").next());
        let (table, code) = (table.expect("a table"), code.expect("the arms"));
        let mut rows = 0;
        for arm in code.split(',').filter(|arm| arm.contains("=>")) {
            let (names, kind) = arm.split_once("=> Self::").expect("an arm");
            let mut row = format!("| {kind} |");
            for name in names.split('|') {
                let name = name.trim_start().strip_prefix("Refusal::");
                let name = name.map(|name| name.strip_prefix("Layer(").unwrap_or(name));
                let name = name.and_then(|name| name.split([' ', ')']).next());
                let comma = if row.ends_with('|') { "" } else { "," };
                row += &format!("{comma} `{}`", name.unwrap_or_default());
            }
            assert!(table.contains(&format!("\n{row} |")), "{row}");
            rows += 1;
        }
        assert_eq!(rows, table.matches("\n|").count() - 2, "and no row more");
    }
}
