//! A fault at every system call of create and cleanup: each ends in success with everything in place, or in a typed
//! error with nothing left but what it names.
//!
//! An injected failure means that the call did not happen: a failed close leaves the descriptor to the process's end.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use dmsnap::{Handles, SnapshotOptions, State, cleanup};

use super::trace::{self, Call};
use super::world::World;
use super::{long, short_or_long};
use crate::common::tools::complaint;

const ERRNOS: [(&str, i32); 9] = [
    ("EBUSY", 16),
    ("EINTR", 4),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EIO", 5),
    ("ENXIO", 6),
    ("ENOSPC", 28),
    ("EACCES", 13),
    ("EINVAL", 22),
];

/// How long the end of a process may take to let go of what it held.
const MOMENT: Duration = Duration::from_secs(1);

/// One command with one thing wrong.
struct Fault<'a> {
    world: &'a World,
    call: &'a Call,
    errno: (&'static str, i32),
    /// `+` for that call and all later ones of its name.
    more: &'a str,
}

/// What became of it, as the matrix prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    /// Success, with everything in place.
    Done,
    /// A typed error, with nothing left.
    Failed,
    /// A typed error, with what it names left, and nothing else.
    Left,
    /// What it names could not be looked at, and is gone.
    Unsure,
    /// The errno said something of the object that was not true, and no answer is right. A sweep clears it.
    Lie,
    /// None of these.
    Broken,
    /// Not in the short form.
    Unasked,
}

impl Cell {
    fn letter(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Failed => "err",
            Self::Left => "left",
            Self::Unsure => "?",
            Self::Lie => "lie",
            Self::Broken => "BAD",
            Self::Unasked => ".",
        }
    }
}

impl Fault<'_> {
    fn what(&self) -> String {
        format!("{}{} at {:?}", self.errno.0, self.more, self.call)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let log = self.world.scene.path("strace.log");
        let error = format!("error={}", self.errno.0);
        trace::with_from(&log, self.call, &error, self.more, arguments)
    }

    fn create(&self) -> Result<Cell, String> {
        let cow = self.world.fresh_cow();
        let done = self.run(&arguments(self.world, &cow));
        match done.status.success() {
            true => self.made(&done, &cow),
            false => self.judge(&done),
        }
    }

    /// A create that makes its COW file too, and takes it back when it fails.
    fn create_with_cow(&self) -> Result<Cell, String> {
        let cow = self.world.scene.path("victim.cow");
        let _ = fs::remove_file(&cow);
        let done = self.run(&with_cow(&arguments(self.world, &cow)));
        if done.status.success() {
            return self.made(&done, &cow);
        }
        if cow.exists() && !complaint(&done).contains("victim.cow") {
            return Err(format!("left and not named: {cow:?}: {}", complaint(&done)));
        }
        let _ = fs::remove_file(&cow);
        self.judge(&done)
    }

    fn made(&self, done: &Output, cow: &Path) -> Result<Cell, String> {
        let handles: Handles = serde_json::from_slice(&done.stdout).expect("handles");
        let used = self.use_it(&handles, cow);
        cleanup(&handles).map_err(|error| error.to_string())?;
        used?;
        match self.world.settled_left(MOMENT) {
            left if left.is_empty() => Ok(Cell::Done),
            left => Err(format!("cleaned up, and {left:?}")),
        }
    }

    /// Everything is in place.
    fn use_it(&self, handles: &Handles, cow: &Path) -> Result<(), String> {
        let uuid = handles.uuid.as_ref().expect("a uuid");
        let info = dmsnap::status(uuid).map_err(|error| error.to_string())?;
        let path = info.cow.as_ref().and_then(|cow| cow.path.as_deref());
        let left = self.world.left();
        let victim = [self.world.victim()];
        let complete = (info.state, info.open_count) == (State::Live, 0)
            && path == Some(cow)
            && left.devices == victim
            && left.aliases == victim
            && left.loops.len() == 2;
        if !complete {
            return Err(format!("success, and {info:?}, {left:?}"));
        }
        let device = handles.device.as_ref().expect("a device");
        let device = File::options().read(true).write(true).open(device);
        let write = device.and_then(|device| {
            device.write_all_at(b"in place", 0)?;
            device.sync_all()
        });
        write.map_err(|error| error.to_string())
    }

    fn cleanup(&self) -> Result<Cell, String> {
        let world = self.world;
        let handles = world.make_victim();
        let file = world.scene.path("handles.json");
        fs::write(&file, serde_json::to_string(&handles).expect("plain data")).expect("room");
        let file = file.to_str().expect("ASCII");
        let done = self.run(&["cleanup", "--deadline", "500ms", file]);
        if self.is_lie() {
            return Ok(Cell::Lie);
        }
        if !done.status.success() {
            return self.judge(&done);
        }
        match world.settled_left(MOMENT) {
            left if left.is_empty() => Ok(Cell::Done),
            left => Err(format!("success, and {left:?}")),
        }
    }

    /// ENXIO from device-mapper: there is no such device. EINVAL from readlink: that is no link.
    fn is_lie(&self) -> bool {
        let about = |what| self.call.is_about(what);
        match self.errno.0 {
            "ENXIO" => about("DM_DEV_STATUS") || about("DM_DEV_REMOVE"),
            "EINVAL" => self.call.name == "readlink",
            _ => false,
        }
    }

    /// Holds a complaint against what is left.
    fn judge(&self, done: &Output) -> Result<Cell, String> {
        let line = complaint(done);
        let (named, cause) = named(&line);
        // EAGAIN from flock says that somebody else has the lock, which is no failure of the call.
        let locked = self.call.name == "flock" && self.errno.0 == "EAGAIN";
        let number = format!("(os error {})", self.errno.1);
        let object = cause.contains('/') || cause.contains("stdout");
        let typed = cause.starts_with("cannot ") && object && cause.contains(&number);
        if !typed && !locked {
            return Err(format!("names no step, object or errno: {line}"));
        }

        let patience = if named.is_empty() {
            MOMENT
        } else {
            Duration::ZERO
        };
        let left = self.world.settled_left(patience);
        let held = !left.devices.is_empty();
        let dm = left.devices.iter().chain(&left.aliases);
        let dm: Vec<PathBuf> = dm.map(|name| Path::new("/dev/mapper").join(name)).collect();
        let loops: Vec<_> = left.loops.iter().map(|each| each.device.clone()).collect();
        // A device that is left holds its loop devices; they go with it.
        let unnamed = dm.iter().chain(loops.iter().filter(|_| !held));
        let unnamed: Vec<_> = unnamed.filter(|path| !named.contains(path)).collect();
        if !unnamed.is_empty() {
            return Err(format!("left and not named: {unnamed:?}: {line}"));
        }
        let unsure = named
            .iter()
            .any(|path| !dm.contains(path) && !loops.contains(path));
        let looked = cause.contains("cannot inspect") || cause.contains("cannot query");
        if unsure && !looked {
            return Err(format!("named and not left: {left:?}: {line}"));
        }
        Ok(match (named.is_empty(), unsure) {
            (true, _) => Cell::Failed,
            (false, true) => Cell::Unsure,
            (false, false) => Cell::Left,
        })
    }

    /// The cell of `act`; what is wrong with it goes to `wrong`. Whatever is left, one sweep takes it away.
    fn cell(&self, act: Act, wrong: &mut Vec<String>) -> &'static str {
        let cell = act(self).unwrap_or_else(|why| {
            wrong.push(format!("{}: {why}", self.what()));
            Cell::Broken
        });
        if !self.world.left().is_empty() {
            self.world.reap_once();
        }
        let left = self.world.settled_left(MOMENT);
        assert!(left.is_empty(), "{}: not swept: {left:#?}", self.what());
        cell.letter()
    }
}

