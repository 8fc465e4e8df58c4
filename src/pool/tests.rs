//! The pool's steps, every call failed in turn.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::{CowFate, PoolOptions, keeper, ready, recycle, sweep};
use crate::backing::{CowOptions, CowSize, Warning};
use crate::base::{ChunkSize, DeviceName, DeviceNumber, Durability, Handles, LoopHandle, Store};
use crate::dm::{Address, Discard, SnapshotParams};
use crate::error::{Error, Refusal, Retry, Step};
use crate::find::{SnapshotInfo, State};
use crate::kernel::fake::{Script, ScriptLoop};
use crate::kernel::{Clock, DeviceMapper};
use crate::pool::ready::{Ready, Site};
use crate::pool::recycle::Ending;
use crate::snapshot::{Base, MappedDevice, SnapshotOptions, open_origin};
use crate::{snapshot, teardown};

/// A pool's things, without its thread.
struct Stage {
    script: Script,
    options: SnapshotOptions,
    base: Base<ScriptLoop>,
}

fn name(text: &str) -> DeviceName {
    DeviceName::new(text).expect("a name")
}

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

fn only(call: usize) -> impl Fn(Step, usize) -> Option<Errno> {
    move |_, nth| (nth == call).then_some(Errno::EIO)
}

impl Stage {
    fn new() -> Self {
        let script = Script::new(never);
        let base = open_origin(&script, Path::new("/image"), &CowOptions::default())
            .expect("nothing fails");
        let mut options = SnapshotOptions::new();
        options.make_cow(CowSize::WorstCase);
        script.restart(never);
        Self {
            script,
            options,
            base,
        }
    }

    fn site(&self) -> Site<'_, ScriptLoop> {
        Site {
            options: &self.options,
            base: &self.base,
            dir: Path::new("/pool"),
        }
    }

    fn make(&self, nth: u32, spare: Option<MappedDevice>) -> Result<Ready, Error> {
        let name = name(&format!("dmsnap-pool-1-{nth}"));
        ready::make(&self.script, &self.site(), &name, || spare)
    }

    fn made(&self, nth: u32, spare: Option<MappedDevice>) -> Ready {
        let ready = self.make(nth, spare).expect("nothing fails");
        self.script.restart(never);
        ready
    }

    fn claimed(&self, nth: u32) -> Handles {
        let mut ready = self.made(nth, None);
        let claimed = ready::claim(&self.script, &self.site(), &mut ready, &name("vm"));
        self.script.restart(never);
        claimed.expect("nothing fails").into_handles()
    }

    fn release(&self, handles: &Handles) -> Result<Option<MappedDevice>, Error> {
        self.release_with(handles, CowFate::Delete)
    }

    /// As the pool and its thread do one after the other. The device, if it may serve again.
    fn release_with(
        &self,
        handles: &Handles,
        fate: CowFate,
    ) -> Result<Option<MappedDevice>, Error> {
        let to = name("dmsnap-pool-1-99");
        let (script, retry) = (&self.script, Retry::default());
        let site = self.site();
        match recycle::release(script, &site, handles, Some(&to), fate, &retry)? {
            Ending::TakenBack(taken) => {
                let is_idle = recycle::empty(script, &site, &taken, &retry)?;
                recycle::unbound(script, &taken)?;
                Ok(is_idle.then_some(taken.made))
            }
            Ending::Spare(made, _) => Ok(Some(made)),
            Ending::Gone(_) => Ok(None),
        }
    }

    fn spare(&self, nth: u32) -> MappedDevice {
        let released = self.release(&self.claimed(nth)).expect("nothing fails");
        self.script.restart(never);
        released.expect("nobody has it open")
    }

    fn residue(&self) -> BTreeSet<PathBuf> {
        self.script.world.borrow().residue()
    }

    /// How many calls `act` makes when none of them fails.
    fn calls(act: impl Fn(&Self)) -> usize {
        let stage = Self::new();
        act(&stage);
        stage.script.calls.borrow().len()
    }
}

fn residue_named(error: &Error) -> BTreeSet<PathBuf> {
    let left = error.left().iter();
    left.map(|leftover| leftover.object.clone()).collect()
}

