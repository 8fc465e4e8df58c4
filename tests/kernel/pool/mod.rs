//! The warm pool: what is claimed is the caller's, what is released serves again, and nobody reads another's bytes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dmsnap::error::{Refusal, Step};
use dmsnap::pool::{Claimed, CowFate, WhenEmpty};
use dmsnap::teardown::Fate;
use dmsnap::timings::Timings;
use dmsnap::{
    CowSize, Durability, ErrorKind, Origin, Pool, PoolOptions, ReapOptions, SnapshotOptions,
    Teardown, cleanup,
};

use crate::common::reading::{
    alias_exists, dm_exists, dm_names, dm_table, loops_below, loops_over,
};
use crate::common::{Mounted, PREFIX, Scene, chain, eventually};

mod bursts;
mod kills;
mod races;

const PATIENCE: Duration = Duration::from_secs(20);
/// The chunks in which the tests write, of those that a scene's image has.
const CHUNKS: u64 = 16;

fn options(size: usize) -> PoolOptions {
    let mut options = PoolOptions::new();
    let mut snapshot = SnapshotOptions::new();
    snapshot.make_cow(CowSize::Bytes(8 << 20));
    options.size(size).snapshot(&snapshot);
    options
}

/// A pool that is full.
fn pool(scene: &Scene, size: usize) -> Pool {
    let origin = Origin::open(scene.image()).expect("an image");
    let pool = options(size).open(&origin, scene.dir()).expect("a pool");
    assert!(pool.wait_ready(size, PATIENCE), "{:?}", pool.status());
    pool
}

fn claim(scene: &Scene, pool: &Pool) -> Claimed {
    pool.claim(&scene.name())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// What chunk `nth` of a scene's image holds.
fn original(nth: u64) -> Vec<u8> {
    nth.to_le_bytes().repeat(512)
}

/// A VM's stay on a disk: it sees the image in every chunk, through the page cache, and then its own bytes where it has
/// written.
fn live(device: &Path, tag: u64) -> Result<(), String> {
    let disk = File::options().read(true).write(true).open(device);
    let disk = disk.map_err(|error| format!("{}: {error}", device.display()))?;
    let mut seen = vec![0; 4096];
    let mut check = |nth: u64, expected: &[u8], when: &str| {
        let read = disk.read_exact_at(&mut seen, nth * 4096);
        read.map_err(|error| format!("{}: {error}", device.display()))?;
        let same = seen == expected;
        let found = u64::from_le_bytes(seen[..8].try_into().expect("eight bytes"));
        same.then_some(()).ok_or_else(|| {
            format!(
                "{} {when}: chunk {nth} of VM {tag:#x} reads {found:#x}",
                device.display()
            )
        })
    };
    for nth in 0..CHUNKS {
        check(nth, &original(nth), "at first")?;
    }
    let own = [tag % CHUNKS, tag / CHUNKS % CHUNKS];
    let written = tag.to_le_bytes().repeat(512);
    for nth in own {
        disk.write_all_at(&written, nth * 4096)
            .map_err(|error| format!("{}: {error}", device.display()))?;
    }
    disk.sync_all().map_err(|error| error.to_string())?;
    for nth in 0..CHUNKS {
        let expected = if own.contains(&nth) {
            written.clone()
        } else {
            original(nth)
        };
        check(nth, &expected, "afterwards")?;
    }
    Ok(())
}

/// Whether a loop device has the file, deleted or not.
fn is_held(cow: &Path) -> bool {
    let bound = loops_below(cow.parent().expect("a directory"));
    let of = |backing: &Path| {
        backing
            .to_string_lossy()
            .starts_with(&*cow.to_string_lossy())
    };
    bound.iter().any(|bound| of(&bound.backing))
}

fn unclaimed() -> usize {
    dm_names()
        .iter()
        .filter(|name| name.starts_with("dmsnap-pool-"))
        .count()
}

#[test]
fn a_claimed_snapshot_is_like_any_other_and_a_released_device_serves_again() {
    let scene = Scene::new();
    let pool = pool(&scene, 2);
    let mut devices = Vec::new();
    for tag in 1..12 {
        assert!(pool.wait_ready(1, PATIENCE), "{:?}", pool.status());
        let claimed = claim(&scene, &pool);
        assert!(claimed.warm);
        let handles = claimed.snapshot.handles();
        let name = handles.name.as_ref().expect("a name").as_str();
        assert!(dm_exists(name) && alias_exists(name) && claimed.cow.exists());
        assert_eq!(claimed.cow.parent(), Some(scene.dir()));
        assert!(dm_table(name).ends_with(" N 8"), "{}", dm_table(name));
        assert_eq!(&dmsnap::adopt(name).expect("it is ours"), handles);
        live(claimed.snapshot.device(), tag).unwrap_or_else(|why| panic!("{why}"));
        devices.push(handles.device.clone().expect("a device"));
        if tag % 4 == 0 {
            // From any process, by the handles alone.
            cleanup(handles).expect("nobody has it open");
            fs::remove_file(&claimed.cow).expect("it stayed");
            continue;
        }
        let released = pool
            .release(handles, CowFate::Delete)
            .expect("nobody has it open");
        assert!(released.taken_back && released.cow.is_none());
        assert!(!claimed.cow.exists() && !dm_exists(name) && !alias_exists(name));
        if tag % 2 == 0 {
            assert!(pool.wait_recycled(PATIENCE), "{:?}", pool.status());
            assert!(!is_held(&claimed.cow));
        }
    }
    let different: std::collections::BTreeSet<_> = devices.iter().collect();
    assert!(
        different.len() < devices.len(),
        "no device served twice: {devices:?}"
    );
    assert_eq!(loops_over(scene.image()), 1, "all share the origin's");
    pool.drain().expect("nobody has anything open");
    assert_eq!(unclaimed(), 0);
}

#[test]
fn the_cow_file_is_kept_or_handed_back_as_asked() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let mut options = options(1);
    options.durability(Durability::PowerCuts);
    let pool = options.open(&origin, scene.dir()).expect("a pool");
    for fate in [CowFate::Keep, CowFate::HandBack] {
        assert!(pool.wait_ready(1, PATIENCE));
        let claimed = claim(&scene, &pool);
        live(claimed.snapshot.device(), 0x77).unwrap_or_else(|why| panic!("{why}"));
        let released = pool
            .release(claimed.snapshot.handles(), fate)
            .expect("idle");
        assert_eq!(released.cow.as_ref(), Some(&claimed.cow));
        assert_eq!(released.file.is_some(), fate == CowFate::HandBack);
        if let Some(file) = &released.file {
            // As a caller would have opened it.
            let flags =
                nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL).expect("an open file");
            assert_eq!(flags & nix::libc::O_NONBLOCK, 0, "{flags:o}");
        }
        // It has the VM's disk, and is free at once.
        let name = scene.name();
        let again = SnapshotOptions::new().create(scene.image(), &claimed.cow, &name);
        let again = again.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let mut seen = vec![0; 4096];
        let disk = File::open(again.device()).expect("a disk");
        disk.read_exact_at(&mut seen, 7 * 4096)
            .expect("it has so much");
        assert_eq!(seen, 0x77u64.to_le_bytes().repeat(512));
        drop(disk);
        again.cleanup().expect("idle");
        fs::remove_file(&claimed.cow).expect("it stayed");
    }
    drop(pool);
    assert_eq!(unclaimed(), 0, "dropping drains");
}

