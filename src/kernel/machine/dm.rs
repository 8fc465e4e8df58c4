//! The machine's dm devices, with their nodes and aliases.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::files::facts;
use super::mapper::EventFd;
use super::{Machine, alias, holders};
use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Sectors};
use crate::dm::{Address, Listed, SnapshotStatus, TargetLine};
use crate::error::errno_of;
use crate::kernel::seam::{DevId, Device, DeviceMapper, FileKind, TargetVersion};

impl DeviceMapper for Machine {
    type Events = EventFd;

    fn open_mapper(&self) -> Result<(), Errno> {
        self.mapper().map(drop)
    }

    fn target_version(&self) -> Result<TargetVersion, Errno> {
        self.mapper()?.target_version()
    }

    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno> {
        self.mapper()?.create(name, uuid)
    }

    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        self.mapper()?.load(uuid, line)
    }

    fn park(
        &self,
        uuid: &DeviceUuid,
        length: Sectors,
        held: [DeviceNumber; 2],
    ) -> Result<(), Errno> {
        self.mapper()?.park(uuid, length, held)
    }

    fn parked(
        &self,
        uuid: &DeviceUuid,
        inactive: bool,
    ) -> Result<Option<[DeviceNumber; 2]>, Errno> {
        self.mapper()?.parked(uuid, inactive)
    }

    fn clear(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.mapper()?.clear(uuid)
    }

    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        self.mapper()?.resume(uuid)
    }

    fn suspend(&self, uuid: &DeviceUuid) -> Result<Device, Errno> {
        self.mapper()?.suspend(uuid)
    }

    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno> {
        self.mapper()?.rename(from, to)
    }

    fn set_uuid(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.mapper()?.set_uuid(name, uuid)
    }

    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        self.mapper()?.remove(address, deferred)
    }

    fn query(&self, address: Address<'_>) -> Result<Device, Errno> {
        self.mapper()?.query(address)
    }

    fn table(&self, id: DevId<'_>, inactive: bool) -> Result<Option<(String, String)>, Errno> {
        self.mapper()?.table(id, inactive)
    }

    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.mapper()?.status(uuid)
    }

    fn glance(&self, uuid: &DeviceUuid, name: &str) -> Result<Option<SnapshotStatus>, Errno> {
        self.mapper()?.glance(uuid, name)
    }

    fn list(&self) -> Result<Vec<Listed>, Errno> {
        self.mapper()?.list()
    }

    fn open_events(&self) -> Result<EventFd, Errno> {
        EventFd::open()
    }

    fn arm(&self, events: &EventFd) -> Result<(), Errno> {
        events.arm()
    }

    fn poll(&self, events: &EventFd, at_most: Duration) -> Result<bool, Errno> {
        events.poll(at_most)
    }

    fn end_flushes(&self, number: DeviceNumber) -> Result<(), Errno> {
        let path = format!("/sys/block/dm-{}/queue/write_cache", number.minor);
        let end = || {
            let mut file = OpenOptions::new().write(true).open(path)?;
            file.write_all(b"write through")
        };
        end().map_err(|error: io::Error| errno_of(&error))
    }

    fn ends_flushes(&self, number: DeviceNumber) -> bool {
        let setting = fs::read_to_string(format!("/sys/dev/block/{number}/queue/write_cache"));
        setting.is_ok_and(|setting| setting.trim_end() == "write through")
    }

    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf> {
        alias::find_node(number)
    }

    fn make_alias(
        &self,
        path: &Path,
        number: DeviceNumber,
        node: Option<&Path>,
    ) -> Result<(), Errno> {
        alias::make(path, number, node)
    }

    fn remove_alias(&self, path: &Path, number: DeviceNumber) -> Result<bool, Errno> {
        alias::remove(path, number)
    }

    fn is_our_alias(&self, path: &Path) -> bool {
        alias::is_ours(path)
    }

    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno> {
        match facts(&nix::sys::stat::stat(path)?).kind {
            FileKind::BlockDevice(number) => Ok(Some(number)),
            _ => Ok(None),
        }
    }

    fn is_present(&self, number: DeviceNumber) -> bool {
        Path::new(&format!("/sys/dev/block/{number}")).exists()
    }

    fn holders(&self, number: DeviceNumber) -> Vec<String> {
        holders::holders(number)
    }
}
