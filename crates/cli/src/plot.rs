//! Draws the rows of a benchmark: bandwidth over block size, with a line for each lane and each bare copy.

use std::{collections::BTreeMap, path::Path};

use plotters::prelude::*;

use crate::{report::Failure, row::Row};

/// Writes the SVG.
pub(crate) fn draw(path: &Path, rows: &[Row]) -> Result<(), Failure> {
    let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for r in rows {
        let x = (r.block_size as f64).log2();
        lines.entry(r.lane.to_owned()).or_default().push((x, r.gb_per_s));
        if let Some(raw) = r.raw_gb_per_s {
            lines.entry(format!("{} bare copy", r.lane)).or_default().push((x, raw));
        }
    }
    series(path, "pulls of scattered blocks", &lines)
        .map_err(|e| Failure::failed(format!("cannot write {}: {e}; the folder must exist", path.display())))
}

fn series(
    path: &Path,
    title: &str,
    lines: &BTreeMap<String, Vec<(f64, f64)>>,
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.values().flatten();
    let (low, high) = points().fold((f64::MAX, f64::MIN), |(a, b), p| (a.min(p.0), b.max(p.0)));
    let top = points().map(|p| p.1).fold(0.0, f64::max) * 1.1;
    let root = SVGBackend::new(path, (800, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(low - 0.5..high + 0.5, 0.0..top.max(0.1))?;
    chart.configure_mesh().x_desc("block size").y_desc("GB/s").x_label_formatter(&|x| label(2f64.powf(*x))).draw()?;
    for (i, (name, line)) in lines.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()?;
    Ok(())
}

fn label(bytes: f64) -> String {
    let b = bytes.round();
    if b >= 1048576.0 { format!("{:.0}M", b / 1048576.0) } else { format!("{:.0}K", b / 1024.0) }
}
