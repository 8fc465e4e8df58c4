//! `dmsnap`: the library's jobs for operators and scripts.
//!
//! Results go to stdout, everything else to stderr. Exit status 0 for success, 1 for a failure, 2 for wrong usage, 128
//! and the signal's number for an export or a merge that was interrupted.

mod amounts;
mod args;
mod cow;
mod export;
mod flatten;
mod interrupt;
mod merge;
mod output;
mod tree;

mod watch;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use args::{Args, Command, Reap};
use clap::Parser;
use dmsnap::error::{LayerRefusal, Refusal};
use dmsnap::find::SnapshotInfo;
use dmsnap::snapshot::{CheckpointOptions, GrowOptions, Layer, StackOptions};
use dmsnap::teardown::{Outcome, RepairOptions, Repaired};
use dmsnap::timings::Timings;
use dmsnap::{DeviceId, Error, Handles, Origin, ReapOptions, Teardown, WhenBusy};

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failure(&error),
    }
}

/// Anything that ends the command.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Snapshot(#[from] dmsnap::Error),
    #[error("cannot read handles from {from}")]
    Handles {
        from: String,
        source: serde_json::Error,
    },
    #[error("cannot read {from}")]
    Input { from: String, source: io::Error },
    #[error("COW file {cow:?}")]
    Store {
        cow: PathBuf,
        source: dmsnap::store::StoreError,
    },
    #[error("a COW file for such an origin would be too large for any file system")]
    TooLarge,
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// By a signal of that number; what was under way is undone.
    #[error("interrupted, nothing was written")]
    Interrupted(u8),
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
    /// A watch went on without telling.
    #[error("some events were not told: stdout could not be written")]
    Unlogged,
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
    /// A merge was stopped by a signal of that number.
    #[error("stopped, {left_bytes} bytes are left: the same command goes on")]
    Stopped { left_bytes: u64, signal: u8 },
    /// Some snapshots could not be read; the others were printed.
    #[error("cannot read {0} of the snapshots")]
    Unreadable(usize),
    /// Some snapshots could not be taken down; the others were.
    #[error("cannot clean up {0} of the snapshots")]
    Uncleaned(usize),
    /// Some snapshots could not be repaired; the others were.
    #[error("cannot repair {0} of the snapshots")]
    Unrepaired(usize),
    /// Some snapshots could not be removed; the others were.
    #[error("cannot reap {0} of the snapshots")]
    Unreaped(usize),
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(create) => {
            let options = create.options();
            let work = || match layer(&create.origin)? {
                Some(layer) => options.create_on(layer.origin(), &create.cow, &create.name),
                None => options.create(&create.origin, &create.cow, &create.name),
            };
            let made = timed(create.timings, work)?;
            for warning in made.warnings() {
                output::note(warning);
            }
            print_all(made.handles()).or_else(|unprinted| {
                // Nobody would know of it.
                made.cleanup()?;
                Err(unprinted)
            })
        }
        Command::Checkpoint(checkpoint) => {
            let mut options = CheckpointOptions::new();
            options.reserve(checkpoint.reserve).keep(checkpoint.keep);
            options.deadline(checkpoint.deadline);
            if let Some(size) = checkpoint.make_cow {
                options.make_cow(size);
            }
            if let Some(expected) = checkpoint.expected_changes {
                options.expected_changes(expected);
            }
            let (name, layer) = (&checkpoint.name, &checkpoint.layer);
            let layer = options.checkpoint(name, layer, &checkpoint.cow)?;
            print_json(layer.handles())
        }
        Command::Layer(args) => {
            let below = match layer(&args.origin)? {
                Some(layer) => layer.origin().clone(),
                None => Origin::open(&args.origin)?,
            };
            let mut options = StackOptions::new();
            options.keep(true).any_depth(args.any_depth);
            options.deadline(args.deadline);
            let layer = options.open(&below, &args.cows, &args.name)?;
            print_json(layer.handles())
        }
        Command::Rollback(rollback) => {
            let mut options = CheckpointOptions::new();
            options.reserve(rollback.reserve);
            options.deadline(rollback.deadline);
            if let Some(size) = rollback.make_cow {
                options.make_cow(size);
            }
            if let Some(expected) = rollback.expected_changes {
                options.expected_changes(expected);
            }
            print_json(&options.rollback(&rollback.name, &rollback.cow)?)
        }
        Command::Cleanup {
            files,
            deadline,
            timings,
        } => cleanup(&files, deadline, timings),
        Command::Remove {
            deadline,
            defer,
            timings,
            name,
        } => {
            let outcome = timed(timings, || match defer {
                true => Teardown::new().when_busy(WhenBusy::Defer).remove(name),
                false => Teardown::new().deadline(deadline).remove(name),
            })?;
            print(outcome_text(outcome))
        }
        Command::List { json } => list(json),
        Command::Tree { json, name } => tree::tree(name.as_deref(), json),
        Command::Adopt { name } => print_json(&dmsnap::adopt(name)?),
        Command::Reap(options) => reap(&options),
        Command::Repair {
            json,
            deadline,
            names,
        } => repair(RepairOptions::new().deadline(deadline), &names, json),
        Command::Merge(options) => merge::merge(&options),
        Command::Status { json, name } => status(&name, json),
        Command::Grow {
            reserve,
            name,
            size,
        } => {
            GrowOptions::new().reserve(reserve).grow(&name, size)?;
            status(&name, false)
        }
        Command::Cow(command) => cow::run(command),
        Command::Export(command) => export::run(&command),
        Command::Flatten(command) => flatten::run(&command),
        Command::Recover {
            reserve,
            deadline,
            name,
            size,
        } => {
            let mut options = GrowOptions::new();
            options.reserve(reserve).deadline(deadline);
            let recovered = options.recover(name, size)?;
            recovered.warnings().iter().for_each(output::note);
            print_json(recovered.handles())
        }
        Command::Watch(options) => watch::watch(&options),
    }
}

