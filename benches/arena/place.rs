//! Directories with the image and the COW files, and what sysfs shows of devices over them.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dmsnap::{ChunkSize, Store};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::scenarios::{Disk, Scenario};
use crate::contestants::{Job, Result};

pub(crate) const IMAGE_BYTES: u64 = 64 << 20;
pub(crate) const COW_BYTES: u64 = 256 << 20;
const PREFIX: &str = "dmsnap-bench";

/// A directory on tmpfs with the image in it, and one on ext4 where there is a disk for it.
pub(crate) struct Place {
    // In this order: the mount goes before the directory that it is on.
    ext4: Option<Mount>,
    dir: tempfile::TempDir,
    image: PathBuf,
}

/// What one snapshot is made from; its COW file goes with it.
pub(crate) struct Fresh<'a> {
    image: &'a Path,
    cow: PathBuf,
    name: String,
    store: Store,
    chunk: ChunkSize,
}

impl Fresh<'_> {
    pub(crate) fn job(&self) -> Job<'_> {
        Job {
            image: self.image,
            cow: &self.cow,
            name: &self.name,
            store: self.store,
            chunk: self.chunk,
        }
    }

    /// Whether its dm device, or a loop device over its COW file, is there.
    pub(crate) fn is_there(&self) -> bool {
        let devices = dm_devices(&self.name).map_or(0, |found| found.len());
        devices + loops_over(&self.cow).unwrap_or_default() > 0
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        // What cannot be unlinked goes with the directory.
        let _ = fs::remove_file(&self.cow);
    }
}

impl Place {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in("/dev/shm")?;
        if statfs(dir.path())?.filesystem_type() != TMPFS_MAGIC {
            return Err("/dev/shm is no tmpfs".into());
        }
        let image = dir.path().join("image");
        File::create_new(&image)?.set_len(IMAGE_BYTES)?;
        let ext4 = None;
        Ok(Self { ext4, dir, image })
    }

    /// Makes a file system on the disk that `$DMSNAP_BENCH_DISK` names, whose contents are nobody's. Says whether it
    /// does.
    pub(crate) fn take_disk(&mut self) -> Result<bool> {
        let Some(disk) = env::var_os("DMSNAP_BENCH_DISK") else {
            return Ok(false);
        };
        self.ext4 = Some(Mount::ext4(&disk, self.dir.path().join("ext4"))?);
        Ok(true)
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn fresh(&self, scenario: &Scenario, what: &str) -> Result<Fresh<'_>> {
        let name = format!("{PREFIX}-{}-{what}", std::process::id());
        let dir = match scenario.disk {
            Disk::Tmpfs => self.dir.path(),
            Disk::Ext4 => &self.ext4.as_ref().ok_or("there is no disk for ext4")?.0,
        };
        let cow = dir.join(&name);
        File::create_new(&cow)?.set_len(COW_BYTES)?;
        Ok(Fresh {
            image: &self.image,
            cow,
            name,
            store: scenario.store,
            chunk: scenario.chunk()?,
        })
    }

    /// A probing udev may hold a loop device for a moment after it was detached.
    pub(crate) fn settle(&self, fresh: &Fresh<'_>) -> Result<()> {
        if comes_true(|| Ok(!fresh.is_there()))? {
            return Ok(());
        }
        Err(format!("left {} behind", fresh.name).into())
    }

    /// Has udevd, if one runs, done with what one contestant gave it to do before the next one's turn.
    pub(crate) fn settle_udev(&self) -> Result<()> {
        if fs::exists("/run/udev/control")? {
            run("udevadm", ["settle", "--timeout=30"])?;
        }
        Ok(())
    }

    pub(crate) fn check_empty(&self) -> Result<()> {
        let left = || Result::Ok((dm_devices(PREFIX)?.len(), loops_over(self.dir.path())?));
        if comes_true(|| Ok(left()? == (0, 0)))? {
            return Ok(());
        }
        let (devices, loops) = left()?;
        Err(format!("left {devices} dm and {loops} loop devices").into())
    }
}

/// Within five seconds.
fn comes_true(is_true: impl Fn() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_true()? {
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// An ext4 file system, mounted until this is dropped.
struct Mount(PathBuf);

impl Mount {
    fn ext4(disk: &OsStr, on: PathBuf) -> Result<Self> {
        fs::create_dir(&on)?;
        let options = ["-q", "-F", "-t", "ext4"].map(OsStr::new);
        run("mke2fs", options.into_iter().chain([disk]))?;
        run("mount", ["-t".as_ref(), "ext4".as_ref(), disk, on.as_ref()])?;
        Ok(Self(on))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // What is still mounted keeps its directory, which shows it.
        let _ = run("umount", [&self.0]);
    }
}

fn run<A: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = A>) -> Result<()> {
    let status = Command::new(program).args(args).status();
    match status.map_err(|error| format!("cannot run {program}: {error}"))? {
        status if status.success() => Ok(()),
        status => Err(format!("{program}: {status}").into()),
    }
}

/// The sysfs directories of the live dm devices whose names begin so.
fn dm_dirs(prefix: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        // A device may go away between the listing and the reading.
        if fs::read_to_string(path.join("dm/name")).is_ok_and(|name| name.starts_with(prefix)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The sizes, as sysfs prints them, of the live dm devices whose names begin so.
pub(crate) fn dm_devices(prefix: &str) -> Result<Vec<String>> {
    let sizes = dm_dirs(prefix)?;
    let sizes = sizes
        .iter()
        .flat_map(|dir| fs::read_to_string(dir.join("size")));
    Ok(sizes.map(|size| size.trim().to_owned()).collect())
}

/// Their nodes.
pub(crate) fn dm_nodes(prefix: &str) -> Result<Vec<PathBuf>> {
    let dirs = dm_dirs(prefix)?;
    let names = dirs.iter().filter_map(|dir| dir.file_name());
    Ok(names.map(|name| Path::new("/dev").join(name)).collect())
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
