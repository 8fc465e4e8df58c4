//! Every call failed in turn.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::create::create;
use super::{Snapshot, SnapshotOptions};
use crate::backing::{CowOptions, CowSize, Warning, unmake};
use crate::base::{DeviceName, DeviceUuid, Durability, Handles, LoopHandle, Store};
use crate::error::policy::AT_ONCE;
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict};
use crate::kernel::Clock;
use crate::kernel::fake::Script;
use crate::teardown::clean;
use crate::timings::Timings;

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

fn create_on(script: &Script) -> Result<Snapshot> {
    create_with(script, &SnapshotOptions::new())
}

fn create_with(script: &Script, options: &SnapshotOptions) -> Result<Snapshot> {
    let name = DeviceName::new("vm").expect("a name");
    create(
        script,
        options,
        Path::new("/image"),
        Path::new("/cow"),
        &name,
    )
}

fn made(script: &Script) -> Handles {
    let handles = create_on(script).expect("nothing fails").into_handles();
    script.restart(never);
    handles
}

fn step_of(error: &Error) -> Step {
    match error {
        Error::Failed { step, .. } => *step,
        Error::Debris { source, .. } => step_of(source),
        Error::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

fn calls_of_a_create() -> Vec<Step> {
    let script = Script::new(never);
    let _ = create_on(&script).expect("nothing fails");
    script.calls.take()
}

#[test]
fn whichever_call_of_create_fails_nothing_is_left_and_the_error_names_it() {
    let calls = calls_of_a_create();
    assert_eq!(calls.len(), 27);
    for (index, step) in calls.iter().enumerate() {
        // Its failure is a warning.
        if *step == Step::Link {
            continue;
        }
        let script = Script::new(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let error = create_on(&script).expect_err("one call failed");
        assert_eq!(step_of(&error), *step, "call {index}");
        assert_eq!(error.errno(), Some(Errno::EIO as i32));
        assert_eq!(error.left(), []);
        assert_eq!(
            script.world.borrow().residue(),
            BTreeSet::new(),
            "after call {index}, {step:?}"
        );
    }
}

#[test]
fn an_alias_that_cannot_be_made_is_a_warning() {
    let script = Script::new(|step, _| (step == Step::Link).then_some(Errno::EROFS));
    let snapshot = create_on(&script).expect("it has a node");
    let alias = PathBuf::from("/dev/mapper/vm");
    let errno = Errno::EROFS as i32;
    let warning = Warning::NoAlias { alias, errno };
    assert!(snapshot.warnings().contains(&warning));
    assert_eq!(snapshot.device(), Path::new("/dev/dm-0"));
}

#[test]
fn flushes_that_cannot_be_ended_are_a_warning_and_a_contradicting_store_is_refused() {
    let script = Script::new(|step, _| (step == Step::EndFlushes).then_some(Errno::EROFS));
    let make = |options: &SnapshotOptions| {
        let name = DeviceName::new("vm").expect("a name");
        create(
            &script,
            options,
            Path::new("/image"),
            Path::new("/cow"),
            &name,
        )
    };
    let mut options = SnapshotOptions::new();
    options.durability(Durability::Processes);
    let errno = Errno::EROFS as i32;
    let warning = Warning::FlushesKept { errno };
    let snapshot = make(&options).expect("it works all the same");
    assert!(snapshot.warnings().contains(&warning));

    for (durability, store) in [
        (Durability::ThrowAway, Store::PersistentOverflow),
        (Durability::Processes, Store::Transient),
    ] {
        let refused = Err(Refusal::StoreOfDurability { durability, store }.into());
        let mut options = SnapshotOptions::new();
        assert_eq!(make(options.durability(durability).store(store)), refused);
        let mut options = SnapshotOptions::new();
        assert_eq!(make(options.store(store).durability(durability)), refused);
    }
}

/// The kernel sizes its table of changed chunks by what the COW device is when the table is loaded.
#[test]
fn a_made_cow_file_is_short_until_the_table_is_loaded_unless_its_space_is_set_aside() {
    let made = |expected: Option<CowSize>, reserve: bool| {
        let script = Script::new(|_, _| None);
        let mut options = SnapshotOptions::new();
        options
            .make_cow(CowSize::Bytes(1 << 30))
            .replace_cow(true)
            .reserve(reserve);
        if let Some(expected) = expected {
            options.expected_changes(expected);
        }
        let name = DeviceName::new("vm").expect("a name");
        let paths = [Path::new("/image"), Path::new("/cow")];
        let made = create(&script, &options, paths[0], paths[1], &name);
        assert!(made.is_ok(), "nothing fails");
        let calls = script.calls.take();
        let of = |step| calls.iter().rposition(|call| *call == step);
        let [sized, loaded, resumed] =
            [Step::SizeFile, Step::Load, Step::Resume].map(|step| of(step).expect("it does"));
        assert!(loaded < resumed);
        match of(Step::ResizeLoop) {
            Some(told) => {
                assert!(
                    loaded < sized && sized < told && told < resumed,
                    "{calls:?}"
                );
                true
            }
            None => {
                assert!(sized < loaded, "{calls:?}");
                false
            }
        }
    };
    assert!(made(None, false));
    assert!(made(Some(CowSize::Bytes(1 << 20)), false));
    assert!(!made(Some(CowSize::Bytes(1 << 30)), false));
    assert!(!made(None, true));
}

/// How often a file that stays locked is asked for.
fn attempts(open: impl Fn(&Script) -> Result<()>) -> usize {
    let script = Script::new(|step, _| (step == Step::LockFile).then_some(Errno::EWOULDBLOCK));
    let error = open(&script).expect_err("it is locked");
    assert!(
        matches!(error, Error::Refused(Refusal::OriginInUse { .. })),
        "{error}"
    );
    let calls = script.calls.borrow();
    calls.iter().filter(|step| **step == Step::LockFile).count()
}

#[test]
fn a_file_that_stays_locked_is_asked_for_to_the_callers_deadline() {
    let opened = |deadline: Option<Duration>| {
        attempts(move |script| {
            let options = CowOptions {
                deadline,
                ..CowOptions::default()
            };
            super::open_origin(script, Path::new("/image"), &options).map(drop)
        })
    };
    let made = |deadline: Option<Duration>| {
        attempts(move |script| {
            let mut options = SnapshotOptions::new();
            if let Some(deadline) = deadline {
                options.deadline(deadline);
            }
            let name = DeviceName::new("vm").expect("a name");
            create(
                script,
                &options,
                Path::new("/image"),
                Path::new("/cow"),
                &name,
            )
            .map(drop)
        })
    };
    for counted in [&opened as &dyn Fn(Option<Duration>) -> usize, &made] {
        assert_eq!(counted(Some(Duration::ZERO)), 1);
        let unset = counted(None);
        assert!(unset > 1);
        assert!(counted(Some(Duration::from_secs(2))) > unset);
    }
}

/// It may be another snapshot's by then.
#[test]
fn another_file_in_the_place_of_the_made_one_is_left_alone() {
    let script = Script::new(never);
    let other = PathBuf::from("/cow");
    script.world.borrow_mut().made_files.insert(other.clone());
    let error = Error::failed(Step::Resume, "/dev/mapper/vm", Errno::EIO);
    let made = crate::kernel::fake::world::file_id(4711);
    assert_eq!(unmake(&script, error.clone(), &other, made), error);
    assert!(script.world.borrow().made_files.contains(&other));
    let made = crate::kernel::fake::world::file_id(crate::kernel::fake::world::inode(&other));
    assert_eq!(unmake(&script, error.clone(), &other, made), error);
    assert!(!script.world.borrow().made_files.contains(&other));
}

#[test]
fn the_timings_of_a_create_are_its_calls_in_order() {
    let (made, timings) = Timings::of(|| create_on(&Script::new(never)));
    assert!(made.is_ok());
    let steps: Vec<_> = timings.calls.iter().map(|call| call.step).collect();
    assert_eq!(steps, calls_of_a_create());
    assert!(timings.calls.iter().all(|call| call.errno.is_none()));

    let script = Script::new(|step, _| (step == Step::Resume).then_some(Errno::EIO));
    let (_, timings) = Timings::of(|| create_on(&script).expect_err("it cannot be resumed"));
    let failed = timings.calls.iter().find(|call| call.errno.is_some());
    let failed = failed.map(|call| (call.step, call.on.as_path()));
    assert_eq!(failed, Some((Step::Resume, Path::new("/dev/mapper/vm"))));
    let undone = timings.calls.last().map(|call| call.step);
    assert_ne!(undone, Some(Step::Resume), "undoing is part of it");
}

#[test]
fn when_undoing_fails_too_the_debris_is_exactly_what_is_left() {
    let calls = calls_of_a_create();
    let created = calls
        .iter()
        .position(|step| *step == Step::Create)
        .expect("it creates");
    for (index, step) in calls.iter().enumerate().skip(created + 1) {
        if *step == Step::Link {
            continue;
        }
        let script = Script::new(move |at, nth| {
            (nth == index + 1 || at == Step::Remove).then_some(Errno::EIO)
        });
        let error = create_on(&script).expect_err("one call failed");
        assert_eq!(step_of(&error), *step);
        let named: BTreeSet<_> = error
            .left()
            .iter()
            .map(|leftover| leftover.object.clone())
            .collect();
        assert_eq!(script.world.borrow().residue(), named);
    }
}

#[test]
fn a_lost_race_takes_another_device_and_leaves_the_lost_one_alone() {
    for (step, errno) in [
        (Step::AttachLoop, Errno::EBUSY),
        (Step::OpenLoop, Errno::ENXIO),
        (Step::OpenLoop, Errno::ENOENT),
    ] {
        let losses = AtomicU32::new(20u32);
        let script = Script::new(move |at, _| {
            (at == step
                && losses
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                        left.checked_sub(1)
                    })
                    .is_ok())
            .then_some(errno)
        });
        let _ = create_on(&script).expect("the race is won in the end");
        assert!(!script.calls.borrow().contains(&Step::DetachLoop));
        assert_eq!(
            script
                .calls
                .borrow()
                .iter()
                .filter(|each| **each == step)
                .count(),
            22
        );
    }
    let script = Script::new(|step, _| (step == Step::AttachLoop).then_some(Errno::EBUSY));
    let error = create_on(&script).expect_err("it never wins");
    assert_eq!(error.verdict(), Some(Verdict::TakeAnother));
    assert!(script.now() <= Duration::from_secs(5));
}

#[test]
fn a_call_that_is_interrupted_is_repeated_but_not_for_ever() {
    for step in calls_of_a_create() {
        if step == Step::Link {
            continue;
        }
        let script = Script::new(move |at, _| (at == step).then_some(Errno::EINTR));
        let error = create_on(&script).expect_err("it is interrupted for ever");
        assert_eq!(step_of(&error), step);
        let asked = script
            .calls
            .borrow()
            .iter()
            .filter(|each| **each == step)
            .count();
        // Undoing may meet the same step, and is bounded as well.
        assert!(
            asked > 0 && asked % AT_ONCE as usize == 0 && asked <= 3 * AT_ONCE as usize,
            "{step:?}"
        );
        let script =
            Script::new(move |at, nth| (at == step && nth % 2 == 0).then_some(Errno::EINTR));
        let _ = create_on(&script).expect("interrupted now and then");
    }
}

#[test]
fn a_long_wait_asks_seldom_and_ends_with_the_close() {
    let script = Script::new(never);
    let handles = made(&script);
    let closes = Duration::from_micros(14_123_456);
    let since = script.now();
    script.world.borrow_mut().busy_until = since + closes;
    assert_eq!(
        clean(&script, &handles, &Retry::default()).map(drop),
        Ok(())
    );
    let late = script.now() - since - closes;
    assert!(late < Duration::from_millis(1), "{late:?} late");
    let asked = script.calls.borrow().len();
    assert!((5000..6000).contains(&asked), "{asked} calls");

    // With pauses of the caller's own, nobody tells of the close.
    let script = Script::new(never);
    let handles = made(&script);
    let since = script.now();
    script.world.borrow_mut().busy_until = since + closes;
    let ms = Duration::from_millis;
    let retry = Retry::default().pauses(ms(100), ms(100));
    assert_eq!(clean(&script, &handles, &retry).map(drop), Ok(()));
    assert!(script.now() - since >= ms(14_200));
}

#[test]
fn cleanup_removes_everything_twice_over() {
    let script = Script::new(never);
    let handles = made(&script);
    assert_eq!(script.world.borrow().residue().len(), 3);
    for _ in 0..2 {
        assert_eq!(
            clean(&script, &handles, &Retry::default()).map(drop),
            Ok(())
        );
        assert_eq!(script.world.borrow().residue(), BTreeSet::new());
    }
}

#[test]
fn whichever_call_of_cleanup_fails_it_goes_on_and_names_what_stays() {
    let script = Script::new(never);
    let handles = made(&script);
    clean(&script, &handles, &Retry::ONCE).expect("nothing fails");
    let calls = script.calls.take();
    for (index, failed) in calls.iter().enumerate() {
        let script = Script::new(never);
        let handles = made(&script);
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let left: BTreeSet<PathBuf> = match clean(&script, &handles, &Retry::ONCE) {
            Ok(_) => BTreeSet::new(),
            Err(error) => error
                .left()
                .iter()
                .map(|leftover| leftover.object.clone())
                .collect(),
        };
        let residue = script.world.borrow().residue();
        assert!(
            residue.is_subset(&left),
            "call {index}, {:?}: {residue:?} but {left:?}",
            failed
        );
    }
}

#[test]
fn a_busy_device_is_waited_for_until_it_is_closed_or_the_deadline() {
    let script = Script::new(never);
    let handles = made(&script);
    script.world.borrow_mut().busy_until = Duration::from_millis(70);
    let error = clean(&script, &handles, &Retry::until(Duration::from_millis(50)));
    let error = error.expect_err("the deadline comes first");
    assert_eq!(error.verdict(), Some(Verdict::Busy));
    assert_eq!(error.left().len(), 3, "{error}");
    assert_eq!(script.now(), Duration::from_millis(50));
    assert_eq!(
        script.world.borrow().residue().len(),
        3,
        "the alias is still there"
    );
    clean(&script, &handles, &Retry::default()).expect("closed at 70 ms");
    assert!(script.now() < Duration::from_millis(90));
}

#[test]
fn a_cow_file_that_is_replaced_goes_with_the_snapshot_that_fails() {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase).replace_cow(true);
    let taken = |step| (step == Step::MakeFile).then_some(Errno::EEXIST);
    let script = Script::new(move |step, _| taken(step));
    let _ = create_with(&script, &options).expect("nothing else fails");
    let calls = script.calls.take();
    let sizes = calls.iter().filter(|step| **step == Step::SizeFile);
    assert_eq!(sizes.count(), 2, "emptied first");
    for (index, failed) in calls.iter().enumerate() {
        let fault = move |step, nth| taken(step).or((nth == index + 1).then_some(Errno::EIO));
        if matches!(failed, Step::MakeFile | Step::Link) {
            continue;
        }
        let script = Script::new(fault);
        let error = create_with(&script, &options).expect_err("one call failed");
        assert_eq!((step_of(&error), error.left()), (*failed, [].as_slice()));
        assert_eq!(script.world.borrow().residue(), BTreeSet::new());
    }
    options.replace_cow(false);
    let script = Script::new(move |step, _| taken(step));
    let error = create_with(&script, &options).expect_err("it is there");
    assert_eq!(error.verdict(), Some(Verdict::NameTaken));
    assert!(!script.calls.borrow().contains(&Step::OpenLoop));
}

