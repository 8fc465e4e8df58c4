//! What a snapshot's chunk size costs: kernel memory, creation, room and time for writes.
//!
//! Needs root and device-mapper, and makes real devices: `./tests/vm/run bench --only chunk_size` runs it in a guest.
//! With `$DMSNAP_OUT` set, chunk_size.md and chunk_size.json go there.

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
use std::time::{Duration, Instant};

use dmsnap::dm::SnapshotStatus;
use dmsnap::{ChunkSize, Snapshot, SnapshotOptions};
use origin::Origin;
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CHUNKS: [u64; 7] = [8, 16, 32, 64, 128, 256, 2048];
/// Sparse, and so large that random writes seldom meet in one chunk.
const IMAGE_BYTES: u64 = 4 << 30;
const RANDOM_WRITES: u64 = 128;
const RANDOM_BYTES: usize = 4096;
const SEQUENTIAL_WRITES: u64 = 32;
const SEQUENTIAL_BYTES: usize = 1 << 20;
/// Live at the same time while memory is measured: what else comes and goes is a few MiB.
const SNAPSHOTS: u64 = 32;

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        // `cargo test --benches` comes here: no place to make devices.
        println!("chunk_size: nothing to do without --bench");
        return ExitCode::SUCCESS;
    }
    match run(args.iter().any(|arg| arg == "--quick")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chunk_size: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(quick: bool) -> Result<()> {
    let rounds = if quick { 1 } else { 5 };
    let place = Place::new()?;
    let mut rows: Vec<Row> = CHUNKS.iter().map(|sectors| Row::new(*sectors)).collect();
    // The first round warms up. Sizes take turns, so that drift favours none.
    for round in 0..=rounds {
        for row in &mut rows {
            let sample = place.measure(row.sectors)?;
            if round > 0 {
                row.samples.push(sample);
            }
        }
    }
    let origin = Origin::here();
    let markdown = markdown(&origin, &rows);
    print!("{markdown}");
    if let Some(out) = env::var_os("DMSNAP_OUT").map(PathBuf::from) {
        fs::write(out.join("chunk_size.md"), &markdown)?;
        let json = serde_json::to_string_pretty(&json(&origin, &rows))?;
        fs::write(out.join("chunk_size.json"), json + "\n")?;
    }
    Ok(())
}

/// One round's figures for one chunk size.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Of kernel memory for each live snapshot, over COW files of 64 MiB and of 1 GiB.
    memory_bytes: [f64; 2],
    create: Duration,
    /// Bytes of the COW file taken, of random and of sequential writes.
    taken_bytes: [f64; 2],
    /// How long these writes took.
    took: [Duration; 2],
}

#[derive(Clone, Debug)]
struct Row {
    sectors: u64,
    samples: Vec<Sample>,
}

impl Row {
    fn new(sectors: u64) -> Self {
        let samples = Vec::new();
        Self { sectors, samples }
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        let mut values: Vec<f64> = self.samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    }

    fn create(&self) -> f64 {
        self.median(|sample| sample.create.as_secs_f64())
    }

    fn memory(&self, which: usize) -> f64 {
        self.median(|sample| sample.memory_bytes[which])
    }

    fn took(&self, which: usize) -> f64 {
        self.median(|sample| sample.took[which].as_secs_f64())
    }

    /// Bytes of the COW file for each byte written.
    fn amplification(&self, which: usize) -> f64 {
        self.median(|sample| sample.taken_bytes[which]) / WRITTEN[which]
    }
}

const WRITTEN: [f64; 2] = [
    RANDOM_WRITES as f64 * RANDOM_BYTES as f64,
    SEQUENTIAL_WRITES as f64 * SEQUENTIAL_BYTES as f64,
];

/// A directory on tmpfs with the image in it.
struct Place {
    dir: tempfile::TempDir,
    image: PathBuf,
}

impl Place {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("dmsnap-bench")
            .tempdir_in("/dev/shm")?;
        let image = dir.path().join("image");
        File::create_new(&image)?.set_len(IMAGE_BYTES)?;
        Ok(Self { dir, image })
    }

    fn cow(&self, nth: u64, bytes: u64) -> Result<PathBuf> {
        let cow = self.dir.path().join(format!("cow-{nth}"));
        File::create_new(&cow)?.set_len(bytes)?;
        Ok(cow)
    }

    fn create(&self, sectors: u64, cow: &Path, nth: u64) -> Result<Snapshot> {
        let name = format!("dmsnap-bench-{}-{nth}", std::process::id());
        let mut options = SnapshotOptions::new();
        options.chunk_size(ChunkSize::new(sectors)?);
        Ok(options.create(&self.image, cow, &name)?)
    }

    fn measure(&self, sectors: u64) -> Result<Sample> {
        let mut sample = Sample {
            memory_bytes: [0.0; 2],
            create: Duration::ZERO,
            taken_bytes: [0.0; 2],
            took: [Duration::ZERO; 2],
        };
        for (which, bytes) in [64 << 20, 1 << 30].into_iter().enumerate() {
            let mut files = Vec::new();
            for nth in 0..SNAPSHOTS {
                files.push(self.cow(nth, bytes)?);
            }
            let before = kernel_bytes()?;
            let begin = Instant::now();
            let mut live = Vec::new();
            for (nth, cow) in (0..).zip(&files) {
                live.push(self.create(sectors, cow, nth)?);
            }
            sample.create = begin.elapsed() / u32::try_from(live.len())?;
            sample.memory_bytes[which] = (kernel_bytes()? - before) / live.len() as f64;
            for snapshot in live {
                snapshot.cleanup()?;
            }
            for cow in files {
                fs::remove_file(cow)?;
            }
        }
        for (which, taken) in sample.taken_bytes.iter_mut().enumerate() {
            let cow = self.cow(0, 1 << 30)?;
            let snapshot = self.create(sectors, &cow, 0)?;
            let fresh = taken_bytes(&snapshot)?;
            sample.took[which] = match which {
                0 => write(snapshot.device(), RANDOM_BYTES, places())?,
                _ => write(snapshot.device(), SEQUENTIAL_BYTES, 0..SEQUENTIAL_WRITES)?,
            };
            *taken = taken_bytes(&snapshot)? - fresh;
            snapshot.cleanup()?;
            fs::remove_file(cow)?;
        }
        Ok(sample)
    }
}

