//! The simulated kernel, and the crate on it. What it has in common with the real kernel is tested
//! by the scenarios of the kernel tests.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    task::{Context, Wake},
    time::Duration,
};

use super::*;
use crate::{Action, ErrorKind, FlushPolicy, Hook, Packet, Vlan};

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

fn addresses() -> (SocketAddr, SocketAddr) {
    ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:53".parse().unwrap())
}

fn datagram(payload: &[u8]) -> TestPacket {
    let (from, to) = addresses();
    TestPacket::udp(from, to, payload)
}

async fn next(queue: &mut Queue) -> Packet {
    queue.recv().await.expect("the queue is open").expect("the queue has not failed")
}

#[tokio::test]
async fn a_packet_gets_what_its_verdict_says() {
    let (kernel, mut queue) = queue(Queue::builder(7)).unwrap();
    let sent = kernel.send(datagram(b"hello"));
    let packet = next(&mut queue).await;
    assert_eq!(packet.payload(), &sent_payload(b"hello")[..]);
    assert!(sent.is_waiting() && sent.try_outcome().is_none());
    packet.accept().mark(5).priority(6).payload(sent_payload(b"bye")).submit().unwrap();
    let outcome = sent.outcome().await;
    assert!(outcome.accepted && outcome.payload_replaced);
    assert_eq!((outcome.cause, outcome.action, outcome.verdicts), (Cause::Verdict, Some(Action::Accept), 1));
    assert_eq!((outcome.mark, outcome.priority, outcome.payload), (5, 6, sent_payload(b"bye")));
    assert_eq!((outcome.queue, outcome.id.unwrap().get()), (Some(7), 1));
    queue.close().await.unwrap();
}

fn sent_payload(payload: &[u8]) -> bytes::Bytes {
    datagram(payload).payload().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_runs_in_a_multi_thread_runtime() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let (mut packets, sink) = queue.split();
    let reader = tokio::spawn(async move {
        while let Some(packet) = packets.recv().await {
            let packet = packet.unwrap();
            tokio::spawn(async move { packet.accept().submit().unwrap() });
        }
    });
    let sent = kernel.send_all((0..1000).map(|number: u32| datagram(&number.to_be_bytes())));
    for sent in sent {
        assert!(sent.outcome().await.accepted);
    }
    sink.close().await.unwrap();
    reader.await.unwrap();
    assert_eq!(sink.stats().received.packets, 1000);
}

#[tokio::test]
async fn every_attribute_of_a_packet_arrives() {
    let kernel = Kernel::new();
    kernel.add_interface(9, "dmz");
    let mut queue = kernel.bind(Queue::builder(0).conntrack(true).uid_gid(true).security_context(true)).unwrap();
    let (from, to): (SocketAddr, SocketAddr) = ("[fd00::1]:4000".parse().unwrap(), "[fd00::2]:80".parse().unwrap());
    let packet = TestPacket::tcp(from, to, b"GET")
        .hook(Hook::Forward)
        .interface_in(2)
        .interface_out(9)
        .physical_in(3)
        .physical_out(4)
        .mark(1)
        .priority(2)
        .hardware_address(&[1, 2, 3, 4, 5, 6])
        .owner(1000, 100)
        .security_context(b"secret")
        .of_connection(Connection::established(77).mark(5).labels([1; 16]))
        .checksum_unfinished();
    let sent = kernel.send(packet);
    let packet = next(&mut queue).await;
    assert_eq!((packet.hook(), packet.family(), packet.hw_protocol()), (Hook::Forward, crate::Family::Ipv6, 0x86dd));
    assert_eq!((packet.interface_in(), packet.interface_out()), (Some(2), Some(9)));
    assert_eq!((packet.physical_in(), packet.physical_out()), (Some(3), Some(4)));
    assert_eq!(packet.interface_name(9).unwrap(), "dmz");
    assert!(packet.interface_name(10).is_err());
    assert_eq!((packet.mark(), packet.priority()), (1, 2));
    assert_eq!(packet.hardware_address(), Some(&[1, 2, 3, 4, 5, 6][..]));
    assert_eq!((packet.uid(), packet.gid()), (Some(1000), Some(100)));
    assert_eq!(packet.security_context(), Some(&b"secret"[..]));
    assert!(packet.timestamp().is_some() && !packet.is_checksum_ready() && !packet.is_truncated());
    #[cfg(feature = "conntrack")]
    {
        let entry = packet.conntrack().unwrap();
        assert_eq!((entry.id, entry.mark, entry.labels), (Some(77), Some(5), Some([1; 16])));
        let flow = crate::conntrack::FlowTuple::tcp(from, to);
        assert_eq!((entry.original, entry.reply), (Some(flow), Some(flow.reversed())));
        use crate::conntrack::{ConnectionState, Direction};
        assert_eq!(packet.connection_state(), Some(ConnectionState::Established));
        assert_eq!(packet.direction(), Some(Direction::Original));
        packet.accept().connection_mark(0xf0, 0xf0).submit().unwrap();
        assert_eq!(sent.outcome().await.connection_mark, Some(0xf5));
        assert_eq!(kernel.connection_mark(77), Some(0xf5));
    }
    #[cfg(not(feature = "conntrack"))]
    drop((packet, sent));
}

