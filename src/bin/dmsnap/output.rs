//! What the command prints for people: tables, and failures on one line. JSON is the library's types as they are.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use dmsnap::dm::SnapshotStatus;
use dmsnap::error::chain;
use dmsnap::find::{LoopFacts, SnapshotInfo, State};
use dmsnap::teardown::{Fate, Reaped, Repair, Repaired};

use crate::Failure;

/// A line for each snapshot.
pub(crate) fn table(snapshots: &[&SnapshotInfo]) -> String {
    let mut rows =
        vec![["NAME", "DEVICE", "STATE", "OPEN", "USED", "ORIGIN", "COW"].map(str::to_owned)];
    for info in snapshots {
        let path = |facts: &Option<LoopFacts>| match facts
            .as_ref()
            .and_then(|facts| facts.path.as_ref())
        {
            Some(path) => path.display().to_string(),
            None => "-".to_owned(),
        };
        rows.push([
            info.name.clone(),
            info.device.display().to_string(),
            state(info),
            info.open_count.to_string(),
            used(info),
            path(&info.origin),
            path(&info.cow),
        ]);
    }
    aligned(&rows)
}

/// How far it got, and what is special about it.
pub(crate) fn state(info: &SnapshotInfo) -> String {
    let state = match info.state {
        State::NoTable => "no table",
        State::Loaded => "loaded",
        State::Live => "live",
        State::Suspended => "suspended",
        _ => "unknown",
    };
    let also = [
        (info.interrupted, ", interrupted"),
        (info.merging, ", merging"),
        (info.deferred_remove, ", removal due"),
    ];
    let also = also.iter().filter(|(is, _)| *is).map(|(_, word)| *word);
    format!("{state}{}", also.collect::<String>())
}

/// Sectors in use of those there are, or what the kernel says instead.
pub(crate) fn used(info: &SnapshotInfo) -> String {
    match &info.status {
        Some(SnapshotStatus::Usage(usage)) => format!("{}/{}", usage.allocated, usage.total),
        Some(SnapshotStatus::Invalid) => "invalid".to_owned(),
        Some(SnapshotStatus::Overflow) => "overflow".to_owned(),
        Some(SnapshotStatus::MergeFailed) => "merge-failed".to_owned(),
        Some(other) => other.to_string(),
        None => "-".to_owned(),
    }
}

fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A line on stderr that is no failure.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "dmsnap: {text}");
}

/// The failure on one line of stderr.
pub(crate) fn failure(failure: &Failure) -> ExitCode {
    let line = match failure {
        Failure::Snapshot(error) => error.one_line(),
        other => chain(other),
    };
    note(line);
    match failure {
        Failure::Stopped { signal, .. } | Failure::Interrupted(signal) => {
            ExitCode::from(128 + signal)
        }
        _ => ExitCode::FAILURE,
    }
}

/// An item of a sweep on a line.
pub(crate) fn fate(item: &Reaped) -> String {
    let (fate, open_count) = match &item.fate {
        Ok(Fate::Kept) => ("kept", None),
        Ok(Fate::InProgress) => ("in-progress", None),
        Ok(Fate::Pooled) => ("pooled", None),
        Ok(Fate::Busy { open_count }) => ("busy", Some(*open_count)),
        Ok(Fate::Due) => ("due", None),
        Ok(Fate::Removed) => ("removed", None),
        Ok(Fate::Deferred { open_count }) => ("deferred", Some(*open_count)),
        Ok(Fate::AliasRemoved) => ("alias-removed", None),
        Ok(_) => ("unknown", None),
        Err(_) => ("failed", None),
    };
    let open = open_count.map(|count| format!(" (open count {count})"));
    format!("{}: {fate}{}\n", item.name, open.unwrap_or_default())
}

/// A device that needed a repair, on a line.
pub(crate) fn outcome(item: &Repaired) -> String {
    let outcome = match &item.outcome {
        Ok(Repair::Resumed) => "resumed",
        Ok(Repair::Undone) => "undone",
        Ok(Repair::Finished) => "finished",
        Ok(Repair::InProgress) => "in-progress",
        Ok(_) => "unknown",
        Err(_) => "failed",
    };
    format!("{}: {outcome}\n", item.name)
}
