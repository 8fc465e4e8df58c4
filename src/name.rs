//! What a dm device is called: its name and its number.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::refusal::{NameFault, Refusal};

/// Where names of dm devices live, beside the control node.
pub(crate) const MAPPER_DIR: &str = "/dev/mapper";

/// What the names of a pool's devices begin with until they are claimed.
pub(crate) const POOLED: &str = "dmsnap-pool-";

/// What the name of a pool's device ends with while it still has the COW file of a released snapshot, which is to be
/// kept.
pub(crate) const KEPT: &str = ".kept";

/// The longest name, in bytes: `DM_NAME_LEN` is 128 with its NUL.
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
    /// [`Refusal::Name`] says what is wrong with it.
    ///
    /// ```
    /// use dmsnap::DeviceName;
    ///
    /// assert_eq!(DeviceName::new("vm-42")?.as_str(), "vm-42");
    /// assert!(DeviceName::new("a/b").is_err());
    /// # Ok::<(), dmsnap::Refusal>(())
    /// ```
    pub fn new(name: impl Into<String>) -> Result<Self, Refusal> {
        let name = name.into();
        match fault(&name) {
            None => Ok(Self(name)),
            Some(fault) => Err(Refusal::Name { name, fault }),
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the name of a pool's device that nobody has claimed.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        self.0.starts_with(POOLED)
    }

    /// A name that a caller gives a device: none that a pool's unclaimed devices are known by.
    pub(crate) fn given(name: &str) -> Result<Self, Refusal> {
        let name = Self::new(name)?;
        if !name.is_pooled() {
            return Ok(name);
        }
        let fault = NameFault::Pool;
        Err(Refusal::Name {
            name: name.0,
            fault,
        })
    }

    /// `/dev/mapper/<name>`.
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
    type Err = Refusal;

    fn from_str(name: &str) -> Result<Self, Refusal> {
        Self::new(name)
    }
}

impl TryFrom<String> for DeviceName {
    type Error = Refusal;

    fn try_from(name: String) -> Result<Self, Refusal> {
        Self::new(name)
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.0
    }
}

/// The number of a block device, written `major:minor` as the kernel writes it in tables and in sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct DeviceNumber {
    /// Major number: which driver.
    pub major: u32,
    /// Minor number: which of its devices.
    pub minor: u32,
}

impl DeviceNumber {
    /// From the `dev_t` of user space (`st_dev`, `st_rdev`).
    #[must_use]
    pub fn from_dev_t(dev: u64) -> Self {
        Self {
            major: libc::major(dev),
            minor: libc::minor(dev),
        }
    }

    /// As the `dev_t` of user space.
    #[must_use]
    pub fn to_dev_t(self) -> u64 {
        libc::makedev(self.major, self.minor)
    }

    /// From the encoding that ioctls use (`huge_encode_dev`): `mmmMMMmm`, 20 bits of minor, 12 of major.
    pub(crate) fn from_kernel(dev: u64) -> Self {
        let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
        let major = (dev >> 8) & 0xfff;
        let low = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
        Self {
            major: low(major),
            minor: low(minor),
        }
    }

    /// In the encoding that ioctls use.
    pub(crate) fn to_kernel(self) -> u64 {
        let (major, minor) = (u64::from(self.major), u64::from(self.minor));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }

    /// `/dev/dm-<minor>`, the node that devtmpfs gives a dm device.
    pub(crate) fn dm_node(self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.minor))
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let refused = || Refusal::DeviceNumber {
            text: text.to_owned(),
        };
        let (major, minor) = text.split_once(':').ok_or_else(refused)?;
        let number = |digits: &str, max: u32| {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain
                .then(|| digits.parse().ok())
                .flatten()
                .filter(|number| *number <= max)
        };
        match (number(major, 0xfff), number(minor, 0xf_ffff)) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(refused()),
        }
    }
}

impl TryFrom<String> for DeviceNumber {
    type Error = Refusal;

    fn try_from(text: String) -> Result<Self, Refusal> {
        text.parse()
    }
}

impl From<DeviceNumber> for String {
    fn from(number: DeviceNumber) -> String {
        number.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault_of(name: &str) -> NameFault {
        match DeviceName::new(name) {
            Err(Refusal::Name { fault, .. }) => fault,
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

    #[test]
    fn device_numbers_survive_every_encoding() {
        for (major, minor) in [(0, 0), (7, 0), (254, 255), (254, 256), (4095, 0xf_ffff)] {
            let number = DeviceNumber { major, minor };
            assert_eq!(DeviceNumber::from_kernel(number.to_kernel()), number);
            assert_eq!(DeviceNumber::from_dev_t(number.to_dev_t()), number);
            assert_eq!(number.to_string().parse(), Ok(number));
        }
        for bad in [
            "",
            ":",
            "7",
            "7:",
            ":7",
            "7:-1",
            "+7:1",
            "7:1:2",
            " 7:1",
            "4096:0",
            "0:1048576",
        ] {
            assert!(bad.parse::<DeviceNumber>().is_err(), "{bad}");
        }
    }
}
