//! Where the time goes: how long each kernel call took, kept only where somebody asks.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;

#[cfg(feature = "serde")]
use crate::base::lossy;
use crate::error::Step;

/// How long each step of a create or a removal took.
///
/// ```no_run
/// use dmsnap::SnapshotOptions;
/// use dmsnap::timings::Timings;
///
/// let options = SnapshotOptions::new();
/// let (made, timings) = Timings::of(|| options.create("/images/base.ext4", "/run/vm-42.cow", "vm-42"));
/// eprint!("{timings}"); // a line for each step
/// # let _ = made;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Timings {
    /// From the beginning of the work to its end.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "total_ns", serialize_with = "as_ns")
    )]
    pub total: Duration,
    /// How much of that were the pauses between one attempt and the next, while a device was busy.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "waited_ns", serialize_with = "as_ns")
    )]
    pub waited: Duration,
    /// The calls in the order of their beginnings.
    pub calls: Vec<CallTiming>,
}

/// How long one kernel call took.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CallTiming {
    /// What the kernel was asked for.
    pub step: Step,
    /// The file or device that it was asked of.
    #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::path"))]
    pub on: PathBuf,
    /// When it began, counted from the beginning of the work.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "start_ns", serialize_with = "as_ns")
    )]
    pub start: Duration,
    /// How long it took, with the repetitions at once on EINTR.
    #[cfg_attr(feature = "serde", serde(rename = "took_ns", serialize_with = "as_ns"))]
    pub took: Duration,
    /// The number of the errno that the kernel answered, if it was no success.
    pub errno: Option<i32>,
}

/// All calls of one step together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct StepTiming {
    /// The step.
    pub step: Step,
    /// How often it was made.
    pub count: usize,
    /// How long that took in all.
    #[cfg_attr(feature = "serde", serde(rename = "took_ns", serialize_with = "as_ns"))]
    pub took: Duration,
}

impl Timings {
    /// Calls `work`, and records what this thread asks of the kernel meanwhile through this crate.
    ///
    /// The threads of [`Teardown::cleanup_all`](crate::Teardown::cleanup_all) and of a sweep count as this one: their
    /// calls overlap, so that together they can take longer than the whole. Within another `of`, both have the calls.
    /// Without any, nothing is kept and no clock is read.
    pub fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let start = Instant::now();
        let recording = Recording::begin(start);
        let done = work();
        let total = start.elapsed();
        let record = recording.end();
        absorb(&record);
        let mut calls = record.calls;
        calls.sort_by_key(|call| call.start);
        let timings = Self {
            total,
            waited: record.waited,
            calls,
        };
        (done, timings)
    }

    /// Returns the calls summed up by step, in the order in which each step came first.
    #[must_use]
    pub fn by_step(&self) -> Vec<StepTiming> {
        let mut steps: Vec<StepTiming> = Vec::new();
        for call in &self.calls {
            match steps.iter_mut().find(|known| known.step == call.step) {
                Some(known) => {
                    known.count += 1;
                    known.took += call.took;
                }
                None => steps.push(StepTiming {
                    step: call.step,
                    count: 1,
                    took: call.took,
                }),
            }
        }
        steps
    }

    /// Returns the time that was neither a call nor a pause: the library's own work, and what is asked of the kernel in
    /// passing, such as closing files.
    #[must_use]
    pub fn elsewhere(&self) -> Duration {
        let calls: Duration = self.calls.iter().map(|call| call.took).sum();
        self.total.saturating_sub(calls).saturating_sub(self.waited)
    }
}

/// A table for people: a line for each step, in microseconds.
impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share =
            |took: Duration| 100.0 * took.as_secs_f64() / self.total.as_secs_f64().max(1e-9);
        writeln!(f, "{:<16}{:>6}{:>12}{:>8}", "step", "calls", "us", "share")?;
        let mut line = |what: &str, count: &str, took: Duration| {
            let us = took.as_secs_f64() * 1e6;
            writeln!(f, "{what:<16}{count:>6}{us:>12.1}{:>7.1}%", share(took))
        };
        for StepTiming { step, count, took } in self.by_step() {
            line(&format!("{step:?}"), &count.to_string(), took)?;
        }
        if !self.waited.is_zero() {
            line("waiting", "", self.waited)?;
        }
        line("elsewhere", "", self.elsewhere())?;
        line("total", &self.calls.len().to_string(), self.total)
    }
}

