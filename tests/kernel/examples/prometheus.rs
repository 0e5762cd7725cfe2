//! `prometheus`: its numbers are those of the packets, and its dashboard and alerts use numbers
//! that it has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
};

use nix::sys::signal::Signal;

use super::{PORT, Program, http};
use crate::support;

tests![
    sync prometheus_serves_numbers_that_add_up_to_the_packet,
    sync prometheus_counts_connections_and_does_not_queue_scrapes,
    sync prometheus_names_an_address_that_is_in_use,
    sync prometheus_dashboard_and_alerts_use_numbers_that_exist,
];

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9900);

fn start() -> Program {
    let mut program = Program::start("prometheus", &["--port", "9000"]);
    program.until_ready();
    program
}

fn end(program: Program, expected: &str) {
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(output, expected);
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
}

fn scrape() -> String {
    let (status, text) = http::request(LISTEN, "GET", "/metrics");
    assert_eq!(status, 200, "{text}");
    text
}

/// The numbers by name and labels.
fn numbers(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name, value.parse().unwrap())
        })
        .collect()
}

fn prometheus_serves_numbers_that_add_up_to_the_packet() {
    let program = start();
    let before = scrape();
    let (receiver, sender) = (support::udp((Ipv4Addr::LOCALHOST, PORT)), support::udp((Ipv4Addr::LOCALHOST, 0)));
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    for _ in 0..100 {
        sender.send(b"forbidden").unwrap();
        for _ in 0..3 {
            sender.send(b"allowed").unwrap();
            let mut datagram = [0; 16];
            let length = receiver.recv(&mut datagram).expect("an allowed datagram");
            assert_eq!(&datagram[..length], b"allowed");
        }
    }
    let mut after = String::new();
    support::wait_until("all verdicts are counted", || {
        after = scrape();
        numbers(&after)["nfqueue_in_flight{queue=\"0\"}"] == 0.0
    });
    let (before, after) = (numbers(&before), numbers(&after));
    let more = |name: &str| after[name] - before[name];
    for (action, packets) in [("accept", 300.0), ("drop", 100.0), ("repeat", 0.0), ("requeue", 0.0)] {
        assert_eq!(more(&format!("nfqueue_verdicts_total{{queue=\"0\",action=\"{action}\"}}")), packets);
        assert_eq!(more(&format!("nfqueue_verdict_wait_seconds_count{{queue=\"0\",action=\"{action}\"}}")), packets);
    }
    assert_eq!(more("nfqueue_packets_received_total{queue=\"0\"}"), 400.0);
    assert_eq!(after["nfqueue_kernel_counters_readable{queue=\"0\"}"], 1.0);
    assert_eq!(more("nfqueue_packets_queued_total{queue=\"0\"}"), 400.0);
    for name in ["nfqueue_packets_lost_total", "nfqueue_packets_unanswered_total", "nfqueue_queue_length"] {
        assert_eq!(after[format!("{name}{{queue=\"0\"}}").as_str()], 0.0, "{name}");
    }
    end(program, "received 400 accepted 300 dropped 100 lost 0\n");
}

fn prometheus_counts_connections_and_does_not_queue_scrapes() {
    let program = start();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (_server, _) = listener.accept().unwrap();
    // The client's SYN and ACK, and perhaps a SYN that was sent again.
    let received = || numbers(&scrape())["nfqueue_packets_received_total{queue=\"0\"}"];
    let count = received();
    assert!(count >= 2.0, "{count}");
    for _ in 0..3 {
        assert_eq!(received(), count);
    }
    assert_eq!(http::request(LISTEN, "GET", "/").0, 404);
    assert_eq!(http::request(LISTEN, "POST", "/metrics").0, 405);
    end(program, &format!("received {count} accepted {count} dropped 0 lost 0\n"));
}

fn prometheus_names_an_address_that_is_in_use() {
    let _other = TcpListener::bind(LISTEN).unwrap();
    let (status, error) = Program::start("prometheus", &[]).fails();
    assert_eq!(status.code(), Some(1));
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("prometheus: listen on 127.0.0.1:9900: "), "{error}");
}

fn prometheus_dashboard_and_alerts_use_numbers_that_exist() {
    let program = start();
    let text = scrape();
    let existing: BTreeSet<&str> = numbers(&text).keys().map(|name| name.split('{').next().unwrap()).collect();

    // A line for each; `source.rs` parses the whole.
    let dashboard = include_str!("../../../examples/prometheus/dashboard.json").lines().filter_map(|line| {
        let (name, text) = line.trim().split_once(": \"")?;
        // For the panels, for the lists of labels.
        let text = text.trim_end_matches(',').strip_suffix('"')?;
        ["\"expr\"", "\"definition\""].contains(&name).then(|| text.replace("\\\"", "\""))
    });
    let alerts = include_str!("../../../examples/prometheus/alerts.yml").lines();
    let alerts = alerts.filter_map(|line| Some(line.trim().strip_prefix("expr: ")?.to_owned()));
    let expressions: Vec<String> = dashboard.chain(alerts).collect();
    assert!(expressions.len() > 25, "{expressions:?}");

    for expression in &expressions {
        let names = names(expression);
        // `up` is a number of Prometheus itself.
        assert!(!names.is_empty() || expression.starts_with("up{"), "{expression}");
        for name in names {
            assert!(existing.contains(name), "{name} in {expression}");
        }
        for label in labels(expression) {
            assert!(text.contains(label), "{label} in {expression}");
        }
    }
    end(program, "received 0 accepted 0 dropped 0 lost 0\n");
}

/// The metrics in an expression: the words with an underscore that are no function and no variable.
fn names(expression: &str) -> Vec<&str> {
    let ends_word = |letter: char| !letter.is_ascii_alphanumeric() && !"_:$".contains(letter);
    // Between braces are conditions on labels.
    let parts = expression.split(['{', '}']).step_by(2).flat_map(|text| text.split_inclusive('('));
    let words = parts.flat_map(|part| {
        // The word before a parenthesis is a function.
        let (text, functions) = part.strip_suffix('(').map_or((part, 0), |text| (text, 1));
        text.rsplit(ends_word).skip(functions)
    });
    words.filter(|word| word.contains('_') && !word.starts_with('$')).collect()
}

/// The conditions on labels, but those with a variable, and those on the job, which is the user's.
fn labels(expression: &str) -> Vec<&str> {
    let conditions = expression.split(['{', '}', ',']).filter(|part| part.contains("=\"") && part.ends_with('"'));
    conditions.filter(|part| !part.contains('$') && !part.starts_with("job=")).collect()
}
