//! The process that owns the queue is killed while traffic flows.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio_nfqueue::{ErrorKind, Queue};

use super::process::{Counted, Forked, Process};
use crate::{
    common::{PATIENCE, PORT, Traffic, account, divert, eventually, freed, next, soon, udp_in},
    support,
};

tests![
    multi a_killed_process_loses_only_queued_packets_with_bypass,
    multi after_a_killed_process_without_bypass_the_rule_drops_until_a_queue_is_bound,
    multi a_queue_that_a_forked_child_shares_works_and_closes,
    multi a_killed_process_whose_forked_child_lives_keeps_the_queue_bound,
];

/// At most this number of datagrams are under way.
const WINDOW: u32 = 100;
const PAUSE: Duration = Duration::from_micros(50);

/// Numbered datagrams, as many as the window allows.
struct Steady {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    received: Arc<AtomicU32>,
    /// Datagrams that do not count as under way, because they may be lost.
    excused: Arc<AtomicU32>,
    sender: JoinHandle<UdpSocket>,
    receiver: JoinHandle<Vec<u32>>,
}

impl Steady {
    fn start() -> Self {
        let (from, to) = (support::udp((Ipv4Addr::LOCALHOST, 0)), support::udp((Ipv4Addr::LOCALHOST, PORT)));
        let stop = Arc::new(AtomicBool::new(false));
        let [sent, received, excused] = [(); 3].map(|()| Arc::new(AtomicU32::new(0)));
        let sender = thread::spawn({
            let (stop, sent, received, excused) = (stop.clone(), sent.clone(), received.clone(), excused.clone());
            move || {
                let mut next = 0;
                let end = Instant::now() + PATIENCE;
                while !stop.load(SeqCst) && Instant::now() < end {
                    if next < received.load(SeqCst) + excused.load(SeqCst) + WINDOW {
                        from.send_to(&u32::to_be_bytes(next), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                        next += 1;
                        sent.store(next, SeqCst);
                    } else {
                        thread::sleep(PAUSE);
                    }
                }
                from
            }
        });
        let receiver = thread::spawn({
            let received = Arc::clone(&received);
            move || {
                let mut numbers = Vec::new();
                let mut datagram = [0; 4];
                // An error is the time-out.
                while to.recv(&mut datagram).is_ok() && datagram != [0xff; 4] {
                    numbers.push(u32::from_be_bytes(datagram));
                    received.fetch_add(1, SeqCst);
                }
                numbers
            }
        });
        Self { stop, sent, received, excused, sender, receiver }
    }

    async fn more(&self, count: u32) {
        let until = self.sent.load(SeqCst) + count;
        eventually("traffic flows", || self.sent.load(SeqCst) >= until).await;
    }

    /// Waits until the window is full. Returns how many have been sent.
    async fn stalled(&self) -> u32 {
        let room = || self.received.load(SeqCst) + self.excused.load(SeqCst) + WINDOW - self.sent.load(SeqCst);
        eventually("the window is full", || room() == 0).await;
        self.sent.load(SeqCst)
    }

    /// Waits until all that is under way is in the queue of a stopped process. Nothing is sent
    /// then. Returns how many have been sent.
    async fn queued(&self) -> u32 {
        let waiting = || account(0).unwrap().waiting;
        eventually("the window is in the queue", || waiting() == u64::from(WINDOW)).await;
        self.stalled().await
    }

    /// Ends the traffic. What is sent now is delivered, behind everything that was sent before.
    /// Returns how many datagrams were sent, and which of them were not delivered.
    async fn finish(self) -> (u32, Vec<u32>) {
        self.stop.store(true, SeqCst);
        eventually("the sender ends", || self.sender.is_finished()).await;
        let from = self.sender.join().unwrap();
        from.send_to(&[0xff; 4], (Ipv4Addr::LOCALHOST, PORT)).unwrap();
        eventually("the receiver ends", || self.receiver.is_finished()).await;
        let delivered = self.receiver.join().unwrap();
        let sent = self.sent.load(SeqCst);
        let once: BTreeSet<u32> = delivered.iter().copied().collect();
        assert_eq!(once.len(), delivered.len(), "none is delivered twice");
        (sent, (0..sent).filter(|number| !once.contains(number)).collect())
    }
}

async fn a_killed_process_loses_only_queued_packets_with_bypass() {
    let _divert = divert([udp_in().to_queue(0).bypass(true)]);
    for stopped in [false, true] {
        let (mut owner, _) = Process::start("serve");
        let load = Steady::start();
        load.more(1000).await;
        let mut queued = WINDOW;
        if stopped {
            // What the queue contains is then known.
            owner.stop();
            load.queued().await;
        }
        owner.kill();
        freed(0).await;
        // The sender may not have counted one yet.
        let at_death = load.sent.load(SeqCst) + 1;
        load.excused.fetch_add(WINDOW, SeqCst);
        load.more(500).await;
        let (sent, missing) = load.finish().await;
        if !stopped {
            queued = missing.len() as u32;
        }
        eprintln!("killed with bypass, stopped before {stopped}: {sent} sent, {queued} lost in the queue");
        assert_eq!(missing.len(), queued as usize, "{missing:?}");
        assert!(queued <= WINDOW, "{missing:?}");
        assert!(missing.iter().all(|number| *number < at_death), "sent after {at_death}: {missing:?}");
    }
}

async fn after_a_killed_process_without_bypass_the_rule_drops_until_a_queue_is_bound() {
    const DROPPED: u32 = 300;
    let _divert = divert([udp_in().to_queue(0)]);
    let (mut owner, _) = Process::start("serve");
    let load = Steady::start();
    load.more(1000).await;
    owner.stop();
    let at_death = load.queued().await;
    owner.kill();
    freed(0).await;
    load.excused.fetch_add(DROPPED, SeqCst);
    assert_eq!(load.stalled().await, at_death + DROPPED);
    // A new owner: everything is delivered again.
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let accept = tokio::spawn(async move {
        while let Some(packet) = queue.recv().await {
            packet.unwrap().accept().submit().unwrap();
        }
    });
    load.excused.fetch_add(WINDOW, SeqCst);
    load.more(500).await;
    let (sent, missing) = load.finish().await;
    accept.abort();
    eprintln!("killed without bypass: {sent} sent, {WINDOW} lost in the queue, {DROPPED} dropped by the rule");
    assert!(missing.iter().copied().eq(at_death - WINDOW..at_death + DROPPED), "{missing:?}");
}

async fn a_queue_that_a_forked_child_shares_works_and_closes() {
    let divert = divert([udp_in().to_queue(0)]);
    let (mut owner, forked) = Process::start("fork");
    let forked = Forked::new(&forked);
    let traffic = Traffic::new(50);
    traffic.send(0..50);
    traffic.expect(0..50).await;
    assert_eq!(owner.end(), Counted { received: 50, accepted: 50, expired: 0, lost: 0 });
    assert!(forked.lives());
    assert_eq!(account(0), None, "unbound, although the child has the socket");
    let mut queue = Queue::builder(0).bind().await.unwrap();
    traffic.send(0..50);
    for _ in 0..50 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect(0..50).await;
    drop((queue, divert));
}

async fn a_killed_process_whose_forked_child_lives_keeps_the_queue_bound() {
    let _divert = divert([udp_in().to_queue(0).bypass(true)]);
    let (mut owner, forked) = Process::start("fork");
    let forked = Forked::new(&forked);
    let traffic = Traffic::new(50);
    owner.kill();
    traffic.send(0..20);
    eventually("the packets are queued", || account(0).unwrap().waiting == 20).await;
    assert_eq!(Queue::builder(0).bind().await.unwrap_err().kind(), ErrorKind::AlreadyBound);
    let waiting = tokio::spawn(Queue::builder(0).bind_when_free());
    drop(forked);
    let mut queue = soon("the queue is free", waiting).await.unwrap().unwrap();
    traffic.expect_nothing();
    traffic.send(20..50);
    for _ in 20..50 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect(20..50).await;
}
