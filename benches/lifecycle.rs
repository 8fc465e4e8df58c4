//! Create and remove, beside every other way to do the same, in one run.
//!
//! Needs root and device-mapper, and makes real devices: `./tests/vm/run bench` runs it in a guest. The table of record
//! comes from an interleaved sampler, because the figures of a guest drift within a minute by more than the contestants
//! differ; a full run adds criterion's confidence intervals. Words after `--` choose scenarios by name; `promises`
//! those that a promise is made of, in as many rounds as it takes. With `$DMSNAP_OUT` set, lifecycle.md, .json and
//! .svg, written anew after each scenario, and criterion's files go there.

#![allow(missing_docs, reason = "a bench has no API")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints its results"
)]

mod arena;
mod contestants;
mod figures;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use arena::place::Place;
use arena::scenarios::{ALL, Disk, Scenario, Udev};
use arena::{calls, contest};
use contestants::{Contestant, Result};
use criterion::{Criterion, SamplingMode};
use figures::Report;
use figures::origin::Origin;

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        // `cargo test --benches` comes here: no place to make devices.
        println!("lifecycle: nothing to do without --bench");
        return ExitCode::SUCCESS;
    }
    let counted = args
        .iter()
        .find_map(|arg| arg.strip_prefix(calls::ARGUMENT));
    let done = match counted {
        Some(nth) => calls::perform(nth),
        None => run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifecycle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let out = env::var_os("DMSNAP_OUT").map(PathBuf::from);
    let choice = Choice::of(args)?;
    let mut place = Place::new()?;
    let has_disk = place.take_disk()?;
    let mut report = Report {
        origin: Origin::here(),
        calls: Vec::new(),
        outcomes: Vec::new(),
        left_out: Vec::new(),
    };
    if !matches!(choice, Choice::Named(_)) {
        report.calls = calls::count()?;
    }
    for scenario in ALL {
        let Some(rounds) = choice.rounds(scenario) else {
            continue;
        };
        if let Some(reason) = obstacle(scenario, &report.origin, has_disk, &choice) {
            report.left_out.push((scenario.name, reason));
            continue;
        }
        let begin = Instant::now();
        report.outcomes.push(contest(&place, scenario, rounds)?);
        eprintln!("{}: {:.0} s", scenario.name, begin.elapsed().as_secs_f64());
        if let Some(out) = &out {
            write(&report, out)?;
        }
    }
    print!("{}", figures::markdown::markdown(&report));
    if matches!(choice, Choice::All) {
        confidence(&place, out.as_deref())?;
    }
    place.check_empty()
}

/// Which scenarios are to be run, and how long.
enum Choice<'a> {
    All,
    Quick,
    Promises,
    Named(Vec<&'a str>),
}

impl<'a> Choice<'a> {
    fn of(args: &'a [String]) -> Result<Self> {
        let names = args.iter().map(String::as_str);
        let names: Vec<_> = names.filter(|arg| !arg.starts_with("--")).collect();
        let unknown = |name: &&&str| ALL.iter().all(|scenario| scenario.name != **name);
        match names[..] {
            [] if args.iter().any(|arg| arg == "--quick") => Ok(Self::Quick),
            [] => Ok(Self::All),
            ["promises"] => Ok(Self::Promises),
            _ => match names.iter().find(unknown) {
                Some(name) => Err(format!("there is no scenario {name}").into()),
                None => Ok(Self::Named(names)),
            },
        }
    }

    fn rounds(&self, scenario: &Scenario) -> Option<usize> {
        match self {
            Self::All => Some(scenario.rounds),
            Self::Quick => Some(scenario.rounds.div_ceil(10).max(2)),
            Self::Promises => Some(scenario.promised_rounds).filter(|rounds| *rounds > 0),
            Self::Named(names) => names.contains(&scenario.name).then_some(scenario.rounds),
        }
    }
}

fn write(report: &Report, out: &Path) -> Result<()> {
    fs::write(
        out.join("lifecycle.md"),
        figures::markdown::markdown(report),
    )?;
    let json = serde_json::to_string_pretty(&figures::json::json(report))?;
    fs::write(out.join("lifecycle.json"), json + "\n")?;
    fs::write(out.join("lifecycle.svg"), figures::plot::svg(report)?)?;
    Ok(())
}

/// Why a scenario is not run here.
fn obstacle(
    scenario: &Scenario,
    origin: &Origin,
    has_disk: bool,
    choice: &Choice<'_>,
) -> Option<&'static str> {
    if matches!(choice, Choice::Quick) && scenario.each > 1 {
        return Some("it takes too long for --quick");
    }
    match (scenario.udev, origin.udev) {
        (Udev::Running, false) => return Some("it needs a udevd"),
        (Udev::None, true) => return Some("it is measured without a udevd"),
        _ => {}
    }
    let lacks_disk = scenario.disk == Disk::Ext4 && !has_disk;
    lacks_disk.then_some("$DMSNAP_BENCH_DISK names no disk to format")
}

/// Criterion's view of the round trip alone, one contestant after the other.
fn confidence(place: &Place, out: Option<&Path>) -> Result<()> {
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    if let Some(out) = out {
        criterion = criterion.output_directory(&out.join("criterion"));
    }
    let mut group = criterion.benchmark_group("round trip");
    group.sampling_mode(SamplingMode::Flat);
    for make in ALL[0].contestants {
        let mut contestant = make()?;
        group.bench_function(contestant.name(), |bencher| {
            bencher.iter_custom(|iterations| {
                let round_trip = |_| round_trip(place, contestant.as_mut()).expect("a round trip");
                (0..iterations).map(round_trip).sum()
            });
        });
    }
    group.finish();
    Ok(())
}

fn round_trip(place: &Place, contestant: &mut dyn Contestant) -> Result<Duration> {
    let fresh = place.fresh(&ALL[0], "round-trip")?;
    let begin = Instant::now();
    contestant.create(fresh.job())?;
    contestant.remove(fresh.job())?;
    let took = begin.elapsed();
    place.settle(&fresh)?;
    Ok(took)
}
