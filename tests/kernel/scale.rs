//! Many queues, connections, rules, elements and held packets.
//!
//! `TOKIO_NFQUEUE_SCALE=50` makes a million connections of 20 000, and twenty thousand packets for
//! each of a thousand queues of 20: `guide::scale` has what this prints. So many connections at
//! once need `net.netfilter.nf_conntrack_max` of the initial network namespace; with less, earlier
//! ones end first.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_nfqueue::{
    FlowMarks, Packet, PacketStream, Queue,
    divert::{Match, NamedSet, PacketField, SetField},
};

use crate::{
    common::{
        Divert, Hook, PORT, Protocol, Random, Rule, account, eventually, in_the_initial_user_namespace, next, number,
        soon, udp_counter, udp_in,
    },
    faults::process::in_a_process,
    support,
};

tests![
    sync a_thousand_queues_with_traffic_at_once_lose_no_packet,
    sync the_memory_of_the_process_does_not_grow_with_the_connections,
    sync a_full_queue_is_held_and_decided_in_random_order,
    one ten_thousand_rules_send_each_packet_to_its_queue,
    one a_hundred_thousand_elements_of_a_set_are_matched,
];

/// How the modes of these processes begin.
pub(crate) const MODE: &str = "scale";

fn a_thousand_queues_with_traffic_at_once_lose_no_packet() {
    in_a_process(&format!("{MODE} queues"));
}

fn the_memory_of_the_process_does_not_grow_with_the_connections() {
    in_a_process(&format!("{MODE} connections"));
}

fn a_full_queue_is_held_and_decided_in_random_order() {
    in_a_process(&format!("{MODE} held"));
}

/// The body of a process of its own, in which no other test takes memory or descriptors.
pub(crate) fn child(mode: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match mode.strip_prefix(MODE).map(str::trim) {
        Some("queues") => runtime.block_on(thousand_queues()),
        Some("connections") => runtime.block_on(connections()),
        Some("held") => runtime.block_on(full_queue()),
        _ => panic!("{mode:?}"),
    }
}

/// How many times as much as usual.
fn factor() -> u64 {
    let text = std::env::var("TOKIO_NFQUEUE_SCALE");
    text.map_or(1, |text| text.parse().expect("TOKIO_NFQUEUE_SCALE is a number"))
}

