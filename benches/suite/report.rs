//! The tables, for standard output and for `RESULTS.md`.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{
    busy, capability, drain, everyday, flood, floor, flows,
    goals::{self, Goal, Wanted},
    latency, machine, memory, ours, peers,
    summary::{Book, Summary},
    syscalls, tcp, waits,
};

/// The peer that needs a C library.
pub mod library {
    pub const NAME: &str = "libnetfilter_queue";
}

/// The file in which the libnetfilter_queue benchmark leaves its figures for the report. Up to this
/// age they are taken to be of the same run.
const LEFT: &str = "libnetfilter_queue.tsv";
const SAME_RUN: Duration = Duration::from_secs(1800);

pub fn leave(book: &Book) {
    fs::write(left(), book.to_lines()).unwrap_or_else(|error| eprintln!("{}: {error}", left().display()));
}

pub fn found() -> Option<Book> {
    let age = SystemTime::now().duration_since(fs::metadata(left()).ok()?.modified().ok()?).unwrap_or_default();
    (age < SAME_RUN).then(|| Book::from_lines(&fs::read_to_string(left()).ok()?)).flatten()
}

fn left() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(LEFT)
}

/// The whole report, in Markdown. `beside` has the figures of the libnetfilter_queue benchmark.
pub fn whole(book: &Book, beside: Option<&Book>, ledger: &[String], quick: bool) -> String {
    let mut text = head(quick);
    text += match beside {
        None => "libnetfilter_queue was not measured: it is not installed. Its benchmark names the package.\n",
        Some(_) => {
            "The figures of libnetfilter_queue are from its own benchmark in the same run, in which it took turns with \
             this crate. Ratios with it use the figures of that benchmark only.\n"
        }
    };
    let goals = goals::all(book, beside);
    section(&mut text, "Goals", goal_table(&goals));
    section(&mut text, "CPU time per packet, prefilled queue", cpu_table(book, beside));
    section(&mut text, "Throughput under a flood", flood_table(book, beside));
    section(&mut text, "One-way latency, µs", latency_table(book));
    section(&mut text, "Everyday rates", everyday_table(book));
    section(&mut text, "Busy host: sender, consumer and a third busy thread on two processors", busy_table(book));
    section(&mut text, "TCP goodput, one stream", tcp_table(book, beside));
    section(&mut text, "Decided flows", flow_table(book));
    let figures = [flows::FLOWS, flows::DECIDE, flows::GROWN, flows::FORGET];
    section(&mut text, "Many decided flows", plain_table(book, flows::MANY, &[flows::OURS], &figures));
    section(&mut text, "Time from submit to send, µs", waits_table(book));
    section(&mut text, "The adaptive policy from idle to overload", sweep_table(book));
    section(&mut text, "Capability check (capget) after each send", capability_table(book));
    section(&mut text, "Memory", plain_table(book, memory::SECTION, &memory::ALL, &[memory::RATIO]));
    let names: Vec<&str> = ledger.iter().map(String::as_str).collect();
    section(&mut text, "Cost of a verdict in the ledger", plain_table(book, goals::LEDGER, &names, &["ns/verdict"]));
    text
}

/// The report of the libnetfilter_queue benchmark alone.
pub fn of_library(book: &Book, quick: bool) -> String {
    let mut text = head(quick);
    section(&mut text, "CPU time per packet, prefilled queue", cpu_table(book, Some(book)));
    section(&mut text, "Throughput under a flood", flood_table(book, Some(book)));
    section(&mut text, "TCP goodput, one stream", tcp_table(book, Some(book)));
    text
}

fn head(quick: bool) -> String {
    let machine = machine::describe();
    let mut text = format!("Measured on: {machine}. This crate: {}.\n\n", env!("CARGO_PKG_VERSION"));
    if quick {
        text += "A quick run: it only checks that everything works. The figures mean nothing.\n\n";
    }
    text + "Each figure is the median of several rounds, with minimum and maximum in brackets. The contenders took turns.\n\
     \"floor\" is a raw netlink loop without any crate; \"/ X\" is the ratio to X.\n\
     Busy polling is off by default. Where it is on, the name has `busy_poll`.\n"
}

