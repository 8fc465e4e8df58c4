//! dm devices of the fake machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::Script;
use super::world::ScriptDevice;
use crate::base::{DeviceName, DeviceNumber, DeviceUuid};
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
        let minor = u32::try_from(world.devices.len()).unwrap_or(0);
        let number = DeviceNumber { major: 254, minor };
        let device = ScriptDevice {
            name: name.to_string(),
            number,
            table: None,
            live: false,
            suspended: false,
        };
        world.devices.insert(uuid.to_string(), device);
        Ok(number)
    }

    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        self.call(Step::Load)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.table = Some(line.clone());
        Ok(())
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        self.call(Step::Resume)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        (device.live, device.suspended) = (true, false);
        world.settle();
        drop(world);
        Ok(self.open_count())
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.call(Step::Suspend)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get_mut(uuid.as_str()).ok_or(Errno::ENXIO)?;
        device.suspended = true;
        Ok(())
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
        let world = self.world.borrow();
        let device = &world.devices[&uuid];
        Ok(Device {
            name: device.name.clone(),
            uuid: uuid.clone(),
            number: device.number,
            open_count: self.open_count(),
            live_table: device.live,
            inactive_table: device.table.is_some() && !device.live,
            suspended: device.suspended,
            deferred_remove: false,
        })
    }

    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        self.call(Step::Remove)?;
        let uuid = self.find(address)?;
        if self.open_count() > 0 {
            return if deferred {
                Ok(true)
            } else {
                Err(Errno::EBUSY)
            };
        }
        let mut world = self.world.borrow_mut();
        let device = world.devices.remove(&uuid);
        if self.clock.get() < world.dying_until {
            world.dying.extend(device);
        }
        world.status = None;
        world.settle();
        Ok(false)
    }

    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.call(Step::Status)?;
        let mut world = self.world.borrow_mut();
        let device = world.devices.get(uuid.as_str()).ok_or(Errno::ENXIO)?;
        let Some(params) = device.params().filter(|_| device.live) else {
            return Ok(None);
        };
        if device.merges() {
            return Ok(Some(("snapshot-merge".to_owned(), world.merge_on())));
        }
        let sectors = world.loops[&params.cow.minor].bytes / 512;
        let usage = || format!("16/{sectors} 16");
        let text = world.status.map_or_else(usage, str::to_owned);
        Ok(Some(("snapshot".to_owned(), text)))
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
        let text = path.to_string_lossy();
        let number = text.strip_prefix("/dev/loop").and_then(|n| n.parse().ok());
        Ok(Some(DeviceNumber {
            major: if number.is_some() { 7 } else { 254 },
            minor: number.unwrap_or(0),
        }))
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
        let line = device.table.as_ref().filter(|_| device.live != inactive);
        Ok(line.map(|line| (line.target.kind().to_owned(), line.target.params())))
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