#[tokio::test]
async fn bridged_packets_have_a_link_layer_header() {
    let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
    let tag = Vlan { protocol: 0x8100, control: 5 };
    let sent = kernel.send(datagram(b"x").bridged(&[1; 14], Some(tag)).hook(Hook::Prerouting));
    let packet = next(&mut queue).await;
    assert_eq!((packet.layer2_header(), packet.vlan()), (Some(&[1; 14][..]), Some(tag)));
    let other = Vlan { control: 6, ..tag };
    packet.accept().layer2_header(vec![2; 14]).vlan(other).submit().unwrap();
    let outcome = sent.outcome().await;
    assert_eq!((outcome.layer2_header, outcome.vlan), (Some(vec![2; 14].into()), Some(other)));
}

#[tokio::test]
async fn a_queue_without_gso_gets_segments_with_full_checksums() {
    for offload in [false, true] {
        let (kernel, mut queue) = queue(Queue::builder(0).gso(offload)).unwrap();
        let sent = kernel.send(datagram(&[7; 2500]).gso(1000));
        let mut lengths = Vec::new();
        while sent.is_waiting() {
            let packet = next(&mut queue).await;
            assert_eq!(packet.is_gso(), offload);
            let bytes = packet.payload_bytes();
            let sliced = etherparse::SlicedPacket::from_ip(&bytes).unwrap();
            let Some(etherparse::NetSlice::Ipv4(ip)) = &sliced.net else { panic!() };
            let Some(etherparse::TransportSlice::Udp(udp)) = &sliced.transport else { panic!() };
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            let expected = udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap();
            assert_eq!(expected, udp.checksum());
            lengths.push(udp.payload().len());
            packet.accept().submit().unwrap();
            queue.sink().flush().await;
        }
        let outcome = sent.outcome().await;
        assert!(outcome.accepted);
        match offload {
            true => assert_eq!((lengths, outcome.segments.len()), (vec![2500], 0)),
            false => assert_eq!((lengths, outcome.segments.len()), (vec![1000, 1000, 500], 3)),
        }
    }
}

#[tokio::test]
async fn a_deadline_expires_when_the_clock_is_moved_and_not_before() {
    let builder = || Queue::builder(0).deadline(Duration::from_secs(10), Action::Accept);
    for held in [false, true] {
        let (kernel, mut queue) = queue(builder()).unwrap();
        kernel.advance(Duration::ZERO);
        let begin = kernel.now();
        let sent = kernel.send(datagram(b"x"));
        let packet = if held { Some(next(&mut queue).await) } else { None };
        kernel.advance(Duration::from_millis(9999));
        assert!(sent.is_waiting(), "held: {held}");
        kernel.advance(Duration::from_secs(1));
        let outcome = sent.try_outcome().expect("the deadline is over");
        assert!(outcome.accepted);
        let waited = outcome.at - begin;
        assert!((Duration::from_secs(10)..Duration::from_millis(10_500)).contains(&waited), "{waited:?}");
        assert!(packet.is_none_or(|packet| packet.is_expired()));
    }
}

#[tokio::test]
async fn gathered_verdicts_wait_for_the_clock() {
    let policy = FlushPolicy::fixed(100, Duration::from_millis(5));
    let (kernel, mut queue) = queue(Queue::builder(0).flush_policy(policy)).unwrap();
    kernel.advance(Duration::ZERO);
    let sent = kernel.send(datagram(b"x"));
    next(&mut queue).await.drop().submit().unwrap();
    kernel.advance(Duration::from_millis(4));
    assert!(sent.is_waiting());
    kernel.advance(Duration::from_millis(1));
    assert!(!sent.try_outcome().unwrap().accepted);
}