/// The image's turn once passed for the COW file's.
#[test]
fn a_file_that_somebody_claims_is_refused_by_what_it_is_for() {
    for (nth, path) in [(1, "/image"), (2, "/cow")] {
        let opens = AtomicUsize::new(0);
        let script = Script::new(move |step, _| {
            opens.fetch_add(usize::from(step == Step::OpenFile), Ordering::Relaxed);
            (step == Step::OpenFile && opens.load(Ordering::Relaxed) == nth).then_some(Errno::EBUSY)
        });
        let path = PathBuf::from(path);
        let refusal = match nth {
            1 => Refusal::OriginInUse { path },
            _ => Refusal::CowInUse { path },
        };
        assert_eq!(create_on(&script), Err(Error::Refused(refusal)));
    }
}

/// Seen on 5.10: a removal returned while the kernel was still clearing the loop device, and the backing file was in
/// use.
#[test]
fn a_loop_device_that_is_being_cleared_is_waited_for() {
    let script = Script::new(never);
    let handles = made(&script);
    script.world.borrow_mut().letting_go_until = Duration::from_millis(70);
    let error = clean(&script, &handles, &Retry::until(Duration::from_millis(50)));
    let error = error.expect_err("the deadline comes first");
    assert_eq!(error.verdict(), Some(Verdict::Busy));
    assert_eq!(error.left().len(), 2, "{error}");
    clean(&script, &handles, &Retry::default()).expect("done at 70 ms");
    assert!((70..90).contains(&script.now().as_millis()));
}

