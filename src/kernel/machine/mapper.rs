//! The dm ioctls: create, load, clear, resume, suspend, remove, query, status, list, rename, and setting a uuid.
//!
//! With the feature `devicemapper` some go through that crate, on the same fd; without it all go through `sys.rs`:
//!
//! | verb | through | why |
//! | --- | --- | --- |
//! | opening the node, long tables | `devicemapper` | it makes room for them, and parses them |
//! | create, load, status, table | `sys.rs` | the crate clears and copies 16 KiB for each |
//! | clear, suspend, resume, rename, giving a uuid | `sys.rs` | the crate waits for udev on a semaphore, without a timeout |
//! | remove | `sys.rs` | the same, and it sleeps up to 800 ms on a busy device |
//! | a glance at the status | `sys.rs` | the crate allocates for it, and a watch glances often |
//! | arming a poll | `sys.rs` | it is for each watch's own descriptor, not the shared one |
//! | query | `sys.rs` | the crate finds no device by number, and fails on names that are not ASCII |
//! | list | `sys.rs` | the crate returns no uuids, and one odd name hides every device |
//! | target version | `sys.rs` | the crate has only the list of loaded targets, which loads no module |

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;

use super::mapper_crate::Control;
use crate::base::{DeviceName, DeviceNumber, DeviceUuid, Kind, Sectors};
use crate::dm::{Address, HEAD_BYTES, Head, Listed, Message, SnapshotStatus, TargetLine, message};
use crate::error::policy;
use crate::kernel::seam::{DevId, Device, MAPPER_CONTROL, TargetVersion};
use crate::kernel::sys;

/// The cookie that resume and remove put into their uevents as `DM_COOKIE`. Its flags are read by the udev rules of dm:
/// make no link below /dev/mapper (1), run no subsystem (2), disk (4) or other (8) rules, no libdm fallback (0x20), and
/// this event is the primary one (0x40). Its low half, a semaphore's id, is 0: nobody waits for udev.
///
/// With it udev never opens a guest's disk (no blkid, no watch) and never owns `/dev/mapper/<name>`: a udevd that
/// lags behind cannot take away the link of a new device because an old one of that name is gone.
const QUIET_COOKIE: u32 = 0x6f << 16;

const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_RENAME: u8 = 5;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const TABLE_LOAD: u8 = 9;
const TABLE_CLEAR: u8 = 10;
pub(crate) const TABLE_STATUS: u8 = 12;
const ARM_POLL: u8 = 16;
const GET_TARGET_VERSION: u8 = 17;

/// The minor version of the dm interface from which on the list of devices has their uuids.
const LIST_HAS_UUIDS: u32 = 45;

/// The open node `/dev/mapper/control`.
pub(crate) struct Mapper(Control);

impl fmt::Debug for Mapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_fd().fmt(f)
    }
}

impl Mapper {
    pub(crate) fn open() -> Result<Self, Errno> {
        Control::open().map(Self)
    }

    fn send<B: AsRef<[u8]> + AsMut<[u8]>>(
        &self,
        command: u8,
        message: &mut Message<B>,
    ) -> Result<(), Errno> {
        sys::dm_ioctl(self.0.as_fd(), command, message.bytes_mut())
    }

    pub(crate) fn create(
        &self,
        name: &DeviceName,
        uuid: &DeviceUuid,
    ) -> Result<DeviceNumber, Errno> {
        let head = Head::to(Address::Uuid(uuid.as_str()));
        let mut message = head.with_name(name.as_str());
        self.send(DEV_CREATE, &mut message)?;
        Ok(message.number())
    }

    pub(crate) fn load(&self, uuid: &DeviceUuid, line: &TargetLine) -> Result<(), Errno> {
        // The longest line that dmsnap makes has 86 bytes: two device numbers, a store, a chunk size and two features.
        const ROOM: usize = 256;
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let message = Message::new(&mut buffer[..]);
        let message = message.with_address(Address::Uuid(uuid.as_str()));
        let (kind, params) = (line.target.kind(), line.target.params());
        let (start, length) = (line.start.count(), line.length.count());
        self.send(
            TABLE_LOAD,
            &mut message.with_target(start, length, kind, &params),
        )
    }