fn section(text: &mut String, title: &str, table: Vec<Vec<String>>) {
    // The first row is the header.
    if table.len() < 2 {
        return;
    }
    let _ = write!(text, "\n## {title}\n\n");
    let widths: Vec<usize> = (0..table[0].len())
        .map(|column| table.iter().map(|row| row[column].chars().count()).max().unwrap_or_default())
        .collect();
    for (index, row) in table.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:width$} |"));
        let _ = writeln!(text, "|{}", cells.collect::<String>());
        if index == 0 {
            let _ = writeln!(
                text,
                "|{}",
                widths.iter().map(|width| format!("{:-<1$}|", "", width + 2)).collect::<String>()
            );
        }
    }
}

fn header(cells: &[&str]) -> Vec<Vec<String>> {
    vec![cells.iter().map(|cell| (*cell).to_owned()).collect()]
}

fn goal_table(goals: &[Goal]) -> Vec<Vec<String>> {
    let mut table = header(&["goal", "wanted", "measured", ""]);
    for goal in goals {
        let wanted = match goal.wanted {
            Wanted::AtMost(limit) => format!("≤ {limit:.2}"),
            Wanted::AtLeast(limit) => format!("≥ {limit:.2}"),
            Wanted::Below(limit) => format!("< {limit:.2}"),
        };
        let (measured, met) = match (goal.measured, goal.is_met()) {
            (Some(measured), Some(true)) => (significant(measured), "met"),
            (Some(measured), _) => (significant(measured), "NOT MET"),
            (None, _) => ("–".to_owned(), "not measured"),
        };
        table.push(vec![goal.text.clone(), wanted, measured, met.to_owned()]);
    }
    table
}

/// The contenders of the flood and CPU measurements, each with the book that has its figures.
fn rows<'a>(book: &'a Book, beside: Option<&'a Book>) -> impl Iterator<Item = (&'static str, &'a Book)> {
    let here = floor::ALL.into_iter().chain(ours::ALL).chain(peers::ALL);
    here.map(move |contender| (contender.name, book)).chain(beside.map(|beside| (library::NAME, beside)))
}

fn cpu_table(book: &Book, beside: Option<&Book>) -> Vec<Vec<String>> {
    let mut table = header(&[
        "",
        "CPU ns",
        "user",
        "system",
        "/ one batch",
        "/ packed singles",
        "receive calls",
        "send calls",
        "other calls",
        "allocations",
    ]);
    for (name, book) in rows(book, beside) {
        let Some(cpu) = book.get(drain::SECTION, name, drain::CPU) else { continue };
        let get = |section, figure| book.median(section, name, figure).map_or("–".to_owned(), significant);
        let ratio = |floor: &str| book.ratio(drain::SECTION, drain::CPU, name, floor).map_or("–".to_owned(), spread2);
        table.push(vec![
            name.to_owned(),
            spread(cpu),
            get(drain::SECTION, drain::USER),
            get(drain::SECTION, drain::SYSTEM),
            ratio(floor::BATCH.name),
            ratio(floor::PACKED.name),
            get(syscalls::SECTION, syscalls::RECEIVES),
            get(syscalls::SECTION, syscalls::SENDS),
            get(syscalls::SECTION, syscalls::OTHERS),
            get(drain::SECTION, drain::ALLOCATIONS),
        ]);
    }
    table
}

fn flood_table(book: &Book, beside: Option<&Book>) -> Vec<Vec<String>> {
    let mut table = header(&["", "packets/s", "/ nfq", "CPU ns per packet"]);
    for (name, book) in rows(book, beside) {
        let Some(rate) = book.get(flood::SECTION, name, flood::RATE) else { continue };
        let ratio = book.ratio(flood::SECTION, flood::RATE, name, peers::NFQ.name);
        let cpu = book.get(flood::SECTION, name, flood::CPU);
        let dash = || "–".to_owned();
        table.push(vec![
            name.to_owned(),
            spread(rate),
            ratio.map_or_else(dash, spread2),
            cpu.map_or_else(dash, spread),
        ]);
    }
    table
}

