//! What layers cost: the pause of a checkpoint, a fork, a claim over a layer, reads through many, and memory.
//!
//! Needs root and device-mapper, and makes real devices: `./tests/vm/run bench --only layers` runs it in a guest. With
//! `$DMSNAP_OUT` set, layers.md and layers.json go there.

#![allow(missing_docs, reason = "a bench has no API")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints its results"
)]

#[path = "figures/origin.rs"]
mod origin;

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use devicemapper::{DM, DevId, DmFlags, DmName, DmOptions};
use dmsnap::pool::CowFate;
use dmsnap::snapshot::{CheckpointOptions, Layer};
use dmsnap::{CowSize, Origin, PoolOptions, Snapshot, SnapshotOptions};
use origin::Origin as Here;
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const IMAGE_BYTES: u64 = 64 << 20;
const COW: CowSize = CowSize::WorstCase;
const BLOCK: usize = 4096;
const BLOCKS: u64 = IMAGE_BYTES / BLOCK as u64;
const DEPTHS: [usize; 6] = [0, 1, 2, 4, 8, 16];
const READS: u64 = 256;
const FORKS: u32 = 32;

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        // `cargo test --benches` comes here: no place to make devices.
        println!("layers: nothing to do without --bench");
        return ExitCode::SUCCESS;
    }
    match run(args.iter().any(|arg| arg == "--quick")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("layers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(quick: bool) -> Result<()> {
    let rounds = if quick { 3 } else { 20 };
    let place = Place::new()?;
    let report = Report {
        here: Here::here(),
        idle: place.pauses(rounds, false)?,
        busy: place.pauses(rounds, true)?,
        made: place.made(rounds)?,
        claimed: place.claimed(rounds)?,
        reads: place.reads(rounds.div_ceil(4))?,
        memory: place.memory()?,
    };
    let markdown = report.markdown();
    print!("{markdown}");
    if let Some(out) = env::var_os("DMSNAP_OUT").map(PathBuf::from) {
        fs::write(out.join("layers.md"), &markdown)?;
        let json = serde_json::to_string_pretty(&report.json())?;
        fs::write(out.join("layers.json"), json + "\n")?;
    }
    Ok(())
}

/// How long each of two things took, in turns.
#[derive(Clone, Debug, Default)]
struct Pair {
    ours: Vec<Duration>,
    theirs: Vec<Duration>,
}

fn percentile(samples: &[Duration], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort();
    let last = sorted.len().saturating_sub(1);
    let found = sorted.get((sorted.len() * percent / 100).min(last));
    found.map_or(0.0, |found| found.as_secs_f64() * 1e3)
}

impl Pair {
    fn at(&self, percent: usize) -> [f64; 2] {
        [&self.ours, &self.theirs].map(|samples| percentile(samples, percent))
    }

    fn row(&self, what: &str, percent: usize, promised: f64) -> String {
        let [ours, theirs] = self.at(percent);
        let ratio = ours / theirs;
        let verdict = if ratio <= promised { "kept" } else { "missed" };
        format!(
            "| {what}, p{percent} | {theirs:.3} | {ours:.3} | {ratio:.2} | {promised} | {verdict} |\n"
        )
    }

    fn json(&self) -> serde_json::Value {
        let micros = |samples: &[Duration]| -> Vec<f64> {
            let micros = |sample: &Duration| sample.as_secs_f64() * 1e6;
            samples.iter().map(micros).collect()
        };
        json!({ "ours_us": micros(&self.ours), "theirs_us": micros(&self.theirs) })
    }
}

/// A directory on tmpfs with the image in it.
struct Place {
    dir: tempfile::TempDir,
    image: Origin,
    last: AtomicU64,
}

impl Place {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("dmsnap-bench")
            .tempdir_in("/dev/shm")?;
        let image = dir.path().join("image");
        fs::write(&image, vec![1; usize::try_from(IMAGE_BYTES)?])?;
        Ok(Self {
            image: Origin::open(image)?,
            dir,
            last: AtomicU64::new(0),
        })
    }

    /// A name, and the path of a COW file that is to be made.
    fn fresh(&self) -> (String, PathBuf) {
        let nth = self.last.fetch_add(1, Ordering::Relaxed);
        let name = format!("dmsnap-bench-{}-{nth}", std::process::id());
        let cow = self.dir.path().join(&name);
        (name, cow)
    }

    fn create(&self, origin: &Origin) -> Result<(Snapshot, Duration)> {
        let (name, cow) = self.fresh();
        let mut options = SnapshotOptions::new();
        options.make_cow(COW);
        let begin = Instant::now();
        let made = options.create_on(origin, cow, &name)?;
        Ok((made, begin.elapsed()))
    }

    fn freeze(&self, snapshot: &Snapshot) -> Result<Layer> {
        let (name, cow) = self.fresh();
        let mut options = CheckpointOptions::new();
        Ok(options.make_cow(COW).checkpoint(snapshot, &name, cow)?)
    }

    fn forget(&self, snapshot: Snapshot) -> Result<()> {
        snapshot.cleanup()?;
        for entry in fs::read_dir(self.dir.path())? {
            let path = entry?.path();
            if path != self.dir.path().join("image") {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// The pause of a checkpoint beside a bare suspend and resume of the same device.
    fn pauses(&self, rounds: usize, busy: bool) -> Result<Pair> {
        let mapper = DM::new()?;
        let mut pair = Pair::default();
        for round in 0..=rounds {
            let (snapshot, _) = self.create(&self.image)?;
            let name = snapshot.handles().name.clone().ok_or("it has a name")?;
            let device = snapshot.device().to_owned();
            write(&device, 0..16)?;
            let stop = AtomicBool::new(false);
            thread::scope(|scope| -> Result<()> {
                let load =
                    busy.then(|| scope.spawn(|| load(&device, &stop).map_err(|e| e.to_string())));
                let bare = longest_read(&device, || {
                    let id = DevId::Name(DmName::new(name.as_str())?);
                    let suspend = DmOptions::default().set_flags(DmFlags::DM_SUSPEND);
                    mapper.device_suspend(&id, suspend)?;
                    mapper.device_suspend(&id, DmOptions::default())?;
                    Ok(())
                });
                let ours = longest_read(&device, || self.freeze(&snapshot).map(drop));
                stop.store(true, Ordering::Relaxed);
                let loaded = load.map(|load| load.join().unwrap_or_else(|_| Err("a panic".into())));
                loaded.transpose()?;
                // The first round warms up.
                if round > 0 {
                    pair.theirs.push(bare?);
                    pair.ours.push(ours?);
                }
                Ok(())
            })?;
            self.forget(snapshot)?;
        }
        Ok(pair)
    }

    /// A fork beside a create over the image.
    fn made(&self, rounds: usize) -> Result<Pair> {
        let (snapshot, _) = self.create(&self.image)?;
        write(snapshot.device(), 0..16)?;
        let layer = self.freeze(&snapshot)?;
        let mut pair = Pair::default();
        for round in 0..=rounds {
            let (plain, theirs, fork, ours);
            if round % 2 == 0 {
                (plain, theirs) = self.create(&self.image)?;
                (fork, ours) = self.create(layer.origin())?;
            } else {
                (fork, ours) = self.create(layer.origin())?;
                (plain, theirs) = self.create(&self.image)?;
            }
            if round > 0 {
                pair.theirs.push(theirs);
                pair.ours.push(ours);
            }
            plain.cleanup()?;
            fork.cleanup()?;
        }
        drop(layer);
        self.forget(snapshot)?;
        Ok(pair)
    }

    /// A claim from a pool over a layer beside one over the image.
    fn claimed(&self, rounds: usize) -> Result<Pair> {
        let (snapshot, _) = self.create(&self.image)?;
        write(snapshot.device(), 0..16)?;
        let layer = self.freeze(&snapshot)?;
        let mut pair = Pair::default();
        let mut options = PoolOptions::new();
        options.size(2);
        let pools =
            [&self.image, layer.origin()].map(|origin| options.open(origin, self.dir.path()));
        let [theirs, ours] = pools;
        let (theirs, ours) = (theirs?, ours?);
        for round in 0..=rounds {
            let mut turns = [(&theirs, &mut pair.theirs), (&ours, &mut pair.ours)];
            if round % 2 == 1 {
                turns.reverse();
            }
            for (pool, samples) in turns {
                // Neither's threads are at work.
                for each in [&theirs, &ours] {
                    each.wait_recycled(Duration::from_secs(60));
                    if !each.wait_ready(2, Duration::from_secs(60)) {
                        return Err(format!("not ready: {:?}", each.status()).into());
                    }
                }
                let (name, _) = self.fresh();
                let begin = Instant::now();
                let claimed = pool.claim(&name)?;
                if round > 0 {
                    samples.push(begin.elapsed());
                }
                pool.release(claimed.snapshot.handles(), CowFate::Delete)?;
            }
        }
        theirs.drain()?;
        ours.drain()?;
        drop(layer);
        self.forget(snapshot)?;
        Ok(pair)
    }

    /// How long a random read of the image takes through so many layers.
    fn reads(&self, rounds: usize) -> Result<Vec<Vec<Duration>>> {
        let mut took = vec![Vec::new(); DEPTHS.len()];
        for round in 0..=rounds {
            let (snapshot, _) = self.create(&self.image)?;
            let mut depth = 0;
            for (samples, wanted) in took.iter_mut().zip(DEPTHS) {
                while depth < wanted {
                    write(snapshot.device(), (0..8).map(|nth| nth * 16 + depth as u64))?;
                    self.freeze(&snapshot)?;
                    depth += 1;
                }
                let each = read(snapshot.device())?;
                if round > 0 {
                    samples.push(each);
                }
            }
            self.forget(snapshot)?;
        }
        Ok(took)
    }

    /// Kernel memory of a layer, of a fork, and of a snapshot over the image.
    fn memory(&self) -> Result<[f64; 3]> {
        let (snapshot, _) = self.create(&self.image)?;
        let before = kernel_bytes()?;
        for _ in 0..16 {
            self.freeze(&snapshot)?;
        }
        let layer = (kernel_bytes()? - before) / 16.0;
        let top = self.freeze(&snapshot)?;
        let each = |origin: &Origin| -> Result<f64> {
            let before = kernel_bytes()?;
            let made: Result<Vec<_>> = (0..FORKS).map(|_| self.create(origin)).collect();
            let made = made?;
            let each = (kernel_bytes()? - before) / f64::from(FORKS);
            for (snapshot, _) in made {
                snapshot.cleanup()?;
            }
            Ok(each)
        };
        let (fork, plain) = (each(top.origin())?, each(&self.image)?);
        drop(top);
        self.forget(snapshot)?;
        Ok([layer, fork, plain])
    }
}

fn direct(device: &Path, writable: bool) -> Result<File> {
    let mut options = File::options();
    let options = options.read(true).write(writable);
    Ok(options.custom_flags(libc::O_DIRECT).open(device)?)
}

/// A block of memory that direct I/O takes.
fn block<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut memory = vec![0xa5; 2 * BLOCK];
    let at = memory.as_ptr().align_offset(BLOCK);
    work(&mut memory[at..at + BLOCK])
}

fn write(device: &Path, blocks: impl Iterator<Item = u64>) -> Result<()> {
    let device = direct(device, true)?;
    block(|block| {
        for nth in blocks {
            device.write_all_at(block, nth * BLOCK as u64)?;
        }
        Ok(())
    })
}

/// Blocks all over the device, the same ones each time.
fn places() -> impl Iterator<Item = u64> {
    // A step that is odd and near the golden section visits a power of two of blocks evenly.
    (1..).map(|nth: u64| (nth.wrapping_mul(10_126) % BLOCKS) | 1)
}

/// Writes at full speed until it is told to stop.
fn load(device: &Path, stop: &AtomicBool) -> Result<()> {
    let go_on = |_: &u64| !stop.load(Ordering::Relaxed);
    write(device, places().take_while(go_on))
}

/// The mean of some random reads past the page cache.
fn read(device: &Path) -> Result<Duration> {
    let device = direct(device, false)?;
    block(|block| {
        let begin = Instant::now();
        for nth in places().take(usize::try_from(READS)?) {
            device.read_exact_at(block, nth * BLOCK as u64)?;
        }
        Ok(begin.elapsed() / u32::try_from(READS)?)
    })
}

/// How long the longest read took of one who reads block after block while `work` is done: the pause as a guest sees it.
fn longest_read(device: &Path, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let file = direct(device, false)?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            block(|block| -> std::io::Result<Duration> {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    file.read_exact_at(block, 0)?;
                    // Those before the work are to warm up.
                    if count.fetch_add(1, Ordering::Relaxed) > 4 {
                        longest = longest.max(begin.elapsed());
                    }
                }
                Ok(longest)
            })
        });
        while count.load(Ordering::Relaxed) < 8 && !reader.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let longest = reader.join().map_err(|_| "the reader panicked")?;
        worked?;
        Ok(longest?)
    })
}

