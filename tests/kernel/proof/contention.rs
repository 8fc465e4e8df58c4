//! Many processes at once over one origin, beside another tool that attaches and detaches loop devices of its own.

use std::time::Duration;

use super::worker::{Job, assert_done};
use super::{repeated, timed};
use crate::common::{Scene, output, reading, run};

const PROCESSES: usize = 8;

#[test]
fn eight_processes_over_one_origin_beside_a_foreign_losetup() {
    let scene = Scene::new();
    let cycles = repeated(12, 100);
    let theirs = scene.cow("theirs");
    let jobs = (0..PROCESSES).map(|nth| Job {
        cycles,
        origin: scene.image(),
        cow: scene.path(format!("{nth}.cow")),
        name: scene.name(),
    });
    let mut workers: Vec<_> = jobs.map(|job| job.start()).collect();

    // A lost race for a free loop device is losetup's own affair, and so is how often it tries again.
    let (mut attached, mut lost) = (0, 0);
    let watch = || {
        while workers.iter_mut().any(|worker| worker.is_running()) {
            let done = output!("losetup", "-f", "--show", &theirs);
            if !done.status.success() {
                lost += 1;
                continue;
            }
            attached += 1;
            let device = String::from_utf8_lossy(&done.stdout).trim().to_owned();
            let listed = run!("losetup", "-l", "-n", "-O", "NAME,BACK-FILE");
            let is_theirs = |line: &&str| line.split_whitespace().next() == Some(&device);
            let line = listed.lines().find(is_theirs).unwrap_or_default();
            let path = theirs.to_str().expect("ASCII");
            assert!(
                line.ends_with(path),
                "{device} is {path}'s no more: {listed}"
            );
            let bound = reading::loop_at(device.as_ref()).expect("still bound");
            assert_eq!(bound.backing, theirs, "{device} serves somebody else");
            run!("losetup", "-d", &device);
        }
    };
    let ((), took) = timed(watch);
    println!(
        "{PROCESSES} processes x {cycles} cycles in {took:.1?}; \
         another tool attached {attached} times and lost {lost} races"
    );
    assert!(attached > 0, "the other tool never had a loop device");
    for worker in workers {
        assert_done(worker, Duration::from_secs(60));
    }
}