    /// Loads a table that fails all I/O for `length`, and holds the two devices behind it, 8 sectors of each.
    pub(crate) fn park(
        &self,
        uuid: &DeviceUuid,
        length: Sectors,
        held: [DeviceNumber; 2],
    ) -> Result<(), Errno> {
        const HELD: u64 = 8;
        let end = length.count();
        let mut buffer = [0; HEAD_BYTES + 3 * message::TARGET_ROOM];
        let message = Message::new(&mut buffer[..]);
        let message = message.with_address(Address::Uuid(uuid.as_str()));
        let [first, second] = held.map(|device| format!("{device} 0"));
        self.send(
            TABLE_LOAD,
            &mut message.with_targets(&[
                ([0, end], "error", ""),
                ([end, HELD], "linear", &first),
                ([end + HELD, HELD], "linear", &second),
            ]),
        )
    }

    /// Returns the devices that a table of [`Self::park`] holds; `None` for any other table.
    pub(crate) fn parked(
        &self,
        uuid: &DeviceUuid,
        inactive: bool,
    ) -> Result<Option<[DeviceNumber; 2]>, Errno> {
        const ROOM: usize = 512;
        let slot = if inactive {
            message::QUERY_INACTIVE_TABLE
        } else {
            0
        };
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let message = Message::new(&mut buffer[..]).with_flags(slot | message::STATUS_TABLE);
        let mut message = message.with_address(Address::Uuid(uuid.as_str()));
        self.send(TABLE_STATUS, &mut message)?;
        let lines = message::lines(message.payload(), message.target_count());
        let [("error", _), ("linear", first), ("linear", second)] = lines[..] else {
            return Ok(None);
        };
        let device = |params: &str| params.strip_suffix(" 0")?.parse().ok();
        Ok(device(first).zip(device(second)).map(<[_; 2]>::from))
    }

    /// Drops the inactive table, if there is one.
    pub(crate) fn clear(&self, uuid: &DeviceUuid) -> Result<(), Errno> {
        let mut message = Head::to(Address::Uuid(uuid.as_str()));
        self.send(TABLE_CLEAR, &mut message)
    }

    /// Makes the loaded table live, or ends a suspension; returns the device's open count. When a table is loaded,
    /// nothing is mounted or queued, so there is nothing to freeze or to flush; without one the flags mean nothing.
    pub(crate) fn resume(&self, uuid: &DeviceUuid) -> Result<u32, Errno> {
        let head = Head::to(Address::Uuid(uuid.as_str()));
        let flags = message::SKIP_LOCKFS | message::NOFLUSH;
        // Without a cookie udev keeps to the flags of the first resume. Those of an adopted device came from the
        // program that made it, so its link stays.
        let cookie = match uuid.kind() {
            Kind::Adopted => 0,
            _ => QUIET_COOKIE,
        };
        let mut message = head.with_flags(flags).with_cookie(cookie);
        self.send(DEV_SUSPEND, &mut message)?;
        Ok(message.open_count())
    }

    /// Holds back all I/O and waits for what is in flight. Without `DM_SKIP_LOCKFS_FLAG`, on purpose: the kernel then
    /// writes out what it has cached of the device (`freeze_bdev`), where a VMM without O_DIRECT has its guest's
    /// writes, and freezes a file system that is mounted on this host until the resume.
    pub(crate) fn suspend(&self, uuid: &DeviceUuid) -> Result<Device, Errno> {
        let head = Head::to(Address::Uuid(uuid.as_str()));
        let mut message = head.with_flags(message::SUSPEND);
        self.send(DEV_SUSPEND, &mut message)?;
        Ok(described(&message))
    }

