//! Packets to send through a simulated kernel.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use etherparse::{IpHeaders, IpNumber, PacketBuilder, PacketBuilderStep};

use super::connection::Connection;
use crate::{
    types::{Family, Hook, Protocol, Vlan},
    wire::MAX_PAYLOAD,
};

/// A packet for [`Kernel::send`](super::Kernel::send), with complete headers and checksums.
///
/// Unless other values are set, it arrives on interface 2 (`eth0`) and is queued at the input hook,
/// with mark 0, to the queue that was bound first.
#[derive(Debug, Clone)]
pub struct TestPacket {
    pub(super) payload: Bytes,
    pub(super) family: u8,
    pub(super) hook: u8,
    pub(super) hw_protocol: u16,
    /// In, out, physical in, physical out; 0 for none.
    interfaces: [u32; 4],
    interfaces_set: bool,
    pub(super) mark: u32,
    pub(super) priority: u32,
    /// The longest payload of a segment; 0 for no super-packet.
    pub(super) segment_size: u16,
    pub(super) checksum: Checksum,
    pub(super) owner: Option<(u32, u32)>,
    pub(super) queue: Option<u16>,
    pub(super) bypass: bool,
    pub(super) unless: Option<(u32, u32)>,
    rare: Option<Box<Rare>>,
}

/// What the kernel knows of the transport checksum (`skb->ip_summed`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checksum {
    /// CHECKSUM_UNNECESSARY
    Verified,
    /// CHECKSUM_NONE
    Unverified,
    /// CHECKSUM_PARTIAL
    Unfinished,
}

/// What few packets have.
#[derive(Debug, Clone, Default)]
struct Rare {
    hardware_address: Option<Bytes>,
    security_context: Option<Bytes>,
    vlan: Option<Vlan>,
    layer2: Option<Bytes>,
    connection: Option<Connection>,
}

/// The interface on which packets arrive if nothing else is said.
const DEFAULT_INTERFACE: u32 = 2;
const HOPS: u8 = 64;

