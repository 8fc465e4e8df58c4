//! The fake machine's dm devices: two table slots, handover between them, and who holds whom.
//!
//! `drivers/md/dm-ioctl.c` (`table_load`, `do_resume`) and `drivers/md/dm-snap.c` (`snapshot_ctr`, `snapshot_preresume`,
//! `snapshot_resume`, `snapshot_dtr`) are the model; each fact has its test in tests/kernel/facts.

use nix::errno::Errno;

use super::opens::Object;
use super::world::World;
use crate::base::{DeviceNumber, Sectors};
use crate::dm::{SnapshotParams, Target, TargetLine};

/// The major number of the fake's dm devices.
pub(crate) const MAPPED: u32 = 254;

/// A dm device.
#[derive(Debug)]
pub(crate) struct ScriptDevice {
    pub(crate) name: String,
    pub(crate) number: DeviceNumber,
    pub(crate) live: Option<Table>,
    pub(crate) inactive: Option<Table>,
    pub(crate) suspended: bool,
    /// Whether it goes with its last user.
    pub(crate) deferred: bool,
    /// Whether flushes end at it, as was set for its live table.
    pub(crate) ends_flushes: bool,
}

/// A table in one of the two slots.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) line: TargetLine,
    /// Whether it was resumed: then it has its exceptions.
    active: bool,
    /// Whether it waits for the exceptions of another table, or has given them away: then its line shows no chunk size.
    chunkless: bool,
    /// Of a snapshot: whether it can be read.
    pub(crate) valid: bool,
    /// What a table that fails all I/O holds.
    pub(crate) held: Option<[DeviceNumber; 2]>,
}

impl Table {
    pub(crate) fn live(line: TargetLine) -> Self {
        Self {
            line,
            active: true,
            chunkless: false,
            valid: true,
            held: None,
        }
    }

    pub(crate) fn params(&self) -> Option<&SnapshotParams> {
        match &self.line.target {
            Target::Snapshot(params) | Target::SnapshotMerge(params) => Some(params),
            _ => None,
        }
    }

    /// Gives its exceptions away, and says whether they can be read.
    fn give(&mut self) -> bool {
        self.chunkless = true;
        std::mem::replace(&mut self.valid, false)
    }

    /// The text behind the target's name, as the kernel prints it.
    pub(super) fn text(&self) -> String {
        let text = self.line.target.params();
        match self.params().filter(|_| self.chunkless) {
            None => text,
            Some(params) => text.replacen(&format!("P {}", params.chunk), "P 0", 1),
        }
    }

    pub(crate) fn merges(&self) -> bool {
        matches!(self.line.target, Target::SnapshotMerge(_))
    }

    /// Whether it is of that origin and COW device.
    fn shares(&self, with: &SnapshotParams) -> bool {
        let pair = |params: &SnapshotParams| (params.origin, params.cow);
        self.params()
            .is_some_and(|params| pair(params) == pair(with))
    }

    fn holds(&self, number: DeviceNumber) -> bool {
        match &self.line.target {
            Target::Snapshot(params) | Target::SnapshotMerge(params) => {
                [params.origin, params.cow].contains(&number)
            }
            Target::Linear { device, .. } => *device == number,
            _ => self.held.is_some_and(|held| held.contains(&number)),
        }
    }
}

impl ScriptDevice {
    pub(crate) fn new(name: String, number: DeviceNumber) -> Self {
        Self {
            name,
            number,
            live: None,
            inactive: None,
            suspended: false,
            deferred: false,
            ends_flushes: false,
        }
    }

    /// What the live table, or else the inactive one, says.
    pub(crate) fn params(&self) -> Option<&SnapshotParams> {
        self.live.as_ref().or(self.inactive.as_ref())?.params()
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        self.live.iter().chain(&self.inactive)
    }

    fn tables_mut(&mut self) -> impl Iterator<Item = &mut Table> {
        self.live.iter_mut().chain(&mut self.inactive)
    }

    pub(crate) fn holds(&self, number: DeviceNumber) -> bool {
        self.tables().any(|table| table.holds(number))
    }
}

impl World {
    /// The first number that no dm device has.
    pub(super) fn free_number(&self) -> DeviceNumber {
        let all = || self.devices.values().chain(&self.dying);
        let taken = |minor| all().any(|device| device.number.minor == minor);
        let minor = (0..).find(|minor| !taken(*minor)).unwrap_or(0);
        DeviceNumber {
            major: MAPPED,
            minor,
        }
    }

    /// The dm devices that hold the device by one of their tables.
    pub(crate) fn holding(&self, number: DeviceNumber) -> impl Iterator<Item = DeviceNumber> {
        let all = self.devices.values().chain(&self.dying);
        all.filter(move |device| device.holds(number))
            .map(|device| device.number)
    }

    /// A live or inactive table that uses a device has it open, as an open node does.
    pub(super) fn open_count(&self, number: DeviceNumber) -> u32 {
        let users = self.holding(number).count() + self.openers(Object::Mapped(number));
        u32::from(self.now < self.busy_until) + u32::try_from(users).unwrap_or(u32::MAX)
    }

    fn sharing(&self, with: &SnapshotParams) -> Vec<(&ScriptDevice, &Table)> {
        let all = self.devices.values();
        all.flat_map(|device| device.tables().map(move |table| (device, table)))
            .filter(|(_, table)| table.shares(with))
            .collect()
    }

