//! Verdicts for connections in the simulated kernel. `tests/kernel/simulated/flows.rs` compares it
//! with the real one.

use std::{net::SocketAddr, time::Duration};

use super::{Cause, Kernel, Outcome, TestPacket, queue};
use crate::{Action, Error, ErrorKind, FlowMarks, FlushPolicy, Hook, Packet, Protocol, Queue, QueueBuilder, Verdict};

fn builder() -> QueueBuilder {
    Queue::builder(0).flow_marks(FlowMarks::default())
}

/// The clock stands still.
fn bind() -> (Kernel, Queue) {
    let (kernel, queue) = queue(builder()).unwrap();
    kernel.advance(Duration::ZERO);
    (kernel, queue)
}

fn addresses() -> [SocketAddr; 2] {
    ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap())
}

fn question() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::udp(client, server, b"question")
}

fn answer() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::udp(server, client, b"answer")
}

/// Segments of the client and of the server.
fn syn() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::tcp_syn(client, server)
}

fn request() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::tcp(client, server, b"request")
}

fn response() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::tcp(server, client, b"response")
}

/// With other flags than ACK.
fn with_flags(segment: &TestPacket, flags: u8) -> TestPacket {
    let mut bytes = segment.payload().to_vec();
    bytes[33] = flags;
    TestPacket::raw(bytes)
}

fn syn_ack() -> TestPacket {
    let [client, server] = addresses();
    TestPacket::tcp_syn_ack(server, client)
}

type Decide = fn(Packet) -> Verdict;

const ACCEPT: Decide = |packet| packet.accept().for_flow();
const DROP: Decide = |packet| packet.drop().for_flow();
const REJECT: Decide = |packet| packet.reject().for_flow();
const ACCEPTS: [Decide; 2] = [|packet| packet.accept(), ACCEPT];
const DENIALS: [Decide; 2] = [DROP, REJECT];

/// Sends a packet, which comes to the queue, and decides it.
async fn decided(kernel: &Kernel, queue: &mut Queue, packet: TestPacket, decide: Decide) -> Outcome {
    let sent = kernel.send(packet);
    let packet = queue.try_recv().expect("the packet comes to the queue");
    decide(packet).confirm().await.unwrap();
    sent.try_outcome().expect("the packet is decided")
}

/// Sends a packet, which does not come to the queue.
#[track_caller]
fn unseen(kernel: &Kernel, packet: TestPacket) -> Outcome {
    let outcome = kernel.send(packet).try_outcome().expect("the packet does not come to the queue");
    assert_eq!((outcome.cause, outcome.action, outcome.verdicts), (Cause::FlowVerdict, None, 0));
    outcome
}

/// As `unseen`, and the packet is denied.
#[track_caller]
fn denied(kernel: &Kernel, packet: TestPacket, rejected: bool) {
    let outcome = unseen(kernel, packet);
    assert_eq!((outcome.accepted, outcome.rejected), (false, rejected));
}

#[tokio::test]
async fn packets_of_an_accepted_connection_do_not_come_to_the_queue() {
    for packets in [[question(), question(), answer()], [syn(), request(), syn_ack()]] {
        let (kernel, mut queue) = bind();
        let [first, there, back] = packets.map(|packet| packet.priority(5));
        let outcome = decided(&kernel, &mut queue, first, ACCEPT).await;
        assert!(outcome.accepted && !outcome.rejected);
        assert_eq!((outcome.cause, outcome.action, outcome.priority), (Cause::Verdict, Some(Action::Accept), 5));
        for packet in [back, there.clone(), there] {
            let outcome = unseen(&kernel, packet);
            assert_eq!((outcome.accepted, outcome.queue, outcome.priority), (true, None, 5));
        }
        assert_eq!(kernel.stats(0).unwrap().last_id, 1);
    }
}

#[tokio::test]
async fn packets_of_a_denied_connection_are_denied() {
    for (deny, rejected) in [(DROP, false), (REJECT, true)] {
        for packets in [[question(), question()], [syn(), request()], [syn(), syn()]] {
            let (kernel, mut queue) = bind();
            let [first, later] = packets.map(|packet| packet.priority(5));
            let outcome = decided(&kernel, &mut queue, first, deny).await;
            assert_eq!((outcome.accepted, outcome.rejected, outcome.priority), (false, rejected, 5));
            assert_eq!((outcome.cause, outcome.action, outcome.verdicts), (Cause::Verdict, Some(Action::Drop), 1));
            denied(&kernel, later, rejected);
        }
        // In the middle of a connection: both directions.
        let (kernel, mut queue) = bind();
        for packet in [syn(), syn_ack()] {
            assert!(decided(&kernel, &mut queue, packet, |packet| packet.accept()).await.accepted);
        }
        decided(&kernel, &mut queue, request(), deny).await;
        for packet in [request(), response(), syn(), request()] {
            denied(&kernel, packet, rejected);
        }
    }
}

