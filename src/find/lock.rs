//! The lock of an operation on a live snapshot: a `flock` on the node of its COW file's loop device, as its maker has
//! one. The kernel frees it with its holder.

use super::at_work;
use super::lookup::{Live, live};
use crate::base::DeviceId;
use crate::error::{Refusal, Result, Retry};
use crate::kernel::Host;

/// The live snapshot that `id` means, locked for as long as its COW file's loop device is open here. Whoever else is at
/// work on it is waited for.
///
/// # Errors
///
/// As [`live`]; [`Refusal::AtWork`] at the deadline.
pub(crate) fn locked<H: Host>(host: &H, id: &DeviceId, retry: &Retry) -> Result<Live<H::Loop>> {
    loop {
        let found = live(host, id)?;
        let node = &found.cow.node;
        if !at_work::take(host, &found.cow.device, node, retry)? {
            let name = found.device.name;
            return Err(Refusal::AtWork { name }.into());
        }
        // Whoever had the lock may have given it another COW file.
        let mut now = live(host, id)?;
        if now.uuid == found.uuid && now.params.cow == found.params.cow {
            now.cow = found.cow;
            return Ok(now);
        }
    }
}
