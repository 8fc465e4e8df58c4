//! The main job as a control plane does it: one process, which links the library, gives three VMs their disks, claims from
//! a pool, freezes a disk and forks it, dies and cleans up after itself; beside the same by losetup, blockdev and dmsetup.
//!
//! Needs root, device-mapper and those tools. `tests/vm/run demo` runs it in a virtual machine.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "it is here to be looked at"
)]

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dmsnap::pool::CowFate;
use dmsnap::snapshot::CheckpointOptions;
use dmsnap::{CowSize, Origin, PoolOptions, ReapOptions, Snapshot, SnapshotOptions};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// How many VMs there are.
const VMS: usize = 3;

const IMAGE_BYTES: u64 = 16 << 20;

/// Where each VM writes something of its own.
const OWN_AT: u64 = 8 << 20;

/// Makes a process the control plane that dies, and says in which directory.
const CRASH: &str = "DMSNAP_DEMO_CRASH";

pub(crate) fn main() -> Result<()> {
    if let Some(dir) = std::env::var_os(CRASH) {
        return crash(Path::new(&dir));
    }
    let (devices, loops) = (tool("dmsetup", &["ls"])?, tool("losetup", &["--all"])?);
    let dir = std::env::current_dir()?.join("demo.files");
    fs::create_dir_all(&dir)?;
    let image = dir.join("base.ext4");
    make_image(&image)?;
    let before = fs::read(&image)?;

    let mut times = Times::default();
    // Once without the clock: the first use of anything costs extra.
    by_library(&image, &dir, &mut Times::default())?;
    by_tools(&image, &dir, &mut Times::default())?;
    by_library(&image, &dir, &mut times)?;
    by_tools(&image, &dir, &mut times)?;
    pool(&image, &dir, &mut times)?;
    fork(&image, &dir, &mut times)?;
    after_a_crash(&dir, &mut times)?;

    assert!(fs::read(&image)? == before, "the image has changed");
    assert_eq!(tool("dmsetup", &["ls"])?, devices);
    assert_eq!(tool("losetup", &["--all"])?, loops);
    times.print();
    println!("\nThe image is as it was, and no dm device, loop device or link is left.");
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Three disks over one image that is attached once; each VM sees the image and its own writes.
fn by_library(image: &Path, dir: &Path, times: &mut Times) -> Result<()> {
    let origin = Origin::open(image)?;
    let mut disks = Vec::new();
    for nth in 0..VMS {
        let cow = fresh(dir, "cow", nth)?;
        let mut options = SnapshotOptions::new();
        options.make_cow(CowSize::WorstCase);
        let name = format!("demo-{nth}");
        let made = times.of("create", || options.create_on(&origin, &cow, &name));
        disks.push(made?);
    }
    write_own(&disks.iter().map(Snapshot::device).collect::<Vec<_>>())?;
    for disk in disks {
        times.of("cleanup", || disk.cleanup())?;
    }
    Ok(())
}

/// The same by other programs, each of which is started for it.
fn by_tools(image: &Path, dir: &Path, times: &mut Times) -> Result<()> {
    let mut disks = Vec::new();
    for nth in 0..VMS {
        let (cow, name) = (fresh(dir, "cow", nth)?, format!("demo-{nth}"));
        let made = times.of("create, by the tools", || -> Result<_> {
            File::create(&cow)?.set_len(IMAGE_BYTES + (8 << 20))?;
            let attach =
                |how: &[&str]| Ok::<_, Box<dyn Error>>(tool("losetup", how)?.trim().to_owned());
            let origin = attach(&["--find", "--show", "--read-only", text(image)])?;
            let cow = attach(&["--find", "--show", text(&cow)])?;
            let sectors = tool("blockdev", &["--getsz", &origin])?;
            let table = format!("0 {} snapshot {origin} {cow} P 8", sectors.trim());
            tool("dmsetup", &["create", &name, "--table", &table])?;
            Ok((name, origin, cow))
        });
        disks.push(made?);
    }
    let devices: Vec<_> = disks
        .iter()
        .map(|(name, ..)| Path::new("/dev/mapper").join(name))
        .collect();
    write_own(&devices.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    for (name, origin, cow) in disks {
        times.of("cleanup, by the tools", || -> Result<_> {
            tool("dmsetup", &["remove", &name])?;
            tool("losetup", &["--detach", &cow])?;
            tool("losetup", &["--detach", &origin])
        })?;
    }
    Ok(())
}

/// Disks that were made before they are needed.
fn pool(image: &Path, dir: &Path, times: &mut Times) -> Result<()> {
    let origin = Origin::open(image)?;
    let pool = PoolOptions::new().size(VMS).open(&origin, dir)?;
    if !pool.wait_ready(VMS, Duration::from_secs(60)) {
        return Err(format!("the pool does not fill: {:?}", pool.status()).into());
    }
    let mut claims = Vec::new();
    for nth in 0..VMS {
        let name = format!("demo-claim-{nth}");
        claims.push(times.of("claim from a pool", || pool.claim(&name))?);
    }
    write_own(
        &claims
            .iter()
            .map(|each| each.snapshot.device())
            .collect::<Vec<_>>(),
    )?;
    for claim in claims {
        let handles = claim.snapshot.handles();
        times.of("release to it", || pool.release(handles, CowFate::Delete))?;
    }
    Ok(pool.drain()?)
}

/// A running disk is frozen, and another VM begins with what it had then.
fn fork(image: &Path, dir: &Path, times: &mut Times) -> Result<()> {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase);
    let disk = options.create(image, fresh(dir, "cow", 0)?, "demo-0")?;
    write_at(disk.device(), b"before")?;
    let mut freeze = CheckpointOptions::new();
    freeze.make_cow(CowSize::WorstCase);
    let cow = fresh(dir, "cow", 1)?;
    let layer = times.of("checkpoint", || {
        freeze.checkpoint(&disk, "demo-layer", &cow)
    })?;
    write_at(disk.device(), b"behind")?;
    let cow = fresh(dir, "cow", 2)?;
    let fork = times.of("fork", || {
        options.create_on(layer.origin(), &cow, "demo-fork")
    })?;
    assert_eq!(read_at(fork.device())?, *b"before");
    assert_eq!(read_at(disk.device())?, *b"behind");
    drop(layer);
    disk.cleanup()?;
    Ok(fork.cleanup()?)
}

/// A control plane makes its disks and is killed. The next one keeps the VM that it knows, and takes down the others.
fn after_a_crash(dir: &Path, times: &mut Times) -> Result<()> {
    let mut own = Command::new(std::env::current_exe()?);
    let died = own.args(std::env::args_os().skip(1)).env(CRASH, dir);
    let died = died.status()?;
    assert!(!died.success(), "it was to die");
    let keep = |name: &str| !name.starts_with("demo-") || name == "demo-crash-0";
    let reaped = times.of("reap after a crash", || {
        ReapOptions::new().reap(|found| keep(&found.name))
    })?;
    for item in reaped {
        println!("after the crash, {}: {:?}", item.name, item.fate?);
    }
    let handles = dmsnap::adopt("demo-crash-0")?;
    dmsnap::cleanup(&handles)?;
    Ok(())
}

/// The control plane that dies.
fn crash(dir: &Path) -> Result<()> {
    let image = &dir.join("base.ext4");
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase);
    for nth in 0..VMS {
        let name = format!("demo-crash-{nth}");
        let disk = options.create(image, fresh(dir, "cow", nth)?, &name)?;
        println!("{} is there, and its maker dies", disk.device().display());
    }
    std::process::abort()
}

