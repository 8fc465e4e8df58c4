//! `dmsnap watch`: grows COW files that fill up, and says what it sees.

use std::fmt::{self, Display};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

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
    // A log that cannot be written is no reason to let a disk run full.
    let mut unlogged = None;
    loop {
        let events = watch.check()?;
        // All of them grown first, and told of then: whoever reads may be slow.
        let grown: Vec<_> = events.iter().map(|event| grow(options, event)).collect();
        for (event, grown) in events.iter().zip(&grown) {
            let told = tell(options, event, seen(event));
            let grown = grown.as_ref();
            let told = told.and_then(|()| grown.map_or(Ok(()), |line| tell(options, line, line)));
            if let (Err(failure), None) = (told, &unlogged) {
                output::note(chain(&failure));
                unlogged = Some(failure);
            }
        }
        if watch.is_empty() || wait(&watch, &signals)? {
            return unlogged.map_or(Ok(()), |_| Err(Failure::Unlogged));
        }
    }
}

/// Waits until there is something to check; says whether a signal came.
fn wait(watch: &dmsnap::watch::Watch, signals: &UnixStream) -> Result<bool, Failure> {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = [readable(watch.as_fd()), readable(signals.as_fd())];
    let millis = watch.pause().as_micros().div_ceil(1000);
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds[1].any().unwrap_or(false)),
        Err(errno) => Err(Failure::Wait(errno.into())),
    }
}

/// Makes the COW file of one that is above the threshold longer, if that was asked for.
fn grow<'a>(options: &Watch, event: &'a WatchEvent) -> Option<Grown<'a>> {
    let (Change::Above(usage), Some(by)) = (&event.change, options.grow_by) else {
        return None;
    };
    let total = usage.total.to_bytes().unwrap_or(u64::MAX);
    let most = options.max.unwrap_or(u64::MAX);
    let mut grown = Grown {
        name: &event.name,
        uuid: &event.uuid,
        event: "at-max",
        usage: Some(*usage),
        error: None,
        status: None,
    };
    if total >= most {
        return Some(grown);
    }
    let wanted = wanted(*usage, options.at, by).min(most);
    let mut how = GrowOptions::new();
    how.reserve(options.reserve);
    (grown.event, grown.usage) = ("grow-failed", None);
    match how.grow(DeviceId::Name(event.name.clone()), wanted) {
        Ok(SnapshotStatus::Usage(usage)) => (grown.event, grown.usage) = ("grown", Some(usage)),
        Ok(other) => grown.status = Some(other),
        Err(error) => grown.error = Some(error),
    }
    Some(grown)
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
struct Grown<'a> {
    name: &'a str,
    uuid: &'a DeviceUuid,
    /// `grown`, `at-max` or `grow-failed`.
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<dmsnap::Error>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<SnapshotStatus>,
}

impl Display for Grown<'_> {
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
