//! `dmsnap merge`: the library's merge with a progress bar, stopped by SIGINT.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dmsnap::{MergeOptions, MergeOutcome, Sectors};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::args::Merge;
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
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Failure::Signals)?;
    }
    let mut options = MergeOptions::new();
    options.any_origin(args.any_origin);
    if let Some(name) = &args.name {
        options.name(name);
    }
    // On stderr, and only on a terminal.
    let bar = ProgressBar::new(0).with_style(style());
    let outcome = options.merge(&args.origin, &args.cow, |progress| {
        bar.set_length(bytes(progress.total));
        bar.set_position(bytes(progress.merged));
        match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
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
        left_bytes => Err(Failure::Stopped { left_bytes }),
    }
}

fn style() -> ProgressStyle {
    let bar = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {elapsed}");
    bar.unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn bytes(sectors: Sectors) -> u64 {
    sectors.to_bytes().unwrap_or(u64::MAX)
}