/// An ext4 file system with something in it.
fn make_image(image: &Path) -> Result<()> {
    File::create(image)?.set_len(IMAGE_BYTES)?;
    tool("mke2fs", &["-q", "-F", "-t", "ext4", text(image)])?;
    Ok(())
}

/// The path of a COW file that is not there.
fn fresh(dir: &Path, what: &str, nth: usize) -> Result<PathBuf> {
    let path = dir.join(format!("{nth}.{what}"));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(path),
    }
}

/// Each VM writes something of its own; none of them sees another's.
fn write_own(devices: &[&Path]) -> Result<()> {
    for (nth, device) in devices.iter().enumerate() {
        write_at(device, format!("this{nth:2}").as_bytes())?;
    }
    for (nth, device) in devices.iter().enumerate() {
        assert_eq!(read_at(device)?, format!("this{nth:2}").as_bytes());
    }
    Ok(())
}

fn write_at(device: &Path, bytes: &[u8]) -> Result<()> {
    let disk = File::options().write(true).open(device)?;
    disk.write_all_at(bytes, OWN_AT)?;
    Ok(disk.sync_all()?)
}

fn read_at(device: &Path) -> Result<[u8; 6]> {
    let mut bytes = [0; 6];
    File::open(device)?.read_exact_at(&mut bytes, OWN_AT)?;
    Ok(bytes)
}

/// Runs a program; returns what it printed.
fn tool(name: &str, arguments: &[&str]) -> Result<String> {
    let done = Command::new(name).args(arguments).output()?;
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(format!("{name} {arguments:?}: {why}").into());
    }
    Ok(String::from_utf8(done.stdout)?)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How long each thing took, in the order in which they were first done.
#[derive(Default)]
struct Times(Vec<(&'static str, Vec<Duration>)>);

impl Times {
    fn of<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let done = work();
        let took = begin.elapsed();
        match self.0.iter_mut().find(|(known, _)| *known == what) {
            Some((_, all)) => all.push(took),
            None => self.0.push((what, vec![took])),
        }
        done
    }

    /// A line for each, with the mean and a bar.
    fn print(&self) {
        let mean = |all: &[Duration]| {
            let sum: Duration = all.iter().sum();
            1e3 * sum.as_secs_f64() / f64::from(u32::try_from(all.len()).unwrap())
        };
        let longest = self.0.iter().map(|(_, all)| mean(all)).fold(0.0, f64::max);
        println!("\nmilliseconds for one disk, mean of {VMS} (checkpoint, fork, reap: of one)\n");
        for (what, all) in &self.0 {
            let took = mean(all);
            let mut bar = String::new();
            while (f64::from(u32::try_from(bar.len()).unwrap()) + 0.5) * longest < 40.0 * took {
                bar.push('#');
            }
            println!("{what:<22}{took:>9.2}  {bar}");
        }
        println!("\nIn an emulated guest the ratios count, not the milliseconds.");
    }
}
