//! Errors, cut by what the caller can do about them.

mod kind;
mod layer_refusal;
mod obstacle;
pub(crate) mod policy;
mod refusal;
mod retry;
mod step;

use std::path::{Path, PathBuf};
use std::{fmt, io};

pub use kind::ErrorKind;
pub use layer_refusal::LayerRefusal;
use nix::errno::Errno;
pub use obstacle::{AdoptObstacle, ExportObstacle, FreezeObstacle, RepairObstacle};
pub(crate) use policy::Verdict;
pub use refusal::Refusal;
pub use retry::Retry;
pub use step::Step;

use crate::base::{InvalidChunkSize, InvalidName, InvalidNumber, InvalidUuid};

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and what is left behind.
///
/// Print it with [`one_line`](Self::one_line): `{}` prints the first part alone, what failed and not why.
///
/// Each level of the chain (`source`) prints its own part once, so that a reporter that joins the chain with
/// `": "` gives `left behind /dev/mapper/vm-42: cannot resume /dev/mapper/vm-42: Device or resource busy (os
/// error 16)`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request itself is wrong. No loop or dm device was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A step failed, and everything before it was undone.
    #[error("cannot {step} {}", .on.display())]
    #[non_exhaustive]
    Failed {
        /// What was being done.
        step: Step,
        /// To which file or device.
        on: PathBuf,
        /// What the kernel answered.
        source: Cause,
    },
    /// A step failed, and so did undoing it: here is what remains.
    #[error("left behind {}", Objects(.left))]
    #[non_exhaustive]
    Debris {
        /// What could not be removed, each with the reason.
        left: Vec<Leftover>,
        /// The first failure.
        source: Box<Error>,
    },
}

impl Error {
    pub(crate) fn failed(step: Step, on: impl Into<PathBuf>, errno: Errno) -> Self {
        Self::Failed {
            step,
            on: on.into(),
            source: Cause { errno, note: None },
        }
    }

    /// Adds what was found out about a failure after it happened.
    pub(crate) fn noted(mut self, text: impl Into<String>) -> Self {
        if let Self::Failed { source, .. } = &mut self {
            source.note = Some(match source.note.take() {
                Some(note) => format!("{note}, {}", text.into()),
                None => text.into(),
            });
        }
        self
    }

    /// The number of the first failure's errno, through the chain; `None` for a refusal.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(_) => None,
            Self::Failed { source, .. } => Some(source.errno()),
            Self::Debris { source, .. } => source.errno(),
        }
    }

    /// What the first failure means to the caller, through the chain.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::Failed { step, source, .. } => policy::verdict(*step, source.errno).into(),
            Self::Debris { source, .. } => source.kind(),
        }
    }

    /// What the first failure means, as [`Verdict`] has it; `None` for a refusal.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Refused(_) => None,
            Self::Failed { step, source, .. } => Some(policy::verdict(*step, source.errno)),
            Self::Debris { source, .. } => source.verdict(),
        }
    }

    /// Returns the whole chain on one line, each part once, and then what else was left behind with its reason.
    #[must_use]
    pub fn one_line(&self) -> String {
        let mut line = chain(self);
        for left in self.left() {
            let reason = chain(&left.error);
            if !line.contains(&reason) {
                line = format!("{line}; {reason}");
            }
        }
        line.replace('\n', " ")
    }

    /// What remains in the kernel or on disk; empty unless this is [`Error::Debris`].
    #[must_use]
    pub fn left(&self) -> &[Leftover] {
        match self {
            Self::Debris { left, .. } => left,
            _ => &[],
        }
    }

    /// This failure, with what undoing it could not remove, beyond what it names already.
    pub(crate) fn leaving(self, mut more: Vec<Leftover>) -> Self {
        if more.is_empty() {
            return self;
        }
        match self {
            Self::Debris { mut left, source } => {
                left.append(&mut more);
                Self::Debris { left, source }
            }
            first => Self::Debris {
                left: more,
                source: Box::new(first),
            },
        }
    }
}

/// Returns an error and its sources on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        line = format!("{line}: {source}");
        next = source.source();
    }
    line
}

/// `kind`, `message` (the chain on one line), `errno` and what is `left`, each object with its own message.
#[cfg(feature = "serde")]
impl serde::Serialize for Error {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;

