//! Every call of a merge failed in turn.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{MergeOptions, MergeOutcome, Progress, merge};
use crate::base::OriginIdentity;
use crate::error::{Error, Refusal, Result, Step};
use crate::kernel::fake::Script;
use crate::kernel::fake::world::*;
use crate::store::{MARK_AT, Probe, StoreFault, mark, probe};

const ORIGIN: &str = "/image";
const COW: &str = "/cow";
/// The inodes that the script gives these paths.
const ORIGIN_INODE: u64 = 6;

/// A machine whose COW file holds a store of three exceptions, marked as made over the image.
fn machine() -> Script {
    let script = Script::new(|_, _| None);
    let mut store = vec![0; 8 * CHUNK];
    for (nth, word) in [0x7041_6e53u32, 1, 1, 8].iter().enumerate() {
        store[nth * 4..nth * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    for nth in 0..3u8 {
        let at = CHUNK + 16 * usize::from(nth);
        store[at] = 7 * nth;
        store[at + 8] = 2 + nth;
    }
    let origin = OriginIdentity {
        size_bytes: 1 << 20,
        mtime_ns: 1,
    };
    store[MARK_AT..MARK_AT + 64].copy_from_slice(&mark(origin, None));
    script.world.borrow_mut().store = store;
    script
}

fn merge_on(script: &Script) -> Result<MergeOutcome> {
    merge_until(script, |_| ControlFlow::Continue(()))
}

fn merge_until(
    script: &Script,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<MergeOutcome> {
    let (origin, cow) = (Path::new(ORIGIN), Path::new(COW));
    merge(script, &MergeOptions::new(), origin, cow, &mut progress)
}

/// What the COW file is marked with: the modification time, and whether a merge is under way.
fn marked(script: &Script) -> (i64, bool) {
    let world = script.world.borrow();
    let Probe::Store(header) = probe(&world.store[..CHUNK]) else {
        panic!("a store");
    };
    let origin = header.origin.expect("it is marked");
    (origin.mtime_ns, header.merging_into.is_some())
}

fn mtime(script: &Script) -> i64 {
    let world = script.world.borrow();
    world.mtimes.get(&ORIGIN_INODE).copied().unwrap_or(1)
}

fn calls_of_a_merge() -> Vec<Step> {
    let script = machine();
    let merged_bytes = 24 * 512;
    assert_eq!(
        merge_on(&script),
        Ok(MergeOutcome::Complete { merged_bytes })
    );
    assert_eq!(script.world.borrow().residue(), BTreeSet::new());
    assert_eq!(marked(&script), (mtime(&script), false));
    script.calls.take()
}

#[test]
fn whichever_call_of_a_merge_fails_what_is_left_is_named_and_a_later_merge_goes_on() {
    let calls = calls_of_a_merge();
    let resumes = |each: &Step| *each == Step::Resume;
    let resumed = calls.iter().position(resumes).expect("it resumes");
    for (index, step) in calls.iter().enumerate() {
        let script = machine();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let error = merge_on(&script).expect_err("one call failed");
        let (failed, left) = match &error {
            Error::Debris { left, source } => (source.as_ref(), left.as_slice()),
            other => (other, [].as_slice()),
        };
        // Taking down opens loop devices too, to inspect them.
        let named = |name| matches!(failed, Error::Failed { step, .. } if *step == name);
        let named = named(*step) || (*step == Step::OpenLoop && named(Step::InspectLoop));
        assert!(named, "call {index}, {step:?}: {error:?}");
        let left: BTreeSet<_> = left.iter().map(|each| each.object.clone()).collect();
        let residue = script.world.borrow().residue();
        assert!(residue.is_subset(&left), "call {index}, {step:?}: {left:?}");
        if index <= resumed {
            let as_before = (mtime(&script), marked(&script));
            assert_eq!(as_before, (1, (1, false)), "after call {index}, {step:?}");
        }
        if residue.is_empty() {
            script.restart(|_, _| None);
            let again = merge_on(&script);
            assert!(
                matches!(again, Ok(MergeOutcome::Complete { .. })),
                "after call {index}, {step:?}: {again:?}"
            );
            assert_eq!(marked(&script), (mtime(&script), false));
        }
    }
}

#[test]
fn a_merge_that_is_stopped_says_what_is_left() {
    let script = machine();
    let mut seen = Vec::new();
    let stopped = merge_until(&script, |progress| {
        seen.push(progress.done_bytes / 512);
        ControlFlow::Break(())
    });
    let (merged_bytes, left_bytes) = (8 * 512, 16 * 512);
    assert_eq!(
        stopped,
        Ok(MergeOutcome::Stopped {
            merged_bytes,
            left_bytes
        })
    );
    assert_eq!(seen, [8]);
    assert_eq!(script.world.borrow().residue(), BTreeSet::new());
    assert_eq!(marked(&script), (mtime(&script), false));
    let rest = MergeOutcome::Complete {
        merged_bytes: left_bytes,
    };
    assert_eq!(merge_on(&script), Ok(rest));
}

#[test]
fn a_merge_that_was_cut_off_goes_on_over_its_own_image_only() {
    let cut_off = |inode, mtime| {
        let script = machine();
        let began = OriginIdentity {
            size_bytes: 1 << 20,
            mtime_ns: 1000,
        };
        let mark = mark(began, Some(inode));
        let mut world = script.world.borrow_mut();
        world.store[MARK_AT..MARK_AT + 64].copy_from_slice(&mark);
        world.mtimes.insert(ORIGIN_INODE, mtime);
        drop(world);
        merge_on(&script)
    };
    assert!(cut_off(ORIGIN_INODE, 5000).is_ok());
    for (inode, mtime) in [(ORIGIN_INODE + 1, 5000), (ORIGIN_INODE, 999)] {
        let refused = cut_off(inode, mtime);
        assert!(
            matches!(refused, Err(Error::Refused(Refusal::OriginChanged { .. }))),
            "{refused:?}"
        );
    }
}

#[test]
fn a_store_that_reaches_beyond_either_file_is_refused() {
    let with = |at: usize, value: u8| {
        let script = machine();
        script.world.borrow_mut().store[CHUNK + at] = value;
        let refused = merge_on(&script).expect_err("it reaches too far");
        assert_eq!(marked(&script), (1, false));
        assert!(!script.calls.borrow().contains(&Step::FindLoop));
        refused
    };
    // Both files have 256 chunks; the second byte of a chunk's number counts as many.
    let unsound = |fault| {
        let path = PathBuf::from(COW);
        Error::from(Refusal::CowUnsound { path, fault })
    };
    let offset = 4096;
    assert_eq!(
        with(1, 1),
        unsound(StoreFault::OriginChunk { offset, chunk: 256 })
    );
    assert_eq!(
        with(9, 1),
        unsound(StoreFault::CowChunk {
            offset,
            chunk: 256 + 2
        })
    );
    assert_eq!(
        with(16, 0),
        unsound(StoreFault::OriginChunkTwice {
            offset: offset + 16,
            chunk: 0
        })
    );
    assert_eq!(
        {
            let script = Script::new(|_, _| None);
            merge_on(&script)
        },
        Err(Error::from(Refusal::CowBlank {
            path: PathBuf::from(COW)
        }))
    );
}

/// A pool's sweep would take its COW file for an abandoned one, and delete what is not merged yet.
#[test]
fn a_merge_takes_no_name_of_a_pools_device() {
    let script = machine();
    let mut options = MergeOptions::new();
    let (origin, cow) = (Path::new(ORIGIN), Path::new(COW));
    options.name("dmsnap-pool-1-2");
    let go_on = &mut |_| ControlFlow::Continue(());
    let error = merge(&script, &options, origin, cow, go_on).expect_err("the name is a pool's");
    assert!(matches!(error, Error::Refused(Refusal::Name(_))), "{error}");
    assert!(!script.calls.borrow().contains(&Step::Create));
}

/// Another program's store may have been made over a partition of the image: the merge wrote over the image's beginning.
#[test]
fn a_store_that_does_not_name_its_image_is_merged_into_none() {
    let script = machine();
    script.world.borrow_mut().store[MARK_AT..MARK_AT + 64].fill(0);
    let before = script.world.borrow().store.clone();
    let refused = merge_on(&script).expect_err("it may be another image");
    let refusal = Refusal::OriginUnknown {
        origin: ORIGIN.into(),
        bytes: 1 << 20,
        cow: COW.into(),
        end_bytes: 15 * 4096,
    };
    assert_eq!(refused, Error::from(refusal));
    assert_eq!((mtime(&script), &script.world.borrow().store), (1, &before));
    assert!(!script.calls.borrow().contains(&Step::FindLoop));
    let (origin, cow) = (Path::new(ORIGIN), Path::new(COW));
    let mut options = MergeOptions::new();
    options.any_origin(true);
    let go_on = &mut |_| ControlFlow::Continue(());
    let merged = merge(&script, &options, origin, cow, go_on);
    assert!(
        matches!(merged, Ok(MergeOutcome::Complete { .. })),
        "{merged:?}"
    );
}
