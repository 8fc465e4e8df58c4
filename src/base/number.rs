//! The number of a block device, and the nodes that the kernel makes for dm and loop devices.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The number of a block device, written `major:minor` as the kernel writes it in tables and in sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct DeviceNumber {
    major: u32,
    minor: u32,
}

/// The kernel's bounds: 12 bits of major, 20 of minor.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

impl DeviceNumber {
    /// Makes the number of a driver and one of its devices.
    ///
    /// # Errors
    ///
    /// [`InvalidNumber`] for a major above 4095 or a minor above 1048575.
    pub fn new(major: u32, minor: u32) -> Result<Self, InvalidNumber> {
        if major > MAJOR_MAX || minor > MINOR_MAX {
            let text = format!("{major}:{minor}");
            return Err(InvalidNumber { text });
        }
        Ok(Self { major, minor })
    }

    /// The same, of numbers that the kernel has given, which are within its bounds.
    pub(crate) const fn at(major: u32, minor: u32) -> Self {
        Self {
            major: major & MAJOR_MAX,
            minor: minor & MINOR_MAX,
        }
    }

    /// Returns the major number, which stands for the driver.
    #[must_use]
    pub const fn major(self) -> u32 {
        self.major
    }

    /// Returns the minor number, which stands for one of the driver's devices.
    #[must_use]
    pub const fn minor(self) -> u32 {
        self.minor
    }

    /// Converts from the `dev_t` of user space (`st_dev`, `st_rdev`). Bits beyond the kernel's bounds, which no device has,
    /// are dropped.
    #[must_use]
    pub fn from_dev_t(dev: u64) -> Self {
        Self::at(libc::major(dev), libc::minor(dev))
    }

    /// Converts to the `dev_t` of user space.
    #[must_use]
    pub fn to_dev_t(self) -> u64 {
        libc::makedev(self.major, self.minor)
    }

    /// Converts from the encoding that ioctls use (`huge_encode_dev`): `mmmMMMmm`, 20 bits of minor, 12 of major.
    pub(crate) fn from_kernel(dev: u64) -> Self {
        let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
        let major = (dev >> 8) & 0xfff;
        let low = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
        Self::at(low(major), low(minor))
    }

    /// Converts to the encoding that ioctls use.
    pub(crate) fn to_kernel(self) -> u64 {
        let (major, minor) = (u64::from(self.major), u64::from(self.minor));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }

    /// Returns `/dev/dm-<minor>`, the node that devtmpfs has for a dm device.
    pub(crate) fn dm_node(self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.minor))
    }
}

/// The error for a text that is no `major:minor` pair within the kernel's bounds: a major of at most 4095 and a minor
/// of at most 1048575.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a device number (major:minor)")]
#[non_exhaustive]
pub struct InvalidNumber {
    /// The text as given.
    pub text: String,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = InvalidNumber;

    fn from_str(text: &str) -> Result<Self, InvalidNumber> {
        let refused = || InvalidNumber {
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
        match (number(major, MAJOR_MAX), number(minor, MINOR_MAX)) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(refused()),
        }
    }
}

impl TryFrom<String> for DeviceNumber {
    type Error = InvalidNumber;

    fn try_from(text: String) -> Result<Self, InvalidNumber> {
        text.parse()
    }
}

impl From<DeviceNumber> for String {
    fn from(number: DeviceNumber) -> String {
        number.to_string()
    }
}

/// Returns `/dev/loopN`, the node that devtmpfs has for loop device N (if the `loop` module has no `max_part`).
pub(crate) fn loop_node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Returns the N of `/dev/loopN`; `None` for any other path.
pub(crate) fn loop_number(node: &Path) -> Option<u32> {
    let number = node.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?;
    (loop_node(number) == node).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_every_encoding() {
        for (major, minor) in [(0, 0), (7, 0), (254, 255), (254, 256), (4095, 0xf_ffff)] {
            let number = DeviceNumber::new(major, minor).expect("within bounds");
            assert_eq!((number.major(), number.minor()), (major, minor));
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
        assert!(DeviceNumber::new(4096, 0).is_err() && DeviceNumber::new(0, 1 << 20).is_err());
        let all = DeviceNumber::from_dev_t(u64::MAX);
        assert_eq!(all.to_string().parse(), Ok(all));
    }

    #[test]
    fn a_loop_devices_node_names_its_number() {
        for number in [0, 7, 1 << 20] {
            assert_eq!(loop_number(&loop_node(number)), Some(number));
        }
        for other in [
            "/dev/loop",
            "/dev/loop07",
            "/dev/loop+7",
            "/dev/loop7p1",
            "/dev/loop-control",
            "loop7",
        ] {
            assert_eq!(loop_number(Path::new(other)), None, "{other}");
        }
    }
}
