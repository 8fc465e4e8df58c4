//! How long an export takes, beside `cp --sparse=always` of its result on the same file system.
//!
//! `cargo bench --bench export -- DIRECTORY [GIBIBYTES [ROUNDS [KIBIBYTES]]]`. In the directory it makes an origin of
//! so many GiB (4), three quarters of them data, and a COW file with 200 MiB of changes in chunks of 4 KiB, as a kernel
//! would write it: so many KiB (64) in a row, at random places. Rounds (5) are interleaved: an export with the origin
//! shared where the file system can, one without, and the copy. Each begins with both inputs in the page cache and
//! nothing dirty, and each time includes the fsync: cp does none, so `sync FILE` follows it.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dmsnap::export::ExportOptions;

const CHUNK: u64 = 4096;
const PER_AREA: u64 = CHUNK / 16;
const CHANGED: u64 = (200 << 20) / CHUNK;

fn main() {
    // `cargo test --all-targets` runs benches too, without arguments and not to measure.
    let mut arguments = std::env::args().skip(1).filter(|word| word != "--bench");
    let Some(dir) = arguments.next().map(PathBuf::from) else {
        say("export: nothing is measured without a directory");
        return;
    };
    let mut number = |default: u64| match arguments.next() {
        Some(text) => text.parse().expect("a number"),
        None => default,
    };
    let (bytes, rounds) = (number(4) << 30, number(5));
    let in_a_row = (number(64) << 10).div_ceil(CHUNK);
    fs::create_dir_all(&dir).expect("a directory");
    let path = |name: &str| dir.join(name);
    let (origin, cow) = (path("origin.img"), path("cow"));
    make_origin(&origin, bytes);
    make_cow(&cow, bytes / CHUNK, in_a_row);
    let (shared, whole, copy) = (path("shared.img"), path("whole.img"), path("copy.img"));
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..rounds {
        let export = |reflink: bool, to: &Path| {
            let mut options = ExportOptions::new();
            let done = options.reflink(reflink).export(&origin, &cow, to);
            done.expect("an export");
        };
        times[0].push(timed(&[&origin, &cow], &shared, || export(true, &shared)));
        times[1].push(timed(&[&origin, &cow], &whole, || export(false, &whole)));
        times[2].push(timed(&[&whole], &copy, || {
            run(
                "cp",
                &["--sparse=always", "--reflink=never"],
                &[&whole, &copy],
            );
            run("sync", &[], &[&copy]);
        }));
        run("cmp", &[], &[&shared, &copy]);
        for made in [&shared, &whole, &copy] {
            fs::remove_file(made).expect("it was made");
        }
    }
    let medians = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    });
    for (what, median) in ["export", "export --no-reflink", "cp --sparse=always + sync"]
        .iter()
        .zip(medians)
    {
        let ratio = median / medians[2];
        say(&format!("{what:28} {median:7.3} s   {ratio:.2} of cp"));
    }
}

/// With both inputs read once and everything else on disk.
fn timed(inputs: &[&Path], output: &Path, work: impl FnOnce()) -> Duration {
    for input in inputs {
        let mut file = File::open(input).expect("an input");
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer).expect("readable") > 0 {}
    }
    run("sync", &[], &[]);
    let start = Instant::now();
    work();
    let took = start.elapsed();
    assert!(output.exists());
    took
}

/// Data and holes in turn, 3 MiB and 1 MiB.
fn make_origin(path: &Path, bytes: u64) {
    let file = File::create(path).expect("a new file");
    file.set_len(bytes).expect("room");
    let mut numbers = Numbers(1);
    let mut piece = vec![0u8; 3 << 20];
    for at in (0..bytes).step_by(4 << 20) {
        piece
            .chunks_exact_mut(8)
            .for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
        file.write_all_at(&piece, at).expect("room");
    }
    file.sync_all().expect("synced");
}

/// The store that a kernel would have written, exception by exception.
fn make_cow(path: &Path, origin_chunks: u64, in_a_row: u64) {
    let mut file = BufWriter::new(File::create(path).expect("a new file"));
    let mut chunk = |bytes: &[u8]| file.write_all(bytes).expect("room");
    let mut header = [0; 4096];
    header[..16].copy_from_slice(b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0");
    chunk(&header);
    let mut numbers = Numbers(2);
    // A congruential generator of full period comes to every number below the modulus once.
    let places = origin_chunks / in_a_row;
    let modulus = places.next_power_of_two();
    let (mut place, mut within) = (0u64, in_a_row);
    let mut another = || {
        if within == in_a_row {
            within = 0;
            loop {
                place = place.wrapping_mul(FACTOR).wrapping_add(SUMMAND) % modulus;
                if place < places {
                    break;
                }
            }
        }
        within += 1;
        place * in_a_row + within - 1
    };
    for area in 0..=CHANGED / PER_AREA {
        let count = PER_AREA.min(CHANGED - area * PER_AREA);
        let mut metadata = [0; 4096];
        for nth in 0..count {
            let at = usize::try_from(nth * 16).expect("below 4096");
            let cow = 1 + area * (PER_AREA + 1) + 1 + nth;
            metadata[at..at + 8].copy_from_slice(&another().to_le_bytes());
            metadata[at + 8..at + 16].copy_from_slice(&cow.to_le_bytes());
        }
        chunk(&metadata);
        for _ in 0..count {
            let mut data = [0; 4096];
            data.chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
            chunk(&data);
        }
    }
    let file = file.into_inner().expect("room");
    file.sync_all().expect("synced");
}

const FACTOR: u64 = 6_364_136_223_846_793_005;
const SUMMAND: u64 = 1_442_695_040_888_963_407;

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(FACTOR).wrapping_add(SUMMAND);
        self.0 ^ self.0 >> 29
    }
}

fn run(program: &str, options: &[&str], files: &[&Path]) {
    let status = Command::new(program).args(options).args(files).status();
    assert!(status.expect(program).success(), "{program}");
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("stdout");
}
