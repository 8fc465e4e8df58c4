//! Whether a loop device still is what a handle says.

use std::path::Path;

use crate::base::LoopHandle;
use crate::call::{absent, ask};
use crate::error::{Result, Step, Verdict};
use crate::kernel::{Host, LoopStatus};

/// What a handle's loop device is to the handle.
pub(crate) enum Binding<L> {
    /// Bound to what the handle says.
    Bound(L, LoopStatus),
    /// Unbound to whoever asks (`LOOP_GET_STATUS64` answers ENXIO), and the kernel still at it (`__loop_clr_fd`): the
    /// backing file is in use until it is done.
    LettingGo,
    /// Free, or bound to something else.
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

/// The number of the device's binding; `None` where the kernel has none (before 5.15).
pub(crate) fn diskseq<H: Host>(host: &H, device: &H::Loop, path: &Path) -> Result<Option<u64>> {
    match ask(Step::ReadDiskseq, path, || host.loop_diskseq(device)) {
        Err(error) if error.verdict() == Some(Verdict::Unsupported) => Ok(None),
        answer => answer.map(Some),
    }
}
