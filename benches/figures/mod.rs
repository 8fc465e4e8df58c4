//! Samples and what is said of them: p50, p99 and the ratio to the floor.

pub(crate) mod interval;
pub(crate) mod json;
pub(crate) mod markdown;
pub(crate) mod origin;
pub(crate) mod plot;
pub(crate) mod promises;

use std::time::Duration;

/// What one turn took, for each snapshot of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) create: Duration,
    pub(crate) remove: Duration,
    /// Of a removal of a busy device: from the close to the attempt that succeeded.
    pub(crate) reaction: Option<Duration>,
    /// Whether something of it was still there when the removal returned.
    pub(crate) was_late: bool,
}

/// One contestant's samples of one scenario, in the order in which they were taken.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) contestant: &'static str,
    pub(crate) create: Vec<Duration>,
    pub(crate) remove: Vec<Duration>,
    /// Of those that say when they tried.
    pub(crate) reaction: Vec<Duration>,
    /// After how many removes something of the snapshot was still there.
    pub(crate) late: usize,
}

/// The two that are timed, and their sum.
pub(crate) const VERBS: [&str; 3] = ["create", "remove", "round trip"];

impl Series {
    pub(crate) fn new(contestant: &'static str) -> Self {
        Self {
            contestant,
            create: Vec::new(),
            remove: Vec::new(),
            reaction: Vec::new(),
            late: 0,
        }
    }

    pub(crate) fn push(&mut self, sample: Sample) {
        self.create.push(sample.create);
        self.remove.push(sample.remove);
        self.reaction.extend(sample.reaction);
        self.late += usize::from(sample.was_late);
    }

    /// Of each of [`VERBS`]; a round trip is a create and the remove that followed it.
    pub(crate) fn verbs(&self) -> [Vec<Duration>; 3] {
        let pairs = self.create.iter().zip(&self.remove);
        let round_trip = pairs.map(|(create, remove)| *create + *remove).collect();
        [self.create.clone(), self.remove.clone(), round_trip]
    }

    /// Of each of [`VERBS`].
    pub(crate) fn figures(&self) -> [Figures; 3] {
        self.verbs().map(|samples| Figures {
            p50: percentile(&samples, 50),
            p99: percentile(&samples, 99),
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

/// What came of one scenario; the first series is the floor.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) series: Vec<Series>,
}

impl Outcome {
    pub(crate) fn floor(&self) -> Option<&Series> {
        self.series.first()
    }

    pub(crate) fn samples(&self) -> usize {
        self.floor().map_or(0, |series| series.create.len())
    }

    pub(crate) fn of(&self, contestant: &str) -> Option<&Series> {
        let mut all = self.series.iter();
        all.find(|series| series.contestant == contestant)
    }
}

/// The system calls of one create and one remove, as strace prints them.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) contestant: &'static str,
    pub(crate) create: Vec<String>,
    pub(crate) remove: Vec<String>,
    /// Programs run for either.
    pub(crate) processes: [usize; 2],
}

/// All of a run.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) origin: origin::Origin,
    pub(crate) calls: Vec<Calls>,
    pub(crate) outcomes: Vec<Outcome>,
    /// Scenarios that were asked for and not run, with the reason.
    pub(crate) left_out: Vec<(&'static str, &'static str)>,
}

impl Report {
    pub(crate) fn outcome(&self, name: &str) -> Option<&Outcome> {
        self.outcomes.iter().find(|outcome| outcome.name == name)
    }
}

/// Nearest rank: the least sample that at least `percent` of all samples do not exceed.
fn percentile(samples: &[Duration], percent: usize) -> Duration {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

pub(crate) fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64().max(f64::MIN_POSITIVE)
}
