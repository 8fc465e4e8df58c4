//! Others at work on a snapshot while it is being frozen: at every step of a checkpoint another program resumes or
//! removes its devices, freezes it too, exports it, or sweeps the host. No data is lost.
//!
//! The checkpoint stands still (SIGSTOP) right after a call while the other one runs.

use std::fs;
use std::path::{Path, PathBuf};

use super::trace::{self, Call, Stopped};
use super::world::World;
use super::{TURNS, long, turn};
use crate::common::filling::Direct;
use crate::common::reading::{dm_exists, dm_info};
use crate::common::{output, stated_kernel, udev};

const CHUNK: u64 = 4096;

/// What the others do, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Resume,
    Remove,
    Checkpoint,
    Export,
    Reap,
}

const OTHERS: [Other; 5] = [
    Other::Resume,
    Other::Remove,
    Other::Checkpoint,
    Other::Export,
    Other::Reap,
];

/// The snapshot under proof, open as a VMM has it, and the checkpoint of it.
struct Stage<'a> {
    world: &'a World,
    layer: String,
    others_layer: String,
    next: PathBuf,
    others_next: PathBuf,
    exported: PathBuf,
}

impl<'a> Stage<'a> {
    fn new(world: &'a World) -> Self {
        Self {
            world,
            layer: format!("{}-layer", world.victim()),
            others_layer: format!("{}-other", world.victim()),
            next: world.scene.path("next.cow"),
            others_next: world.scene.path("other.cow"),
            exported: world.scene.path("exported.img"),
        }
    }

    fn arguments<'b>(&'b self, layer: &'b str, next: &'b Path) -> Vec<&'b str> {
        let next = next.to_str().expect("ASCII");
        let made = ["checkpoint", "--make-cow", "1M"];
        [&made[..], &[self.world.victim(), layer, next]].concat()
    }

    /// Whoever holds it up for a moment, as a probe does, is waited for.
    fn checkpoint(&self) -> Vec<&str> {
        self.arguments(&self.layer, &self.next)
    }

    fn prepare(&self) -> Direct {
        self.world.make_victim();
        let disk = Direct::open(&Path::new("/dev/mapper").join(self.world.victim()));
        disk.write(7, 2 * CHUNK, CHUNK).expect("room");
        disk
    }

    fn meddle(&self, other: Other) -> String {
        let world = self.world;
        let dmsetup = |verb: &str, name: &str| output!("dmsetup", verb, name).status.success();
        let done = match other {
            Other::Resume => dmsetup("resume", world.victim()),
            Other::Remove => {
                let snapshot = dmsetup("remove", world.victim());
                assert!(!snapshot, "its VMM has it open");
                dmsetup("remove", &self.layer)
            }
            Other::Checkpoint => {
                let mut arguments = self.arguments(&self.others_layer, &self.others_next);
                // The other one stands still, and has the lock.
                arguments.extend(["--deadline", "50ms"]);
                world.dmsnap(&arguments).status.success()
            }
            Other::Export => {
                let output = self.exported.to_str().expect("ASCII");
                let export = ["export", "--deadline", "50ms", world.victim(), output];
                world.dmsnap(&export).status.success()
            }
            Other::Reap => return format!("Reap: {}", world.reap_once()),
        };
        format!("{other:?}: {}", if done { "done" } else { "refused" })
    }

    /// The disk has all that was written to it, takes writes, and nothing of this is left behind.
    fn end(&self, disk: Direct, when: &str) {
        let (world, victim) = (self.world, self.world.victim());
        assert_eq!(dm_info(victim, "attr"), "L--w", "{when}");
        assert!(disk.reads(7, 2 * CHUNK, CHUNK), "{when}: its data");
        // A part of a chunk needs the layer too.
        for (byte, at, bytes) in [(8, 4 * CHUNK, CHUNK), (9, 6 * CHUNK, 512)] {
            let wrote = disk.write(byte, at, bytes);
            wrote.unwrap_or_else(|error| panic!("{when}: {error}"));
            assert!(disk.reads(byte, at, bytes), "{when}: {byte}");
        }
        for layer in [&self.layer, &self.others_layer] {
            if dm_exists(layer) {
                let node = format!("/dev/dm-{}", dm_info(layer, "minor"));
                let frozen = Direct::open(Path::new(&node));
                assert!(frozen.reads(7, 2 * CHUNK, CHUNK), "{when}: the layer");
            }
        }
        drop(disk);
        let removed = world.dmsnap(&["remove", victim]);
        assert!(removed.status.success(), "{when}: {removed:?}");
        for file in [&self.next, &self.others_next, &self.exported] {
            let _ = fs::remove_file(file);
        }
        world.assert_as_before(when);
    }

    fn cell(&self, call: &Call, other: Other) {
        let disk = self.prepare();
        let log = self.world.scene.path("stopped.log");
        let stopped = Stopped::after(&log, call, &self.checkpoint());
        let said = self.meddle(other);
        let done = stopped.go_on();
        let ended = if done.status.success() {
            "frozen"
        } else {
            "failed"
        };
        let left = dm_info(self.world.victim(), "attr");
        // What is acknowledged in between is not lost either.
        let wrote = !left.contains('s') && disk.write(5, 8 * CHUNK, CHUNK).is_ok();
        let repaired = self.world.dmsnap(&["repair"]);
        let line = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes)
                .trim_end()
                .replace('\n', ", ")
        };
        println!(
            "      {:34} {said:20} {ended} {left} {wrote} {} {}",
            call.brief(),
            line(&repaired.stdout),
            line(&done.stderr)
        );
        let when = format!("{other:?} after {call:?}");
        assert!(repaired.status.success(), "{when}: {repaired:?}");
        if long() {
            let again = self.world.dmsnap(&["repair"]);
            let done = again.status.success() && again.stdout.is_empty();
            assert!(done, "{when}: {again:?}");
        }
        assert!(!wrote || disk.reads(5, 8 * CHUNK, CHUNK), "{when}: a write");
        self.end(disk, &when);
    }
}

