//! The ways to say which dm device is meant.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{DeviceName, DeviceNumber, DeviceUuid, Handles, Kind};

/// A dm device by its name, uuid, number or path.
///
/// Every call that takes a device takes each of these, and also texts, paths and this crate's types, from which it is
/// converted. A text is
///
/// - a path if it begins with `/`,
/// - a uuid if it begins with `DMSNAP-` (or the name of a device that is called so),
/// - a number if it reads `major:minor`,
/// - a name otherwise.
///
/// ```
/// use dmsnap::DeviceId;
///
/// assert_eq!(DeviceId::from("vm-42"), DeviceId::Name("vm-42".into()));
/// assert_eq!(DeviceId::from("/dev/dm-3"), DeviceId::Path("/dev/dm-3".into()));
/// assert!(matches!(DeviceId::from("254:3"), DeviceId::Number(_)));
/// ```
///
/// The conversion checks nothing. A text that no device can have is refused by the call that gets it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// The device's name, which another device may have later.
    Name(String),
    /// The device's uuid, which no other device ever has. A pool's device keeps it from one snapshot to the next.
    Uuid(String),
    /// The device's number, which another device may have later.
    Number(DeviceNumber),
    /// A path to the device's node, or `/dev/mapper/<name>`.
    Path(PathBuf),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(text) | Self::Uuid(text) => f.write_str(text),
            Self::Number(number) => number.fmt(f),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

impl From<&str> for DeviceId {
    fn from(text: &str) -> Self {
        if text.starts_with('/') {
            Self::Path(text.into())
        } else if text.starts_with(DeviceUuid::PREFIX) {
            Self::Uuid(text.to_owned())
        } else if let Ok(number) = text.parse() {
            Self::Number(number)
        } else {
            Self::Name(text.to_owned())
        }
    }
}

impl From<&Path> for DeviceId {
    fn from(path: &Path) -> Self {
        match path.to_str() {
            Some(text) => Self::from(text),
            None => Self::Path(path.to_owned()),
        }
    }
}

/// Takes the uuid if it means one snapshot for good (a pool's does not), and otherwise the first of name, uuid, number
/// and path that the handles have.
impl From<&Handles> for DeviceId {
    fn from(handles: &Handles) -> Self {
        let lasting = |uuid: &&DeviceUuid| uuid.kind() != Kind::Pooled;
        match (&handles.uuid, &handles.name, handles.dev) {
            (Some(uuid), _, _) if lasting(&uuid) => uuid.into(),
            (_, Some(name), _) => name.into(),
            (Some(uuid), None, _) => uuid.into(),
            (None, None, Some(number)) => number.into(),
            (None, None, None) => Self::Path(handles.path().unwrap_or_default()),
        }
    }
}

impl From<&DeviceName> for DeviceId {
    fn from(name: &DeviceName) -> Self {
        Self::Name(name.as_str().to_owned())
    }
}

impl From<&DeviceUuid> for DeviceId {
    fn from(uuid: &DeviceUuid) -> Self {
        Self::Uuid(uuid.as_str().to_owned())
    }
}

impl From<DeviceNumber> for DeviceId {
    fn from(number: DeviceNumber) -> Self {
        Self::Number(number)
    }
}

macro_rules! by_reference {
    ($($owned:ty => $borrowed:ty),*) => {$(
        impl From<$owned> for DeviceId {
            fn from(owned: $owned) -> Self {
                let borrowed: &$borrowed = owned.as_ref();
                Self::from(borrowed)
            }
        }
    )*};
}

by_reference!(String => str, &String => str, PathBuf => Path, &PathBuf => Path);

impl From<DeviceName> for DeviceId {
    fn from(name: DeviceName) -> Self {
        Self::from(&name)
    }
}

impl From<DeviceUuid> for DeviceId {
    fn from(uuid: DeviceUuid) -> Self {
        Self::from(&uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_says_what_it_is_by_its_form() {
        let number = DeviceNumber::at(254, 3);
        for (text, id) in [
            ("vm-42", DeviceId::Name("vm-42".into())),
            ("DMSNAP-1", DeviceId::Uuid("DMSNAP-1".into())),
            ("254:3", DeviceId::Number(number)),
            ("254:3a", DeviceId::Name("254:3a".into())),
            ("/dev/mapper/vm", DeviceId::Path("/dev/mapper/vm".into())),
            ("", DeviceId::Name(String::new())),
        ] {
            assert_eq!(DeviceId::from(text), id);
            assert_eq!(DeviceId::from(text.to_owned()), id);
            assert_eq!(DeviceId::from(Path::new(text)), id);
            assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn handles_mean_a_uuid_unless_it_serves_another_snapshot_later() {
        let mut handles = Handles {
            name: DeviceName::new("vm").ok(),
            uuid: DeviceUuid::new("DMSNAP-1").ok(),
            ..Handles::default()
        };
        let id = |handles: &Handles| DeviceId::from(handles);
        assert_eq!(id(&handles), DeviceId::Uuid("DMSNAP-1".into()));
        handles.uuid = DeviceUuid::new("DMSNAP-1-pool").ok();
        assert_eq!(id(&handles), DeviceId::Name("vm".into()));
    }
}
