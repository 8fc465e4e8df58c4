//! The run as a picture: for each scenario and contestant p50 and p99 of create and remove, on a log axis.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Report, ratio};
use crate::contestants::Result;

const WIDTH: u32 = 960;
const ROW: i32 = 16;
const TOP: i32 = 64;
const BOTTOM: i32 = 34;
/// Where the names end, and each panel begins and ends.
const NAMES: i32 = 330;
const PANELS: [(i32, i32); 2] = [(344, 634), (658, 948)];
const PANEL_NAMES: [&str; 2] = ["create", "remove"];

/// The ground is painted, so that it reads the same on light and dark pages.
const GROUND: RGBColor = RGBColor(250, 250, 247);
const INK: RGBColor = RGBColor(40, 44, 52);
const FAINT: RGBColor = RGBColor(206, 208, 212);
const OURS: RGBColor = RGBColor(0, 98, 155);
const OTHERS: RGBColor = RGBColor(178, 92, 20);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A contestant's row, or a scenario's title.
enum Row<'a> {
    Title(&'a str),
    Contestant {
        name: &'a str,
        times: [(f64, f64); 2],
    },
}

pub(crate) fn svg(report: &Report) -> Result<String> {
    let mut rows = Vec::new();
    for outcome in &report.outcomes {
        let Some(floor) = outcome.floor().map(super::Series::figures) else {
            continue;
        };
        rows.push(Row::Title(outcome.name));
        for series in &outcome.series {
            let figures = series.figures();
            let times = [0, 1].map(|verb: usize| {
                let p50 = floor[verb].p50;
                (ratio(figures[verb].p50, p50), ratio(figures[verb].p99, p50))
            });
            let name = series.contestant;
            rows.push(Row::Contestant { name, times });
        }
    }
    let mut svg = String::new();
    draw(report, &rows, &mut svg)?;
    Ok(svg)
}

fn draw(report: &Report, rows: &[Row<'_>], svg: &mut String) -> Result<()> {
    let bottom = TOP + i32::try_from(rows.len())? * ROW;
    let height = u32::try_from(bottom + BOTTOM)?;
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&GROUND)?;
    let origin = &report.origin;
    let udev = if origin.udev {
        "udevd running"
    } else {
        "no udevd"
    };
    let title = format!(
        "Times the floor's p50: dot p50, bar to p99. Linux {}, {udev}.",
        origin.kernel
    );
    let [left, right] = [HPos::Left, HPos::Right];
    text(&area, &title, (12, 14), 15, left, INK)?;
    text(&area, origin.label(), (12, 33), 12, left, INK)?;
    for (panel, name) in PANELS.into_iter().zip(PANEL_NAMES) {
        let scale = Scale::of(
            rows,
            PANEL_NAMES
                .iter()
                .position(|each| *each == name)
                .unwrap_or(0),
            panel,
        );
        text(&area, name, (panel.0, TOP - 12), 13, left, INK)?;
        for tick in scale.ticks() {
            let x = scale.x(tick);
            let ink = if tick == 1.0 { INK } else { FAINT };
            area.draw(&PathElement::new([(x, TOP), (x, bottom)], ink))?;
            text(
                &area,
                &format!("{tick}"),
                (x, bottom + 14),
                11,
                HPos::Center,
                INK,
            )?;
        }
        for (row, y) in rows.iter().zip((TOP + ROW / 2..).step_by(16)) {
            let Row::Contestant { name, times } = row else {
                continue;
            };
            let (p50, p99) = times[scale.verb];
            let color = color_of(name);
            let bar = [(scale.x(p50), y - 2), (scale.x(p99), y + 2)];
            area.draw(&Rectangle::new(bar, color.mix(0.45).filled()))?;
            area.draw(&Circle::new((scale.x(p50), y), 4, color.filled()))?;
        }
    }
    for (row, y) in rows.iter().zip((TOP + ROW / 2..).step_by(16)) {
        match row {
            Row::Title(name) => text(&area, name, (12, y), 13, left, INK)?,
            Row::Contestant { name, .. } => {
                text(&area, name, (NAMES, y), 12, right, color_of(name))?
            }
        }
    }
    area.present()?;
    Ok(())
}

fn color_of(contestant: &str) -> RGBColor {
    match contestant {
        ours if ours.starts_with("dmsnap") => OURS,
        floor if floor.starts_with("bare") => INK,
        _ => OTHERS,
    }
}

fn text(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    size: i32,
    side: HPos,
    ink: RGBColor,
) -> Result<()> {
    // The SVG backend writes a font size of 1 as 1 / 1.24.
    let style = ("sans-serif", f64::from(size) * 1.24)
        .into_font()
        .color(&ink);
    let style = style.pos(Pos::new(side, VPos::Center));
    Ok(area.draw_text(text, &style, at)?)
}

/// A log axis.
struct Scale {
    verb: usize,
    panel: (i32, i32),
    low: f64,
    high: f64,
}

impl Scale {
    fn of(rows: &[Row<'_>], verb: usize, panel: (i32, i32)) -> Self {
        let (mut low, mut high) = (0.8, 2.5);
        for row in rows {
            if let Row::Contestant { times, .. } = row {
                let (p50, p99) = times[verb];
                low = f64::min(low, p50 * 0.9);
                high = f64::max(high, p99 * 1.1);
            }
        }
        Self {
            verb,
            panel,
            low,
            high,
        }
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "a place within the picture"
    )]
    fn x(&self, times: f64) -> i32 {
        let part = (times / self.low).ln() / (self.high / self.low).ln();
        let (left, right) = self.panel;
        left + (part * f64::from(right - left)).round() as i32
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let ticks = [
            0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0,
        ];
        let (low, high) = (self.low, self.high);
        ticks
            .into_iter()
            .filter(move |tick| (low..high).contains(tick))
    }
}
