//! The story of a sweep: what of ours nobody claims any more is taken down, item by item.

use std::path::Path;
use std::time::Duration;

use super::remove::{self, Outcome};
use super::{cleanup, pool_mark, repair};
use crate::base::{MAPPER_DIR, MERGING, POOLED};
use crate::call::{absent, in_parallel};
#[cfg(feature = "serde")]
use crate::error::Error;
use crate::error::{Result, Retry};
use crate::find::{self, SnapshotInfo, State, at_work};
use crate::kernel::{Host, MACHINE};

/// How to reap: take down the snapshots that nobody claims, as a control plane that died leaves them, half-built ones
/// included.
///
/// A snapshot that is made and not yet opened by its VMM is taken down unless `keep` claims it. `keep` is asked about
/// what a caller can have a use for, and not about what goes anyway: a half-made snapshot whose maker is dead, what a
/// dead pool had ready (`dmsnap-pool-...`), a merge's device of a process that is dead (`dmsnap-merge-...`; nothing of it
/// is lost). COW files stay, but for those of a dead pool that nobody had claimed.
///
/// Only devices whose uuid is ours are looked at. A snapshot that another process is making at this moment is left
/// alone: its maker holds a lock that the kernel frees when the maker is done or dead.
///
/// ```no_run
/// use dmsnap::ReapOptions;
///
/// let living = ["acme-vm-1", "acme-vm-2"];
/// // Claims what is not ours by its name: `reap` sees the snapshots of every control plane on the host.
/// let keep = |name: &str| !name.starts_with("acme-") || living.contains(&name);
/// for item in ReapOptions::new().reap(|snapshot| keep(&snapshot.name))? {
///     println!("{}: {:?}", item.name, item.fate);
/// }
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ReapOptions {
    defer: bool,
    dry_run: bool,
    deadline: Option<Duration>,
}

/// One thing that a sweep came by.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Reaped {
    /// The dm device's name.
    pub name: String,
    /// What was known of it before; `None` when it could not be read (`keep` was not asked then, and it stays), or was
    /// an alias alone.
    pub snapshot: Option<SnapshotInfo>,
    /// What became of it, or why that failed. A failure does not stop the sweep.
    #[cfg_attr(feature = "serde", serde(flatten, serialize_with = "flat"))]
    pub fate: Result<Fate>,
}

/// A fate, or `failed` with its error.
#[cfg(feature = "serde")]
fn flat<S: serde::Serializer>(fate: &Result<Fate>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(serde::Serialize)]
    #[serde(tag = "fate", rename_all = "kebab-case")]
    enum Other<'a> {
        Failed { error: &'a Error },
    }
    match fate {
        Ok(fate) => serde::Serialize::serialize(fate, serializer),
        Err(error) => serde::Serialize::serialize(&Other::Failed { error }, serializer),
    }
}

/// What became of a snapshot in a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "fate", rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Fate {
    /// The caller claims it.
    Kept,
    /// Its maker is at work on it, or it became another snapshot during the sweep.
    InProgress,
    /// Somebody has it open; it was left alone.
    Busy {
        /// How many users have it open.
        open_count: u32,
    },
    /// It would have been removed, or deferred, but this was a dry run.
    Due,
    /// It is gone, and its loop devices too.
    Removed,
    /// The kernel removes it when its last user closes it.
    Deferred {
        /// How many users have it open.
        open_count: u32,
    },
    /// It waits in a [`Pool`](crate::Pool) whose process is alive.
    Pooled,
    /// It was an alias of ours below /dev/mapper whose device was gone; it is gone too.
    AliasRemoved,
}

impl ReapOptions {
    /// Removes what nobody has open, and leaves the rest.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Has the kernel remove open devices at their last close.
    pub fn defer(&mut self, defer: bool) -> &mut Self {
        self.defer = defer;
        self
    }

