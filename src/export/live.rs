//! Exports a running snapshot: finds its files and flushes it first.

use std::ops::ControlFlow;
use std::path::Path;

use super::{ExportOptions, Exported, Source};
use crate::backing::{Backing, open_origin, open_unlocked};
use crate::base::{DeviceId, DeviceUuid, MAPPER_DIR, Progress};
use crate::call::{ask, ask_unobserved, resume};
use crate::dm::{SnapshotParams, SnapshotStatus};
use crate::error::{Error, ExportObstacle, Leftover, Refusal, Result, Retry, Step, Verdict};
use crate::find;
use crate::find::{LoopFacts, SnapshotInfo, State, at_work, whole_file};
use crate::kernel::Host;

pub(super) fn export<H: Host>(
    host: &H,
    options: &ExportOptions,
    snapshot: &DeviceId,
    output: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Exported>> {
    let info = find::status_of(host, snapshot)?;
    let mut flushed = flushed(host, options, &info)?;
    // The COW file may have been grown while this waited.
    let inspect = || host.inspect_file(&flushed.cow.file);
    flushed.cow.facts = ask(Step::InspectFile, flushed.cow.path, inspect)?;
    let source = Source {
        host,
        origin: flushed.origin,
        cows: vec![flushed.cow],
        end: flushed.end,
        live: true,
    };
    // If the snapshot was taken down while its COW file was read, the file may hold anything by now.
    source.export(options, output, progress, || {
        find::still(host, &info.uuid, &info.name)
    })
}

/// The files behind a snapshot that was flushed.
struct Flushed<'a, F> {
    origin: Backing<'a, F>,
    cow: Backing<'a, F>,
    /// The COW chunk from which on the store is not read.
    end: Option<u64>,
}

/// Opens the files behind the snapshot, and flushes it.
fn flushed<'a, H: Host>(
    host: &H,
    options: &ExportOptions,
    info: &'a SnapshotInfo,
) -> Result<Flushed<'a, H::File>> {
    let params = exportable(info)?;
    for facts in [&info.origin, &info.cow].into_iter().flatten() {
        let path = facts.path.as_deref().unwrap_or(&facts.device);
        whole_file(&facts.device, path, facts.part_bytes.unwrap_or_default())?;
    }
    let origin = path_of(info, info.origin.as_ref())?;
    let cow = path_of(info, info.cow.as_ref())?;
    let elsewhere = |path: &Path, error: Error| match error.verdict() {
        Some(Verdict::Missing) => file_elsewhere(info, path),
        _ => error,
    };
    let opened = open_origin(host, origin, &options.origin_options());
    let origin = opened.map_err(|error| elsewhere(origin, error))?;
    let cow = open_unlocked(host, cow).map_err(|error| elsewhere(cow, error))?;
    same_file(&origin, info.origin.as_ref(), info)?;
    same_file(&cow, info.cow.as_ref(), info)?;
    // One flush at a time: the second one's resume would end the first one's suspension early. The kernel frees the
    // lock with its holder.
    let node = info.cow.as_ref().map(|facts| facts.device.as_path());
    let node = node.unwrap_or(Path::new(""));
    let held = ask(Step::OpenLoop, node, || host.open_loop(node, false))?;
    let retry = options.deadline.map_or_else(Retry::default, Retry::until);
    if !at_work::take(host, &held, node, &retry)? {
        let name = info.name.clone();
        return Err(Refusal::AtWork { name }.into());
    }
    let mapper = Path::new(MAPPER_DIR).join(&info.name);
    write_back(host, info, &mapper)?;
    let status = flush(host, &info.uuid, &mapper)?;
    let end = free_chunk(status, params);
    Ok(Flushed { origin, cow, end })
}

fn exportable(info: &SnapshotInfo) -> Result<&SnapshotParams> {
    match (info.state, &info.params) {
        // Resuming it would end somebody else's suspension.
        (State::Suspended, _) => Err(not_exportable(info, ExportObstacle::Suspended)),
        (State::Live, Some(params)) if params.store.is_persistent() => Ok(params),
        (State::Live, Some(_)) => Err(not_exportable(info, ExportObstacle::Transient)),
        _ => Err(not_exportable(info, ExportObstacle::NoLiveTable)),
    }
}

fn not_exportable(info: &SnapshotInfo, why: ExportObstacle) -> Error {
    let name = info.name.clone();
    Refusal::NotExportable { name, why }.into()
}

fn path_of<'a>(info: &SnapshotInfo, facts: Option<&'a LoopFacts>) -> Result<&'a Path> {
    let path = facts.and_then(|facts| facts.path.as_deref());
    path.ok_or_else(|| not_exportable(info, ExportObstacle::LoopsUnreadable))
}

