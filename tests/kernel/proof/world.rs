//! What stands beside the snapshot under proof and must come to no harm: a mounted live snapshot of ours that is
//! being written to, and a snapshot that another tool made over the same image.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dmsnap::find::SnapshotInfo;
use dmsnap::{Handles, SnapshotOptions};

use crate::common::reading::{self, Bound, number};
use crate::common::tools::{finish, success};
use crate::common::{Foreign, Losetup, Mounted, Scene, dmsnap, eventually};

/// How long the kernel, or a udevd that looks at a loop device, may take to let go.
const SOON: Duration = Duration::from_secs(20);

/// What another tool's snapshot holds at its start.
const THEIRS: &[u8] = b"written by another tool";

/// A scene with neighbours. Fields are dropped in this order.
pub(super) struct World {
    writer: Writer,
    _mounted: Mounted,
    live: Live,
    _foreign: Foreign,
    _foreign_loops: [Losetup; 2],
    foreign_name: String,
    baseline: State,
    image: Vec<u8>,
    victim: String,
    pub(super) scene: Scene,
}

/// What there is of dm devices, loop devices and links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) devices: Vec<String>,
    pub(super) loops: Vec<Bound>,
    pub(super) aliases: Vec<String>,
}

impl World {
    pub(super) fn new() -> Self {
        let scene = Scene::over(|image| crate::common::scene::ext4(image, 4 << 20));
        let foreign_name = format!("{}-foreign", scene.name());
        let (origin, cow) = (scene.image().to_owned(), scene.cow("foreign.cow"));
        let loops = [Losetup::attach_read_only(&origin), Losetup::attach(&cow)];
        let numbers = loops.each_ref().map(|each| number(&each.device));
        let bytes = fs::metadata(&origin).expect("an image").len();
        let table = format!(
            "0 {} snapshot {} {} P 8",
            bytes / 512,
            numbers[0],
            numbers[1]
        );
        let foreign = Foreign::create(&foreign_name, &table);
        let node = Path::new("/dev/mapper").join(&foreign_name);
        assert!(eventually(SOON, || node.exists()), "dmsetup made {node:?}");
        let device = File::options().write(true).open(&node).expect("it opens");
        device.write_all_at(THEIRS, 0).expect("writable");
        device.sync_all().expect("its COW file takes it");
        drop(device);

        let live = Live(scene.snapshot().into_handles());
        let device = live.0.device.clone().expect("a device");
        let device = device.to_str().expect("ASCII");
        let mounted = Mounted::mount([device], &scene.path("live"));
        let writer = Writer::start(mounted.at());
        let image = fs::read(scene.image()).expect("an image");
        Self {
            baseline: state(&scene),
            victim: scene.name(),
            writer,
            _mounted: mounted,
            live,
            _foreign: foreign,
            _foreign_loops: loops,
            foreign_name,
            image,
            scene,
        }
    }

    /// The name of the snapshot under proof.
    pub(super) fn victim(&self) -> &str {
        &self.victim
    }

    /// A fresh COW file for it, always of the same name.
    pub(super) fn fresh_cow(&self) -> PathBuf {
        let _ = fs::remove_file(self.scene.path("victim.cow"));
        self.scene.cow("victim.cow")
    }

    /// The snapshot under proof, made by the library.
    pub(super) fn make_victim(&self) -> Handles {
        let made =
            SnapshotOptions::new().create(self.scene.image(), self.fresh_cow(), &self.victim);
        made.expect("a snapshot").into_handles()
    }

    /// The name of our live snapshot, which every sweep has to keep.
    pub(super) fn live_name(&self) -> String {
        self.live.0.name.clone().expect("a name").to_string()
    }

    pub(super) fn keeps(&self, info: &SnapshotInfo) -> bool {
        Some(&info.uuid) == self.live.0.uuid.as_ref()
    }

    /// `dmsnap reap`, once, as an operator would; what it said of everything but our live snapshot.
    pub(super) fn reap_once(&self) -> String {
        let live = self.live_name();
        let text = success(dmsnap().args(["reap", "--json", "--keep", &live]));
        let items: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let said = |item: &serde_json::Value| {
            let word = |key: &str| item[key].as_str().unwrap_or("?").to_owned();
            if word("name") == live {
                assert_eq!(word("fate"), "kept", "{text}");
                return None;
            }
            Some(word("fate"))
        };
        let said: Vec<_> = items
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(said)
            .collect();
        said.join(", ")
    }