#[tokio::test]
async fn packets_with_a_source_route_are_always_asked_about() {
    let (kernel, mut queue) = bind();
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    let mut routed = question().payload().to_vec();
    // One more word in the header: a record of the route without places for it.
    routed.splice(20..20, [7, 3, 4, 0]);
    (routed[0], routed[3]) = (0x46, routed[3] + 4);
    for _ in 0..2 {
        decided(&kernel, &mut queue, TestPacket::raw(routed.clone()), ACCEPT).await;
    }
    let stats = queue.stats();
    assert_eq!((stats.decided.accepted, stats.decided.dropped), (3, 0));
    decided(&kernel, &mut queue, TestPacket::raw(routed), REJECT).await;
    let stats = queue.stats();
    assert_eq!((stats.decided.accepted, stats.decided.dropped, stats.decided.repeated), (3, 1, 0));
}

#[tokio::test]
async fn a_rejected_packet_does_not_deny_its_connection() {
    let (kernel, mut queue) = bind();
    for _ in 0..2 {
        let outcome = decided(&kernel, &mut queue, question(), |packet| packet.reject()).await;
        assert!(outcome.rejected && !outcome.accepted);
        assert_eq!((outcome.cause, outcome.action), (Cause::Verdict, Some(Action::Drop)));
    }
}

#[tokio::test]
async fn what_the_kernel_does_not_reply_to_is_not_rejected() {
    const RST: u8 = 0x04;
    let (kernel, mut queue) = bind();
    let reset = with_flags(&request(), RST);
    let outcome = decided(&kernel, &mut queue, reset.clone(), |packet| packet.reject()).await;
    assert!(!outcome.rejected && !outcome.accepted);
    decided(&kernel, &mut queue, syn(), REJECT).await;
    denied(&kernel, reset, false);
    let sent = kernel.send(question().hook(Hook::Postrouting));
    let error = queue.try_recv().unwrap().reject().for_flow().confirm().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let outcome = sent.try_outcome().unwrap();
    assert!(!outcome.rejected && !outcome.accepted);
    denied(&kernel, question(), false);
}

#[tokio::test]
async fn a_denial_wins_over_an_accept() {
    for (accept, deny) in ACCEPTS.into_iter().flat_map(|accept| DENIALS.map(|deny| (accept, deny))) {
        for accept_first in [true, false] {
            for [one, other] in [[question(), question()], [question(), answer()]] {
                let (kernel, mut queue) = bind();
                kernel.send_all([one, other]);
                let [one, other] = [queue.try_recv().unwrap(), queue.try_recv().unwrap()];
                let [first, second] =
                    if accept_first { [accept(other), deny(one)] } else { [deny(one), accept(other)] };
                first.confirm().await.unwrap();
                second.confirm().await.unwrap();
                // A packet in the direction of the denied one never passes unseen.
                let later = kernel.send(question());
                assert!(later.try_outcome().is_none_or(|outcome| !outcome.accepted));
            }
        }
    }
}

#[tokio::test]
async fn of_two_first_packets_the_first_accepted_one_decides() {
    let (kernel, mut queue) = bind();
    kernel.send_all([question(), question()]);
    let [first, second] = [queue.try_recv().unwrap(), queue.try_recv().unwrap()];
    first.accept().confirm().await.unwrap();
    second.accept().for_flow().confirm().await.unwrap();
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    unseen(&kernel, question());
}

#[tokio::test]
async fn a_syn_ends_the_accept() {
    for segment in [syn(), with_flags(&response(), 0x02)] {
        let (kernel, mut queue) = bind();
        decided(&kernel, &mut queue, syn(), ACCEPT).await;
        unseen(&kernel, syn_ack());
        unseen(&kernel, request());
        decided(&kernel, &mut queue, segment, |packet| packet.accept()).await;
        // Only a verdict for the SYN can accept what it has begun.
        for packet in [request(), response(), request()] {
            decided(&kernel, &mut queue, packet, ACCEPT).await;
        }
        decided(&kernel, &mut queue, syn(), ACCEPT).await;
        assert!(unseen(&kernel, syn_ack()).accepted);
        assert!(unseen(&kernel, request()).accepted);
    }
}