/// The memory of this process, in bytes.
fn resident() -> u64 {
    let sizes = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = sizes.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

/// Sends numbers to one address each: as many as there are addresses of the loopback interface. No
/// socket receives them; the kernel counts those that were accepted (`NoPorts`).
fn send(sender: &UdpSocket, number: u32) {
    let [_, a, b, c] = number.to_be_bytes();
    sender.send_to(&number.to_be_bytes(), SocketAddr::from(([127, 1 + a, b, c], PORT))).unwrap();
}

fn sender() -> UdpSocket {
    support::udp((Ipv4Addr::LOCALHOST, 0))
}

fn accepted() -> u64 {
    udp_counter("NoPorts")
}

/// Sends numbers of a range, while less than `window` of them are under way, and 64 more.
fn send_all(sender: &UdpSocket, numbers: std::ops::Range<u32>, window: u64, done: impl Fn() -> u64) {
    let (begin, first) = (done(), numbers.start);
    for number in numbers {
        if number % 64 == 0 {
            support::wait_until("there is space", || u64::from(number - first) < done() - begin + window);
        }
        send(sender, number);
    }
}

async fn thousand_queues() {
    const QUEUES: u16 = 1000;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if maximum.is_some_and(|most| most < 2200) {
        return eprintln!("not tested: a process may have only {maximum:?} descriptors here");
    }
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    // All with one rule, which distributes them by a hash of the addresses.
    let (before, open) = (resident(), descriptors());
    let start = Instant::now();
    let queue = Queue::builder(0..=QUEUES - 1).max_len(4096).bind().await.unwrap();
    let bound = start.elapsed();
    let divert = Divert::builder().rule(udp_in().to_queues(0..=QUEUES - 1)).install().unwrap();
    let (each, opened) = (resident().saturating_sub(before) / u64::from(QUEUES), descriptors() - open);
    eprintln!("{QUEUES} queues bound in {bound:?}: {each} bytes and {opened} descriptors, for {current:?} allowed");
    assert!(opened <= 2 * usize::from(QUEUES) + 20, "two descriptors for each queue");

    let total = 20_000 * factor();
    let done = Arc::new(AtomicU64::new(0));
    let (packets, sink) = queue.split();
    let tasks: Vec<_> =
        packets.into_each().into_iter().map(|stream| tokio::spawn(decide(stream, Arc::clone(&done)))).collect();
    let start = Instant::now();
    let counted = Arc::clone(&done);
    let from = sender();
    tokio::task::block_in_place(|| send_all(&from, 0..total as u32, 2000, || counted.load(SeqCst)));
    eventually("all are decided", || done.load(SeqCst) == total).await;
    soon("the flush", sink.flush()).await;
    let seconds = start.elapsed().as_secs_f64();
    let busy = sink.each().filter(|sink| sink.stats().received.packets > 0).count();
    let grown = resident().saturating_sub(before);
    eprintln!("{total} packets for {busy} queues in {seconds:.2} s; {grown} bytes more than at the beginning");
    let stats = sink.stats();
    assert_fields!(stats, received.packets: total, lost.packets: 0, held.in_flight: 0, sent.gone_at_least: 0);
    assert_eq!((accepted(), stats.decided.dropped), (total.div_ceil(2), total / 2), "each by its verdict");
    // Which queue gets a packet depends on a random number of the kernel: the probability that one
    // of 1000 queues gets none of 20 000 is 2 in a million.
    assert!(busy >= usize::from(QUEUES) - 5, "{busy} queues");
    drop(divert);
    soon("the shutdown", sink.close()).await.unwrap();
    for task in tasks {
        soon("a task", task).await.unwrap();
    }
    assert_eq!((account(0), account(QUEUES - 1)), (None, None));
}

/// Accepts even numbers and drops odd ones, until the queue is closed.
async fn decide(mut stream: PacketStream, done: Arc<AtomicU64>) {
    while let Some(packet) = stream.recv().await.transpose().unwrap() {
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
        done.fetch_add(1, SeqCst);
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn conntrack(name: &str) -> u64 {
    fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).unwrap().trim().parse().unwrap()
}

/// Each connection is decided by its first packet, and its second one does not come to the queue.
async fn connections() {
    /// The connections that are decided before their second packets are sent.
    const PORTION: u32 = 10_000;
    /// With the 64 that `send_all` may add, they fit in the receive buffer of an ordinary user.
    const WINDOW: u64 = 128;
    /// Of the process, whatever the number of the connections.
    const SLACK: u64 = 8 << 20;
    let total = 20_000 * factor() as u32;
    let builder = Queue::builder(0).max_len(65_536).copy_range(128).flow_marks(FlowMarks::default());
    let mut queue = builder.bind().await.unwrap();
    let rule = Rule::new(Hook::Input).protocol(Protocol::Udp).destination_port(PORT).to_queue(0);
    let divert = Divert::builder().flow_marks(FlowMarks::default()).rule(rule).install().unwrap();
    let space = conntrack("max") / 10 * 8;
    let seconds = if space < u64::from(total) { "20" } else { "600" };
    eprintln!("the table has {} entries: connections end after {seconds} s", conntrack("max"));
    fs::write("/proc/sys/net/netfilter/nf_conntrack_udp_timeout", seconds).unwrap();
    let sink = queue.sink();
    let task = tokio::spawn(async move {
        while let Some(packet) = queue.recv().await.transpose().unwrap() {
            packet.accept().for_flow().submit().unwrap();
        }
    });
    let from = sender();
    let (mut before, mut start) = (0, Instant::now());
    for begin in (0..total).step_by(PORTION as usize) {
        let end = total.min(begin + PORTION);
        tokio::task::block_in_place(|| {
            let patience = Instant::now() + Duration::from_secs(300);
            while conntrack("count") > space {
                assert!(Instant::now() < patience, "the table stays full");
                thread::sleep(Duration::from_millis(10));
            }
            for times in 1..=2 {
                send_all(&from, begin..end, WINDOW, accepted);
                let all = 2 * u64::from(begin) + times * u64::from(end - begin);
                support::wait_until("all have passed", || accepted() == all);
            }
        });
        if begin == 0 {
            // The buffers have their size.
            (before, start) = (resident(), Instant::now());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let rate = f64::from(total - PORTION) / seconds;
    let grown = resident().saturating_sub(before);
    let live = conntrack("count");
    eprintln!("{total} connections, {live} at the end, {rate:.0} a second; {grown} bytes more than after {PORTION}");
    let stats = sink.stats();
    assert_fields!(stats, received.packets: u64::from(total), decided.accepted: u64::from(total));
    assert_fields!(stats, lost.packets: 0, sent.refusals: 0, sent.gone_at_least: 0);
    assert!(grown < SLACK, "{grown} bytes for {total} connections");
    let start = Instant::now();
    divert.forget_flows().unwrap();
    eprintln!("forgotten in {:?}", start.elapsed());
    // The last of them is asked about again.
    send(&from, total - 1);
    eventually("it comes to the queue", || sink.stats().received.packets == u64::from(total) + 1).await;
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the task", task).await.unwrap();
}

/// As many packets as the kernel holds in one queue.
async fn full_queue() {
    const PACKETS: u32 = 65_536;
    /// For each packet besides its bytes: its handle, which the test keeps, and the ledger's entry.
    const ENTRY: u64 = 512;
    let mut queue = Queue::builder(0).max_len(PACKETS).bind().await.unwrap();
    let _divert = Divert::builder().rule(udp_in().to_queue(0)).install().unwrap();
    let from = sender();
    let mut held: Vec<Packet> = Vec::with_capacity(PACKETS as usize);
    let before = resident();
    for begin in (0..PACKETS).step_by(128) {
        (begin..begin + 128).for_each(|number| send(&from, number));
        for _ in 0..128 {
            held.push(next(&mut queue).await);
        }
    }
    let grown = resident().saturating_sub(before);
    let stats = queue.stats();
    let bytes = stats.held.bytes as u64;
    eprintln!("{PACKETS} packets of 32 bytes held: {bytes} bytes counted, {grown} resident");
    assert_fields!(stats, held.in_flight: PACKETS as usize, lost.packets: 0);
    assert!(bytes <= u64::from(PACKETS) * 512, "{bytes} bytes of buffers");
    assert!(grown <= bytes + u64::from(PACKETS) * ENTRY, "{grown} bytes");
    // One more than the kernel holds.
    send(&from, PACKETS);
    let kernel = account(0).unwrap();
    assert_fields!(kernel, waiting: u64::from(PACKETS), queue_full: 1, socket_full: 0);

    Random::new(65_536).shuffle(&mut held);
    let start = Instant::now();
    for (packet, turn) in held.drain(..).zip(1..) {
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
        if turn % 64 == 0 {
            queue.sink().flush().await;
        }
    }
    queue.sink().flush().await;
    eprintln!("decided in random order in {:?}", start.elapsed());
    let stats = queue.stats();
    assert_eq!((accepted(), account(0).unwrap().waiting), (u64::from(PACKETS / 2), 0), "each by its verdict");
    assert_fields!(stats, decided.accepted: u64::from(PACKETS / 2), decided.dropped: u64::from(PACKETS / 2));
    assert_fields!(stats, held.in_flight: 0, held.bytes: 0, sent.gone_at_least: 0, sent.refusals: 0);
    // The next ones are decided as ever.
    (0..10).for_each(|number| send(&from, 2 * number));
    for _ in 0..10 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    eventually("they have passed", || accepted() == u64::from(PACKETS / 2) + 10).await;
    let grown = resident().saturating_sub(before);
    eprintln!("{grown} bytes more than at the beginning are resident at the end");
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn ten_thousand_rules_send_each_packet_to_its_queue() {
    // In other user namespaces a transaction is limited by the send buffer.
    let rules: u16 = if in_the_initial_user_namespace() { 10_000 } else { 500 };
    let mut queue = Queue::builder(0..=1).bind().await.unwrap();
    let list = |queue: u16| {
        (1..=rules).map(move |port| {
            Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(20_000 + port).to_queue(queue)
        })
    };
    let from = sender();
    // To a port that no rule has.
    let cost = || {
        let start = Instant::now();
        (0..1000).for_each(|_| _ = from.send_to(b"none", (Ipv4Addr::LOCALHOST, 20_000)).unwrap());
        start.elapsed() / 1000
    };
    let without = cost();
    let start = Instant::now();
    let divert = Divert::builder().rules(list(0)).install().unwrap();
    eprintln!("{rules} rules installed in {:?}", start.elapsed());
    eprintln!("a packet that none of them matches: {:?}, and {without:?} without rules", cost());
    let ports = [1, rules / 2, rules].map(|port| 20_000 + port);
    for queue_number in [0, 1] {
        if queue_number == 1 {
            let start = Instant::now();
            divert.replace_rules(list(1)).unwrap();
            eprintln!("{rules} rules replaced in {:?}", start.elapsed());
        }
        // Neither is in the list.
        for port in [20_000, 20_001 + rules] {
            from.send_to(b"none", (Ipv4Addr::LOCALHOST, port)).unwrap();
        }
        for port in ports {
            from.send_to(b"some", (Ipv4Addr::LOCALHOST, port)).unwrap();
            let packet = next(&mut queue).await;
            assert_eq!(packet.queue_number(), queue_number);
            assert_eq!(packet.payload()[22..24], port.to_be_bytes(), "the destination port");
            packet.accept().submit().unwrap();
        }
        let start = Instant::now();
        let counters = divert.counters().unwrap();
        eprintln!("{rules} counters read in {:?}", start.elapsed());
        let counted: Vec<usize> =
            counters.iter().enumerate().filter(|(_, counter)| counter.packets == 1).map(|(at, _)| at).collect();
        assert_eq!(counted, [0, usize::from(rules / 2) - 1, usize::from(rules) - 1]);
        assert_eq!(counters.iter().map(|counter| counter.packets).sum::<u64>(), 3);
    }
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn a_hundred_thousand_elements_of_a_set_are_matched() {
    // As above.
    let (elements, portion) = if in_the_initial_user_namespace() { (100_000, 100_000) } else { (10_000, 1000) };
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let address = |number: u32| Ipv4Addr::from_bits(0x7f10_0000 + number);
    let condition = Match::in_set("hosts", [PacketField::DestinationAddress]);
    let divert = Divert::builder()
        .set(NamedSet::new("hosts", [SetField::Ipv4Address]).capacity(100_000))
        .rule(Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(PORT).when(condition).to_queue(0))
        .install()
        .unwrap();
    let set = divert.set("hosts");
    let start = Instant::now();
    for begin in (0..elements).step_by(portion as usize) {
        set.insert_all((begin..begin + portion).map(address), None).unwrap();
    }
    eprintln!("{elements} elements inserted in {:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(set.elements().unwrap().len(), elements as usize);
    eprintln!("{elements} elements listed in {:?}", start.elapsed());
    let from = sender();
    let send = |number: u32| from.send_to(&number.to_be_bytes(), (address(number), PORT)).unwrap();
    let inside = [0, 1, elements / 2, elements - 1];
    // The one behind the last is in no set.
    send(elements);
    for number in inside {
        send(number);
    }
    for expected in inside {
        let packet = next(&mut queue).await;
        assert_eq!(number(&packet), expected);
        packet.accept().submit().unwrap();
    }
    let start = Instant::now();
    for begin in (0..elements).step_by(portion as usize) {
        let last = (begin + portion).min(elements - 1);
        set.remove_all((begin..last).map(address)).unwrap();
    }
    eprintln!("{elements} elements removed in {:?}", start.elapsed());
    assert_eq!(set.elements().unwrap().len(), 1);
    inside.into_iter().for_each(|number| _ = send(number));
    let packet = next(&mut queue).await;
    assert_eq!(number(&packet), elements - 1, "the only one that is left");
    packet.accept().submit().unwrap();
    soon("the shutdown", queue.close()).await.unwrap();
}
