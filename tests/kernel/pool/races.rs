//! The pool against what happens at the same time: sweeps, other releases, a kill while it opens.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use dmsnap::pool::CowFate;
use dmsnap::teardown::Fate;
use dmsnap::watch::{Change, Watch};
use dmsnap::{ErrorKind, Origin, ReapOptions, SnapshotOptions, cleanup};

use super::{PATIENCE, claim, live, options, pool, unclaimed};
use crate::common::reading::{dm_exists, dm_names, loops_over};
use crate::common::tools::success;
use crate::common::{PREFIX, Scene, chain, dmsnap, eventually};
use crate::proof::worker::Process;

/// What makes this binary a worker: what it is to do, its directory, its image, and a name.
const JOB: &str = "DMSNAP_TEST_POOL_RACE";

fn start(job: &str, scene: &Scene, name: &str) -> Process {
    let (dir, image) = (scene.dir().display(), scene.image().display());
    let this = env::current_exe().expect("this binary");
    let words = [
        "--exact",
        "pool::races::a_worker_does_its_job",
        "--nocapture",
    ];
    let mut command = Command::new(this);
    command.env(JOB, format!("{job}\n{dir}\n{image}\n{name}"));
    Process::start(command.args(words))
}

/// Says that it has done its part, and then waits to be killed.
fn work(job: &str) -> Result<(), String> {
    let words: Vec<&str> = job.split('\n').collect();
    let [job, dir, image, name] = words[..] else {
        return Err(format!("no job: {job:?}"));
    };
    let (dir, text) = (Path::new(dir), |error: dmsnap::Error| chain(&error));
    let origin = Origin::open(image).map_err(text)?;
    let done = || {
        File::create(dir.join("done")).map_err(|error| error.to_string())?;
        loop {
            std::thread::park();
        }
    };
    if job == "join" {
        return done();
    }
    let pool = options(3).open(&origin, dir).map_err(text)?;
    if job == "claim" {
        assert!(pool.wait_ready(3, PATIENCE));
        let _claimed = pool.claim(name).map_err(text)?;
        assert!(pool.wait_ready(3, PATIENCE));
        return done();
    }
    pool.drain().map_err(text)
}

#[test]
fn a_worker_does_its_job() {
    if let Ok(job) = env::var(JOB) {
        let done = work(&job);
        if let Err(why) = &done {
            let _ = writeln!(std::io::stderr(), "{why}");
        }
        std::process::exit(done.map_or(1, |()| 0));
    }
}

/// A sweep looked at a device while it was the pool's. It was claimed, the pool ended, and the sweep took it down by
/// its uuid, which no claim changes.
#[test]
fn a_device_that_is_claimed_while_a_sweep_is_at_work_is_the_claimants() {
    let scene = Scene::new();
    let mut waiting = Some(pool(&scene, 1));
    let mut claimed = None;
    // What the pool has is not offered to anybody; another snapshot is, at the same moment.
    let _other = scene.snapshot();
    let reaped = ReapOptions::new().reap(|info| {
        assert!(!info.name.starts_with("dmsnap-pool-"), "{info:?}");
        if let Some(pool) = waiting.take() {
            claimed = Some(claim(&scene, &pool));
            pool.drain().expect("nothing is open");
        }
        false
    });
    let claimed = claimed.expect("the pool had one");
    for item in reaped.expect("a sweep") {
        let fate = item.fate.expect("it could be looked at");
        assert!(matches!(fate, Fate::InProgress | Fate::Removed), "{fate:?}");
    }
    let name = claimed.snapshot.handles().name.clone().expect("a name");
    assert!(dm_exists(name.as_str()) && claimed.cow.exists());
    live(claimed.snapshot.device(), 4).unwrap_or_else(|why| panic!("{why}"));
    claimed.snapshot.cleanup().expect("idle");
}

/// All of them are taken back, so that none waits for a removal, and the pool's thread removes what is too many.
#[test]
fn releases_at_once_keep_no_more_devices_than_the_pool_is_to_have() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let claimed = [(); 4].map(|()| {
        assert!(pool.wait_ready(1, PATIENCE), "{:?}", pool.status());
        let claimed = claim(&scene, &pool);
        assert!(claimed.warm);
        claimed
    });
    assert!(pool.wait_ready(1, PATIENCE), "{:?}", pool.status());
    let together = Barrier::new(claimed.len());
    let recycled: usize = std::thread::scope(|scope| {
        let release = |each: &dmsnap::pool::Claimed| {
            together.wait();
            let released = pool.release(each.snapshot.handles(), CowFate::Delete);
            usize::from(released.expect("idle").taken_back)
        };
        let threads: Vec<_> = claimed
            .iter()
            .map(|each| scope.spawn(move || release(each)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|recycled| recycled.expect("no panic")).sum()
    });
    assert!(pool.wait_recycled(PATIENCE), "{:?}", pool.status());
    let status = pool.status();
    assert_eq!((recycled, status.spare), (4, 1), "{status:?}");
    // The ready one, the spare one and the keeper.
    assert_eq!(unclaimed(), 3);
    pool.drain().expect("nothing is open");
    assert_eq!(unclaimed(), 0);
}