/// A sweep finds the COW file by the device only; and a file that cannot be deleted keeps no device.
#[test]
fn what_was_ready_is_discarded_file_first_and_the_device_whatever_comes_of_that() {
    for errno in [None, Some(Errno::EROFS)] {
        let stage = Stage::new();
        let mut left = stage.residue();
        let ready = stage.made(1, None);
        // The first is the file's; the alias's comes later.
        let fails = move |step, nth| errno.filter(|_| step == Step::Unlink && nth <= 2);
        stage.script.restart(fails);
        let discarded = ready::discard(&stage.script, &ready, &Retry::default());
        assert_eq!(discarded.is_err(), errno.is_some());
        let calls = stage.script.calls.take();
        let first = |step| calls.iter().position(|call| *call == step);
        assert!(first(Step::Unlink) < first(Step::Remove), "{calls:?}");
        left.extend(errno.map(|_| ready.cow.clone()));
        assert_eq!(stage.residue(), left);
    }
}

#[test]
fn whichever_call_of_making_one_ready_fails_nothing_of_it_is_left() {
    let calls = Stage::calls(|stage| drop(stage.made_quietly(1)));
    assert_eq!(calls, 18);
    for call in 1..=calls {
        let stage = Stage::new();
        let before = stage.residue();
        stage.script.restart(only(call));
        let error = stage.make(1, None).expect_err("one call failed");
        assert_eq!(error.left(), [], "call {call}: {error}");
        assert_eq!(stage.residue(), before, "call {call}: {error}");
    }
}

#[test]
fn a_spare_device_that_cannot_be_used_is_removed_or_never_taken() {
    let calls = {
        let stage = Stage::new();
        let spare = stage.spare(1);
        let _ = stage.make(2, Some(spare)).expect("nothing fails");
        stage.script.calls.borrow().len()
    };
    for call in 1..=calls {
        let stage = Stage::new();
        let bare = stage.residue();
        let spare = stage.spare(1);
        let with_spare = stage.residue();
        let taken = Cell::new(false);
        stage.script.restart(only(call));
        let to = name("dmsnap-pool-1-2");
        let made = ready::make(&stage.script, &stage.site(), &to, || {
            taken.set(true);
            Some(spare)
        });
        let error = made.expect_err("one call failed");
        let expected = if taken.get() { &bare } else { &with_spare };
        assert_eq!(&stage.residue(), expected, "call {call}: {error}");
    }
}

#[test]
fn whichever_call_of_a_claim_fails_the_pool_still_has_it() {
    let calls = {
        let stage = Stage::new();
        stage.claimed_quietly();
        stage.script.calls.borrow().len()
    };
    assert_eq!(calls, 2, "a rename and an alias");
    for call in 1..=calls {
        let stage = Stage::new();
        let mut ready = stage.made(1, None);
        let before = stage.residue();
        stage.script.restart(only(call));
        let claimed = ready::claim(&stage.script, &stage.site(), &mut ready, &name("vm"));
        let error = claimed.expect_err("one call failed");
        assert_eq!(error.left(), [], "call {call}: {error}");
        assert_eq!(stage.residue(), before, "call {call}: {error}");
    }
}

#[test]
fn whichever_call_of_a_release_fails_the_device_is_the_callers_or_gone_or_named() {
    let (calls, released) = {
        let stage = Stage::new();
        let handles = stage.claimed(1);
        let _ = stage.release(&handles).expect("nothing fails");
        (stage.script.calls.borrow().len(), stage.residue())
    };
    let mut all_the_same = 0;
    for call in 1..=calls {
        let stage = Stage::new();
        let bare = stage.residue();
        let handles = stage.claimed(1);
        let claimed = stage.residue();
        stage.script.restart(only(call));
        let done = stage.release(&handles);
        let found = stage.residue();
        let Err(error) = done else {
            assert_eq!(found, released, "call {call}");
            all_the_same += 1;
            continue;
        };
        let as_claimed = found == claimed;
        let as_gone = found == bare;
        let named = residue_named(&error).is_subset(&found) && !error.left().is_empty();
        assert!(
            as_claimed || as_gone || named,
            "call {call}: {error}: {found:?}"
        );
    }
    // Those of the look where the COW file should be: without them it is searched for.
    assert_eq!(all_the_same, 6);
}

