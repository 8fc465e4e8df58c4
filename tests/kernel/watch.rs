//! Watching COW files fill up, and growing them in time.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::Refusal;
use dmsnap::watch::{Change, Watch, WatchEvent};
use dmsnap::{ChunkSize, Error, ErrorKind, Snapshot, SnapshotOptions, Store};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::common::filling::{Direct, status_of, usage_of};
use crate::common::tools::{Running, start, success};
use crate::common::{Foreign, Scene, dmsnap, dmsnap_under, eventually, output};
use crate::proof::short_or_long;

const SMALL: u64 = 256 << 10;
const MIB: u64 = 1 << 20;

fn snapshot(scene: &Scene, store: Store, bytes: u64) -> (Snapshot, String) {
    snapshot_of(scene, SnapshotOptions::new().store(store), bytes)
}

fn snapshot_of(scene: &Scene, options: &SnapshotOptions, bytes: u64) -> (Snapshot, String) {
    let name = scene.name();
    let cow = scene.sparse(format!("{name}.cow"), bytes);
    let snapshot = options.create(scene.image(), cow, &name);
    (snapshot.expect("a snapshot"), name)
}

fn watch(names: &[&String]) -> Watch {
    let mut watch = Watch::new().expect("device-mapper is there");
    for name in names {
        watch.add(name.as_str()).expect("it is there");
    }
    watch
}

fn readable(watch: &Watch, within: Duration) -> bool {
    let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(within).expect("short");
    nix::poll::poll(&mut fds, timeout).expect("it can be polled") > 0
}

fn changes(watch: &mut Watch) -> Vec<Change> {
    let events = watch.check().expect("it can be armed");
    events.into_iter().map(|event| event.change).collect()
}

/// Waits and checks until there is something to tell.
fn next(watch: &mut Watch) -> Vec<WatchEvent> {
    let start = Instant::now();
    loop {
        let events = watch.check().expect("it can be armed");
        if !events.is_empty() {
            return events;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "nothing happens");
        watch.wait().expect("it can be polled");
    }
}

fn overfill(snapshot: &Snapshot) {
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, SMALL).expect_err("it does not fit");
}

// drivers/md/dm-ioctl.c, dm_poll: the global event number against the one at the last DM_DEV_ARM_POLL of that file.
// drivers/md/dm-snap.c, __invalidate_snapshot raises an event; snapshot_overflowed is only a flag.
#[test]
fn the_descriptor_wakes_for_events_and_an_overflow_is_none() {
    let scene = Scene::new();
    let (po, po_name) = snapshot(&scene, Store::PersistentOverflow, SMALL);
    let (p, p_name) = snapshot(&scene, Store::Persistent, SMALL);
    let (soon, quiet) = (Duration::from_secs(30), Duration::from_millis(200));
    let mut watch = watch(&[&po_name, &p_name]);
    assert_eq!(changes(&mut watch), []);
    assert!(!readable(&watch, quiet), "nothing happens");

    overfill(&po);
    assert_eq!(status_of(&po_name), SnapshotStatus::Overflow);
    assert!(!readable(&watch, quiet), "an overflow raises no event");

    // Between a check and the wait.
    overfill(&p);
    assert!(readable(&watch, soon), "an invalid store does");
    let mut seen = changes(&mut watch);
    seen.sort_by_key(|change| *change == Change::Invalid);
    assert_eq!(seen, [Change::Overflow, Change::Invalid]);
    assert!(!readable(&watch, quiet), "armed again");

    let foreign = Foreign::zero(&scene.name());
    assert!(readable(&watch, soon), "so does anybody's dm device");
    assert_eq!(changes(&mut watch), []);
    drop(foreign);
    assert!(readable(&watch, soon), "and its removal");

    p.cleanup().expect("nobody has it open");
    let gone = next(&mut watch);
    assert_eq!((gone.len(), &gone[0].change), (1, &Change::Gone));
    assert_eq!(gone[0].name, p_name);
    po.cleanup().expect("nobody has it open");
    assert_eq!(next(&mut watch)[0].change, Change::Gone);
    assert!(watch.is_empty());
}