#[test]
fn an_empty_pool_makes_one_or_waits_as_asked() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let none = options(0).open(&origin, scene.dir()).expect("a pool");
    let claimed = claim(&scene, &none);
    assert!(!claimed.warm, "it says so");
    live(claimed.snapshot.device(), 5).unwrap_or_else(|why| panic!("{why}"));
    let released = none
        .release(claimed.snapshot.handles(), CowFate::Delete)
        .expect("idle");
    assert!(!released.taken_back, "it is no pool's");
    assert!(!claimed.cow.exists());
    // A pool with room for spares does not keep the device of a cold claim either.
    let (cold, roomy) = (claim(&scene, &none), pool(&scene, 2));
    let released = roomy.release(cold.snapshot.handles(), CowFate::Delete);
    assert!(!released.expect("idle").taken_back, "it never was ready");
    drop(roomy);
    none.drain().expect("nothing is open");

    let mut waits = options(0);
    waits.when_empty(WhenEmpty::Wait(Duration::from_millis(50)));
    let waits = waits.open(&origin, scene.dir()).expect("a pool");
    let refused = waits.claim(&scene.name()).expect_err("none is ever ready");
    assert_eq!(refused, Refusal::PoolEmpty.into());
    waits.drain().expect("nothing is open");

    let mut waits = options(1);
    waits.when_empty(WhenEmpty::Wait(PATIENCE));
    let waits = waits.open(&origin, scene.dir()).expect("a pool");
    for _ in 0..3 {
        let claimed = claim(&scene, &waits);
        assert!(claimed.warm);
        waits
            .release(claimed.snapshot.handles(), CowFate::Delete)
            .expect("idle");
    }
    waits.drain().expect("nothing is open");
}

