//! Repairs devices that a killed process left in the middle of an operation: it finishes the operation or undoes it.
//!
//! Everything is read from the kernel: which tables a device has, whether it is suspended, and whether a process holds
//! the lock of an operation. V is a snapshot, B the layer that a checkpoint of it was making (the order of the calls:
//! load B, load V, suspend V, resume B, resume V).

use std::path::Path;
use std::time::Duration;

use super::interrupted::{
    LAYER_RETRY, LayerStep, Plan, Seen, is_layer, layer_step, ours, plan, surroundings,
};
use super::rebuild::rebuild;
use crate::backing::{Backing, probe_store};
use crate::base::{DeviceId, DeviceUuid, Kind, MAPPER_DIR, loop_node};
use crate::call::{absent, ask, ask_unobserved, end_flushes, ends_flushes, patiently, resume};
use crate::dm::Address;
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict};
use crate::find::{self, at_work, is_finished};
use crate::kernel::{Host, MACHINE};
use crate::store::{self, CHAIN_AT, Chain};

/// A device that a repair found in the middle of an operation, and what was done.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Repaired {
    /// The dm device's name.
    pub name: String,
    /// What was done, or why that failed. A failure does not stop the repair of other devices.
    #[cfg_attr(feature = "serde", serde(flatten, serialize_with = "flat"))]
    pub outcome: Result<Repair>,
}

impl Repaired {
    /// Makes a report of what [`repair`] came to for one device, to be reported as [`repair_all`] reports it.
    #[must_use]
    pub fn new(name: impl Into<String>, outcome: Result<Repair>) -> Self {
        Self {
            name: name.into(),
            outcome,
        }
    }
}

/// Serialises an outcome, or `failed` with its error.
#[cfg(feature = "serde")]
fn flat<S: serde::Serializer>(outcome: &Result<Repair>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(serde::Serialize)]
    #[serde(tag = "outcome", rename_all = "kebab-case")]
    enum Other<'a> {
        Failed { error: &'a Error },
    }
    match outcome {
        Ok(outcome) => serde::Serialize::serialize(outcome, serializer),
        Err(error) => serde::Serialize::serialize(&Other::Failed { error }, serializer),
    }
}

/// What a repair did with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "outcome", rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Repair {
    /// A live process is at work on it; nothing was changed.
    InProgress,
    /// It was suspended, and was resumed.
    Resumed,
    /// The operation was undone; the disk works as before it.
    Undone,
    /// The operation was finished.
    Finished,
}

/// Finishes or undoes an operation in the middle of which a process was killed, so that the guest's I/O goes on.
///
/// It returns `None` if there was nothing to do. It removes nothing but a half-made layer, and changes nothing while a
/// live process is at work on the device. A suspension by hand (`dmsetup suspend`) cannot be told from a killed
/// process's: it is ended too, which loses no data.
///
/// # Errors
///
/// Those of [`status`](crate::status); [`Refusal::Irreparable`] with the reason why it cannot be repaired;
/// [`Error::Failed`] names the call that failed, and the next repair goes on from there.
pub fn repair(device: impl Into<DeviceId>) -> Result<Option<Repair>> {
    RepairOptions::new().repair(device)
}

/// Does what [`repair`] does for all of dmsnap's devices on the host; returns those that needed it.
///
/// # Errors
///
/// [`Error::Failed`] if device-mapper cannot be asked for its devices at all. What fails for one device is in its
/// [`Repaired::outcome`].
pub fn repair_all() -> Result<Vec<Repaired>> {
    RepairOptions::new().repair_all()
}

/// Options for a repair, and the calls that do it: how long it waits for whoever is at work on a device.
#[derive(Clone, Debug)]
pub struct RepairOptions {
    patience: Retry,
}

impl Default for RepairOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl RepairOptions {
    /// Makes the default options: half a second for whoever is at work on a device.
    #[must_use]
    pub fn new() -> Self {
        Self {
            patience: at_work::MAKER_RETRY,
        }
    }

    /// Sets for how long whoever is at work on a device is waited for, before it counts as
    /// [`InProgress`](Repair::InProgress): half a second unless set, as a probe may have the lock for a moment.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.patience = Retry::until(deadline);
        self
    }

    /// Does what [`repair`] does.
    ///
    /// # Errors
    ///
    /// Those of [`repair`].
    pub fn repair(&self, device: impl Into<DeviceId>) -> Result<Option<Repair>> {
        repair_one(&MACHINE, &device.into(), &self.patience)
    }

    /// Does what [`repair_all`] does.
    ///
    /// # Errors
    ///
    /// Those of [`repair_all`].
    pub fn repair_all(&self) -> Result<Vec<Repaired>> {
        repair_every(&MACHINE, &self.patience)
    }
}

