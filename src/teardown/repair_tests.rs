//! What a killed process leaves half-way, repaired with every call failed in turn. The fake kernel's handover is the
//! kernel's (tests/kernel/facts); V, B, C0 and C1 are theirs.

use std::path::Path;

use nix::errno::Errno;

use super::repair::{repair_every, repair_one};
use super::{Fate, ReapOptions, Repair};
use crate::base::{
    DeviceId, DeviceName, DeviceNumber, DeviceUuid, Kind, OriginIdentity, loop_node,
};
use crate::dm::{Address, SnapshotParams, Target, TargetLine};
use crate::error::{Refusal, RepairObstacle, Retry, Step};
use crate::find;
use crate::find::at_work::MAKER_RETRY;
use crate::kernel::fake::{Script, ScriptLoop};
use crate::kernel::{Device, DeviceMapper, Files, LO_AUTOCLEAR, Loops};
use crate::snapshot::{SnapshotOptions, create};

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with a live snapshot V and what a checkpoint of it needs.
struct Stage {
    script: Script,
    v: DeviceUuid,
    b: DeviceUuid,
    line: TargetLine,
    params: SnapshotParams,
}

/// A step of a checkpoint, or of somebody who gets in its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Do {
    CreateB,
    LoadB,
    LoadV,
    SuspendV,
    ResumeB,
    ResumeV,
    ClearV,
    RemoveB,
    /// The last step: the layer goes with its last user.
    Finish,
    /// A rollback's table: the same origin, another COW file.
    LoadRollback,
}

use Do::{
    ClearV, CreateB, Finish, LoadB, LoadRollback, LoadV, RemoveB, ResumeB, ResumeV, SuspendV,
};

impl Stage {
    fn new() -> Self {
        let script = Script::new(never);
        let name = DeviceName::new("v").expect("a name");
        let (image, cow) = (Path::new("/image"), Path::new("/c0"));
        let made = create(&script, &SnapshotOptions::new(), image, cow, &name);
        let v = made.expect("nothing fails").into_handles().uuid;
        let v = v.expect("it has one");
        let line = script.world.borrow().devices[v.as_str()]
            .live
            .as_ref()
            .map(|table| (table.line.clone(), table.params().cloned()));
        let (line, params) = line.expect("it is live");
        let identity = OriginIdentity {
            size_bytes: 1,
            mtime_ns: 1,
        };
        Self {
            b: DeviceUuid::fresh(7, identity, 9, Kind::Layer),
            params: params.expect("a snapshot's"),
            script,
            v,
            line,
        }
    }

    /// A machine on which somebody did that, and was killed.
    fn left(steps: &[Do]) -> Self {
        let stage = Self::new();
        drop(stage.go(steps));
        stage.script.restart(never);
        stage
    }

    /// Does the steps; what a living process has open is returned.
    fn go(&self, steps: &[Do]) -> ScriptLoop {
        let script = &self.script;
        let file = script
            .open_file(Path::new("/next"), true)
            .expect("it is there");
        let c1 = script.open_loop(&loop_node(9), true).expect("it opens");
        let attached = script.attach_loop(&c1, &file, LO_AUTOCLEAR, 512, Path::new("/next"));
        assert_eq!(attached, Ok(()));
        for step in steps {
            let b = script.query(Address::Uuid(self.b.as_str()));
            let b = b.map_or(self.params.origin, |device| device.number);
            let done = match step {
                CreateB => {
                    let name = DeviceName::new("b").expect("a name");
                    script.create(&name, &self.b).map(drop)
                }
                LoadB => script.load(&self.b, &self.line),
                LoadV => script.load(&self.v, &self.over(b)),
                LoadRollback => script.load(&self.v, &self.over(self.params.origin)),
                SuspendV => script.suspend(&self.v).map(drop),
                // Refused when it comes too early.
                ResumeB => script.resume(&self.b).map(drop).or(Ok(())),
                ResumeV => script.resume(&self.v).map(drop).or(Ok(())),
                ClearV => script.clear(&self.v),
                RemoveB => script
                    .remove(Address::Uuid(self.b.as_str()), false)
                    .map(drop),
                Finish => {
                    let b = Address::Uuid(self.b.as_str());
                    script.remove(b, true).map(drop)
                }
            };
            assert_eq!(done, Ok(()), "{step:?}");
        }
        c1
    }

