//! The devices of a layer, by its id.

use std::path::Path;

use super::lookup;
use crate::base::{DeviceUuid, MAPPER_DIR};
use crate::call::{absent, ask};
use crate::dm::Address;
use crate::error::{Error, Refusal, Result, Step};
use crate::kernel::{Host, MAPPER_CONTROL};

/// The uuids of the dm devices that are the layer with that id: more than one where copies of its COW file are attached.
pub(crate) fn layers_of<H: Host>(host: &H, id: u128) -> Result<Vec<DeviceUuid>> {
    let listed = ask(Step::List, Path::new(MAPPER_CONTROL), || host.list())?;
    let mut found = Vec::new();
    for device in listed {
        let uuid = match device.uuid {
            Some(uuid) => DeviceUuid::new(uuid).ok(),
            // Older kernels list none.
            None => by_name(host, &device.name)?,
        };
        found.extend(uuid.filter(|uuid| uuid.layer() == Some(id)));
    }
    Ok(found)
}

fn by_name<H: Host>(host: &H, name: &str) -> Result<Option<DeviceUuid>> {
    let path = Path::new(MAPPER_DIR).join(name);
    match lookup::ours(host, Address::Name(name), &path) {
        Err(Error::Refused(Refusal::NotOurs { .. })) => Ok(None),
        found => Ok(absent(found)?.map(|(_, uuid)| uuid)),
    }
}