/// Seen on 6.12: behind a deferred removal the dm device was gone by its uuid, and its holding the loop device passed
/// for another snapshot's.
#[test]
fn a_device_that_is_gone_by_name_is_waited_for_until_it_lets_go_of_its_loop_devices() {
    let script = Script::new(never);
    let handles = made(&script);
    script.world.borrow_mut().dying_until = Duration::from_millis(70);
    let error = clean(&script, &handles, &Retry::until(Duration::from_millis(50)));
    assert_eq!(error.expect_err("the deadline").left().len(), 2);
    assert_eq!(script.world.borrow().residue().len(), 2);
    clean(&script, &handles, &Retry::default()).expect("done at 70 ms");
    assert_eq!(script.world.borrow().residue(), BTreeSet::new());
}

#[test]
fn what_is_somebody_elses_by_now_is_left_alone() {
    let script = Script::new(never);
    let mut handles = made(&script);
    clean(&script, &handles, &Retry::ONCE).expect("nothing fails");
    script.world.borrow_mut().bind_foreign(0, 99);
    script.world.borrow_mut().bind_foreign(1, 99);
    handles.uuid = Some(DeviceUuid::new("DMSNAP-another").expect("a uuid"));
    clean(&script, &handles, &Retry::ONCE).expect("all is gone");
    assert_eq!(script.world.borrow().residue().len(), 2);
    handles.cow_loop = Some(LoopHandle::at("/dev/loop1"));
    clean(&script, &handles, &Retry::default()).expect("taken at its word");
    assert_eq!(
        script.world.borrow().residue(),
        BTreeSet::from([PathBuf::from("/dev/loop0")])
    );
}

