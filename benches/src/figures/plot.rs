//! The figures as a picture: a panel for each kind of call, a line for each side.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::row::{Report, Row, Unit};
use super::table::figure;

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

/// Lines by name, each with its figures by place.
type Lines = BTreeMap<String, BTreeMap<usize, f64>>;

/// A panel's lines.
struct Panel<'r> {
    title: &'r str,
    axis: &'static str,
    unit: Unit,
    lines: Lines,
}

impl<'r> Panel<'r> {
    /// All that the rows have, in their order.
    fn all(rows: &'r [Row]) -> Vec<Self> {
        let mut panels: Vec<Self> = Vec::new();
        for row in rows {
            let Some(point) = row.point.as_ref().filter(|_| row.measured()) else {
                continue;
            };
            let at = panels.iter().position(|panel| panel.title == point.panel);
            let at = at.unwrap_or_else(|| {
                panels.push(Self {
                    title: &point.panel,
                    axis: point.axis,
                    unit: row.unit,
                    lines: Lines::new(),
                });
                panels.len() - 1
            });
            let lines = &mut panels[at].lines;
            let mut add = |name: &str, figure| {
                let line = lines.entry(name.to_owned()).or_default();
                line.entry(point.at).or_insert(figure);
            };
            add(&point.line, row.ours);
            add(&row.peer, row.theirs);
        }
        panels
    }

    /// All places that occur; a panel shows them at equal distances.
    fn places(&self) -> Vec<usize> {
        let all: BTreeSet<usize> = self
            .lines
            .values()
            .flat_map(|l| l.keys().copied())
            .collect();
        all.into_iter().collect()
    }

    fn figures(&self) -> impl Iterator<Item = f64> {
        self.lines.values().flat_map(|line| line.values().copied())
    }

    fn scale(&self) -> Scale {
        let highest = self.figures().fold(f64::MIN_POSITIVE, f64::max);
        let lowest = self.figures().fold(f64::INFINITY, f64::min);
        if lowest > 0.0 && highest / lowest > WIDE {
            Scale::Logarithmic { lowest, highest }
        } else {
            Scale::Linear { highest }
        }
    }
}

/// Figures further apart than this are drawn by their powers of ten.
const WIDE: f64 = 30.0;

/// How a panel's figures become heights.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    Linear { highest: f64 },
    Logarithmic { lowest: f64, highest: f64 },
}

impl Scale {
    fn range(self) -> std::ops::Range<f64> {
        match self {
            Self::Linear { highest } => 0.0..highest * 1.1,
            Self::Logarithmic { lowest, highest } => lowest.log10().floor()..highest.log10() + 0.1,
        }
    }

    fn height(self, figure: f64) -> f64 {
        match self {
            Self::Linear { .. } => figure,
            Self::Logarithmic { .. } => figure.log10(),
        }
    }

    fn label(self, height: f64) -> String {
        match self {
            Self::Linear { .. } => figure(height),
            Self::Logarithmic { .. } => figure(10f64.powf(height)),
        }
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
        let title = format!("{}, {}, {}", header.cpu, header.how, header.date);
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
    let places = panel.places();
    let scale = panel.scale();
    let right = i32::try_from(places.len())?;
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(32)
        .y_label_area_size(72)
        // Room for the legend, right of the last place.
        .build_cartesian_2d(-0.2..f64::from(right) + 1.2, scale.range())
        .map_err(plain)?;
    let label = |x: &f64| label(*x, &places);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(places.len() * 2 + 2)
        .x_label_formatter(&label)
        .y_label_formatter(&|y| scale.label(*y))
        .x_desc(panel.axis)
        .y_desc(panel.unit.name())
        .draw()
        .map_err(plain)?;
    for ((name, line), colour) in panel.lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<(f64, f64)> = (0u32..)
            .zip(&places)
            .filter_map(|(at, place)| Some((f64::from(at), scale.height(*line.get(place)?))))
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

/// What stands at a spot of the axis; nothing between two.
fn label(x: f64, places: &[usize]) -> String {
    let found = (0u32..)
        .zip(places)
        .find(|(at, _)| (f64::from(*at) - x).abs() < 1e-6);
    found.map_or_else(String::new, |(_, place)| place.to_string())
}

/// The library's errors borrow from the drawing.
fn plain(error: impl std::fmt::Display) -> Box<dyn Error> {
    error.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::super::row::tests::row;
    use super::super::row::{Placement, Point};
    use super::*;

    fn at(at: usize, ours: f64, theirs: f64) -> Row {
        Row {
            ours,
            theirs,
            placement: Placement::Near,
            point: Some(Point {
                panel: "panel".to_owned(),
                line: "ours".to_owned(),
                axis: "bytes",
                at,
            }),
            ..row(1.0, None)
        }
    }

    #[test]
    fn sides_share_a_panel_and_keep_their_first_figure() {
        let rows = [at(512, 1.0, 2.0), at(4096, 3.0, 4.0), at(512, 9.0, 9.0)];
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
        assert_eq!(label(1.0, &panels[0].places()), "4096");
        assert_eq!(label(0.5, &panels[0].places()), "");
    }

    #[test]
    fn figures_far_apart_are_drawn_by_their_powers() {
        let rows = [at(1, 1e6, 2e6), at(32, 5e6, 9e6)];
        let scale = Panel::all(&rows)[0].scale();
        assert_eq!(scale, Scale::Linear { highest: 9e6 });
        let rows = [at(1, 1e4, 2e6), at(32, 5e6, 9e6)];
        let scale = Panel::all(&rows)[0].scale();
        assert!((scale.height(1e6) - 6.0).abs() < 1e-9);
        assert_eq!(scale.label(6.0), "1.00 M");
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        let rows = [Row {
            ratio: f64::NAN,
            ..at(1, f64::NAN, f64::NAN)
        }];
        assert!(Panel::all(&rows).is_empty());
    }
}
