//! The goals of this crate, as ratios within one run.

use super::{
    busy, capability, drain, everyday, flood, floor, flows, latency, memory, ours, peers,
    report::library,
    summary::{Book, Summary},
    tcp, waits,
};

pub struct Goal {
    pub text: String,
    pub wanted: Wanted,
    /// `None` if this run did not measure it.
    pub measured: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
pub enum Wanted {
    AtMost(f64),
    AtLeast(f64),
    Below(f64),
}

impl Goal {
    pub fn is_met(&self) -> Option<bool> {
        let measured = self.measured?;
        Some(match self.wanted {
            Wanted::AtMost(limit) => measured <= limit,
            Wanted::AtLeast(limit) => measured >= limit,
            Wanted::Below(limit) => measured < limit,
        })
    }
}

/// `beside` has the figures of the libnetfilter_queue benchmark.
pub fn all(book: &Book, beside: Option<&Book>) -> Vec<Goal> {
    use Wanted::{AtLeast, AtMost, Below};
    let middle = |summary: Option<Summary>| summary.map(|summary| summary.median);
    let ours = ours::ACCEPT_ALL.name;
    let one = floor::ONE.name;
    let cpu = |contender, reference| middle(book.ratio(drain::SECTION, drain::CPU, contender, reference));
    let rate = |book: &Book, peer| middle(book.ratio(flood::SECTION, flood::RATE, ours, peer));
    let latency = |rate, figure, contender| middle(book.ratio(&latency::section(rate), figure, contender, one));
    let busy_host = |rate, figure, contender| middle(book.ratio(&busy::section(rate), figure, contender, one));
    let tcp = |contender, reference| middle(book.ratio(tcp::SECTION, tcp::GOODPUT, contender, reference));

    let with_library = beside.and_then(|book| middle(book.ratio(drain::SECTION, drain::CPU, ours, library::NAME)));
    // The ratio to the better peer is the higher one.
    let with_better = cpu(ours, peers::NFQ.name).map(|nfq| with_library.map_or(nfq, |library| nfq.max(library)));

    let mut goals = Vec::new();
    let mut goal = |text: &str, wanted, measured| goals.push(Goal { text: text.to_owned(), wanted, measured });
    goal("CPU per packet: accept all / floor of one batch", AtMost(1.10), cpu(ours, floor::BATCH.name));
    let packed = floor::PACKED.name;
    goal("CPU per packet: eight tasks / floor of packed singles", AtMost(1.20), cpu(ours::EIGHT_TASKS.name, packed));
    goal("throughput under a flood: accept all / nfq", AtLeast(1.7), rate(book, peers::NFQ.name));
    let throughput = beside.and_then(|book| rate(book, library::NAME));
    goal("throughput under a flood: accept all / libnetfilter_queue", AtLeast(1.7), throughput);
    let better = match with_library {
        Some(_) => "CPU per packet: accept all / the better of nfq and libnetfilter_queue",
        None => "CPU per packet: accept all / nfq",
    };
    goal(better, AtMost(0.6), with_better);
    goal(
        "median latency at 1000/s: accept all / blocking recv 1, verdict 1",
        AtMost(1.2),
        latency(1_000, latency::MEDIAN, ours),
    );
    // Busy polling has an effect only while packets come sooner than its limit and the consumer
    // would sleep. At low rates and under a flood the figures are the same with it.
    for (way, contender) in [("accept all", ours), ("accept all, busy_poll(30 µs)", ours::BUSY_POLL.name)] {
        let text = format!("p99 latency at 100000/s: {way} / blocking recv 1, verdict 1");
        goal(&text, AtMost(0.5), latency(100_000, latency::P99, contender));
    }
    for (rate, longest, dearest) in [(60_000, 1.2, 1.1), (100_000, 0.5, 1.0)] {
        for (way, contender) in [("accept all", ours), ("accept all, 2 threads", ours::ACCEPT_ALL_TWO.name)] {
            let text = |what: &str| format!("{what} on a busy host at {rate}/s: {way} / blocking recv 1, verdict 1");
            goal(&text("p99 latency"), AtMost(longest), busy_host(rate, latency::P99, contender));
            goal(&text("CPU time"), AtMost(dearest), busy_host(rate, latency::CPU, contender));
        }
    }
    let share = capability::shares(book).into_iter().map(|share| share.of_cpu).reduce(f64::max);
    goal("capability check after each send / CPU time of a packet", Below(0.03), share);
    for (way, defaults, short) in
        [("", tcp::DEFAULTS, tcp::SHORT), (", busy_poll(30 µs)", tcp::BUSY_POLL, tcp::SHORT_BUSY_POLL)]
    {
        let text = |what: &str, reference: &str| format!("TCP goodput: {what}{way} / {reference}");
        goal(&text("defaults", "no queue"), AtLeast(0.7), tcp(defaults, tcp::NO_QUEUE));
        goal(&text("copy_range(128)", "no queue"), AtLeast(0.9), tcp(short, tcp::NO_QUEUE));
        goal(&text("defaults", "classic loop without GSO"), AtLeast(8.0), tcp(defaults, tcp::CLASSIC));
        let library = beside.and_then(|book| middle(book.ratio(tcp::SECTION, tcp::GOODPUT, defaults, library::NAME)));
        goal(&text("defaults", "libnetfilter_queue"), AtLeast(8.0), library);
    }
    let everyday =
        |rate, figure, contender, reference| middle(book.ratio(&everyday::section(rate), figure, contender, reference));
    for recv in ours::RECV.map(|contender| contender.name) {
        let rates = everyday::RATES;
        let (raw, blocking) = (everyday::raw_loop(recv), everyday::BLOCKING.name);
        for (what, figure, reference, name, limit) in [
            ("CPU a packet", latency::CPU, raw, "raw AsyncFd loop", 1.15),
            ("CPU a packet", latency::CPU, blocking, blocking, 1.35),
            ("p99", latency::P99, blocking, blocking, 1.2),
        ] {
            for rate in rates {
                let text = format!("{what} at {rate}/s: {recv} / {name}");
                goal(&text, AtMost(limit), everyday(rate, figure, recv, reference));
            }
        }
        for (what, figure, limit) in [
            ("system calls a packet", everyday::CALLS, 3.2),
            ("wake-ups a second of threads other than the consumer's", everyday::WAKE_UPS, 10.0),
        ] {
            for rate in &rates[..2] {
                let measured = book.median(&everyday::section(*rate), recv, figure);
                goal(&format!("{what} at {rate}/s: {recv}"), AtMost(limit), measured);
            }
        }
        let median = everyday(rates[0], latency::MEDIAN, recv, blocking);
        goal(&format!("p50 at {}/s: {recv} / {blocking}", rates[0]), AtMost(1.15), median);
    }
    let [no_queue, tracked, every, first, _, by_hand] = flows::Way::ALL.map(flows::Way::name);
    let flow = |section, figure, reference| middle(book.ratio(section, figure, first, reference));
    let datagrams = "datagrams/s, flows decided by their first packet";
    goal(&format!("{datagrams} / no queue"), AtLeast(0.9), flow(flows::DATAGRAMS, flows::RATE, no_queue));
    goal(
        "accepted flow, datagrams / tracked host without queue",
        AtLeast(0.95),
        flow(flows::DATAGRAMS, flows::RATE, tracked),
    );
    goal(&format!("{datagrams} / every packet queued"), AtLeast(5.0), flow(flows::DATAGRAMS, flows::RATE, every));
    let stream = flow(flows::STREAM, flows::GOODPUT, no_queue);
    goal("TCP goodput: flow decided by its first packet / no queue", AtLeast(0.95), stream);
    let connections = flow(flows::CONNECTIONS, flows::RATE, no_queue);
    goal("short TCP connections/s: first packet decides / no queue", AtLeast(0.8), connections);
    let connections = flow(flows::CONNECTIONS, flows::RATE, by_hand);
    goal("short connections / C loop with hand-written rules", AtLeast(0.95), connections);
    for cap in waits::CAPS {
        let wait = |rate| book.median(waits::SECTION, &waits::name(cap, rate), waits::P999);
        let longest = waits::RATES.into_iter().filter_map(wait).reduce(f64::max);
        let text = format!("time from submit to send: p99.9 / max_delay of {cap:?}");
        goal(&text, AtMost(1.0), longest.map(|us| us / (cap.as_secs_f64() * 1e6)));
    }
    goal("allocations per packet, accept all", Below(0.05), book.median(drain::SECTION, ours, drain::ALLOCATIONS));
    let eight = book.median(drain::SECTION, ours::EIGHT_TASKS.name, drain::ALLOCATIONS);
    goal("allocations per packet, eight tasks", Below(0.05), eight);
    let memory = book.median(memory::SECTION, memory::OURS, memory::RATIO);
    goal("memory: 16384 held packets of 1400 bytes / their bytes", AtMost(1.5), memory);
    let ledger = book.median(LEDGER, LEDGER_WORST, LEDGER_RATIO);
    goal("cost of a verdict in the ledger, worst order: 60000 outstanding / 1000", AtMost(1.5), ledger);
    goals
}

/// Under these names the ratio of the ledger's worst order is recorded.
pub const LEDGER: &str = "ledger";
pub const LEDGER_WORST: &str = "worst order";
pub const LEDGER_RATIO: &str = "ratio";
