//! Handles: what a caller keeps of a snapshot, as plain data that outlives the process.

use std::path::PathBuf;

use super::{DeviceName, DeviceNumber, DeviceUuid, OriginIdentity};

/// Everything needed to find a snapshot again and to take it down, from any process, days later.
///
/// Every field may be empty: after a failure half-way, or when the handles come from a database that never had it.
/// The fields that carry identity (`uuid`, and the `backing` and `diskseq` of the loops) are checked against the
/// kernel before anything is removed, so that a handle from before a reboot, or a loop number that serves another
/// file by now, counts as already gone. Handles without identity are taken at their word.
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
    /// The path to give to the hypervisor: `/dev/dm-N`, which the kernel itself makes. The number is another device's once
    /// this one is gone: after a removal or a reboot it means nothing.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::path"))]
    pub device: Option<PathBuf>,
    /// `/dev/mapper/<name>`, an alias.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::path"))]
    pub mapper: Option<PathBuf>,
    /// The loop device over the COW file.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::loop_handle"))]
    pub cow_loop: Option<LoopHandle>,
    /// The loop device over the origin image.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "lenient::loop_handle"))]
    pub origin_loop: Option<LoopHandle>,
    /// What the origin image was when the snapshot was made.
    pub origin: Option<OriginIdentity>,
}

impl Handles {
    /// The path that stands for the dm device in messages, if the handles name one.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let by_name = self.name.as_ref().map(DeviceName::mapper_path);
        by_name
            .or_else(|| self.mapper.clone())
            .or_else(|| self.device.clone())
    }
}

/// A loop device, and by what it is known to be still the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LoopHandle {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// The number that the kernel gave this binding of the device (Linux 5.15 and later).
    #[cfg_attr(feature = "serde", serde(default))]
    pub diskseq: Option<u64>,
    /// The file behind it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub backing: Option<FileId>,
}

impl LoopHandle {
    /// A loop device known by its path alone.
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
    /// Whether it says more than a number that anybody may have by now.
    pub(crate) fn has_identity(&self) -> bool {
        self.backing.is_some() || self.diskseq.is_some()
    }
}

/// Which file: by device and inode, whatever its paths are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FileId {
    /// The device of the file system that holds it.
    pub dev: DeviceNumber,
    /// Its inode number there.
    pub inode: u64,
}

/// Reading what callers' databases hold: empty strings for empty fields, bare paths for loops.
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

    /// A loop as an object, as a bare path, or empty. A visitor, because an untagged enum says nothing of what is
    /// wrong.
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
