//! A udevd that is stopped: create and cleanup do not wait for it, and when it goes on, all settles.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{Cost, timed};
use crate::common::{Scene, eventually, output, settle, udev};

/// The pids of udevd and its workers; none where none runs.
fn daemons() -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter(|entry| {
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        ["systemd-udevd", "(udev-worker)", "udevadm"].contains(&comm.trim_end())
    });
    pids.map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// All of udevd under SIGSTOP, until dropped.
struct Stopped(Vec<String>);

impl Stopped {
    fn stop() -> Self {
        let stopped = Self(daemons());
        for pid in &stopped.0 {
            // A worker may have ended since.
            output!("kill", "-STOP", pid);
        }
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            output!("kill", "-CONT", pid);
        }
    }
}

/// What a create and a cleanup take, and the names they had.
fn cost(scene: &Scene, names: &mut Vec<String>) -> [Cost; 2] {
    let measured = (0..12).map(|_| {
        let (made, create) = timed(|| scene.snapshot());
        let name = made.handles().name.clone().expect("a name").to_string();
        fs::File::open(made.device()).expect("the device opens at once");
        let alias = Path::new("/dev/mapper").join(&name);
        fs::File::open(alias).expect("the alias opens at once");
        names.push(name);
        let (cleaned, cleanup) = timed(|| made.cleanup());
        cleaned.expect("nobody has it open");
        (create, cleanup)
    });
    let (creates, cleanups) = measured.skip(1).unzip();
    [Cost::of(creates), Cost::of(cleanups)]
}

/// Without udevd it is the same measurement twice, which shows what the factor is worth.
#[test]
fn a_stuck_udevd_is_not_waited_for() {
    let scene = Scene::new();
    let mut names = Vec::new();
    let before = cost(&scene, &mut names);
    let stopped = Stopped::stop();
    assert_eq!(
        !stopped.0.is_empty(),
        udev(),
        "udevd runs if it was said to"
    );
    let mut stuck = cost(&scene, &mut names);
    let fair =
        |stuck: &[Cost; 2]| (0..2).all(|which| stuck[which].fastest <= before[which].fastest * 2);
    for _ in 0..4 {
        if !fair(&stuck) {
            let again = cost(&scene, &mut names);
            stuck = [0, 1].map(|which| stuck[which].or_less(again[which]));
        }
    }
    let text = |cost: &[Cost; 2]| format!("create {}; cleanup {}", cost[0], cost[1]);
    let (before, with) = (text(&before), text(&stuck));
    println!("{before}; with udevd stopped: {with}");
    assert!(fair(&stuck), "{before}; with udevd stopped: {with}");
    scene.assert_clean();

    drop(stopped);
    settle();
    scene.assert_clean();
    let stale = |name: &String| Path::new("/dev/mapper").join(name).is_symlink();
    assert!(
        eventually(Duration::from_secs(10), || !names.iter().any(stale)),
        "udevd made an alias for a device that is gone"
    );
}
