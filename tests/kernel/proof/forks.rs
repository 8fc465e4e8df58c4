//! Many forks of one layer: each begins with what the layer has, they all work, and nothing is left of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dmsnap::find::tree_of;
use dmsnap::{CowSize, SnapshotOptions};

use super::scale::clean_all;
use super::worker::use_disk;
use super::{repeated, short_or_long, timed};
use crate::checkpoint::{SOON, freeze, mounted, name_of, node, snapshot, sum};
use crate::common::reading::{dm_exists, dm_info};
use crate::common::{Scene, chain, eventually, run, settle};

#[test]
fn forks_of_one_layer_are_made_written_listed_and_taken_down() {
    let scene = Scene::new();
    let count = repeated(40, 1000);
    let v = snapshot(&scene);
    use_disk(v.device(), 1).expect("it works");
    let old = scene.path(format!("{}.cow", name_of(&v)));
    let (layer_name, layer) = freeze(&scene, &v);
    let (held, frozen) = (fs::read(&old).expect("a COW file"), sum(&node(&layer_name)));
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase);
    let make = || {
        let name = scene.name();
        let cow = scene.path(format!("{name}.cow"));
        let made = options.create_on(layer.origin(), cow, &name);
        made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)))
            .into_handles()
    };
    let (mut forks, making) = timed(|| (0..count).map(|_| make()).collect::<Vec<_>>());
    let last = forks[count - 1].device.as_deref().expect("a device");
    assert_eq!(sum(last), frozen, "a fork begins with what its layer has");
    let ((), writing) = timed(|| {
        for (nth, fork) in (2..).zip(&forks) {
            let device = fork.device.as_deref().expect("a device");
            use_disk(device, nth).unwrap_or_else(|error| panic!("fork {nth}: {error}"));
        }
    });
    assert_eq!(sum(&node(&layer_name)), frozen, "the layer has changed");
    assert!(
        fs::read(&old).expect("a COW file") == held,
        "its COW file has changed"
    );

    let (tree, showing) = timed(|| tree_of(layer_name.as_str()));
    let tree = tree.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let names = |above: &[dmsnap::find::TreeNode]| {
        let mut names: Vec<_> = above
            .iter()
            .filter_map(|each| each.name())
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    forks.push(v.into_handles());
    let all = forks
        .iter()
        .map(|each| each.name.clone().expect("a name").to_string());
    let mut all: Vec<_> = all.collect();
    all.sort();
    assert_eq!(names(&tree.above[0].above), all, "what stands on the layer");
    // The value here, and each that stands on it, by dmsetup.
    assert_eq!(dm_info(&layer_name, "open"), (count + 2).to_string());
    drop(layer);

    let ((), clearing) = timed(|| clean_all(forks));
    assert!(
        eventually(SOON, || !dm_exists(&layer_name)),
        "it goes with its last user"
    );
    println!(
        "{count} forks of one layer: made in {making:.1?}, written to in {writing:.1?}, shown as a tree in {showing:.1?}, \
         taken down by 8 threads in {clearing:.1?}"
    );
    settle();
}

/// Writes a few files over and over, each synced before the next, as fast as it goes.
struct FullSpeed {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

const FILES: u64 = 32;

const FILE_WORDS: usize = 4096;

impl FullSpeed {
    fn start(dir: PathBuf) -> Self {
        let (stop, synced) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&synced));
        let thread = thread::spawn(move || {
            for nth in (0..).take_while(|_| !stopped.load(Ordering::Relaxed)) {
                let nth: u64 = nth;
                let mut file = File::create(dir.join((nth % FILES).to_string()))?;
                file.write_all(&nth.to_le_bytes().repeat(FILE_WORDS))?;
                file.sync_all()?;
                count.store(nth + 1, Ordering::Release);
            }
            Ok(())
        });
        Self {
            stop,
            synced,
            thread,
        }
    }

    fn synced(&self) -> u64 {
        self.synced.load(Ordering::Acquire)
    }

    /// How often it wrote; no write failed.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().expect("it does not panic");
        ended.expect("no write fails");
        self.synced.load(Ordering::Acquire)
    }
}

