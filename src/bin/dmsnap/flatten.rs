//! `dmsnap flatten`: with a progress bar on a terminal, and undone whole by SIGINT and SIGTERM.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args as Arguments;
use dmsnap::export::{FlattenOptions, Progress};

use crate::amounts::duration;
use crate::interrupt::Job;
use crate::{Failure, print, print_json};

#[derive(Debug, Arguments)]
pub(crate) struct Flatten {
    /// Replace the output if it is a file
    #[arg(long)]
    replace: bool,
    /// How long to wait for whoever has a lock on a file, such as 15s or 200ms
    #[arg(long, default_value = "1s", value_parser = duration)]
    deadline: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The COW files of a stack, in any order; none may be in use
    #[arg(required = true, value_name = "COW")]
    cows: Vec<PathBuf>,
    /// The COW file to be made
    output: PathBuf,
}

pub(crate) fn run(flatten: &Flatten) -> Result<(), Failure> {
    let job = Job::begin().map_err(Failure::Signals)?;
    let mut progress = |progress: Progress| job.shows(progress.done_bytes, progress.total_bytes);
    let mut options = FlattenOptions::new();
    options.replace(flatten.replace).deadline(flatten.deadline);
    let done = options.flatten_with(&flatten.cows, &flatten.output, &mut progress);
    let signal = job.signal();
    drop(job);
    let Some(done) = done? else {
        return Err(Failure::Interrupted(signal));
    };
    if flatten.json {
        return print_json(&done);
    }
    print(format!(
        "{} bytes, for {} changed bytes of a disk; {} written\n",
        done.bytes, done.changed_bytes, done.written_bytes
    ))
}