/// Refuses a file that is not the one behind the loop device: the kernel tells the path by which that was opened, where
/// another file may be by now.
fn same_file<F>(
    found: &Backing<'_, F>,
    facts: Option<&LoopFacts>,
    info: &SnapshotInfo,
) -> Result<()> {
    let expected = facts.and_then(|facts| facts.backing);
    if expected.is_some_and(|expected| expected == found.facts.id) {
        return Ok(());
    }
    Err(file_elsewhere(info, found.path))
}

fn file_elsewhere(info: &SnapshotInfo, path: &Path) -> Error {
    Refusal::FileElsewhere {
        name: info.name.clone(),
        path: path.to_owned(),
    }
    .into()
}

/// Syncs the host's page cache of the device before the device is suspended: a VMM that opens the disk without O_DIRECT
/// has its guest's flushed writes there.
fn write_back<H: Host>(host: &H, info: &SnapshotInfo, mapper: &Path) -> Result<()> {
    let node = host.find_node(info.dev);
    let node = node.as_deref().unwrap_or(mapper);
    let device = ask(Step::OpenFile, node, || host.open_backing(node, false))?;
    ask(Step::SyncFile, node, || host.sync_file(&device))
}

/// Suspends the snapshot and resumes it: when a suspension is complete, every write before it is in the COW file, and
/// the store's metadata says so. Returns the status in between.
pub(crate) fn flush<H: Host>(
    host: &H,
    uuid: &DeviceUuid,
    mapper: &Path,
) -> Result<Option<SnapshotStatus>> {
    ask_unobserved(Step::Suspend, mapper, || host.suspend(uuid))?;
    let status = ask_unobserved(Step::Status, mapper, || host.status(uuid));
    // Nothing may come between this and the suspension that could fail or wait.
    if let Err(error) = resume(host, uuid, mapper) {
        let left = vec![Leftover::new(mapper, error.clone())];
        return Err(error.leaving(left));
    }
    Ok(status?.map(|(_, text)| {
        let Ok(status) = text.parse();
        status
    }))
}

