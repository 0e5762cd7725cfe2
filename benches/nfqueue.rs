//! The benchmark suite: it compares this crate with the floor and with its peers. Each measurement
//! has network namespaces of its own.
//!
//! `cargo bench --workspace` runs it whole and writes `benches/RESULTS.md` and `benches/plots/`.
//! `cargo bench --workspace --bench nfqueue -- --help` lists the options.
#![allow(missing_docs)]

use std::{fs, path::Path, process::ExitCode};

use suite::{
    busy, capability, child, drain, everyday, flood, floor, flows, goals, latency, ledger_cost, memory,
    options::{Options, Scale, USAGE},
    ours, peers,
    plan::{self, Section},
    plots, report,
    summary::Book,
    support, syscalls, tcp, waits,
};

mod suite;

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("nfqueue: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if options.help {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if options.gate {
        return ExitCode::SUCCESS;
    }
    let scale = options.scale();
    let sections = sections(&scale);
    if options.list {
        plan::list(&sections, &options);
        return ExitCode::SUCCESS;
    }
    // Before any other thread starts: an ordinary user becomes root of a user namespace.
    if let Err(sentence) = support::enter() {
        eprintln!("nfqueue: {sentence}");
        return ExitCode::FAILURE;
    }
    if !options.child.is_empty() {
        child::run(&options.child, &[]);
        return ExitCode::SUCCESS;
    }
    let mut book = plan::run(&sections, &options);
    if book.is_empty() {
        eprintln!("nfqueue: no measurement has such a name; --list names them all");
        return ExitCode::SUCCESS;
    }
    let ledger = note_worst_order(&mut book);
    // Only in a whole run are those figures from the same run.
    let beside = options.complete().then(report::found).flatten();
    let text = report::whole(&book, beside.as_ref(), &ledger, options.quick);
    println!("{text}");
    if options.complete() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let written = fs::write(folder.join("RESULTS.md"), format!("# Results of `cargo bench --workspace`\n\n{text}"))
            .map_err(Into::into)
            .and_then(|()| plots::draw(&folder.join("plots"), &book, beside.as_ref()));
        if let Err(error) = written {
            eprintln!("nfqueue: cannot write the results to {}: {error}", folder.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn sections(scale: &Scale) -> Vec<Section<'static>> {
    let scale = *scale;
    let contenders = || floor::ALL.into_iter().chain(ours::ALL).chain(peers::ALL);

    let mut cpu = Section::new(drain::SECTION, scale.many_rounds);
    let mut saturated = Section::new(flood::SECTION, scale.rounds);
    let mut calls = Section::new(syscalls::SECTION, 1);
    let mut allocations = Section::new("allocations", 1);
    for contender in contenders() {
        cpu = cpu.step(contender.name, move |book| drain::measure(&contender, &scale, book));
        saturated = saturated.step(contender.name, move |book| flood::measure(&contender, &scale, book));
        calls = calls.step(contender.name, move |book| syscalls::measure(&contender, book));
        allocations = allocations.step(contender.name, move |book| drain::allocations(&contender, &scale, book));
    }

    let latencies = latency::RATES.map(|rate| {
        let mut latencies = Section::new("latency", scale.many_rounds);
        for contender in latency::contenders(rate) {
            let name = contender.map_or(latency::NO_QUEUE, |contender| contender.name);
            let run = move |book: &mut Book| latency::measure(contender.as_ref(), rate, &scale, book);
            latencies = latencies.step(format!("{name}, {rate}/s"), run);
        }
        latencies
    });

    let everyday = everyday::RATES.map(|rate| {
        let mut everyday = Section::new(everyday::SECTION, scale.rounds);
        for contender in everyday::contenders(rate) {
            let run = move |book: &mut Book| everyday::measure(&contender, rate, &scale, book);
            everyday = everyday.step(format!("{}, {rate}/s", contender.name), run);
        }
        everyday
    });

    let mut sweep = Section::new(latency::SWEEP_SECTION, scale.few_rounds);
    for rate in latency::SWEEP {
        let run = move |book: &mut Book| latency::sweep(&ours::ACCEPT_ALL, rate, &scale, book);
        sweep = sweep.step(format!("{rate}/s"), run);
    }

    let mut busy_host = Section::new(busy::SECTION, scale.many_rounds);
    for (rate, contender) in busy::RATES.into_iter().flat_map(|rate| busy::contenders().map(|c| (rate, c))) {
        let run = move |book: &mut Book| busy::measure(&contender, rate, &scale, book);
        busy_host = busy_host.step(format!("{}, {rate}/s", contender.name), run);
    }

    let check = Section::new(capability::SECTION, scale.rounds)
        .step(capability::CALL, move |book| capability::measure(&scale, book));

    let mut verdicts = Section::new(waits::SECTION, scale.few_rounds);
    for (cap, rate) in waits::CAPS.into_iter().flat_map(|cap| waits::RATES.map(|rate| (cap, rate))) {
        verdicts = verdicts.step(waits::name(cap, rate), move |book| waits::measure(cap, rate, &scale, book));
    }

    let mut goodput = Section::new(tcp::SECTION, scale.many_rounds);
    for (name, queue) in tcp::contenders() {
        goodput = goodput.step(name, move |book| tcp::measure(name, queue, &scale, book));
    }

    let mut held = Section::new(memory::SECTION, 1);
    for name in memory::ALL {
        held = held.step(name, move |book| memory::measure(name, &scale, book));
    }

    let mut own = Section::new(goals::LEDGER, scale.rounds);
    for (outstanding, order) in ledger_steps() {
        let run = move |book: &mut Book| ledger_cost::measure(outstanding, order, scale.packets * 30, book);
        own = own.step(ledger_cost::name(outstanding, order), run);
    }
    let mut datagrams = Section::new(flows::DATAGRAMS, scale.many_rounds);
    let mut streams = Section::new(flows::STREAM, scale.rounds);
    let mut connections = Section::new(flows::CONNECTIONS, scale.many_rounds);
    for way in flows::Way::ALL {
        datagrams = datagrams.step(way.name(), move |book| flows::datagrams(way, &scale, book));
        streams = streams.step(way.name(), move |book| flows::stream(way, &scale, book));
        connections = connections.step(way.name(), move |book| flows::connections(way, &scale, book));
    }
    let many = Section::new(flows::MANY, 1).step(flows::OURS, move |book| flows::many(&scale, book));

    let first = [cpu, saturated].into_iter().chain(latencies).chain(everyday);
    let rest = [
        busy_host,
        goodput,
        datagrams,
        streams,
        connections,
        many,
        sweep,
        check,
        verdicts,
        calls,
        allocations,
        held,
        own,
    ];
    first.chain(rest).collect()
}

fn ledger_steps() -> impl Iterator<Item = (usize, ledger_cost::Order)> {
    ledger_cost::ORDERS.into_iter().flat_map(|order| [(ledger_cost::FEW, order), (ledger_cost::MANY, order)])
}

/// Records the ratio of the worst order. Returns the names of the measurements.
fn note_worst_order(book: &mut Book) -> Vec<String> {
    use ledger_cost::{COST, FEW, MANY, ORDERS, SECTION, name};
    let ratio = |order| book.ratio(SECTION, COST, &name(MANY, order), &name(FEW, order)).map(|ratio| ratio.median);
    if let Some(worst) = ORDERS.into_iter().filter_map(ratio).reduce(f64::max) {
        book.note(goals::LEDGER, goals::LEDGER_WORST, goals::LEDGER_RATIO, worst);
    }
    ledger_steps().map(|(outstanding, order)| name(outstanding, order)).collect()
}
