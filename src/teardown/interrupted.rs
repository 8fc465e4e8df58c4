//! What a killed process left half-way, and what is to be done about it: read from the kernel alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::{DeviceNumber, DeviceUuid, Kind, MAPPER_DIR, loop_node};
use crate::call::{absent, ask};
use crate::dm::{Address, SnapshotParams, SnapshotStatus};
use crate::error::{Error, RepairObstacle, Result, Retry, Step};
use crate::find::is_finished;
use crate::kernel::{DevId, Device, Host, MAPPER_CONTROL};

/// How long to wait for a half-made layer, which a probe may have open for a moment.
pub(super) const LAYER_RETRY: Retry = Retry::until(Duration::from_secs(2));

/// The two devices in a snapshot's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) origin: DeviceNumber,
    pub(super) cow: DeviceNumber,
}

/// A device's state: its live table and its inactive one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) device: Device,
    pub(super) uuid: DeviceUuid,
    pub(super) live: Option<Table>,
    pub(super) inactive: Option<Table>,
    /// True if the live table's status is invalid: a layer has lost its exceptions then.
    pub(super) invalid: bool,
    /// True if one of its tables is that of a layer that is being rebuilt: it fails all I/O.
    pub(super) parked: bool,
}

impl Seen {
    /// True if one of its tables is no snapshot's: then a repair leaves it alone.
    pub(super) fn is_strange(&self) -> bool {
        self.device.live_table != self.live.is_some()
            || self.device.inactive_table != self.inactive.is_some()
    }

    /// True if this layer has got the exceptions. After a refused resume it has a live table too, but is suspended.
    pub(super) fn has_taken_over(&self) -> bool {
        self.live.is_some() && !self.device.suspended && !self.parked
    }

    /// True if this layer never got the exceptions, or has lost them.
    pub(super) fn is_dead(&self) -> bool {
        !self.is_strange() && (self.live.is_none() || self.invalid || self.parked)
    }

    /// True if the layer was being made from this snapshot: only then do the two have the same origin and COW device.
    pub(super) fn is_made_into(&self, layer: &Self) -> bool {
        let of_layer = layer.live.or(layer.inactive);
        !is_layer(self) && of_layer.is_some() && self.live == of_layer
    }

    /// Returns the node of the loop device that an operation locks.
    pub(super) fn lock_node(&self) -> Option<PathBuf> {
        let cow = self.live?.cow;
        (cow.major() == 7).then(|| loop_node(cow.minor()))
    }
}

/// Reads all of dmsnap's devices; those that go away meanwhile are left out.
pub(super) fn ours<H: Host>(host: &H) -> Result<Vec<(String, Result<Seen>)>> {
    let control = Path::new(MAPPER_CONTROL);
    ask(Step::OpenMapper, control, || host.open_mapper())?;
    let mut devices = ask(Step::List, control, || host.list())?;
    devices.sort_by(|one, other| one.name.cmp(&other.name));
    let mut all = Vec::new();
    for device in devices {
        // The list of Linux 5.10 has no uuids.
        let uuid = match &device.uuid {
            Some(uuid) => uuid.clone(),
            None => {
                let path = Path::new(MAPPER_DIR).join(&device.name);
                let query = || host.query(Address::Name(&device.name));
                match absent(ask(Step::Query, &path, query))? {
                    Some(found) => found.uuid,
                    None => continue,
                }
            }
        };
        let Ok(uuid) = DeviceUuid::new(uuid) else {
            continue;
        };
        if let Some(seen) = absent(see(host, &uuid, &device.name)).transpose() {
            all.push((device.name, seen));
        }
    }
    Ok(all)
}

pub(super) fn see<H: Host>(host: &H, uuid: &DeviceUuid, name: &str) -> Result<Seen> {
    let path = Path::new(MAPPER_DIR).join(name);
    let query = || host.query(Address::Uuid(uuid.as_str()));
    let device = ask(Step::Query, &path, query)?;
    let mut parked = false;
    let mut slot = |inactive| {
        let table = || host.table(DevId::Uuid(uuid), inactive);
        let Some((kind, params)) = ask(Step::Status, &path, table)? else {
            return Ok(None);
        };
        let held = match uuid.kind() == Kind::Layer && kind == "error" {
            true => ask(Step::Status, &path, || host.parked(uuid, inactive))?,
            false => None,
        };
        parked |= held.is_some();
        let devices = SnapshotParams::devices(&kind, &params).or(held);
        Ok::<_, Error>(devices.map(|[origin, cow]| Table { origin, cow }))
    };
    let invalid = match device.live_table && uuid.kind() == Kind::Layer {
        true => ask(Step::Status, &path, || host.status(uuid))?
            .is_some_and(|(_, text)| text.parse() == Ok(SnapshotStatus::Invalid)),
        false => false,
    };
    let live = match device.live_table {
        true => slot(false)?,
        false => None,
    };
    let inactive = match device.inactive_table {
        true => slot(true)?,
        false => None,
    };
    Ok(Seen {
        live,
        inactive,
        invalid,
        parked,
        uuid: uuid.clone(),
        device,
    })
}