    /// V's table over another origin, and the next COW file.
    fn over(&self, origin: DeviceNumber) -> TargetLine {
        let cow = DeviceNumber::at(7, 9);
        let params = SnapshotParams {
            origin,
            cow,
            ..self.params.clone()
        };
        TargetLine {
            target: Target::Snapshot(params),
            ..self.line.clone()
        }
    }

    fn device(&self, uuid: &DeviceUuid) -> Option<Device> {
        self.script.query(Address::Uuid(uuid.as_str())).ok()
    }

    fn is_valid(&self, uuid: &DeviceUuid) -> bool {
        let world = self.script.world.borrow();
        let live = world.devices[uuid.as_str()].live.as_ref();
        live.is_some_and(|table| table.valid)
    }

    /// V works, on the layer if that is there, and nothing else is left of what was begun.
    fn assert_well(&self, context: &str) {
        self.script.restart(never);
        let v = self.device(&self.v).expect("V is never removed");
        assert!(
            v.live_table && !v.suspended && !v.inactive_table && self.is_valid(&self.v),
            "{context}: {v:?}"
        );
        let origin = {
            let world = self.script.world.borrow();
            let device = &world.devices[self.v.as_str()];
            device.params().map(|params| params.origin)
        };
        match self.device(&self.b) {
            None => {
                assert_eq!(origin, Some(self.params.origin), "{context}");
                let world = self.script.world.borrow();
                assert!(!world.loops.contains_key(&9), "{context}");
            }
            Some(b) => {
                assert!(self.is_valid(&self.b) && !b.suspended, "{context}: {b:?}");
                assert_eq!(origin, Some(b.number), "{context}");
                assert!(b.deferred_remove, "{context}: {b:?}");
            }
        }
    }

    fn repair(&self) -> Vec<(String, crate::Result<Repair>)> {
        let repaired = repair_every(&self.script, &MAKER_RETRY).expect("it can be asked");
        let outcome = |item: super::Repaired| (item.name, item.outcome);
        repaired.into_iter().map(outcome).collect()
    }

    fn is_interrupted(&self) -> bool {
        let all = find::all(&self.script).expect("it can be asked");
        let mut infos = all.iter().filter_map(|(_, info)| info.as_ref().ok());
        infos.any(|info| info.interrupted)
    }
}

/// Where a process may have been killed, and what becomes of that.
const STATES: [(&[Do], &str, Repair); 17] = [
    (&[SuspendV], "v", Repair::Resumed),
    (&[CreateB], "b", Repair::Undone),
    (&[CreateB, LoadB], "v", Repair::Undone),
    (&[CreateB, LoadB, LoadV], "v", Repair::Undone),
    (&[CreateB, LoadB, LoadV, ResumeB], "v", Repair::Undone),
    (&[CreateB, LoadB, LoadV, SuspendV], "v", Repair::Undone),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ClearV],
        "v",
        Repair::Undone,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ClearV, ResumeV],
        "v",
        Repair::Undone,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ClearV, RemoveB],
        "v",
        Repair::Resumed,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ResumeB],
        "v",
        Repair::Finished,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ResumeB, ResumeV],
        "b",
        Repair::Finished,
    ),
    // Somebody resumed V before B had the exceptions.
    (
        &[CreateB, LoadB, LoadV, SuspendV, ResumeV],
        "v",
        Repair::Finished,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ResumeV, ResumeB],
        "v",
        Repair::Finished,
    ),
    (
        &[CreateB, LoadB, LoadV, SuspendV, ResumeV, SuspendV],
        "v",
        Repair::Finished,
    ),
    (
        &[CreateB, LoadB, LoadV, ResumeB, SuspendV, ResumeV],
        "v",
        Repair::Finished,
    ),
    (&[LoadRollback], "v", Repair::Undone),
    (&[LoadRollback, SuspendV], "v", Repair::Undone),
];

