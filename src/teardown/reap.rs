//! The sweep: takes down those of dmsnap's devices that `keep` is not true for and nobody has open.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
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

/// Options for a reap (a sweep), and the call that does it: it takes down the snapshots that nobody needs, such as
/// those that a dead control plane left, also half-made ones.
///
/// Call it when a control plane starts. It sees all dmsnap devices of the host, those of other control planes too, so
/// `keep` has to be true for theirs. It looks at no other program's devices.
///
/// A snapshot that was made, or claimed from a pool, and not yet opened by its VMM is taken down unless `keep` is true
/// for it. `keep` is not asked about what no caller can use: a half-made snapshot whose process is dead, what a dead
/// pool had ready (`dmsnap-pool-...`), and the device of a merge whose process is dead (`dmsnap-merge-...`; the merge
/// can be repeated, and nothing is lost). COW files stay, except those that a dead pool had ready.
///
/// A snapshot that another process is making at this moment is left alone: that process holds a lock, which the kernel
/// frees when it is done or dead.
///
/// ```no_run
/// use dmsnap::ReapOptions;
///
/// let living = ["acme-vm-1", "acme-vm-2"];
/// // Other prefixes are other control planes': they stay.
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

/// A device that a sweep looked at, and what became of it.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Reaped {
    /// The dm device's name.
    pub name: String,
    /// Its state before the sweep; `None` if that could not be read (it stays then, and `keep` was not asked), or if it
    /// was an alias alone.
    pub snapshot: Option<SnapshotInfo>,
    /// What became of it, or why taking it down failed. A failure does not stop the sweep.
    #[cfg_attr(feature = "serde", serde(flatten, serialize_with = "flat"))]
    pub fate: Result<Fate>,
}

/// Serialises a fate, or `failed` with its error.
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

/// What became of a device in a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "fate", rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Fate {
    /// The caller's `keep` was true for it; it stays.
    Kept,
    /// A live process is making it or at work on it, or it became another snapshot during the sweep. It was left alone:
    /// look again later.
    InProgress,
    /// Somebody has it open; it was left alone.
    Busy {
        /// How many users have it open.
        open_count: u32,
    },
    /// It would have been removed, but this was a dry run.
    Due,
    /// It was removed, and its loop devices were detached.
    Removed,
    /// The kernel removes it when its last user closes it.
    Deferred {
        /// How many users have it open.
        open_count: u32,
    },
    /// It belongs to a [`Pool`](crate::Pool) whose process is alive, and nobody has claimed it; it stays.
    Pooled,
    /// It was an alias of dmsnap's below /dev/mapper whose device is gone; the alias was removed.
    AliasRemoved,
}

impl ReapOptions {
    /// Makes the default options: remove what nobody has open, and leave the rest.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the kernel removes devices that are open at their last close; by default they are left alone.
    pub fn defer(&mut self, defer: bool) -> &mut Self {
        self.defer = defer;
        self
    }

    /// Sets how long to wait for the loop devices of a removed device, which a probe may have open for a moment: 2
    /// seconds for each by default. Dm devices that are open are never waited for.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = Some(deadline);
        self
    }

    fn retry(&self) -> Retry {
        const MOMENT: Duration = Duration::from_secs(2);
        Retry::until(self.deadline.unwrap_or(MOMENT))
    }

    /// Sets whether to return only what would be removed, and to remove and repair nothing.
    pub fn dry_run(&mut self, dry_run: bool) -> &mut Self {
        self.dry_run = dry_run;
        self
    }

    /// Takes down all of dmsnap's devices on the host for which `keep` is false; returns what became of each. Devices
    /// that a killed process left in the middle of an operation are [`repaired`](super::repair()) first, also those
    /// that are kept.
    ///
    /// `keep` is asked about all devices before any is taken down. The others are taken down side by side, as
    /// [`Teardown::cleanup_all`](crate::Teardown::cleanup_all) does.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`](crate::Error::Failed) if device-mapper cannot be asked for its devices at all. What fails for
    /// one device is in its [`Reaped::fate`].
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
            unrepaired = repair::repair_every(host, &at_work::MAKER_RETRY)?;
            found = find::all(host)?;
        }
        // This comes before `keep` is asked: `keep` can know of a snapshot whose maker is done by then.
        let mut making: Vec<_> = found
            .iter()
            .map(|(_, info)| match info {
                Ok(info) => at_work::in_progress(host, info, &Retry::ONCE),
                Err(_) => Ok(false),
            })
            .collect();
        // A lock may be a probe's instead of a maker's. It waits for those, for all devices at once.
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
        self.reap_those(host, &mut reaped, |fate| *fate == Ok(Fate::Due));
        // A snapshot of a snapshot goes from the top down: what stood on another is gone by now.
        let removed = |reaped: &[Reaped]| {
            let gone = reaped.iter().filter(|item| item.fate == Ok(Fate::Removed));
            gone.count()
        };
        let mut before = 0;
        while !self.dry_run && removed(&reaped) > before {
            before = removed(&reaped);
            self.reap_those(host, &mut reaped, |fate| {
                matches!(fate, Ok(Fate::Busy { .. }))
            });
        }
        let there = reaped.iter().filter(|item| item.fate != Ok(Fate::Removed));
        let there = there.map(|item| item.name.clone()).collect();
        reaped.extend(self.sweep_aliases(host, &there));
        // An alias whose device is gone is not needed any more.
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

    /// Takes down those of such a fate, and notes what became of them.
    fn reap_those<H: Host + Sync>(
        &self,
        host: &H,
        reaped: &mut [Reaped],
        such: impl Fn(&Result<Fate>) -> bool,
    ) {
        let due = reaped.iter_mut().filter(|item| such(&item.fate));
        let (due, fates): (Vec<_>, Vec<_>) = due
            .filter_map(|item| Some((item.snapshot.as_ref()?, &mut item.fate)))
            .unzip();
        let became = in_parallel(&due, |info| self.reap_one(host, info));
        for (fate, became) in fates.into_iter().zip(became) {
            *fate = became;
        }
    }

    fn reap_one<H: Host>(&self, host: &H, info: &SnapshotInfo) -> Result<Fate> {
        if pool_mark::is_alive(host, &info.name)? {
            return Ok(Fate::Pooled);
        }
        // Its maker may have finished meanwhile, or a pool's device may have become another snapshot by a claim: then
        // it is not what `keep` was asked about.
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

    /// Removes aliases of dmsnap's whose device another program removed. Those of devices that are `there` stay.
    fn sweep_aliases<H: Host>(&self, host: &H, there: &HashSet<String>) -> Vec<Reaped> {
        let entries = host.entries(Path::new(MAPPER_DIR)).into_iter();
        let is_there = |path: &PathBuf| {
            let name = path.file_name().and_then(OsStr::to_str);
            name.is_some_and(|name| there.contains(name))
        };
        entries
            .filter(|path| !is_there(path))
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

/// True if a caller can use it: it was made to its end, under a name that a caller gave.
fn is_a_callers(info: &SnapshotInfo) -> bool {
    let made = !matches!(info.state, State::NoTable | State::Loaded);
    let named = ![POOLED, MERGING]
        .iter()
        .any(|own| info.name.starts_with(own));
    made && named
}
