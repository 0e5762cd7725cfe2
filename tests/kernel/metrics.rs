//! The numbers of a queue as a Prometheus server reads them.

use std::collections::BTreeMap;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio_nfqueue::{Queue, metrics::QueueMetrics};

use crate::{
    common::{Traffic, divert, hold, next, soon, start, udp_in},
    support,
};

tests![
    one a_scrape_before_and_after_a_load_adds_up_to_the_packet,
    one a_counter_does_not_fall_when_a_verdict_finds_no_packet,
    one a_queue_that_is_bound_again_counts_on,
    one each_number_of_a_queue_has_its_own_metrics,
    one waiting_times_are_those_of_the_packets,
];

/// A program's recorder, and what it would serve.
struct Scraper {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Scraper {
    fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        Self { handle: recorder.handle(), recorder }
    }

    fn register(&self, queue: &Queue) -> QueueMetrics {
        ::metrics::with_local_recorder(&self.recorder, || QueueMetrics::register(&queue.sink()))
    }

    fn scrape(&self, metrics: &QueueMetrics) -> BTreeMap<String, f64> {
        metrics.update();
        let text = self.handle.render();
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap();
                (name.to_owned(), value.parse().unwrap())
            })
            .collect()
    }
}

async fn a_scrape_before_and_after_a_load_adds_up_to_the_packet() {
    let (mut queue, _divert) = start(Queue::builder(3));
    let traffic = Traffic::new(100);
    let scraper = Scraper::new();
    let metrics = scraper.register(&queue);
    let before = scraper.scrape(&metrics);
    for (index, packet) in hold(&mut queue, &traffic, 0..1000).await.into_iter().enumerate() {
        match index % 10 {
            0..=6 => packet.accept().submit().unwrap(),
            7 | 8 => packet.drop().submit().unwrap(),
            _ => packet.requeue_bypass(9).submit().unwrap(),
        }
    }
    soon("the flush", queue.sink().flush()).await;
    let held = hold(&mut queue, &traffic, 1000..1003).await;
    let after = scraper.scrape(&metrics);
    let more = |name: &str| after[name] - before[name];
    for (action, packets) in [("accept", 700.0), ("drop", 200.0), ("requeue", 100.0), ("repeat", 0.0)] {
        assert_eq!(more(&format!("nfqueue_verdicts_total{{queue=\"3\",action=\"{action}\"}}")), packets);
        assert_eq!(more(&format!("nfqueue_verdict_wait_seconds_count{{queue=\"3\",action=\"{action}\"}}")), packets);
        let infinite = format!("nfqueue_verdict_wait_seconds_bucket{{queue=\"3\",action=\"{action}\",le=\"+Inf\"}}");
        assert_eq!(more(&infinite), packets);
    }
    assert_eq!(more("nfqueue_packets_received_total{queue=\"3\"}"), 1003.0);
    assert_eq!(more("nfqueue_packets_queued_total{queue=\"3\"}"), 1003.0);
    assert_eq!((after["nfqueue_in_flight{queue=\"3\"}"], after["nfqueue_queue_length{queue=\"3\"}"]), (3.0, 3.0));
    assert!(after["nfqueue_oldest_undecided_seconds{queue=\"3\"}"] > 0.0);
    assert_eq!(after["nfqueue_queue_max_length{queue=\"3\"}"], 1024.0);
    assert_eq!(more("nfqueue_packets_lost_total{queue=\"3\"}"), 0.0);
    let dropped = |reason| more(&format!("nfqueue_packets_dropped_total{{queue=\"3\",reason=\"{reason}\"}}"));
    assert_eq!((dropped("queue_full"), dropped("user")), (0.0, 0.0));
    // Each name is described.
    let text = scraper.handle.render();
    for name in after.keys() {
        let name = name.split('{').next().unwrap();
        assert!(text.contains(&format!("# HELP {name} ")), "{name}");
    }
    drop(held);
}

