//! Thousands of disks over one image: each is made, written, read back, listed, watched and torn down. What that asks of
//! the kernel does not grow with their number, which is asserted; what it takes is printed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dmsnap::error::Step;
use dmsnap::teardown::Fate;
use dmsnap::timings::Timings;
use dmsnap::watch::Watch;
use dmsnap::{Handles, Origin, ReapOptions, Snapshot, SnapshotOptions, Teardown};

use super::scale::Memory;
use super::{long, repeated, timed};
use crate::common::reading::{Bound, dm_names, loops_below};
use crate::common::{Losetup, PREFIX, Scene, chain, output, run, settle, udev};

/// Settings of the kernel as they were, for which there is no room for ten thousand otherwise: each disk has four kernel
/// threads, and room for copies of 512 KiB.
struct Room(Vec<(&'static str, String)>);

impl Room {
    fn make() -> Self {
        let settings = [
            ("/proc/sys/kernel/pid_max", "4194304"),
            ("/proc/sys/kernel/threads-max", "400000"),
            ("/sys/module/dm_mod/parameters/kcopyd_subjob_size_kb", "4"),
        ];
        let were = settings.map(|(path, value)| {
            let was = fs::read_to_string(path).expect("the kernel has it");
            fs::write(path, value).expect("root may");
            (path, was)
        });
        Self(were.into())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for (path, was) in &self.0 {
            let _ = fs::write(path, was);
        }
    }
}

/// So many disks are made in a row, to see what one takes.
fn tries() -> usize {
    repeated(4, 20)
}

/// Snapshots over one [`Origin`], before it is opened anew.
const CROWD: usize = 250;

/// So many disks have room in memory.
fn there_is_room_for() -> usize {
    const EACH_KIB: i64 = 540;
    let count = (Memory::now().available - (400 << 10)) / EACH_KIB;
    usize::try_from(count).expect("the guest has memory")
}

struct Fleet<'a> {
    scene: &'a Scene,
    origin: Origin,
    made: usize,
    alive: Vec<Handles>,
}

impl Fleet<'_> {
    /// Makes a disk, over the shared origin or over a loop device of its own.
    fn make(&mut self, shared: bool) -> (Handles, Timings) {
        self.made += 1;
        if self.made % CROWD == 0 {
            self.origin = Origin::open(self.scene.image()).expect("an image");
        }
        let (options, name) = (SnapshotOptions::new(), self.scene.name());
        let cow = self.scene.sparse(format!("{name}.cow"), 1 << 20);
        let (made, timings) = Timings::of(|| match shared {
            true => options.create_on(&self.origin, &cow, &name),
            false => options.create(self.scene.image(), &cow, &name),
        });
        let made = made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        (made.into_handles(), timings)
    }

    /// What makes a disk while so many are alive, and what removes one: one goes, one comes.
    fn samples(&mut self, shared: bool) -> [Vec<Timings>; 2] {
        let mut samples = [Vec::new(), Vec::new()];
        for _ in 0..tries() {
            let (handles, created) = self.make(shared);
            let (done, removed) = Timings::of(|| dmsnap::cleanup(&handles));
            done.unwrap_or_else(|error| panic!("{}", chain(&error)));
            samples[0].push(created);
            samples[1].push(removed);
        }
        samples
    }
}

fn device(handles: &Handles) -> PathBuf {
    handles.device.clone().expect("a device")
}

/// What nobody else's disk holds.
fn content(handles: &Handles) -> Vec<u8> {
    let name = handles.name.as_ref().expect("a name").to_string();
    name.into_bytes().into_iter().cycle().take(4096).collect()
}

fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn show(what: &str, timings: &[Timings]) {
    let total = middle(timings.iter().map(|each| each.total).collect());
    let mut line = format!("  {what}: {total:.2} ms p50");
    for step in timings[0].by_step() {
        let of = |each: &Timings| {
            let steps = each.by_step().into_iter();
            let took = steps
                .filter(|its| its.step == step.step)
                .map(|its| its.took);
            took.sum::<Duration>()
        };
        let ms = middle(timings.iter().map(of).collect());
        if ms >= 0.2 {
            line.push_str(&format!(", {:?} {ms:.2}", step.step));
        }
    }
    println!("{line}");
}

/// The fewest calls of any: what has to wait makes more.
fn calls(timings: &[Timings]) -> usize {
    let counts = timings.iter().map(|each| each.calls.len());
    counts.min().expect("some")
}

fn asked(timings: &[Timings], step: Step) -> usize {
    let calls = timings.iter().flat_map(|each| &each.calls);
    calls.filter(|call| call.step == step).count()
}

