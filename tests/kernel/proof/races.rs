//! Two processes at once, each stopped where it matters to the other.

use std::fs::{self, File};
use std::path::Path;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use dmsnap::teardown::Fate;
use dmsnap::{ErrorKind, Handles, ReapOptions, SnapshotOptions, cleanup};
use nix::fcntl::{Flock, FlockArg};

use super::trace::{self, Call, Stopped};
use super::worker::{Process, use_disk};
use super::world::{World, state};
use super::{repeated, stops};
use crate::common::tools::complaint;
use crate::common::{Scene, chain, dmsnap};

/// Calls of a create from the moment that it has the name.
const HAS_THE_NAME: [&str; 4] = [
    "DM_DEV_CREATE",
    "DM_TABLE_LOAD",
    "DM_DEV_SUSPEND",
    "symlink",
];

/// `dmsnap create` of the victim, on one of two COW files.
struct Creator<'a> {
    world: &'a World,
    cow: String,
    calls: Vec<Call>,
}

impl<'a> Creator<'a> {
    fn new(world: &'a World) -> Self {
        let cow = world.fresh_cow().to_str().expect("ASCII").to_owned();
        let mut creator = Self {
            world,
            cow,
            calls: Vec::new(),
        };
        let log = world.scene.path("strace.log");
        creator.calls = trace::calls(&log, &creator.arguments(&creator.cow));
        world.reap_once();
        creator.world.fresh_cow();
        creator
    }

    fn arguments<'b>(&'b self, cow: &'b str) -> [&'b str; 4] {
        let image = self.world.scene.image().to_str().expect("ASCII");
        ["create", image, cow, self.world.victim()]
    }

    /// Stopped right after the last of its calls about `what`.
    fn stopped_after(&self, what: &str) -> Stopped {
        let found = self.calls.iter().rev().find(|call| call.is_about(what));
        let call = found.unwrap_or_else(|| panic!("create makes no call about {what}"));
        let log = self.world.scene.path("stopped.log");
        Stopped::after(&log, call, &self.arguments(&self.cow))
    }
}

fn handles(done: &Output) -> Handles {
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    serde_json::from_slice(&done.stdout).expect("handles")
}

/// A live snapshot that works, by either path; then it is cleaned up.
fn assert_works(world: &World, handles: &Handles) {
    let device = handles.device.as_ref().expect("a device");
    let alias = handles.mapper.as_ref().expect("an alias");
    assert_eq!(&fs::canonicalize(alias).expect("a link"), device);
    use_disk(alias, 1).expect("a disk");
    assert_eq!(world.left().loops.len(), 2);
    cleanup(handles).expect("nobody has it open");
    world.assert_as_before("after the winner's cleanup");
}

/// Locks every loop device there is as udev does while it probes one, until the locks are dropped.
fn probed() -> Vec<Flock<File>> {
    let node = |number| format!("/dev/loop{number}");
    let nodes = (0..).map(node).take_while(|node| Path::new(node).exists());
    let probe = |node| Flock::lock(File::open(node).expect("root"), FlockArg::LockShared);
    nodes
        .map(|node| probe(node).map_err(|(_, why)| why).expect("nobody else's"))
        .collect()
}

#[test]
fn what_is_being_made_is_not_reaped() {
    let world = World::new();
    let creator = Creator::new(&world);
    let sweep = || {
        let reaped = ReapOptions::new()
            .reap(|info| world.keeps(info))
            .expect("a sweep");
        let fates = reaped
            .into_iter()
            .filter(|item| item.name == world.victim());
        fates.map(|item| item.fate).collect::<Vec<_>>()
    };
    for point in stops(&HAS_THE_NAME) {
        // One point is enough to see that the lock beside a probe's says the same.
        for probe in [false, true] {
            if probe && point != "DM_TABLE_LOAD" {
                continue;
            }
            let probes = if probe { probed() } else { Vec::new() };
            let stopped = creator.stopped_after(point);
            drop(probes);
            let left = world.left();
            assert_eq!(
                sweep(),
                [Ok(Fate::InProgress)],
                "its maker is at work, after {point}, with a probe: {probe}"
            );
            assert_eq!(world.left(), left, "the sweep touched it, after {point}");
            let made = handles(&stopped.go_on());
            assert_works(&world, &made);
            world.fresh_cow();
        }

        let stopped = creator.stopped_after(point);
        stopped.kill();
        assert_eq!(
            sweep(),
            [Ok(Fate::Removed)],
            "its maker is dead, after {point}"
        );
        world.assert_as_before(&format!("killed and swept after {point}"));
        world.fresh_cow();
    }
}

/// A probe keeps a loop device from being let go, but not the sweep from what nobody works at.
#[test]
fn what_nobody_makes_is_reaped_while_it_is_probed() {
    let world = World::new();
    world.make_victim();
    let probes = probed();
    let over = thread::spawn(|| {
        thread::sleep(Duration::from_secs(1));
        drop(probes);
    });
    assert_eq!(world.reap_once(), "removed");
    over.join().expect("no panic");
    world.assert_as_before("swept beside a probe");
}