#[tokio::test]
async fn without_moving_the_clock_time_passes_by_itself() {
    const DEADLINE: Duration = Duration::from_secs(2);
    let (kernel, mut queue) = queue(Queue::builder(0).deadline(DEADLINE, Action::Accept)).unwrap();
    let sent = [kernel.send(datagram(b"x")), kernel.send(datagram(b"y"))];
    // If the machine stopped the test until the deadline, there is none.
    let held = queue.try_recv();
    let is_late = kernel.now() >= DEADLINE;
    for sent in &sent {
        let outcome = sent.outcome().await;
        assert!(outcome.accepted && outcome.at >= DEADLINE);
    }
    assert!(is_late || held.is_ok_and(|packet| packet.is_expired()));
}

/// The two clocks are independent: Tokio's jumps when the runtime is idle, and the kernel's does
/// not.
#[tokio::test(start_paused = true)]
async fn a_paused_clock_of_tokio_does_not_move_the_clock_of_the_kernel() {
    const HOUR: Duration = Duration::from_secs(3600);
    let (kernel, queue) = queue(Queue::builder(0).deadline(HOUR, Action::Drop)).unwrap();
    let (mut packets, _sink) = queue.split();
    let begin = Instant::now();
    tokio::spawn(async move {
        while let Some(packet) = packets.recv().await {
            let packet = packet.unwrap();
            tokio::spawn(async move {
                let slow = packet.payload().ends_with(b"slow");
                tokio::time::sleep(HOUR * if slow { 1000 } else { 10 }).await;
                packet.accept().submit().unwrap();
            });
        }
    });
    // A time-out of Tokio's clock does not expire while there are packets to read.
    let sent: Vec<Sent> = (0..100).map(|_| kernel.send(datagram(b"fast"))).collect();
    for sent in &sent {
        let outcome = tokio::time::timeout(20 * HOUR, sent.outcome()).await;
        assert!(outcome.expect("the sleep ends before the time-out").accepted);
    }
    let slow = kernel.send(datagram(b"slow"));
    assert!(tokio::time::timeout(20 * HOUR, slow.outcome()).await.is_err());
    assert!(slow.is_waiting(), "the deadline follows the clock of the kernel");
    kernel.advance(HOUR * 2);
    let outcome = slow.outcome().await;
    assert_eq!((outcome.accepted, outcome.cause), (false, Cause::Verdict));
    assert!(begin.elapsed() < HOUR);
}

#[tokio::test]
async fn ids_wrap() {
    let kernel = Kernel::new();
    kernel.start_ids_at(u32::MAX - 1);
    let mut queue = kernel.bind(Queue::builder(0)).unwrap();
    let sent = kernel.send_all((0..5).map(|_| datagram(b"x")));
    let mut ids = Vec::new();
    for _ in 0..5 {
        let packet = next(&mut queue).await;
        ids.push(packet.id().get());
        packet.accept().submit().unwrap();
    }
    assert_eq!(ids, [u32::MAX - 1, u32::MAX, 0, 1, 2]);
    for sent in sent {
        assert!(sent.outcome().await.accepted);
    }
    assert_eq!((queue.stats().lost.packets, queue.sink().kernel_stats().unwrap().last_id), (0, 2));
}