    /// Removes the device, or with `deferred` has the kernel remove it at the last close; returns true if that is still
    /// to come.
    pub(crate) fn remove(&self, address: Address<'_>, deferred: bool) -> Result<bool, Errno> {
        let flags = if deferred {
            message::DEFERRED_REMOVE
        } else {
            0
        };
        let mut message = Head::to(address)
            .with_flags(flags)
            .with_cookie(QUIET_COOKIE);
        self.send(DEV_REMOVE, &mut message)?;
        Ok(deferred && message.flags() & message::DEFERRED_REMOVE != 0)
    }

    /// Gives a uuid to a device that has none; the kernel lets nobody change it later. No cookie is sent with it: the
    /// device's link may be udev's, which a cookie that says "make no link" would take away.
    pub(crate) fn set_uuid(&self, name: &DeviceName, uuid: &DeviceUuid) -> Result<(), Errno> {
        self.change(name, uuid.as_str(), message::UUID, 0)
    }

    /// Gives the device another name. The kernel finds the device by its old name, so of two processes that rename it
    /// one fails.
    pub(crate) fn rename(&self, from: &DeviceName, to: &DeviceName) -> Result<(), Errno> {
        self.change(from, to.as_str(), 0, QUIET_COOKIE)
    }

    fn change(&self, name: &DeviceName, to: &str, flags: u32, cookie: u32) -> Result<(), Errno> {
        const ROOM: usize = 136;
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let message = Message::new(&mut buffer[..]).with_name(name.as_str());
        let message = message.with_flags(flags).with_cookie(cookie);
        self.send(DEV_RENAME, &mut message.with_text(to))
    }

    pub(crate) fn query(&self, address: Address<'_>) -> Result<Device, Errno> {
        let mut message = Head::to(address);
        self.send(DEV_STATUS, &mut message)?;
        Ok(described(&message))
    }

    /// Returns the target and parameters of the first line of the device's live or inactive table; `None` if it has no
    /// such table.
    pub(crate) fn table(
        &self,
        id: DevId<'_>,
        inactive: bool,
    ) -> Result<Option<(String, String)>, Errno> {
        let slot = if inactive {
            message::QUERY_INACTIVE_TABLE
        } else {
            0
        };
        self.first_line(id, slot | message::STATUS_TABLE)
    }

    /// Returns the target and the text of the first line of the device's status.
    pub(crate) fn status(&self, uuid: &DeviceUuid) -> Result<Option<(String, String)>, Errno> {
        self.first_line(DevId::Uuid(uuid), message::NOFLUSH)
    }

    /// Returns a snapshot's status without allocating. It is `None` if the device has no live table, has another
    /// target, or is suspended with a second table loaded: in a checkpoint the old table says `Invalid` then, and
    /// nothing is lost. If the device has another name, a pool has given it to another snapshot, and the answer is
    /// ENXIO, as for no device.
    pub(crate) fn glance(
        &self,
        uuid: &DeviceUuid,
        name: &str,
    ) -> Result<Option<SnapshotStatus>, Errno> {
        const ROOM: usize = 200;
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let message = Message::new(&mut buffer[..]).with_flags(message::NOFLUSH);
        let mut message = message.with_address(Address::Uuid(uuid.as_str()));
        self.send(TABLE_STATUS, &mut message)?;
        if uuid.kind() == Kind::Pooled && !message.is_named(name) {
            return Err(policy::GONE);
        }
        let swapping = message::SUSPEND | message::INACTIVE_PRESENT;
        let flags = message.flags();
        if flags & message::ACTIVE_PRESENT == 0 || flags & swapping == swapping {
            return Ok(None);
        }
        let line = if message.flags() & message::BUFFER_FULL != 0 {
            self.status(uuid)?
        } else {
            None
        };
        let owned = line
            .as_ref()
            .map(|(kind, text)| (kind.as_str(), text.as_str()));
        let seen = owned.or_else(|| message::first_target(message.payload()));
        Ok(seen.and_then(|(kind, text)| {
            let Ok(status) = text.parse();
            matches!(kind, "snapshot" | "snapshot-merge").then_some(status)
        }))
    }