fn flow_table(book: &Book) -> Vec<Vec<String>> {
    let no_queue = flows::Way::NoQueue.name();
    let mut table = header(&[
        "what comes to the queue",
        "datagrams/s",
        "/ no queue",
        "TCP stream, Gbit/s",
        "/ no queue",
        "TCP connections/s",
        "/ no queue",
        flows::CPU,
    ]);
    for way in flows::Way::ALL {
        let name = way.name();
        let figures =
            [(flows::DATAGRAMS, flows::RATE), (flows::STREAM, flows::GOODPUT), (flows::CONNECTIONS, flows::RATE)];
        let cells = figures.into_iter().flat_map(|(section, figure)| {
            let value = book.get(section, name, figure).map_or("–".to_owned(), spread);
            let ratio = book.ratio(section, figure, name, no_queue).map_or("–".to_owned(), spread2);
            [value, ratio]
        });
        let cpu = book.get(flows::CONNECTIONS, name, flows::CPU).map_or("–".to_owned(), spread);
        table.push([name.to_owned()].into_iter().chain(cells).chain([cpu]).collect());
    }
    let measured = table.iter().skip(1).any(|row| row[1..].iter().any(|cell| cell != "–"));
    if measured { table } else { Vec::new() }
}

fn latency_table(book: &Book) -> Vec<Vec<String>> {
    let mut table = header(&["", "packets/s", "p50", "p99", "p99.9", "lost %", "CPU ns per packet"]);
    for rate in latency::RATES {
        for name in latency::contenders(rate).map(|c| c.map_or(latency::NO_QUEUE, |c| c.name)) {
            let get = |figure| book.get(&latency::section(rate), name, figure);
            let Some(median) = get(latency::MEDIAN) else { continue };
            let rest = [latency::P99, latency::P999].map(|figure| get(figure).map_or("–".to_owned(), spread));
            let lost = get(latency::LOST).map_or("–".to_owned(), |lost| significant(lost.median));
            let cpu = get(latency::CPU).map_or("–".to_owned(), spread);
            table
                .push([vec![name.to_owned(), rate.to_string(), spread(median)], rest.into(), vec![lost, cpu]].concat());
        }
    }
    table
}

fn busy_table(book: &Book) -> Vec<Vec<String>> {
    let figures = [latency::MEDIAN, latency::P99, latency::CPU];
    let mut table = header(&[
        "",
        "packets/s",
        "p50 µs",
        "p99 µs",
        "CPU ns per packet",
        "p50 / recv 1",
        "p99 / recv 1",
        "CPU / recv 1",
        "lost %",
    ]);
    for rate in busy::RATES {
        let section = busy::section(rate);
        for name in busy::contenders().map(|contender| contender.name) {
            let Some(lost) = book.median(&section, name, latency::LOST) else { continue };
            let spreads = figures.map(|figure| book.get(&section, name, figure).map_or("–".to_owned(), spread));
            let ratios = figures
                .map(|figure| book.ratio(&section, figure, name, floor::ONE.name).map_or("–".to_owned(), spread2));
            let cells = [name.to_owned(), rate.to_string()].into_iter().chain(spreads).chain(ratios);
            table.push(cells.chain([significant(lost)]).collect());
        }
    }
    table
}

