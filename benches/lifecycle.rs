//! Create and remove, beside every other way to do the same, in one run.
//!
//! Needs root and device-mapper, and makes real devices: `./tests/vm/run bench` runs it in a guest. The table of
//! record comes from an interleaved sampler, because the figures of a guest drift within a minute by more than the
//! contestants differ; a full run adds criterion's confidence intervals. Words after `--` choose scenarios by name. With
//! `$DMSNAP_OUT` set, lifecycle.md, .json and .svg and criterion's files go there.

#![allow(missing_docs, reason = "a bench has no API")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench prints its results"
)]

mod arena;
mod contestants;
mod figures;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};

use arena::place::Place;
use arena::scenarios::{ALL, Disk, Scenario, Udev};
use arena::{calls, contest};
use contestants::{Contestant, Result};
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
    let quick = args.iter().any(|arg| arg == "--quick");
    let chosen: Vec<_> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    let mut place = Place::new()?;
    let has_disk = place.take_disk()?;
    let mut report = Report {
        origin: Origin::here(),
        calls: Vec::new(),
        outcomes: Vec::new(),
        left_out: Vec::new(),
    };
    if chosen.is_empty() {
        report.calls = calls::count()?;
    }
    for scenario in ALL {
        if !chosen.is_empty() && !chosen.iter().any(|name| *name == scenario.name) {
            continue;
        }
        if let Some(reason) = obstacle(scenario, &report.origin, has_disk, quick) {
            report.left_out.push((scenario.name, reason));
            continue;
        }
        let begin = Instant::now();
        report.outcomes.push(contest(&place, scenario, quick)?);
        eprintln!("{}: {:.0} s", scenario.name, begin.elapsed().as_secs_f64());
    }

    let markdown = figures::markdown::markdown(&report);
    print!("{markdown}");
    if let Some(out) = &out {
        fs::write(out.join("lifecycle.md"), &markdown)?;
        let json = serde_json::to_string_pretty(&figures::json::json(&report))?;
        fs::write(out.join("lifecycle.json"), json + "\n")?;
        fs::write(out.join("lifecycle.svg"), figures::plot::svg(&report)?)?;
    }
    if !quick && chosen.is_empty() {
        confidence(&place, out.as_deref())?;
    }
    place.check_empty()
}

/// Why a scenario is not run here.
fn obstacle(
    scenario: &Scenario,
    origin: &Origin,
    has_disk: bool,
    quick: bool,
) -> Option<&'static str> {
    if quick && scenario.each > 1 {
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