/// Returns the COW chunk that the kernel would have used next at the flush. Exceptions that point before it were
/// complete then, and their entries do not change any more; later ones may be half written when they are read.
fn free_chunk(status: Option<SnapshotStatus>, params: &SnapshotParams) -> Option<u64> {
    match status {
        Some(SnapshotStatus::Usage(usage)) => {
            Some(usage.allocated.count() / params.chunk.sectors().count())
        }
        // An invalid or full store gets no new exceptions.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::base::DeviceName;
    use crate::dm::Address;
    use crate::kernel::DeviceMapper;
    use crate::kernel::fake::Script;
    use crate::kernel::fake::world::CHUNK;
    use crate::snapshot::{SnapshotOptions, create};

    const MAPPER: &str = "/dev/mapper/vm";
    const OUT: &str = "/exports/out";

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

    /// A machine with a live snapshot, and what a list says of it.
    fn snapshot(
        fault: impl Fn(Step, usize) -> Option<Errno> + Send + Sync + 'static,
    ) -> (Script, SnapshotInfo) {
        let script = Script::new(|_, _| None);
        let name = DeviceName::new("vm").expect("a name");
        let (image, cow) = (Path::new("/image"), Path::new("/cow"));
        let options = SnapshotOptions::new();
        let _ = create(&script, &options, image, cow, &name).expect("nothing fails");
        let info = find::status_of(&script, &DeviceId::from("vm")).expect("it is there");
        script.restart(fault);
        (script, info)
    }

    #[test]
    fn whichever_call_up_to_the_flush_fails_the_error_names_it_and_nothing_stays_suspended() {
        let options = ExportOptions::new();
        let (script, info) = snapshot(|_, _| None);
        flushed(&script, &options, &info).expect("nothing fails");
        let calls = script.calls.take();
        assert_eq!(calls.len(), 12, "{calls:?}");
        for (index, step) in calls.iter().enumerate() {
            let (script, info) = snapshot(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
            let before = script.world.borrow().residue();
            let error = flushed(&script, &options, &info).map(drop);
            let error = error.expect_err("one call failed");
            if *step == Step::Resume {
                assert_eq!(error.left()[0].object, Path::new(MAPPER));
                assert!(suspended(&script, &info.uuid));
                continue;
            }
            let Error::Failed { step: named, .. } = &error else {
                panic!("{error}");
            };
            // The fake knows a lock by one step.
            let named = if *named == Step::TestLock {
                Step::LockLoop
            } else {
                *named
            };
            assert_eq!(named, *step, "call {index}");
            assert!(!suspended(&script, &info.uuid));
            assert_eq!(script.world.borrow().residue(), before);
        }
    }

    #[test]
    fn who_is_at_work_is_waited_for_to_the_deadline_and_named() {
        let locked = |step, _| (step == Step::LockLoop).then_some(Errno::EWOULDBLOCK);
        let (script, info) = snapshot(locked);
        let mut options = ExportOptions::new();
        options.deadline(std::time::Duration::ZERO);
        let error = flushed(&script, &options, &info).map(drop);
        let name = info.name.clone();
        assert_eq!(error, Err(Refusal::AtWork { name }.into()));
        let calls = script.calls.take();
        let asked = calls.iter().filter(|step| **step == Step::LockLoop);
        assert_eq!(asked.count(), 1, "{calls:?}");
        assert!(!suspended(&script, &info.uuid));
    }

    /// A machine with a live snapshot whose COW file holds a store.
    fn machine() -> Script {
        let (script, _) = snapshot(|_, _| None);
        let mut store = vec![0; 4 * CHUNK];
        for (nth, word) in [0x7041_6e53u32, 1, 1, 8].iter().enumerate() {
            store[nth * 4..nth * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        // The origin's chunk 7 is in the COW file's chunk 2.
        (store[CHUNK], store[CHUNK + 8], store[2 * CHUNK]) = (7, 2, b'x');
        script.world.borrow_mut().store = store;
        script.world.borrow_mut().missing.insert(OUT.into());
        script.world.borrow_mut().status = Some("24/2048 16");
        script
    }

    fn export_on(script: &Script) -> Result<Option<Exported>> {
        let (vm, out) = (DeviceId::from("vm"), Path::new(OUT));
        let go_on = &mut |_| ControlFlow::Continue(());
        export(
            script,
            ExportOptions::new().any_origin(true),
            &vm,
            out,
            go_on,
        )
    }

    /// The fake reports some steps by the kernel's call alone.
    fn may_be_called(named: Step, call: Step) -> bool {
        named == call
            || matches!(
                (named, call),
                (Step::TestLock, Step::LockLoop)
                    | (Step::InspectLoop, Step::OpenLoop)
                    | (Step::WriteFile, Step::SizeFile)
            )
    }

    #[test]
    fn whichever_call_of_a_live_export_fails_no_output_is_left_and_nothing_stays_suspended() {
        let uuid = |script: &Script| {
            let uuids: Vec<_> = script.world.borrow().devices.keys().cloned().collect();
            DeviceUuid::new(uuids[0].as_str()).expect("ours")
        };
        let script = machine();
        script.restart(|_, _| None);
        let done = export_on(&script).expect("nothing fails");
        assert_eq!(done.map(|done| done.changed_bytes), Some(4096));
        let calls = script.calls.take();
        assert_eq!(calls.len(), 42, "{calls:?}");
        let mut all_the_same = Vec::new();
        for (index, step) in calls.iter().enumerate() {
            let script = machine();
            let before = script.world.borrow().residue();
            script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
            let result = export_on(&script);
            let mut after = script.world.borrow().residue();
            match result {
                Ok(_) => {
                    all_the_same.push(*step);
                    assert!(after.remove(Path::new(OUT)));
                }
                Err(Error::Debris { left, .. }) => {
                    assert_eq!(
                        (*step, left[0].object.as_path()),
                        (Step::Resume, Path::new(MAPPER))
                    );
                    assert!(suspended(&script, &uuid(&script)));
                    continue;
                }
                Err(Error::Failed { step: named, .. }) => {
                    assert!(
                        may_be_called(named, *step),
                        "call {index}: {named:?}, {step:?}"
                    );
                    // The last call of all: the output has its name, and its directory is not synced.
                    if index + 1 == calls.len() {
                        assert!(after.remove(Path::new(OUT)));
                    }
                }
                // Of a loop device that cannot be read it is not known what is behind it.
                Err(Error::Refused(
                    Refusal::FileElsewhere { .. }
                    | Refusal::NotExportable {
                        why: ExportObstacle::LoopsUnreadable,
                        ..
                    },
                )) if matches!(step, Step::InspectLoop | Step::OpenLoop) => (),
                Err(other) => panic!("call {index}, {step:?}: {other}"),
            }
            assert_eq!(after, before, "call {index}, {step:?}");
            assert!(
                !suspended(&script, &uuid(&script)),
                "call {index}, {step:?}"
            );
        }
        // A binding without its number, a file system without nameless files, and one that has data everywhere.
        all_the_same.dedup();
        assert_eq!(
            all_the_same,
            [Step::ReadDiskseq, Step::MakeFile, Step::FindData]
        );
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
