//! The uuids of dmsnap's dm devices, and what is written into them.

use std::fmt;
use std::str::FromStr;

use super::{LayerId, OriginIdentity};

/// The length in bytes of the longest uuid: `DM_UUID_LEN` is 129 with its NUL.
const UUID_MAX: usize = 128;

/// Behind a layer's word: it is kept.
const KEPT: &str = "-kept";

/// The uuid of one of dmsnap's dm devices: `DMSNAP-` and a unique text, at most 128 bytes.
///
/// A device gets its uuid once and keeps it through every rename, and no two devices have the same: an ioctl that names
/// a uuid reaches the right device or none. dmsnap's own devices are known by the prefix.
///
/// The uuid also keeps, in the kernel, what later processes need to know of a snapshot. Behind 128 random bits follow
/// the origin's size and modification time, and the number of the COW file's loop device, which the process that makes
/// the snapshot holds a lock on; all are hexadecimal. A word for the kind of device, such as `-pool`, may follow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct DeviceUuid(String);

/// The error for a text that is not the uuid of a dmsnap device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{uuid:?} is not a uuid of a dmsnap device (DMSNAP-..., at most 128 bytes)")]
#[non_exhaustive]
pub struct InvalidUuid {
    /// The uuid as given.
    pub uuid: String,
}

/// The kind of a device: whether its origin's loop device is shared, and whether its uuid means one snapshot for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Both loop devices were attached for this snapshot alone.
    Own,
    /// Another program made the device, over loop devices of its own: its link below /dev/mapper may be udev's.
    Adopted,
    /// The origin's loop device is shared: it is detached when its last user is gone, and no removal waits for that.
    Shared,
    /// The origin's loop device is shared, and the dm device is a pool's: it serves one snapshot after another.
    Pooled,
    /// The device is a layer, made by a checkpoint. The uuid's 128 bits are the layer's id.
    Layer,
}

impl Kind {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Own => "",
            Self::Adopted => "-adopted",
            Self::Shared => "-shared",
            Self::Pooled => "-pool",
            Self::Layer => "-layer",
        }
    }
}

impl DeviceUuid {
    /// The beginning of the uuids of dmsnap's devices.
    pub const PREFIX: &str = "DMSNAP-";

    /// Checks a uuid read from elsewhere.
    ///
    /// # Errors
    ///
    /// [`InvalidUuid`] unless it begins with [`DeviceUuid::PREFIX`], fits 128 bytes and is printable ASCII.
    pub fn new(uuid: impl Into<String>) -> Result<Self, InvalidUuid> {
        let uuid = uuid.into();
        let ours = uuid.starts_with(Self::PREFIX);
        if ours && uuid.len() <= UUID_MAX && uuid.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(uuid))
        } else {
            Err(InvalidUuid { uuid })
        }
    }

    /// Makes a new uuid for a snapshot over `origin`, whose COW file is attached to loop device `cow_loop`. An `origin`
    /// of 0 bytes means that the image is not known.
    pub(crate) fn fresh(random: u128, origin: OriginIdentity, cow_loop: u32, kind: Kind) -> Self {
        let OriginIdentity {
            size_bytes,
            mtime_ns,
        } = origin;
        Self(format!(
            "{}{random:032x}-{size_bytes:x}-{mtime_ns:x}-{cow_loop:x}{}",
            Self::PREFIX,
            kind.suffix()
        ))
    }

    /// Returns the origin image's size and time when the snapshot was made; `None` if the uuid does not have them.
    #[must_use]
    pub fn origin(&self) -> Option<OriginIdentity> {
        let [size_bytes, mtime_ns, _] = self.fields()?;
        let mtime_ns = i64::from_ne_bytes(mtime_ns.to_ne_bytes());
        (size_bytes > 0).then_some(OriginIdentity {
            size_bytes,
            mtime_ns,
        })
    }

    /// Returns the number of the loop device that was locked while the snapshot was made.
    pub(crate) fn cow_loop(&self) -> Option<u32> {
        let [_, _, number] = self.fields()?;
        number.try_into().ok()
    }

    /// Makes the uuid of a layer with the id `id`, as [`Self::fresh`] does; it says whether the layer is to be kept.
    pub(crate) fn of_layer(id: u128, origin: OriginIdentity, cow_loop: u32, keep: bool) -> Self {
        let Self(uuid) = Self::fresh(id, origin, cow_loop, Kind::Layer);
        Self(if keep { uuid + KEPT } else { uuid })
    }

    /// Returns true for a layer that stays when its last user is gone.
    pub(crate) fn is_kept(&self) -> bool {
        self.kind() == Kind::Layer && self.0.ends_with(KEPT)
    }

    /// Returns the kind of the device.
    pub(crate) fn kind(&self) -> Kind {
        let word = self.0.strip_suffix(KEPT).unwrap_or(&self.0);
        let is = |kind: &Kind| word.ends_with(kind.suffix());
        [Kind::Adopted, Kind::Shared, Kind::Pooled, Kind::Layer]
            .into_iter()
            .find(is)
            .unwrap_or(Kind::Own)
    }

    /// Returns the layer's id, if the device is a layer: the one that its COW file's mark has
    /// ([`StackPlace::id`](crate::store::StackPlace::id)).
    #[must_use]
    pub fn layer_id(&self) -> Option<LayerId> {
        self.layer().and_then(LayerId::new)
    }

    /// Returns the layer's id as a number, if the device is a layer.
    pub(crate) fn layer(&self) -> Option<u128> {
        let digits = self.0.strip_prefix(Self::PREFIX)?.split('-').next()?;
        let id = u128::from_str_radix(digits, 16).ok()?;
        (self.kind() == Kind::Layer).then_some(id)
    }

    fn fields(&self) -> Option<[u64; 3]> {
        let mut fields = self.0.strip_prefix(Self::PREFIX)?.split('-').skip(1);
        let mut next = || {
            let field = fields.next()?;
            let digits = field.bytes().all(|byte| byte.is_ascii_hexdigit());
            u64::from_str_radix(field, 16).ok().filter(|_| digits)
        };
        Some([next()?, next()?, next()?])
    }

    /// Returns the uuid as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for DeviceUuid {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceUuid {
    type Err = InvalidUuid;

    fn from_str(uuid: &str) -> Result<Self, InvalidUuid> {
        Self::new(uuid)
    }
}

