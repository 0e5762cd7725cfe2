//! A flood through eight queues, with verdicts that the crate would never send.

use std::{
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{
    net::{SendFlags, send},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use tokio_nfqueue::{Packet, Queue};

use super::duration;
use crate::{
    common::{PORT, Random, Traffic, account, descriptor_of, divert, eventually, number, soon, udp_counter, udp_in},
    support,
};

tests![
    multi eight_flooded_queues_with_bogus_verdicts_agree_with_the_kernel_to_the_packet,
];

const QUEUES: u16 = 8;
/// For each packet.
const BOGUS: u32 = 50;
/// The number of the last packet.
const LAST: u32 = u32::MAX;

/// Sends verdicts as other processes could: through a copy of the queue's socket, for which the
/// kernel looks for the packet, and through a socket of its own, which the kernel refuses.
struct Others {
    copy: OwnedFd,
    stranger: Socket,
    queue: u16,
    random: Random,
    /// Ids whose verdicts were sent.
    decided: Vec<u32>,
}

impl Others {
    fn of(queue: u16) -> Self {
        let process = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let copy = pidfd_getfd(process, descriptor_of(queue), PidfdGetfdFlags::empty()).unwrap();
        let mut stranger = Socket::new(NETLINK_NETFILTER).unwrap();
        stranger.bind_auto().unwrap();
        Self { copy, stranger, queue, random: Random::new(queue.into()), decided: vec![0] }
    }

    /// The copy sends verdicts for ids that the kernel has not given yet, and for ids that are
    /// decided. The kernel answers each with ENOENT, in the queue's receive buffer. The stranger
    /// sends them for packets that are held.
    fn send_bogus(&mut self, latest: u32) {
        let (mut copied, mut strange) = (Vec::new(), Vec::new());
        for index in 0..BOGUS / 2 {
            let id = match index % 2 {
                0 => latest + 10_000_000 + self.random.below(1000) as u32,
                _ => self.decided[self.random.below(self.decided.len())],
            };
            self.push_verdict(&mut copied, index, id);
            self.push_verdict(&mut strange, index, latest.saturating_sub(index));
        }
        assert_eq!(send(&self.copy, &copied, SendFlags::empty()), Ok(copied.len()));
        assert_eq!(self.stranger.send_to(&strange, &SocketAddr::new(0, 0), 0).unwrap(), strange.len());
    }

    fn push_verdict(&mut self, datagram: &mut Vec<u8>, index: u32, id: u32) {
        let verdict = self.random.below(2) as u32;
        // NFQNL_MSG_VERDICT, NLM_F_REQUEST, a sequence number that the crate does not use soon
        datagram.extend(32_u32.to_ne_bytes());
        datagram.extend([0x0301_u16, 1].into_iter().flat_map(u16::to_ne_bytes));
        datagram.extend([0x7fff_0000 + index, 0].into_iter().flat_map(u32::to_ne_bytes));
        datagram.extend([0, 0]);
        datagram.extend(self.queue.to_be_bytes());
        // NFQA_VERDICT_HDR
        datagram.extend([12_u16, 2].into_iter().flat_map(u16::to_ne_bytes));
        datagram.extend([verdict, id].into_iter().flat_map(u32::to_be_bytes));
    }
}

/// Accepts all packets out of order, until the last one has come.
async fn decide(mut queue: Queue, mut others: Others, done: Arc<AtomicBool>) -> Queue {
    let sink = queue.sink();
    let mut random = Random::new(100 + u64::from(others.queue));
    let mut held: Vec<Packet> = Vec::new();
    let mut submitted = Vec::new();
    loop {
        let packet = tokio::time::timeout(Duration::from_millis(1), queue.recv()).await;
        let quiet = packet.is_err();
        if let Ok(packet) = packet {
            let packet = packet.expect("the queue continues").expect("no error");
            others.send_bogus(packet.id().get());
            if number(&packet) == LAST {
                done.store(true, SeqCst);
            }
            held.push(packet);
        }
        while !held.is_empty() && (held.len() > 20 || quiet || done.load(SeqCst)) {
            let packet = held.swap_remove(random.below(held.len()));
            submitted.push(packet.id().get());
            packet.accept().submit().unwrap();
        }
        if submitted.len() > 64 {
            sink.flush().await;
            others.decided.append(&mut submitted);
            others.decided.drain(..others.decided.len().saturating_sub(1000));
        }
        if done.load(SeqCst) {
            sink.flush().await;
            return queue;
        }
    }
}

async fn eight_flooded_queues_with_bogus_verdicts_agree_with_the_kernel_to_the_packet() {
    let traffic = Traffic::new(1);
    let mut tasks = Vec::new();
    for number in 0..QUEUES {
        let queue = Queue::builder(number).bind().await.unwrap();
        let others = Others::of(number);
        let (done, sink) = (Arc::new(AtomicBool::new(false)), queue.sink());
        tasks.push((number, Arc::clone(&done), sink, tokio::spawn(decide(queue, others, done))));
    }
    let divert = divert((0..QUEUES).map(|queue| udp_in().mark(queue.into(), u32::MAX).to_queue(queue)));
    let end = Instant::now() + duration();
    let senders = [0, 1].map(|half| {
        thread::spawn(move || {
            let queues = half * QUEUES / 2..(half + 1) * QUEUES / 2;
            let sockets = queues.map(|queue| support::udp_marked((Ipv4Addr::LOCALHOST, 0), queue.into()));
            let sockets: Vec<_> = sockets.collect();
            let mut sent = 0_u32;
            while Instant::now() < end || sent < 1000 {
                for socket in &sockets {
                    socket.send_to(&sent.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                }
                sent += 1;
            }
            u64::from(sent)
        })
    });
    eventually("the end of the flood", || senders.iter().all(thread::JoinHandle::is_finished)).await;
    let sent = senders.map(|sender| sender.join().unwrap());
    let (mut accepted, mut lost, mut full) = (0, 0, 0);
    for (number, done, sink, task) in tasks {
        let mut sent = sent[usize::from(number) * 2 / usize::from(QUEUES)];
        support::set_mark(&traffic.sender, number.into());
        // What is lost at the end is found by the next packet. It may itself find no room among the
        // kernel's answers.
        let last = async {
            while !done.load(SeqCst) {
                if account(number).unwrap().waiting == 0 && !done.load(SeqCst) {
                    traffic.send([LAST]);
                    sent += 1;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon("the last packet", last).await;
        let queue = soon("the task", task).await.unwrap();
        let (stats, kernel) = (sink.stats(), account(number).unwrap());
        assert_fields!(kernel, waiting: 0, socket_full: stats.lost.packets);
        assert_eq!(stats.received.packets + kernel.socket_full + kernel.queue_full, sent, "{stats:?} {kernel:?}");
        assert_eq!(stats.received.packets + kernel.socket_full, kernel.last_id);
        assert_fields!(stats, decided.accepted: stats.received.packets, decided.unanswered: 0, held.in_flight: 0);
        assert_fields!(stats, sent.gone_at_least: 0, sent.refused: 0, sent.refusals: 0, received.malformed: 0);
        accepted += stats.decided.accepted;
        lost += kernel.socket_full;
        full += kernel.queue_full;
        soon("the shutdown", queue.close()).await.unwrap();
    }
    let delivered = traffic.delivered().len() as u64;
    eprintln!(
        "{accepted} accepted, {delivered} delivered, {lost} lost before they were received, {full} found the queue full"
    );
    assert!(accepted > 1000, "it was a flood");
    assert_eq!(delivered + udp_counter("InErrors"), accepted);
    drop(divert);
}
