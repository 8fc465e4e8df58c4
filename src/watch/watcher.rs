//! Reads the snapshots of a watch, through the seam.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::track::{Bounds, LONGEST, Track};
use super::{Change, WatchEvent};
use crate::base::{ChunkSize, DeviceId, DeviceNumber, DeviceUuid, MAPPER_DIR};
use crate::call::ask;
use crate::dm::Target;
use crate::error::{Error, Refusal, Result, Step, Verdict};
use crate::find;
use crate::kernel::{DevId, Host, MAPPER_CONTROL};

/// The inside of a [`Watch`](super::Watch).
pub(super) struct Watcher<'h, H: Host> {
    host: &'h H,
    pub(super) events: H::Events,
    pub(super) bounds: Bounds,
    pub(super) watched: Vec<Watched>,
    /// The uuids of those, by which an addition finds whether it is one of them.
    known: HashSet<DeviceUuid>,
    /// Until when events do not make it read all snapshots.
    rest: Duration,
    /// True if all snapshots are to be read after that.
    woken: bool,
}

#[derive(Debug)]
pub(super) struct Watched {
    name: String,
    uuid: DeviceUuid,
    number: DeviceNumber,
    path: PathBuf,
    track: Track,
}

impl<'h, H: Host> Watcher<'h, H> {
    pub(super) fn new(host: &'h H) -> Result<Self> {
        let control = Path::new(MAPPER_CONTROL);
        let events = ask(Step::OpenMapper, control, || host.open_events())?;
        ask(Step::OpenMapper, control, || host.open_mapper())?;
        Ok(Self {
            host,
            events,
            bounds: Bounds::default(),
            watched: Vec::new(),
            known: HashSet::new(),
            rest: Duration::ZERO,
            woken: false,
        })
    }

    pub(super) fn add(&mut self, device: &DeviceId) -> Result<()> {
        let (device, uuid) = find::find_snapshot(self.host, device)?;
        let path = Path::new(MAPPER_DIR).join(&device.name);
        let table = ask(Step::Status, &path, || {
            self.host.table(DevId::Uuid(&uuid), false)
        })?;
        let chunk = table.and_then(|(kind, text)| chunk_of(&kind, &text));
        let Some(chunk) = chunk else {
            return Err(Refusal::NotLive { name: device.name }.into());
        };
        if !self.known.insert(uuid.clone()) {
            self.watched.retain(|watched| watched.uuid != uuid);
        }
        self.watched.push(Watched {
            name: device.name,
            number: device.number,
            uuid,
            path,
            track: Track::new(chunk),
        });
        Ok(())
    }

    pub(super) fn forget(&mut self, device: &DeviceId) -> bool {
        let before = self.watched.len();
        let is_it = |each: &Watched| match device {
            DeviceId::Name(name) => each.name == *name,
            DeviceId::Uuid(uuid) => each.uuid.as_str() == uuid,
            DeviceId::Number(number) => each.number == *number,
            DeviceId::Path(path) => each.path == *path || each.number.dm_node() == *path,
        };
        let known = &mut self.known;
        self.watched.retain(|watched| {
            let stays = !is_it(watched);
            if !stays {
                known.remove(&watched.uuid);
            }
            stays
        });
        self.watched.len() < before
    }

    pub(super) fn check(&mut self) -> Result<Vec<WatchEvent>> {
        // It is armed before anything is read: what happens from here on ends the next wait.
        self.woken |= self.poll(Duration::ZERO).unwrap_or(true);
        ask(Step::ArmPoll, Path::new(MAPPER_CONTROL), || {
            self.host.arm(&self.events)
        })?;
        let begin = self.host.now();
        let all = self.woken && begin >= self.rest;
        let (host, bounds, known) = (self.host, self.bounds, &mut self.known);
        let mut news = Vec::new();
        self.watched.retain_mut(|watched| {
            if !all && !watched.track.is_due(begin) {
                return true;
            }
            let (change, stays) = watched.look(host, bounds);
            news.extend(change.map(|change| WatchEvent {
                name: watched.name.clone(),
                uuid: watched.uuid.clone(),
                change,
            }));
            if !stays {
                known.remove(&watched.uuid);
            }
            stays
        });
        if all {
            let end = self.host.now();
            self.rest = end + end.saturating_sub(begin) * 3;
            self.woken = false;
        }
        Ok(news)
    }

    pub(super) fn pause(&self) -> Duration {
        let due = self.watched.iter().map(|watched| watched.track.due());
        let due = due.chain(self.woken.then_some(self.rest)).min();
        let now = self.host.now();
        due.map_or(LONGEST, |due| due.saturating_sub(now))
    }

    /// Waits for an event; returns true if there was one. A signal that is caught ends the wait.
    pub(super) fn poll(&self, at_most: Duration) -> Result<bool> {
        match self.host.poll(&self.events, at_most) {
            Ok(ready) => Ok(ready),
            Err(errno) => {
                let error = Error::failed(Step::ArmPoll, MAPPER_CONTROL, errno);
                match error.verdict() {
                    Some(Verdict::Again) => Ok(false),
                    _ => Err(error),
                }
            }
        }
    }
}

impl Watched {
    /// Reads one snapshot; returns the change, and false if it is not to be watched any more.
    fn look<H: Host>(&mut self, host: &H, bounds: Bounds) -> (Option<Change>, bool) {
        let seen = ask(Step::Status, &self.path, || {
            host.glance(&self.uuid, &self.name)
        });
        let now = host.now();
        match seen {
            Ok(status) => (self.track.see(now, status, bounds), true),
            Err(error) if error.verdict() == Some(Verdict::Gone) => (Some(Change::Gone), false),
            Err(error) => {
                let news = self.track.miss(now);
                (news.then_some(Change::Unreadable(error)), true)
            }
        }
    }
}

fn chunk_of(kind: &str, params: &str) -> Option<ChunkSize> {
    match Target::parse(kind, params) {
        Ok(Target::Snapshot(params) | Target::SnapshotMerge(params)) => Some(params.chunk),
        _ => None,
    }
}