/// The alias belongs to whoever has the name: old handles of a VM that was started again once took it away.
#[test]
fn old_handles_leave_the_alias_of_a_new_snapshot_of_that_name_alone() {
    let script = Script::new(never);
    let mut old = made(&script);
    clean(&script, &old, &Retry::ONCE).expect("nothing fails");
    let new = made(&script);
    old.uuid = Some(DeviceUuid::new("DMSNAP-old").expect("a uuid"));
    (old.cow_loop, old.origin_loop) = (None, None);
    clean(&script, &old, &Retry::ONCE).expect("all is gone");
    let alias = new.mapper.expect("it has an alias");
    assert!(script.world.borrow().aliases.contains(&alias));
}

#[test]
fn who_waits_in_vain_is_told_who_holds_the_device() {
    let script = Script::new(never);
    let handles = made(&script);
    script.world.borrow_mut().busy_until = Duration::MAX;
    let wait = |retry| {
        clean(&script, &handles, retry)
            .expect_err("it stays busy")
            .left()[0]
            .error
            .clone()
    };
    let told = |error: Error| {
        std::error::Error::source(&error)
            .expect("a cause")
            .to_string()
    };
    let busy = "Device or resource busy (os error 16): open count 1";
    assert_eq!(told(wait(&Retry::ONCE)), busy);
    assert_eq!(
        told(wait(&Retry::until(Duration::from_millis(1)))),
        format!("{busy}, vmm (pid 1)")
    );
}

#[test]
fn a_cow_file_that_was_made_goes_with_the_snapshot_that_fails() {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase).reserve(true);
    let script = Script::new(never);
    let _ = create_with(&script, &options).expect("nothing fails");
    let calls = script.calls.take();
    assert_eq!(calls.len(), calls_of_a_create().len() + 1);
    for (index, failed) in calls.iter().enumerate() {
        if *failed == Step::Link {
            continue;
        }
        let script = Script::new(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let error = create_with(&script, &options).expect_err("one call failed");
        assert_eq!((step_of(&error), error.left()), (*failed, [].as_slice()));
        assert_eq!(
            script.world.borrow().residue(),
            BTreeSet::new(),
            "after {:?}",
            failed
        );
        for undoing in [Step::Unlink, Step::Remove] {
            let fault =
                move |step, nth| (nth == index + 1 || step == undoing).then_some(Errno::EIO);
            let script = Script::new(fault);
            let error = create_with(&script, &options).expect_err("one call failed");
            let left: BTreeSet<_> = error
                .left()
                .iter()
                .map(|each| each.object.clone())
                .collect();
            assert_eq!(script.world.borrow().residue(), left, "after {:?}", failed);
        }
    }
}
