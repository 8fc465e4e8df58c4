//! Attaches a file to a free loop device.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Backing;
use super::binding::diskseq;
use crate::base::{DeviceNumber, LoopHandle, SectorSize, Sectors, loop_node};
use crate::call::{ask, patiently};
use crate::error::{Error, Result, Retry, Step, Verdict};
use crate::kernel::LO_READ_ONLY;
use crate::kernel::{Host, LOOP_CONTROL, LoopChoice};

/// A loop device that was attached here. The kernel detaches it (autoclear) when neither `device` nor a dm table has it
/// open any more.
#[derive(Debug)]
pub(crate) struct Attached<L> {
    pub(crate) path: PathBuf,
    /// The N of `/dev/loopN`.
    pub(crate) number: u32,
    pub(crate) dev: DeviceNumber,
    pub(crate) device: L,
}

/// How long [`attach`] goes on after losing loop devices to others. The first pauses are short: the next device that is
/// tried is another one.
const RACE_RETRY: Retry =
    Retry::until(Duration::from_secs(5)).pauses(Duration::from_micros(1), Duration::from_millis(1));

pub(crate) fn loop_length<H: Host>(host: &H, device: &Attached<H::Loop>) -> Result<Sectors> {
    let size = || host.loop_size_bytes(&device.device);
    ask(Step::SizeLoop, &device.path, size).map(Sectors::from_bytes_floor)
}

/// Finds a free loop device and attaches `backing` to it. `label` is stored in the device (`lo_file_name`), where
/// `losetup` shows it. A device that another process took first is left alone, and the next one is tried.
pub(crate) fn attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
    sectors: SectorSize,
    label: &Path,
    handle: &mut Option<LoopHandle>,
) -> Result<Attached<H::Loop>> {
    let mut tried = None;
    patiently(host, &RACE_RETRY, Verdict::TakeAnother, || {
        let number = next_loop(host, tried)?;
        tried = Some(number);
        try_attach(host, backing, flags, sectors, label, handle, number.0)
    })
}

/// A loop device's number, and how it was chosen.
type Tried = (u32, LoopChoice);

/// Returns the number of the loop device to try, after losing the one that was `tried` to another process.
fn next_loop<H: Host>(host: &H, tried: Option<Tried>) -> Result<Tried> {
    let choice = match tried {
        None => host.loop_numbers().choose(),
        Some((lost, LoopChoice::Named)) => return named_loop(host, Some(lost)),
        Some((_, LoopChoice::New(_))) => LoopChoice::Named,
        Some((_, LoopChoice::Freed(_))) => {
            host.loop_numbers().was_taken();
            LoopChoice::Named
        }
    };
    match choice {
        LoopChoice::Freed(number) => Ok((number, choice)),
        LoopChoice::New(number) => match add_loop(host, number) {
            Ok(true) => Ok((number, choice)),
            // What keeps it from being made is the kernel's to say of the next one.
            Ok(false) | Err(_) => {
                host.loop_numbers().was_there();
                named_loop(host, None)
            }
        },
        LoopChoice::Named => named_loop(host, None),
    }
}

/// Asks the kernel for a free loop device. `LOOP_CTL_GET_FREE` names the same one until somebody attaches a file to it,
/// also one whose lock another process holds; after such a loss this takes the number above, and makes the device if it
/// is not there.
fn named_loop<H: Host>(host: &H, lost: Option<u32>) -> Result<Tried> {
    let control = Path::new(LOOP_CONTROL);
    let named = ask(Step::FindLoop, control, || host.find_loop())?;
    host.loop_numbers().named(named);
    let number = match lost {
        Some(lost) if named <= lost => lost + 1,
        _ => named,
    };
    if number != named {
        add_loop(host, number)?;
    }
    Ok((number, LoopChoice::Named))
}

/// Makes the loop device of that number; false if it was there.
fn add_loop<H: Host>(host: &H, number: u32) -> Result<bool> {
    match ask(Step::AddLoop, Path::new(LOOP_CONTROL), || {
        host.add_loop(number)
    }) {
        Err(error) if error.verdict() == Some(Verdict::NameTaken) => Ok(false),
        added => added.map(|()| true),
    }
}

/// Adds the likely reasons to an EINVAL of `LOOP_CONFIGURE`, which has many.
fn explain(error: Error) -> Error {
    match error.verdict() {
        Some(Verdict::Fatal) => {
            error.noted("the file cannot be behind a loop device, or the kernel is older than 5.8")
        }
        _ => error,
    }
}

fn try_attach<H: Host>(
    host: &H,
    backing: &Backing<'_, H::File>,
    flags: u32,
    sectors: SectorSize,
    label: &Path,
    handle: &mut Option<LoopHandle>,
    number: u32,
) -> Result<Attached<H::Loop>> {
    let path = loop_node(number);
    let writable = flags & LO_READ_ONLY == 0;
    let device = ask(Step::OpenLoop, &path, || host.open_loop(&path, writable))?;
    if writable {
        hold(host, &device, &path)?;
    }
    ask(Step::AttachLoop, &path, || {
        host.attach_loop(&device, &backing.file, flags, sectors.bytes(), label)
    })
    .map_err(explain)?;
    let handle = handle.insert(LoopHandle::at(&path));
    handle.backing = Some(backing.facts.id);
    handle.diskseq = diskseq(host, &device, &path)?;
    let dev = ask(Step::InspectLoop, &path, || host.loop_number(&device))?;
    Ok(Attached {
        path,
        number,
        dev,
        device,
    })
}

/// Locks the node of the COW file's loop device (`flock`) for as long as this process has it open. The lock tells a
/// sweep ([`ReapOptions`](crate::ReapOptions)) that the process that makes the snapshot is alive. An exclusive lock also
/// keeps udev from probing the device meanwhile. If udev locked it first, a shared lock is taken, and a mark on the
/// device tells it from udev's. If even that fails, another `create` has the device.
fn hold<H: Host>(host: &H, device: &H::Loop, path: &Path) -> Result<()> {
    let lock = |exclusive| ask(Step::LockLoop, path, || host.lock_loop(device, exclusive));
    match lock(true) {
        Err(error) if error.verdict() == Some(Verdict::TakeAnother) => {
            lock(false)?;
            ask(Step::LockLoop, path, || host.mark_loop(device))
        }
        other => other,
    }
}