    /// Nothing of the snapshot under proof is there, and the neighbours are as they were.
    pub(super) fn assert_as_before(&self, when: &str) {
        let as_before = || state(&self.scene) == self.baseline;
        assert!(
            eventually(SOON, as_before),
            "{when}: before {:#?}, now {:#?}",
            self.baseline,
            state(&self.scene)
        );
        let now = fs::read(self.scene.image()).expect("an image");
        assert!(now == self.image, "{when}: the image has changed");
        let mut theirs = [0; THEIRS.len()];
        let node = Path::new("/dev/mapper").join(&self.foreign_name);
        let device = File::open(node).expect("another tool's snapshot opens");
        device.read_exact_at(&mut theirs, 0).expect("readable");
        assert_eq!(theirs, THEIRS, "{when}: another tool's snapshot is harmed");
        self.writer.assert_well(when);
    }

    /// What there is beyond the neighbours.
    pub(super) fn left(&self) -> State {
        let mut now = state(&self.scene);
        now.devices
            .retain(|each| !self.baseline.devices.contains(each));
        now.loops.retain(|each| !self.baseline.loops.contains(each));
        now.aliases
            .retain(|each| !self.baseline.aliases.contains(each));
        now
    }

    /// The same, read again until nothing is left or a moment has passed.
    pub(super) fn settled_left(&self, patience: Duration) -> State {
        eventually(patience, || self.left().is_empty());
        self.left()
    }

    /// A command that ran to its end, with a deadline; nothing else.
    pub(super) fn dmsnap(&self, arguments: &[&str]) -> std::process::Output {
        finish(dmsnap().args(arguments))
    }
}

impl State {
    pub(super) fn is_empty(&self) -> bool {
        self.devices.is_empty() && self.loops.is_empty() && self.aliases.is_empty()
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let (dm, loops, links) = (self.devices.len(), self.loops.len(), self.aliases.len());
        write!(f, "{dm} dm, {loops} loop, {links} link")
    }
}

/// Read without the library.
pub(super) fn state(scene: &Scene) -> State {
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let aliases = fs::read_dir("/dev/mapper").expect("/dev/mapper is there");
    let aliases = aliases
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    State {
        devices: sorted(reading::dm_listed()),
        loops: reading::loops_below(scene.dir()),
        aliases: sorted(aliases.collect()),
    }
}

struct Live(Handles);

impl Drop for Live {
    fn drop(&mut self) {
        let cleaned = dmsnap::cleanup(&self.0);
        if !std::thread::panicking() {
            cleaned.expect("our live snapshot can be cleaned up");
        }
    }
}

/// A guest at work: writes, syncs and reads back, over and over.
struct Writer {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(at: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let file = at.join("work");
        let work = {
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let round = rounds.load(Ordering::Relaxed);
                    let content = round.to_le_bytes().repeat(1024);
                    let mut open = File::create(&file).expect("a writable file system");
                    open.write_all(&content).expect("room");
                    open.sync_all().expect("the COW file takes it");
                    assert!(
                        fs::read(&file).expect("readable") == content,
                        "what was written"
                    );
                    rounds.store(round + 1, Ordering::Relaxed);
                    std::thread::park_timeout(Duration::from_millis(20));
                }
            }
        };
        let thread = Some(std::thread::spawn(work));
        Self {
            stop,
            rounds,
            thread,
        }
    }

    /// It has not died, and it gets on.
    fn assert_well(&self, when: &str) {
        let before = self.rounds.load(Ordering::Relaxed);
        let gets_on = || self.rounds.load(Ordering::Relaxed) > before;
        let dead = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        if let Some(thread) = &self.thread {
            // From the pause between two rounds.
            thread.thread().unpark();
        }
        assert!(
            !dead && eventually(SOON, gets_on),
            "{when}: the writer is stuck or dead"
        );
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the writer failed");
        }
    }
}
