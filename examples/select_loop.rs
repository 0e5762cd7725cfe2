//! A packet queue, a TCP service and the signals that end the program, in one `select!` loop. Each
//! packet is decided in a task of its own, which may wait for whatever it needs.
//!
//! It uses queue 0 of the current network namespace. The rules are yours, for example
//! `nft add rule inet filter input udp dport 9000 queue num 0`. Then run, as root:
//! `cargo run --release --example select_loop`
//!
//! It prints `ready` on standard error once the queue is bound. Clients of the service on
//! 127.0.0.1:9999 get the number of packets accepted and dropped. SIGINT and SIGTERM end it.

use std::error::Error;

use tokio::{
    io::AsyncWriteExt,
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_nfqueue::{Packet, Queue, Verdict};

async fn run() -> Result<(), Box<dyn Error>> {
    let (mut packets, verdicts) = Queue::builder(0).bind().await?.split();
    let service = TcpListener::bind("127.0.0.1:9999").await?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    eprintln!("ready");
    loop {
        tokio::select! {
            packet = packets.recv() => {
                let Some(packet) = packet else { break };
                // An error here is the end of the queue, nothing less.
                let packet = packet?;
                tokio::spawn(async move { decide(packet).await.submit() });
            }
            Ok((mut client, _)) = service.accept() => {
                let stats = verdicts.stats();
                let line = format!("{} accepted, {} dropped\n", stats.decided.accepted, stats.decided.dropped);
                tokio::spawn(async move { client.write_all(line.as_bytes()).await });
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    verdicts.close().await?;
    let stats = verdicts.stats();
    println!("{} packets accepted, {} dropped", stats.decided.accepted, stats.decided.dropped);
    Ok(())
}

/// Stands for what a decision may need: a database lookup, a request to another service.
async fn decide(packet: Packet) -> Verdict {
    tokio::task::yield_now().await;
    if packet.payload().ends_with(b"forbidden") { packet.drop() } else { packet.accept() }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None => run().await,
        Some("-h" | "--help") => {
            println!(
                "usage: select_loop\n\nDecides the packets of queue 0, and serves its statistics on 127.0.0.1:9999."
            );
            Ok(())
        }
        Some(other) => Err(format!("it takes no arguments, not even {other:?}").into()),
    }
}
