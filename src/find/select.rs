//! Turns a [`DeviceId`] into what the kernel finds a device by.

use std::path::{Path, PathBuf};

use crate::base::{DeviceId, DeviceName, DeviceNumber, MAPPER_DIR};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Refusal, Result, Step};
use crate::kernel::Host;

/// The name, uuid or number by which the kernel finds a dm device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Name(DeviceName),
    Uuid(String),
    Number(DeviceNumber),
}

impl Key {
    pub(crate) fn address(&self) -> Address<'_> {
        match self {
            Self::Name(name) => Address::Name(name.as_str()),
            Self::Uuid(uuid) => Address::Uuid(uuid),
            Self::Number(number) => Address::Number(*number),
        }
    }

    /// Returns the path that messages name the device by.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Name(name) => name.mapper_path(),
            Self::Uuid(uuid) => PathBuf::from(uuid),
            Self::Number(number) => number.dm_node(),
        }
    }
}

/// Returns the key of the device that `id` means; `None` for a path that leads nowhere.
pub(crate) fn select<H: Host>(host: &H, id: &DeviceId) -> Result<Option<Key>> {
    match id {
        DeviceId::Name(name) => Ok(Some(Key::Name(DeviceName::new(name.as_str())?))),
        DeviceId::Number(number) => Ok(Some(Key::Number(*number))),
        DeviceId::Path(path) => at(host, path),
        DeviceId::Uuid(uuid) => {
            // A name may begin like a uuid.
            let named = DeviceName::new(uuid.as_str()).ok();
            let path = Path::new(MAPPER_DIR).join(uuid);
            let asked = |address| absent(ask(Step::Query, &path, || host.query(address)));
            match named {
                Some(name)
                    if asked(Address::Uuid(uuid))?.is_none()
                        && asked(Address::Name(name.as_str()))?.is_some() =>
                {
                    Ok(Some(Key::Name(name)))
                }
                _ => Ok(Some(Key::Uuid(uuid.clone()))),
            }
        }
    }
}

/// Returns the key for a path: the name, for one below /dev/mapper, or the number of the device node that it leads to.
fn at<H: Host>(host: &H, path: &Path) -> Result<Option<Key>> {
    let below = path.strip_prefix(MAPPER_DIR).ok();
    let name = below.filter(|rest| rest.components().count() == 1);
    let refusal = match name.map(|name| DeviceName::new(name.to_string_lossy())) {
        Some(Ok(name)) => return Ok(Some(Key::Name(name))),
        // udev and libdm encode some names in paths; the node still has the device's number.
        Some(Err(refusal)) => Some(refusal),
        None => None,
    };
    let found = absent(ask(Step::Query, path, || host.device_number(path)))?;
    match (found, refusal) {
        (Some(Some(number)), _) => Ok(Some(Key::Number(number))),
        (Some(None), _) => Err(Refusal::NotABlockDevice {
            path: path.to_owned(),
        }
        .into()),
        (None, Some(refusal)) => Err(refusal.into()),
        (None, None) => Ok(None),
    }
}
