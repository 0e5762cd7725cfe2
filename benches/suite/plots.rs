//! The plots.

use std::{error::Error, path::Path};

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    drain, flood, floor, latency, ours, peers,
    report::library,
    summary::{Book, Summary},
};

type Drawn = Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const OURS_LIGHT: RGBColor = RGBColor(0x8f, 0xbc, 0xdd);
const PEERS: RGBColor = RGBColor(0xd9, 0x7b, 0x2b);
const PEERS_LIGHT: RGBColor = RGBColor(0xee, 0xc1, 0x98);
const FLOOR: RGBColor = RGBColor(0x80, 0x80, 0x80);
const FLOOR_LIGHT: RGBColor = RGBColor(0xc4, 0xc4, 0xc4);
const DARK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FONT: &str = "sans-serif";

/// Draws all plots into a folder.
pub fn draw(folder: &Path, book: &Book, beside: Option<&Book>) -> Drawn {
    std::fs::create_dir_all(folder)?;
    throughput(&folder.join("throughput.svg"), book, beside)?;
    cpu(&folder.join("cpu.svg"), book, beside)?;
    latencies(&folder.join("latency.svg"), book)?;
    adaptive(&folder.join("adaptive.svg"), book)
}

struct Bar {
    name: &'static str,
    /// Drawn side by side, from left to right.
    parts: Vec<f64>,
    range: Option<(f64, f64)>,
    colors: [RGBColor; 2],
}

fn shown(beside: Option<&Book>) -> Vec<(&'static str, [RGBColor; 2], bool)> {
    let mut all = Vec::new();
    all.extend(floor::ALL.map(|contender| (contender.name, [FLOOR, FLOOR_LIGHT], false)));
    all.extend(ours::ALL.map(|contender| (contender.name, [OURS, OURS_LIGHT], false)));
    all.extend(peers::ALL.map(|contender| (contender.name, [PEERS, PEERS_LIGHT], false)));
    all.extend(beside.map(|_| (library::NAME, [PEERS, PEERS_LIGHT], true)));
    all
}

fn throughput(path: &Path, book: &Book, beside: Option<&Book>) -> Drawn {
    let mut bars = Vec::new();
    for (name, colors, elsewhere) in shown(beside) {
        let book = if elsewhere { beside.unwrap_or(book) } else { book };
        let Some(rate) = book.get(flood::SECTION, name, flood::RATE) else { continue };
        let thousand = |value: f64| value / 1e3;
        let range = Some((thousand(rate.least), thousand(rate.most)));
        bars.push(Bar { name, parts: vec![thousand(rate.median)], range, colors });
    }
    draw_bars(path, "Packets decided per second under a flood, in thousands; more is better", &bars)
}

fn cpu(path: &Path, book: &Book, beside: Option<&Book>) -> Drawn {
    let mut bars = Vec::new();
    for (name, colors, elsewhere) in shown(beside) {
        let book = if elsewhere { beside.unwrap_or(book) } else { book };
        let get = |figure| book.get(drain::SECTION, name, figure);
        let (Some(cpu), Some(user)) = (get(drain::CPU), get(drain::USER)) else { continue };
        let user = user.median.min(cpu.median);
        let range = Some((cpu.least, cpu.most));
        bars.push(Bar { name, parts: vec![cpu.median - user, user], range, colors });
    }
    draw_bars(path, "CPU time per packet in ns: system (dark) and user (light); less is better", &bars)
}

fn draw_bars(path: &Path, title: &str, bars: &[Bar]) -> Drawn {
    const ROW: u32 = 26;
    const NAMES: i32 = 260;
    const WIDTH: u32 = 860;
    const TOP: i32 = 44;
    let height = TOP as u32 + ROW * bars.len() as u32 + 12;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    area.draw(&Text::new(title.to_owned(), (12, 12), (FONT, 16).into_font().color(&DARK)))?;
    let longest = bars.iter().map(|bar| bar.range.map_or(0.0, |range| range.1)).fold(1.0, f64::max);
    let scale = f64::from(WIDTH as i32 - NAMES - 80) / longest;
    let x = |value: f64| NAMES + (value * scale) as i32;
    for (row, bar) in bars.iter().enumerate() {
        let (top, middle) = (TOP + row as i32 * ROW as i32, TOP + row as i32 * ROW as i32 + 10);
        let right = (FONT, 13).into_font().color(&DARK).pos(Pos::new(HPos::Right, VPos::Center));
        area.draw(&Text::new(bar.name, (NAMES - 10, middle), right))?;
        let mut from = 0.0;
        for (part, color) in bar.parts.iter().zip(bar.colors) {
            area.draw(&Rectangle::new([(x(from), top), (x(from + part), top + 20)], color.filled()))?;
            from += part;
        }
        let mut end = x(from);
        if let Some((least, most)) = bar.range {
            area.draw(&PathElement::new(vec![(x(least), middle), (x(most), middle)], DARK.stroke_width(1)))?;
            end = end.max(x(most));
        }
        let left = (FONT, 13).into_font().color(&DARK).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(format!("{from:.0}"), (end + 6, middle), left))?;
    }
    area.present()?;
    Ok(())
}