#[test]
fn an_overflow_is_told_though_the_kernel_is_silent() {
    let scene = Scene::new();
    for _ in 0..2 {
        let (snapshot, name) = snapshot(&scene, Store::PersistentOverflow, SMALL);
        let mut watch = watch(&[&name]);
        watch.threshold(100);
        assert_eq!(changes(&mut watch), []);
        overfill(&snapshot);
        assert_eq!(next(&mut watch)[0].change, Change::Overflow);
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn above_is_told_once_and_again_after_growth_that_did_not_help() {
    let scene = Scene::new();
    let (snapshot, name) = snapshot(&scene, Store::PersistentOverflow, SMALL);
    let mut watch = watch(&[&name]);
    watch.threshold(50);
    assert_eq!(changes(&mut watch), []);
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, SMALL / 2).expect("it fits");
    let above = next(&mut watch);
    assert_eq!(above[0].change, Change::Above(usage_of(&name)));
    assert!(watch.pause() < Duration::from_millis(100));
    let told_again = |watch: &mut Watch| {
        thread::sleep(Duration::from_millis(20));
        changes(watch)
    };
    assert_eq!(told_again(&mut watch), []);
    snapshot.grow(SMALL + 8192).expect("it grows");
    let above = next(&mut watch);
    assert_eq!(above[0].change, Change::Above(usage_of(&name)));
    snapshot.grow(SMALL * 4).expect("it grows");
    watch.wait().expect("it can be polled");
    assert_eq!(told_again(&mut watch), []);
    device.write(0x5a, SMALL / 2, SMALL * 2).expect("it fits");
    assert!(matches!(next(&mut watch)[0].change, Change::Above(_)));
    drop(device);
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn only_live_snapshots_of_ours_are_watched() {
    let scene = Scene::new();
    let (snapshot, name) = snapshot(&scene, Store::Transient, SMALL);
    let mut watch = watch(&[&name, &name]);
    let uuid = snapshot.handles().uuid.clone().expect("a uuid");
    watch.add(&uuid).expect("by its uuid");
    assert_eq!(watch.len(), 1);
    let missing = watch.add("dmsnap-test-missing").expect_err("no such");
    assert_eq!(missing.kind(), ErrorKind::Gone);
    let foreign = Foreign::zero(&scene.name());
    let name = crate::common::reading::dm_names();
    let theirs = name.iter().find(|name| **name != snapshot_name(&snapshot));
    let refused = watch.add(theirs.expect("the foreign one"));
    let Err(Error::Refused(Refusal::NotOurs { .. })) = refused else {
        panic!("{refused:?}");
    };
    drop(foreign);
    assert!(watch.forget(&uuid) && !watch.forget(&uuid) && watch.is_empty());
    assert_eq!(watch.pause(), Duration::from_secs(1));
    snapshot.cleanup().expect("nobody has it open");
}

fn snapshot_name(snapshot: &Snapshot) -> String {
    snapshot.handles().name.clone().expect("a name").to_string()
}

/// A number of snapshots, and how long a look at all of them takes.
#[test]
fn a_look_at_many_costs_little_and_events_do_not_multiply_it() {
    let scene = Scene::new();
    let many: Vec<_> = (0..short_or_long(16, 200))
        .map(|_| snapshot(&scene, Store::Transient, MIB))
        .collect();
    let mut watch = watch(&many.iter().map(|(_, name)| name).collect::<Vec<_>>());
    let begin = Instant::now();
    assert_eq!(changes(&mut watch), []);
    let look = begin.elapsed();
    println!("a look at {}: {look:?}", many.len());
    for (snapshot, _) in many {
        snapshot.cleanup().expect("nobody has it open");
    }
    let mut gone = 0;
    while gone < short_or_long(16, 200) {
        gone += next(&mut watch).len();
    }
    assert!(watch.is_empty());
}

/// `dmsnap watch`, printing to a file, and looking already.
fn dmsnap_watch(out: &Path, arguments: &[&str], names: &[&String]) -> Running {
    // exec: the process stays the same.
    let to_file = format!("exec \"$0\" \"$@\" >'{}'", out.display());
    let mut command = dmsnap_under(&["sh", "-c", &to_file]);
    let running = start(command.arg("watch").args(arguments).args(names));
    let descriptors = format!("/proc/{}/fd", running.id());
    let controls = || {
        let open = fs::read_dir(&descriptors).into_iter().flatten().flatten();
        let targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
        targets
            .filter(|target| target == Path::new("/dev/mapper/control"))
            .count()
    };
    let looks = || controls() == 2;
    assert!(eventually(Duration::from_secs(60), looks), "it looks");
    running
}

/// What it has printed so far.
fn printed(out: &Path) -> String {
    fs::read_to_string(out).expect("UTF-8")
}

fn wait_for(out: &Path, event: &str) {
    let told = || printed(out).contains(event);
    assert!(eventually(Duration::from_secs(60), told), "no {event}");
}

fn lines(running: Running, out: &Path) -> Vec<serde_json::Value> {
    let done = running.join();
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
    let text = printed(out);
    let parse = |line| serde_json::from_str(line).expect("a line of JSON");
    text.lines().map(parse).collect()
}

fn events_of<'a>(lines: &'a [serde_json::Value], name: &str) -> Vec<&'a str> {
    let of = lines.iter().filter(|line| line["name"] == name);
    of.map(|line| line["event"].as_str().expect("text"))
        .collect()
}

