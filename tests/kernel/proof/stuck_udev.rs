//! A udevd that is stopped: create and cleanup do not wait for it, and when it goes on, all settles.

use std::fs;
use std::path::Path;
use std::time::Duration;

use dmsnap::timings::Timings;

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

/// The kernel calls of a create and of a cleanup and the time spent waiting between them, the least of some tries.
fn effort(scene: &Scene, names: &mut Vec<String>) -> [(usize, Duration); 2] {
    let tries = (0..12).map(|_| {
        let (made, create) = Timings::of(|| scene.snapshot());
        let name = made.handles().name.clone().expect("a name").to_string();
        fs::File::open(made.device()).expect("the device opens at once");
        let alias = Path::new("/dev/mapper").join(&name);
        fs::File::open(alias).expect("the alias opens at once");
        names.push(name);
        let (cleaned, cleanup) = Timings::of(|| made.cleanup());
        cleaned.expect("nobody has it open");
        [create, cleanup].map(|timings| (timings.calls.len(), timings.waited))
    });
    let tries: Vec<_> = tries.skip(1).collect();
    [0, 1].map(|which| {
        let least = tries.iter().map(|each| each[which]).min();
        least.expect("some tries")
    })
}

/// What waits for udevd waits for ever while it is stopped, or makes more calls or pauses. Without udevd it is the same
/// twice.
#[test]
fn a_stuck_udevd_is_not_waited_for() {
    let scene = Scene::new();
    let mut names = Vec::new();
    let before = effort(&scene, &mut names);
    let stopped = Stopped::stop();
    assert_eq!(
        !stopped.0.is_empty(),
        udev(),
        "udevd runs if it was said to"
    );
    let stuck = effort(&scene, &mut names);
    println!(
        "calls and waits of a create and a cleanup: {before:?}; with udevd stopped: {stuck:?}"
    );
    for (stuck, before) in stuck.into_iter().zip(before) {
        assert!(stuck.0 <= before.0, "{stuck:?} and {before:?}");
        assert_eq!(stuck.1, Duration::ZERO, "it waited");
    }
    scene.assert_clean();

    drop(stopped);
    settle();
    scene.assert_clean();
    let stale = |name: &String| Path::new("/dev/mapper").join(name).is_symlink();
    assert!(
        eventually(Duration::from_secs(60), || !names.iter().any(stale)),
        "udevd made an alias for a device that is gone"
    );
}
