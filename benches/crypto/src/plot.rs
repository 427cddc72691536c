//! The figures as a picture: a panel for each kind of call, a line for each side.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::row::{Report, Row, Unit};

/// A panel's size in pixels.
const PANEL: (u32, u32) = (640, 400);

/// Lines' colours, in the order of their first appearance.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x1b, 0x5e, 0xb8),
    RGBColor(0x0a, 0x9a, 0xa8),
    RGBColor(0x6a, 0x4c, 0xc4),
    RGBColor(0xd9, 0x5f, 0x02),
    RGBColor(0xc2, 0x18, 0x5b),
    RGBColor(0x7a, 0x7a, 0x7a),
    RGBColor(0x2e, 0x8b, 0x3d),
    RGBColor(0x20, 0x20, 0x20),
];

/// Lines by name, each with its figures by bytes.
type Lines = BTreeMap<String, BTreeMap<usize, f64>>;

/// A panel's lines.
struct Panel<'r> {
    title: &'r str,
    unit: Unit,
    lines: Lines,
}

impl<'r> Panel<'r> {
    /// All that the rows have, in their order.
    fn all(rows: &'r [Row]) -> Vec<Self> {
        let mut panels: Vec<Self> = Vec::new();
        for row in rows {
            let Some(point) = &row.point else { continue };
            let at = panels.iter().position(|panel| panel.title == point.panel);
            let at = at.unwrap_or_else(|| {
                panels.push(Self {
                    title: &point.panel,
                    unit: row.unit,
                    lines: Lines::new(),
                });
                panels.len() - 1
            });
            let lines = &mut panels[at].lines;
            let mut add = |name: &str, figure| {
                let line = lines.entry(name.to_owned()).or_default();
                line.entry(point.bytes).or_insert(figure);
            };
            add(&point.line, row.ours);
            add(row.peer, row.theirs);
        }
        panels
    }

    /// All sizes that occur; a panel shows them at equal distances.
    fn sizes(&self) -> Vec<usize> {
        let all: BTreeSet<usize> = self
            .lines
            .values()
            .flat_map(|l| l.keys().copied())
            .collect();
        all.into_iter().collect()
    }

    fn highest(&self) -> f64 {
        let figures = self.lines.values().flat_map(|line| line.values().copied());
        figures.fold(f64::MIN_POSITIVE, f64::max)
    }
}

/// Draws the report; the text of an SVG file.
///
/// # Errors
/// When it can't be drawn, which no report is known to cause.
pub fn svg(report: &Report) -> Result<String, Box<dyn Error>> {
    let panels = Panel::all(&report.rows);
    let columns = 2;
    let lines = panels.len().div_ceil(columns).max(1);
    let size = (PANEL.0 * 2, PANEL.1 * u32::try_from(lines)? + 40);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE).map_err(plain)?;
        let header = &report.header;
        let title = format!(
            "{}, kernel {}, one core, {}",
            header.cpu, header.kernel, header.date
        );
        let root = root.titled(&title, ("sans-serif", 18)).map_err(plain)?;
        for (panel, area) in panels.iter().zip(root.split_evenly((lines, columns))) {
            draw(panel, &area)?;
        }
        root.present().map_err(plain)?;
    }
    Ok(text)
}

fn draw(
    panel: &Panel<'_>,
    area: &DrawingArea<SVGBackend<'_>, Shift>,
) -> Result<(), Box<dyn Error>> {
    let sizes = panel.sizes();
    let right = i32::try_from(sizes.len())?;
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(32)
        .y_label_area_size(48)
        // Room for the legend, right of the last size.
        .build_cartesian_2d(-0.2..f64::from(right) + 1.2, 0.0..panel.highest() * 1.1)
        .map_err(plain)?;
    let label = |x: &f64| label(*x, &sizes);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(sizes.len() * 2 + 2)
        .x_label_formatter(&label)
        .x_desc("bytes of a buffer or packet")
        .y_desc(panel.unit.name())
        .draw()
        .map_err(plain)?;
    for ((name, line), colour) in panel.lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<(f64, f64)> = (0u32..)
            .zip(&sizes)
            .filter_map(|(at, size)| Some((f64::from(at), *line.get(size)?)))
            .collect();
        let series = LineSeries::new(points, colour.stroke_width(2)).point_size(3);
        chart
            .draw_series(series)
            .map_err(plain)?
            .label(name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(plain)?;
    Ok(())
}

/// The size that stands at a place of the axis; nothing between two.
fn label(x: f64, sizes: &[usize]) -> String {
    let found = (0u32..)
        .zip(sizes)
        .find(|(at, _)| (f64::from(*at) - x).abs() < 1e-6);
    found.map_or_else(String::new, |(_, bytes)| bytes.to_string())
}

/// The library's errors borrow from the drawing.
fn plain(error: impl std::fmt::Display) -> Box<dyn Error> {
    error.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{Placement, Point};

    #[test]
    fn sides_share_a_panel_and_keep_their_first_figure() {
        let row = |bytes, ours, theirs| Row {
            case: "a case".to_owned(),
            unit: Unit::GigabytesPerSecond,
            ours,
            peer: "peer",
            theirs,
            ratio: 1.0,
            target: None,
            placement: Placement::Inline,
            point: Some(Point {
                panel: "panel".to_owned(),
                line: "ours".to_owned(),
                bytes,
            }),
        };
        let rows = [row(512, 1.0, 2.0), row(4096, 3.0, 4.0), row(512, 9.0, 9.0)];
        let panels = Panel::all(&rows);
        assert_eq!(panels.len(), 1);
        assert_eq!(
            panels[0].lines["ours"],
            BTreeMap::from([(512, 1.0), (4096, 3.0)])
        );
        assert_eq!(
            panels[0].lines["peer"],
            BTreeMap::from([(512, 2.0), (4096, 4.0)])
        );
        assert_eq!(label(1.0, &panels[0].sizes()), "4096");
        assert_eq!(label(0.5, &panels[0].sizes()), "");
    }
}
