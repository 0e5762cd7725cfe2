//! A filter whose numbers Prometheus reads, over HTTP. Beside this file are `dashboard.json`, a
//! dashboard to import in Grafana, and `alerts.yml`, rules for what hurts.
//!
//! It makes its own rules: for TCP and UDP to one port of this host. Packets whose data ends with
//! "forbidden" are dropped. Run it as root: `cargo run --release --example prometheus`, and look at
//! it: `curl http://127.0.0.1:9900/metrics`. In the configuration of Prometheus:
//!
//! ```yaml
//! scrape_configs:
//!   - job_name: nfqueue
//!     static_configs:
//!       - targets: ["127.0.0.1:9900"]
//! rule_files: [alerts.yml]
//! ```
//!
//! - The numbers are brought up to date by each scrape: they are exact, and a program that is not
//!   scraped does nothing for them.
//! - The rules here do not match the scrapes. Rules that match everything do, and then the
//!   numbers contain the packets by which they are read.
//! - The queue's length, and the packets that found the queue full, are numbers of the kernel. To
//!   read them the program needs `CAP_DAC_READ_SEARCH`, which root has. Without it they are 0, and
//!   `nfqueue_kernel_counters_readable` is.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{error::Error, future::ready, net::SocketAddr, process::ExitCode, sync::Arc};

use axum::{Router, http::header::CONTENT_TYPE, routing::get};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_nfqueue::{Divert, Hook, Packet, Protocol, Queue, Rule, Verdict, metrics::QueueMetrics};

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let end = end_signal();
    // Before the queue: if the address is in use, no packet has been queued.
    let listener =
        TcpListener::bind(options.listen).await.map_err(|error| format!("listen on {}: {error}", options.listen))?;
    let scraped = PrometheusBuilder::new().install_recorder()?;

    let to_port = |protocol| Rule::new(Hook::Input).protocol(protocol).destination_port(options.port);
    // It decides each packet on its own, so connections need not be tracked.
    let rules = Divert::builder().rules([Protocol::Tcp, Protocol::Udp].map(to_port)).flow_marks(None);
    let queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
    let sink = queue.sink();

    let metrics = Arc::new(QueueMetrics::register(&sink));
    let scrape = move || {
        metrics.update();
        ready(([(CONTENT_TYPE, "text/plain; version=0.0.4")], scraped.render()))
    };
    // It ends with the program: until then the end of the queue can be watched.
    tokio::spawn(axum::serve(listener, Router::new().route("/metrics", get(scrape))).into_future());
    eprintln!("ready");

    let closed = queue.serve(|packet: Packet| ready(decide(packet))).with_graceful_shutdown(end).await;
    let stats = sink.stats();
    println!(
        "received {} accepted {} dropped {} lost {}",
        stats.received.packets, stats.decided.accepted, stats.decided.dropped, stats.lost.packets
    );
    Ok(closed?)
}

/// Stands for the decisions of a real filter.
fn decide(packet: Packet) -> Verdict {
    if packet.payload().ends_with(b"forbidden") { packet.drop() } else { packet.accept() }
}

/// Ends with SIGINT or SIGTERM. The handlers are installed when this returns.
fn end_signal() -> impl Future<Output = ()> {
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("prometheus: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prometheus: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: prometheus [--port P] [--listen ADDRESS:PORT]

  --port P               the destination port of the packets (default: 9000)
  --listen ADDRESS:PORT  where the numbers are served (default: 127.0.0.1:9900)";

struct Options {
    port: u16,
    listen: SocketAddr,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { port: 9000, listen: ([127, 0, 0, 1], 9900).into() };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("listen") => options.listen = arguments.value()?.parse()?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.port == options.listen.port() { Err("the scrapes would be queued".into()) } else { Ok(Some(options)) }
}
