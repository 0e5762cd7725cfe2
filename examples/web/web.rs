//! A filter and the web service that controls it, in one program: it shows what the filter has
//! done, and blocks and unblocks addresses.
//!
//! | request | what it does |
//! |---|---|
//! | `GET /stats` | the numbers of packets |
//! | `GET /block` | the blocked addresses |
//! | `PUT /block/192.0.2.1` | blocks an address |
//! | `DELETE /block/192.0.2.1` | unblocks it |
//!
//! It makes its own rules: for TCP to one port, sent by this host, received by it or forwarded.
//! Packets from or to a blocked address are rejected, also those of connections that are open. Run
//! it as root: `cargo run --release --example web`, and then `curl -X PUT
//! http://127.0.0.1:8080/block/192.0.2.1`.
//!
//! - The service has another port than the filtered connections. Otherwise a user who blocks his
//!   own address cannot unblock it.
//! - It asks for no password: listen on loopback addresses only. Nothing is changed by GET or POST,
//!   which any web site can make a browser on this host send.
//! - SIGINT and SIGTERM end both parts at the same time: the filter decides the packets that it
//!   has, the service completes the requests that it has. A client that does not complete its
//!   request delays the end by 5 s at most.
//!
//! It prints `ready` on standard error once queue and rules are there, and at the end one line of
//! statistics.

use std::{
    collections::{BTreeMap, HashSet},
    error::Error,
    future::ready,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, put},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_nfqueue::{Divert, Hook, Packet, Protocol, Queue, Rule, Verdict, VerdictSink, divert::Match};

/// How long the service waits for clients at the end. The filter waits as long for its verdicts.
const END_LIMIT: Duration = Duration::from_secs(5);

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    // Each part waits for the signals itself.
    let (end_filter, end_service, end) = (end_signal(), end_signal(), end_signal());
    // Before the queue: if the address is in use, no packet has been queued.
    let listener =
        TcpListener::bind(options.listen).await.map_err(|error| format!("listen on {}: {error}", options.listen))?;

    let to_port = |hook| Rule::new(hook).protocol(Protocol::Tcp).destination_port(options.port);
    let rules = Divert::builder()
        .rule(to_port(Hook::Output))
        // What arrives over loopback has passed the output hook.
        .rule(to_port(Hook::Input).unless(Match::interface("lo")))
        .rule(to_port(Hook::Forward));
    let queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
    let shared = Arc::new(Shared {
        sink: queue.sink(),
        blocked: RwLock::default(),
        most: options.addresses,
        rejected: AtomicU64::new(0),
    });
    eprintln!("ready");

    let decide = {
        let shared = Arc::clone(&shared);
        move |packet| ready(shared.decide(packet))
    };
    let filter = async { Ok(queue.serve(decide).with_graceful_shutdown(end_filter).await?) };
    let routes = Router::new()
        .route("/stats", get(stats))
        .route("/block", get(blocked))
        .route("/block/{address}", put(block).delete(unblock))
        .with_state(Arc::clone(&shared));
    let service = async {
        tokio::select! {
            served = axum::serve(listener, routes).with_graceful_shutdown(end_service) => Ok(served?),
            () = async { end.await; tokio::time::sleep(END_LIMIT).await } => Ok(()),
        }
    };
    // If one fails, the other has no use.
    let ended: Result<_, Box<dyn Error>> = tokio::try_join!(filter, service);
    let numbers: Vec<String> = shared.numbers().map(|(name, number)| format!("{name} {number}")).into();
    println!("{}", numbers.join(" "));
    ended.map(drop)
}

/// What filter and service share.
struct Shared {
    sink: VerdictSink,
    blocked: RwLock<HashSet<IpAddr>>,
    /// How many addresses may be blocked.
    most: usize,
    rejected: AtomicU64,
}

impl Shared {
    fn decide(&self, packet: Packet) -> Verdict {
        let blocked = packet.addresses().is_none_or(|(from, to)| {
            let blocked = self.blocked.read().expect("no panic with the lock");
            blocked.contains(&from) || blocked.contains(&to)
        });
        if blocked {
            self.rejected.fetch_add(1, Ordering::Relaxed);
            packet.reject()
        } else {
            packet.accept()
        }
    }

    /// Of the packets received, each is accepted, rejected, dropped (because the program ended
    /// before it was decided), or still in flight.
    fn numbers(&self) -> [(&'static str, u64); 5] {
        let (stats, rejected) = (self.sink.stats(), self.rejected.load(Ordering::Relaxed));
        [
            ("received", stats.received.packets),
            ("accepted", stats.decided.accepted),
            ("rejected", rejected),
            ("dropped", stats.decided.dropped.saturating_sub(rejected)),
            ("lost", stats.lost.packets),
        ]
    }
}

async fn stats(State(shared): State<Arc<Shared>>) -> Json<BTreeMap<&'static str, u64>> {
    Json(shared.numbers().into())
}

async fn blocked(State(shared): State<Arc<Shared>>) -> Json<Vec<IpAddr>> {
    let mut addresses: Vec<_> = shared.blocked.read().expect("no panic with the lock").iter().copied().collect();
    addresses.sort_unstable();
    Json(addresses)
}

async fn block(State(shared): State<Arc<Shared>>, Path(address): Path<IpAddr>) -> Result<StatusCode, StatusCode> {
    let mut blocked = shared.blocked.write().expect("no panic with the lock");
    // Packets never contain the form ::ffff:192.0.2.1.
    let address = address.to_canonical();
    if blocked.len() >= shared.most && !blocked.contains(&address) {
        return Err(StatusCode::INSUFFICIENT_STORAGE);
    }
    blocked.insert(address);
    Ok(StatusCode::NO_CONTENT)
}

async fn unblock(State(shared): State<Arc<Shared>>, Path(address): Path<IpAddr>) -> StatusCode {
    let mut blocked = shared.blocked.write().expect("no panic with the lock");
    if blocked.remove(&address.to_canonical()) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
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
            eprintln!("web: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("web: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: web [--port P] [--listen ADDRESS:PORT] [--addresses N]

  --port P               the destination port of the connections (default: 9000)
  --listen ADDRESS:PORT  the address of the web service (default: 127.0.0.1:8080)
  --addresses N          how many addresses may be blocked (default: 65536)";

struct Options {
    port: u16,
    listen: SocketAddr,
    addresses: usize,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { port: 9000, listen: ([127, 0, 0, 1], 8080).into(), addresses: 65536 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("listen") => options.listen = arguments.value()?.parse()?,
            Long("addresses") => options.addresses = arguments.value()?.parse()?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.port == options.listen.port() {
        Err("the web service would be filtered".into())
    } else {
        Ok(Some(options))
    }
}