#[tokio::test]
async fn groups_and_second_binds_work_as_in_the_kernel() {
    let kernel = Kernel::new();
    let mut group = kernel.bind(Queue::builder(3..=4)).unwrap();
    let sent = kernel.send_all([4, 3].map(|number| datagram(b"x").to_queue(number)));
    for _ in 0..2 {
        group.recv().await.unwrap().unwrap().accept().submit().unwrap();
    }
    for (sent, number) in sent.iter().zip([4, 3]) {
        assert_eq!(sent.outcome().await.queue, Some(number));
    }
    let error = kernel.bind(Queue::builder(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(error.to_string().contains("another queue of this process"), "{error}");
    group.close().await.unwrap();
    kernel.bind(Queue::builder(3)).unwrap();
}

#[tokio::test]
async fn a_missing_capability_refuses_verdicts_until_it_is_back() {
    let (kernel, mut queue) = queue(Queue::builder(0).on_unanswered(Action::Accept)).unwrap();
    let sent = kernel.send(datagram(b"x"));
    let packet = next(&mut queue).await;
    kernel.set_capable(false);
    let error = packet.drop().confirm().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    assert!(sent.is_waiting());
    kernel.set_capable(true);
    kernel.advance(Duration::from_secs(1));
    assert!(sent.outcome().await.accepted, "the default action");
}

#[tokio::test]
async fn a_confirmation_takes_no_cpu_while_nothing_can_be_sent() {
    const ENOMEM: i32 = 12;
    let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
    kernel.advance(Duration::ZERO);
    let sent = kernel.send(datagram(b"x"));
    let packet = next(&mut queue).await;
    kernel.fail_sends(ENOMEM, 1000);
    let mut confirm = std::pin::pin!(packet.accept().confirm());
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    assert!(confirm.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    assert_eq!(wakes.0.load(SeqCst), 0);
    kernel.fail_sends(ENOMEM, 0);
    kernel.advance(Duration::from_secs(1));
    confirm.await.unwrap();
    assert!(sent.outcome().await.accepted);
}

#[tokio::test]
async fn an_error_of_the_socket_ends_the_stream() {
    let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
    const EBADF: i32 = 9;
    kernel.fail_receives(EBADF, 1);
    let error = queue.recv().await.unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EBADF));
    assert!(queue.recv().await.is_none());
}

#[tokio::test]
async fn a_kernel_without_conntrack_refuses_it_by_name() {
    let kernel = Kernel::new();
    kernel.remove_conntrack();
    let error = kernel.bind(Queue::builder(0).conntrack(true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("conntrack"), "{error}");
}

#[tokio::test]
async fn other_event_loops_see_a_readable_descriptor() {
    use rustix::event::{PollFd, PollFlags, poll};
    let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
    let readable = |queue: &Queue| {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&queue.readable_fd().unwrap(), PollFlags::IN)], Some(&now)).unwrap() == 1
    };
    assert!(!readable(&queue));
    let sent = kernel.send(datagram(b"x"));
    assert!(readable(&queue));
    queue.try_recv().unwrap().accept().submit().unwrap();
    assert!(matches!(queue.try_recv(), Err(crate::TryRecvError::Empty)));
    assert!(!readable(&queue));
    assert!(sent.try_outcome().unwrap().accepted);
}

