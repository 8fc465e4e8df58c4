//! A running snapshot: what is behind it, and the flush.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use super::{ExportOptions, ExportProgress, Exported, Source};
use crate::backing::{Backing, open_origin, open_unlocked};
use crate::base::{DeviceId, DeviceUuid, Kind, MAPPER_DIR};
use crate::call::{ask, patiently};
use crate::dm::{Address, SnapshotParams, SnapshotStatus};
use crate::error::{Error, Leftover, Refusal, Result, Retry, Step, Verdict, errno_of, policy};
use crate::find;
use crate::find::{LoopFacts, SnapshotInfo, State};
use crate::kernel::{DeviceMapper, Host, MACHINE};

pub(super) fn export(
    options: &ExportOptions,
    snapshot: &DeviceId,
    output: &Path,
    progress: &mut dyn FnMut(ExportProgress) -> ControlFlow<()>,
) -> Result<Option<Exported>> {
    let info = find::status_of(&MACHINE, snapshot)?;
    let params = exportable(&info)?;
    let origin = path_of(&info, info.origin.as_ref())?;
    let cow = path_of(&info, info.cow.as_ref())?;
    let origin = open_origin(&MACHINE, origin, &options.origin_options())?;
    let cow = open_unlocked(&MACHINE, cow)?;
    same_file(&origin, info.origin.as_ref(), &info)?;
    same_file(&cow, info.cow.as_ref(), &info)?;

    let mapper = Path::new(MAPPER_DIR).join(&info.name);
    write_back(&info)?;
    let status = flush(&MACHINE, &info.uuid, &mapper)?;
    let end = free_chunk(status, params);
    let source = Source { origin, cow, end };
    // A COW file whose snapshot was taken down while it was read may have been anything.
    source.export(options, output, progress, || {
        ask(Step::Query, &mapper, || {
            let device = MACHINE.query(Address::Uuid(info.uuid.as_str()))?;
            let another = info.uuid.kind() == Kind::Pooled && device.name != info.name;
            if another { Err(policy::GONE) } else { Ok(()) }
        })
    })
}

fn exportable(info: &SnapshotInfo) -> Result<&SnapshotParams> {
    match (info.state, &info.params) {
        // Resuming it would end somebody else's suspension.
        (State::Suspended, _) => Err(not_exportable(info, "it is suspended")),
        (State::Live, Some(params)) if params.store.is_persistent() => Ok(params),
        (State::Live, Some(_)) => Err(not_exportable(info, "its store is transient")),
        _ => Err(not_exportable(info, "it has no live table")),
    }
}

fn not_exportable(info: &SnapshotInfo, why: &'static str) -> Error {
    let name = info.name.clone();
    Refusal::NotExportable { name, why }.into()
}

fn path_of<'a>(info: &SnapshotInfo, facts: Option<&'a LoopFacts>) -> Result<&'a Path> {
    let path = facts.and_then(|facts| facts.path.as_deref());
    path.ok_or_else(|| not_exportable(info, "its loop devices cannot be read"))
}

/// The kernel tells the path that the file was opened by; what is there now may be another one.
fn same_file<F>(
    found: &Backing<'_, F>,
    facts: Option<&LoopFacts>,
    info: &SnapshotInfo,
) -> Result<()> {
    let expected = facts.and_then(|facts| facts.backing);
    if expected.is_some_and(|expected| expected == found.facts.id) {
        return Ok(());
    }
    Err(Refusal::FileElsewhere {
        name: info.name.clone(),
        path: found.path.to_owned(),
    }
    .into())
}

/// Has the host write out what it has cached of the device, before anything is suspended for it: a VMM that opens the
/// disk without O_DIRECT has its guest's flushed writes there.
fn write_back(info: &SnapshotInfo) -> Result<()> {
    let device = info.dev.dm_node();
    let opened =
        File::open(&device).or_else(|_| File::open(Path::new(MAPPER_DIR).join(&info.name)));
    opened
        .and_then(|opened| opened.sync_all())
        .map_err(|error| Error::failed(Step::SyncFile, device, errno_of(&error)))
}