/// Over a blank image, of which a guest writes all.
fn blank(bytes: u64) -> Scene {
    Scene::over(|image| {
        let file = File::create(image).expect("a new file");
        file.set_len(bytes).expect("room for a sparse file");
    })
}

/// Writes as a guest does that installs something: on and on, as fast as the device takes it, but for what `before`
/// each MiB does. Returns where an error stopped it.
fn write_on(device: &Path, bytes: u64, before: impl Fn()) -> Result<(), u64> {
    let device = Direct::open(device);
    for at in (0..bytes).step_by(1 << 20) {
        before();
        device.write(0x5a, at, MIB).map_err(|_| at)?;
    }
    Ok(())
}

/// Returns when two more MiB fit. A machine may be so busy that the watch does not run for as long as a writer takes
/// to fill what is left; then the writer stops short of the end.
fn wait_for_room(name: &str) {
    let room = || {
        let usage = usage_of(name);
        usage.total.count().saturating_sub(usage.allocated.count()) > 2 * MIB / 512
    };
    assert!(
        eventually(Duration::from_secs(120), room),
        "{name} is not grown"
    );
}

#[test]
fn a_writer_at_full_speed_sees_no_error_under_the_watch_and_one_without_it() {
    let image = short_or_long(80, 512) * MIB;
    let scene = blank(image);
    let out = scene.path("watch.out");
    // Chunks that the emulated CPU is fast with.
    let mut options = SnapshotOptions::new();
    let chunk = ChunkSize::new(128).expect("a chunk size");
    options.store(Store::PersistentOverflow).chunk_size(chunk);
    // Less than all of the image.
    let cow = 64 * MIB;
    let made = [0; 2].map(|_| snapshot_of(&scene, &options, cow));
    let names = [&made[0].1, &made[1].1];
    let arguments = ["--at", "50%", "--grow-by", "32MiB", "--json"];
    let running = dmsnap_watch(&out, &arguments, &names);
    let wrote = thread::scope(|scope| {
        let spawn = |(snapshot, name): &(Snapshot, String)| {
            let device = snapshot.device().to_owned();
            let name = name.clone();
            scope.spawn(move || write_on(&device, image, || wait_for_room(&name)))
        };
        let writers = made.each_ref().map(spawn);
        writers.map(|writer| writer.join().expect("it ends"))
    });
    let id = running.id().to_string();
    success(Command::new("kill").args(["-TERM", &id]));
    let lines = lines(running, &out);
    for (nth, (_, name)) in made.iter().enumerate() {
        wrote[nth].unwrap_or_else(|at| {
            let status = status_of(name);
            panic!("{name} failed at {} MiB: {status}: {lines:#?}", at / MIB);
        });
        let usage = usage_of(name);
        println!(
            "{name}: {} MiB, {}% of {} sectors at the end",
            image / MIB,
            usage.percent(),
            usage.total
        );
    }
    for (_, name) in &made {
        let events = events_of(&lines, name);
        let grown = events.iter().filter(|event| **event == "grown").count();
        println!("{name}: grown {grown} times");
        assert!(
            grown > 0
                && events
                    .iter()
                    .all(|event| ["above", "grown"].contains(event))
        );
    }
    let (unwatched, name) = snapshot_of(&scene, &options, cow);
    let failed = write_on(unwatched.device(), image, || ()).expect_err("nobody grows it");
    println!("without the watch: failed at {} MiB", failed / MIB);
    assert_eq!(status_of(&name), SnapshotStatus::Overflow);
    unwatched.cleanup().expect("nobody has it open");
    for (snapshot, _) in made {
        assert!(Direct::open(snapshot.device()).reads(0x5a, image - MIB, MIB));
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn the_command_stops_growing_at_its_bound_and_ends_with_the_last_snapshot() {
    let scene = blank(8 * MIB);
    let (snapshot, name) = snapshot(&scene, Store::PersistentOverflow, MIB);
    let out = scene.path("watch.out");
    let arguments = ["--grow-by", "1M", "--max", "2M", "--json"];
    let running = dmsnap_watch(&out, &arguments, &[&name]);
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, 900 << 10).expect("it fits");
    let grown = || usage_of(&name).total.to_bytes() == Some(2 * MIB);
    assert!(eventually(Duration::from_secs(60), grown), "it grows");
    device.write(0x5a, 0, 4 * MIB).expect_err("and no further");
    drop(device);
    wait_for(&out, "overflow");
    snapshot.cleanup().expect("nobody has it open");
    let lines = lines(running, &out);
    let mut events = events_of(&lines, &name);
    events.dedup();
    assert_eq!(events[..2], ["above", "grown"], "{lines:?}");
    assert_eq!(
        events[events.len() - 2..],
        ["overflow", "gone"],
        "{lines:?}"
    );
    let between = &events[2..events.len() - 2];
    assert!(
        between
            .iter()
            .all(|event| ["above", "at-max"].contains(event))
    );
}

#[test]
fn grow_recover_and_watch_speak_as_the_others_do() {
    let scene = blank(8 * MIB);
    let (snapshot, name) = snapshot(&scene, Store::PersistentOverflow, SMALL);
    let table = success(dmsnap().args(["grow", &name, "512K"]));
    assert!(
        table.starts_with("NAME") && table.contains("16/1024"),
        "{table}"
    );
    let out = scene.path("watch.out");
    let running = dmsnap_watch(&out, &[], &[&name]);
    let device = Direct::open(snapshot.device());
    device.write(0x5a, 0, MIB).expect_err("it does not fit");
    drop(device);
    let refused = crate::common::tools::complaint(&output!(
        "sh",
        "-c",
        "exec \"$0\" grow \"$1\" 1M",
        dmsnap().get_program(),
        &name
    ));
    println!("message: grow after an overflow: {refused}");
    wait_for(&out, "overflow");
    let id = running.id().to_string();
    success(Command::new("kill").args(["-INT", &id]));
    let done = running.join();
    let text = printed(&out);
    assert!(done.status.success(), "{done:?}");
    assert!(text.ends_with(&format!("{name}: overflow\n")), "{text}");

    let json = success(dmsnap().args(["recover", "--deadline", "1s", &name, "1MiB"]));
    let handles: dmsnap::Handles = serde_json::from_str(&json).expect("handles");
    assert_eq!(
        handles.name.as_ref().map(AsRef::as_ref),
        Some(name.as_str())
    );
    assert_eq!(usage_of(&name).total.to_bytes(), Some(MIB));
    dmsnap::cleanup(&handles).expect("nobody has it open");
}