/// It looks, renames and unlinks. The tables are the thread's.
#[test]
fn a_release_that_deletes_swaps_no_table_and_waits_for_nothing() {
    let stage = Stage::new();
    let handles = stage.claimed(1);
    let (to, retry) = (name("dmsnap-pool-1-99"), Retry::default());
    let (script, site) = (&stage.script, stage.site());
    let released = recycle::release(script, &site, &handles, Some(&to), CowFate::Delete, &retry);
    assert!(matches!(released, Ok(Ending::TakenBack(_))));
    let calls = script.calls.borrow();
    let changes = [Step::Unlink, Step::Rename, Step::Unlink];
    assert!(calls.ends_with(&changes), "alias, name, file: {calls:?}");
    assert!(!calls.contains(&Step::Load) && !calls.contains(&Step::Resume));
    assert_eq!(script.now(), Duration::ZERO, "nothing was waited for");
}

/// It was once given its next name all the same, and then not found by its old one.
#[test]
fn a_device_that_is_opened_while_its_tables_are_swapped_is_not_used_again() {
    for fate in [CowFate::Delete, CowFate::Keep, CowFate::HandBack] {
        let stage = Stage::new();
        let handles = stage.claimed(1);
        let world = Arc::clone(&stage.script.world);
        stage.script.restart(move |step, _| {
            if step == Step::Load {
                world.borrow_mut().busy_until = Duration::from_secs(3600);
            }
            None
        });
        let released = stage.release_with(&handles, fate);
        assert!(released.expect("nothing fails").is_none());
        assert!(
            stage.script.calls.borrow().contains(&Step::Remove),
            "{fate:?}: at its last close"
        );
    }
}

#[test]
fn whichever_call_of_making_the_keeper_fails_nothing_of_it_is_left() {
    let to = name("dmsnap-pool-1-keeper");
    let calls = Stage::calls(|stage| {
        let keeper = keeper::make(&stage.script, &stage.base, &to).expect("nothing fails");
        std::mem::forget(keeper);
    });
    for call in 1..=calls {
        let stage = Stage::new();
        let before = stage.residue();
        stage.script.restart(only(call));
        let error = keeper::make(&stage.script, &stage.base, &to).expect_err("one call failed");
        assert_eq!(error.left(), [], "call {call}: {error}");
        assert_eq!(stage.residue(), before, "call {call}: {error}");
    }
}

/// The loop device of a snapshot that is gone serves another one by now. A second release was seen to delete that one's
/// COW file, as it took the handle's number at its word.
#[test]
fn a_release_of_what_is_gone_deletes_nobody_elses_cow_file() {
    let stage = Stage::new();
    let (script, options) = (&stage.script, &stage.options);
    let (cow, vm) = (Path::new("/pool/1.cow"), name("vm"));
    let old = snapshot::create_on(script, options, &stage.base, cow, &vm);
    let old = old.expect("nothing fails").into_handles();
    teardown::clean(script, &old, &Retry::default()).expect("nothing fails");
    let other = stage.made(22, None);
    let path = |handle: Option<LoopHandle>| handle.expect("a loop").path;
    let number = path(old.cow_loop.clone());
    assert_eq!(number, path(other.handles.cow_loop), "it is used again");
    let before = stage.residue();
    let released = stage.release(&old).expect("it is gone already");
    assert!(released.is_none());
    assert_eq!(stage.residue(), before);
}

/// By the uuid the origin's loop device is known as shared. Without it, its last user was waited for.
#[test]
fn a_shared_origin_is_not_waited_for_by_handles_that_have_no_uuid() {
    let stage = Stage::new();
    let bare = stage.residue();
    let (script, options) = (&stage.script, &stage.options);
    let (cow, vm) = (Path::new("/pool/1.cow"), name("vm"));
    let made = snapshot::create_on(script, options, &stage.base, cow, &vm);
    let mut handles = made.expect("nothing fails").into_handles();
    handles.uuid = None;
    teardown::clean(script, &handles, &Retry::default()).expect("nothing fails");
    assert_eq!(script.now(), Duration::ZERO, "nothing was waited for");
    let cow = PathBuf::from(cow);
    assert_eq!(stage.residue(), bare.into_iter().chain([cow]).collect());
}

