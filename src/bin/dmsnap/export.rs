//! `dmsnap export`: with a progress bar on a terminal, and undone whole by SIGINT and SIGTERM.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args as Arguments;
use dmsnap::base::Digest;
use dmsnap::export::{ExportOptions, Exported, Progress};

use crate::amounts::duration;
use crate::interrupt::Job;
use crate::{Failure, print, print_json};

#[derive(Debug, Arguments)]
#[command(allow_missing_positional = true)]
pub(crate) struct Export {
    /// The origin image of a COW file that is not in use
    #[arg(long, value_name = "IMAGE", requires = "cow")]
    origin: Option<PathBuf>,
    /// A COW file that is not in use; given several times, in any order: those of a stack, from the layers to the disk
    #[arg(long, value_name = "COW", requires = "origin")]
    cow: Vec<PathBuf>,
    /// Replace the output if it is a file
    #[arg(long)]
    replace: bool,
    /// What the origin holds: the digest that the COW file was made with, if it was, decides whether it is that image
    #[arg(long, value_name = "HEX")]
    digest: Option<Digest>,
    /// Take the origin as it is, even though it is not what the COW file was made over
    #[arg(long)]
    any_origin: bool,
    /// Take a COW file that the kernel has marked invalid: without the writes that it lost
    #[arg(long)]
    invalid_store: bool,
    /// Copy everything, even where the file system could share the origin
    #[arg(long)]
    no_reflink: bool,
    /// How long to wait for others, such as 15s or 200ms; a second for a lock on a file, and 15 seconds for whoever is at
    /// work on the snapshot, if not given
    #[arg(long, value_parser = duration)]
    deadline: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// A running snapshot's name or uuid; it is flushed, and goes on
    #[arg(required_unless_present = "cow", conflicts_with = "cow")]
    name: Option<String>,
    /// The raw image to be made
    output: PathBuf,
}

pub(crate) fn run(export: &Export) -> Result<(), Failure> {
    let job = Job::begin().map_err(Failure::Signals)?;
    let mut progress = |progress: Progress| job.shows(progress.done_bytes, progress.total_bytes);
    let mut options = ExportOptions::new();
    options
        .replace(export.replace)
        .any_origin(export.any_origin)
        .invalid_store(export.invalid_store)
        .reflink(!export.no_reflink);
    if let Some(digest) = export.digest {
        options.digest(digest);
    }
    if let Some(deadline) = export.deadline {
        options.deadline(deadline);
    }
    let done = match (&export.origin, &export.cow[..], &export.name) {
        (Some(origin), [cow], _) => options.export_with(origin, cow, &export.output, &mut progress),
        (Some(origin), cows, _) => {
            options.export_stack_with(origin, cows, &export.output, &mut progress)
        }
        (_, _, name) => {
            let name = name.as_deref().unwrap_or_default();
            options.export_live_with(name, &export.output, &mut progress)
        }
    };
    let signal = job.signal();
    drop(job);
    match done? {
        Some(done) => report(&done, export.json),
        None => Err(Failure::Interrupted(signal)),
    }
}

fn report(done: &Exported, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(done);
    }
    let shared = if done.reflinked {
        ", the rest shared with the origin"
    } else {
        ""
    };
    print(format!(
        "{} bytes, {} of them changed; {} written{shared}\n",
        done.bytes, done.changed_bytes, done.written_bytes
    ))
}
