//! Asking the kernel, with a step and an object to name if it refuses.

use std::path::Path;

use nix::errno::Errno;

use super::{spans, timings};
use crate::error::{Error, Result, Step, Verdict, policy};

/// Makes a kernel call; repeats it at once, a bounded number of times, when the policy says so.
///
/// Spans and timings are recorded here.
pub(crate) fn ask<T>(step: Step, on: &Path, call: impl FnMut() -> Result<T, Errno>) -> Result<T> {
    let span = spans::step(step, on);
    let answer = timings::call(step, on, || insist(step, call));
    spans::answered(&span, &answer);
    answer.map_err(|errno| Error::failed(step, on, errno))
}

/// As [`ask`], without a span: no code of the caller's runs, so that none can wait or panic while a guest's writes are
/// held back.
pub(crate) fn ask_unobserved<T>(
    step: Step,
    on: &Path,
    call: impl FnMut() -> Result<T, Errno>,
) -> Result<T> {
    let answer = timings::call(step, on, || insist(step, call));
    answer.map_err(|errno| Error::failed(step, on, errno))
}

fn insist<T>(step: Step, mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut attempt = 1;
    loop {
        match call() {
            Err(errno)
                if policy::verdict(step, errno) == Verdict::Again && attempt < policy::AT_ONCE =>
            {
                attempt += 1
            }
            answer => return answer,
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