#[test]
fn each_of_thousands_is_made_written_read_listed_watched_and_torn_down() {
    let scene = Scene::new();
    let marks = match std::env::var("DMSNAP_TEST_DISKS") {
        Ok(most) => vec![10, 1000, most.parse().expect("a number")],
        Err(_) if long() => vec![10, 1000, there_is_room_for().min(10_000)],
        Err(_) => vec![10, repeated(70, 70)],
    };
    let _room = long().then(Room::make);
    let mut fleet = Fleet {
        scene: &scene,
        origin: Origin::open(scene.image()).expect("an image"),
        made: 0,
        alive: Vec::new(),
    };
    let before = Memory::now();
    let mut few = Vec::new();
    for mark in &marks {
        let (_, growing) = timed(|| {
            while fleet.alive.len() < *mark {
                let (handles, _) = fleet.make(true);
                let disk = File::options().write(true).open(device(&handles));
                let disk = disk.expect("the disk opens");
                disk.write_all_at(&content(&handles), 4096).expect("room");
                disk.sync_all().expect("room");
                fleet.alive.push(handles);
            }
        });
        let more = i64::try_from(*mark).expect("few");
        let memory = (before.available - Memory::now().available) / more;
        println!("{mark} alive, made in {growing:.1?}, {memory} KiB of memory each");

        let [shared, removed] = fleet.samples(true);
        let [own, _] = fleet.samples(false);
        show("create on a shared origin", &shared);
        show("create", &own);
        show("cleanup", &removed);
        let (listed, listing) = Timings::of(dmsnap::list);
        let listed = listed.expect("a list").into_iter();
        let listed = listed.map(|each| each.expect("readable").name);
        assert_eq!(
            listed.filter(|name| name.starts_with(PREFIX)).count(),
            *mark
        );
        let mut watch = Watch::new().expect("events");
        let ((), adding) = timed(|| {
            for handles in &fleet.alive {
                let name = handles.name.as_ref().expect("a name").as_str();
                watch.add(name).expect("it is live");
            }
        });
        let (news, checking) = Timings::of(|| watch.check().expect("it can be asked"));
        assert!(news.is_empty(), "{news:?}");
        let keep = || ReapOptions::new().reap(|_| true).expect("a sweep");
        let (kept, keeping) = Timings::of(keep);
        assert!(kept.iter().all(|item| item.fate == Ok(Fate::Kept)));
        println!(
            "  list {:.1?}, watch {adding:.1?} and {:.1?} a check, reap that keeps all {:.1?}",
            listing.total, checking.total, keeping.total
        );
        let each = |timings: &Timings| timings.calls.len().div_ceil(*mark);
        let counts = [
            calls(&shared),
            calls(&own),
            calls(&removed),
            each(&listing),
            each(&checking),
            each(&keeping),
        ];
        println!("  calls, for each disk: {counts:?}");
        match few.first() {
            None => few.push(counts),
            Some(few) => {
                let more = counts.iter().zip(few).any(|(many, few)| many > few);
                // Where udevd probes the loop devices, some have to be waited for.
                assert!(!more || udev(), "{few:?}, and {counts:?} of {mark}");
            }
        }
    }

    let mut lost = Vec::new();
    for handles in &fleet.alive {
        let mut read = vec![0; 4096];
        let disk = File::open(device(handles)).expect("the disk opens");
        disk.read_exact_at(&mut read, 4096).expect("readable");
        if read != content(handles) {
            lost.push(handles.name.clone());
        }
    }
    assert!(lost.is_empty(), "{lost:?}");
    let ours = dm_names();
    let ours = ours.iter().filter(|name| name.starts_with(PREFIX));
    assert_eq!(ours.count(), fleet.alive.len(), "says dmsetup");
    for origin in loops_below(scene.dir()) {
        let name = origin.device.file_name().expect("loopN").to_string_lossy();
        let holders = fs::read_dir(format!("/sys/block/{name}/holders"));
        let holders = holders.expect("sysfs").count();
        let crowd = 512 + CROWD;
        assert!(
            holders <= crowd,
            "{holders} over {}",
            origin.device.display()
        );
    }

    let half = fleet.alive.split_off(fleet.alive.len() / 2);
    let (cleaned, cleaning) = timed(|| Teardown::new().cleanup_all(&half));
    assert!(cleaned.iter().all(Result::is_ok), "{cleaned:?}");
    let sweep = || ReapOptions::new().reap(|info| !info.name.starts_with(PREFIX));
    let (reaped, reaping) = timed(|| sweep().expect("a sweep"));
    let rest = reaped.iter().filter(|item| item.fate == Ok(Fate::Removed));
    assert_eq!(rest.count(), fleet.alive.len(), "{reaped:?}");
    println!(
        "torn down: {} in {cleaning:.1?} by cleanup_all, {} in {reaping:.1?} by a sweep",
        half.len(),
        fleet.alive.len()
    );
    drop(fleet);
    settle();
}