impl TestPacket {
    /// A UDP datagram.
    ///
    /// # Panics
    /// The addresses are of different families, or the payload is too long for a packet.
    pub fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Self {
        let builder = ip(source.ip(), destination.ip()).udp(source.port(), destination.port());
        let mut bytes = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut bytes, payload).expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// A TCP segment with flag ACK, sequence number 1 and acknowledgement number 1. For other
    /// values, build the packet and use [`raw`](Self::raw).
    ///
    /// # Panics
    /// As [`udp`](Self::udp).
    pub fn tcp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Self {
        let builder = ip(source.ip(), destination.ip()).tcp(source.port(), destination.port(), 1, 64_240).ack(1);
        let mut bytes = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut bytes, payload).expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// The first segment of a TCP connection: only flag SYN, no payload.
    ///
    /// # Panics
    /// As [`udp`](Self::udp).
    pub fn tcp_syn(source: SocketAddr, destination: SocketAddr) -> Self {
        let builder = ip(source.ip(), destination.ip()).tcp(source.port(), destination.port(), 1, 64_240).syn();
        let mut bytes = Vec::with_capacity(builder.size(0));
        builder.write(&mut bytes, &[]).expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// The server's reply to [`tcp_syn`](Self::tcp_syn): flags SYN and ACK, no payload.
    ///
    /// # Panics
    /// As [`udp`](Self::udp).
    pub fn tcp_syn_ack(source: SocketAddr, destination: SocketAddr) -> Self {
        let builder = ip(source.ip(), destination.ip()).tcp(source.port(), destination.port(), 1, 64_240).syn().ack(2);
        let mut bytes = Vec::with_capacity(builder.size(0));
        builder.write(&mut bytes, &[]).expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// An echo request (ping), with identifier 1 and sequence number 1.
    ///
    /// # Panics
    /// As [`udp`](Self::udp).
    pub fn echo_request(source: IpAddr, destination: IpAddr, payload: &[u8]) -> Self {
        let mut bytes = Vec::new();
        let step = ip(source, destination);
        let written = match source {
            IpAddr::V4(_) => step.icmpv4_echo_request(1, 1).write(&mut bytes, payload),
            IpAddr::V6(_) => step.icmpv6_echo_request(1, 1).write(&mut bytes, payload),
        };
        written.expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// A packet of any transport protocol. `payload` begins with the transport header and is not
    /// changed.
    ///
    /// # Panics
    /// As [`udp`](Self::udp).
    pub fn ip(source: IpAddr, destination: IpAddr, protocol: Protocol, payload: &[u8]) -> Self {
        let mut bytes = Vec::new();
        ip(source, destination).write(&mut bytes, IpNumber(protocol.number()), payload).expect(TOO_LONG);
        Self::complete(bytes)
    }

    /// A packet from its network header on, unchanged. It need not be valid.
    pub fn raw(packet: impl Into<Bytes>) -> Self {
        Self::complete(packet.into())
    }

    fn complete(bytes: impl Into<Bytes>) -> Self {
        let payload: Bytes = bytes.into();
        let (family, hw_protocol) = match payload.first().map(|first| first >> 4) {
            Some(6) => (10, 0x86dd),
            _ => (2, 0x0800),
        };
        Self {
            payload,
            family,
            hook: Hook::Input.number(),
            hw_protocol,
            interfaces: [0; 4],
            interfaces_set: false,
            mark: 0,
            priority: 0,
            segment_size: 0,
            checksum: Checksum::Verified,
            owner: None,
            queue: None,
            bypass: false,
            unless: None,
            rare: None,
        }
    }

    /// The hook at which the packet is queued. Default: [`Hook::Input`].
    pub fn hook(mut self, hook: Hook) -> Self {
        self.hook = hook.number();
        self
    }

    /// The index of the interface on which the packet arrived. Default: 2, if no interface is set
    /// and the hook is neither output nor postrouting.
    pub fn interface_in(mut self, index: u32) -> Self {
        (self.interfaces[0], self.interfaces_set) = (index, true);
        self
    }

    /// The index of the interface on which the packet leaves. Default: 2, if no interface is set
    /// and the hook is output or postrouting.
    pub fn interface_out(mut self, index: u32) -> Self {
        (self.interfaces[1], self.interfaces_set) = (index, true);
        self
    }

    /// The index of the bridge port on which the packet arrived.
    pub fn physical_in(mut self, index: u32) -> Self {
        self.interfaces[2] = index;
        self
    }

    /// The index of the bridge port on which the packet leaves.
    pub fn physical_out(mut self, index: u32) -> Self {
        self.interfaces[3] = index;
        self
    }

    /// The packet's mark.
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = mark;
        self
    }

    /// The packet's priority.
    pub fn priority(mut self, priority: u32) -> Self {
        self.priority = priority;
        self
    }

    /// The sender's link-layer address, up to 8 bytes.
    ///
    /// # Panics
    /// It is longer.
    pub fn hardware_address(mut self, address: &[u8]) -> Self {
        assert!(address.len() <= 8, "a link-layer address of {} bytes; 8 are allowed", address.len());
        self.rare().hardware_address = Some(Bytes::copy_from_slice(address));
        self
    }

    /// User and group id of the local socket that sent the packet. The queue gets them with
    /// [`uid_gid`](crate::QueueBuilder::uid_gid).
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = Some((uid, gid));
        self
    }

    /// The security context of the sender. The queue gets it with
    /// [`security_context`](crate::QueueBuilder::security_context). Up to 4096 bytes.
    ///
    /// # Panics
    /// It is longer.
    pub fn security_context(mut self, context: &[u8]) -> Self {
        assert!(context.len() <= 4096, "a security context of {} bytes; 4096 are allowed", context.len());
        self.rare().security_context = Some(Bytes::copy_from_slice(context));
        self
    }

    /// The connection that the packet belongs to. The queue gets its entry with
    /// [`conntrack`](crate::QueueBuilder::conntrack). Verdicts for connections follow the packet's
    /// bytes, and not this: see [`simulated`](super#verdicts-for-connections).
    pub fn of_connection(mut self, connection: Connection) -> Self {
        self.rare().connection = Some(connection);
        self
    }

    /// Makes it a super-packet with segments of this payload length. A queue without
    /// [`gso`](crate::QueueBuilder::gso) gets the segments (of TCP and UDP over IP).
    pub fn gso(mut self, segment_size: u16) -> Self {
        self.segment_size = segment_size;
        self
    }

    /// Says that the transport checksum is unfinished:
    /// [`Packet::is_checksum_ready`](crate::Packet::is_checksum_ready). The bytes stay as they are.
    pub fn checksum_unfinished(mut self) -> Self {
        self.checksum = Checksum::Unfinished;
        self
    }

    /// Makes it a packet of the bridge family, with this link-layer header of up to 160 bytes and
    /// outermost VLAN tag.
    ///
    /// # Panics
    /// The header is longer.
    pub fn bridged(mut self, layer2_header: &[u8], vlan: Option<Vlan>) -> Self {
        let length = layer2_header.len();
        assert!(length <= 160, "a link-layer header of {length} bytes; 160 are allowed");
        const NFPROTO_BRIDGE: u8 = 7;
        assert!(layer2_header.len() <= MAX_PAYLOAD, "a header of {} bytes is too long", layer2_header.len());
        self.family = NFPROTO_BRIDGE;
        let rare = self.rare();
        rare.layer2 = Some(Bytes::copy_from_slice(layer2_header));
        rare.vlan = vlan;
        self
    }

    /// The EtherType. Default: that of the IP version.
    pub fn hw_protocol(mut self, ether_type: u16) -> Self {
        self.hw_protocol = ether_type;
        self
    }

    /// The queue that the packet's rule sends it to. Default: the queue that was bound first.
    pub fn to_queue(mut self, queue: u16) -> Self {
        self.queue = Some(queue);
        self
    }

    /// Whether the packet's rule accepts it if the queue is not bound. Default: no.
    pub fn bypass(mut self, on: bool) -> Self {
        self.bypass = on;
        self
    }

    /// The packet's rule accepts packets whose mark equals `value` in the bits of `mask`: for
    /// packets that are [repeated](crate::Packet::repeat).
    pub fn unless_mark(mut self, value: u32, mask: u32) -> Self {
        self.unless = Some((value, mask));
        self
    }

    /// The packet from its network header on.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    pub(super) fn interfaces(&self) -> [u32; 4] {
        let [mut inside, mut outside, physical_in, physical_out] = self.interfaces;
        if !self.interfaces_set {
            let side = if self.is_received() { &mut inside } else { &mut outside };
            *side = DEFAULT_INTERFACE;
        }
        [inside, outside, physical_in, physical_out]
    }

