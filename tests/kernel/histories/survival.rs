//! A program that uses `?` on everything, under faults that no program can avoid.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use tokio::runtime::Builder;
use tokio_nfqueue::{Action, Error, Packet, Queue, Reconfigure, Stats};

use crate::{
    common::{self, Hook, Protocol, Rule, without_net_admin},
    support,
};

const PORT: u16 = 9000;

/// Runs until `stop`. Every fourth verdict is submitted by a thread without the capability, every
/// fourth comes after the deadline, and every fourth packet is dropped.
async fn program(mut queue: Queue, stop: &AtomicBool) -> Result<Stats, Error> {
    let sink = queue.sink();
    let mut late: Vec<Packet> = Vec::new();
    let mut seen = 0_u32;
    while !stop.load(SeqCst) {
        let Some(packet) = queue.try_next().await? else { break };
        seen = seen.wrapping_add(1);
        match seen % 4 {
            0 => without_net_admin(|| packet.accept().submit())?,
            1 => late.push(packet),
            2 => drop(packet),
            _ => packet.accept().submit()?,
        }
        if late.len() > 20 {
            tokio::time::sleep(Duration::from_millis(6)).await;
            late.drain(..).try_for_each(|packet| packet.accept().submit())?;
        }
        if seen.is_multiple_of(64) {
            sink.flush().await;
            sink.reconfigure(&Reconfigure::new().max_len(500 + seen % 100)).await?;
            sink.kernel_stats()?;
        }
        tokio::task::yield_now().await;
    }
    drop(late);
    queue.close().await?;
    Ok(sink.stats())
}

/// Faults until the time is over: floods that overrun the receive buffer, an interface that goes up
/// and down.
pub(super) fn survives(duration: Duration) {
    let peer = support::veth();
    let stop = Arc::new(AtomicBool::new(false));
    let far = peer.run(|| support::udp((peer.far_v4, 0)));
    let flood = thread::spawn({
        let (stop, near) = (Arc::clone(&stop), peer.near_v4);
        move || {
            while !stop.load(SeqCst) {
                for _ in 0..300 {
                    // It fails while the interface is down.
                    let _ = far.send_to(&[7; 600], (near, PORT));
                }
                thread::sleep(Duration::from_millis(2));
            }
        }
    });
    let local = support::udp((Ipv4Addr::LOCALHOST, 0));
    let begin = Instant::now();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let stats = runtime.block_on(async {
        let builder = Queue::builder(0).deadline(Duration::from_millis(5), Action::Drop);
        let queue = builder.receive_buffer(60_000).bind().await.unwrap();
        let rule = Rule::new(Hook::Input).protocol(Protocol::Udp).destination_port(PORT).to_queue(0);
        let divert = common::divert([rule]);
        let running = tokio::spawn({
            let stop = Arc::clone(&stop);
            async move { program(queue, &stop).await }
        });
        while begin.elapsed() < duration && !running.is_finished() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            support::link_down(&peer.near);
            tokio::time::sleep(Duration::from_millis(1)).await;
            support::link_up(&peer.near);
            // The program checks for the stop at each packet.
            let _ = local.send_to(&[1], (Ipv4Addr::LOCALHOST, PORT));
        }
        stop.store(true, SeqCst);
        while !running.is_finished() {
            let _ = local.send_to(&[1], (Ipv4Addr::LOCALHOST, PORT));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let stats = running.await.unwrap().expect("no error reaches the program");
        drop(divert);
        stats
    });
    flood.join().unwrap();
    eprintln!("a program with question marks: {stats:?}");
    assert!(begin.elapsed() >= duration, "it ended early");
    // Each kind of fault has occurred.
    assert!(stats.sent.refusals > 0, "refusals");
    assert!(stats.decided.expired > 0 && stats.decided.late > 0, "deadlines");
    assert!(stats.decided.unanswered > 0, "drops");
    assert!(stats.lost.gaps > 0, "gaps");
    let decided = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
    let sum = decided + stats.sent.refused + stats.sent.gone_at_least + stats.held.in_flight as u64;
    assert_eq!(stats.received.packets, sum);
}
