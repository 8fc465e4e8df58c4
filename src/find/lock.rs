//! Locks a live snapshot for an operation: a `flock` on the node of its COW file's loop device, like the lock of a
//! `create`. The kernel frees it when the process ends.

use super::at_work;
use super::lookup::{Live, live};
use crate::base::DeviceId;
use crate::error::{Refusal, Result, Retry};
use crate::kernel::Host;

/// Finds and locks the live snapshot that `id` means, until the loop device in the result is closed. If another process
/// is at work on it, this waits.
///
/// # Errors
///
/// Those of [`live`]; [`Refusal::AtWork`] if the other process is not done by the deadline.
pub(crate) fn locked<H: Host>(host: &H, id: &DeviceId, retry: &Retry) -> Result<Live<H::Loop>> {
    loop {
        let found = live(host, id)?;
        let node = &found.cow.node;
        if !at_work::take(host, &found.cow.device, node, retry)? {
            let name = found.device.name;
            return Err(Refusal::AtWork { name }.into());
        }
        // The process that had the lock may have given the snapshot another COW file.
        let mut now = live(host, id)?;
        if now.uuid == found.uuid && now.params.cow == found.params.cow {
            now.cow = found.cow;
            return Ok(now);
        }
    }
}
