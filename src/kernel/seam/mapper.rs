//! dm devices, their nodes and their aliases.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Sectors};
use crate::dm::{Address, Listed, SnapshotStatus, TargetLine};

/// The control node of device-mapper, which takes its ioctls.
pub(crate) const MAPPER_CONTROL: &str = "/dev/mapper/control";

/// The versions of the kernel's snapshot target and of the dm interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TargetVersion {
    pub(crate) target: [u32; 3],
    /// The interface's minor version: 48 in Linux 6.4 to 6.12, 50 in 6.18 and 7.3.
    pub(crate) interface_minor: u32,
}

/// The kernel's description of a dm device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// The uuid; empty for a device without one.
    pub(crate) uuid: String,
    pub(crate) number: DeviceNumber,
    pub(crate) open_count: u32,
    pub(crate) live_table: bool,
    pub(crate) inactive_table: bool,
    pub(crate) suspended: bool,
    pub(crate) deferred_remove: bool,
}

/// The name or uuid by which a device's table is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DevId<'a> {
    Name(&'a DeviceName),
    Uuid(&'a DeviceUuid),
}

impl<'a> From<DevId<'a>> for Address<'a> {
    fn from(id: DevId<'a>) -> Self {
        match id {
            DevId::Name(name) => Self::Name(name.as_str()),
            DevId::Uuid(uuid) => Self::Uuid(uuid.as_str()),
        }
    }
}

/// Calls on dm devices.
pub(crate) trait DeviceMapper {
    /// Another open control node, to wait for dm events.
    type Events;

    fn open_mapper(&self) -> Result<(), Errno>;
    fn target_version(&self) -> Result<TargetVersion, Errno>;
    fn create(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<DeviceNumber, Errno>;
    fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno>;
    /// Loads a table of that length which fails all I/O, and behind its end holds two devices: they stay while nothing
    /// else has them.
    fn park(
        &self,
        uuid: &DeviceUuid,
        length: Sectors,
        held: [DeviceNumber; 2],
    ) -> Result<(), Errno>;
    /// Returns the two devices of such a table; `None` for any other table.
    fn parked(&self, uuid: &DeviceUuid, inactive: bool)
    -> Result<Option<[DeviceNumber; 2]>, Errno>;
    /// Drops the inactive table.
    fn clear(&self, uuid: &DeviceUuid) -> Result<(), Errno>;
    fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno>;
    /// Suspends the device; returns its state afterwards.
    fn suspend(&self, uuid: &DeviceUuid) -> Result<Device, Errno>;
    fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno>;
    fn set_uuid(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<(), Errno>;
    fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno>;
    fn query(&self, address: Address<'_>) -> Result<Device, Errno>;
    fn table(&self, id: DevId<'_>, inactive: bool) -> Result<Option<(String, String)>, Errno>;
    fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno>;
    /// Returns the snapshot's status without allocating.
    fn glance(&self, uuid: &DeviceUuid, name: &str) -> Result<Option<SnapshotStatus>, Errno>;
    fn list(&self) -> Result<Vec<Listed>, Errno>;

    fn open_events(&self) -> Result<Self::Events, Errno>;
    /// Arms the descriptor: the first dm event from now on makes it readable.
    fn arm(&self, events: &Self::Events) -> Result<(), Errno>;
    /// Waits for a dm event; returns true if there was one.
    fn poll(&self, events: &Self::Events, at_most: Duration) -> Result<bool, Errno>;

    /// Sets the dm device's `queue/write_cache` so that flushes end there, until its next table.
    fn end_flushes(&self, number: DeviceNumber) -> Result<(), Errno>;
    /// True if the block device's `queue/write_cache` ends flushes there; false also where sysfs cannot be read.
    fn ends_flushes(&self, number: DeviceNumber) -> bool;
    fn find_node(&self, number: DeviceNumber) -> Option<PathBuf>;
    fn make_alias(
        &self,
        path: &Path,
        number: DeviceNumber,
        node: Option<&Path>,
    ) -> Result<(), Errno>;
    fn remove_alias(&self, path: &Path, number: DeviceNumber) -> Result<bool, Errno>;
    fn is_our_alias(&self, path: &Path) -> bool;
    fn device_number(&self, path: &Path) -> Result<Option<DeviceNumber>, Errno>;
    fn is_present(&self, number: DeviceNumber) -> bool;
    /// Returns who has the device open, in words.
    fn holders(&self, number: DeviceNumber) -> Vec<String>;
}
