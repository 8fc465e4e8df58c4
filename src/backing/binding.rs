//! Compares a loop device with the handle that names it.

use std::path::Path;

use crate::base::{LoopHandle, loop_number};
use crate::call::{absent, ask};
use crate::error::{Result, Step, Verdict};
use crate::kernel::{Host, LoopStatus};

/// Says whether a loop device is still attached to the file that its handle names.
pub(crate) enum Binding<L> {
    /// The device is attached to the handle's file.
    Bound(L, LoopStatus),
    /// The kernel is detaching the file (`__loop_clr_fd`): `LOOP_GET_STATUS64` answers ENXIO already, and the file is in
    /// use until that is done.
    LettingGo,
    /// The device is free, or attached to another file.
    Gone,
}

pub(crate) fn binding<H: Host>(host: &H, handle: &LoopHandle) -> Result<Binding<H::Loop>> {
    let path = &handle.path;
    let opened = ask(Step::InspectLoop, path, || host.open_loop(path, false));
    let Some(device) = absent(opened)? else {
        return Ok(Binding::Gone);
    };
    let asked = ask(Step::InspectLoop, path, || host.loop_status(&device));
    let Some(status) = absent(asked)? else {
        return Ok(if host.shows_backing(path) {
            Binding::LettingGo
        } else {
            note_free(host, path);
            Binding::Gone
        });
    };
    let same_file = handle
        .backing
        .is_none_or(|backing| backing == status.backing);
    let same_binding = || match handle.diskseq {
        Some(then) => diskseq(host, &device, path).map(|now| now.is_none_or(|now| now == then)),
        None => Ok(true),
    };
    Ok(if same_file && same_binding()? {
        Binding::Bound(device, status)
    } else {
        Binding::Gone
    })
}

/// Notes that the loop device was seen to be detached: the next file may be attached to it.
pub(crate) fn note_free<H: Host>(host: &H, path: &Path) {
    if let Some(number) = loop_number(path) {
        host.loop_numbers().free(number);
    }
}

/// Reads the device's `diskseq`, which counts up with each file that is attached; `None` before Linux 5.15, which has
/// none.
pub(crate) fn diskseq<H: Host>(host: &H, device: &H::Loop, path: &Path) -> Result<Option<u64>> {
    match ask(Step::ReadDiskseq, path, || host.loop_diskseq(device)) {
        Err(error) if error.verdict() == Some(Verdict::Unsupported) => Ok(None),
        answer => answer.map(Some),
    }
}