/// Two sweeps at once: the other one has removed the device, and its loop device is another snapshot's.
#[test]
fn a_sweep_deletes_no_cow_file_by_a_loop_device_that_has_changed_hands() {
    let stage = Stage::new();
    let ready = stage.made(1, None);
    let device = LoopHandle::at("/dev/loop1");
    assert_eq!(
        ready.handles.cow_loop.as_ref().map(|it| &it.path),
        Some(&device.path)
    );
    let info = info_of(&ready.made, 1);
    teardown::clean(&stage.script, &ready.handles, &Retry::default()).expect("nothing fails");
    let other = stage.made(22, None);
    assert_eq!(
        other.handles.cow_loop.as_ref().map(|it| &it.path),
        Some(&device.path)
    );
    let before = stage.residue();
    crate::teardown::forget_cow(&stage.script, &info).expect("nothing fails");
    assert_eq!(stage.residue(), before);
    crate::teardown::forget_cow(&stage.script, &info_of(&other.made, 1)).expect("nothing fails");
    assert!(!stage.residue().contains(&other.cow), "its own goes");
}

/// Its file would be of no use, and the disk can still be copied.
#[test]
fn a_throw_away_disk_is_not_released_to_keep_its_cow_file() {
    for fate in [CowFate::Keep, CowFate::HandBack] {
        let mut stage = Stage::new();
        stage.options = PoolOptions::new().made_with().expect("no contradiction");
        let handles = stage.claimed(1);
        let before = stage.residue();
        let name = "vm".to_owned();
        let refused = stage.release_with(&handles, fate).map(drop);
        assert_eq!(refused, Err(Refusal::NothingToKeep { name }.into()));
        assert_eq!(stage.residue(), before);
        let made = stage.release(&handles).expect("nothing fails");
        assert!(made.is_some(), "it serves again");
        assert!(!stage.residue().contains(Path::new("/pool/dmsnap-1-1.cow")));
    }
}

#[test]
fn a_throw_away_disk_ends_flushes_before_it_is_ready_and_the_claim_does_nothing_more() {
    let mut stage = Stage::new();
    stage.options = PoolOptions::new().made_with().expect("no contradiction");
    let mut ready = stage.made(1, None);
    assert!(!stage.script.ends_flushes(ready.made.dev));
    let warning = ready::settle(&stage.script, &stage.options, &ready);
    assert_eq!(warning, None);
    assert!(stage.script.ends_flushes(ready.made.dev));
    stage.script.restart(never);
    let claimed = ready::claim(&stage.script, &stage.site(), &mut ready, &name("vm"));
    assert_eq!(*stage.script.calls.borrow(), [Step::Rename, Step::Link]);
    let again = stage.release(claimed.expect("nothing fails").handles());
    let again = stage.made(2, again.expect("nothing fails"));
    assert!(!stage.script.ends_flushes(again.made.dev), "another table");

    let fails = |step, _| (step == Step::EndFlushes).then_some(Errno::EROFS);
    stage.script.restart(fails);
    let errno = Errno::EROFS as i32;
    let warning = ready::settle(&stage.script, &stage.options, &again);
    assert_eq!(warning, Some(Warning::FlushesKept { errno }));
}

#[test]
fn a_pools_disks_are_thrown_away_unless_a_durability_or_a_store_was_named() {
    let of = |options: &PoolOptions| {
        let made = options.made_with();
        made.map(|made| (made.named_durability(), made.cow.store))
    };
    let mut snapshot = SnapshotOptions::new();
    let transient = (Durability::ThrowAway, Store::Transient);
    assert_eq!(of(&PoolOptions::new()), Ok(transient));
    assert_eq!(of(PoolOptions::new().snapshot(&snapshot)), Ok(transient));
    snapshot.store(Store::Transient);
    assert_eq!(of(PoolOptions::new().snapshot(&snapshot)), Ok(transient));
    let kept = (Durability::PowerCuts, Store::PersistentOverflow);
    let overflow = snapshot.store(Store::PersistentOverflow).clone();
    assert_eq!(of(PoolOptions::new().snapshot(&overflow)), Ok(kept));
    let mut processes = SnapshotOptions::new();
    processes.durability(Durability::Processes);
    let made = (Durability::Processes, Store::Persistent);
    assert_eq!(of(PoolOptions::new().snapshot(&processes)), Ok(made));
    // The pool's own goes first, in whichever order they are set.
    let mut options = PoolOptions::new();
    options
        .durability(Durability::ThrowAway)
        .snapshot(&processes);
    assert_eq!(of(&options), Ok(transient));
    let (durability, store) = (Durability::ThrowAway, Store::PersistentOverflow);
    let refused = Refusal::StoreOfDurability { durability, store };
    assert_eq!(of(options.snapshot(&overflow)), Err(refused.into()));
}

