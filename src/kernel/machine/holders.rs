//! Finds who holds a block device, as far as /proc and /sys show it. It is for messages: nothing is decided by it.

use std::ffi::CString;
use std::fs::{self, DirEntry};
use std::path::Path;

use crate::base::DeviceNumber;
use crate::kernel::sys;

/// How many holders a message names at most, as a message is one line.
const NAMED: usize = 4;

/// Returns each holder in words, such as `mounted at /mnt` or `firecracker (pid 812)`.
pub(crate) fn holders(number: DeviceNumber) -> Vec<String> {
    let mut found: Vec<_> = stacked(number).iter().map(user).collect();
    found.extend(loops(number));
    found.extend(mounts(number));
    found.extend(swaps(number));
    found.extend(processes(number));
    found.truncate(NAMED);
    found
}

/// Returns the dm devices and other block devices that use this one.
pub(crate) fn stacked_on(number: DeviceNumber) -> Vec<DeviceNumber> {
    let of = |entry: &DirEntry| fs::read_to_string(entry.path().join("dev")).ok();
    stacked(number)
        .iter()
        .filter_map(|entry| of(entry)?.trim_end().parse().ok())
        .collect()
}

/// Counts the devices that use this one, whose directory in sysfs it is, up to `at_most`.
pub(crate) fn count(sysfs: &Path, at_most: usize) -> usize {
    let devices = fs::read_dir(sysfs.join("holders"));
    devices.into_iter().flatten().take(at_most).count()
}

fn stacked(number: DeviceNumber) -> Vec<DirEntry> {
    let devices = fs::read_dir(format!("/sys/dev/block/{number}/holders"));
    devices.into_iter().flatten().flatten().collect()
}

/// Says which device an entry of a `holders` directory is.
fn user(entry: &DirEntry) -> String {
    match fs::read_to_string(entry.path().join("dm/name")) {
        Ok(name) => format!("dm device {:?} stands on it", name.trim_end()),
        Err(_) => format!("in use by /dev/{}", entry.file_name().to_string_lossy()),
    }
}

/// Returns the loop devices over the device, and what stands on them, as a snapshot over another one does: a loop device
/// has its file open, and is in no `holders` directory.
fn loops(number: DeviceNumber) -> Vec<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let over = entries.filter(|entry| {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        backing.is_ok_and(|path| is_device(Path::new(path.trim_end_matches('\n')), number))
    });
    over.flat_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let dev = fs::read_to_string(entry.path().join("dev")).unwrap_or_default();
        let users = dev.trim_end().parse().map(stacked).unwrap_or_default();
        let mut users: Vec<_> = users.iter().map(user).collect();
        match users.is_empty() {
            true => vec![format!("in use by /dev/{name}")],
            false => {
                users
                    .iter_mut()
                    .for_each(|user| *user += &format!(" through /dev/{name}"));
                users
            }
        }
    })
    .collect()
}

/// Returns the mounts of the device in this mount namespace, or in the first other one that has any. In
/// `/proc/<pid>/mountinfo` the third word is the device, and the fifth the mount point with its blanks escaped.
fn mounts(number: DeviceNumber) -> Vec<String> {
    let here = mounts_of("self", number);
    if !here.is_empty() {
        return here;
    }
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen = vec![namespace("self")];
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in entries {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.parse::<u32>().is_err() {
            continue;
        }
        let found = namespace(&pid);
        if found.is_none() || seen.contains(&found) {
            continue;
        }
        seen.push(found);
        let there = mounts_of(&pid, number);
        if !there.is_empty() {
            let place = format!(" in the mount namespace of pid {pid}");
            return there.into_iter().map(|mount| mount + &place).collect();
        }
    }
    Vec::new()
}

fn mounts_of(pid: &str, number: DeviceNumber) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let number = number.to_string();
    let mounted = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        (*words.get(2)? == number).then_some(())?;
        words.get(4).map(|path| format!("mounted at {path}"))
    };
    text.lines().filter_map(mounted).collect()
}

fn swaps(number: DeviceNumber) -> Vec<String> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let paths = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    paths
        .filter(|path| is_device(Path::new(path), number))
        .map(|_| "used as swap".to_owned())
        .collect()
}

fn processes(number: DeviceNumber) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok())
        .filter(|pid| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten();
            descriptors
                .flatten()
                .any(|descriptor| is_device(&descriptor.path(), number))
        })
        .map(|pid| {
            let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            let command = String::from_utf8_lossy(&comm)
                .trim_end()
                .escape_debug()
                .to_string();
            format!("{command} (pid {pid})")
        })
        .take(NAMED)
        .collect()
}

fn is_device(path: &Path, number: DeviceNumber) -> bool {
    let path = CString::new(path.as_os_str().as_encoded_bytes());
    path.is_ok_and(|path| sys::cached_block_number(&path) == Ok(Some(number.to_dev_t())))
}
