//! Repairs of all there is: by `repair` without a name, and by a sweep.

use std::time::Duration;

use super::{Stage, is_gone, last_loop, uuid};
use crate::common::tools::finish;
use crate::common::{Scene, dmsnap, eventually};
use crate::facts::handover::{Writer, assert_files};

#[test]
fn a_sweep_repairs_what_it_keeps_and_a_layer_without_a_table_goes() {
    let scene = Scene::ext4();
    let mut stage = Stage::over(&scene);
    let writer = Writer::start(stage.at.clone());
    writer.go_on();
    let v = stage.v.clone();
    let b = stage
        .stack
        .device_of(&uuid(last_loop(&stage.stack), "-layer"));
    v.suspend();
    let kept = finish(dmsnap().args(["reap", "--dry-run", "--keep", &v.name]));
    assert!(kept.status.success(), "{kept:?}");
    assert_eq!(v.attributes(), "L-sw", "a dry run changes nothing");
    let kept = finish(dmsnap().args(["reap", "--keep", &v.name, "--keep", &b.name]));
    let text = String::from_utf8_lossy(&kept.stdout).into_owned();
    assert!(kept.status.success(), "{kept:?}");
    assert_eq!(text, format!("{}: kept\n", v.name));
    assert_eq!(v.attributes(), "L--w");
    writer.go_on();
    assert!(eventually(Duration::from_secs(60), || is_gone(&b)));

    let b = stage
        .stack
        .device_of(&uuid(last_loop(&stage.stack), "-layer"));
    v.suspend();
    let all = finish(dmsnap().args(["repair", "--json"]));
    assert!(all.status.success(), "{all:?}");
    let found: serde_json::Value = serde_json::from_slice(&all.stdout).expect("JSON");
    let expected = serde_json::json!([
        {"name": v.name, "outcome": "resumed"},
        {"name": b.name, "outcome": "undone"},
    ]);
    assert_eq!(found, expected);
    assert!(is_gone(&b));
    let again = finish(dmsnap().arg("repair"));
    assert!(
        again.status.success() && again.stdout.is_empty(),
        "{again:?}"
    );
    let written = writer.stop();
    assert_files(&stage.at, written);
}