/// Suspends the snapshot and resumes it: when a suspension is complete, every write before it is in the COW file, and
/// the store's metadata says so. Returns the status in between.
pub(crate) fn flush<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
    mapper: &Path,
) -> Result<Option<SnapshotStatus>> {
    ask(Step::Suspend, mapper, || host.suspend(uuid))?;
    let status = ask(Step::Status, mapper, || host.status(uuid));
    // Nothing may come between this and the suspension that could fail or wait.
    let resumed = patiently(host, &RESUME_RETRY, Verdict::Exhausted, || {
        ask(Step::Resume, mapper, || host.resume(uuid))
    });
    if let Err(error) = resumed {
        let left = vec![Leftover::new(mapper, error.clone())];
        return Err(error.leaving(left));
    }
    Ok(status?.map(|(_, text)| {
        let Ok(status) = text.parse();
        status
    }))
}

/// A guest waits meanwhile, for ever if this gives up.
const RESUME_RETRY: Retry = Retry::until(Duration::from_secs(10));

/// The COW chunk that the kernel would have given out next at the flush. Exceptions into chunks before it were complete
/// then, and their entries do not change any more; one behind it may be half written when it is read.
fn free_chunk(status: Option<SnapshotStatus>, params: &SnapshotParams) -> Option<u64> {
    match status {
        Some(SnapshotStatus::Usage(usage)) => {
            Some(usage.allocated.count() / params.chunk.sectors().count())
        }
        // Invalid or full: nothing is added to it.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::base::DeviceName;
    use crate::kernel::fake::Script;

    const MAPPER: &str = "/dev/mapper/vm";

    fn live_device(script: &Script) -> DeviceUuid {
        let uuid = DeviceUuid::new("DMSNAP-1").expect("ours");
        let name = DeviceName::new("vm").expect("a name");
        script.create(&name, &uuid).expect("nothing fails");
        script.resume(&uuid).expect("nothing fails");
        uuid
    }

    fn suspended(script: &Script, uuid: &DeviceUuid) -> bool {
        script.restart(|_, _| None);
        let device = script.query(Address::Uuid(uuid.as_str()));
        device.expect("it is there").suspended
    }

    #[test]
    fn whichever_call_of_a_flush_fails_the_device_is_resumed() {
        for (failing, calls) in [
            (None, vec![Step::Suspend, Step::Status, Step::Resume]),
            (Some(Step::Suspend), vec![Step::Suspend]),
            (
                Some(Step::Status),
                vec![Step::Suspend, Step::Status, Step::Resume],
            ),
        ] {
            let script = Script::new(|_, _| None);
            let uuid = live_device(&script);
            script.restart(move |step, _| (Some(step) == failing).then_some(Errno::EIO));
            let flushed = flush(&script, &uuid, Path::new(MAPPER));
            assert_eq!(*script.calls.borrow(), calls);
            match (failing, flushed) {
                (None, flushed) => assert!(flushed.is_ok(), "{flushed:?}"),
                (Some(step), Err(Error::Failed { step: found, .. })) => assert_eq!(found, step),
                (Some(_), other) => panic!("{other:?}"),
            }
            assert!(!suspended(&script, &uuid));
        }
    }

    #[test]
    fn a_resume_is_tried_again_and_named_as_debris_when_it_fails_for_good() {
        let script = Script::new(|_, _| None);
        let uuid = live_device(&script);
        let first = |step, nth| (step == Step::Resume && nth < 9).then_some(Errno::ENOMEM);
        script.restart(first);
        flush(&script, &uuid, Path::new(MAPPER)).expect("memory came back");
        assert!(!suspended(&script, &uuid));

        script.restart(|step, _| (step == Step::Resume).then_some(Errno::EIO));
        let error = flush(&script, &uuid, Path::new(MAPPER)).expect_err("never resumed");
        let left: Vec<_> = error
            .left()
            .iter()
            .map(|left| left.object.clone())
            .collect();
        assert_eq!(left, [Path::new(MAPPER)]);
        assert!(suspended(&script, &uuid));
    }
}
