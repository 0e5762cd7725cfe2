//! Packets through the whole crate, over a simulated kernel.
#![allow(missing_docs)]

use std::{hint::black_box, net::SocketAddr, time::Duration};

use criterion::{Criterion, Throughput, criterion_group};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio_nfqueue::{
    Packet, Queue,
    metrics::QueueMetrics,
    simulated::{self, TestPacket},
};

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = accept, serve, metrics
}

fn main() {
    // criterion knows no bench gate.
    if std::env::args().any(|argument| argument == "--gate") {
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}

/// Packets are sent, received and accepted, and each outcome is read.
fn accept(criterion: &mut Criterion) {
    const PACKETS: usize = 1000;
    let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse::<SocketAddr>().unwrap());
    let packet = TestPacket::udp(client, server, &[0x45; 64]);
    let mut group = criterion.benchmark_group("simulated/accept");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for (name, threads) in [("current_thread", 0), ("multi_thread", 2)] {
        let runtime = match threads {
            0 => tokio::runtime::Builder::new_current_thread().enable_all().build(),
            _ => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
        };
        let runtime = runtime.expect("a runtime");
        let (kernel, mut queue) = runtime.block_on(async { simulated::queue(Queue::builder(0)) }).expect("a queue");
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    let sent = kernel.send_all(std::iter::repeat_n(packet.clone(), PACKETS));
                    for _ in 0..PACKETS {
                        let packet = queue.recv().await.expect("a packet").expect("no failure");
                        packet.accept().submit().expect("it is open");
                    }
                    queue.sink().flush().await;
                    assert!(
                        sent.iter().all(|sent| black_box(sent.try_outcome()).is_some_and(|outcome| outcome.accepted))
                    );
                });
            });
        });
    }
}

/// A loop and `serve` with handlers that are ready at once, beside each other: both read until the
/// last outcome is there.
fn serve(criterion: &mut Criterion) {
    const PACKETS: usize = 1000;
    let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse::<SocketAddr>().unwrap());
    let packet = TestPacket::udp(client, server, &[0x45; 64]);
    let mut group = criterion.benchmark_group("simulated/serve");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for way in ["recv loop", "serve", "serve, in_flow_order"] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (kernel, mut queue) = runtime.block_on(async { simulated::queue(Queue::builder(0)) }).expect("a queue");
        let serving = async move {
            match way {
                "recv loop" => {
                    while let Some(packet) = queue.recv().await.transpose().expect("no failure") {
                        packet.accept().submit().expect("it is open");
                    }
                }
                "serve" => queue.serve(async |packet: Packet| packet.accept()).await.expect("no failure"),
                _ => queue.serve(async |packet: Packet| packet.accept()).in_flow_order().await.expect("no failure"),
            }
        };
        runtime.spawn(serving);
        group.bench_function(way, |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    let sent = kernel.send_all(std::iter::repeat_n(packet.clone(), PACKETS));
                    let last = sent.last().expect("a packet");
                    while last.try_outcome().is_none() {
                        tokio::task::yield_now().await;
                    }
                    assert!(
                        sent.iter().all(|sent| black_box(sent.try_outcome()).is_some_and(|outcome| outcome.accepted))
                    );
                });
            });
        });
    }
}

/// One update of all numbers of a queue at the recorder for Prometheus, and one scrape.
fn metrics(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (_kernel, queue) = runtime.block_on(async { simulated::queue(Queue::builder(0)) }).expect("a queue");
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = metrics::with_local_recorder(&recorder, || QueueMetrics::register(&queue.sink()));
    let handle = recorder.handle();
    let mut group = criterion.benchmark_group("metrics");
    group.bench_function("update", |bencher| bencher.iter(|| metrics.update()));
    group.bench_function("scrape", |bencher| bencher.iter(|| black_box(handle.render())));
}
