//! Samples and what is said of them: p50, p99 and the ratio to the floor, as Markdown and as JSON.

pub(crate) mod origin;

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use origin::Origin;

/// One contestant's samples of one scenario, in the order in which they were taken.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) contestant: &'static str,
    pub(crate) create: Vec<Duration>,
    pub(crate) remove: Vec<Duration>,
}

impl Series {
    pub(crate) fn new(contestant: &'static str) -> Self {
        Self {
            contestant,
            create: Vec::new(),
            remove: Vec::new(),
        }
    }

    /// A create and the remove that followed it.
    fn round_trip(&self) -> Vec<Duration> {
        let pairs = self.create.iter().zip(&self.remove);
        pairs.map(|(create, remove)| *create + *remove).collect()
    }

    fn verbs(&self) -> [(&'static str, Vec<Duration>); 3] {
        [
            ("create", self.create.clone()),
            ("remove", self.remove.clone()),
            ("round trip", self.round_trip()),
        ]
    }
}

/// The same contest under one condition; the first series is the floor.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) series: Vec<Series>,
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

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// The table of record.
pub(crate) fn markdown(origin: &Origin, scenarios: &[Scenario]) -> String {
    let udev = if origin.udev {
        "udevd running"
    } else {
        "no udevd"
    };
    let mut text = format!(
        "# Lifecycle\n\nLinux {}, {}, {udev}. {}\n",
        origin.kernel,
        origin.cpu,
        origin.label()
    );
    text.push_str(
        "\nTwo loop devices, `P 8`, image 64 MiB, a fresh sparse COW file of 256 MiB each, all on tmpfs. The contestants \
         take turns within each round. A round trip is a create and its remove; x is p50 over the floor's p50.\n",
    );
    for scenario in scenarios {
        let rounds = scenario
            .series
            .first()
            .map_or(0, |series| series.create.len());
        let _ = write!(
            text,
            "\n## {} ({rounds} samples of each)\n\n",
            scenario.name
        );
        text.push_str(
            "| ms | create p50 | p99 | x | remove p50 | p99 | x | round trip p50 | p99 | x |\n",
        );
        text.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
        let Some(floor) = scenario.series.first() else {
            continue;
        };
        for series in &scenario.series {
            let _ = write!(text, "| {} |", series.contestant);
            for ((_, samples), (_, floor)) in series.verbs().iter().zip(floor.verbs()) {
                let (p50, p99) = (percentile(samples, 50), percentile(samples, 99));
                let times = ratio(p50, percentile(&floor, 50));
                let _ = write!(text, " {:.1} | {:.1} | {times:.2} |", ms(p50), ms(p99));
            }
            text.push('\n');
        }
    }
    text
}

/// All of it, every sample included, in microseconds. The keys are stable; new ones may be added.
pub(crate) fn json(origin: &Origin, scenarios: &[Scenario]) -> Value {
    let micros = |samples: &[Duration]| -> Vec<f64> {
        samples.iter().map(|sample| ms(*sample) * 1000.0).collect()
    };
    let contestant = |series: &Series, floor: &Series| {
        let verbs = series.verbs().into_iter().zip(floor.verbs());
        let figures = verbs.map(|((verb, samples), (_, floor))| {
            let (p50, p99) = (percentile(&samples, 50), percentile(&samples, 99));
            let figures = json!({
                "p50_us": ms(p50) * 1000.0,
                "p99_us": ms(p99) * 1000.0,
                "ratio_p50": ratio(p50, percentile(&floor, 50)),
                "samples_us": micros(&samples),
            });
            (verb.replace(' ', "_"), figures)
        });
        let mut entry: serde_json::Map<_, _> = figures.collect();
        entry.insert("name".to_owned(), series.contestant.into());
        Value::Object(entry)
    };
    let scenarios: Vec<_> = scenarios
        .iter()
        .map(|scenario| {
            let floor = scenario.series.first();
            let contestants = scenario.series.iter().zip(std::iter::repeat(floor));
            let contestants: Vec<_> = contestants
                .filter_map(|(series, floor)| Some(contestant(series, floor?)))
                .collect();
            json!({ "name": scenario.name, "contestants": contestants })
        })
        .collect();
    json!({
        "kernel": origin.kernel,
        "cpu": origin.cpu,
        "emulated": origin.is_emulated(),
        "udev": origin.udev,
        "scenarios": scenarios,
    })
}
