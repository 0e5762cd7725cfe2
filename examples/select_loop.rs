//! The README's example: a packet queue, a TCP service and Ctrl-C in one `select!` loop.
//!
//! It needs a rule, say `nft add rule inet filter input udp dport 9000 queue num 0`; the service on 127.0.0.1:9999 tells how many packets
//! have been decided to whoever connects.

use futures::TryStreamExt;
use tokio::{io::AsyncWriteExt, net::TcpListener};
use tokio_nfqueue::Queue;

/// Whatever it takes to decide: a look into a database, a question to another service.
async fn allowed(payload: &[u8]) -> bool {
    tokio::task::yield_now().await;
    !payload.ends_with(b"forbidden")
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut packets, verdicts) = Queue::builder(0).bind()?.split();
    let service = TcpListener::bind("127.0.0.1:9999").await?;
    loop {
        tokio::select! {
            packet = packets.try_next() => {
                let Some(packet) = packet? else { break }; // an error here is the end of the queue, nothing less
                tokio::spawn(async move {
                    let verdict = if allowed(packet.payload()).await { packet.accept() } else { packet.drop() };
                    verdict.submit()
                });
            }
            Ok((mut client, _)) = service.accept() => {
                let stats = verdicts.stats();
                tokio::spawn(async move {
                    client.write_all(format!("{} accepted, {} dropped\n", stats.accepted, stats.dropped).as_bytes()).await
                });
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    verdicts.close().await?;
    Ok(())
}