thread_local! {
    /// Apart from the record, as it is looked at before every call: it needs no destructor, so a look is a load.
    static IS_RECORDING: Cell<bool> = const { Cell::new(false) };
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// What was kept so far.
pub(crate) struct Record {
    start: Instant,
    calls: Vec<CallTiming>,
    waited: Duration,
}

/// A record in the making, with the one that it stands in for, which comes back when this ends, by a panic too.
struct Recording {
    outer: Option<Record>,
}

impl Recording {
    fn begin(start: Instant) -> Self {
        let inner = Record {
            start,
            calls: Vec::new(),
            waited: Duration::ZERO,
        };
        IS_RECORDING.set(true);
        Self {
            outer: RECORD.replace(Some(inner)),
        }
    }

    fn end(self) -> Record {
        RECORD.take().unwrap_or_else(|| Record {
            start: Instant::now(),
            calls: Vec::new(),
            waited: Duration::ZERO,
        })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let outer = self.outer.take();
        IS_RECORDING.set(outer.is_some());
        RECORD.set(outer);
    }
}

/// Makes a call, and keeps how long it took if somebody wants to know.
pub(crate) fn call<T>(
    step: Step,
    on: &Path,
    work: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    if !IS_RECORDING.get() {
        return work();
    }
    let start = Instant::now();
    let answer = work();
    let took = start.elapsed();
    with_record(|record| {
        let call = CallTiming {
            step,
            on: on.to_owned(),
            start: start.saturating_duration_since(record.start),
            took,
            errno: answer.as_ref().err().map(|errno| *errno as i32),
        };
        record.calls.push(call);
    });
    answer
}

/// Pauses, and keeps for how long.
pub(crate) fn pause<T>(sleep: impl FnOnce() -> T) -> T {
    if !IS_RECORDING.get() {
        return sleep();
    }
    let start = Instant::now();
    let slept = sleep();
    let took = start.elapsed();
    with_record(|record| record.waited += took);
    slept
}

fn with_record(change: impl FnOnce(&mut Record)) {
    RECORD.with_borrow_mut(|record| record.as_mut().map(change));
}

/// For work that is given to other threads: since when this one keeps a record, if it does.
#[derive(Clone, Copy)]
pub(crate) struct Entrusted(Option<Instant>);

pub(crate) fn entrusted() -> Entrusted {
    Entrusted(RECORD.with_borrow(|record| record.as_ref().map(|record| record.start)))
}

impl Entrusted {
    /// Does `work` on this thread, keeping a record for the one that entrusted it.
    pub(crate) fn keep<T>(self, work: impl FnOnce() -> T) -> (T, Option<Record>) {
        match self.0 {
            None => (work(), None),
            Some(start) => {
                let recording = Recording::begin(start);
                let done = work();
                (done, Some(recording.end()))
            }
        }
    }
}

/// Adds what another record has to this thread's, if it keeps one.
pub(crate) fn absorb(other: &Record) {
    with_record(|record| {
        let later = other.start.saturating_duration_since(record.start);
        record.waited += other.waited;
        let calls = other.calls.iter().cloned().map(|mut call| {
            call.start += later;
            call
        });
        record.calls.extend(calls);
    });
}

#[cfg(feature = "serde")]
fn as_ns<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(step: Step, answer: Result<(), Errno>) {
        let _ = call(step, Path::new("/dev/x"), || {
            std::thread::sleep(Duration::from_millis(1));
            answer
        });
    }

    #[test]
    fn calls_and_pauses_are_kept_only_while_somebody_asks() {
        made(Step::Create, Ok(()));
        let ((), timings) = Timings::of(|| {
            made(Step::Load, Ok(()));
            pause(|| std::thread::sleep(Duration::from_millis(2)));
            made(Step::Remove, Err(Errno::EBUSY));
            made(Step::Load, Ok(()));
        });
        made(Step::Create, Ok(()));
        let steps: Vec<_> = timings.calls.iter().map(|call| call.step).collect();
        assert_eq!(steps, [Step::Load, Step::Remove, Step::Load]);
        assert_eq!(timings.calls[1].errno, Some(16));
        assert_eq!(timings.calls[1].on, Path::new("/dev/x"));
        assert!(timings.calls[0].start + timings.calls[0].took <= timings.calls[1].start);
        assert!(timings.waited >= Duration::from_millis(2));
        let calls: Duration = timings.calls.iter().map(|call| call.took).sum();
        assert_eq!(calls + timings.waited + timings.elsewhere(), timings.total);
        let by_step = timings.by_step();
        assert_eq!((by_step[0].step, by_step[0].count), (Step::Load, 2));
        assert_eq!((by_step[1].step, by_step[1].count), (Step::Remove, 1));
        assert_eq!(by_step.len(), 2);
    }

    #[test]
    fn an_inner_record_is_part_of_the_outer_one_whatever_thread_kept_it() {
        let (inner, outer) = Timings::of(|| {
            made(Step::Create, Ok(()));
            let ((), inner) = Timings::of(|| made(Step::Load, Ok(())));
            let entrusted = entrusted();
            let helper = std::thread::spawn(move || entrusted.keep(|| made(Step::Remove, Ok(()))));
            let ((), record) = helper.join().expect("no panic");
            absorb(&record.expect("a record was wanted"));
            inner
        });
        assert_eq!(inner.calls.len(), 1);
        let steps: Vec<_> = outer.calls.iter().map(|call| call.step).collect();
        assert_eq!(steps, [Step::Create, Step::Load, Step::Remove]);
        assert!(outer.calls.is_sorted_by_key(|call| call.start));
        assert!(entrusted().0.is_none());
    }

    #[test]
    fn a_panic_leaves_no_record_behind() {
        let caught = std::panic::catch_unwind(|| Timings::of(|| panic!("as told")));
        assert!(caught.is_err() && !IS_RECORDING.get() && entrusted().0.is_none());
    }

    #[test]
    fn the_table_has_a_line_for_each_step_and_adds_up() {
        let us = Duration::from_micros;
        let call = |step, took| CallTiming {
            step,
            on: PathBuf::from("/dev/x"),
            start: us(0),
            took: us(took),
            errno: None,
        };
        let timings = Timings {
            total: us(1000),
            waited: us(100),
            calls: vec![
                call(Step::AttachLoop, 200),
                call(Step::Create, 350),
                call(Step::AttachLoop, 300),
            ],
        };
        assert_eq!(
            timings.to_string(),
            "step             calls          us   share\n\
             AttachLoop           2       500.0   50.0%\n\
             Create               1       350.0   35.0%\n\
             waiting                      100.0   10.0%\n\
             elsewhere                     50.0    5.0%\n\
             total                3      1000.0  100.0%\n"
        );
    }
}
