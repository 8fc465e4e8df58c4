//! The names of dm devices.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The directory of the aliases of dm devices and of device-mapper's control node.
pub(crate) const MAPPER_DIR: &str = "/dev/mapper";

/// The beginning of the names of a pool's devices until they are claimed.
pub(crate) const POOLED: &str = "dmsnap-pool-";

/// The beginning of the name of a merge's device, unless its caller gave it another.
pub(crate) const MERGING: &str = "dmsnap-merge-";

/// The end of the name of a pool's device while it still has the COW file of a released snapshot, which is to be kept.
pub(crate) const KEPT: &str = ".kept";

/// The length in bytes of the longest name: `DM_NAME_LEN` is 128 with its NUL.
const NAME_MAX: usize = 127;

/// The name of a dm device: 1 to 127 bytes out of `0-9 A-Z a-z # + - . : = @ _`.
///
/// The kernel takes nearly any byte, but udev and libdm rewrite everything outside this set, so that the name and
/// the path below `/dev/mapper` would differ. `.`, `..` and `control` are refused because kernels before 6.6
/// accept them and then no path can lead to the device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct DeviceName(String);

impl DeviceName {
    /// Checks a name.
    ///
    /// # Errors
    ///
    /// [`InvalidName::fault`] says what is wrong with it.
    ///
    /// ```
    /// use dmsnap::base::DeviceName;
    ///
    /// assert_eq!(DeviceName::new("vm-42")?.as_str(), "vm-42");
    /// assert!(DeviceName::new("a/b").is_err());
    /// # Ok::<(), dmsnap::base::InvalidName>(())
    /// ```
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidName> {
        let name = name.into();
        match fault(&name) {
            None => Ok(Self(name)),
            Some(fault) => Err(InvalidName { name, fault }),
        }
    }

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True if it is the name of a pool's device that nobody has claimed.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        self.0.starts_with(POOLED)
    }

    /// Checks a name that a caller gives to a device: those of a pool's unclaimed devices are refused.
    pub(crate) fn given(name: &str) -> Result<Self, InvalidName> {
        let name = Self::new(name)?;
        if !name.is_pooled() {
            return Ok(name);
        }
        let fault = NameFault::Pool;
        Err(InvalidName {
            name: name.0,
            fault,
        })
    }

    /// Returns the alias, `/dev/mapper/<name>`.
    #[must_use]
    pub fn mapper_path(&self) -> PathBuf {
        Path::new(MAPPER_DIR).join(&self.0)
    }
}

fn fault(name: &str) -> Option<NameFault> {
    let stray = |c: &char| !(c.is_ascii_alphanumeric() || "#+-.:=@_".contains(*c));
    if name.is_empty() {
        Some(NameFault::Empty)
    } else if name.len() > NAME_MAX {
        Some(NameFault::TooLong { bytes: name.len() })
    } else if matches!(name, "." | ".." | "control") {
        Some(NameFault::Reserved)
    } else {
        name.chars().find(stray).map(NameFault::Character)
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for DeviceName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        Self::new(name)
    }
}

impl TryFrom<String> for DeviceName {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, InvalidName> {
        Self::new(name)
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.0
    }
}

/// The error for a text that is not the name of a dm device, or not one that a caller may give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot name a device {name:?}: {fault}")]
#[non_exhaustive]
pub struct InvalidName {
    /// The name as given.
    pub name: String,
    /// What is wrong with it.
    pub fault: NameFault,
}

/// What is wrong with a device name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameFault {
    /// The name is empty.
    #[error("it is empty")]
    Empty,
    /// The name is longer than the kernel takes.
    #[error("it has {bytes} bytes, the kernel keeps 127")]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
    },
    /// The name is `.`, `..` or `control`.
    #[error("it is reserved below /dev/mapper")]
    Reserved,
    /// The name begins like those of a pool's unclaimed devices.
    #[error("names that begin with dmsnap-pool- are a pool's")]
    Pool,
    /// The name has a character outside `0-9 A-Z a-z # + - . : = @ _`.
    #[error("it has the character {0:?} (allowed: 0-9 A-Z a-z # + - . : = @ _)")]
    Character(char),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault_of(name: &str) -> NameFault {
        match DeviceName::new(name) {
            Err(InvalidName { fault, .. }) => fault,
            other => panic!("{name:?} gave {other:?}"),
        }
    }

    #[test]
    fn names_that_no_path_or_udev_rule_would_keep_are_refused() {
        assert_eq!(fault_of(""), NameFault::Empty);
        assert_eq!(
            fault_of(&"n".repeat(128)),
            NameFault::TooLong { bytes: 128 }
        );
        for reserved in [".", "..", "control"] {
            assert_eq!(fault_of(reserved), NameFault::Reserved);
        }
        for (name, stray) in [
            ("a/b", '/'),
            ("a b", ' '),
            ("a\nb", '\n'),
            ("a\0", '\0'),
            ("sn\u{e4}p", '\u{e4}'),
            ("a\\x20", '\\'),
        ] {
            assert_eq!(fault_of(name), NameFault::Character(stray));
        }
        assert!(DeviceName::new("n".repeat(127)).is_ok());
        assert!(DeviceName::new("vm:1=a+b#c@d_e.f-0").is_ok());
    }
}