/// Attaches a file to every loop device that there is, and to 64 at least.
fn exhaust(file: &Path) -> Vec<Bound> {
    let attach = "while losetup -f --show \"$0\"; do \
                  set -- /sys/block/loop*; all=$#; set -- /sys/block/loop*/loop; \
                  [ $# -ge 64 ] && [ $# -eq $all ] && break; done";
    run!("sh", "-c", attach, file);
    loops_below(file.parent().expect("a directory"))
}

/// While 64 loop devices and more have files, and no lower one is free. `LOOP_CTL_GET_FREE` names the lowest that has no
/// file, as losetup sees it, and `LOOP_CTL_ADD` makes the one that it is asked for (drivers/block/loop.c).
#[test]
fn numbers_of_our_own_are_used_beside_others_that_take_loop_devices() {
    let scene = Scene::new();
    let file = scene.sparse("theirs", 1 << 20);
    let theirs = exhaust(&file);
    println!("{} loop devices have a file", theirs.len());
    let make = || {
        let (name, options) = (scene.name(), SnapshotOptions::new());
        let cow = scene.cow(format!("{name}.cow"));
        let (made, timings) = Timings::of(|| options.create(scene.image(), cow, &name));
        let made = made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        let timings = [timings];
        let counts = [Step::FindLoop, Step::AddLoop].map(|step| asked(&timings, step));
        (made, counts)
    };
    let loops = |made: &Snapshot| {
        let handles = made.handles();
        let both = [&handles.origin_loop, &handles.cow_loop];
        let mut both = both.map(|handle| handle.as_ref().expect("a loop device").path.clone());
        both.sort();
        both
    };
    let is_intact = || {
        let now = loops_below(scene.dir());
        theirs.iter().all(|its| now.contains(its))
    };

    // As few make it no difference, the kernel is asked for them.
    let first = [make(), make()];
    // A probe of udevd's may have one locked, so that the next is taken.
    let is_exact = !udev();
    assert!(!is_exact || first.iter().all(|(_, counts)| *counts == [2, 0]));
    // Then those above are made; and what was detached here is used again.
    let (third, counts) = make();
    assert!(
        !is_exact || counts == [0, 2],
        "asked for, and made: {counts:?}"
    );
    let its = loops(&third);
    third.cleanup().expect("nobody has it open");
    let (fourth, counts) = make();
    assert!(
        !is_exact || (counts == [0, 0] && loops(&fourth) == its),
        "{counts:?}"
    );
    fourth.cleanup().expect("nobody has it open");
    // Unless others were first.
    let taken = [(); 2].map(|()| Losetup::attach(&file));
    let mut devices = taken.each_ref().map(|their| their.device.clone());
    devices.sort();
    assert!(!is_exact || devices == its, "{devices:?}, and {its:?}");
    let (fifth, counts) = make();
    assert!(!is_exact || counts[0] > 0, "it was asked for: {counts:?}");
    assert!(taken.iter().all(Losetup::is_bound) && is_intact());

    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let attached = output!("losetup", "-f", "--show", &file);
                let device = String::from_utf8_lossy(&attached.stdout).trim().to_owned();
                if !device.is_empty() {
                    output!("losetup", "-d", device);
                }
            }
        });
        let done = thread::scope(|scope| {
            let makers =
                [(); 2].map(|()| scope.spawn(|| (0..4).try_for_each(|_| make().0.cleanup())));
            makers.map(thread::ScopedJoinHandle::join)
        });
        stop.store(true, Ordering::Relaxed);
        let done = done.map(|done| done.expect("no panic"));
        assert_eq!(done, [Ok(()), Ok(())]);
    });
    assert!(taken.iter().all(Losetup::is_bound) && is_intact());

    for (made, _) in first {
        made.cleanup().expect("nobody has it open");
    }
    fifth.cleanup().expect("nobody has it open");
    let mut detach = Command::new("losetup");
    let detach = detach.arg("-d").args(theirs.iter().map(|its| &its.device));
    assert!(detach.status().expect("losetup").success());
}
