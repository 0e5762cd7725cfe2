//! Few descriptors, little memory, and many queues and sinks.

use std::{fs, net::Ipv4Addr};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_nfqueue::{Packet, Queue, TryRecvError};

use super::process::in_a_process;
use crate::{
    common::{Load, PORT, Random, Traffic, account, divert, freed, hold, many, next, soon, start, udp_in},
    support,
};

tests![
    sync a_bind_without_descriptors_is_an_error_and_binds_nothing,
    sync a_flood_of_held_packets_needs_no_more_memory_than_the_queue_length_says,
    sync a_thousand_queues_in_one_process_lose_no_packet,
    both ten_thousand_clones_of_a_sink_lose_no_packet,
];

fn a_bind_without_descriptors_is_an_error_and_binds_nothing() {
    in_a_process("descriptors");
}

fn a_flood_of_held_packets_needs_no_more_memory_than_the_queue_length_says() {
    in_a_process("memory");
}

fn a_thousand_queues_in_one_process_lose_no_packet() {
    in_a_process("thousand");
}

fn limit(resource: Resource, current: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    setrlimit(resource, Rlimit { current, maximum }).unwrap();
}

/// A process of its own.
pub(super) async fn few_descriptors() {
    const EMFILE: i32 = 24;
    let usual = getrlimit(Resource::Nofile).current;
    let _divert = divert([udp_in().to_queue(0)]);
    let traffic = Traffic::new(10);
    // The first bind of a process also creates the descriptors of the timer thread.
    for first in [true, false] {
        let mut spare = 0;
        let mut queue = loop {
            let is_open = |number: &u64| fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
            let end = (0..).filter(|number| !is_open(number)).nth(spare).unwrap();
            limit(Resource::Nofile, Some(end));
            let bound = Queue::builder(0).bind().await;
            limit(Resource::Nofile, usual);
            match bound {
                Ok(queue) => break queue,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(EMFILE), "{error}");
                    eprintln!("{spare} descriptors: {error:?}");
                }
            }
            assert_eq!(account(0), None, "nothing is bound");
            spare += 1;
            assert!(spare < 16);
        };
        assert!(spare > 0);
        eprintln!("first {first}: bound with {spare} descriptors");
        for packet in hold(&mut queue, &traffic, 0..10).await {
            packet.accept().submit().unwrap();
        }
        traffic.expect(0..10).await;
        soon("the shutdown", queue.close()).await.unwrap();
        freed(0).await;
    }
}

/// The size of the address space, in bytes.
fn address_space() -> u64 {
    let sizes = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = sizes.split(' ').next().unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

/// A process of its own. An allocation that fails would abort it.
pub(super) async fn little_memory() {
    const LENGTH: u32 = 2000;
    const FLOOD: u64 = 30_000;
    let (mut queue, _divert) = start(Queue::builder(0).max_len(LENGTH));
    let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
    let sender = support::udp((Ipv4Addr::LOCALHOST, 0));
    let mut held: Vec<Packet> = Vec::with_capacity(LENGTH as usize);
    let mut most = 0;
    // Each packet has 1428 bytes. The rest is for the allocator, and for what a packet needs
    // besides.
    let allowance = u64::from(LENGTH) * 2000 + (4 << 20);
    limit(Resource::As, Some(address_space() + allowance));
    let mut sent = 0;
    while sent < FLOOD {
        for _ in 0..100 {
            sender.send_to(&[7; 1400], (Ipv4Addr::LOCALHOST, PORT)).unwrap();
            sent += 1;
        }
        loop {
            match queue.try_recv() {
                Ok(packet) => held.push(packet),
                Err(TryRecvError::Empty) => break,
                Err(error) => panic!("{error}"),
            }
        }
        most = most.max(queue.stats().held.bytes);
        // The queue is full for half of the time.
        if sent % 6000 == 0 {
            held.drain(..).for_each(|packet| packet.drop().submit().unwrap());
            queue.sink().flush().await;
        }
    }
    let (stats, kernel) = (queue.stats(), account(0).unwrap());
    eprintln!("{sent} sent, {} received, {kernel:?}; at most {most} bytes held", stats.received.packets);
    assert!(held.is_empty());
    assert_fields!(kernel, waiting: 0, socket_full: stats.lost.packets);
    assert_eq!(stats.received.packets + kernel.queue_full + kernel.socket_full, sent);
    assert_fields!(stats, decided.dropped: stats.received.packets, held.in_flight: 0);
    assert!(kernel.queue_full > 0, "an overload: {kernel:?}");
    drop(receiver);
}

/// A process of its own, because it needs more descriptors than usual.
pub(super) async fn thousand_queues() {
    const QUEUES: u16 = 1000;
    let most = getrlimit(Resource::Nofile).maximum;
    if most.is_some_and(|most| most < 2200) {
        return eprintln!("not tested: a process may have only {most:?} descriptors here");
    }
    limit(Resource::Nofile, most);
    let mut group = Queue::builder(0..=QUEUES - 1).bind().await.unwrap();
    let _divert = divert((0..QUEUES).map(|queue| udp_in().mark(queue.into(), u32::MAX).to_queue(queue)));
    let traffic = Traffic::new(1);
    for begin in (0..u32::from(QUEUES)).step_by(100) {
        for queue in begin..begin + 100 {
            support::set_mark(&traffic.sender, queue);
            traffic.send([queue]);
        }
        let mut of: Vec<u32> = Vec::new();
        for _ in 0..100 {
            let packet = next(&mut group).await;
            of.push(packet.queue_number().into());
            packet.accept().submit().unwrap();
        }
        of.sort_unstable();
        assert!(of.into_iter().eq(begin..begin + 100), "one from each queue");
        traffic.expect(begin..begin + 100).await;
    }
    let sink = group.sink();
    soon("the shutdown", group.close()).await.unwrap();
    for sink in sink.each() {
        assert_fields!(sink.stats(), received.packets: 1, decided.accepted: 1, lost.packets: 0, held.in_flight: 0);
        assert_eq!(account(sink.queue_number()), None);
    }
}

async fn ten_thousand_clones_of_a_sink_lose_no_packet() {
    const COUNT: u32 = many(5000);
    let (mut queue, divert) = start(Queue::builder(0));
    let sink = queue.sink();
    let load = Load::start(COUNT);
    let decide = load.decide();
    let (mut clones, mut tasks) = (Vec::new(), Vec::new());
    for _ in 0..COUNT {
        let packet = next(&mut queue).await;
        // One that stays, and one that ends with its task.
        clones.push(sink.clone());
        let (sink, decide) = (sink.clone(), decide.clone());
        tasks.push(tokio::spawn(async move {
            tokio::task::yield_now().await;
            decide(packet).submit().unwrap();
            drop(sink);
        }));
    }
    for task in tasks {
        soon("a task", task).await.unwrap();
    }
    load.finish(COUNT).await;
    let mut random = Random::new(1);
    random.shuffle(&mut clones);
    for clone in clones.drain(COUNT as usize / 2..) {
        clone.flush().await;
        drop(clone);
    }
    let stats = queue.stats();
    assert_fields!(stats, received.packets: u64::from(COUNT), held.in_flight: 0, lost.packets: 0, sent.gone_at_least: 0);
    assert_fields!(stats, decided.unanswered: 0, sent.refusals: 0);
    soon("the shutdown", queue.close()).await.unwrap();
    assert!(clones.iter().all(|clone| clone.is_closed()));
    assert_eq!(account(0), None);
    drop(divert);
}