#[tokio::test]
async fn forgetting_keeps_that_a_syn_has_begun_a_connection() {
    let (kernel, mut queue) = bind();
    decided(&kernel, &mut queue, syn(), ACCEPT).await;
    kernel.forget_flows();
    // A verdict for a packet of an older connection accepts nothing.
    for packet in [request(), syn_ack(), request()] {
        decided(&kernel, &mut queue, packet, ACCEPT).await;
    }
    decided(&kernel, &mut queue, syn(), ACCEPT).await;
    assert!(unseen(&kernel, syn_ack()).accepted);
}

#[tokio::test]
async fn the_other_side_of_a_denied_connection_is_asked_about_its_own() {
    let (kernel, mut queue) = bind();
    decided(&kernel, &mut queue, question(), DROP).await;
    for _ in 0..2 {
        assert!(decided(&kernel, &mut queue, answer(), ACCEPT).await.accepted);
    }
    // The connection is that of the other side now. Its packets do not leave the queue.
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    // Where a packet had passed, it is of the denied connection, also without its entry.
    for deny in DENIALS {
        let (kernel, mut queue) = bind();
        decided(&kernel, &mut queue, question(), ACCEPTS[0]).await;
        let rejected = decided(&kernel, &mut queue, question(), deny).await.rejected;
        kernel.advance(Duration::from_secs(100));
        denied(&kernel, answer(), rejected);
    }
    // The middle of a connection is none of its own.
    let (kernel, mut queue) = bind();
    decided(&kernel, &mut queue, syn(), REJECT).await;
    denied(&kernel, response(), true);
    denied(&kernel, syn_ack(), true);
    decided(&kernel, &mut queue, with_flags(&response(), 0x02), ACCEPT).await;
}

#[tokio::test]
async fn a_denial_holds_for_ten_minutes_after_the_last_packet() {
    let nearly = Duration::from_secs(599);
    let (kernel, mut queue) = bind();
    decided(&kernel, &mut queue, question(), DROP).await;
    for _ in 0..3 {
        kernel.advance(nearly);
        denied(&kernel, question(), false);
    }
    kernel.advance(Duration::from_secs(600));
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    unseen(&kernel, question());
}

#[tokio::test]
async fn an_accept_ends_with_its_connection() {
    let [second, short, long] = [1, 29, 119].map(Duration::from_secs);
    let (kernel, mut queue) = bind();
    for _ in 0..2 {
        decided(&kernel, &mut queue, question(), ACCEPT).await;
        kernel.advance(short);
        unseen(&kernel, question());
        kernel.advance(short + second);
    }
    // With replies, after the first two seconds.
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    for wait in [second, second * 2, long] {
        unseen(&kernel, answer());
        kernel.advance(wait);
        unseen(&kernel, question());
    }
    kernel.advance(long + second);
    decided(&kernel, &mut queue, question(), ACCEPT).await;
    // TCP
    decided(&kernel, &mut queue, syn(), ACCEPT).await;
    kernel.advance(Duration::from_secs(4 * 86_400));
    unseen(&kernel, syn_ack());
    kernel.advance(Duration::from_secs(5 * 86_400));
    decided(&kernel, &mut queue, response(), ACCEPT).await;
}

/// A verdict that holds for its packet only.
async fn alone(kernel: &Kernel, queue: &mut Queue, packet: TestPacket, decide: Decide) -> Outcome {
    let sent = kernel.send(packet);
    let result = decide(queue.try_recv().expect("the packet comes to the queue")).confirm().await;
    assert_eq!(result.as_ref().map_err(Error::kind), Err(ErrorKind::InvalidInput));
    sent.try_outcome().expect("the packet is decided")
}

#[tokio::test]
async fn an_icmp_error_is_accepted_with_its_connection_and_decided_alone() {
    let [client, server] = addresses();
    let error = || {
        let quoted = request();
        let bytes = [&[3, 3, 0, 0, 0, 0, 0, 0], &quoted.payload()[..28]].concat();
        TestPacket::ip(server.ip(), client.ip(), Protocol::Icmp, &bytes)
    };
    for deny in DENIALS {
        let (kernel, mut queue) = bind();
        decided(&kernel, &mut queue, syn(), |packet| packet.accept()).await;
        assert!(alone(&kernel, &mut queue, error(), ACCEPT).await.accepted);
        let outcome = alone(&kernel, &mut queue, error(), deny).await;
        assert!(!outcome.accepted && !outcome.rejected);
        assert_eq!(outcome.action, Some(Action::Drop));
        decided(&kernel, &mut queue, request(), ACCEPT).await;
        assert!(unseen(&kernel, error()).accepted);
        let (kernel, mut queue) = bind();
        decided(&kernel, &mut queue, syn(), |packet| packet.accept()).await;
        decided(&kernel, &mut queue, request(), deny).await;
        denied(&kernel, error(), false);
    }
}

