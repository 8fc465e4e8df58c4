//! An overflowed snapshot that is made anew over a longer COW file.

use super::build::check_target;
use super::create::create;
use super::grow::lengthen;
use super::{GrowOptions, Snapshot, SnapshotOptions};
use crate::backing::check_identity;
use crate::base::{DeviceId, DeviceName, Durability, SectorSize};
use crate::call::{ask, ends_flushes};
use crate::dm::{Discard, SnapshotStatus};
use crate::error::{Error, Refusal, Result, Step, policy};
use crate::find::{bound, live, reach, whole};
use crate::kernel::Host;
use crate::teardown::{Subject, When, remove_subject};

/// Everything that can be known to fail is asked for while the old device is still there.
pub(crate) fn recover_on<H: Host>(
    host: &H,
    options: &GrowOptions,
    device: &DeviceId,
    bytes: u64,
) -> Result<Snapshot> {
    let live = live(host, device)?;
    let name = DeviceName::new(live.device.name.as_str())?;
    let text = || name.to_string();
    match live.status {
        SnapshotStatus::Overflow => (),
        SnapshotStatus::Invalid => return Err(Refusal::Invalid { name: text() }.into()),
        _ => return Err(Refusal::NotOverflowed { name: text() }.into()),
    }
    let mut anew = SnapshotOptions::new();
    anew.store(live.params.store)
        .chunk_size(live.params.chunk)
        .direct_io(live.cow.status.direct_io)
        .discard(live.params.discard != Discard::Unsupported);
    if ends_flushes(host, live.device.number, live.params.cow) {
        anew.durability(Durability::Processes);
    }
    let sectors = || host.loop_sector_bytes(&live.cow.device);
    if ask(Step::SizeLoop, &live.cow.node, sectors)? == SectorSize::Bytes4096.bytes() {
        anew.sector_size(SectorSize::Bytes4096);
    }
    anew.cow.expected_origin = live.uuid.origin();
    anew.cow.known_origin = true;
    check_target(host, &anew)?;
    let origin = bound(host, live.params.origin)?;
    whole(&origin)?;
    let (_, facts) = reach(host, &origin, name.as_str(), false)?;
    check_identity(
        &origin.path,
        facts.identity(),
        anew.cow.expected_origin,
        anew.cow.any_origin,
    )?;
    lengthen(host, options, &live, bytes)?;

    // Open, the loop devices would outlive the dm device, and with them the COW file's lock.
    drop((origin.device, live.cow.device));
    let (origin, cow) = (origin.path, live.cow.path);
    let subject = Subject::ours(live.uuid, &name);
    remove_subject(host, &subject, &options.retry, When::Now)?;
    create(host, &anew, &origin, &cow, &name).map_err(|error| {
        let failed = match error {
            // A refusal says that no device was touched.
            Error::Refused(refusal) => {
                let failed = Error::failed(Step::Create, name.mapper_path(), policy::NOT_REMADE);
                failed.noted(refusal.to_string())
            }
            error => error,
        };
        failed.noted("the overflowed device is removed, and its COW file has everything")
    })
}