#[test]
fn a_refill_that_fails_is_seen_put_off_and_tried_again() {
    let scene = Scene::new();
    let origin = Origin::open(scene.image()).expect("an image");
    let dir = scene.path("later");
    let pool = options(1).open(&origin, &dir).expect("a pool");
    assert!(eventually(PATIENCE, || pool.status().failures > 1));
    let status = pool.status();
    let why = status.last_error.expect("it failed");
    assert_eq!(why.kind(), ErrorKind::Gone, "{}", chain(&why));
    assert!(
        status
            .retry_in
            .is_some_and(|pause| pause <= Duration::from_secs(10))
    );
    assert_eq!(
        pool.claim(&scene.name()).expect_err("no directory").kind(),
        ErrorKind::Gone
    );
    fs::create_dir(&dir).expect("a directory");
    assert!(pool.wait_ready(1, PATIENCE), "{:?}", pool.status());
    let status = pool.status();
    assert_eq!((status.failures, status.last_error), (0, None));
    pool.drain().expect("nothing is open");
}

#[test]
fn names_that_are_taken_cost_the_pool_nothing() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let other = scene.snapshot();
    let taken = other.handles().name.clone().expect("a name");
    let refused = pool.claim(taken.as_str()).expect_err("taken");
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{}", chain(&refused));
    for bad in ["", "a/b", "dmsnap-pool-1"] {
        assert!(pool.claim(bad).is_err(), "{bad}");
    }
    assert_eq!(pool.status().ready, 1, "it is still ready");
    let claimed = claim(&scene, &pool);
    assert!(claimed.warm);
    claimed.snapshot.cleanup().expect("idle");
    other.cleanup().expect("idle");
    pool.drain().expect("nothing is open");
}

#[test]
fn what_somebody_else_removed_is_not_handed_out() {
    let scene = Scene::new();
    let pool = pool(&scene, 2);
    for name in dm_names()
        .iter()
        .filter(|name| name.starts_with("dmsnap-pool-"))
    {
        if !name.ends_with("-keeper") {
            dmsnap::remove(name).expect("nobody has it open");
        }
    }
    let claimed = claim(&scene, &pool);
    live(claimed.snapshot.device(), 3).unwrap_or_else(|why| panic!("{why}"));
    claimed.snapshot.cleanup().expect("idle");
    pool.drain().expect("nothing is open");
}

/// A release looks where the pool has put the file, and believes its inode alone.
#[test]
fn a_cow_file_that_moved_is_found_and_one_in_its_place_is_left_alone() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let claimed = claim(&scene, &pool);
    let moved = scene.path("moved.cow");
    fs::rename(&claimed.cow, &moved).expect("the same directory");
    fs::write(&claimed.cow, "somebody else's").expect("room for a file");
    let released = pool
        .release(claimed.snapshot.handles(), CowFate::Delete)
        .expect("idle");
    assert!(released.taken_back && !moved.exists());
    assert_eq!(
        fs::read(&claimed.cow).expect("it is there"),
        b"somebody else's"
    );
    pool.drain().expect("nothing is open");
}

#[test]
fn a_cow_file_that_cannot_be_deleted_is_named_and_its_device_is_gone() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let claimed = claim(&scene, &pool);
    // Nobody can unlink what is mounted upon.
    let mounted = Mounted::bind(&claimed.cow, &claimed.cow);
    let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
    let error = released.expect_err("it cannot be deleted");
    let left: Vec<_> = error.left().iter().map(|left| &left.object).collect();
    assert_eq!(left, [&claimed.cow], "{}", chain(&error));
    let name = claimed.snapshot.handles().name.as_ref().expect("a name");
    assert!(!dm_exists(name.as_str()) && !alias_exists(name.as_str()));
    assert_eq!(pool.status().recycling, 0, "{:?}", pool.status());
    drop(mounted);
    fs::remove_file(&claimed.cow).expect("it is the caller's to delete");
    pool.drain().expect("nothing is open");
}

/// Handles of a snapshot that was released name a dm device that serves somebody else by now.
#[test]
fn old_handles_leave_the_next_snapshot_of_the_device_alone() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let name = scene.name();
    let first = pool.claim(&name).expect("one is ready");
    let old = first.snapshot.handles().clone();
    assert!(pool.wait_ready(1, PATIENCE));
    pool.release(&old, CowFate::Delete).expect("idle");
    // Its thread has the device now, maybe with the old table still.
    let gone = Teardown::new()
        .retry(dmsnap::error::Retry::default())
        .wait_gone(&old);
    gone.expect("it goes");
    assert!(!is_held(&first.cow));
    cleanup(&old).expect("it is gone");
    assert!(pool.wait_recycled(PATIENCE), "{:?}", pool.status());
    assert_eq!(pool.status().spare, 1, "{:?}", pool.status());
    // The ready one goes first, then the recycled one, under the same name as before.
    let other = claim(&scene, &pool);
    assert!(pool.wait_ready(1, PATIENCE), "{:?}", pool.status());
    let second = pool.claim(&name).expect("one is ready");
    assert_eq!(second.snapshot.handles().uuid, old.uuid, "the same device");
    for round in 0..2 {
        cleanup(&old).expect("it is gone already");
        let released = pool
            .release(&old, CowFate::Delete)
            .expect("it is gone already");
        assert!(!released.taken_back && second.cow.exists(), "round {round}");
        assert!(
            dm_exists(&name) && alias_exists(&name),
            "it is another snapshot"
        );
    }
    second.snapshot.cleanup().expect("idle");
    assert!(!dm_exists(&name));
    other.snapshot.cleanup().expect("idle");
    pool.drain().expect("nothing is open");
}