#[test]
fn whoever_comes_between_the_steps_of_a_checkpoint_loses_no_data() {
    let world = World::new();
    let stage = Stage::new(&world);
    let disk = stage.prepare();
    let log = world.scene.path("strace.log");
    let calls = trace::calls(&log, &stage.checkpoint());
    stage.end(disk, "after the run alone");
    // The short form stops at the ioctls of dm, with one of the five at each.
    let changing = calls
        .iter()
        .filter(|call| !call.only_looks() && (long() || call.is_about("DM_")));
    let turn = turn(&stated_kernel(), udev());
    for (step, call) in changing.enumerate() {
        for (place, other) in OTHERS.into_iter().enumerate() {
            if long() || (step + place) % TURNS == turn {
                stage.cell(call, other);
            }
        }
    }
}

/// The one instant in which a resume by hand takes the disk's data away from it: the checkpoint, which goes on, sees that
/// and gives it back; a repair does, if the checkpoint was killed.
#[test]
fn a_resume_by_hand_before_the_handover_costs_nothing() {
    let world = World::new();
    let stage = Stage::new(&world);
    let log = world.scene.path("stopped.log");
    let disk = stage.prepare();
    let calls = trace::calls(&log, &stage.checkpoint());
    stage.end(disk, "after the run alone");
    let paused = calls.iter().find(|call| call.is_about("DM_SUSPEND_FLAG"));
    let loaded = calls.iter().rfind(|call| call.is_about("DM_TABLE_LOAD"));
    let [paused, loaded] = [paused, loaded].map(|call| call.expect("it makes one"));
    for (call, dies) in [(loaded, false), (paused, false), (paused, true)] {
        let when = format!("resumed after {}, killed: {dies}", call.brief());
        let disk = stage.prepare();
        let stopped = Stopped::after(&log, call, &stage.checkpoint());
        stage.meddle(Other::Resume);
        assert!(
            !disk.reads(7, 2 * CHUNK, CHUNK),
            "{when}: there is no layer"
        );
        disk.write(5, 8 * CHUNK, CHUNK).expect("a whole chunk");
        if dies {
            stopped.kill();
            let repaired = world.dmsnap(&["repair"]);
            assert!(repaired.status.success(), "{when}: {repaired:?}");
            let said = String::from_utf8_lossy(&repaired.stdout);
            assert_eq!(said, format!("{}: finished\n", world.victim()), "{when}");
        } else {
            let done = stopped.go_on();
            assert!(done.status.success(), "{when}: {done:?}");
        }
        assert!(disk.reads(5, 8 * CHUNK, CHUNK), "{when}: its write");
        stage.end(disk, &when);
    }
}
