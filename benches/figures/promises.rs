//! What the library promises of its speed, beside what was seen.

use std::fmt::Write;

use super::{Report, ratio};
use crate::arena::scenarios::{ALONE, PIPELINE, STOPPED};

const FLOOR: &str = "bare ioctls";
const LIBRARY: &str = "dmsnap";
const PROCESSES: &str = "losetup + blockdev + dmsetup";
const LIBRARY_ALONE: &str = "dmsnap, udevd stopped";

/// What was seen is to be at most, or at least, so much.
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// Of the promises, those that this run can say something about.
pub(crate) fn markdown(report: &Report) -> String {
    let p50 = |scenario: &str, contestant: &str, verb: usize| {
        let figures = report.outcome(scenario)?.of(contestant)?;
        Some(figures[verb].p50)
    };
    let times = |scenario, one: (&str, usize), other: (&str, usize)| {
        let pair = p50(scenario, one.0, one.1).zip(p50(scenario, other.0, other.1));
        pair.map(|(one, other)| ratio(one, other))
    };
    let calls = report
        .calls
        .iter()
        .find(|calls| calls.contestant == LIBRARY);
    let count = |calls: &[String]| u32::try_from(calls.len()).map_or(f64::NAN, f64::from);
    let pipeline = Bound::AtLeast(if report.origin.udev { 30.0 } else { 20.0 });
    let rows = [
        (
            "system calls of a create",
            Bound::AtMost(30.0),
            calls.map(|calls| count(&calls.create)),
        ),
        (
            "system calls of a remove",
            Bound::AtMost(16.0),
            calls.map(|calls| count(&calls.remove)),
        ),
        (
            "create, of the bare ioctls'",
            Bound::AtMost(1.05),
            times(ALONE, (LIBRARY, 0), (FLOOR, 0)),
        ),
        (
            "remove, of the bare ioctls'",
            Bound::AtMost(1.05),
            times(ALONE, (LIBRARY, 1), (FLOOR, 1)),
        ),
        (
            "the processes' create, of ours",
            pipeline,
            times(PIPELINE, (PROCESSES, 0), (LIBRARY, 0)),
        ),
        (
            "create with udevd stopped, of that with it running",
            Bound::AtMost(1.05),
            times(STOPPED, (LIBRARY_ALONE, 0), (LIBRARY, 0)),
        ),
    ];
    let mut text = String::new();
    for (what, bound, seen) in rows {
        let Some(seen) = seen else { continue };
        let (bound, is_kept) = match bound {
            Bound::AtMost(most) => (format!("at most {most}"), seen <= most),
            Bound::AtLeast(least) => (format!("at least {least}"), seen >= least),
        };
        let verdict = if is_kept { "kept" } else { "missed" };
        let _ = writeln!(text, "| {what} | {bound} | {seen:.2} | {verdict} |");
    }
    if text.is_empty() {
        return text;
    }
    format!("## Promises\n\n| p50 | promised | seen | |\n| --- | ---: | ---: | --- |\n{text}\n")
}