fn everyday_table(book: &Book) -> Vec<Vec<String>> {
    let mut table = header(&[
        "blocking and raw loops, nfq, and this crate by its ways of receiving",
        "packets/s",
        "CPU µs per packet",
        "p50 µs",
        "p99 µs",
        "system calls per packet",
        "other threads' wake-ups/s",
        "CPU / raw AsyncFd loop",
        "CPU / blocking",
        "p50 / blocking",
        "p99 / blocking",
        "lost %",
    ]);
    for rate in everyday::RATES {
        let section = everyday::section(rate);
        for name in everyday::contenders(rate).map(|contender| contender.name) {
            let Some(cpu) = book.get(&section, name, latency::CPU) else { continue };
            let cpu = Summary { median: cpu.median / 1e3, least: cpu.least / 1e3, most: cpu.most / 1e3, ..cpu };
            let get = |figure| book.get(&section, name, figure).map_or("–".to_owned(), spread);
            let middle = |figure| book.median(&section, name, figure).map_or("–".to_owned(), significant);
            let ratio =
                |figure, reference| book.ratio(&section, figure, name, reference).map_or("–".to_owned(), spread2);
            let blocking = everyday::BLOCKING.name;
            table.push(vec![
                name.to_owned(),
                rate.to_string(),
                spread(cpu),
                get(latency::MEDIAN),
                get(latency::P99),
                middle(everyday::CALLS),
                middle(everyday::WAKE_UPS),
                ratio(latency::CPU, everyday::raw_loop(name)),
                ratio(latency::CPU, blocking),
                ratio(latency::MEDIAN, blocking),
                ratio(latency::P99, blocking),
                middle(latency::LOST),
            ]);
        }
    }
    table
}

fn capability_table(book: &Book) -> Vec<Vec<String>> {
    let mut table = header(&["", "ns/check", "verdicts/send", "CPU ns/packet", "check / CPU"]);
    for share in capability::shares(book) {
        let figures = [share.check_ns, share.per_send, share.cpu_ns, share.of_cpu].map(significant);
        table.push([share.load].into_iter().chain(figures).collect());
    }
    table
}

fn tcp_table(book: &Book, beside: Option<&Book>) -> Vec<Vec<String>> {
    let mut table = header(&["", "Gbit/s", "/ no queue"]);
    let here = tcp::contenders().map(|(name, _)| (name, book)).into_iter();
    for (name, book) in here.chain(beside.map(|beside| (library::NAME, beside))) {
        let Some(rate) = book.get(tcp::SECTION, name, tcp::GOODPUT) else { continue };
        let ratio = book.ratio(tcp::SECTION, tcp::GOODPUT, name, tcp::NO_QUEUE);
        table.push(vec![name.to_owned(), spread(rate), ratio.map_or("–".to_owned(), spread2)]);
    }
    table
}

fn waits_table(book: &Book) -> Vec<Vec<String>> {
    let names: Vec<String> =
        waits::CAPS.into_iter().flat_map(|cap| waits::RATES.map(|rate| waits::name(cap, rate))).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    plain_table(book, waits::SECTION, &names, &[waits::MEDIAN, waits::P99, waits::P999, waits::MOST])
}

fn sweep_table(book: &Book) -> Vec<Vec<String>> {
    let names: Vec<String> = latency::SWEEP.map(|rate| rate.to_string()).into();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let figures = [latency::BATCH, latency::MEDIAN, latency::P99, latency::CPU, latency::LOST];
    plain_table(book, latency::SWEEP_SECTION, &names, &figures)
}

fn plain_table(book: &Book, section: &str, names: &[&str], figures: &[&str]) -> Vec<Vec<String>> {
    let mut table = header(&[&[""], figures].concat());
    for name in names {
        let cells: Vec<Option<Summary>> = figures.iter().map(|figure| book.get(section, name, figure)).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|cell| cell.map_or("–".to_owned(), spread));
            table.push([(*name).to_owned()].into_iter().chain(cells).collect());
        }
    }
    table
}

fn spread(summary: Summary) -> String {
    let Summary { median, least, most, rounds } = summary;
    match rounds {
        1 => significant(median),
        _ => format!("{} ({}–{})", significant(median), significant(least), significant(most)),
    }
}

fn spread2(summary: Summary) -> String {
    format!("{:.2} ({:.2}–{:.2})", summary.median, summary.least, summary.most)
}

/// Three significant digits, but all digits before the decimal point.
fn significant(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.1.. => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