    /// Whether the packet came through an interface, as far as the hook says that.
    pub(super) fn is_received(&self) -> bool {
        self.hook != Hook::Output.number() && self.hook != Hook::Postrouting.number()
    }

    pub(super) fn is_bridge(&self) -> bool {
        Family::from(self.family) == Family::Bridge
    }

    pub(super) fn connection(&self) -> Option<&Connection> {
        self.rare.as_ref()?.connection.as_ref()
    }

    pub(super) fn sender_address(&self) -> Option<&[u8]> {
        self.rare.as_ref()?.hardware_address.as_deref()
    }

    pub(super) fn sender_context(&self) -> Option<&[u8]> {
        self.rare.as_ref()?.security_context.as_deref()
    }

    pub(super) fn vlan(&self) -> Option<Vlan> {
        self.rare.as_ref()?.vlan
    }

    pub(super) fn layer2(&self) -> Option<&[u8]> {
        self.rare.as_ref()?.layer2.as_deref()
    }

    /// A part of this super-packet. The kernel has lost its link-layer header.
    pub(super) fn segment(&self, payload: Bytes) -> Self {
        let mut segment = Self { payload, segment_size: 0, checksum: Checksum::Unverified, ..self.clone() };
        if let Some(rare) = &mut segment.rare {
            (rare.hardware_address, rare.layer2, rare.vlan) = (None, None, None);
        }
        segment
    }

    /// Whether the kernel says that it has not verified the checksum.
    pub(super) fn is_unverified(&self) -> bool {
        self.checksum == Checksum::Unverified && self.hook <= Hook::Forward.number()
    }

    /// `nf_queue_checksum_help`
    pub(super) fn finish_checksum(&mut self) {
        if self.checksum == Checksum::Unfinished {
            self.checksum = Checksum::Unverified;
        }
    }

    /// `nfqa_parse_bridge`
    pub(super) fn change_layer2(&mut self, vlan: Option<Vlan>, header: Option<&[u8]>) {
        let rare = self.rare();
        rare.vlan = vlan.or(rare.vlan);
        if let Some(header) = header {
            rare.layer2 = Some(Bytes::copy_from_slice(header));
        }
    }

    /// `nfqnl_mangle`: replaces the payload. Returns whether the kernel can do it.
    pub(super) fn replace(&mut self, payload: &[u8]) -> bool {
        // It checks only when the packet gets shorter.
        let least = match Family::from(self.family) {
            Family::Ipv4 => 20,
            Family::Ipv6 => 40,
            _ => 1,
        };
        if payload.len() < self.payload.len() && payload.len() < least {
            return false;
        }
        self.payload = Bytes::copy_from_slice(payload);
        self.checksum = Checksum::Unverified;
        true
    }
}

const TOO_LONG: &str = "the payload fits in a packet";

fn ip(source: IpAddr, destination: IpAddr) -> PacketBuilderStep<IpHeaders> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = etherparse::Ipv4Header {
                source: source.octets(),
                destination: destination.octets(),
                time_to_live: HOPS,
                ..etherparse::Ipv4Header::default()
            };
            PacketBuilder::ip(IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = etherparse::Ipv6Header {
                source: source.octets(),
                destination: destination.octets(),
                hop_limit: HOPS,
                ..etherparse::Ipv6Header::default()
            };
            PacketBuilder::ip(IpHeaders::Ipv6(header, etherparse::Ipv6Extensions::default()))
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}
