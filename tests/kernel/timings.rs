//! Where the time of a create and of a cleanup goes.

use std::fs::File;
use std::time::Duration;

use dmsnap::error::{Retry, Step};
use dmsnap::timings::Timings;
use dmsnap::{SnapshotOptions, Teardown};

use crate::common::tools::{finish, success};
use crate::common::{Scene, dmsnap};

/// Once each, in this order.
const STORY: [Step; 11] = [
    Step::OpenMapper,
    Step::OpenLoopControl,
    Step::OpenFile,
    Step::FindLoop,
    Step::OpenLoop,
    Step::AttachLoop,
    Step::SizeLoop,
    Step::Create,
    Step::Load,
    Step::Resume,
    Step::Link,
];

#[test]
fn the_timings_of_a_snapshot_name_its_steps_in_order_and_add_up() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let (made, timings) = Timings::of(|| SnapshotOptions::new().create(scene.image(), &cow, &name));
    println!("create:\n{timings}");
    let firsts = timings.by_step().into_iter().map(|step| step.step);
    let story: Vec<_> = firsts.filter(|step| STORY.contains(step)).collect();
    assert_eq!(story, STORY);
    let cleaned = Timings::of(|| made.expect("a snapshot").cleanup());
    println!("cleanup:\n{}", cleaned.1);
    cleaned.0.expect("nobody has it open");
    let removals = cleaned.1.calls.iter();
    // More than once where somebody looks into the device just then.
    assert!(removals.filter(|call| call.step == Step::Remove).count() >= 1);
    for timings in [&timings, &cleaned.1] {
        let sum: Duration = timings.calls.iter().map(|call| call.took).sum();
        assert!(sum + timings.waited <= timings.total, "{timings}");
        assert!(timings.calls.is_sorted_by_key(|call| call.start));
    }
}

#[test]
fn waiting_for_a_holder_is_told_apart() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name").to_string();
    let holder = File::open(snapshot.device()).expect("the device opens");
    let patience = Retry::until(Duration::from_secs(1));
    let (removed, timings) = Timings::of(|| Teardown::new().retry(patience).remove(&name));
    removed.expect_err("it stays open");
    println!("remove:\n{timings}");
    let called: Duration = timings.calls.iter().map(|call| call.took).sum();
    assert!(timings.waited > Duration::ZERO, "{timings}");
    assert!(called + timings.waited <= timings.total, "{timings}");
    drop(holder);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn the_command_prints_the_table_beside_the_json() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let mut create = dmsnap();
    create
        .args(["create", "--timings"])
        .args([scene.image(), &cow]);
    let made = finish(create.arg(&name));
    let table = String::from_utf8_lossy(&made.stderr).into_owned();
    // Two loop devices, and once more for each that another process on this host was faster to take.
    let line = table.lines().find(|line| line.starts_with("AttachLoop "));
    let calls = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    assert!(calls.is_some_and(|calls: u32| calls >= 2), "{table}");
    let handles = scene.file("handles.json", &made.stdout);
    success(dmsnap().args(["cleanup", "--timings"]).arg(handles));
}
