//! From what a caller calls a device to what the kernel finds it by.

use std::path::{Path, PathBuf};

use crate::base::{DeviceId, DeviceName, DeviceNumber, MAPPER_DIR};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Refusal, Result, Step};
use crate::kernel::Host;

/// What the kernel finds a dm device by.
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

    /// The path that stands for the device in messages.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Name(name) => name.mapper_path(),
            Self::Uuid(uuid) => PathBuf::from(uuid),
            Self::Number(number) => number.dm_node(),
        }
    }
}

/// The key of the device that `id` means; `None` for a path that leads nowhere.
pub(crate) fn select<H: Host>(host: &H, id: &DeviceId) -> Result<Option<Key>> {
    match id {
        DeviceId::Name(name) => Ok(Some(Key::Name(DeviceName::new(name.as_str())?))),
        DeviceId::Number(number) => Ok(Some(Key::Number(*number))),
        DeviceId::Path(path) => at(host, path),
        DeviceId::Uuid(uuid) => {
            // A device may be called as a uuid begins.
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

/// A path below /dev/mapper is a name; any other leads to a device's node.
fn at<H: Host>(host: &H, path: &Path) -> Result<Option<Key>> {
    let below = path.strip_prefix(MAPPER_DIR).ok();
    let name = below.filter(|rest| rest.components().count() == 1);
    let refusal = match name.map(|name| DeviceName::new(name.to_string_lossy())) {
        Some(Ok(name)) => return Ok(Some(Key::Name(name))),
        // udev and libdm spell other names' paths their own way; the node knows which device it is.
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
