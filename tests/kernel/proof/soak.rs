//! Many cycles with whatever goes wrong in a control plane's life, in random order: nothing grows.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, thread};

use dmsnap::error::Retry;
use dmsnap::teardown::{Fate, Outcome};
use dmsnap::{ReapOptions, Teardown, WhenBusy, cleanup};

use super::repeated;
use super::scale::Memory;
use super::worker::{Job, cycle, use_disk};
use crate::common::{Scene, chain, eventually, reading, settle, udev};

/// Slab may end this much higher than it began, in KiB: caches breathe. Over 5,000 cycles a leak of one 1 KiB object
/// in each would be more.
const SLAB_SLACK: i64 = 4 << 10;

/// Memory in all, in KiB.
const MEMORY_SLACK: i64 = 16 << 10;

/// xorshift64: good enough to choose, and repeatable.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

struct Soak<'a> {
    scene: &'a Scene,
    dice: Dice,
    /// How often each of the five things happened.
    tally: [usize; 5],
    /// Which one happened last: what it leaves behind shows in the next.
    last: usize,
}

impl Soak<'_> {
    fn one(&mut self, nth: usize) {
        let roll = self.dice.roll(100);
        // One name and one COW file for all: what a cycle leaves would stop the next.
        let (name, cow) = (self.name(), self.cow());
        let which = match roll {
            0..50 => 0,
            50..65 => 1,
            65..80 => 2,
            80..95 => 3,
            _ => 4,
        };
        self.tally[which] += 1;
        match which {
            0 => cycle(self.scene.image(), &cow, &name, nth)
                .unwrap_or_else(|why| panic!("cycle {nth}, after {}: {why}", self.last)),
            1 => self.forgotten(),
            2 => self.busy(),
            3 => self.deferred(),
            _ => self.killed(),
        }
        self.last = which;
    }

    fn name(&self) -> String {
        format!("{}soak", crate::common::PREFIX)
    }

    fn cow(&self) -> PathBuf {
        self.scene.path("soak.cow")
    }

    fn make(&self) -> dmsnap::Snapshot {
        let _ = fs::remove_file(self.cow());
        let made = dmsnap::SnapshotOptions::new().create(
            self.scene.image(),
            self.scene.cow("soak.cow"),
            &self.name(),
        );
        made.unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    /// The control plane forgot it, or died: a sweep finds it.
    fn forgotten(&mut self) {
        let made = self.make();
        use_disk(made.device(), self.dice.roll(1000)).expect("a disk");
        drop(made.into_handles());
        let reaped = ReapOptions::new().reap(|_| false).expect("a sweep");
        let fates: Vec<_> = reaped.into_iter().map(|item| item.fate).collect();
        assert_eq!(fates, [Ok(Fate::Removed)]);
    }

    /// Somebody has it open for a while, and cleanup waits.
    fn busy(&mut self) {
        let made = self.make();
        let holder = File::open(made.device()).expect("the device opens");
        let pause = Duration::from_millis(self.dice.roll(30));
        let guest = thread::spawn(move || {
            thread::sleep(pause);
            drop(holder);
        });
        made.cleanup()
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        guest.join().expect("the holder let go");
    }

    /// The kernel removes it behind the last user.
    fn deferred(&mut self) {
        let handles = self.make().into_handles();
        let device = handles.device.as_ref().expect("a device");
        let holder = File::open(device).expect("the device opens");
        let outcome = Teardown::new()
            .when_busy(WhenBusy::Defer)
            .remove(device)
            .expect("deferred");
        assert_eq!(outcome, Outcome::Deferred { open_count: 1 });
        thread::sleep(Duration::from_millis(self.dice.roll(10)));
        drop(holder);
        let patience = Retry::until(Duration::from_secs(10));
        Teardown::new()
            .retry(patience)
            .wait_gone(&handles)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        cleanup(&handles).expect("already gone");
    }

    /// A process dies wherever it happens to be.
    fn killed(&mut self) {
        let job = Job {
            cycles: 1_000_000,
            origin: self.scene.image(),
            cow: self.cow(),
            name: self.name(),
        };
        let mut worker = job.start();
        thread::sleep(Duration::from_millis(50 + self.dice.roll(400)));
        assert!(worker.is_running(), "{:?}", worker.join(Duration::ZERO));
        worker.kill();
        ReapOptions::new().reap(|_| false).expect("a sweep");
        if udev() {
            // udevd may have been looking at the dead maker's loop device, which then passes for the maker's lock.
            eventually(Duration::from_secs(60), || {
                let sweep = ReapOptions::new().reap(|_| false).expect("a sweep");
                sweep.is_empty()
            });
        }
        // Without a dm device over it, a loop device that has autoclear is bound for as long as somebody has it open:
        // the probe that udevd began while the worker lived. No sweep could take it away, and none has to.
        let devices = reading::dm_listed();
        assert!(!devices.contains(&self.name()), "one sweep after a kill");
        for bound in reading::loops_below(self.scene.dir()) {
            let holders = reading::holders(&bound.device);
            println!("after a kill: {bound:?}, open in {holders:?}");
            assert!(bound.autoclear, "{bound:?}");
        }
        self.scene.assert_clean();
    }
}

#[test]
fn nothing_grows() {
    let scene = Scene::new();
    let cycles = repeated(40, 5000);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let clock = since_1970.map_or(1, |since| since.as_secs() | 1);
    let seed = env::var("DMSNAP_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or(clock);
    println!("soak: {cycles} cycles, DMSNAP_TEST_SEED={seed}");
    let mut soak = Soak {
        scene: &scene,
        dice: Dice(seed),
        tally: [0; 5],
        last: 0,
    };
    // Caches fill and loop devices are made in the first cycles, of which one is each kind.
    for nth in 0..20 {
        soak.one(nth);
    }
    soak.killed();
    settle();
    let before = sample(&scene, "before");
    for nth in 0..cycles {
        soak.one(nth);
        if nth % 500 == 499 {
            sample(&scene, &format!("after {}", nth + 1));
        }
    }
    settle();
    println!("done, forgotten, busy, deferred, killed: {:?}", soak.tally);

    // Memory is given back some time after it was let go.
    let grown = || {
        let after = Memory::now();
        (after.slab - before.slab, before.available - after.available)
    };
    let settled = || {
        let (slab, memory) = grown();
        slab <= SLAB_SLACK && memory <= MEMORY_SLACK
    };
    let well = eventually(Duration::from_secs(60), settled);
    sample(&scene, "at the end");
    assert!(well, "KiB of slab and memory grown: {:?}", grown());
}

/// Descriptors, loop and dm devices are the scene's business, which counts them at the end of the test.
fn sample(scene: &Scene, when: &str) -> Memory {
    scene.assert_clean();
    let now = Memory::now();
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let own = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap_or_default();
    println!("  {when}: {now:?} KiB; this process: {own}");
    now
}