#[tokio::test]
async fn packets_of_no_connection_are_decided_alone() {
    let (kernel, mut queue) = bind();
    for packet in [TestPacket::raw(&[0x45; 30][..]), syn_ack(), with_flags(&request(), 0x11)] {
        for _ in 0..2 {
            assert!(alone(&kernel, &mut queue, packet.clone(), ACCEPT).await.accepted);
            assert!(!alone(&kernel, &mut queue, packet.clone(), DROP).await.accepted);
        }
    }
    // They are denied with the connection of their tuple.
    decided(&kernel, &mut queue, syn(), DROP).await;
    denied(&kernel, syn_ack(), false);
    denied(&kernel, with_flags(&request(), 0x11), false);
}

#[tokio::test]
async fn echo_and_other_protocols_are_connections() {
    let [client, server] = addresses().map(|address| address.ip());
    let (kernel, mut queue) = bind();
    let ping = || TestPacket::echo_request(client, server, b"");
    decided(&kernel, &mut queue, ping(), ACCEPT).await;
    let reply = TestPacket::ip(server, client, Protocol::Icmp, &[0, 0, 0, 0, 0, 1, 0, 1]);
    assert!(unseen(&kernel, reply).accepted);
    assert!(unseen(&kernel, ping()).accepted);
    decided(&kernel, &mut queue, TestPacket::echo_request(server, client, b""), DROP).await;
    let tunnelled = |data: &[u8]| TestPacket::ip(client, server, Protocol::Other(47), data);
    let outcome = decided(&kernel, &mut queue, tunnelled(&[0; 8]), REJECT).await;
    assert!(outcome.rejected);
    denied(&kernel, tunnelled(&[1; 9]), true);
}

#[tokio::test]
async fn priorities_are_those_of_the_packets() {
    let (kernel, mut queue) = bind();
    let decisions: [(Decide, u32); 5] = [
        (|packet| packet.accept(), 0x0012_3456),
        (|packet| packet.accept().priority(7), 7),
        (|packet| packet.accept().priority(0x0100_0000), 0x0100_0000),
        (|packet| packet.stop(), 0x0012_3456),
        (|packet| packet.accept().priority(9).for_flow(), 9),
    ];
    for (decide, expected) in decisions {
        let sent = kernel.send(question().priority(0x0012_3456));
        let packet = queue.try_recv().unwrap();
        assert_eq!(packet.priority(), 0x0012_3456);
        decide(packet).confirm().await.unwrap();
        assert_eq!(sent.try_outcome().unwrap().priority, expected);
    }
    // There is no room for a code.
    let (kernel, mut queue) = bind();
    let large = || question().priority(0x0100_0000);
    let outcome = alone(&kernel, &mut queue, large(), ACCEPT).await;
    assert_eq!((outcome.accepted, outcome.priority), (true, 0x0100_0000));
    let outcome = alone(&kernel, &mut queue, large(), |packet| packet.reject()).await;
    assert_eq!((outcome.accepted, outcome.rejected), (false, false));
    // A foreign value that is a code.
    let outcome = decided(&kernel, &mut queue, question().priority(0xa912_3456), |packet| packet.accept()).await;
    assert_eq!(outcome.priority, 0x0012_3456);
}

#[tokio::test]
async fn packets_that_the_queue_does_not_hold_keep_their_priority() {
    let (kernel, _queue) = queue(builder().max_len(1).fail_open(true)).unwrap();
    let sent = kernel.send_all((0..2).map(|_| question().priority(5)));
    let outcome = sent[1].try_outcome().unwrap();
    assert_eq!((outcome.cause, outcome.accepted, outcome.priority), (Cause::QueueFull, true, 5));
    let (kernel, queue) = queue(builder()).unwrap();
    let sent = kernel.send(question().priority(5));
    drop(queue);
    let outcome = sent.outcome().await;
    assert_eq!((outcome.accepted, outcome.priority), (false, 5));
}

#[tokio::test]
async fn packets_that_no_rule_matches_may_have_crossed_a_denied_one() {
    let (kernel, mut queue) = bind();
    let passing = |packet: TestPacket| packet.mark(1).unless_mark(1, 1);
    decided(&kernel, &mut queue, question(), DROP).await;
    denied(&kernel, passing(question()), false);
    denied(&kernel, passing(answer()), false);
    kernel.advance(Duration::from_secs(2));
    let outcome = kernel.send(passing(answer())).try_outcome().unwrap();
    assert_eq!((outcome.cause, outcome.accepted), (Cause::Rule, true));
}