/// The refill took the one that was on its way back for one that was gone.
#[test]
fn claims_that_fail_let_the_pool_grow_no_larger() {
    let scene = Scene::new();
    let pool = pool(&scene, 2);
    let other = scene.snapshot();
    let taken = other.handles().name.clone().expect("a name");
    for _ in 0..50 {
        let refused = pool.claim(taken.as_str()).expect_err("taken");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(pool.status().ready, 2);
    other.cleanup().expect("idle");
    pool.drain().expect("nothing is open");
}

#[test]
fn a_release_of_what_is_gone_deletes_nobody_elses_cow_file() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let none = options(0).open(&origin, scene.dir()).expect("a pool");
    let first = claim(&scene, &none);
    let old = first.snapshot.handles().clone();
    cleanup(&old).expect("idle");
    let other = claim(&scene, &none);
    let released = none.release(&old, CowFate::Delete);
    let released = released.expect("it is gone already");
    assert!(!released.taken_back && released.cow.is_none());
    assert!(other.cow.exists(), "it is another VM's");
    live(other.snapshot.device(), 6).unwrap_or_else(|why| panic!("{why}"));
    other.snapshot.cleanup().expect("idle");
    none.drain().expect("nothing is open");
}

/// The device of a pool lives on, and the watch followed it to the next VM.
#[test]
fn a_watch_ends_with_the_release() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let claimed = claim(&scene, &pool);
    let mut watch = Watch::new().expect("a watch");
    let name = claimed.snapshot.handles().name.clone().expect("a name");
    watch.add(name.as_str()).expect("it is live");
    assert_eq!(watch.check().expect("it can be armed"), []);
    let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
    assert!(released.expect("idle").taken_back);
    let begin = Instant::now();
    let mut seen = Vec::new();
    while !watch.is_empty() && begin.elapsed() < PATIENCE {
        watch.wait().expect("it can be polled");
        let news = watch.check().expect("it can be armed");
        seen.extend(news.into_iter().map(|event| event.change));
    }
    assert_eq!(seen, [Change::Gone]);
    pool.drain().expect("nothing is open");
}

fn wait_done(worker: &mut Process, scene: &Scene) {
    let done = scene.path("done");
    assert!(eventually(PATIENCE, || done.exists() || !worker.is_running()));
    assert!(done.exists(), "the worker ended");
}

#[test]
fn the_command_line_sweeps_up_a_dead_pool_and_leaves_what_was_claimed() {
    let scene = Scene::new();
    let name = scene.name();
    let mut worker = start("claim", &scene, &name);
    wait_done(&mut worker, &scene);
    success(dmsnap().args(["reap", "--keep", &name]));
    assert_eq!(unclaimed(), 4, "its process is alive");
    worker.kill();
    success(dmsnap().args(["reap", "--keep", &name]));
    assert_eq!(unclaimed(), 0, "{:?}", dm_names());
    let found = dmsnap::status(&name).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let cow = found.cow.clone().and_then(|cow| cow.path).expect("a file");
    let files = fs::read_dir(scene.dir()).expect("a directory").flatten();
    let files: Vec<_> = files
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cow"))
        .collect();
    assert_eq!(files, [cow], "the claimed one's is left alone");
    let handles = found.handles();
    live(handles.device.as_ref().expect("a device"), 8).unwrap_or_else(|why| panic!("{why}"));
    cleanup(&handles).expect("idle");
    assert!(eventually(Duration::from_secs(60), || loops_over(
        scene.image()
    ) == 0));
}

#[test]
fn another_process_shares_the_origin_and_the_last_user_takes_it_along() {
    let scene = Scene::new();
    let mut first = start("join", &scene, "");
    wait_done(&mut first, &scene);
    let origin = Origin::open(scene.image()).expect("an image");
    assert_eq!(loops_over(scene.image()), 1, "it is shared");
    first.kill();
    assert_eq!(loops_over(scene.image()), 1, "it is in use");
    let made = SnapshotOptions::new().create_on(&origin, scene.cow("cow"), &scene.name());
    let made = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fs::remove_file(scene.path("done")).expect("it is there");
    let mut second = start("join", &scene, "");
    wait_done(&mut second, &scene);
    drop(origin);
    made.cleanup().expect("idle");
    assert_eq!(loops_over(scene.image()), 1, "the second process has it");
    second.kill();
    assert!(
        eventually(Duration::from_secs(60), || loops_over(scene.image()) == 0),
        "autoclear"
    );
}

/// Killed ever later: before there is a keeper, while it is made, while the first ones are made, while they are
/// drained.
#[test]
fn a_kill_while_a_pool_opens_leaves_nothing_for_long() {
    let scene = Scene::new();
    for nth in 0..40_u64 {
        let mut worker = start("drain", &scene, "");
        std::thread::sleep(Duration::from_micros(2000 + nth * nth * 40));
        let _ = worker.is_running();
        worker.kill();
        if nth % 4 == 0 {
            let swept = ReapOptions::new().reap(|_| false).expect("a sweep");
            let due = swept.iter().filter(|item| item.fate.is_err());
            assert_eq!(due.count(), 0, "{swept:?}");
            assert_eq!(unclaimed(), 0, "{:?}", dm_names());
        }
    }
    let origin = Origin::open(scene.image()).expect("an image");
    let last = options(0).open(&origin, scene.dir()).expect("a pool");
    last.drain().expect("nothing is open");
    assert_eq!(unclaimed(), 0, "{:?}", dm_names());
    let files = fs::read_dir(scene.dir()).expect("a directory").flatten();
    let files = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let left: Vec<_> = files.filter(|name| name.ends_with(".cow")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!dm_names().iter().any(|name| name.starts_with(PREFIX)));
}
