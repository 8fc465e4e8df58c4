//! Asking the kernel, with a step and an object to name if it refuses.

use std::path::Path;

use nix::errno::Errno;

use crate::error::{Error, Result, Step};
use crate::host::Host;
use crate::policy::{self, Retry, Verdict};

/// Makes a kernel call; repeats it at once, a bounded number of times, when the policy says so.
pub(crate) fn ask<T>(
    step: Step,
    on: &Path,
    mut call: impl FnMut() -> Result<T, Errno>,
) -> Result<T> {
    let mut attempt = 1;
    loop {
        match call() {
            Ok(answer) => return Ok(answer),
            Err(errno)
                if policy::verdict(step, errno) == Verdict::Again && attempt < policy::AT_ONCE =>
            {
                attempt += 1
            }
            Err(errno) => return Err(Error::failed(step, on, errno)),
        }
    }
}

/// What was asked for, or `None` if it is not there.
pub(crate) fn absent<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Err(error) if error.verdict() == Some(Verdict::Gone) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Repeats `attempt` for as long as it fails with `while_it_is` and `retry` allows.
pub(crate) fn patiently<H: Host, T>(
    host: &H,
    retry: &Retry,
    while_it_is: Verdict,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = host.now();
    let mut attempts = 0;
    loop {
        let error = match attempt() {
            Err(error) if error.verdict() == Some(while_it_is) => error,
            settled => return settled,
        };
        match retry.pause(attempts, host.now().saturating_sub(start)) {
            Some(pause) => host.sleep(pause),
            None => return Err(error),
        }
        attempts += 1;
    }
}