    /// Sets for how long the loop devices behind a removed device are waited for, which a probe may have open for a moment:
    /// 2 seconds for each unless set. Nobody is waited for who has a dm device open.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    fn retry(&self) -> Retry {
        const MOMENT: Duration = Duration::from_secs(2);
        Retry::until(self.deadline.unwrap_or(MOMENT))
    }

    /// Says what would be removed; removes and repairs nothing.
    pub fn dry_run(&mut self, dry_run: bool) -> &mut Self {
        self.dry_run = dry_run;
        self
    }

    /// Sweeps, keeping those that `keep` claims. What a killed process left half-way is [`repaired`](super::repair())
    /// first, also of what is kept.
    ///
    /// `keep` is asked about all of them before any is taken down; the others are taken down side by side, as [`Teardown::cleanup_all`](crate::Teardown::cleanup_all) does.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`](crate::Error::Failed) when device-mapper cannot be asked for its devices at all. What fails
    /// for one snapshot is in its [`Reaped::fate`].
    pub fn reap(&self, mut keep: impl FnMut(&SnapshotInfo) -> bool) -> Result<Vec<Reaped>> {
        self.reap_on(&MACHINE, |info| is_a_callers(info) && keep(info))
    }

    pub(crate) fn reap_on<H: Host + Sync>(
        &self,
        host: &H,
        mut keep: impl FnMut(&SnapshotInfo) -> bool,
    ) -> Result<Vec<Reaped>> {
        let mut found = find::all(host)?;
        let interrupted =
            |info: &Result<SnapshotInfo>| info.as_ref().is_ok_and(|info| info.interrupted);
        let mut unrepaired = Vec::new();
        if !self.dry_run && found.iter().any(|(_, info)| interrupted(info)) {
            unrepaired = repair::repair_every(host)?;
            found = find::all(host)?;
        }
        // Before `keep` is asked: a snapshot whose maker is done by then is one that `keep` can know of.
        let mut making: Vec<_> = found
            .iter()
            .map(|(_, info)| match info {
                Ok(info) => at_work::in_progress(host, info, &Retry::ONCE),
                Err(_) => Ok(false),
            })
            .collect();
        // What looks like a maker may be a probe, which is waited for, for all at once.
        let locked = found.iter().zip(&mut making);
        let (infos, locked): (Vec<_>, Vec<_>) = locked
            .filter(|(_, making)| **making == Ok(true))
            .filter_map(|((_, info), making)| Some((info.as_ref().ok()?, making)))
            .unzip();
        let still = in_parallel(&infos, |info| {
            at_work::in_progress(host, info, &at_work::MAKER_RETRY)
        });
        for (locked, still) in locked.into_iter().zip(still) {
            *locked = still;
        }
        let judge = |(info, making): (Result<SnapshotInfo>, Result<bool>)| {
            let info = info?;
            let fate = making.map(|making| match making {
                true => Fate::InProgress,
                false if keep(&info) => Fate::Kept,
                false => Fate::Due,
            });
            Ok((info, fate))
        };
        let judged = found.into_iter().zip(making);
        let (names, judged): (Vec<_>, Vec<_>) = judged
            .map(|((name, info), making)| (name, (info, making)))
            .unzip();
        let mut reaped: Vec<_> = names
            .into_iter()
            .zip(judged.into_iter().map(judge))
            .map(|(name, judged)| match judged {
                Ok((info, fate)) => Reaped {
                    fate,
                    snapshot: Some(info),
                    name,
                },
                Err(error) => Reaped {
                    fate: Err(error),
                    snapshot: None,
                    name,
                },
            })
            .collect();
        let due = reaped.iter_mut().filter(|item| item.fate == Ok(Fate::Due));
        let (due, fates): (Vec<_>, Vec<_>) = due
            .filter_map(|item| Some((item.snapshot.as_ref()?, &mut item.fate)))
            .unzip();
        let became = in_parallel(&due, |info| self.reap_one(host, info));
        for (fate, became) in fates.into_iter().zip(became) {
            *fate = became;
        }
        reaped.extend(self.sweep_aliases(host));
        // What is gone by now needs none.
        let is_there = |name: &str| {
            reaped
                .iter()
                .any(|item| item.name == name && item.fate != Ok(Fate::Removed))
        };
        let failed = unrepaired.into_iter().filter_map(|item| {
            let error = item.outcome.err()?;
            is_there(&item.name).then_some(Reaped {
                name: item.name,
                snapshot: None,
                fate: Err(error),
            })
        });
        let failed: Vec<_> = failed.collect();
        reaped.extend(failed);
        Ok(reaped)
    }

    fn reap_one<H: Host>(&self, host: &H, info: &SnapshotInfo) -> Result<Fate> {
        if pool_mark::is_alive(host, &info.name)? {
            return Ok(Fate::Pooled);
        }
        // Its maker may have finished since it was looked at, or a pool's device may have become another snapshot, as
        // by a claim: then it is no longer what `keep` was asked about.
        let Some(now) = absent(find::status_of(host, &(&info.uuid).into()))? else {
            return Ok(Fate::Removed);
        };
        let open_count = now.open_count;
        let same = (now.state, &now.name, &now.cow) == (info.state, &info.name, &info.cow);
        if same && (open_count == 0 || self.defer) && !self.dry_run {
            pool_mark::forget_cow(host, &now)?;
        }
        match (same, open_count > 0, self.defer) {
            (false, _, _) => Ok(Fate::InProgress),
            (true, true, false) => Ok(Fate::Busy { open_count }),
            _ if self.dry_run => Ok(Fate::Due),
            (true, _, true) => {
                match cleanup::clean_deferred(host, &now.handles(), &self.retry())? {
                    Outcome::Deferred { open_count } => Ok(Fate::Deferred { open_count }),
                    _ => Ok(Fate::Removed),
                }
            }
            (true, false, false) => {
                cleanup::clean(host, &now.handles(), &self.retry()).map(|_| Fate::Removed)
            }
        }
    }

    /// Links in our spelling whose device another program removed.
    fn sweep_aliases<H: Host>(&self, host: &H) -> Vec<Reaped> {
        let entries = host.entries(Path::new(MAPPER_DIR)).into_iter();
        entries
            .filter_map(|path| self.sweep_alias(host, &path))
            .collect()
    }

    fn sweep_alias<H: Host>(&self, host: &H, path: &Path) -> Option<Reaped> {
        let name = path.file_name()?.to_string_lossy().into_owned();
        let fate = match remove::is_stale_alias(host, path) {
            Ok(false) => return None,
            Ok(true) if self.dry_run => Ok(Fate::Due),
            Ok(true) => match remove::sweep_alias(host, path) {
                Ok(false) => return None,
                swept => swept.map(|_| Fate::AliasRemoved),
            },
            Err(error) => Err(error),
        };
        Some(Reaped {
            name,
            snapshot: None,
            fate,
        })
    }
}

/// Whether a caller can have a use for it: one that was made to its end, under a name that a caller gave.
fn is_a_callers(info: &SnapshotInfo) -> bool {
    let made = !matches!(info.state, State::NoTable | State::Loaded);
    let named = ![POOLED, MERGING]
        .iter()
        .any(|own| info.name.starts_with(own));
    made && named
}
