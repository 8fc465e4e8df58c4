//! All of a run, every sample included.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Outcome, Report, Series, VERBS, ms, promises, ratio};

/// Times are in microseconds. The keys are stable; new ones may be added.
pub(crate) fn json(report: &Report) -> Value {
    let origin = &report.origin;
    let calls = report.calls.iter().map(|calls| {
        json!({
            "name": calls.contestant,
            "create": calls.create,
            "remove": calls.remove,
            "processes": calls.processes,
        })
    });
    json!({
        "kernel": origin.kernel,
        "cpu": origin.cpu,
        "emulated": origin.is_emulated(),
        "udev": origin.udev,
        "counted": origin.counted,
        "calls": calls.collect::<Vec<_>>(),
        "promises": promises::json(report),
        "scenarios": report.outcomes.iter().map(scenario).collect::<Vec<_>>(),
    })
}

fn scenario(outcome: &Outcome) -> Value {
    let floor = outcome.floor().into_iter().cycle();
    let pairs = outcome.series.iter().zip(floor);
    let contestants: Vec<_> = pairs
        .map(|(series, floor)| contestant(series, floor))
        .collect();
    json!({ "name": outcome.name, "contestants": contestants })
}

fn contestant(series: &Series, floor: &Series) -> Value {
    let mut entry = serde_json::Map::new();
    entry.insert("name".to_owned(), series.contestant.into());
    entry.insert("late".to_owned(), series.late.into());
    let micros = |duration: &Duration| ms(*duration) * 1000.0;
    if !series.reaction.is_empty() {
        let samples: Vec<_> = series.reaction.iter().map(micros).collect();
        entry.insert("reaction_us".to_owned(), samples.into());
    }
    let figures = series.figures().into_iter().zip(floor.figures());
    for ((verb, samples), (figures, floor)) in VERBS.iter().zip(series.verbs()).zip(figures) {
        let value = json!({
            "p50_us": micros(&figures.p50),
            "p99_us": micros(&figures.p99),
            "ratio_p50": ratio(figures.p50, floor.p50),
            "samples_us": samples.iter().map(micros).collect::<Vec<_>>(),
        });
        entry.insert(verb.replace(' ', "_"), value);
    }
    Value::Object(entry)
}