    /// Loads a table into the inactive slot. It is a destination if a resumed one shares its COW device; no more than
    /// one may wait for the exceptions of another.
    pub(super) fn load(&mut self, uuid: &str, line: &TargetLine) -> Result<(), Errno> {
        if !self.devices.contains_key(uuid) {
            return Err(Errno::ENXIO);
        }
        let mut table = Table {
            line: line.clone(),
            active: false,
            chunkless: false,
            valid: true,
            held: None,
        };
        let mapped = self.devices.values().map(|device| device.number);
        let mapped: Vec<_> = mapped.collect();
        if let Some(params) = table.params() {
            let is_there =
                |number: &DeviceNumber| number.major != MAPPED || mapped.contains(number);
            if ![params.origin, params.cow].iter().all(is_there) {
                return Err(Errno::ENODEV);
            }
            let sharing = self.sharing(params);
            if sharing.len() == 2 || sharing.iter().any(|(_, table)| !table.active) {
                return Err(Errno::EINVAL);
            }
            let is_new = sharing.is_empty();
            if is_new {
                table.valid = self.is_valid_store(params.cow);
            }
            table.chunkless = !is_new;
        }
        self.replace(uuid, table)
    }

    /// Loads a table that fails all I/O and holds two devices.
    pub(super) fn park(
        &mut self,
        uuid: &str,
        length: Sectors,
        held: [DeviceNumber; 2],
    ) -> Result<(), Errno> {
        let line = TargetLine {
            start: Sectors::default(),
            length,
            target: Target::Error,
        };
        let table = Table {
            active: false,
            held: Some(held),
            ..Table::live(line)
        };
        self.replace(uuid, table)
    }

    fn replace(&mut self, uuid: &str, table: Table) -> Result<(), Errno> {
        let device = self.devices.get_mut(uuid).ok_or(Errno::ENXIO)?;
        let old = device.inactive.replace(table);
        self.destroy(old);
        self.settle();
        Ok(())
    }

    pub(super) fn clear(&mut self, uuid: &str) -> Result<(), Errno> {
        let device = self.devices.get_mut(uuid).ok_or(Errno::ENXIO)?;
        let old = device.inactive.take();
        self.destroy(old);
        self.settle();
        Ok(())
    }

    /// Swaps the inactive table in, if there is one, and ends the suspension. A refused resume has swapped it all the
    /// same, and leaves the device suspended.
    pub(super) fn resume(&mut self, uuid: &str) -> Result<(), Errno> {
        let device = self.devices.get_mut(uuid).ok_or(Errno::ENXIO)?;
        let mut old = None;
        if let Some(table) = device.inactive.take() {
            device.suspended = true;
            device.ends_flushes = false;
            old = device.live.replace(table);
        }
        let resumed = match device.suspended {
            true => self.hand_over(uuid, old.as_mut()),
            false => Ok(()),
        };
        if resumed.is_ok() {
            if let Some(device) = self.devices.get_mut(uuid) {
                device.suspended = false;
                device.live.iter_mut().for_each(|table| table.active = true);
            }
        }
        self.destroy(old);
        self.settle();
        resumed
    }

    /// What a resume does of a handover: it gives the live table the exceptions of the one that shares its COW device,
    /// which is invalid from then on. `old` is the table that the live one has just replaced.
    fn hand_over(&mut self, uuid: &str, old: Option<&mut Table>) -> Result<(), Errno> {
        let live = self.devices[uuid].live.as_ref();
        let Some((params, active)) =
            live.and_then(|table| Some((table.params()?.clone(), table.active)))
        else {
            return Ok(());
        };
        let chunkless = self.sharing(&params).iter().any(|(_, table)| !table.active);
        if active {
            // The source, which a destination waits for.
            return if chunkless {
                Err(Errno::EINVAL)
            } else {
                Ok(())
            };
        }
        let replaced = old.filter(|table| table.active && table.shares(&params));
        let valid = match replaced {
            Some(table) => table.give(),
            None => {
                let mut all = self.devices.values_mut().flat_map(|device| {
                    let suspended = device.suspended;
                    device.tables_mut().map(move |table| (suspended, table))
                });
                match all.find(|(_, table)| table.active && table.shares(&params)) {
                    None => return Ok(()),
                    Some((false, _)) => return Err(Errno::EINVAL),
                    Some((true, source)) => source.give(),
                }
            }
        };
        let device = self.devices.get_mut(uuid).ok_or(Errno::ENXIO)?;
        if let Some(table) = &mut device.live {
            (table.valid, table.chunkless) = (valid, false);
        }
        Ok(())
    }

    /// Destroys a table that is in no slot any more. A destination that waits for its exceptions never gets them.
    fn destroy(&mut self, table: Option<Table>) {
        let Some(table) = table.filter(|table| table.active) else {
            return;
        };
        let Some(params) = table.params() else { return };
        let all = self.devices.values_mut().flat_map(ScriptDevice::tables_mut);
        all.filter(|other| !other.active && other.shares(params))
            .for_each(|other| other.valid = false);
    }

    /// Removes a device by its name; its tables go with it, or a while later.
    pub(super) fn remove(&mut self, uuid: &str) {
        self.dying.extend(self.devices.remove(uuid));
        self.settle();
    }

    /// Does what the kernel does once somebody has let go of something, until nothing more goes by itself.
    pub(crate) fn settle(&mut self) {
        loop {
            let before = (self.dying.len(), self.devices.len(), self.loops.len());
            if self.now >= self.dying_until {
                for device in std::mem::take(&mut self.dying) {
                    self.destroy(device.inactive);
                    self.destroy(device.live);
                }
            }
            let last =
                |device: &ScriptDevice| device.deferred && self.open_count(device.number) == 0;
            let found = self.devices.iter().find(|(_, device)| last(device));
            if let Some(uuid) = found.map(|(uuid, _)| uuid.clone()) {
                self.dying.extend(self.devices.remove(&uuid));
            }
            self.let_go_of_loops();
            if (self.dying.len(), self.devices.len(), self.loops.len()) == before {
                return;
            }
        }
    }
}
