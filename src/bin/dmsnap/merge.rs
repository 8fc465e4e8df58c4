//! `dmsnap merge`: the library's merge with a progress bar, stopped by SIGINT.

use dmsnap::base::Sectors;
use dmsnap::merge::{MergeOptions, MergeOutcome};

use crate::args::Merge;
use crate::interrupt::Job;
use crate::{Failure, print, print_json};

/// How a merge ended, as `merge --json` prints it. The keys are stable; new ones may be added.
#[derive(Debug, serde::Serialize)]
struct Ended {
    /// `complete` or `stopped`.
    outcome: &'static str,
    merged_bytes: u64,
    left_bytes: u64,
}

pub(crate) fn merge(args: &Merge) -> Result<(), Failure> {
    let job = Job::begin().map_err(Failure::Signals)?;
    let mut options = MergeOptions::new();
    options.any_origin(args.any_origin);
    if let Some(name) = &args.name {
        options.name(name);
    }
    let outcome = options.merge(&args.origin, &args.cow, |progress| {
        job.shows(progress.done_bytes, progress.total_bytes)
    });
    let signal = job.signal();
    drop(job);
    let (merged, left) = match outcome? {
        MergeOutcome::Stopped { merged, left } => (merged, left),
        MergeOutcome::Complete { merged } => (merged, Sectors::default()),
        _ => Default::default(),
    };
    let complete = left == Sectors::default();
    let ended = Ended {
        outcome: if complete { "complete" } else { "stopped" },
        merged_bytes: bytes(merged),
        left_bytes: bytes(left),
    };
    if args.json {
        print_json(&ended)?;
    } else {
        print(format!("merged {} bytes\n", ended.merged_bytes))?;
    }
    match ended.left_bytes {
        0 => Ok(()),
        left_bytes => Err(Failure::Stopped { left_bytes, signal }),
    }
}

fn bytes(sectors: Sectors) -> u64 {
    sectors.to_bytes().unwrap_or(u64::MAX)
}