#[test]
fn wherever_a_process_was_killed_one_repair_ends_it_and_a_second_one_does_nothing() {
    for (steps, name, outcome) in STATES {
        let context = format!("{steps:?}");
        let stage = Stage::left(steps);
        assert_eq!(
            stage.repair(),
            [(name.to_owned(), Ok(outcome))],
            "{context}"
        );
        stage.assert_well(&context);
        assert!(!stage.is_interrupted(), "{context}");
        let before = stage.script.world.borrow().residue();
        stage.script.restart(never);
        assert_eq!(stage.repair(), [], "{context}");
        let only_looks = |step: &Step| {
            use Step::{InspectLoop, List, OpenMapper, Query, Status};
            matches!(step, OpenMapper | List | Query | Status | InspectLoop)
        };
        assert!(
            stage.script.calls.borrow().iter().all(only_looks),
            "{context}"
        );
        assert_eq!(stage.script.world.borrow().residue(), before, "{context}");
        // By its name it is the same.
        let stage = Stage::left(steps);
        let by_name = repair_one(&stage.script, &DeviceId::from(name), &MAKER_RETRY);
        assert_eq!(by_name, Ok(Some(outcome)), "{context}");
        stage.assert_well(&context);
    }
}

#[test]
fn whichever_call_of_a_repair_fails_or_is_its_last_the_next_repair_ends_it() {
    for (steps, ..) in STATES {
        let calls = {
            let stage = Stage::left(steps);
            let _ = stage.repair();
            stage.script.calls.take()
        };
        for (index, step) in calls.iter().enumerate() {
            for dies in [false, true] {
                let context = format!("{steps:?}, call {index}, {step:?}, dies: {dies}");
                let stage = Stage::left(steps);
                stage.script.restart(move |_, nth| {
                    let fails = nth == index + 1 || (dies && nth > index);
                    fails.then_some(Errno::EIO)
                });
                let _ = repair_every(&stage.script, &MAKER_RETRY);
                stage.script.restart(never);
                for (name, outcome) in stage.repair() {
                    assert!(outcome.is_ok(), "{context}: {name}: {outcome:?}");
                }
                stage.assert_well(&context);
            }
        }
    }
}

/// Repairs while that is done by a process that lives, which holds the loop devices it is told to.
fn repair_beside(steps: &[Do], holds_c0: bool) -> Vec<(String, crate::Result<Repair>)> {
    let stage = Stage::new();
    let c0 = loop_node(stage.params.cow.minor());
    let c0 = stage.script.open_loop(&c0, false).expect("it is there");
    if holds_c0 {
        assert_eq!(stage.script.lock_loop(&c0, true), Ok(()));
    }
    let c1 = stage.go(steps);
    assert_eq!(stage.script.lock_loop(&c1, true), Ok(()));
    let state = || [&stage.v, &stage.b].map(|uuid| stage.device(uuid));
    let before = state();
    let found = stage.repair();
    assert_eq!(state(), before, "{steps:?}");
    // A list looks at the snapshot's own COW file.
    assert_eq!(stage.is_interrupted(), !holds_c0, "{steps:?}");
    found
}

#[test]
fn nothing_is_touched_while_somebody_is_at_work() {
    for (steps, name, _) in STATES {
        let found = repair_beside(steps, true);
        let in_progress = (name.to_owned(), Ok(Repair::InProgress));
        assert_eq!(found.first(), Some(&in_progress), "{steps:?}");
    }
    // The maker of a layer is known by the next COW file too, which the layer's uuid names.
    let found = repair_beside(&[CreateB, LoadB, LoadV], false);
    assert_eq!(
        found.first(),
        Some(&("v".to_owned(), Ok(Repair::InProgress)))
    );
}

