//! Has a layer read its exceptions from its COW file again.

use std::path::Path;

use super::interrupted::{LAYER_RETRY, Plan, Seen, Table, is_layer, plan, surroundings};
use crate::base::{DeviceUuid, MAPPER_DIR, Sectors};
use crate::call::{ask, ask_unobserved, patiently, resume};
use crate::dm::{SnapshotParams, SnapshotStatus, Target, TargetLine};
use crate::error::{Refusal, RepairObstacle, Result, Step, Verdict};
use crate::kernel::{DevId, Host};

/// Rebuilds the layer that the snapshot stands on, if somebody resumed the snapshot before the layer had the exceptions:
/// then reads of the snapshot fail, and the layer's COW file has all the data. The caller has the snapshot's lock.
/// Returns true if the layer was rebuilt.
pub(crate) fn rebuilt<H: Host>(host: &H, uuid: &DeviceUuid) -> Result<bool> {
    let Some((snapshot, layers)) = surroundings(host, uuid, is_layer)? else {
        return Ok(false);
    };
    match plan(&snapshot, &layers) {
        Some(Plan::Rebuild(layer)) => rebuild(host, &snapshot, layer).map(|()| true),
        _ => Ok(false),
    }
}

/// Has a layer read its exceptions from its COW file, under the snapshot that stands on it, which is suspended meanwhile.
///
/// A table that is loaded beside one of the same COW file waits for that one's exceptions, so the layer's tables have to
/// go before; and with its last user a loop device loses its file. So another table takes their place for the moment,
/// which fails all I/O and holds both devices. From it the next repair knows what the layer is made of.
pub(super) fn rebuild<H: Host>(host: &H, snapshot: &Seen, layer: &Seen) -> Result<()> {
    let irreparable = |why| Refusal::Irreparable {
        name: snapshot.device.name.clone(),
        why,
    };
    let path = |seen: &Seen| Path::new(MAPPER_DIR).join(&seen.device.name);
    let (upper, lower) = (path(snapshot), path(layer));
    let table = layer.live.or(layer.inactive);
    let Table { origin, cow } =
        table.ok_or_else(|| irreparable(RepairObstacle::LayerWithoutTable))?;
    // The checkpoint gave both tables the same store, chunk size and way with discards.
    let above = || host.table(DevId::Uuid(&snapshot.uuid), false);
    let above = ask(Step::Status, &upper, above)?;
    let params = match above.map(|(kind, text)| Target::parse(&kind, &text)) {
        Some(Ok(Target::Snapshot(params))) => SnapshotParams {
            origin,
            cow,
            ..params
        },
        _ => return Err(irreparable(RepairObstacle::TableUnreadable).into()),
    };
    let own = ask(Step::Status, &upper, || host.status(&snapshot.uuid))?;
    if own.is_some_and(|(_, text)| text.parse() == Ok(SnapshotStatus::Invalid)) {
        return Err(irreparable(RepairObstacle::WriteFailed).into());
    }
    let identity = layer.uuid.origin();
    let identity = identity.ok_or_else(|| irreparable(RepairObstacle::ImageUnknown))?;
    let length = Sectors::from_bytes_floor(identity.size_bytes);

    if !snapshot.device.suspended {
        // The flush would wait for I/O that a suspended layer holds back.
        if layer.device.suspended && layer.live.is_some() {
            resume(host, &layer.uuid, &lower)?;
        }
        ask_unobserved(Step::Suspend, &upper, || host.suspend(&snapshot.uuid))?;
    }
    ask_unobserved(Step::Load, &lower, || {
        host.park(&layer.uuid, length, [origin, cow])
    })?;
    let swap = || -> Result<()> {
        if layer.live.is_some() {
            ask_unobserved(Step::Suspend, &lower, || host.suspend(&layer.uuid))?;
        }
        resume(host, &layer.uuid, &lower)
    };
    if layer.live.is_some() {
        swap()?;
    }
    let line = TargetLine {
        start: Sectors::default(),
        length,
        target: Target::Snapshot(params),
    };
    let loaded = patiently(host, &LAYER_RETRY, Verdict::Exhausted, || {
        ask_unobserved(Step::Load, &lower, || host.load(&layer.uuid, &line))
    });
    loaded?;
    swap()?;
    resume(host, &snapshot.uuid, &upper)
}
