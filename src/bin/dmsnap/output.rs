//! What the command prints: JSON with stable keys, tables for people, failures on one line.

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use dmsnap::Store;
use dmsnap::base::{DeviceNumber, DeviceUuid};
use dmsnap::dm::{SnapshotStatus, Usage};
use dmsnap::find::{LoopFacts, SnapshotInfo, State};
use dmsnap::teardown::{Fate, Reaped, Repair};

use crate::Failure;

/// A snapshot as `list --json` and `status --json` print it. The keys are stable; new ones may be added.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Entry<'a> {
    name: &'a str,
    uuid: &'a DeviceUuid,
    dev: DeviceNumber,
    device: String,
    state: State,
    merging: bool,
    deferred_remove: bool,
    interrupted: bool,
    open_count: u32,
    store: Option<Store>,
    chunk_sectors: Option<u64>,
    origin: Option<LoopEntry>,
    cow: Option<LoopEntry>,
    /// `usage`, `invalid`, `overflow`, `merge-failed`, or the kernel's own text.
    status: Option<String>,
    /// In 512-byte sectors.
    usage: Option<Usage>,
}

#[derive(Debug, serde::Serialize)]
struct LoopEntry {
    device: String,
    path: Option<String>,
    backing: Option<dmsnap::base::FileId>,
    diskseq: Option<u64>,
}

impl From<&LoopFacts> for LoopEntry {
    fn from(facts: &LoopFacts) -> Self {
        Self {
            device: text(&facts.device),
            path: facts.path.as_deref().map(text),
            backing: facts.backing,
            diskseq: facts.diskseq,
        }
    }
}

impl<'a> From<&'a SnapshotInfo> for Entry<'a> {
    fn from(info: &'a SnapshotInfo) -> Self {
        let status = info.status.as_ref().map(|status| match status {
            SnapshotStatus::Usage(_) => "usage".to_owned(),
            SnapshotStatus::Invalid => "invalid".to_owned(),
            SnapshotStatus::Overflow => "overflow".to_owned(),
            SnapshotStatus::MergeFailed => "merge-failed".to_owned(),
            other => other.to_string(),
        });
        let usage = match info.status {
            Some(SnapshotStatus::Usage(usage)) => Some(usage),
            _ => None,
        };
        Self {
            name: &info.name,
            uuid: &info.uuid,
            dev: info.dev,
            device: format!("/dev/dm-{}", info.dev.minor),
            state: info.state,
            merging: info.merging,
            deferred_remove: info.deferred_remove,
            interrupted: info.interrupted,
            open_count: info.open_count,
            store: info.params.as_ref().map(|params| params.store),
            chunk_sectors: info.params.as_ref().map(|params| params.chunk.into()),
            origin: info.origin.as_ref().map(LoopEntry::from),
            cow: info.cow.as_ref().map(LoopEntry::from),
            status,
            usage,
        }
    }
}

/// JSON has no other bytes than UTF-8: what is not is shown as U+FFFD.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A line for each snapshot.
pub(crate) fn table(snapshots: &[&SnapshotInfo]) -> String {
    let mut rows =
        vec![["NAME", "DEVICE", "STATE", "OPEN", "USED", "ORIGIN", "COW"].map(str::to_owned)];
    for info in snapshots {
        let entry = Entry::from(*info);
        let used = match (&entry.usage, &entry.status) {
            (Some(usage), _) => format!("{}/{}", usage.allocated, usage.total),
            (None, Some(status)) => status.clone(),
            (None, None) => "-".to_owned(),
        };
        let state = match info.state {
            State::NoTable => "no table",
            State::Loaded => "loaded",
            State::Live => "live",
            State::Suspended => "suspended",
            _ => "unknown",
        };
        let merging = if info.merging { ", merging" } else { "" };
        let due = if info.deferred_remove {
            ", removal due"
        } else {
            ""
        };
        let interrupted = if info.interrupted {
            ", interrupted"
        } else {
            ""
        };
        let path = |facts: &Option<LoopEntry>| facts.as_ref().and_then(|facts| facts.path.clone());
        rows.push([
            info.name.clone(),
            entry.device,
            format!("{state}{interrupted}{merging}{due}"),
            info.open_count.to_string(),
            used,
            path(&entry.origin).unwrap_or_else(|| "-".to_owned()),
            path(&entry.cow).unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    aligned(&rows)
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

/// An error and its sources on one line, each printed once.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        line = format!("{line}: {source}");
        next = source.source();
    }
    line
}

/// A line on stderr that is no failure.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "dmsnap: {text}");
}

/// The failure on one line of stderr.
pub(crate) fn failure(failure: &Failure) -> ExitCode {
    let line = match failure {
        Failure::Snapshot(error) => whole(error),
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

/// On one line the chain of the first cause, then those of what else was left behind.
pub(crate) fn whole(error: &dmsnap::Error) -> String {
    let mut line = chain(error);
    for leftover in error.left() {
        let reason = chain(&leftover.error);
        if !line.contains(&reason) {
            line = format!("{line}; {reason}");
        }
    }
    line.replace('\n', " ")
}

/// An item of a sweep, as `reap` prints it. The keys are stable; new ones may be added.
#[derive(Debug, serde::Serialize)]
pub(crate) struct ReapedEntry {
    name: String,
    uuid: Option<DeviceUuid>,
    /// `kept`, `in-progress`, `busy`, `due`, `removed`, `deferred`, `alias-removed` or `failed`.
    fate: &'static str,
    open_count: Option<u32>,
    error: Option<String>,
}

impl From<&Reaped> for ReapedEntry {
    fn from(item: &Reaped) -> Self {
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
        Self {
            name: item.name.clone(),
            uuid: item.snapshot.as_ref().map(|info| info.uuid.clone()),
            fate,
            open_count,
            error: item.fate.as_ref().err().map(whole),
        }
    }
}

impl Display for ReapedEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = self
            .open_count
            .map(|count| format!(" (open count {count})"));
        writeln!(
            f,
            "{}: {}{}",
            self.name,
            self.fate,
            open.unwrap_or_default()
        )
    }
}

/// A device that needed a repair, as `repair` prints it. The keys are stable; new ones may be added.
#[derive(Debug, serde::Serialize)]
pub(crate) struct RepairedEntry {
    name: String,
    /// `resumed`, `undone`, `finished`, `in-progress` or `failed`.
    outcome: &'static str,
    error: Option<String>,
}

impl From<&(String, dmsnap::Result<Repair>)> for RepairedEntry {
    fn from((name, done): &(String, dmsnap::Result<Repair>)) -> Self {
        let outcome = match done {
            Ok(Repair::Resumed) => "resumed",
            Ok(Repair::Undone) => "undone",
            Ok(Repair::Finished) => "finished",
            Ok(Repair::InProgress) => "in-progress",
            Ok(_) => "unknown",
            Err(_) => "failed",
        };
        Self {
            name: name.clone(),
            outcome,
            error: done.as_ref().err().map(whole),
        }
    }
}

impl Display for RepairedEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}: {}", self.name, self.outcome)
    }
}
