//! What the library promises of its speed, beside what was seen.

use std::fmt::Write;

use serde_json::{Value, json};

use super::interval::Interval;
use super::{Report, ms, percentile};
use crate::arena::scenarios::{ALONE, AT_ONCE, BUSY, KEPT, PIPELINE, STOPPED};
use crate::contestants::names;

/// What was seen is to be at most, or at least, so much.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

use Bound::{AtLeast, AtMost};

impl Bound {
    fn verdict(self, seen: Interval) -> &'static str {
        let (is_kept, is_missed) = match self {
            AtMost(most) => (seen.high <= most, seen.low > most),
            AtLeast(least) => (seen.low >= least, seen.high < least),
        };
        match (is_kept, is_missed) {
            (true, _) => "kept",
            (_, true) => "missed",
            _ => "cannot tell",
        }
    }

    fn text(self) -> String {
        match self {
            AtMost(most) => format!("at most {most}"),
            AtLeast(least) => format!("at least {least}"),
        }
    }
}

/// One that this run can say something about.
struct Promise {
    what: &'static str,
    bound: Bound,
    seen: Interval,
}

/// One of `VERBS` of a contestant.
type Of = (&'static str, usize);

const CREATE: usize = 0;
const REMOVE: usize = 1;
const ROUND_TRIP: usize = 2;

/// Ratios of p50s: what, the bound, the scenario, and which by which.
fn ratios(origin: &super::origin::Origin) -> Vec<(&'static str, Bound, &'static str, Of, Of)> {
    use names::{FLEET, IOCTLS, LIBRARY, LIBRARY_ALONE, ON_ORIGIN, PROCESSES, WARM_POOL};
    let swaps_fast = !origin.kernel.starts_with("5.");
    let mut ratios = vec![
        (
            "create, of the bare ioctls'",
            AtMost(1.05),
            ALONE,
            (LIBRARY, CREATE),
            (IOCTLS, CREATE),
        ),
        (
            "remove, of the bare ioctls'",
            AtMost(1.05),
            ALONE,
            (LIBRARY, REMOVE),
            (IOCTLS, REMOVE),
        ),
        (
            "create on a shared origin, of the bare ioctls' create",
            AtMost(1.0),
            KEPT,
            (ON_ORIGIN, CREATE),
            (IOCTLS, CREATE),
        ),
        (
            "claim, of the bare ioctls' create",
            AtMost(0.03),
            KEPT,
            (WARM_POOL, CREATE),
            (IOCTLS, CREATE),
        ),
        (
            "release, of the bare ioctls' remove of a last snapshot",
            AtMost(if swaps_fast { 0.1 } else { 1.0 }),
            KEPT,
            (WARM_POOL, REMOVE),
            (IOCTLS, REMOVE),
        ),
    ];
    if swaps_fast {
        ratios.push((
            "the bare ioctls' create and remove, of claim and release",
            AtLeast(20.0),
            KEPT,
            (IOCTLS, ROUND_TRIP),
            (WARM_POOL, ROUND_TRIP),
        ));
        ratios.push((
            "the processes' create and remove, of claim and release",
            AtLeast(150.0),
            PIPELINE,
            (PROCESSES, ROUND_TRIP),
            (WARM_POOL, ROUND_TRIP),
        ));
    }
    ratios.extend([
        (
            "the processes' create, of ours",
            AtLeast(if origin.udev { 30.0 } else { 20.0 }),
            PIPELINE,
            (PROCESSES, CREATE),
            (LIBRARY, CREATE),
        ),
        (
            "create with udevd stopped, of that with it running",
            AtMost(1.05),
            STOPPED,
            (LIBRARY_ALONE, CREATE),
            (LIBRARY, CREATE),
        ),
        (
            "64 removes one after the other, of 64 by `cleanup_all`",
            AtLeast(4.0),
            AT_ONCE,
            (LIBRARY, REMOVE),
            (FLEET, REMOVE),
        ),
    ]);
    ratios
}

fn promises(report: &Report) -> Vec<Promise> {
    let mut promises = Vec::new();
    let ours = |calls: &&super::Calls| calls.contestant == names::LIBRARY;
    if let Some(calls) = report.calls.iter().find(ours) {
        let count = |calls: &[String]| {
            Interval::exact(u32::try_from(calls.len()).map_or(f64::NAN, f64::from))
        };
        promises.push(Promise {
            what: "system calls of a create",
            bound: AtMost(30.0),
            seen: count(&calls.create),
        });
        promises.push(Promise {
            what: "system calls of a remove",
            bound: AtMost(16.0),
            seen: count(&calls.remove),
        });
    }
    for (what, bound, scenario, one, other) in ratios(&report.origin) {
        let samples = |(contestant, verb): Of| {
            let series = report.outcome(scenario)?.of(contestant)?;
            series.verbs().into_iter().nth(verb)
        };
        let pair = samples(one).zip(samples(other));
        let seen = pair.and_then(|(one, other)| Interval::of_p50s(&one, &other));
        promises.extend(seen.map(|seen| Promise { what, bound, seen }));
    }
    let busy = report.outcome(BUSY);
    let busy = busy.and_then(|outcome| outcome.of(names::LIBRARY));
    if let Some(series) = busy.filter(|series| !series.reaction.is_empty()) {
        promises.push(Promise {
            what: "p99 of a busy removal's reaction to the close, ms",
            bound: AtMost(2.0),
            seen: Interval::exact(ms(percentile(&series.reaction, 99))),
        });
    }
    promises
}

pub(crate) fn markdown(report: &Report) -> String {
    let promises = promises(report);
    if promises.is_empty() {
        return String::new();
    }
    let mut text =
        "\n#### Promises\n\nOf p50s where nothing else is said, with the 95 % interval. \
                    Cannot tell: the interval has the bound in it.\n\n\
                    | | promised | seen | interval | |\n| --- | ---: | ---: | ---: | --- |\n"
            .to_owned();
    for Promise { what, bound, seen } in promises {
        let interval = match seen.low < seen.high {
            true => format!("{:.3} to {:.3}", seen.low, seen.high),
            false => String::new(),
        };
        let (promised, verdict) = (bound.text(), bound.verdict(seen));
        let _ = writeln!(
            text,
            "| {what} | {promised} | {:.3} | {interval} | {verdict} |",
            seen.seen
        );
    }
    text
}

pub(crate) fn json(report: &Report) -> Value {
    let promises = promises(report).into_iter();
    promises
        .map(|Promise { what, bound, seen }| {
            json!({
                "what": what,
                "promised": bound.text(),
                "seen": seen.seen,
                "interval": [seen.low, seen.high],
                "verdict": bound.verdict(seen),
            })
        })
        .collect()
}
