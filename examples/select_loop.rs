//! The README's example: a packet queue, a TCP service and Ctrl-C in one `select!` loop. Each
//! packet is decided in a task of its own, which may wait for whatever it needs.
//!
//! It uses queue 0 of the current network namespace. The rules are yours, for example
//! `nft add rule inet filter input udp dport 9000 queue num 0`. Then run, as root:
//! `cargo run --release --example select_loop`
//!
//! Clients of the service on 127.0.0.1:9999 get the number of packets accepted and dropped.

use futures::TryStreamExt;
use tokio::{io::AsyncWriteExt, net::TcpListener};
use tokio_nfqueue::Queue;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut packets, verdicts) = Queue::builder(0).bind().await?.split();
    let service = TcpListener::bind("127.0.0.1:9999").await?;
    loop {
        tokio::select! {
            packet = packets.try_next() => {
                // An error here is always fatal: the queue has ended.
                let Some(packet) = packet? else { break };
                tokio::spawn(async move {
                    let verdict = if allowed(packet.payload()).await { packet.accept() } else { packet.drop() };
                    verdict.submit()
                });
            }
            Ok((mut client, _)) = service.accept() => {
                let stats = verdicts.stats();
                let line = format!("{} accepted, {} dropped\n", stats.decided.accepted, stats.decided.dropped);
                tokio::spawn(async move { client.write_all(line.as_bytes()).await });
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    verdicts.close().await?;
    Ok(())
}

/// Stands for what a decision may need: a database lookup, a request to another service.
async fn allowed(payload: &[u8]) -> bool {
    tokio::task::yield_now().await;
    !payload.ends_with(b"forbidden")
}