/// What is in use and is neither a file's page nor a device's: of the bench itself next to nothing changes. What the
/// kernel frees late, and keeps for later, is let go first.
fn kernel_bytes() -> Result<f64> {
    thread::sleep(Duration::from_millis(500));
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let words = line.and_then(|line| line.split_whitespace().next());
        Ok(words.ok_or(format!("no {name}"))?.parse()?)
    };
    let used = kib("MemTotal:")? - kib("MemFree:")? - kib("Cached:")? - kib("Buffers:")?;
    Ok(used * 1024.0)
}

struct Report {
    here: Here,
    idle: Pair,
    busy: Pair,
    made: Pair,
    claimed: Pair,
    reads: Vec<Vec<Duration>>,
    memory: [f64; 3],
}

impl Report {
    fn markdown(&self) -> String {
        let udev = if self.here.udev {
            "udevd running"
        } else {
            "no udevd"
        };
        let rounds = self.idle.ours.len();
        let mut text = format!(
            "### Linux {}, {udev}\n\n{}. {}\n\n",
            self.here.kernel,
            self.here.cpu,
            self.here.label()
        );
        text.push_str(&format!(
            "An image of 64 MiB and worst-case COW files on tmpfs, `P 8`, {rounds} rounds in turns. A pause is the longest \
             of the reads of one who reads 4 KiB after 4 KiB past the page cache: suspend and resume alone, and a \
             checkpoint, of the same device; under load beside one who writes at full speed.\n\n"
        ));
        text.push_str("| | without, ms | with, ms | ratio | promised | |\n");
        text.push_str("| --- | ---: | ---: | ---: | ---: | --- |\n");
        let (idle, busy) = ("pause of a checkpoint", "the same under load");
        for (pair, what) in [(&self.idle, idle), (&self.busy, busy)] {
            text.push_str(&pair.row(what, 50, 2.0));
            text.push_str(&pair.row(what, 99, 2.0));
        }
        let fork = "a fork, of a create on a shared origin";
        text.push_str(&self.made.row(fork, 50, 1.05));
        let claim = "a claim over a layer, of one over an image";
        text.push_str(&self.claimed.row(claim, 50, 1.05));

        text.push_str(
            "\nRandom reads of 4 KiB that no layer has, past the page cache:\n\n| layers |",
        );
        for depth in DEPTHS {
            text.push_str(&format!(" {depth} |"));
        }
        text.push_str("\n| --- |");
        text.push_str(&" ---: |".repeat(DEPTHS.len()));
        let times: Vec<_> = self.reads.iter().map(|each| percentile(each, 50)).collect();
        text.push_str("\n| time x |");
        for time in &times {
            text.push_str(&format!(" {:.2} |", time / times[0]));
        }
        let [layer, fork, plain] = self.memory.map(|bytes| bytes / 1024.0);
        text.push_str(&format!(
            "\n\nKernel memory, of one sample each, which differ by hundreds of KiB from run to run: {layer:.0} KiB for a layer, {fork:.0} KiB for a fork, {plain:.0} KiB for a snapshot over \
             the image.\n"
        ));
        text
    }

    /// All of it, every sample included. The keys are stable; new ones may be added.
    fn json(&self) -> serde_json::Value {
        let micros = |samples: &Vec<Duration>| -> Vec<f64> {
            let micros = |sample: &Duration| sample.as_secs_f64() * 1e6;
            samples.iter().map(micros).collect()
        };
        let reads = DEPTHS.iter().zip(&self.reads);
        let reads: Vec<_> = reads
            .map(|(depth, samples)| json!({ "layers": depth, "read_us": micros(samples) }))
            .collect();
        let [layer, fork, plain] = self.memory;
        json!({
            "kernel": self.here.kernel,
            "cpu": self.here.cpu,
            "emulated": self.here.is_emulated(),
            "pause_idle": self.idle.json(),
            "pause_busy": self.busy.json(),
            "fork": self.made.json(),
            "claim": self.claimed.json(),
            "reads": reads,
            "memory_bytes": { "layer": layer, "fork": fork, "snapshot": plain },
        })
    }
}