struct Line {
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

fn latencies(path: &Path, book: &Book) -> Drawn {
    const NAMES: [(&str, RGBColor); 5] = [
        (latency::NO_QUEUE, FLOOR_LIGHT),
        (floor::ONE.name, FLOOR),
        (ours::ACCEPT_ALL.name, OURS),
        (peers::NFQ.name, PEERS),
        (peers::NFQ_CHANNEL.name, PEERS_LIGHT),
    ];
    let area = SVGBackend::new(path, (860, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let (legend, rest) = area.split_vertically(30);
    for (index, (name, color)) in NAMES.into_iter().enumerate() {
        let x = 20 + 168 * index as i32;
        legend.draw(&PathElement::new(vec![(x, 18), (x + 18, 18)], color.stroke_width(3)))?;
        let style = (FONT, 13).into_font().color(&DARK).pos(Pos::new(HPos::Left, VPos::Center));
        legend.draw(&Text::new(name, (x + 24, 18), style))?;
    }
    let halves = rest.split_evenly((1, 2));
    for (half, (figure, title)) in
        halves.iter().zip([(latency::MEDIAN, "median latency, µs"), (latency::P99, "99th percentile, µs")])
    {
        let lines = NAMES.map(|(name, color)| {
            let point = |rate: u64| Some((rate as f64, book.median(&latency::section(rate), name, figure)?));
            Line { color, points: latency::RATES.into_iter().filter_map(point).collect() }
        });
        draw_lines(half, title, &lines)?;
    }
    area.present()?;
    Ok(())
}

fn adaptive(path: &Path, book: &Book) -> Drawn {
    let area = SVGBackend::new(path, (1100, 380)).into_drawing_area();
    area.fill(&WHITE)?;
    let line = |figure: &str, color| {
        let get = |rate: u64| book.get(latency::SWEEP_SECTION, &rate.to_string(), figure);
        let point = |rate| get(rate).map(|Summary { median, .. }| (rate as f64, median));
        Line { color, points: latency::SWEEP.into_iter().filter_map(point).collect() }
    };
    let panels = area.split_evenly((1, 3));
    draw_lines(&panels[0], "verdicts per send", &[line(latency::BATCH, OURS)])?;
    let latencies = [line(latency::MEDIAN, OURS), line(latency::P99, OURS_LIGHT)];
    draw_lines(&panels[1], "latency, µs: median (dark), p99 (light)", &latencies)?;
    draw_lines(&panels[2], "CPU time per packet, ns", &[line(latency::CPU, OURS)])?;
    area.present()?;
    Ok(())
}

/// Lines over packets per second. Both axes are logarithmic.
fn draw_lines(area: &Area<'_>, title: &str, lines: &[Line]) -> Drawn {
    let points = || lines.iter().flat_map(|line| &line.points);
    let bounds = |part: fn(&(f64, f64)) -> f64| {
        let least = points().map(part).fold(f64::INFINITY, f64::min).max(1e-3);
        (least, points().map(part).fold(least, f64::max))
    };
    if points().next().is_none() {
        return Ok(());
    }
    let ((left, right), (low, high)) = (bounds(|point| point.0), bounds(|point| point.1));
    // Whole decades, so that labels do not overlap.
    let (low, high) = (10_f64.powf(low.log10().floor()), 10_f64.powf((high * 1.05).log10().ceil()));
    let (x, y) = ((left * 0.8..right * 1.25).log_scale(), (low..high).log_scale());
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 16).into_font().color(&DARK))
        .margin(10)
        .x_label_area_size(38)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    let label = |value: &f64| match value {
        1e6.. => format!("{}M", value / 1e6),
        1e3.. => format!("{}k", value / 1e3),
        _ => format!("{value}"),
    };
    chart
        .configure_mesh()
        .x_desc("packets per second")
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .light_line_style(WHITE)
        .max_light_lines(1)
        .bold_line_style(RGBColor(0xe4, 0xe4, 0xe4))
        .label_style((FONT, 12).into_font().color(&DARK))
        .draw()?;
    for line in lines.iter().filter(|line| !line.points.is_empty()) {
        let color = line.color;
        chart.draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(3))?;
    }
    Ok(())
}
