use std::{collections::HashMap, net::IpAddr, num::NonZero, thread};

use tokio_nfqueue::{Divert, Error, PacketStream, Queue, Rule};

/// How many packets two hosts have exchanged. State of one worker: no lock, nothing shared.
pub type Counts = HashMap<(IpAddr, IpAddr), u64>;

/// A task for each of several queues of a rule. Binds the queues; what is returned waits for the
/// workers, and stops them when `stop` ends.
pub async fn start(
    rule: Rule,
    queues: u16,
    stop: impl Future<Output = ()>,
) -> Result<impl Future<Output = Result<Vec<Counts>, Error>>, Error> {
    let rules = Divert::builder().rule(rule);
    let queue = Queue::builder(Queue::any(queues)).divert(rules).bind().await?;
    let (packets, verdicts) = queue.split();
    let queues = packets.into_each();
    let workers: Vec<_> = queues.into_iter().map(|queue| tokio::spawn(worker(queue))).collect();
    Ok(async move {
        stop.await;
        verdicts.close().await?;
        let mut counts = Vec::new();
        for worker in workers {
            counts.push(worker.await.expect("a worker without a panic")?);
        }
        Ok(counts)
    })
}

async fn worker(mut packets: PacketStream) -> Result<Counts, Error> {
    let mut counts = Counts::new();
    let mut received = Vec::new();
    // Zero packets: the queue is closed.
    while packets.recv_many(&mut received, 64).await? > 0 {
        for packet in received.drain(..) {
            if let Some((from, to)) = packet.addresses() {
                // Both directions come to the same worker.
                *counts.entry((from.min(to), from.max(to))).or_default() += 1;
            }
            packet.accept().submit()?;
        }
    }
    Ok(counts)
}

/// As many as the process may use, also in a container.
pub fn cores() -> u16 {
    thread::available_parallelism().map_or(1, NonZero::get).try_into().unwrap_or(u16::MAX)
}