/// The layer that an origin is, if it is one: a block device, or a name below /dev/mapper, where not every layer has a
/// link.
fn layer(origin: &Path) -> dmsnap::Result<Option<Layer>> {
    let found = fs::metadata(origin).map(|found| found.file_type().is_block_device());
    let named = origin
        .strip_prefix("/dev/mapper")
        .ok()
        .and_then(Path::to_str);
    let id = match (found, named) {
        (Ok(true), _) => DeviceId::from(origin),
        (Err(_), Some(name)) => DeviceId::from(name),
        _ => return Ok(None),
    };
    match Layer::open(id) {
        Ok(layer) => Ok(Some(layer)),
        Err(Error::Refused(
            Refusal::Layer(LayerRefusal::NotALayer { .. })
            | Refusal::NotOurs { .. }
            | Refusal::NotADmDevice { .. },
        )) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Does `work`; then, if told to, prints how long its steps took, whatever came of it.
fn timed<T>(timings: bool, work: impl FnOnce() -> T) -> T {
    if !timings {
        return work();
    }
    let (done, timings) = Timings::of(work);
    let _ = write!(io::stderr(), "{timings}");
    done
}

/// Takes nothing down before all handles are read.
fn cleanup(files: &[String], deadline: Duration, timings: bool) -> Result<(), Failure> {
    let mut fleet = Vec::new();
    for file in files {
        fleet.append(&mut read_handles(file)?);
    }
    let results = timed(timings, || {
        Teardown::new().deadline(deadline).cleanup_all(&fleet)
    });
    let mut failed: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    match (failed.pop(), fleet.len()) {
        (None, _) => Ok(()),
        (Some(error), 1) => Err(error.into()),
        (Some(error), _) => {
            failed.push(error);
            failed
                .iter()
                .map(dmsnap::Error::one_line)
                .for_each(output::note);
            Err(Failure::Uncleaned(failed.len()))
        }
    }
}

fn status(name: &str, json: bool) -> Result<(), Failure> {
    let info = dmsnap::status(name)?;
    if json {
        print_json(&info)
    } else {
        print(output::table(&[&info]))
    }
}

fn list(json: bool) -> Result<(), Failure> {
    print_readable(dmsnap::list()?, json, |readable| {
        output::table(&readable.iter().collect::<Vec<_>>())
    })
}

/// Prints what could be read; notes the rest, and fails if there is any.
fn print_readable<T: serde::Serialize>(
    found: Vec<dmsnap::Result<T>>,
    json: bool,
    text: impl FnOnce(&[T]) -> String,
) -> Result<(), Failure> {
    let (mut readable, mut unreadable) = (Vec::new(), 0);
    for each in found {
        match each {
            Ok(each) => readable.push(each),
            Err(error) => {
                output::note(error.one_line());
                unreadable += 1;
            }
        }
    }
    if json {
        print_json(&readable)?;
    } else {
        print(text(&readable))?;
    }
    match unreadable {
        0 => Ok(()),
        some => Err(Failure::Unreadable(some)),
    }
}

fn reap(options: &Reap) -> Result<(), Failure> {
    let keep = |info: &SnapshotInfo| {
        options.keep.contains(&info.name) || (options.keep_open && info.open_count > 0)
    };
    let reaped = ReapOptions::new()
        .defer(options.defer)
        .dry_run(options.dry_run)
        .reap(keep)?;
    let failures = reaped.iter().filter_map(|item| item.fate.as_ref().err());
    let failures: Vec<String> = failures.map(dmsnap::Error::one_line).collect();
    if options.json {
        print_json(&reaped)?;
    } else {
        print(reaped.iter().map(output::fate).collect())?;
    }
    failures.iter().for_each(output::note);
    match failures.len() {
        0 => Ok(()),
        failed => Err(Failure::Unreaped(failed)),
    }
}

fn repair(options: &RepairOptions, names: &[String], json: bool) -> Result<(), Failure> {
    let repaired: Vec<Repaired> = match names {
        [] => options.repair_all()?,
        names => names
            .iter()
            .filter_map(|name| repair_one(options, name))
            .collect(),
    };
    let failures = repaired
        .iter()
        .filter_map(|item| item.outcome.as_ref().err());
    let failures: Vec<String> = failures.map(dmsnap::Error::one_line).collect();
    if json {
        print_json(&repaired)?;
    } else {
        print(repaired.iter().map(output::outcome).collect())?;
    }
    failures.iter().for_each(output::note);
    match failures.len() {
        0 => Ok(()),
        failed => Err(Failure::Unrepaired(failed)),
    }
}

/// `None` when there was nothing to do.
fn repair_one(options: &RepairOptions, name: &str) -> Option<Repaired> {
    let outcome = options.repair(name).transpose()?;
    Some(Repaired::new(name, outcome))
}

fn outcome_text(outcome: Outcome) -> String {
    match outcome {
        Outcome::Removed => "removed\n".to_owned(),
        Outcome::AlreadyGone => "already gone\n".to_owned(),
        Outcome::Deferred { open_count } => {
            format!("deferred until its {open_count} users close it\n")
        }
        _ => "done\n".to_owned(),
    }
}

/// One snapshot's, or an array of them.
fn read_handles(file: &str) -> Result<Vec<Handles>, Failure> {
    let from = || if file == "-" { "stdin" } else { file }.to_owned();
    let mut text = String::new();
    let read = if file == "-" {
        io::stdin().read_to_string(&mut text).map(drop)
    } else {
        fs::read_to_string(file).map(|whole| text = whole)
    };
    read.map_err(|source| Failure::Input {
        from: from(),
        source,
    })?;
    let handles = if text.trim_start().starts_with('[') {
        serde_json::from_str(&text)
    } else {
        serde_json::from_str(&text).map(|handles| vec![handles])
    };
    handles.map_err(|source| Failure::Handles {
        from: from(),
        source,
    })
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| Failure::Output(error.into()))?;
    text.push('\n');
    print(text)
}

/// What has to reach its reader: a closed pipe is a failure too.
fn print_all(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| Failure::Output(error.into()))?;
    text.push('\n');
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    written
        .and_then(|()| stdout.flush())
        .map_err(Failure::Output)
}

/// A reader that has seen enough closes the pipe; that is no failure.
fn print(text: String) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}
