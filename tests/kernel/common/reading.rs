//! The kernel's state as others see it: dmsetup, the `devicemapper` crate and sysfs, not the library.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

#[cfg(feature = "devicemapper")]
use devicemapper::DM;

use super::run;

/// A loop device that has a backing file, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) device: PathBuf,
    /// With ` (deleted)` behind it once the file is unlinked.
    pub(crate) backing: PathBuf,
    pub(crate) autoclear: bool,
    pub(crate) read_only: bool,
    pub(crate) direct_io: bool,
}

/// The loop devices whose backing files are, or were, below `dir`.
pub(crate) fn loops_below(dir: &Path) -> Vec<Bound> {
    let mut bound: Vec<Bound> = fs::read_dir("/sys/block")
        .expect("/sys is mounted")
        .flatten()
        .filter_map(|entry| bound(&entry.path()))
        .filter(|found| found.backing.starts_with(dir))
        .collect();
    bound.sort_by(|one, other| one.device.cmp(&other.device));
    bound
}

/// How many loop devices have that file.
pub(crate) fn loops_over(file: &Path) -> usize {
    let over = |found: &&Bound| found.backing == file;
    let dir = file.parent().expect("a file in a directory");
    loops_below(dir).iter().filter(over).count()
}

/// The loop device at that path, if it has a backing file.
pub(crate) fn loop_at(device: &Path) -> Option<Bound> {
    bound(&Path::new("/sys/block").join(device.file_name()?))
}

/// `None` also for a device that is being unbound: its files fail one by one.
fn bound(block: &Path) -> Option<Bound> {
    let mut backing = fs::read(block.join("loop/backing_file")).ok()?;
    if backing.last() == Some(&b'\n') {
        backing.pop();
    }
    let flag = |file: &str| Some(fs::read_to_string(block.join(file)).ok()?.trim() == "1");
    Some(Bound {
        device: Path::new("/dev").join(block.file_name()?),
        backing: PathBuf::from(OsString::from_vec(backing)),
        autoclear: flag("loop/autoclear")?,
        read_only: flag("ro")?,
        direct_io: flag("loop/dio")?,
    })
}

/// The processes that have a device open, by their names.
pub(crate) fn holders(device: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let has_it = |process: &Path| {
        let open = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|target| target == device)
    };
    let holding = processes
        .map(|entry| entry.path())
        .filter(|path| has_it(path));
    let names = holding.filter_map(|path| fs::read_to_string(path.join("comm")).ok());
    names.map(|name| name.trim_end().to_owned()).collect()
}

/// The names of all dm devices by the `devicemapper` crate: a dmsetup for each of some hundred looks would cost more
/// than all that is looked at. Scenes end with dmsetup's word.
#[cfg(feature = "devicemapper")]
pub(crate) fn dm_listed() -> Vec<String> {
    let devices = DM::new().and_then(|dm| dm.list_devices());
    let devices = devices.expect("device-mapper lists its devices");
    let names = devices.iter().map(|(name, ..)| name.to_string());
    names.filter(|name| !name.is_empty()).collect()
}

/// The same where that crate is not built.
#[cfg(not(feature = "devicemapper"))]
pub(crate) fn dm_listed() -> Vec<String> {
    dm_names()
}

/// The names of all dm devices.
pub(crate) fn dm_names() -> Vec<String> {
    let listed = run!("dmsetup", "ls");
    listed
        .lines()
        .filter_map(|line| Some(line.split_once('\t')?.0.to_owned()))
        .collect()
}

pub(crate) fn dm_exists(name: &str) -> bool {
    dm_names().iter().any(|each| each == name)
}

/// `dmsetup table` of one device.
pub(crate) fn dm_table(name: &str) -> String {
    run!("dmsetup", "table", name).trim_end().to_owned()
}

/// One field of `dmsetup info`.
pub(crate) fn dm_info(name: &str, field: &str) -> String {
    run!("dmsetup", "info", "-c", "--noheadings", "-o", field, name)
}

/// `major:minor` of a block device's node.
pub(crate) fn number(node: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(node).expect("the node is there").rdev();
    dmsnap::base::DeviceNumber::from_dev_t(found).to_string()
}

/// Mount points below `dir`, the innermost first.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let points = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    below
}

/// Whether `/dev/mapper/<name>` is there, leading anywhere or not.
pub(crate) fn alias_exists(name: &str) -> bool {
    fs::symlink_metadata(Path::new("/dev/mapper").join(name)).is_ok()
}