impl TryFrom<String> for DeviceUuid {
    type Error = InvalidUuid;

    fn try_from(uuid: String) -> Result<Self, InvalidUuid> {
        Self::new(uuid)
    }
}

impl From<DeviceUuid> for String {
    fn from(uuid: DeviceUuid) -> String {
        uuid.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_carry_what_they_were_made_with() {
        let origin = OriginIdentity {
            size_bytes: 1 << 30,
            mtime_ns: -1,
        };
        let ours = DeviceUuid::fresh(7, origin, 300, Kind::Own);
        assert_eq!(
            ours.as_str(),
            "DMSNAP-00000000000000000000000000000007-40000000-ffffffffffffffff-12c"
        );
        for kind in [Kind::Own, Kind::Shared, Kind::Pooled, Kind::Layer] {
            let ours = DeviceUuid::fresh(7, origin, 300, kind);
            assert_eq!((ours.origin(), ours.cow_loop()), (Some(origin), Some(300)));
            assert_eq!(ours.kind(), kind);
            assert_eq!(ours.layer(), (kind == Kind::Layer).then_some(7));
            let id = ours.layer_id().map(|id| id.to_string());
            assert_eq!(id, (kind == Kind::Layer).then(|| format!("{:032x}", 7)));
        }
        for keep in [false, true] {
            let layer = DeviceUuid::of_layer(7, origin, 300, keep);
            assert_eq!((layer.kind(), layer.layer()), (Kind::Layer, Some(7)));
            assert_eq!(
                (layer.origin(), layer.cow_loop()),
                (Some(origin), Some(300))
            );
            assert_eq!(layer.is_kept(), keep, "{layer}");
        }
        assert_eq!(DeviceUuid::new(ours.as_str()), Ok(ours));
        let signed = DeviceUuid::new("DMSNAP-0-+5-0-0").expect("a uuid");
        assert_eq!(signed.origin(), None, "not as it is printed");
        let largest = OriginIdentity {
            size_bytes: u64::MAX,
            mtime_ns: -1,
        };
        assert!(
            DeviceUuid::of_layer(u128::MAX, largest, u32::MAX, true)
                .as_str()
                .len()
                <= UUID_MAX
        );
    }

    #[test]
    fn uuids_are_ours_or_refused() {
        let long = format!("DMSNAP-{}", "x".repeat(122));
        for bad in ["", "LVM-abc", "dmsnap-1", "DMSNAP-a b", &long] {
            assert!(DeviceUuid::new(bad).is_err(), "{bad}");
        }
        let plain = DeviceUuid::new("DMSNAP-made-elsewhere").expect("it has the prefix");
        assert_eq!((plain.origin(), plain.cow_loop()), (None, None));
    }
}