async fn a_counter_does_not_fall_when_a_verdict_finds_no_packet() {
    let (mut queue, divert_of_queue) = start(Queue::builder(3));
    let traffic = Traffic::new(100);
    let scraper = Scraper::new();
    let metrics = scraper.register(&queue);
    let held = hold(&mut queue, &traffic, 0..10).await;
    // The kernel drops what is queued.
    support::drop_now(divert_of_queue);
    let mut last = scraper.scrape(&metrics);
    for packet in held {
        packet.accept().submit().unwrap();
        soon("the flush", queue.sink().flush()).await;
        let now = scraper.scrape(&metrics);
        for (name, value) in &last {
            if name.split('{').next().unwrap().ends_with("_total") {
                assert!(now[name] >= *value, "{name}: {value}, then {}", now[name]);
            }
        }
        last = now;
    }
    let _again = divert([udp_in().to_queue(3)]);
    traffic.send([10]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([10]).await;
    let now = scraper.scrape(&metrics);
    assert_eq!(now["nfqueue_packets_gone_total{queue=\"3\"}"], 10.0);
    assert_eq!(now["nfqueue_verdicts_total{queue=\"3\",action=\"accept\"}"], 11.0);
}

async fn a_queue_that_is_bound_again_counts_on() {
    let scraper = Scraper::new();
    let traffic = Traffic::new(100);
    for round in 1..=2 {
        let (mut queue, divert) = start(Queue::builder(3));
        let metrics = scraper.register(&queue);
        for packet in hold(&mut queue, &traffic, 0..50).await {
            packet.accept().submit().unwrap();
        }
        traffic.expect(0..50).await;
        // The timer thread may have sent some, and counts them afterwards.
        soon("the flush", queue.sink().flush()).await;
        let now = scraper.scrape(&metrics);
        assert_eq!(now["nfqueue_packets_received_total{queue=\"3\"}"], f64::from(50 * round));
        assert_eq!(now["nfqueue_verdicts_total{queue=\"3\",action=\"accept\"}"], f64::from(50 * round));
        soon("the shutdown", queue.close()).await.unwrap();
        support::drop_now(divert);
    }
}

async fn each_number_of_a_queue_has_its_own_metrics() {
    let queue = soon("the binding", Queue::builder(4..6).bind()).await.unwrap();
    let mut queue = queue;
    let _divert = divert([udp_in().to_queue(5)]);
    let traffic = Traffic::new(100);
    let scraper = Scraper::new();
    let metrics = scraper.register(&queue);
    for packet in hold(&mut queue, &traffic, 0..20).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..20).await;
    let now = scraper.scrape(&metrics);
    let received = |number| now[&format!("nfqueue_packets_received_total{{queue=\"{number}\"}}")];
    assert_eq!((received(4), received(5)), (0.0, 20.0));
}

async fn waiting_times_are_those_of_the_packets() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let mut slow = hold(&mut queue, &traffic, 0..5).await;
    let held = std::time::Instant::now();
    while held.elapsed() < std::time::Duration::from_millis(30) {
        for packet in hold(&mut queue, &traffic, 5..10).await {
            packet.drop().submit().unwrap();
        }
        soon("the flush", queue.sink().flush()).await;
    }
    let at_least = held.elapsed();
    for packet in slow.drain(..) {
        packet.accept().submit().unwrap();
    }
    soon("the flush", queue.sink().flush()).await;
    let stats = queue.stats();
    let (accepted, dropped) = (stats.waited.accepted, stats.waited.dropped);
    assert_eq!((accepted.count(), dropped.count()), (5, stats.decided.dropped));
    // To within a 64th.
    assert!(accepted.max() >= at_least * 63 / 64, "{accepted:?}, {at_least:?}");
    assert!(accepted.quantile(0.0).unwrap() >= at_least * 63 / 64, "{accepted:?}, {at_least:?}");
    assert!(dropped.quantile(0.5).unwrap() < accepted.quantile(0.5).unwrap(), "{stats:?}");
}
