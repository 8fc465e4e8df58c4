//! Handles: plain data about a snapshot, which a caller stores to find it again.

use std::path::PathBuf;

use super::{DeviceName, DeviceNumber, DeviceUuid, OriginIdentity};

/// All that is needed to find a snapshot again and to take it down, from any process and at any later time. Store them
/// in your database, and the COW file's path beside them, which they do not have.
///
/// Any field may be empty, for example if your database never had it (`Handles::default()` has none; set those you
/// know); [`cleanup`](crate::cleanup()) then takes down what is named. The fields that identify something (`uuid`, and the loop devices' `backing` and `diskseq`) are
/// compared with the kernel before anything is removed: a handle from before a reboot, or a loop device that has
/// another file by now, counts as already gone. Handles without those fields are not checked: whatever has the name or
/// number is taken down.
///
/// With the feature `serde` they serialise, field by field as named here; empty fields may be left out, `null` or
/// `""`, and a loop may be written as its bare path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default)
)]
#[non_exhaustive]
pub struct Handles {
    /// The dm device's name.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::text"))]
    pub name: Option<DeviceName>,
    /// The dm device's uuid, which no other device ever has.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::text"))]
    pub uuid: Option<DeviceUuid>,
    /// The dm device's number.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::text"))]
    pub dev: Option<DeviceNumber>,
    /// The path to give to the hypervisor: `/dev/dm-N`, which the kernel itself makes. After a removal or a reboot
    /// another device may have the number: do not use the path then.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::path"))]
    pub device: Option<PathBuf>,
    /// The alias `/dev/mapper/<name>`, a symbolic link to `device`.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::path"))]
    pub mapper: Option<PathBuf>,
    /// The loop device over the COW file.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::loop_handle"))]
    pub cow_loop: Option<LoopHandle>,
    /// The loop device over the origin image.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::loop_handle"))]
    pub origin_loop: Option<LoopHandle>,
    /// The origin image's size and modification time when the snapshot was made.
    pub origin: Option<OriginIdentity>,
}

impl Handles {
    /// Returns the path that messages name the dm device by, if the handles have one.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let by_name = self.name.as_ref().map(DeviceName::mapper_path);
        by_name
            .or_else(|| self.mapper.clone())
            .or_else(|| self.device.clone())
    }
}

/// A loop device, and what identifies the file that is attached to it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LoopHandle {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// The device's `diskseq`, a number that is new each time a file is attached (Linux 5.15 and later).
    #[cfg_attr(feature = "serde", serde(default))]
    pub diskseq: Option<u64>,
    /// The identity of the file that is attached.
    #[cfg_attr(feature = "serde", serde(default))]
    pub backing: Option<FileId>,
}

impl LoopHandle {
    /// Makes a handle that has only the device's path: whatever is attached to it then is taken for the snapshot's.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            diskseq: None,
            backing: None,
        }
    }
}

impl LoopHandle {
    /// True if the handle identifies the attached file, not just a number that another file may have by now.
    pub(crate) fn has_identity(&self) -> bool {
        self.backing.is_some() || self.diskseq.is_some()
    }
}

/// The identity of a file, whatever its paths are: its file system's device and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FileId {
    /// The device of the file system that holds it.
    pub dev: DeviceNumber,
    /// Its inode number there.
    pub inode: u64,
}

/// Reads handles as callers' databases may have them: empty strings for empty fields, bare paths for loop devices.
#[cfg(feature = "serde")]
mod lenient {
    use std::fmt;
    use std::path::PathBuf;

    use serde::de::value::MapAccessDeserializer;
    use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

    use super::LoopHandle;

    pub(super) fn text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: TryFrom<String>,
        T::Error: std::fmt::Display,
    {
        let text = Option::<String>::deserialize(deserializer)?.filter(|text| !text.is_empty());
        text.map(|text| T::try_from(text).map_err(D::Error::custom))
            .transpose()
    }

    pub(super) fn path<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let path = Option::<PathBuf>::deserialize(deserializer)?;
        Ok(path.filter(|path| !path.as_os_str().is_empty()))
    }

    /// Reads a loop device as an object, a bare path, or nothing. It is a visitor, as the errors of an untagged enum do
    /// not say what is wrong.
    struct Loop;

    impl<'de> Visitor<'de> for Loop {
        type Value = Option<LoopHandle>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a loop device: its path, or an object with path, diskseq and backing")
        }

        fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(
            self,
            deserializer: D,
        ) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_any(self)
        }

        fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
            Ok((!path.is_empty()).then(|| LoopHandle::at(path)))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            let handle = LoopHandle::deserialize(MapAccessDeserializer::new(map))?;
            Ok((!handle.path.as_os_str().is_empty()).then_some(handle))
        }
    }

    pub(super) fn loop_handle<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<LoopHandle>, D::Error> {
        deserializer.deserialize_option(Loop)
    }
}