#[tokio::test]
async fn repeated_and_requeued_packets_can_decide_their_connection() {
    let kernel = Kernel::new();
    let mut queue = kernel.bind(builder()).unwrap();
    let mut other = kernel.bind(Queue::builder(1).flow_marks(FlowMarks::default())).unwrap();
    for requeue in [false, true] {
        kernel.forget_flows();
        let sent = kernel.send(question().priority(5));
        let packet = queue.try_recv().unwrap();
        let verdict = if requeue { packet.requeue(1) } else { packet.repeat() };
        verdict.confirm().await.unwrap();
        let packet = if requeue { other.try_recv() } else { queue.try_recv() }.unwrap();
        assert_eq!(packet.priority(), 5);
        packet.drop().for_flow().confirm().await.unwrap();
        let outcome = sent.try_outcome().unwrap();
        assert_eq!((outcome.accepted, outcome.action, outcome.verdicts), (false, Some(Action::Drop), 2));
        denied(&kernel, question(), false);
    }
    // A connection that is denied while its packet is on its way through the hook once more.
    kernel.forget_flows();
    let first = kernel.send(question());
    let second = kernel.send(question());
    let [one, two] = [queue.try_recv().unwrap(), queue.try_recv().unwrap()];
    two.drop().for_flow().confirm().await.unwrap();
    one.repeat().confirm().await.unwrap();
    assert_eq!(first.try_outcome().unwrap().cause, Cause::FlowVerdict);
    assert_eq!(second.try_outcome().unwrap().cause, Cause::Verdict);
}

#[tokio::test]
async fn segments_of_a_first_packet_share_their_connection() {
    let [client, server] = addresses();
    for accept in [true, false] {
        let builder = builder().gso(false).flush_policy(FlushPolicy::immediate());
        let (kernel, mut queue) = queue(builder).unwrap();
        let sent = kernel.send(TestPacket::udp(client, server, &[0; 2500]).gso(1000));
        for _ in 0..3 {
            let packet = queue.try_recv().unwrap();
            let verdict = if accept { packet.accept() } else { packet.reject() };
            verdict.for_flow().submit().unwrap();
        }
        let outcome = sent.try_outcome().unwrap();
        assert_eq!((outcome.accepted, outcome.rejected), (accept, !accept));
        let later = unseen(&kernel, question());
        assert_eq!((later.accepted, later.rejected), (accept, !accept));
    }
}

#[tokio::test]
async fn verdicts_are_forgotten_on_request_only() {
    for decide in [ACCEPT, DROP] {
        let (kernel, mut queue) = bind();
        decided(&kernel, &mut queue, question(), decide).await;
        queue.close().await.unwrap();
        // The rules remain.
        unseen(&kernel, question());
        let mut queue = kernel.bind(builder()).unwrap();
        unseen(&kernel, question());
        kernel.forget_flows();
        decided(&kernel, &mut queue, question(), decide).await;
    }
}

#[tokio::test]
async fn a_queue_without_flow_marks_knows_no_connections() {
    let (kernel, mut queue) = bind();
    let mut other = kernel.bind(Queue::builder(1)).unwrap();
    decided(&kernel, &mut queue, question(), DROP).await;
    kernel.send(question().to_queue(1).priority(5));
    let packet = other.try_recv().unwrap();
    assert_eq!(packet.priority(), 5);
    assert_eq!(packet.accept().for_flow().submit().unwrap_err().kind(), ErrorKind::InvalidInput);
    // Flow marks do not work in the bridge family.
    kernel.send(question().bridged(&[0; 14], None));
    let packet = queue.try_recv().unwrap();
    assert_eq!(packet.drop().for_flow().confirm().await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn what_has_expired_is_removed() {
    use super::flows::{ChainVerdict, Flows};
    let mut flows = Flows::default();
    let mut largest = 0;
    for number in 0..20_000_u32 {
        let now = Duration::from_millis(100) * number;
        let [mut client, server] = addresses();
        client.set_port(number as u16);
        let bytes = TestPacket::udp(client, server, b"").payload().clone();
        let mut priority = 0;
        let mut packet = flows.track(
            &bytes,
            Hook::Input.number(),
            crate::types::flow_codes::FlowCodes::of(FlowMarks::default()),
            now,
        );
        assert_eq!(flows.before_queue(&mut packet, &mut priority, true, now), None);
        assert_eq!(flows.behind_queue(&mut packet, &mut priority, false, now), ChainVerdict::Accepted);
        largest = largest.max(flows.entries());
    }
    assert!(largest < 4000, "{largest}");
}