pub(crate) fn repair_one<H: Host>(
    host: &H,
    device: &DeviceId,
    patience: &Retry,
) -> Result<Option<Repair>> {
    let uuid = find::status_of(host, device)?.uuid;
    let all = ours(host)?;
    let of = |(_, seen): &(String, Result<Seen>)| seen.as_ref().ok().map(|seen| seen.uuid.clone());
    if uuid.kind() != Kind::Layer {
        return mend(host, &uuid, patience);
    }
    // A layer is repaired with the snapshot that it was made from.
    let layer = all.iter().find(|found| of(found).as_ref() == Some(&uuid));
    let Some(layer) = layer.and_then(|(_, seen)| seen.as_ref().ok()) else {
        return Ok(None);
    };
    let snapshots = all.iter().filter_map(|(_, seen)| seen.as_ref().ok());
    let stands_on = |seen: &Seen| {
        let live = seen.live.filter(|_| layer.is_dead() && !is_layer(seen));
        live.is_some_and(|table| table.origin == layer.device.number)
    };
    let mut made_from = snapshots.filter(|seen| seen.is_made_into(layer) || stands_on(seen));
    match made_from.next() {
        Some(snapshot) => mend(host, &snapshot.uuid, patience),
        None => mend_layer(host, &uuid, patience),
    }
}

pub(crate) fn repair_every<H: Host>(host: &H, patience: &Retry) -> Result<Vec<Repaired>> {
    let found = ours(host)?;
    // Layers come last: what a snapshot needs of them is done with the snapshot.
    let snapshots = found
        .iter()
        .filter(|(_, seen)| !seen.as_ref().is_ok_and(is_layer));
    let layers = found
        .iter()
        .filter(|(_, seen)| seen.as_ref().is_ok_and(is_layer));
    let mut repaired = Vec::new();
    for (name, seen) in snapshots.chain(layers) {
        let outcome = match seen {
            Err(error) => Err(error.clone()),
            Ok(seen) if is_layer(seen) => mend_layer(host, &seen.uuid, patience),
            Ok(seen) => mend(host, &seen.uuid, patience),
        };
        if let Some(outcome) = outcome.transpose() {
            let name = name.clone();
            repaired.push(Repaired { name, outcome });
        }
    }
    Ok(repaired)
}

/// Repairs a snapshot, with its lock held.
fn mend<H: Host>(host: &H, uuid: &DeviceUuid, patience: &Retry) -> Result<Option<Repair>> {
    let Some((snapshot, layers)) = surroundings(host, uuid, is_layer)? else {
        return Ok(None);
    };
    if plan(&snapshot, &layers).is_none() {
        return Ok(None);
    }
    let Some(node) = snapshot.lock_node() else {
        return Ok(None);
    };
    let Some(_lock) = at_work::lock(host, &node, patience)? else {
        return Ok(Some(Repair::InProgress));
    };
    // The process that was at work may be done by now, and have given the snapshot another COW file.
    let Some((snapshot, layers)) = surroundings(host, uuid, is_layer)? else {
        return Ok(None);
    };
    let Some(plan) = plan(&snapshot, &layers) else {
        return Ok(None);
    };
    if snapshot.lock_node().as_ref() != Some(&node) {
        return Ok(Some(Repair::InProgress));
    }
    let path = Path::new(MAPPER_DIR).join(&snapshot.device.name);
    match plan {
        Plan::Irreparable(why) => Err(Refusal::Irreparable {
            name: snapshot.device.name,
            why,
        }
        .into()),
        Plan::Forward(layer) => {
            let dev = snapshot.device.number;
            let flushes_end = snapshot
                .live
                .is_some_and(|table| ends_flushes(host, dev, table.cow));
            resume(host, uuid, &path)?;
            if flushes_end {
                // Where it fails, flushes reach the COW file: it takes longer, and nothing is lost.
                let _ = end_flushes(host, dev, &path);
            }
            finish(host, layer)?;
            Ok(Some(Repair::Finished))
        }
        Plan::Rebuild(layer) => {
            rebuild(host, &snapshot, layer)?;
            finish(host, layer)?;
            Ok(Some(Repair::Finished))
        }
        Plan::Back {
            clear,
            layer,
            resume: suspended,
        } => {
            if let Some(layer) = layer {
                if made_by_the_living(host, layer, &node, patience)? {
                    return Ok(Some(Repair::InProgress));
                }
            }
            if clear {
                ask_unobserved(Step::Clear, &path, || host.clear(uuid))?;
            }
            if let Some(layer) = layer {
                remove_layer(host, layer)?;
            }
            if suspended {
                resume(host, uuid, &path)?;
            }
            Ok(Some(match (clear, layer) {
                (false, None) => Repair::Resumed,
                _ => Repair::Undone,
            }))
        }
    }
}