#[test]
fn packets_of_every_kind_are_complete() {
    let (from, to) = addresses();
    let v6: [IpAddr; 2] = ["fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()];
    for (packet, protocol) in [
        (datagram(b"x"), 17),
        (TestPacket::tcp(from, to, b"x"), 6),
        (TestPacket::tcp_syn(from, to), 6),
        (TestPacket::echo_request(from.ip(), to.ip(), b"x"), 1),
        (TestPacket::echo_request(v6[0], v6[1], b"x"), 58),
        (TestPacket::ip(from.ip(), to.ip(), 47.into(), b"x"), 47),
        (TestPacket::ip(v6[0], v6[1], 47.into(), b"x"), 47),
    ] {
        let headers = etherparse::IpHeaders::from_slice(packet.payload()).unwrap();
        assert_eq!(headers.1.ip_number.0, protocol);
        assert_eq!(headers.0.header_len() + headers.1.payload.len(), packet.payload().len());
    }
}

/// No kernel does this. What is counted must add up nevertheless.
#[tokio::test]
async fn a_repeated_id_is_counted_once() {
    use crate::wire::kernel_side::{PacketFields, encode_packet};
    let (kernel, mut queue) = queue(Queue::builder(0).copy_range(4000)).unwrap();
    let sent = kernel.send(datagram(&[1; 100]));
    let first = next(&mut queue).await;
    let held = queue.stats().held.bytes;
    assert!(held > 0);
    // Long enough for a buffer of another kind.
    let payload = [0x45; 3000];
    let fields = PacketFields { family: 2, id: 1, payload: &payload, ..PacketFields::default() };
    let mut repeated = Vec::new();
    encode_packet(&mut repeated, 0, &fields);
    kernel.forge(0, &repeated);
    let second = next(&mut queue).await;
    assert_eq!(second.id(), first.id());
    assert_eq!(queue.stats().held.bytes, held);
    first.accept().confirm().await.unwrap();
    drop(second);
    let stats = queue.stats();
    assert_eq!((stats.held.bytes, stats.held.in_flight), (0, 0));
    assert_eq!((stats.received.packets, stats.received.malformed), (1, 1));
    assert!(sent.outcome().await.accepted);
}

#[tokio::test]
async fn a_super_packet_without_a_payload_has_an_outcome() {
    let (from, to) = addresses();
    for packet in [datagram(b""), TestPacket::tcp_syn(from, to)] {
        let (kernel, mut queue) = queue(Queue::builder(0).gso(false)).unwrap();
        let sent = kernel.send(packet.gso(1000));
        queue.try_recv().expect("it is queued as it is").accept().submit().unwrap();
        queue.sink().flush().await;
        assert!(sent.try_outcome().expect("it has been decided").accepted);
    }
}

#[tokio::test]
async fn the_descriptor_for_other_event_loops_is_readable_at_the_end() {
    use rustix::event::{PollFd, PollFlags, poll};
    const EBADF: i32 = 9;
    for end in ["close", "failure", "close before the first call"] {
        let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
        let readable = |queue: &Queue| {
            let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&queue.readable_fd().unwrap(), PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        if !end.contains("before") {
            assert!(!readable(&queue));
        }
        if end == "failure" {
            let sent = kernel.send(datagram(b"x"));
            let packet = queue.try_recv().unwrap();
            assert!(matches!(queue.try_recv(), Err(crate::TryRecvError::Empty)));
            assert!(!readable(&queue));
            kernel.fail_sends(EBADF, 1);
            packet.accept().submit().unwrap();
            queue.sink().flush().await;
            drop(sent);
        } else {
            queue.sink().close().await.unwrap();
        }
        assert!(readable(&queue), "{end}");
        assert!(matches!(queue.try_recv(), Err(crate::TryRecvError::Closed | crate::TryRecvError::Failed(_))), "{end}");
    }
}

/// A waker that needs the lock under which verdicts are sent.
struct Reconfigures {
    sink: crate::VerdictSink,
    done: std::sync::mpsc::Sender<()>,
}

impl Wake for Reconfigures {
    fn wake(self: Arc<Self>) {
        drop(self.sink.reconfigure(&crate::Reconfigure::new().max_len(7)));
        let _ = self.done.send(());
    }
}

#[test]
fn who_waits_for_an_outcome_may_call_the_queue_when_woken() {
    let (done, woken) = std::sync::mpsc::channel();
    // In a thread of its own: a failure is a deadlock.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let (kernel, mut queue) = queue(Queue::builder(0)).unwrap();
            let [first, second] = [b"x", b"y"].map(|payload| kernel.send(datagram(payload)));
            let mut packets = vec![next(&mut queue).await, next(&mut queue).await];
            let waker = Waker::from(Arc::new(Reconfigures { sink: queue.sink(), done }));
            let mut outcomes = [std::pin::pin!(first.outcome()), std::pin::pin!(second.outcome())];
            for outcome in &mut outcomes {
                assert!(outcome.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            }
            // Decided by a verdict, and by the unbinding.
            packets.remove(0).accept().confirm().await.unwrap();
            drop(packets);
            queue.close().await.unwrap();
        });
    });
    for _ in 0..2 {
        woken.recv_timeout(Duration::from_secs(30)).expect("the waker has returned");
    }
}

#[test]
fn attributes_that_no_message_can_carry_are_refused() {
    for set in [
        |packet: TestPacket| packet.hardware_address(&[1; 9]),
        |packet: TestPacket| packet.security_context(&[1; 4097]),
        |packet: TestPacket| packet.bridged(&[1; 161], None),
    ] {
        let panic = std::panic::catch_unwind(|| set(datagram(b"x"))).unwrap_err();
        assert!(panic.downcast_ref::<String>().unwrap().contains("allowed"));
    }
}