/// What a snapshot's repair has to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan<'a> {
    /// Drop its inactive table, remove the half-made layer, resume it, in this order: the layer is busy while the table
    /// holds it, and a snapshot is not resumed while a layer waits for its exceptions.
    Back {
        clear: bool,
        layer: Option<&'a Seen>,
        resume: bool,
    },
    /// The layer has the exceptions: resume the snapshot over it.
    Forward(&'a Seen),
    /// The snapshot stands on a layer that has no exceptions: have the layer read them from its COW file.
    Rebuild(&'a Seen),
    Irreparable(RepairObstacle),
}

pub(super) fn is_layer(seen: &Seen) -> bool {
    seen.uuid.kind() == Kind::Layer
}

pub(super) fn plan<'a>(snapshot: &Seen, layers: &'a [Seen]) -> Option<Plan<'a>> {
    let live = snapshot.live.filter(|_| !snapshot.is_strange())?;
    let suspended = snapshot.device.suspended;
    let next = snapshot.inactive.map(|table| table.origin);
    let below = layers.iter().find(|seen| seen.device.number == live.origin);
    if let Some(layer) = below.filter(|layer| layer.is_dead()) {
        return Some(Plan::Rebuild(layer));
    }
    let layer = layers.iter().find(|layer| snapshot.is_made_into(layer));
    match layer {
        Some(layer) if layer.has_taken_over() => Some(match next {
            Some(origin) if origin == layer.device.number => Plan::Forward(layer),
            _ => Plan::Irreparable(RepairObstacle::TableGone),
        }),
        Some(layer) => Some(Plan::Back {
            clear: next.is_some(),
            layer: Some(layer),
            resume: suspended,
        }),
        // It was a rollback, or the snapshot has another table of its own.
        None => match next {
            Some(origin) if origin != live.origin => None,
            _ if next.is_none() && !suspended => None,
            _ => Some(Plan::Back {
                clear: next.is_some(),
                layer: None,
                resume: suspended,
            }),
        },
    }
}

/// Reads the device as it is now, and the others for which `which` is true; `None` if it is gone.
pub(super) fn surroundings<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
    which: impl Fn(&Seen) -> bool,
) -> Result<Option<(Seen, Vec<Seen>)>> {
    let mut wanted = None;
    let mut others = Vec::new();
    for (_, seen) in ours(host)? {
        // If one of them cannot be read, nothing can be decided.
        let seen = seen?;
        match seen.uuid == *uuid {
            true => wanted = Some(seen),
            false if which(&seen) => others.push(seen),
            false => (),
        }
    }
    Ok(wanted.map(|wanted| (wanted, others)))
}

/// What a layer's repair has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerStep {
    /// Remove it: it was never finished, and no snapshot uses it.
    Remove,
    /// Resume it: it is complete, and suspended.
    Resume,
    /// Finish it: a snapshot uses it, and the process that made it did not come to the end.
    Finish,
}

pub(super) fn layer_step<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
) -> Result<Option<(Seen, LayerStep)>> {
    let Some((layer, others)) = surroundings(host, uuid, |seen| seen.uuid.kind() != Kind::Layer)?
    else {
        return Ok(None);
    };
    let is_used = layer.device.open_count > 0;
    let half_made = others.iter().any(|snapshot| snapshot.is_made_into(&layer));
    let step = match () {
        () if layer.is_strange() || half_made => None,
        () if layer.is_dead() => (!is_used).then_some(LayerStep::Remove),
        () if layer.device.suspended => Some(LayerStep::Resume),
        () => (is_used && !is_finished(host, &layer.device)).then_some(LayerStep::Finish),
    };
    Ok(step.map(|step| (layer, step)))
}