/// True if the process that makes the layer is alive: it has locked the next COW file's loop device too, which the
/// layer's uuid names.
fn made_by_the_living<H: Host>(
    host: &H,
    layer: &Seen,
    held: &Path,
    patience: &Retry,
) -> Result<bool> {
    let node = layer.uuid.cow_loop().map(loop_node);
    match node.filter(|node| node != held) {
        Some(node) => at_work::is_locked(host, &node, patience),
        None => Ok(false),
    }
}

fn remove_layer<H: Host>(host: &H, layer: &Seen) -> Result<()> {
    let path = Path::new(MAPPER_DIR).join(&layer.device.name);
    if host.is_our_alias(&path) {
        let unlink = || host.remove_alias(&path, layer.device.number);
        ask_unobserved(Step::Unlink, &path, unlink)?;
    }
    let address = Address::Uuid(layer.uuid.as_str());
    let removed = patiently(host, &LAYER_RETRY, Verdict::Busy, || {
        ask_unobserved(Step::Remove, &path, || host.remove(address, false))
    });
    absent(removed).map(drop)
}

/// Repairs a layer whose snapshot needs nothing.
fn mend_layer<H: Host>(host: &H, uuid: &DeviceUuid, patience: &Retry) -> Result<Option<Repair>> {
    let Some((layer, step)) = layer_step(host, uuid)? else {
        return Ok(None);
    };
    let table = layer.live.or(layer.inactive);
    let cow = table.filter(|table| table.cow.major() == 7);
    let nodes = [cow.map(|table| table.cow.minor()), uuid.cow_loop()];
    for number in nodes.into_iter().flatten() {
        if at_work::is_locked(host, &loop_node(number), patience)? {
            return Ok(Some(Repair::InProgress));
        }
    }
    // The process that made it may have finished before its locks were looked at.
    match layer_step(host, uuid)? {
        Some((layer, now)) if now == step => {
            match step {
                LayerStep::Remove => remove_layer(host, &layer)?,
                LayerStep::Resume => {
                    let path = Path::new(MAPPER_DIR).join(&layer.device.name);
                    resume(host, uuid, &path)?;
                }
                LayerStep::Finish => finish(host, &layer)?,
            }
            Ok(Some(match step {
                LayerStep::Remove => Repair::Undone,
                LayerStep::Resume => Repair::Resumed,
                LayerStep::Finish => Repair::Finished,
            }))
        }
        _ => Ok(None),
    }
}

/// Does what a checkpoint does after its pause: a layer that is to be kept gets its alias, and of another one the kernel
/// is told to remove it with its last user. That one gets no alias, as the kernel would not remove it.
fn finish<H: Host>(host: &H, layer: &Seen) -> Result<()> {
    if is_finished(host, &layer.device) {
        return Ok(());
    }
    mark_frozen(host, layer)?;
    let path = Path::new(MAPPER_DIR).join(&layer.device.name);
    if layer.uuid.is_kept() {
        let number = layer.device.number;
        let node = host.find_node(number);
        return ask(Step::Link, &path, || {
            host.make_alias(&path, number, node.as_deref())
        });
    }
    let address = Address::Uuid(layer.uuid.as_str());
    let flag = || host.remove(address, true);
    absent(ask(Step::Remove, &path, flag)).map(drop)
}

/// Marks the COW file as a layer's, if it can be reached and has a place in a stack.
fn mark_frozen<H: Host>(host: &H, layer: &Seen) -> Result<()> {
    let Some(table) = &layer.live else {
        return Ok(());
    };
    let Some(bound) = absent(find::bound(host, table.cow))? else {
        return Ok(());
    };
    let (file, facts) = match find::reach(host, &bound, &layer.device.name, true) {
        Err(Error::Refused(_)) => return Ok(()),
        reached => reached?,
    };
    let cow = Backing {
        path: &bound.path,
        file,
        facts,
        above: None,
    };
    let header = match probe_store(host, &cow) {
        Err(Error::Refused(_)) => return Ok(()),
        probed => probed?,
    };
    match header.and_then(|header| header.chain) {
        Some(chain) if !chain.frozen => ask(Step::MarkFile, cow.path, || {
            let frozen = store::chain(Chain {
                frozen: true,
                ..chain
            });
            host.write_at(&cow.file, &frozen, CHAIN_AT)
        }),
        _ => Ok(()),
    }
}
