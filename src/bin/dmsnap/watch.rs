//! `dmsnap watch`: grows COW files that fill up, and says what it sees.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use dmsnap::DeviceId;
use dmsnap::base::DeviceUuid;
use dmsnap::dm::{SnapshotStatus, Usage};
use dmsnap::error::chain;
use dmsnap::snapshot::GrowOptions;
use dmsnap::watch::{Change, WatchEvent};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::args::Watch;
use crate::{Failure, interrupt, output, print};

/// Watches until every snapshot is gone, or until SIGINT or SIGTERM, which is how it is meant to be ended.
pub(crate) fn watch(options: &Watch) -> Result<(), Failure> {
    let signals = interrupt::readable().map_err(Failure::Signals)?;
    let mut watch = dmsnap::watch::Watch::new()?;
    watch.threshold(options.at);
    for name in &options.names {
        watch.add(name)?;
        if options.grow_by.is_some() {
            GrowOptions::new().probe(name)?;
        }
    }
    let mut growth = Growth::new().map_err(Failure::Signals)?;
    // A log that cannot be written is no reason to let a disk run full.
    let mut unlogged = None;
    let mut note = |told: Result<(), Failure>| {
        if let (Err(failure), None) = (told, &unlogged) {
            output::note(chain(&failure));
            unlogged = Some(failure);
        }
    };
    loop {
        let events = watch.check()?;
        // All of them begun to be grown first, and told of then: whoever reads may be slow.
        events.iter().for_each(|event| growth.begin(options, event));
        for event in &events {
            note(tell(options, event, seen(event)));
        }
        let is_last = watch.is_empty();
        while let Some(grown) = growth.next(options, is_last) {
            note(tell(options, &grown, &grown));
        }
        if is_last || wait(&watch, &signals, &growth.ended)? {
            return unlogged.map_or(Ok(()), |_| Err(Failure::Unlogged));
        }
    }
}

/// The COW files that are being grown, by a thread each: one on a file system that hangs, or is frozen, holds up no other.
struct Growth {
    /// By their snapshots' uuids; with the last that was told of one meanwhile.
    begun: HashMap<String, Option<(WatchEvent, Usage)>>,
    sender: Sender<Grown>,
    receiver: Receiver<Grown>,
    /// Readable when one has ended.
    ended: UnixStream,
    end: UnixStream,
}

impl Growth {
    fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let (ended, end) = UnixStream::pair()?;
        ended.set_nonblocking(true)?;
        end.set_nonblocking(true)?;
        Ok(Self {
            begun: HashMap::new(),
            sender,
            receiver,
            ended,
            end,
        })
    }

    /// Has one grown that is above the threshold; once more, if it is being grown and that is not enough.
    fn begin(&mut self, options: &Watch, event: &WatchEvent) {
        let (Change::Above(usage), Some(by)) = (&event.change, options.grow_by) else {
            return;
        };
        if let Some(meanwhile) = self.begun.get_mut(event.uuid.as_str()) {
            *meanwhile = Some((event.clone(), *usage));
            return;
        }
        let most = options.max.unwrap_or(u64::MAX);
        let (sender, mut grown) = (self.sender.clone(), Grown::at_max(event, *usage));
        if usage.total.to_bytes().unwrap_or(u64::MAX) >= most {
            let _ = sender.send(grown);
            return;
        }
        let wanted = wanted(*usage, options.at, by).min(most);
        let (reserve, end) = (options.reserve, self.end.try_clone());
        self.begun.insert(event.uuid.to_string(), None);
        thread::spawn(move || {
            grown.grow(wanted, reserve);
            let _ = sender.send(grown);
            // One that is full is readable.
            let _ = end.map(|mut end| end.write(&[0]));
        });
    }

    /// One that has ended; to the last of them if that is `waited` for.
    fn next(&mut self, options: &Watch, waited: bool) -> Option<Grown> {
        let mut read = [0; 64];
        while matches!(self.ended.read(&mut read), Ok(1..)) {}
        let grown = if waited && !self.begun.is_empty() {
            self.receiver.recv().ok()
        } else {
            self.receiver.try_recv().ok()
        };
        let grown = grown?;
        let meanwhile = self.begun.remove(grown.uuid.as_str()).flatten();
        // What was told of it before it was longer is no news.
        let still = |told: &Usage| grown.usage.is_none_or(|usage| told.total >= usage.total);
        if let Some((event, _)) = meanwhile.filter(|(_, told)| !waited && still(told)) {
            self.begin(options, &event);
        }
        Some(grown)
    }
}

