//! dm devices of the fake machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::Script;
use super::world::{ScriptDevice, loop_at};
use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Sectors};
use crate::dm::{Address, Listed, SnapshotStatus, TargetLine};
use crate::error::Step;
use crate::kernel::{DevId, Device, DeviceMapper, TargetVersion};

impl DeviceMapper for Script {
    type Events = ();

    fn open_mapper(&self) -> Result<(), Errno> {
        self.call(Step::OpenMapper)
    }

    fn target_version(&self) -> Result<TargetVersion, Errno> {
        self.call(Step::TargetVersion)?;
        Ok(TargetVersion {
            target: [1, 16, 0],
            interface_minor: 48,
        })
    }

    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno> {
        self.call(Step::Create)?;
        if self.find(Address::Name(name.as_str())).is_ok() {
            return Err(Errno::EBUSY);
        }
        let mut world = self.world.borrow_mut();
        let number = world.free_number();
        let device = ScriptDevice::new(name.to_string(), number);
        world.devices.insert(uuid.to_string(), device);
        Ok(number)
    }

    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        self.call(Step::Load)?;
        self.world.borrow_mut().load(uuid.as_str(), line)
    }

    fn park(
        &self,
        uuid: &DeviceUuid,
        length: Sectors,
        held: [DeviceNumber; 2],
    ) -> Result<(), Errno> {
        self.call(Step::Load)?;
        self.world.borrow_mut().park(uuid.as_str(), length, held)
    }

    fn parked(
        &self,
        uuid: &DeviceUuid,
        inactive: bool,
    ) -> Result<Option<[DeviceNumber; 2]>, Errno> {
        self.call(Step::Status)?;
        let world = self.world.borrow();
        let device = world.devices.get(uuid.as_str()).ok_or(Errno::ENXIO)?;
        let slot = if inactive {
            &device.inactive
        } else {
            &device.live
        };
        Ok(slot.as_ref().and_then(|table| table.held))
    }

    fn clear(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::Clear)?;
        self.world.borrow_mut().clear(uuid.as_str())
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        self.call(Step::Resume)?;
        let mut world = self.world.borrow_mut();
        world.resume(uuid.as_str())?;
        let number = world.devices[uuid.as_str()].number;
        Ok(world.open_count(number))
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<Device, Errno> {
        self.call(Step::Suspend)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.suspended = true;
        Ok(described(&world, uuid.as_str()))
    }

    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno> {
        self.call(Step::Rename)?;
        let uuid = self.find(Address::Name(from.as_str()))?;
        if self.find(Address::Name(to.as_str())).is_ok() {
            return Err(Errno::EBUSY);
        }
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(&uuid).ok_or(Errno::ENXIO)?;
        device.name = to.to_string();
        Ok(())
    }

    fn query(&self, address: Address<'_>) -> Result<Device, Errno> {
        self.call(Step::Query)?;
        let uuid = self.find(address)?;
        Ok(described(&self.world.borrow(), &uuid))
    }

    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        self.call(Step::Remove)?;
        let uuid = self.find(address)?;
        let mut world = self.world.borrow_mut();
        let number = world.devices[&uuid].number;
        if world.open_count(number) > 0 {
            let device = world.devices.get_mut(&uuid).filter(|_| deferred);
            let device = device.ok_or(Errno::EBUSY)?;
            device.deferred = true;
            return Ok(true);
        }
        world.remove(&uuid);
        world.status = None;
        Ok(false)
    }

    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get(uuid.as_str()).ok_or(Errno::ENXIO)?;
        let Some((table, params)) = device
            .live
            .as_ref()
            .and_then(|table| Some((table, table.params()?)))
        else {
            return Ok(None);
        };
        if table.merges() {
            return Ok(Some(("snapshot-merge".to_owned(), world.merge_on())));
        }
        let sectors = world.loops[&params.cow.minor].bytes / 512;
        let text = match (table.valid, world.status) {
            (false, _) => "Invalid".to_owned(),
            (true, Some(status)) => status.to_owned(),
            (true, None) => format!("16/{sectors} 16"),
        };
        Ok(Some(("snapshot".to_owned(), text)))
    }

    fn end_flushes(&self, number: DeviceNumber) -> Result<(), Errno> {
        self.call(Step::EndFlushes)?;
        let mut world = self.world.borrow_mut();
        let mut devices = world.devices.values_mut();
        let device = devices.find(|device| device.number == number);
        device.ok_or(Errno::ENOENT)?.ends_flushes = true;
        Ok(())
    }

    fn ends_flushes(&self, number: DeviceNumber) -> bool {
        let world = self.world.borrow();
        let mut devices = world.devices.values();
        devices.any(|device| device.number == number && device.ends_flushes)
            || world.flushless.contains(&number)
    }

    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf> {
        Some(number.dm_node())
    }

    fn make_alias(&self, path: &Path, _: DeviceNumber, _: Option<&Path>) -> Result<(), Errno> {
        self.call(Step::Link)?;
        self.world.borrow_mut().aliases.insert(path.to_owned());
        Ok(())
    }

    fn remove_alias(&self, path: &Path, _number: DeviceNumber) -> Result<bool, Errno> {
        self.call(Step::Unlink)?;
        Ok(self.world.borrow_mut().aliases.remove(path))
    }

    fn is_our_alias(&self, path: &Path) -> bool {
        self.world.borrow().aliases.contains(path)
    }

    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        self.call(Step::Query)?;
        let minor = loop_at(path);
        let known = self.world.borrow().number_of(path);
        Ok(Some(known.unwrap_or(DeviceNumber {
            major: if minor.is_some() { 7 } else { 254 },
            minor: minor.unwrap_or(0),
        })))
    }

    fn is_present(&self, _number: DeviceNumber) -> bool {
        false
    }

    fn holders(&self, _number: DeviceNumber) -> Vec<String> {
        vec!["vmm (pid 1)".to_owned()]
    }

    fn table(&self, id: DevId<'_>, inactive: bool) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        let uuid = self.find(match id {
            DevId::Name(name) => Address::Name(name.as_str()),
            DevId::Uuid(uuid) => Address::Uuid(uuid.as_str()),
        })?;
        let world = self.world.borrow();
        let device = &world.devices[&uuid];
        let slot = if inactive {
            &device.inactive
        } else {
            &device.live
        };
        let table = slot.as_ref();
        Ok(table.map(|table| (table.line.target.kind().to_owned(), table.text())))
    }

    fn set_uuid(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::SetUuid)?;
        let old = self.find(Address::Name(name.as_str()))?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.remove(&old).ok_or(Errno::ENXIO)?;
        world.devices.insert(uuid.to_string(), device);
        Ok(())
    }

    fn glance(&self, uuid: &DeviceUuid, _name: &str) -> Result<Option<SnapshotStatus>, Errno> {
        let status = self.status(uuid)?;
        Ok(status.map(|(_, text)| {
            let Ok(status) = text.parse();
            status
        }))
    }

    fn list(&self) -> Result<Vec<Listed>, Errno> {
        self.call(Step::List)?;
        let world = self.world.borrow();
        let listed = |(uuid, device): (&String, &ScriptDevice)| Listed {
            name: device.name.clone(),
            uuid: Some(uuid.clone()),
        };
        Ok(world.devices.iter().map(listed).collect())
    }

    fn open_events(&self) -> Result<(), Errno> {
        self.call(Step::OpenMapper)
    }

    fn arm(&self, (): &()) -> Result<(), Errno> {
        self.call(Step::ArmPoll)
    }

    fn poll(&self, (): &(), _at_most: Duration) -> Result<bool, Errno> {
        Ok(false)
    }
}

/// What the kernel answers of a device.
fn described(world: &super::world::World, uuid: &str) -> Device {
    let device = &world.devices[uuid];
    Device {
        name: device.name.clone(),
        uuid: uuid.to_owned(),
        number: device.number,
        open_count: world.open_count(device.number),
        live_table: device.live.is_some(),
        inactive_table: device.inactive.is_some(),
        suspended: device.suspended,
        deferred_remove: device.deferred,
    }
}