/// The objects that a complaint names as left behind, and the rest of it.
fn named(line: &str) -> (Vec<PathBuf>, &str) {
    let parts = line
        .strip_prefix("left behind ")
        .and_then(|rest| rest.split_once(": "));
    match parts {
        Some((objects, cause)) => (objects.split(", ").map(PathBuf::from).collect(), cause),
        None => (Vec::new(), line),
    }
}

/// Whether the call is one that a kernel may fail: what the C library and the allocator do for themselves is not
/// the question.
fn can_fail(call: &Call) -> bool {
    let own = [
        "fallocate",
        "ftruncate",
        "getrandom",
        "ioctl",
        "openat",
        "close",
        "flock",
        "pread64",
        "pwrite64",
    ];
    let paths = [
        "symlink",
        "unlink",
        "readlink",
        "newfstatat",
        "fstat",
        "statx",
        "write",
    ];
    let hash_seed = call.is_about("GRND_");
    own.iter().chain(&paths).any(|name| *name == call.name) && !hash_seed
}

type Act = fn(&Fault<'_>) -> Result<Cell, String>;

fn matrix(world: &World, what: &str, calls: &[Call], act: Act) {
    let header: String = ERRNOS
        .iter()
        .map(|(name, _)| format!("{name:>7}"))
        .collect();
    println!(
        "a fault at {} calls of {what}\n{:44}{header}",
        calls.len(),
        ""
    );
    let mut wrong = Vec::new();
    // The short form asks one of the nine of each call, and goes through them from call to call.
    let asked = short_or_long(1, ERRNOS.len());
    for (nth, call) in calls.iter().enumerate() {
        let mut row = String::new();
        for (column, errno) in ERRNOS.into_iter().enumerate() {
            let turn = (column + ERRNOS.len() - nth * 2 % ERRNOS.len()) % ERRNOS.len();
            let fault = Fault {
                world,
                call,
                errno,
                more: "",
            };
            let letter = match turn < asked {
                true => fault.cell(act, &mut wrong),
                false => Cell::Unasked.letter(),
            };
            row.push_str(&format!("{letter:>7}"));
        }
        println!("{:44}{row}", call.brief());
        world.assert_as_before(&format!("{what}, faults at {call:?}"));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Faults that stay: the call and all later ones of its name fail, undoing included.
fn lasting(world: &World, what: &str, calls: &[Call], act: Act) {
    let mut wrong = Vec::new();
    let of_interest = |call: &&Call| match call.name.as_str() {
        "ioctl" => long() || call.is_about("DM_") || call.is_about("LOOP_CONFIGURE"),
        _ => long() && ["openat", "close", "unlink", "flock"].contains(&call.name.as_str()),
    };
    for (nth, call) in calls.iter().filter(of_interest).enumerate() {
        let mut row = String::new();
        // EBUSY is waited out to a deadline at some steps, some seconds each.
        let errnos = [ERRNOS[4], ERRNOS[1], ERRNOS[0]];
        // The standard library repeats an open for as long as it is interrupted (`sys::fs::File::open_c`, `cvt_r`),
        // which no kernel does for ever.
        let endless = |name: &str| call.name == "openat" && name == "EINTR";
        for errno in short_or_long(&errnos[nth % 2..=nth % 2], &errnos[..]) {
            if endless(errno.0) {
                continue;
            }
            let fault = Fault {
                world,
                call,
                errno: *errno,
                more: "+",
            };
            row.push_str(&format!("  {}+ {}", errno.0, fault.cell(act, &mut wrong)));
        }
        println!("{:44}{row}", call.brief());
        world.assert_as_before(&format!("{what}, lasting faults at {call:?}"));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `create` of the victim.
fn arguments<'a>(world: &'a World, cow: &'a Path) -> [&'a str; 4] {
    let text = |path: &'a Path| path.to_str().expect("ASCII");
    [
        "create",
        text(world.scene.image()),
        text(cow),
        world.victim(),
    ]
}

fn with_cow<'a>(create: &[&'a str]) -> Vec<&'a str> {
    [create, &["--make-cow", "8M", "--reserve"]].concat()
}

fn calls_of_create(world: &World) -> Vec<Call> {
    let (log, cow) = (world.scene.path("strace.log"), world.fresh_cow());
    let mut calls = trace::calls(&log, &arguments(world, &cow));
    world.reap_once();
    calls.retain(can_fail);
    calls
}

fn calls_of_cleanup(world: &World) -> Vec<Call> {
    let (log, file) = (
        world.scene.path("strace.log"),
        world.scene.path("handles.json"),
    );
    let handles = world.make_victim();
    fs::write(&file, serde_json::to_string(&handles).expect("plain data")).expect("room");
    let file = file.to_str().expect("ASCII");
    let mut calls = trace::calls(&log, &["cleanup", "--deadline", "500ms", file]);
    calls.retain(can_fail);
    calls
}

#[test]
fn a_fault_at_every_call_of_create() {
    let world = World::new();
    let calls = calls_of_create(&world);
    matrix(&world, "create", &calls, |fault| fault.create());
}

/// Those that an ordinary create does not make, and those after which there is most to undo.
#[test]
fn a_fault_at_every_call_that_making_the_cow_file_adds() {
    let world = World::new();
    let plain = calls_of_create(&world);
    let (log, cow) = (
        world.scene.path("strace.log"),
        world.scene.path("victim.cow"),
    );
    fs::remove_file(&cow).expect("it is there");
    let mut calls = trace::calls(&log, &with_cow(&arguments(&world, &cow)));
    world.reap_once();
    let named = |calls: &[Call], name: &str| calls.iter().filter(|call| call.name == name).count();
    let all = calls.clone();
    calls.retain(|call| {
        let more = named(&all, &call.name) > named(&plain, &call.name);
        can_fail(call) && (more || call.is_about("DM_") || call.is_about("O_CREAT"))
    });
    assert!(calls.iter().any(|call| call.name == "fallocate"), "{all:?}");
    matrix(&world, "create --make-cow --reserve", &calls, |fault| {
        fault.create_with_cow()
    });
}

#[test]
fn a_fault_at_every_call_of_cleanup() {
    let world = World::new();
    let calls = calls_of_cleanup(&world);
    matrix(&world, "cleanup", &calls, |fault| fault.cleanup());
}

#[test]
fn faults_that_stay() {
    let world = World::new();
    let calls = calls_of_create(&world);
    lasting(&world, "create", &calls, |fault| fault.create());
    let calls = calls_of_cleanup(&world);
    lasting(&world, "cleanup", &calls, |fault| fault.cleanup());
}

/// A create that failed has undone all: the same COW file serves the next one.
#[test]
fn after_a_fault_the_same_call_succeeds() {
    let world = World::new();
    for call in calls_of_create(&world)
        .iter()
        .filter(|call| call.name == "ioctl")
    {
        let fault = Fault {
            world: &world,
            call,
            errno: ("EIO", 5),
            more: "",
        };
        if fault.create() == Ok(Cell::Done) {
            continue;
        }
        let cow = world.scene.path("victim.cow");
        let made = SnapshotOptions::new().create(world.scene.image(), cow, world.victim());
        let made = made.unwrap_or_else(|error| panic!("{}: {error}", fault.what()));
        made.cleanup().expect("nobody has it open");
    }
    world.assert_as_before("at the end");
}