        #[derive(serde::Serialize)]
        struct Left {
            object: String,
            message: String,
        }
        let left: Vec<_> = self
            .left()
            .iter()
            .map(|left| Left {
                object: left.object.to_string_lossy().into_owned(),
                message: left.error.one_line(),
            })
            .collect();
        let mut error = serializer.serialize_struct("Error", 4)?;
        error.serialize_field("kind", &self.kind())?;
        error.serialize_field("message", &self.one_line())?;
        error.serialize_field("errno", &self.errno())?;
        error.serialize_field("left", &left)?;
        error.end()
    }
}

/// Keeps the whole error as the inner one.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.errno() {
            Some(errno) => Self::from_raw_os_error(errno).kind(),
            None => match error.kind() {
                ErrorKind::Gone => io::ErrorKind::NotFound,
                ErrorKind::Conflict => io::ErrorKind::AlreadyExists,
                ErrorKind::Busy => io::ErrorKind::ResourceBusy,
                ErrorKind::Unsupported => io::ErrorKind::Unsupported,
                ErrorKind::NoPermission => io::ErrorKind::PermissionDenied,
                ErrorKind::BadRequest => io::ErrorKind::InvalidInput,
                ErrorKind::Lost => io::ErrorKind::InvalidData,
                ErrorKind::Exhausted | ErrorKind::Other => io::ErrorKind::Other,
            },
        };
        Self::new(kind, error)
    }
}

macro_rules! refused {
    ($($noun:ty),*) => {$(
        impl From<$noun> for Error {
            fn from(invalid: $noun) -> Self {
                Self::Refused(Refusal::from(invalid))
            }
        }
    )*};
}

refused!(
    InvalidChunkSize,
    InvalidName,
    InvalidNumber,
    InvalidUuid,
    LayerRefusal
);

/// What the kernel answered, printed as [`std::io::Error`] prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    errno: Errno,
    note: Option<String>,
}

impl Cause {
    /// The errno's number.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.errno as i32
    }

    /// What was found out beyond the errno, such as who holds a busy device.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.errno()).fmt(f)?;
        match &self.note {
            Some(note) => write!(f, ": {note}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Cause {}

/// One thing that could not be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leftover {
    /// The device or file that remains.
    pub object: PathBuf,
    /// Why it could not be removed.
    pub error: Error,
}

impl Leftover {
    pub(crate) fn new(object: impl AsRef<Path>, error: Error) -> Self {
        Self {
            object: object.as_ref().to_owned(),
            error,
        }
    }
}

/// The errno of a failed call of the standard library.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

struct Objects<'a>(&'a [Leftover]);

impl fmt::Display for Objects<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, leftover) in self.0.iter().enumerate() {
            let joint = if nth == 0 { "" } else { ", " };
            write!(f, "{joint}{}", leftover.object.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_debris_step_object_and_cause_once() {
        let cause = || Error::failed(Step::Resume, "/dev/mapper/vm-42", Errno::EBUSY);
        let undo = Error::failed(Step::DetachLoop, "/dev/loop7", Errno::EIO);
        let error = cause().leaving(vec![Leftover::new("/dev/loop7", undo)]);
        assert_eq!(
            chain(&error),
            "left behind /dev/loop7: cannot resume /dev/mapper/vm-42: Device or resource busy (os error 16)"
        );
        assert_eq!(error.errno(), Some(16));
        assert_eq!(
            chain(&error.left()[0].error),
            "cannot detach /dev/loop7: Input/output error (os error 5)"
        );
        assert!(cause().leaving(Vec::new()).left().is_empty());
    }

    #[test]
    fn a_note_follows_the_errno() {
        let error =
            Error::failed(Step::Remove, "/dev/mapper/vm", Errno::EBUSY).noted("open count 2");
        assert_eq!(
            chain(&error),
            "cannot remove /dev/mapper/vm: Device or resource busy (os error 16): open count 2"
        );
    }

    #[test]
    fn a_refusal_prints_itself_alone() {
        let error = Error::from(InvalidChunkSize { sectors: 3 });
        assert_eq!(
            chain(&error),
            "cannot use chunks of 3 sectors: need a power of two from 1 to 2097152"
        );
        assert_eq!((error.errno(), error.verdict()), (None, None));
    }
}