#[test]
fn an_open_device_is_waited_for_and_stays_claimed_meanwhile() {
    let scene = Scene::new();
    let pool = pool(&scene, 1);
    let claimed = claim(&scene, &pool);
    let device = claimed.snapshot.device().to_owned();
    let held = File::open(&device).expect("a disk");
    let closed = Arc::new(AtomicBool::new(false));
    let closing = Arc::clone(&closed);
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        closing.store(true, Ordering::SeqCst);
        drop(held);
    });
    let released = pool
        .release(claimed.snapshot.handles(), CowFate::Delete)
        .expect("it was closed");
    assert!(released.taken_back && closed.load(Ordering::SeqCst));
    late.join().expect("it only sleeps");
    pool.drain().expect("nothing is open");
}

#[test]
fn a_live_pools_devices_are_nobodys_to_reap() {
    let scene = Scene::new();
    let pool = pool(&scene, 2);
    let reaped = ReapOptions::new().reap(|_| false).expect("a sweep");
    assert_eq!(reaped.len(), 3, "{reaped:?}");
    for item in reaped {
        assert_eq!(item.fate, Ok(Fate::Pooled), "{}", item.name);
    }
    // A second pool on the same host and directory leaves the first one alone, and the other way round.
    let origin = Origin::open(scene.image()).expect("an image");
    let second = options(1).open(&origin, scene.dir()).expect("a pool");
    assert!(second.wait_ready(1, PATIENCE));
    let [one, other] = [&pool, &second].map(|pool| claim(&scene, pool));
    assert!(one.warm && other.warm);
    // A device may be released to another pool over the same image.
    assert!(
        pool.release(other.snapshot.handles(), CowFate::Delete)
            .expect("idle")
            .taken_back
    );
    second.drain().expect("nothing is open");
    // What is claimed is the caller's to keep, whatever the pool does.
    pool.drain().expect("nothing is open");
    live(one.snapshot.device(), 9).unwrap_or_else(|why| panic!("{why}"));
    let reaped = ReapOptions::new().reap(|_| false).expect("a sweep");
    assert_eq!(reaped.len(), 1, "{reaped:?}");
    assert_eq!(reaped[0].fate, Ok(Fate::Removed));
    assert!(reaped[0].name.starts_with(PREFIX));
}

/// What the pool is for: the steps that cost most are made beforehand, and undone never. How much faster that is, is the
/// bench's (`pipeline`).
#[test]
fn a_claim_and_a_release_make_and_undo_nothing() {
    let scene = Scene::new();
    let cold = Timings::of(|| scene.snapshot());
    let (removed, removal) = Timings::of(|| cold.0.cleanup());
    removed.expect("idle");
    let pool = pool(&scene, 4);
    let name = scene.name();
    let (claimed, claim) = Timings::of(|| pool.claim(&name).expect("one is ready"));
    assert!(claimed.warm);
    let handles = claimed.snapshot.handles();
    let (released, release) = Timings::of(|| pool.release(handles, CowFate::Delete));
    assert!(released.expect("idle").taken_back);
    pool.drain().expect("nothing is open");
    println!(
        "create:\n{}claim:\n{claim}cleanup:\n{removal}release:\n{release}",
        cold.1
    );
    let makes = [Step::FindLoop, Step::AttachLoop, Step::Create, Step::Load];
    let undoes = [Step::DetachLoop, Step::Remove];
    for (warm, cold) in [(&claim, &cold.1), (&release, &removal)] {
        let heavy = |step: Step| makes.contains(&step) || undoes.contains(&step);
        let made = |of: &Timings| of.calls.iter().filter(|call| heavy(call.step)).count();
        assert_eq!(made(warm), 0, "{warm}");
        assert!(made(cold) > 0, "{cold}");
        assert_eq!(warm.waited, Duration::ZERO, "{warm}");
    }
}