/// A kill in the middle of a release left a device under a name of the pool's, with the COW file that the caller was to
/// be handed back; the next sweep deleted it.
#[test]
fn a_cow_file_that_is_to_be_kept_is_never_a_leftover_of_the_pools() {
    for fate in [CowFate::Keep, CowFate::HandBack] {
        let calls = {
            let stage = Stage::new();
            let handles = stage.claimed(1);
            let _ = stage.release_with(&handles, fate).expect("nothing fails");
            stage.script.calls.borrow().len()
        };
        for call in 1..=calls {
            let stage = Stage::new();
            let handles = stage.claimed(1);
            let cow = PathBuf::from("/pool/dmsnap-1-1.cow");
            // From this call on nothing is answered any more.
            stage
                .script
                .restart(move |_, nth| (nth >= call).then_some(Errno::EIO));
            drop(stage.release_with(&handles, fate));
            stage.script.restart(never);
            let found = stage.script.query(Address::Uuid(
                handles.uuid.as_ref().expect("a uuid").as_str(),
            ));
            if let Ok(found) = found {
                let made = MappedDevice {
                    name: name(&found.name),
                    uuid: handles.uuid.clone().expect("a uuid"),
                    mapper: name(&found.name).mapper_path(),
                    dev: found.number,
                };
                crate::teardown::forget_cow(&stage.script, &info_of(&made, 1))
                    .expect("nothing fails");
            }
            assert!(stage.residue().contains(&cow), "call {call}");
        }
    }
}

/// Killed between the removal of a device that is not to serve again and the deletion of its COW file, nothing named the
/// file any more.
#[test]
fn a_kill_in_a_release_without_use_for_the_device_leaves_no_cow_file_for_good() {
    let release = |stage: &Stage, handles: &Handles| {
        let (site, retry) = (stage.site(), Retry::default());
        recycle::release(&stage.script, &site, handles, None, CowFate::Delete, &retry).map(drop)
    };
    let calls = Stage::calls(|stage| release(stage, &stage.claimed(1)).expect("nothing fails"));
    let lasting = PathBuf::from("/pool/dmsnap-1-1.cow");
    let mut marked = 0;
    for call in 1..=calls {
        let stage = Stage::new();
        let handles = stage.claimed(1);
        // From this call on nothing is done any more.
        let dead = move |_, nth| (nth >= call).then_some(Errno::EIO);
        stage.script.restart(dead);
        drop(release(&stage, &handles));
        stage.script.restart(never);
        let uuid = handles.uuid.as_ref().expect("a uuid");
        let is_there = stage.script.query(Address::Uuid(uuid.as_str())).is_ok();
        let file = |stage: &Stage| {
            let mut found = stage.residue().into_iter();
            found.find(|path| path.extension().is_some())
        };
        let left = file(&stage);
        if is_there {
            assert!(left.is_some(), "call {call}: the device has it");
            continue;
        }
        // What the next pool does.
        left.iter().for_each(|path| {
            sweep::delete_leftover(&stage.script, path).expect("a sweep");
        });
        let after = file(&stage);
        marked += usize::from(left.is_some());
        assert_ne!(
            left.as_ref(),
            Some(&lasting),
            "call {call}: nobody finds it"
        );
        assert_eq!(after, None, "call {call}");
    }
    assert!(marked > 0, "no call was cut off in between");
}

fn info_of(made: &MappedDevice, cow_loop: u32) -> SnapshotInfo {
    SnapshotInfo {
        name: made.name.to_string(),
        uuid: made.uuid.clone(),
        dev: made.dev,
        device: made.dev.dm_node(),
        state: State::Live,
        merging: false,
        deferred_remove: false,
        interrupted: false,
        open_count: 0,
        params: Some(SnapshotParams {
            origin: DeviceNumber::at(7, 0),
            cow: DeviceNumber::at(7, cow_loop),
            store: Store::Persistent,
            chunk: ChunkSize::default(),
            discard: Discard::Unsupported,
        }),
        origin: None,
        cow: None,
        status: None,
    }
}

impl Stage {
    fn made_quietly(&self, nth: u32) -> Ready {
        self.make(nth, None).expect("nothing fails")
    }

    fn claimed_quietly(&self) {
        let mut ready = self.made(1, None);
        let claimed = ready::claim(&self.script, &self.site(), &mut ready, &name("vm"));
        let _ = claimed.expect("nothing fails");
    }
}