    fn first_line(&self, id: DevId<'_>, flags: u32) -> Result<Option<(String, String)>, Errno> {
        const ROOM: usize = 512;
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let message = Message::new(&mut buffer[..]).with_flags(flags);
        let mut message = message.with_address(id.into());
        self.send(TABLE_STATUS, &mut message)?;
        if message.flags() & message::BUFFER_FULL != 0 {
            return self.0.long_first_line(id, flags);
        }
        Ok(message::first_line(message.payload()))
    }

    /// Lists all dm devices, those of other programs too.
    pub(crate) fn list(&self) -> Result<Vec<Listed>, Errno> {
        let mut room = 64 << 10;
        loop {
            let mut message = Message::new(vec![0; HEAD_BYTES + room]).with_flags(message::UUID);
            self.send(LIST_DEVICES, &mut message)?;
            if message.flags() & message::BUFFER_FULL == 0 {
                return Ok(message::listed(
                    message.payload(),
                    message.minor_version() >= LIST_HAS_UUIDS,
                ));
            }
            room *= 4;
        }
    }

    /// Returns the snapshot target's version. The kernel loads the module for it if it is not loaded.
    pub(crate) fn target_version(&self) -> Result<TargetVersion, Errno> {
        const ROOM: usize = 64;
        let mut buffer = [0; HEAD_BYTES + ROOM];
        let head = Message::new(&mut buffer[..]);
        let mut message = head.with_name("snapshot");
        self.send(GET_TARGET_VERSION, &mut message)?;
        let target = message::target_version(message.payload()).ok_or(Errno::EPROTO)?;
        Ok(TargetVersion {
            target,
            interface_minor: message.minor_version(),
        })
    }
}

/// Another open `/dev/mapper/control`, which becomes readable with the first dm event after it was armed, of whatever
/// device. Each open file has an event number of its own (`dm_poll`, `drivers/md/dm-ioctl.c`).
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        nix::fcntl::open(MAPPER_CONTROL, flags, Mode::empty()).map(Self)
    }

    pub(crate) fn arm(&self) -> Result<(), Errno> {
        let mut message = Head::new([0; HEAD_BYTES]);
        sys::dm_ioctl(self.0.as_fd(), ARM_POLL, message.bytes_mut())
    }

    /// Waits for an event; true if there was one. The time is rounded up to whole milliseconds: a wait that ended too
    /// early would only be repeated.
    pub(crate) fn poll(&self, at_most: Duration) -> Result<bool, Errno> {
        let millis = at_most.as_micros().div_ceil(1000);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, timeout).map(|ready| ready > 0)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Reads the device's state from an answer's head.
fn described(message: &Head) -> Device {
    let has = |flag| message.flags() & flag != 0;
    Device {
        name: message.name(),
        uuid: message.uuid(),
        number: message.number(),
        open_count: message.open_count(),
        live_table: has(message::ACTIVE_PRESENT),
        inactive_table: has(message::INACTIVE_PRESENT),
        suspended: has(message::SUSPEND),
        deferred_remove: has(message::DEFERRED_REMOVE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::headers;

    #[test]
    fn commands_are_the_kernels() {
        headers::assert_agree(&[
            (LIST_DEVICES, "DM_LIST_DEVICES_CMD"),
            (DEV_CREATE, "DM_DEV_CREATE_CMD"),
            (DEV_REMOVE, "DM_DEV_REMOVE_CMD"),
            (DEV_RENAME, "DM_DEV_RENAME_CMD"),
            (DEV_SUSPEND, "DM_DEV_SUSPEND_CMD"),
            (DEV_STATUS, "DM_DEV_STATUS_CMD"),
            (TABLE_LOAD, "DM_TABLE_LOAD_CMD"),
            (TABLE_CLEAR, "DM_TABLE_CLEAR_CMD"),
            (TABLE_STATUS, "DM_TABLE_STATUS_CMD"),
            (ARM_POLL, "DM_DEV_ARM_POLL_CMD"),
            (GET_TARGET_VERSION, "DM_GET_TARGET_VERSION_CMD"),
        ]);
    }
}
