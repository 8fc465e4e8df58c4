//! What the kernel is asked for: no other program, no semaphore, and not more than is needed.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::common::tools::success;
use crate::common::{Scene, dmsnap_under};

/// Runs the command line under strace; returns its stdout and its system calls, one a line.
fn traced(scene: &Scene, arguments: &[&Path]) -> (String, Vec<String>) {
    let log = scene.path("strace.log");
    let log_word = log.to_str().expect("UTF-8");
    let printed = success(dmsnap_under(&["strace", "-f", "-o", log_word]).args(arguments));
    let text = fs::read_to_string(&log).expect("strace wrote it");
    // With -f each line begins with the process's number.
    let call = |line: &str| line.split_once(' ').map(|(_, call)| call.trim().to_owned());
    let calls = text.lines().filter_map(call);
    // Reading the clock enters the kernel only where the clock is a slow one, as under emulation on 5.10.
    let calls = calls.filter(|call| !call.starts_with("clock_gettime("));
    // The seed of std's hash maps: once a process, not once a snapshot.
    let calls = calls.filter(|call| !call.contains("GRND_INSECURE"));
    (printed, calls.collect())
}

/// The calls from the opening of the last control node to the end of the library's work.
fn work<'a>(calls: &'a [String], control: &str, end: &str) -> &'a [String] {
    let first = calls
        .iter()
        .rposition(|call| call.starts_with("openat(") && call.contains(control))
        .unwrap_or_else(|| panic!("{control} was not opened: {calls:#?}"));
    let rest = &calls[first + 1..];
    let last = rest
        .iter()
        .position(|call| call.starts_with(end))
        .unwrap_or_else(|| panic!("no {end}: {rest:#?}"));
    &rest[..last]
}

fn no_helpers(calls: &[String]) {
    let begins = |call: &&String, with: &str| call.starts_with(with);
    let executed = calls.iter().filter(|call| begins(call, "execve")).count();
    assert_eq!(executed, 1, "the command itself: {calls:#?}");
    for forbidden in ["sem", "fork", "vfork", "clone", "socket", "connect"] {
        let found: Vec<_> = calls
            .iter()
            .filter(|call| begins(call, forbidden))
            .collect();
        assert!(found.is_empty(), "{found:#?}");
    }
}

/// What a durability costs a create: the write to sysfs that ends the flushes at our device, and nothing at the loop
/// device's. A transient store has no mark to write.
#[test]
fn a_create_sets_one_queue_of_ours_or_none_by_its_durability() {
    let scene = Scene::new();
    let counts = ["power-cuts", "processes", "throw-away"].map(|durability| {
        let (name, cow) = (scene.name(), scene.cow(durability));
        let words = ["create", "--durability", durability].map(Path::new);
        let files = [scene.image(), &cow, name.as_ref()];
        let (handles, calls) = traced(&scene, &[words.as_slice(), &files].concat());
        no_helpers(&calls);
        let created = work(&calls, "/dev/loop-control", "write(1,");
        println!(
            "{durability}, {} calls:\n{}",
            created.len(),
            created.join("\n")
        );
        let opened = created.iter().filter(|call| call.contains("write_cache"));
        let opened: Vec<_> = opened.collect();
        match durability {
            "power-cuts" => assert_eq!(opened, [""; 0]),
            _ => assert!(
                opened.len() == 1 && opened[0].contains("/sys/block/dm-"),
                "{opened:#?}"
            ),
        }
        let file = scene.file(format!("{durability}.json"), handles);
        traced(&scene, &["cleanup".as_ref(), &file]);
        created.len()
    });
    let [power_cuts, processes, throw_away] = counts;
    assert_eq!(processes, power_cuts + 3, "open, write, close");
    assert!(throw_away <= power_cuts + 3, "{counts:?}");
}

#[test]
fn create_and_cleanup_run_nothing_and_wait_for_nobody() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    // A whole second, which the kernel's clock for files hits now and then, is no evidence: such an image is read.
    let image = fs::File::options().write(true).open(scene.image());
    let dated = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_004);
    let dated = image.expect("writable").set_modified(dated);
    dated.expect("it can be set");
    let create = ["create".as_ref(), scene.image(), &cow, name.as_ref()];
    let (handles, calls) = traced(&scene, &create);
    no_helpers(&calls);
    let created = work(&calls, "/dev/loop-control", "write(1,");
    println!("create, {} calls:\n{}", created.len(), created.join("\n"));
    assert!(created.len() <= 30);
    // The image's size and time say which one it is, so it is not read: the only bytes are those of the COW file's header.
    let reads = |call: &&String| call.starts_with("pread64(") || call.contains("MEASURE_VERITY");
    let read: Vec<_> = created.iter().filter(reads).collect();
    assert_eq!(read.len(), 1, "{read:#?}");
    let (other, cow) = (scene.name(), scene.cow("with a digest"));
    let digest = "5e".repeat(32);
    let create = ["create".as_ref(), "--digest".as_ref(), digest.as_ref()];
    let create = [&create[..], &[scene.image(), &cow, other.as_ref()]].concat();
    let (_, calls) = traced(&scene, &create);
    let with_digest = work(&calls, "/dev/loop-control", "write(1,");
    assert_eq!(with_digest.len(), created.len(), "{with_digest:#?}");
    success(crate::common::dmsnap().args(["remove", &other]));

    let file = scene.file("handles.json", handles);
    let (_, calls) = traced(&scene, &["cleanup".as_ref(), &file]);
    no_helpers(&calls);
    let cleaned = work(&calls, "/dev/mapper/control", "exit_group(");
    println!("cleanup, {} calls:\n{}", cleaned.len(), cleaned.join("\n"));
    assert!(cleaned.len() <= 16);
}