/// Waits until there is something to check, or to tell; says whether a signal came.
fn wait(
    watch: &dmsnap::watch::Watch,
    signals: &UnixStream,
    grown: &UnixStream,
) -> Result<bool, Failure> {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = [
        readable(watch.as_fd()),
        readable(signals.as_fd()),
        readable(grown.as_fd()),
    ];
    let millis = watch.pause().as_micros().div_ceil(1000);
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds[1].any().unwrap_or(false)),
        Err(errno) => Err(Failure::Wait(errno.into())),
    }
}

/// The size that is below the threshold again, in steps of `by` bytes.
fn wanted(usage: Usage, at: u8, by: u64) -> u64 {
    let [allocated, total] =
        [usage.allocated, usage.total].map(|each| u128::from(each.count()) * 512);
    let least = allocated * 100 / u128::from(at.max(1)) + 1;
    let steps = least.saturating_sub(total).div_ceil(u128::from(by)).max(1);
    u64::try_from(total + steps * u128::from(by)).unwrap_or(u64::MAX)
}

fn tell(options: &Watch, json: &impl serde::Serialize, text: impl Display) -> Result<(), Failure> {
    if !options.json {
        return print(format!("{text}\n"));
    }
    let mut text = serde_json::to_string(json).map_err(|error| Failure::Output(error.into()))?;
    text.push('\n');
    print(text)
}

/// What became of growing one: an event of the command's own, beside those of the library.
#[derive(Clone, Debug, serde::Serialize)]
struct Grown {
    name: String,
    uuid: DeviceUuid,
    /// `grown`, `at-max` or `grow-failed`.
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<dmsnap::Error>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<SnapshotStatus>,
}

impl Grown {
    fn at_max(event: &WatchEvent, usage: Usage) -> Self {
        Self {
            name: event.name.clone(),
            uuid: event.uuid.clone(),
            event: "at-max",
            usage: Some(usage),
            error: None,
            status: None,
        }
    }

    /// Makes the COW file of one that is above the threshold longer.
    fn grow(&mut self, wanted: u64, reserve: bool) {
        let mut how = GrowOptions::new();
        how.reserve(reserve);
        (self.event, self.usage) = ("grow-failed", None);
        match how.grow(DeviceId::Name(self.name.clone()), wanted) {
            Ok(SnapshotStatus::Usage(usage)) => (self.event, self.usage) = ("grown", Some(usage)),
            Ok(other) => self.status = Some(other),
            Err(error) => self.error = Some(error),
        }
    }
}

impl Display for Grown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.event)?;
        if let Some(usage) = &self.usage {
            used(f, usage)?;
        }
        if let Some(error) = &self.error {
            write!(f, ": {}", error.one_line())?;
        }
        self.status
            .as_ref()
            .map_or(Ok(()), |status| write!(f, ": {status}"))
    }
}

/// An event of the library's on a line.
fn seen(event: &WatchEvent) -> impl Display + '_ {
    struct Seen<'a>(&'a WatchEvent);
    impl Display for Seen<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}: ", self.0.name)?;
            match &self.0.change {
                Change::Above(usage) => {
                    f.write_str("above")?;
                    used(f, usage)
                }
                Change::Overflow => f.write_str("overflow"),
                Change::Invalid => f.write_str("invalid"),
                Change::Gone => f.write_str("gone"),
                Change::MergeFailed => f.write_str("merge-failed"),
                Change::Unreadable(error) => write!(f, "unreadable: {}", error.one_line()),
                other => write!(f, "unknown: {other}"),
            }
        }
    }
    Seen(event)
}

fn used(f: &mut fmt::Formatter<'_>, usage: &Usage) -> fmt::Result {
    let bytes = usage.total.to_bytes().unwrap_or(u64::MAX);
    write!(f, ": {}% of {bytes} bytes", usage.percent())
}

#[cfg(test)]
mod tests {
    use dmsnap::base::Sectors;

    use super::*;

    #[test]
    fn it_grows_in_steps_until_it_is_below_again() {
        let usage = |allocated, total| Usage {
            allocated: Sectors::new(allocated),
            total: Sectors::new(total),
            metadata: Sectors::default(),
        };
        for (allocated, total, at, by, then) in [
            (80, 100, 80, 512, 101),
            (80, 100, 80, 10 * 512, 110),
            (100, 100, 80, 10 * 512, 130),
            (100, 100, 100, 512, 101),
            (108, 100, 50, 100 * 512, 300),
        ] {
            let wanted = wanted(usage(allocated, total), at, by);
            assert_eq!(wanted, then * 512, "{allocated} of {total}");
            let percent = usage(allocated, wanted / 512).percent();
            assert!(percent < at || at == 100, "{percent}");
        }
        assert_eq!(wanted(usage(u64::MAX, u64::MAX), 80, 1), u64::MAX);
    }
}
