//! Many at once.

use std::fs::File;
use std::thread;
use std::time::Instant;

use dmsnap::{SnapshotOptions, cleanup};

use crate::common::reading::alias_exists;
use crate::common::scene::{COW_BYTES, content};
use crate::common::tools::{complaint, start, success};
use crate::common::{Scene, chain, dmsnap, output, settle};
use crate::proof::repeated;

const THREADS: usize = 4;

#[test]
fn four_threads_make_and_remove_snapshots_one_after_the_other() {
    let scene = Scene::new();
    let cycles = repeated(30, 200);
    let begin = Instant::now();
    thread::scope(|scope| {
        for nth in 0..THREADS {
            let (name, cow) = (scene.name(), scene.cow(format!("{nth}.cow")));
            let image = scene.image();
            scope.spawn(move || {
                for cycle in 0..cycles {
                    // Half of them open the store of the cycle before, which takes other ways in the kernel than
                    // making a new one.
                    if nth % 2 == 0 {
                        let blank = File::create(&cow).and_then(|file| file.set_len(COW_BYTES));
                        blank.expect("nobody has it");
                    }
                    let failed = |error: dmsnap::Error| -> () {
                        panic!("thread {nth}, cycle {cycle}: {}", chain(&error))
                    };
                    match SnapshotOptions::new().create(image, &cow, &name) {
                        Ok(snapshot) => snapshot.cleanup().unwrap_or_else(failed),
                        Err(error) => failed(error),
                    }
                }
            });
        }
    });
    println!(
        "{THREADS} threads x {cycles} cycles: {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    settle();
}

#[test]
fn of_two_processes_with_one_name_one_wins() {
    let scene = Scene::new();
    for round in 0..5 {
        let name = scene.name();
        let racers = [0, 1].map(|nth| {
            let cow = scene.cow(format!("{round}-{nth}.cow"));
            let mut command = dmsnap();
            start(command.arg("create").args([scene.image(), &cow]).arg(&name))
        });
        let done = racers.map(|racer| racer.join());
        let (winners, losers): (Vec<_>, Vec<_>) =
            done.iter().partition(|done| done.status.success());
        assert_eq!(winners.len(), 1, "{done:?}");
        let line = complaint(losers[0]);
        assert_eq!(
            line,
            format!(
                "cannot create /dev/mapper/{name}: Device or resource busy (os error 16): there is a dm device of that name already"
            )
        );
        let alias = std::path::Path::new("/dev/mapper").join(&name);
        assert_eq!(content(&alias), content(scene.image()));
        let handles = scene.file(format!("{round}.json"), &winners[0].stdout);
        success(dmsnap().arg("cleanup").arg(handles));
        assert!(!alias_exists(&name));
        scene.assert_clean();
    }
}

#[test]
fn two_cleanups_of_one_snapshot_both_succeed() {
    let scene = Scene::new();
    for _ in 0..5 {
        let handles = scene.snapshot().into_handles();
        thread::scope(|scope| {
            let both = [(); 2].map(|()| scope.spawn(|| cleanup(&handles)));
            for one in both {
                one.join()
                    .expect("no panic")
                    .unwrap_or_else(|error| panic!("{}", chain(&error)));
            }
        });
        scene.assert_clean();
    }
}

#[test]
fn losetup_races_for_the_same_free_devices() {
    let scene = Scene::new();
    let theirs = scene.cow("theirs");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stop = &stop;
    thread::scope(|scope| {
        let racer = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let attached = output!("losetup", "-f", "--show", &theirs);
                let device = String::from_utf8_lossy(&attached.stdout).trim().to_owned();
                if !device.is_empty() {
                    rounds += 1;
                    output!("losetup", "-d", device);
                }
            }
            rounds
        });
        for _ in 0..20 {
            let made = SnapshotOptions::new().create(
                scene.image(),
                scene.cow(scene.name()),
                &scene.name(),
            );
            let ended = made.and_then(dmsnap::Snapshot::cleanup);
            if let Err(error) = ended {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                panic!("{}", chain(&error));
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("losetup rounds meanwhile: {:?}", racer.join());
    });
}
