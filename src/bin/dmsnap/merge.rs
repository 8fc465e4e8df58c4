//! `dmsnap merge`: the library's merge with a progress bar, stopped by SIGINT.

use dmsnap::merge::{MergeOptions, MergeOutcome};

use crate::args::Merge;
use crate::interrupt::Job;
use crate::{Failure, print, print_json};

pub(crate) fn merge(args: &Merge) -> Result<(), Failure> {
    let job = Job::begin().map_err(Failure::Signals)?;
    let mut options = MergeOptions::new();
    options.any_origin(args.any_origin);
    if let Some(digest) = args.digest {
        options.digest(digest);
    }
    if let Some(deadline) = args.deadline {
        options.deadline(deadline);
    }
    if let Some(name) = &args.name {
        options.name(name);
    }
    let outcome = options.merge(&args.origin, &args.cow, |progress| {
        job.shows(progress.done_bytes, progress.total_bytes)
    });
    let signal = job.signal();
    drop(job);
    let outcome = outcome?;
    let (merged_bytes, left_bytes) = match outcome {
        MergeOutcome::Stopped {
            merged_bytes,
            left_bytes,
        } => (merged_bytes, left_bytes),
        MergeOutcome::Complete { merged_bytes } => (merged_bytes, 0),
        _ => (0, 0),
    };
    if args.json {
        print_json(&outcome)?;
    } else {
        print(format!("merged {merged_bytes} bytes\n"))?;
    }
    match left_bytes {
        0 => Ok(()),
        left_bytes => Err(Failure::Stopped { left_bytes, signal }),
    }
}