#[tokio::test]
async fn an_idle_queue_wakes_no_task_and_sets_no_timer() {
    let policies = [FlushPolicy::default(), FlushPolicy::fixed(10, Duration::from_millis(5)), FlushPolicy::immediate()];
    for policy in policies {
        let builder = Queue::builder(0).flush_policy(policy).deadline(Duration::from_secs(60), Action::Drop);
        let (kernel, mut queue) = queue(builder).unwrap();
        kernel.advance(Duration::ZERO);
        let sent = kernel.send_all((0..100).map(|_| datagram(b"x")));
        for _ in 0..100 {
            next(&mut queue).await.accept().submit().unwrap();
        }
        queue.sink().flush().await;
        assert!(sent.iter().all(|sent| !sent.is_waiting()));
        // What is left to do ends with time.
        kernel.advance(Duration::from_secs(120));
        assert_eq!(kernel.0.clock.next(), None, "{queue:?}");
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut packet = std::pin::pin!(queue.recv());
        assert!(packet.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        kernel.advance(Duration::from_secs(3600));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!((wakes.0.load(SeqCst), kernel.0.clock.next()), (0, None));
    }
}

#[tokio::test]
async fn a_waker_may_move_the_clock() {
    struct Moves(Kernel);
    impl Wake for Moves {
        fn wake(self: Arc<Self>) {
            self.0.advance(Duration::from_millis(10));
        }
    }
    let deadline = Duration::from_millis(5);
    let (kernel, _queue) = queue(Queue::builder(0).deadline(deadline, Action::Accept)).unwrap();
    kernel.advance(Duration::ZERO);
    let sent = kernel.send(datagram(b"a"));
    let waker = Arc::new(Moves(kernel.clone())).into();
    let mut outcome = std::pin::pin!(sent.outcome());
    assert!(outcome.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    // The deadline wakes it, within this.
    let before = kernel.now();
    kernel.advance(deadline * 2);
    assert!(outcome.await.accepted);
    assert!(kernel.now() - before >= Duration::from_millis(20));
    kernel.advance(Duration::from_secs(1));
}

#[test]
fn moves_of_the_clock_by_several_threads_add_up() {
    let kernel = Kernel::new();
    kernel.advance(Duration::ZERO);
    let before = kernel.now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..1000).for_each(|_| kernel.advance(Duration::from_millis(1))));
        }
    });
    assert_eq!(kernel.now() - before, Duration::from_secs(4));
    // Beyond the range of the clock.
    kernel.advance(Duration::MAX);
    assert_eq!(kernel.now() - before, Duration::from_secs(4));
}
/// No task polls the stream, and no other verdict follows.
#[tokio::test]
async fn a_packet_whose_verdict_is_too_long_gets_the_default_action_at_once() {
    const EMSGSIZE: i32 = 90;
    let builder = Queue::builder(0).flush_policy(FlushPolicy::immediate());
    let (kernel, mut queue) = queue(builder).unwrap();
    let sent = kernel.send(datagram(&[1; 5000]));
    let packet = next(&mut queue).await;
    let payload = packet.payload().to_vec();
    kernel.fail_sends(EMSGSIZE, 1);
    packet.accept().payload(payload).submit().unwrap();
    assert_eq!(sent.try_outcome().expect("it is decided").action, Some(Action::Drop));
    let refusal = queue.sink().refusals().recv().await.unwrap();
    assert_eq!(refusal.kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_datagram_that_always_fits_is_sent_again() {
    const EMSGSIZE: i32 = 90;
    let builder = Queue::builder(0).flush_policy(FlushPolicy::fixed(10, Duration::from_secs(1)));
    let (kernel, mut queue) = queue(builder).unwrap();
    kernel.advance(Duration::ZERO);
    let sent = kernel.send_all((0..10).map(|_| datagram(b"x")));
    let mut packets = Vec::new();
    for _ in 0..10 {
        packets.push(next(&mut queue).await);
    }
    kernel.fail_sends(EMSGSIZE, 8);
    // One batch for all.
    packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    assert!(sent.iter().all(Sent::is_waiting));
    kernel.advance(Duration::from_secs(1));
    for sent in sent {
        assert_eq!(sent.try_outcome().expect("it is decided").action, Some(Action::Accept));
    }
}

#[tokio::test]
async fn programs_without_await_receive_flush_and_read_refusals() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let (mut packets, sink) = queue.split();
    let mut refusals = sink.refusals();
    let sent = kernel.send_all((0..10).map(|_| datagram(b"x")));
    let mut received = Vec::new();
    assert_eq!(packets.try_recv_many(&mut received, 0).unwrap(), 0);
    while received.len() < 10 {
        let before = received.len();
        let count = packets.try_recv_many(&mut received, 4).unwrap();
        assert!((1..=4).contains(&count) && received.len() == before + count);
    }
    assert!(matches!(packets.try_recv_many(&mut received, 4), Err(crate::TryRecvError::Empty)));
    assert!(refusals.try_recv().is_none());
    received.drain(1..).for_each(|packet| packet.accept().submit().unwrap());
    sink.flush_now();
    assert_eq!(sent.iter().filter(|sent| sent.try_outcome().is_some_and(|outcome| outcome.accepted)).count(), 9);
    let late = received.pop().unwrap();
    sink.close_within(Duration::ZERO).await.unwrap_err();
    late.accept().submit().unwrap();
    assert_eq!(refusals.try_recv().unwrap().kind(), ErrorKind::Expired);
    assert!(refusals.try_recv().is_none());
}
