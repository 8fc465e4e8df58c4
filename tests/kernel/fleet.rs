//! Many torn down together.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dmsnap::error::Retry;
use dmsnap::teardown::Fate;
use dmsnap::{ErrorKind, Handles, ReapOptions, Teardown, cleanup};

use crate::common::reading::{alias_exists, dm_listed};
use crate::common::tools::success;
use crate::common::{Scene, chain, dmsnap, eventually};
use crate::proof::repeated;

/// Nothing takes this long that does not hang.
const HANGS: Duration = Duration::from_secs(120);

fn fleet(scene: &Scene, count: usize) -> Vec<Handles> {
    let ships = (0..count).map(|_| scene.snapshot().into_handles());
    ships.collect()
}

fn all_well(results: &[dmsnap::Result<dmsnap::teardown::Outcome>]) {
    for (nth, result) in results.iter().enumerate() {
        if let Err(error) = result {
            panic!("{nth}: {}", chain(error));
        }
    }
}

/// Whether any of them is there, or its alias.
fn any_exists(ships: &[Handles]) -> bool {
    let devices = dm_listed();
    ships.iter().any(|handles| {
        let name = handles.name.as_ref().expect("a name").to_string();
        devices.contains(&name) || alias_exists(&name)
    })
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// The most threads that this process has until it is told to stop looking.
fn most_threads(stop: &AtomicBool) -> usize {
    let mut most = 0;
    while !stop.load(Ordering::Relaxed) {
        most = most.max(threads());
        thread::sleep(Duration::from_millis(5));
    }
    most
}

/// How much faster that is than one after the other is the bench's (`64 at once`); that they are at work side by side is
/// shown by the busy ones below.
#[test]
fn a_fleet_is_torn_down_by_a_few_threads() {
    let scene = Scene::new();
    let ships = fleet(&scene, repeated(48, 128));
    let before = threads();
    let stop = AtomicBool::new(false);
    let most = thread::scope(|scope| {
        let watcher = scope.spawn(|| most_threads(&stop));
        let results = Teardown::new().cleanup_all(&ships);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(results.len(), ships.len());
        all_well(&results);
        watcher.join().expect("it only looks")
    });
    assert!(!any_exists(&ships));
    let helpers = most.saturating_sub(before + 1);
    println!("{} teardowns with {helpers} threads more", ships.len());
    assert!(helpers < 16, "{helpers} threads more");
}

/// Holders that close one after the other, the last one first, and each only when all that nobody has open is gone: a
/// teardown that waited for one before it looked at the next would never end.
#[test]
fn busy_ones_keep_no_other_waiting_and_are_waited_for_together() {
    let scene = Scene::new();
    // More busy ones than threads.
    let ships = fleet(&scene, 40);
    let open = |handles: &Handles| {
        let device = handles.device.as_deref().expect("a device");
        File::open(device).expect("the device opens")
    };
    let mut held: Vec<_> = ships[..20].iter().map(open).collect();
    let results = thread::scope(|scope| {
        scope.spawn(|| {
            while let Some(last) = held.pop() {
                let free = &ships[held.len() + 1..];
                let gone = || !any_exists(free);
                assert!(eventually(HANGS, gone), "held up by the busy ones");
                drop(last);
            }
        });
        Teardown::new()
            .retry(Retry::until(HANGS * 2))
            .cleanup_all(&ships)
    });
    all_well(&results);
    assert!(!any_exists(&ships));
}

#[test]
fn one_that_stays_busy_is_named_and_the_others_are_gone() {
    let scene = Scene::new();
    let ships = fleet(&scene, 6);
    let device = ships[0].device.as_deref().expect("a device");
    let stays = File::open(device).expect("the device opens");
    for retry in [Retry::until(Duration::from_secs(1)), Retry::ONCE] {
        let clean = || Teardown::new().retry(retry).cleanup_all(&ships);
        let mut results = clean();
        // On a busy machine their loop devices may take longer than that, too.
        let others_gone = eventually(HANGS, || {
            let gone = results[1..].iter().all(Result::is_ok);
            if !gone {
                results = clean();
            }
            gone
        });
        assert!(others_gone, "{results:?}");
        assert!(!any_exists(&ships[1..]));
        let error = results[0].as_ref().expect_err("it stays open");
        assert_eq!(error.kind(), ErrorKind::Busy);
        println!("message: one of many stays busy: {}", chain(error));
        // Who has it open is looked for after a wait.
        let holder = format!("(pid {})", std::process::id());
        let named = chain(error).ends_with(&holder);
        assert_eq!(named, retry != Retry::ONCE, "{error:?}");
    }
    drop(stays);
    all_well(&Teardown::new().cleanup_all(&ships));
    assert!(!any_exists(&ships));
}

#[test]
fn a_sweep_and_the_command_line_take_many_down() {
    let scene = Scene::new();
    let ships = fleet(&scene, 6);
    let kept = ships[5].name.clone().expect("a name").to_string();
    let swept = ReapOptions::new().reap(|info| info.name == kept);
    for item in swept.expect("a sweep") {
        let expected = if item.name == kept {
            Fate::Kept
        } else {
            Fate::Removed
        };
        assert_eq!(item.fate, Ok(expected), "{}", item.name);
    }
    assert!(any_exists(&ships[5..]) && !any_exists(&ships[..5]));

    let made = |nth: usize| {
        let (name, cow) = (scene.name(), scene.cow(format!("cli-{nth}.cow")));
        let mut command = dmsnap();
        let json = success(command.arg("create").args([scene.image(), &cow]).arg(name));
        (scene.file(format!("{nth}.json"), &json), json)
    };
    let [first, second, third] = [0, 1, 2].map(made);
    let array = scene.file("array.json", format!("[{}, {}]", second.1, third.1));
    success(dmsnap().arg("cleanup").args([first.0, array]));
    cleanup(&ships[5]).expect("nobody has it open");
    scene.assert_clean();
}
