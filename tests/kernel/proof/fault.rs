//! A fault at every system call of create and cleanup: each ends in success with everything in place, or in a typed
//! error with nothing left but what it names.
//!
//! An injected failure means that the call did not happen: a failed close leaves the descriptor to the process's end.

use std::fs;

use dmsnap::SnapshotOptions;

use super::faulty::{Act, Cell, Fault, arguments, with_cow};
use super::trace::{self, Call};
use super::world::World;
use super::{has_its_turn, long, short_or_long};

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
    own.iter()
        .chain(&paths)
        .any(|name| *name == call.plain_name())
        && !hash_seed
}

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
    for (nth, call) in calls
        .iter()
        .enumerate()
        .filter(|(nth, _)| has_its_turn(*nth))
    {
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
        _ => long() && ["openat", "close", "unlink", "flock"].contains(&call.plain_name()),
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
