//! Create and remove, beside every other way to do the same, in one run.
//!
//! Needs root and device-mapper, and makes real devices: `./tests/vm/run bench` runs it in a guest. The table of
//! record comes from an interleaved sampler, because the figures of a guest drift within a minute by more than the
//! contestants differ; a full run adds criterion's confidence intervals. With `$DMSNAP_OUT` set, lifecycle.md,
//! lifecycle.json and criterion's files go there.

#![allow(missing_docs, reason = "a bench has no API")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints its results"
)]

mod contestants;
mod figures;

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};
use dmsnap::SnapshotOptions;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use contestants::{Contestant, Job, Result};
use figures::origin::Origin;
use figures::{Scenario, Series};

const IMAGE_BYTES: u64 = 64 << 20;
const COW_BYTES: u64 = 256 << 20;
const PREFIX: &str = "dmsnap-bench";

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        // `cargo test --benches` comes here: no place to make devices.
        println!("lifecycle: nothing to do without --bench");
        return ExitCode::SUCCESS;
    }
    match run(args.iter().any(|arg| arg == "--quick")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifecycle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(quick: bool) -> Result<()> {
    let out = env::var_os("DMSNAP_OUT").map(PathBuf::from);
    let place = Place::new()?;
    let mut contestants = contestants::all()?;
    let rounds = if quick { 20 } else { 100 };
    let alone = contest(&place, &mut contestants, "The only snapshot", rounds)?;
    let other = place.fresh("neighbour")?;
    let neighbour = SnapshotOptions::new().create(&place.image, &other.cow, &other.name)?;
    let beside = contest(&place, &mut contestants, "Beside another snapshot", rounds);
    neighbour.cleanup()?;
    let scenarios = [alone, beside?];

    let origin = Origin::here();
    let markdown = figures::markdown(&origin, &scenarios);
    print!("{markdown}");
    if let Some(out) = &out {
        fs::write(out.join("lifecycle.md"), &markdown)?;
        let json = serde_json::to_string_pretty(&figures::json(&origin, &scenarios))?;
        fs::write(out.join("lifecycle.json"), json + "\n")?;
    }
    if !quick {
        confidence(&place, &mut contestants, out.as_deref());
    }
    place.check_empty()
}

/// Every contestant in every round, in an order in which each follows each other equally often, so that neither drift
/// nor what the one before leaves behind (deferred frees, warm slabs) favours anybody.
fn contest(
    place: &Place,
    contestants: &mut [Box<dyn Contestant>],
    name: &'static str,
    rounds: usize,
) -> Result<Scenario> {
    const WARM_UP: usize = 2;
    let mut series: Vec<_> = contestants
        .iter()
        .map(|each| Series::new(each.name()))
        .collect();
    for round in 0..WARM_UP + rounds {
        for nth in order(round, contestants.len()) {
            let (create, remove) = place.measure(contestants[nth].as_mut())?;
            if round >= WARM_UP {
                series[nth].create.push(create);
                series[nth].remove.push(remove);
            }
        }
    }
    Ok(Scenario { name, series })
}

/// Rows of a Williams square: 0 1 3 2, 1 2 0 3, 2 3 1 0, 3 0 2 1 for four.
fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        let step = match turn % 2 {
            0 => count - turn / 2,
            _ => turn.div_ceil(2),
        };
        (round + step) % count
    })
}

/// Criterion's view of the round trip, one contestant after the other.
fn confidence(place: &Place, contestants: &mut [Box<dyn Contestant>], out: Option<&Path>) {
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    if let Some(out) = out {
        criterion = criterion.output_directory(&out.join("criterion"));
    }
    let mut group = criterion.benchmark_group("round trip");
    group.sampling_mode(SamplingMode::Flat);
    for contestant in contestants {
        group.bench_function(contestant.name(), |bencher| {
            bencher.iter_custom(|iterations| {
                let round_trip = |_| {
                    let (create, remove) =
                        place.measure(contestant.as_mut()).expect("a round trip");
                    create + remove
                };
                (0..iterations).map(round_trip).sum()
            });
        });
    }
    group.finish();
}

/// A directory on tmpfs with the image in it.
struct Place {
    dir: tempfile::TempDir,
    image: PathBuf,
}

/// What one snapshot is made from; its COW file goes with it.
struct Fresh<'a> {
    image: &'a Path,
    cow: PathBuf,
    name: String,
}

impl Fresh<'_> {
    fn job(&self) -> Job<'_> {
        Job {
            image: self.image,
            cow: &self.cow,
            name: &self.name,
        }
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        // What cannot be unlinked goes with the directory.
        let _ = fs::remove_file(&self.cow);
    }
}

impl Place {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in("/dev/shm")?;
        if statfs(dir.path())?.filesystem_type() != TMPFS_MAGIC {
            return Err("/dev/shm is no tmpfs".into());
        }
        let image = dir.path().join("image");
        File::create_new(&image)?.set_len(IMAGE_BYTES)?;
        Ok(Self { dir, image })
    }

    fn fresh(&self, what: &str) -> Result<Fresh<'_>> {
        let name = format!("{PREFIX}-{}-{what}", std::process::id());
        let cow = self.dir.path().join(&name);
        File::create_new(&cow)?.set_len(COW_BYTES)?;
        let image = &self.image;
        Ok(Fresh { image, cow, name })
    }

    /// How long a create and its remove took. Whether they did what they said is looked at off the clock.
    fn measure(&self, contestant: &mut dyn Contestant) -> Result<(Duration, Duration)> {
        let fresh = self.fresh("turn")?;
        let begin = Instant::now();
        contestant.create(fresh.job())?;
        let create = begin.elapsed();
        let sectors = dm_devices(&fresh.name)?;
        if sectors != [(IMAGE_BYTES / 512).to_string()] {
            return Err(format!("{}: made {sectors:?}", contestant.name()).into());
        }
        let begin = Instant::now();
        contestant.remove(fresh.job())?;
        let remove = begin.elapsed();
        self.settle(&fresh)
            .map_err(|error| format!("{}: {error}", contestant.name()))?;
        Ok((create, remove))
    }

    /// A probing udev may hold a loop device for a moment after it was detached.
    fn settle(&self, fresh: &Fresh<'_>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let left = (dm_devices(&fresh.name)?, loops_over(&fresh.cow)?);
            match left {
                (devices, 0) if devices.is_empty() => return Ok(()),
                left if Instant::now() > deadline => {
                    return Err(format!("left {left:?} behind").into());
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn check_empty(&self) -> Result<()> {
        let left = (dm_devices(PREFIX)?.len(), loops_over(self.dir.path())?);
        match left {
            (0, 0) => Ok(()),
            (devices, loops) => Err(format!("left {devices} dm and {loops} loop devices").into()),
        }
    }
}

/// The sizes, as sysfs prints them, of the live dm devices whose names begin so.
fn dm_devices(prefix: &str) -> Result<Vec<String>> {
    let read = |path: PathBuf| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let mut sizes = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        // A device may go away between the listing and the reading.
        if read(path.join("dm/name")).is_ok_and(|name| name.starts_with(prefix)) {
            sizes.extend(read(path.join("size")));
        }
    }
    Ok(sizes)
}

/// How many loop devices have a backing file whose path begins so.
fn loops_over(path: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/sys/block")? {
        let backing = fs::read_to_string(entry?.path().join("loop/backing_file"));
        count += usize::from(backing.is_ok_and(|file| Path::new(file.trim()).starts_with(path)));
    }
    Ok(count)
}