/// Every file has what was written when so many were synced, or since; one may be under way.
fn assert_written(dir: &Path, synced: u64, under_way: usize) {
    let mut torn = Vec::new();
    for file in 0..FILES {
        let found = fs::read(dir.join(file.to_string())).expect("a file");
        let first = found.first_chunk().map(|word| u64::from_le_bytes(*word));
        let whole = |nth: &u64| found == nth.to_le_bytes().repeat(FILE_WORDS);
        match first.filter(whole) {
            Some(nth) => {
                assert_eq!(nth % FILES, file);
                assert!(
                    nth + FILES >= synced,
                    "file {file}: {nth}, of {synced} synced"
                );
            }
            None => torn.push(file),
        }
    }
    assert!(torn.len() <= under_way, "{torn:?}");
}

/// A checkpoint each second while a mounted file system is written at full speed; forks of three of the layers, made at
/// once.
#[test]
fn a_disk_at_full_speed_is_frozen_over_and_over_and_every_fork_is_its_point_in_time() {
    let scene = Scene::ext4();
    let (checkpoints, each) = (short_or_long(2, 20), short_or_long(1, 8));
    let image = fs::read(scene.image()).expect("an image");
    let v = snapshot(&scene);
    let at = mounted(v.device(), &scene.path("v"), "rw");
    let dir = at.at().join("files");
    fs::create_dir(&dir).expect("room for a directory");
    let writer = FullSpeed::start(dir.clone());
    assert!(eventually(SOON, || writer.synced() >= FILES));
    let mut layers = Vec::new();
    for _ in 0..checkpoints {
        thread::sleep(Duration::from_millis(short_or_long(50, 1000)));
        let synced = writer.synced();
        let (name, layer) = freeze(&scene, &v);
        layers.push((sum(&node(&name)), name, layer, synced));
    }
    let chosen = short_or_long(vec![0], vec![0, checkpoints / 2, checkpoints - 1]);
    let wanted: Vec<_> = chosen
        .iter()
        .flat_map(|which| std::iter::repeat_n(*which, each))
        .map(|which| (which, scene.name()))
        .collect();
    let make = |name: &str, layer: &dmsnap::Origin| {
        let mut options = SnapshotOptions::new();
        options.make_cow(CowSize::WorstCase);
        let made = options.create_on(layer, scene.path(format!("{name}.cow")), name);
        made.unwrap_or_else(|error| panic!("{}", chain(&error)))
    };
    let (make, layers_ref) = (&make, &layers);
    let forks: Vec<_> = thread::scope(|scope| {
        let making: Vec<_> = wanted
            .iter()
            .map(|(which, name)| scope.spawn(|| make(name, layers_ref[*which].2.origin())))
            .collect();
        let made = making
            .into_iter()
            .map(|each| each.join().expect("no panic"));
        made.collect()
    });
    let written = writer.stop();
    println!(
        "{checkpoints} checkpoints, {} forks, {written} files written",
        forks.len()
    );
    assert_written(&dir, written, 0);
    drop(at);
    settle();
    run!("e2fsck", "-f", "-n", v.device());
    let at = mounted(v.device(), &scene.path("v"), "ro");
    assert_written(&at.at().join("files"), written, 0);
    drop(at);
    for ((which, name), fork) in wanted.iter().zip(&forks) {
        let (before, _, _, synced) = &layers[*which];
        assert_eq!(sum(fork.device()), *before, "{name}, of layer {which}");
        run!("e2fsck", "-f", "-n", fork.device());
        let there = mounted(fork.device(), &scene.path("fork"), "rw");
        assert_written(&there.at().join("files"), *synced, 1);
        fs::write(there.at().join("own"), "a fork's").expect("it takes writes");
        drop(there);
        run!("e2fsck", "-f", "-n", fork.device());
    }
    for (before, name, ..) in layers.iter().rev().step_by(short_or_long(1, 4)) {
        assert_eq!(sum(&node(name)), *before, "a layer has changed");
    }
    v.cleanup()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    clean_all(
        forks
            .into_iter()
            .map(dmsnap::Snapshot::into_handles)
            .collect(),
    );
    while let Some((_, name, layer, _)) = layers.pop() {
        drop(layer);
        assert!(eventually(SOON, || !dm_exists(&name)), "{name} stays");
    }
    assert!(
        fs::read(scene.image()).expect("an image") == image,
        "the image has changed"
    );
    scene.assert_clean();
}