/// Blocks of [`RANDOM_BYTES`] all over the image, the same ones each time.
fn places() -> impl Iterator<Item = u64> {
    let blocks = IMAGE_BYTES / RANDOM_BYTES as u64;
    // A step that is odd and near the golden section visits a power of two of blocks evenly.
    let step = 648_055;
    (1..=RANDOM_WRITES).map(move |nth| nth * step % blocks)
}

/// One after the other past the page cache, as a VMM with `O_DIRECT` hands on a guest that syncs.
fn write(device: &Path, length: usize, places: impl Iterator<Item = u64>) -> Result<Duration> {
    const ALIGNMENT: usize = 4096;
    let mut options = File::options();
    let device = options
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let buffer = vec![0xa5; length + ALIGNMENT];
    let aligned = buffer.as_ptr().align_offset(ALIGNMENT);
    let begin = Instant::now();
    for place in places {
        device.write_all_at(&buffer[aligned..aligned + length], place * length as u64)?;
    }
    device.sync_all()?;
    Ok(begin.elapsed())
}

fn taken_bytes(snapshot: &Snapshot) -> Result<f64> {
    let name = snapshot.handles().name.as_ref().ok_or("it has a name")?;
    match dmsnap::status(name)?.status {
        Some(SnapshotStatus::Usage(usage)) => Ok(usage.allocated.count() as f64 * 512.0),
        other => Err(format!("status {other:?}").into()),
    }
}

/// What is in use and is neither a file's page nor a device's: of the bench itself next to nothing changes. What the
/// kernel frees late, and keeps for later, is let go first.
fn kernel_bytes() -> Result<f64> {
    std::thread::sleep(Duration::from_millis(500));
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let words = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(words.ok_or(format!("no {name}"))?.parse()?)
    };
    let used = kib("MemTotal")? - kib("MemFree")? - kib("Cached")? - kib("Buffers")?;
    Ok(used * 1024.0)
}

fn markdown(origin: &Origin, rows: &[Row]) -> String {
    let udev = if origin.udev {
        "udevd running"
    } else {
        "no udevd"
    };
    let samples = rows.first().map_or(0, |row| row.samples.len());
    let mut text = format!(
        "# Chunk size\n\nLinux {}, {}, {udev}. {} Medians of {samples} rounds.\n\n",
        origin.kernel,
        origin.cpu,
        origin.label()
    );
    text.push_str(
        "Store `P`, sparse image of 4 GiB and COW files on tmpfs. Memory is the kernel's for each live snapshot. x is the \
         time over that of chunks of 8. COW bytes are those taken for each byte written: at random in blocks of 4 KiB, \
         in sequence by 1 MiB, both with O_DIRECT.\n\n",
    );
    text.push_str("| sectors | chunk | memory, COW 64 MiB | COW 1 GiB | create x | random: COW bytes | time x | sequential: COW bytes | time x |\n");
    text.push_str("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    let Some(first) = rows.first() else {
        return text;
    };
    for row in rows {
        text.push_str(&format!(
            "| {} | {} KiB | {:.0} KiB | {:.0} KiB | {:.2} | {:.1} | {:.2} | {:.2} | {:.2} |\n",
            row.sectors,
            row.sectors / 2,
            row.memory(0) / 1024.0,
            row.memory(1) / 1024.0,
            row.create() / first.create(),
            row.amplification(0),
            row.took(0) / first.took(0),
            row.amplification(1),
            row.took(1) / first.took(1),
        ));
    }
    text
}

/// All of it, every sample included. The keys are stable; new ones may be added.
fn json(origin: &Origin, rows: &[Row]) -> serde_json::Value {
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let samples: Vec<_> = row
                .samples
                .iter()
                .map(|sample| {
                    json!({
                        "memory_bytes": sample.memory_bytes,
                        "create_us": micros(sample.create),
                        "cow_bytes": sample.taken_bytes,
                        "writes_us": sample.took.map(micros),
                    })
                })
                .collect();
            json!({ "chunk_sectors": row.sectors, "samples": samples })
        })
        .collect();
    json!({
        "kernel": origin.kernel,
        "cpu": origin.cpu,
        "emulated": origin.is_emulated(),
        "written_bytes": WRITTEN,
        "chunk_sizes": rows,
    })
}
