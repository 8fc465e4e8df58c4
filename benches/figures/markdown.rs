//! The table of record.

use std::fmt::Write;

use super::{Report, ms, percentile, promises, ratio};

pub(crate) fn markdown(report: &Report) -> String {
    let origin = &report.origin;
    let udev = match origin.udev {
        true => "udevd running",
        false => "no udevd",
    };
    let mut text = format!(
        "### Linux {}, {udev}\n\n{}. {}\n",
        origin.kernel,
        origin.cpu,
        origin.label()
    );
    text.push_str(
        "\nTwo loop devices, `P 8`, an image of 64 MiB, a fresh sparse COW file of 256 MiB each, all on tmpfs, but for what \
         a row says. The contestants take turns within each round. A round trip is a create and its remove; with several \
         threads, or several at once, times are those of all over their number. A busy device's remove counts from its \
         holder's close.\n",
    );
    text.push_str(&calls(report));
    text.push_str(&promises::markdown(report));
    text.push_str(&ratios(report));
    text.push_str(&milliseconds(report));
    text.push_str(&reactions(report));
    for (name, reason) in &report.left_out {
        let _ = writeln!(text, "\nNot run: {name}, {reason}.");
    }
    text
}

fn calls(report: &Report) -> String {
    if report.calls.is_empty() {
        return String::new();
    }
    let mut text =
        "\n#### System calls\n\n| | create | processes | remove | processes |\n".to_owned();
    text.push_str("| --- | ---: | ---: | ---: | ---: |\n");
    for calls in &report.calls {
        let (create, remove) = (calls.create.len(), calls.remove.len());
        let [creating, removing] = calls.processes;
        let contestant = calls.contestant;
        let _ = writeln!(
            text,
            "| {contestant} | {create} | {creating} | {remove} | {removing} |"
        );
    }
    text
}

/// From a busy device's last close to the attempt at its removal that succeeded.
fn reactions(report: &Report) -> String {
    let series = report.outcomes.iter().flat_map(|outcome| &outcome.series);
    let mut text = String::new();
    for series in series.filter(|series| !series.reaction.is_empty()) {
        let [p50, p99] = [50, 99].map(|percent| ms(percentile(&series.reaction, percent)));
        let _ = writeln!(text, "| {} | {p50:.2} | {p99:.2} |", series.contestant);
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "\n#### From the close to the attempt that removes\n\n| ms | p50 | p99 |\n| --- | ---: | ---: |\n{text}"
    )
}

/// Everything as multiples of what the floor took: p50 of its p50, and p99 of its p99.
fn ratios(report: &Report) -> String {
    let mut text = "\n#### Times the floor's\n\n".to_owned();
    text.push_str("| | | create p50 | p99 | remove p50 | p99 | round trip p50 | p99 |\n");
    text.push_str("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for outcome in &report.outcomes {
        let Some(floor) = outcome.floor() else {
            continue;
        };
        for series in outcome.series.iter().skip(1) {
            let _ = write!(text, "| {} | {} |", outcome.name, series.contestant);
            for (figures, floor) in series.figures().iter().zip(floor.figures()) {
                let (p50, p99) = (ratio(figures.p50, floor.p50), ratio(figures.p99, floor.p99));
                let _ = write!(text, " {p50:.2} | {p99:.2} |");
            }
            text.push('\n');
        }
    }
    text
}

fn milliseconds(report: &Report) -> String {
    let mut text = "\n#### Milliseconds\n\n".to_owned();
    text.push_str(
        "Late is how often something of the snapshot was still there when a remove returned; \
         what a pool still has to recycle is not counted.\n\n",
    );
    text.push_str(
        "| | | samples | create p50 | p99 | remove p50 | p99 | round trip p50 | p99 | late |\n",
    );
    text.push_str("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for outcome in &report.outcomes {
        for series in &outcome.series {
            let samples = outcome.samples();
            let _ = write!(
                text,
                "| {} | {} | {samples} |",
                outcome.name, series.contestant
            );
            for figures in series.figures() {
                let _ = write!(text, " {:.2} | {:.2} |", ms(figures.p50), ms(figures.p99));
            }
            let _ = writeln!(text, " {} |", series.late);
        }
    }
    text
}
