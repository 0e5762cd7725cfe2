//! Segments of UDP super-packets, and connection tracking.

use std::{net::UdpSocket, time::Duration};

use nfqueue_divert::Divert;
use nix::sys::socket::{setsockopt, sockopt};
use tokio_nfqueue::{
    FlushPolicy, Hook, Packet, Protocol, Queue, Rule,
    divert::{Match, Priority},
};

use crate::{
    common::{self, PORT, next},
    support::{self, Peer},
};

tests![
    one segments_of_a_new_connection_are_lost_unless_they_are_accepted_in_order,
    one segments_of_a_new_connection_arrive_in_any_order_before_connection_tracking,
    one a_super_packet_of_a_new_connection_arrives_whole,
];

const SEGMENTS: usize = 4;
const SEGMENT: usize = 1000;
/// The mark of the datagrams that are sent behind the segments and not queued.
const END: u32 = 0x40;

/// Linux 6.1 and 6.6 drop all segments of a new connection before they are queued.
fn queues_segments() -> bool {
    common::kernel_release() >= (6, 12)
}

/// A path whose connections are tracked.
struct Path {
    peer: Peer,
    receiver: UdpSocket,
    _tracking: Divert,
}

impl Path {
    fn new() -> Self {
        let peer = support::veth();
        let receiver = peer.run(|| support::udp((peer.far_v4, PORT)));
        // Makes the kernel track connections.
        let tracking = Divert::builder().rule(Rule::new(Hook::Output).when(Match::connection_mark(1, 1)).count());
        Self { receiver, _tracking: tracking.install().unwrap(), peer }
    }

    /// A super-packet from a new port.
    fn send(&self) -> UdpSocket {
        let sender = support::udp((self.peer.near_v4, 0));
        setsockopt(&sender, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
        self.send_from(&sender);
        sender
    }

    fn send_from(&self, sender: &UdpSocket) {
        let numbered: Vec<u8> = (0..SEGMENTS as u8).flat_map(|number| [number; SEGMENT]).collect();
        sender.send_to(&numbered, (self.peer.far_v4, PORT)).unwrap();
    }

    /// The numbers of the segments that have arrived. Follow the verdicts by a flush.
    fn arrived(&self) -> Vec<u8> {
        let marker = support::udp_marked((self.peer.near_v4, 0), END);
        let received = support::received_before(&marker, &self.receiver).into_iter();
        received
            .map(|(datagram, _)| {
                assert_eq!(datagram.len(), SEGMENT);
                datagram[0]
            })
            .collect()
    }
}

fn rule() -> Rule {
    Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(PORT).unless_mark(END, END).to_queue(0)
}

async fn segments(queue: &mut Queue) -> Vec<Packet> {
    let mut segments = Vec::new();
    for _ in 0..SEGMENTS {
        segments.push(next(queue).await);
    }
    segments
}

/// Decides in this order, one by one.
async fn accept(packets: impl IntoIterator<Item = Packet>) {
    for packet in packets {
        packet.accept().confirm().await.unwrap();
    }
}

async fn segments_of_a_new_connection_are_lost_unless_they_are_accepted_in_order() {
    let path = Path::new();
    let mut queue = Queue::builder(0).gso(false).flush_policy(FlushPolicy::immediate()).bind().await.unwrap();
    let _divert = common::divert([rule()]);
    if !queues_segments() {
        path.send();
        assert_eq!(path.arrived(), []);
        assert!(queue.try_recv().is_err());
        return;
    }
    path.send();
    accept(segments(&mut queue).await).await;
    assert_eq!(path.arrived(), [0, 1, 2, 3]);

    // The kernel acknowledges each of these verdicts.
    let sender = path.send();
    accept(segments(&mut queue).await.into_iter().rev()).await;
    assert_eq!(path.arrived(), [0]);
    // Now the connection is known.
    path.send_from(&sender);
    accept(segments(&mut queue).await.into_iter().rev()).await;
    assert_eq!(path.arrived(), [3, 2, 1, 0]);

    path.send();
    let mut packets = segments(&mut queue).await;
    packets.remove(0).drop().confirm().await.unwrap();
    accept(packets).await;
    assert_eq!(path.arrived(), [3]);

    // Within one flush, the order of the verdicts is that of the packets.
    queue.close().await.unwrap();
    for _ in 0..20 {
        let policy = FlushPolicy::fixed(SEGMENTS, Duration::from_secs(1));
        let mut queue = Queue::builder(0).gso(false).flush_policy(policy).bind().await.unwrap();
        path.send();
        for packet in segments(&mut queue).await.into_iter().rev() {
            packet.accept().submit().unwrap();
        }
        queue.sink().flush().await;
        let arrived = path.arrived();
        // The first ones are sent after a second without the others.
        if queue.stats().sent.flushes == 1 {
            return assert_eq!(arrived, [0, 1, 2, 3]);
        }
        queue.close().await.unwrap();
    }
    panic!("the verdicts are not sent together");
}

async fn segments_of_a_new_connection_arrive_in_any_order_before_connection_tracking() {
    let path = Path::new();
    let mut queue = Queue::builder(0).gso(false).flush_policy(FlushPolicy::immediate()).bind().await.unwrap();
    let _divert = common::divert([rule().priority(Priority::RAW)]);
    path.send();
    accept(segments(&mut queue).await.into_iter().rev()).await;
    assert_eq!(path.arrived(), [3, 2, 1, 0]);
    path.send();
    let mut packets = segments(&mut queue).await;
    packets.remove(0).drop().confirm().await.unwrap();
    accept(packets).await;
    assert_eq!(path.arrived(), [1, 2, 3]);
}

async fn a_super_packet_of_a_new_connection_arrives_whole() {
    let path = Path::new();
    let mut queue = Queue::builder(0).gso(true).bind().await.unwrap();
    let _divert = common::divert([rule()]);
    path.send();
    let packet = next(&mut queue).await;
    assert!(packet.is_gso());
    accept([packet]).await;
    assert_eq!(path.arrived(), [0, 1, 2, 3]);
}