/// Whoever is at work is asked about once without patience, and again until the deadline with it.
#[test]
fn who_is_at_work_is_waited_for_to_the_deadline() {
    let looks = |patience: &Retry| {
        let stage = Stage::new();
        let c0 = loop_node(stage.params.cow.minor());
        let c0 = stage.script.open_loop(&c0, false).expect("it is there");
        assert_eq!(stage.script.lock_loop(&c0, true), Ok(()));
        stage.go(&[CreateB, LoadB, LoadV, SuspendV]);
        stage.script.restart(never);
        let found = repair_one(&stage.script, &DeviceId::from("v"), patience);
        assert_eq!(found, Ok(Some(Repair::InProgress)));
        let calls = stage.script.calls.take();
        calls.iter().filter(|call| **call == Step::LockLoop).count()
    };
    let long = Retry::until(std::time::Duration::from_secs(5));
    let looks = [Retry::ONCE, MAKER_RETRY, long].map(|patience| looks(&patience));
    // The first is the status's.
    assert_eq!(looks[0], 2);
    assert!(looks.is_sorted_by(|less, more| less < more), "{looks:?}");
}

#[test]
fn what_was_cleared_and_resumed_by_hand_behind_the_handover_is_named_and_left() {
    let dead: [&[Do]; 1] = [&[CreateB, LoadB, LoadV, SuspendV, ResumeB, ClearV, ResumeV]];
    for steps in dead {
        let stage = Stage::left(steps);
        let state = |stage: &Stage| [&stage.v, &stage.b].map(|uuid| stage.device(uuid));
        let before = state(&stage);
        let found = stage.repair();
        let refused = found.iter().find(|(name, _)| name == "v");
        let name = "v".to_owned();
        let why = RepairObstacle::TableGone;
        let irreparable = Refusal::Irreparable { name, why }.into();
        let refused = refused.map(|(_, outcome)| outcome);
        assert_eq!(refused, Some(&Err(irreparable)), "{steps:?}: {found:?}");
        assert_eq!(state(&stage), before, "{steps:?}");
    }
}

#[test]
fn another_programs_second_table_is_no_business_of_ours() {
    let stage = Stage::new();
    let error = TargetLine {
        target: Target::Error,
        ..stage.line.clone()
    };
    assert_eq!(stage.script.load(&stage.v, &error), Ok(()));
    assert_eq!(stage.repair(), []);
    assert!(stage.device(&stage.v).is_some_and(|v| v.inactive_table));
}

#[test]
fn a_layer_that_is_suspended_is_resumed_and_a_whole_one_is_left() {
    let stage = Stage::left(&[CreateB, LoadB, LoadV, SuspendV, ResumeB, ResumeV, Finish]);
    assert_eq!(stage.repair(), []);
    assert_eq!(stage.script.suspend(&stage.b).map(drop), Ok(()));
    assert_eq!(stage.repair(), [("b".to_owned(), Ok(Repair::Resumed))]);
    stage.assert_well("suspended");
}

#[test]
fn a_sweep_repairs_first_what_it_keeps_too() {
    for (steps, ..) in STATES {
        let reap = |dry_run| {
            let stage = Stage::left(steps);
            let swept = ReapOptions::new()
                .dry_run(dry_run)
                .reap_on(&stage.script, |_| true)
                .expect("it can be asked");
            assert!(
                swept.iter().all(|item| item.fate == Ok(Fate::Kept)),
                "{steps:?}: {swept:?}"
            );
            stage
        };
        let is_interrupted = Stage::left(steps).is_interrupted();
        assert_eq!(reap(true).is_interrupted(), is_interrupted, "{steps:?}");
        let stage = reap(false);
        if is_interrupted {
            stage.assert_well(&format!("{steps:?}"));
        }
    }
}