#[test]
fn one_name_for_two_processes_goes_to_one() {
    let world = World::new();
    let creator = Creator::new(&world);
    let other_cow = world.scene.cow("other.cow");
    let other_cow = other_cow.to_str().expect("ASCII");
    let other = creator.arguments(other_cow);
    let taken = format!("cannot create /dev/mapper/{}: ", world.victim());

    // The first is half-way, from the moment it has the name; the second loses.
    for point in stops(&HAS_THE_NAME) {
        let first = creator.stopped_after(point);
        let left = world.left();
        let line = complaint(&world.dmsnap(&other));
        assert!(line.starts_with(&taken), "{line}");
        assert_eq!(
            world.left(),
            left,
            "the loser touched what is the winner's, after {point}"
        );
        assert_works(&world, &handles(&first.go_on()));
        world.fresh_cow();
    }
    // The first is about to take the name, with all else in hand; the second overtakes.
    let first = creator.stopped_after("BLKGETDISKSEQ");
    let winner = handles(&world.dmsnap(&other));
    let line = complaint(&first.go_on());
    assert!(line.starts_with(&taken), "{line}");
    assert_works(&world, &winner);

    // And as it comes.
    for round in 0..repeated(3, 100) {
        world.fresh_cow();
        let _ = fs::remove_file(other_cow);
        world.scene.cow("other.cow");
        let both = [creator.arguments(&creator.cow), other];
        let both = both.map(|arguments| Process::start(dmsnap().args(arguments)));
        let done = both.map(|process| process.join(Duration::from_secs(30)));
        let (won, lost): (Vec<_>, Vec<_>) = done.iter().partition(|done| done.status.success());
        assert_eq!((won.len(), lost.len()), (1, 1), "round {round}: {done:?}");
        assert!(complaint(lost[0]).starts_with(&taken), "{done:?}");
        assert_works(&world, &handles(won[0]));
    }
}

#[test]
fn one_cow_file_for_two_processes_goes_to_one() {
    let world = World::new();
    let creator = Creator::new(&world);
    let name = world.scene.name();
    let image = world.scene.image().to_str().expect("ASCII");
    // Another path to the same file.
    let link = world.scene.path("hard link.cow");
    fs::hard_link(&creator.cow, &link).expect("a hard link");
    let link = link.to_str().expect("ASCII");
    let other = ["create", image, link, &name];
    for point in stops(&["pread64(6", "BLKGETSIZE64", "DM_TABLE_LOAD"]) {
        let first = creator.stopped_after(point);
        let line = complaint(&world.dmsnap(&other));
        assert!(line.ends_with("is in use by another snapshot"), "{line}");
        let made = handles(&first.go_on());
        let line = complaint(&world.dmsnap(&other));
        assert!(line.ends_with("is in use by another snapshot"), "{line}");
        assert_works(&world, &made);
    }
    // The dead hold no lock, but a table that they loaded holds the file, until it is swept away.
    creator.stopped_after("BLKGETSIZE64").kill();
    let made = handles(&world.dmsnap(&other));
    cleanup(&made).expect("nobody has it open");
    creator.stopped_after("DM_TABLE_LOAD").kill();
    let line = complaint(&world.dmsnap(&other));
    assert!(line.ends_with("is in use by another snapshot"), "{line}");
    println!("a COW file behind a half-built snapshot of a dead maker: {line}");
    assert_eq!(world.reap_once(), "removed");
    let made = handles(&world.dmsnap(&other));
    cleanup(&made).expect("nobody has it open");
    world.assert_as_before("at the end");
}

#[test]
fn a_name_that_changes_hands_leads_to_the_new_device() {
    let scene = Scene::new();
    let name = scene.name();
    let cows = [scene.cow("1.cow"), scene.cow("2.cow")];
    let create = |nth: usize| SnapshotOptions::new().create(scene.image(), &cows[nth % 2], &name);
    let mut current = create(0).expect("a snapshot");
    for round in 1..=repeated(6, 200) {
        let start = Instant::now();
        // The kernel gives the name away at the beginning of a removal that takes some milliseconds.
        let next = thread::scope(|scope| {
            let removal = scope.spawn(|| current.clone().cleanup());
            let next = loop {
                match create(round) {
                    Err(error) if error.kind() == ErrorKind::Conflict => (),
                    made => break made.unwrap_or_else(|error| panic!("{}", chain(&error))),
                }
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "the name is never free"
                );
            };
            removal
                .join()
                .expect("no panic")
                .expect("nobody has it open");
            next
        });
        let alias = Path::new("/dev/mapper").join(&name);
        let leads_to = fs::canonicalize(&alias);
        assert_eq!(
            leads_to.ok().as_deref(),
            Some(next.device()),
            "round {round}"
        );
        assert_eq!(state(&scene).devices, std::slice::from_ref(&name));
        use_disk(next.device(), 7).expect("a disk");
        current = next;
    }
    current.cleanup().expect("nobody has it open");
}
