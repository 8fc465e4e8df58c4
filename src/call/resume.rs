//! The end of a suspension.

use std::path::Path;
use std::time::Duration;

use super::{ask_unobserved, patiently};
use crate::base::DeviceUuid;
use crate::error::{Result, Retry, Step, Verdict};
use crate::kernel::Host;

/// A guest waits meanwhile, for ever if this gives up; no caller's deadline ends it earlier.
const RESUME_RETRY: Retry = Retry::until(Duration::from_secs(10));

/// Resumes a suspended device, for as long as the kernel lacks the memory for it. No code of the caller's runs.
pub(crate) fn resume<H: Host>(host: &H, uuid: &DeviceUuid, mapper: &Path) -> Result<()> {
    let resumed = patiently(host, &RESUME_RETRY, Verdict::Exhausted, || {
        ask_unobserved(Step::Resume, mapper, || host.resume(uuid))
    });
    resumed.map(drop)
}
