//! A pool whose process is killed at any moment, again and again.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use dmsnap::pool::CowFate;
use dmsnap::{Origin, cleanup};

use super::{PATIENCE, claim, live, options, unclaimed};
use crate::common::reading::dm_names;
use crate::common::{PREFIX, Scene, chain};
use crate::proof::repeated;
use crate::proof::worker::Process;

/// What makes this binary a worker: its directory and image, and how many cycles the ones before it have done.
const JOB: &str = "DMSNAP_TEST_POOL";

/// The disk that a VM of that number has had.
fn tag(nth: u64) -> u64 {
    0x1000 + nth
}

fn name(nth: u64) -> String {
    format!("{PREFIX}vm-{nth}")
}

/// Claims, uses, and releases two of three, until it is killed. The journal says what it has seen done.
fn work(dir: &Path, image: &Path, first: u64) -> Result<(), String> {
    let text = |error: dmsnap::Error| chain(&error);
    let journal = File::options().append(true).open(dir.join("journal"));
    let mut journal = journal.map_err(|error| error.to_string())?;
    let mut note = |what: &str, nth: u64| {
        let line = format!("{what} {nth}\n");
        journal
            .write_all(line.as_bytes())
            .map_err(|error| error.to_string())
    };
    let origin = Origin::open(image).map_err(text)?;
    let pool = options(3).open(&origin, dir).map_err(text)?;
    for nth in first.. {
        pool.wait_ready(1, PATIENCE);
        let claimed = pool.claim(&name(nth)).map_err(text)?;
        note("claimed", nth)?;
        live(claimed.snapshot.device(), tag(nth))?;
        note("used", nth)?;
        if nth % 3 != 0 {
            note("releasing", nth)?;
            pool.release(claimed.snapshot.handles(), CowFate::Delete)
                .map_err(text)?;
            note("released", nth)?;
        }
    }
    Ok(())
}

/// The journal, line by line: what was seen done to which VM.
fn journal(dir: &Path) -> Vec<(String, u64)> {
    let text = fs::read_to_string(dir.join("journal")).expect("a journal");
    let line = |line: &str| {
        let (what, nth) = line.split_once(' ').expect("two words");
        (what.to_owned(), nth.parse().expect("a number"))
    };
    text.lines().map(line).collect()
}

/// Every VM that was claimed and not released is there, with its bytes, and every other device is one whose claim or
/// release was cut off. Then they are cleaned up, as their control plane would. Says how many there were.
fn check_and_clean(scene: &Scene) -> usize {
    let lines = journal(scene.dir());
    let of = |wanted: &str| -> BTreeSet<u64> {
        let lines = lines.iter().filter(|(what, _)| what == wanted);
        lines.map(|(_, nth)| *nth).collect()
    };
    let (claimed, used) = (of("claimed"), of("used"));
    let (releasing, released) = (of("releasing"), of("released"));
    let there: BTreeSet<u64> = dm_names()
        .iter()
        .filter_map(|name| name.strip_prefix(&format!("{PREFIX}vm-"))?.parse().ok())
        .collect();
    for nth in claimed.difference(&releasing) {
        assert!(there.contains(nth), "VM {nth} was claimed, and is lost");
    }
    for nth in &there {
        assert!(
            !released.contains(nth),
            "VM {nth} was released, and is there"
        );
        let found = dmsnap::status(name(*nth)).unwrap_or_else(|error| panic!("{}", chain(&error)));
        let handles = found.handles();
        if used.contains(nth) {
            let disk = File::open(handles.device.as_ref().expect("a device")).expect("a disk");
            let mut seen = vec![0; 4096];
            let at = tag(*nth) % super::CHUNKS * 4096;
            disk.read_exact_at(&mut seen, at).expect("it has so much");
            assert_eq!(
                seen,
                tag(*nth).to_le_bytes().repeat(512),
                "VM {nth}'s bytes"
            );
        }
        cleanup(&handles).unwrap_or_else(|error| panic!("{}", chain(&error)));
        let cow = found.cow.and_then(|cow| cow.path).expect("a COW file");
        fs::remove_file(&cow).unwrap_or_else(|error| panic!("{}: {error}", cow.display()));
    }
    File::create(scene.path("journal")).expect("a new journal");
    there.len()
}

#[test]
fn no_kill_loses_a_claimed_device_or_leaves_one_that_is_not() {
    if let Ok(job) = env::var(JOB) {
        let words: Vec<&str> = job.split('\n').collect();
        let done = work(
            Path::new(words[0]),
            Path::new(words[1]),
            words[2].parse().expect("a number"),
        );
        let _ = writeln!(std::io::stderr(), "{}", done.expect_err("it has no end"));
        std::process::exit(1);
    }
    let scene = Scene::new();
    let cycles = repeated(30, 1000) as u64;
    File::create(scene.path("journal")).expect("a new journal");
    let (mut done, mut kills, mut survivors) = (0u64, 0u64, 0);
    while done < cycles {
        let job = format!(
            "{}\n{}\n{}",
            scene.dir().display(),
            scene.image().display(),
            done + 1
        );
        let this = env::current_exe().expect("this binary");
        let words = [
            "--exact",
            "pool::kills::no_kill_loses_a_claimed_device_or_leaves_one_that_is_not",
            "--nocapture",
        ];
        let mut worker = Process::start(Command::new(this).args(words).env(JOB, job));
        // From its first moments to a dozen cycles: whenever that many lines are there, and then some microseconds.
        let lines = (kills * 7 + 3) % 43;
        let begin = Instant::now();
        while (journal(scene.dir()).len() as u64) < lines {
            assert!(worker.is_running(), "{:?}", worker.join(PATIENCE));
            assert!(begin.elapsed() < Duration::from_secs(60), "it hangs");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(kills * 1237 % 20_000));
        worker.kill();
        kills += 1;
        let last = dm_names()
            .iter()
            .filter_map(|name| {
                name.strip_prefix(&format!("{PREFIX}vm-"))?
                    .parse::<u64>()
                    .ok()
            })
            .max();
        let noted = journal(scene.dir()).into_iter().map(|(_, nth)| nth).max();
        done = done.max(last.unwrap_or(0)).max(noted.unwrap_or(0));
        if kills % 3 == 0 {
            survivors += check_and_clean(&scene);
        }
    }
    survivors += check_and_clean(&scene);
    // The next pool finds what the last one left, and leaves nothing itself.
    let origin = Origin::open(scene.image()).expect("an image");
    let pool = options(1).open(&origin, scene.dir()).expect("a pool");
    let claimed = claim(&scene, &pool);
    let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
    released.unwrap_or_else(|error| panic!("{}", chain(&error)));
    pool.drain().expect("nothing is open");
    assert_eq!(unclaimed(), 0);
    let files = fs::read_dir(scene.dir()).expect("a directory").flatten();
    let files = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let left: Vec<_> = files.filter(|name| name.ends_with(".cow")).collect();
    assert!(left.is_empty(), "{left:?}");
    println!("{done} cycles, {kills} kills, {survivors} VMs survived their pool");
}
