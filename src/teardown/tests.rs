//! A sweep, every call failed in turn.

use std::path::Path;

use nix::errno::Errno;

use super::{Fate, ReapOptions, Reaped};
use crate::base::DeviceName;
use crate::error::{Error, Result, Step};
use crate::kernel::fake::Script;
use crate::snapshot::{SnapshotOptions, create};

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with a snapshot that nobody claims.
fn machine() -> Script {
    let script = Script::new(never);
    let name = DeviceName::new("vm").expect("a name");
    let options = SnapshotOptions::new();
    let (image, cow) = (Path::new("/image"), Path::new("/cow"));
    let _ = create(&script, &options, image, cow, &name).expect("nothing fails");
    script.restart(never);
    script
}

fn reap(script: &Script) -> Result<Vec<Reaped>> {
    ReapOptions::new().reap_on(script, |_| false)
}

/// Whether an error names the call: the fake knows an open and a lock of a loop device by one step each, the stories by
/// what they are for.
fn names(error: &Error, call: Step) -> bool {
    let asked = |step| match step {
        Step::InspectLoop => matches!(call, Step::InspectLoop | Step::OpenLoop),
        Step::TestLock => matches!(call, Step::TestLock | Step::LockLoop),
        other => other == call,
    };
    steps_of(error).into_iter().any(asked)
}

/// The steps that an error names, the first and those of what it left.
fn steps_of(error: &Error) -> Vec<Step> {
    match error {
        Error::Failed { step, .. } => vec![*step],
        Error::Debris { left, source, .. } => left
            .iter()
            .flat_map(|leftover| steps_of(&leftover.error))
            .chain(steps_of(source))
            .collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn whichever_call_of_a_sweep_fails_the_item_names_it_and_the_next_sweep_finishes() {
    let script = machine();
    let swept = reap(&script).expect("nothing fails");
    assert_eq!(swept[0].fate, Ok(Fate::Removed));
    let calls = script.calls.take();
    assert_eq!(calls.len(), 41, "{calls:?}");
    for (index, step) in calls.iter().enumerate() {
        let script = machine();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        match reap(&script) {
            Err(error) => assert!(names(&error, *step), "call {index}: {error}"),
            Ok(swept) => match &swept[0].fate {
                Err(error) => assert!(names(error, *step), "call {index}: {error}"),
                // A look that failed, where the snapshot is known well enough without.
                Ok(fate) => assert!(
                    matches!(fate, Fate::Removed | Fate::InProgress),
                    "call {index}, {step:?}: {fate:?}"
                ),
            },
        }
        script.restart(never);
        let _ = reap(&script).expect("nothing fails any more");
        assert_eq!(
            script.world.borrow().residue().len(),
            0,
            "after call {index}, {step:?}"
        );
    }
}
