//! Looking into a packet.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use etherparse::{
    Icmpv4Slice, Icmpv6Slice, IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice, TcpSlice, UdpHeaderSlice, ip_number,
};

use super::layout::{Layout, Obstacle, Transport, Version};
use crate::{Error, ErrorKind, Packet};

/// The headers of a packet, where it lies: nothing is copied.
///
/// Headers come as slices of [`etherparse`], which read their fields. Of a packet that was copied in part, or is damaged
/// behind its IP header, it shows what there is. `Display` is one line:
///
/// ```
/// use tokio_nfqueue::PacketView;
///
/// # let bytes = [
/// #     0x45, 0, 0, 33, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 7, 0xa0, 0x01, 0, 53, 0, 13, 0, 0, b'h',
/// #     b'e', b'l', b'l', b'o',
/// # ];
/// let view = PacketView::new(&bytes)?;
/// assert_eq!(view.to_string(), "192.0.2.1:40961 > 192.0.2.7:53 UDP, 33 bytes, TTL 64, TOS 0x00, payload 5 bytes");
/// assert_eq!(view.payload(), Some(&b"hello"[..]));
/// assert_eq!(view.udp().map(|udp| udp.destination_port()), Some(53));
/// # Ok::<(), tokio_nfqueue::Error>(())
/// ```
#[doc(alias = "nfq_ip_snprintf")]
#[doc(alias = "nfq_ip6_snprintf")]
#[doc(alias = "nfq_tcp_snprintf")]
#[doc(alias = "nfq_udp_snprintf")]
#[derive(Clone, Copy)]
pub struct PacketView<'a> {
    packet: &'a [u8],
    layout: Layout,
}

impl Packet {
    /// Looks into the payload: its IP and transport headers.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it does not begin with a whole IPv4 or IPv6 header.
    #[cfg_attr(docsrs, doc(cfg(feature = "edit")))]
    pub fn view(&self) -> Result<PacketView<'_>, Error> {
        PacketView::new(self.payload()).map_err(|error| error.with_packet(self.id()))
    }
}

impl<'a> PacketView<'a> {
    /// Looks into a packet given from its IP header on. Bytes that follow it are ignored.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it does not begin with a whole IPv4 or IPv6 header.
    pub fn new(packet: &'a [u8]) -> Result<Self, Error> {
        let layout = Layout::of(packet)
            .map_err(|detail| Error::new(ErrorKind::InvalidInput, "look into a packet").with_detail(detail))?;
        Ok(Self::with_layout(packet, layout))
    }

    /// `layout` is the packet's.
    pub(super) fn with_layout(packet: &'a [u8], layout: Layout) -> Self {
        Self { packet, layout }
    }

    /// The IPv4 header.
    #[doc(alias = "nfq_ip_get_hdr")]
    pub fn ipv4(&self) -> Option<Ipv4HeaderSlice<'a>> {
        Ipv4HeaderSlice::from_slice(self.packet).ok()
    }

    /// The IPv6 header, without extension headers.
    #[doc(alias = "nfq_ip6_get_hdr")]
    pub fn ipv6(&self) -> Option<Ipv6HeaderSlice<'a>> {
        Ipv6HeaderSlice::from_slice(self.packet).ok()
    }

    /// Where the packet comes from.
    pub fn source(&self) -> IpAddr {
        self.address(12, 8)
    }

    /// The destination in the IP header. While an IPv4 source route or an IPv6 routing header is
    /// not used up, this is the next hop.
    pub fn destination(&self) -> IpAddr {
        self.address(16, 24)
    }

    /// The protocol's number: of IPv6, of what follows the extension headers.
    #[doc(alias = "nfq_ip6_set_transport_header")]
    pub fn protocol(&self) -> u8 {
        self.layout.protocol.0
    }

    /// Whether the packet is a part of a datagram. Only the first part has a transport header.
    pub fn is_fragment(&self) -> bool {
        self.layout.obstacle == Some(Obstacle::Fragment)
    }

    /// What follows the IP header and its extensions: transport header and payload.
    #[doc(alias = "nfq_ip_set_transport_header")]
    #[doc(alias = "pktb_transport_header")]
    pub fn ip_payload(&self) -> &'a [u8] {
        &self.packet[self.layout.at..self.layout.end]
    }

    /// The TCP header and its payload.
    #[doc(alias = "nfq_tcp_get_hdr")]
    pub fn tcp(&self) -> Option<TcpSlice<'a>> {
        self.transport(Transport::Tcp).and_then(|bytes| TcpSlice::from_slice(bytes).ok())
    }

    /// The UDP header.
    #[doc(alias = "nfq_udp_get_hdr")]
    pub fn udp(&self) -> Option<UdpHeaderSlice<'a>> {
        self.transport(Transport::Udp).and_then(|bytes| UdpHeaderSlice::from_slice(bytes).ok())
    }

    /// The ICMP message, in an IPv4 packet.
    #[doc(alias = "nfq_icmp_get_hdr")]
    pub fn icmpv4(&self) -> Option<Icmpv4Slice<'a>> {
        self.transport(Transport::Icmpv4).and_then(|bytes| Icmpv4Slice::from_slice(bytes).ok())
    }

    /// The ICMPv6 message, in an IPv6 packet.
    pub fn icmpv6(&self) -> Option<Icmpv6Slice<'a>> {
        self.transport(Transport::Icmpv6).and_then(|bytes| Icmpv6Slice::from_slice(bytes).ok())
    }

    /// The source port, of TCP and UDP.
    pub fn source_port(&self) -> Option<u16> {
        self.tcp().map(|tcp| tcp.source_port()).or_else(|| self.udp().map(|udp| udp.source_port()))
    }

    /// The destination port, of TCP and UDP.
    pub fn destination_port(&self) -> Option<u16> {
        self.tcp().map(|tcp| tcp.destination_port()).or_else(|| self.udp().map(|udp| udp.destination_port()))
    }

    /// The transport payload: what follows the header of TCP or UDP, or the first 8 bytes of ICMP.
    #[doc(alias = "nfq_tcp_get_payload")]
    #[doc(alias = "nfq_tcp_get_payload_len")]
    #[doc(alias = "nfq_udp_get_payload")]
    #[doc(alias = "nfq_udp_get_payload_len")]
    pub fn payload(&self) -> Option<&'a [u8]> {
        self.layout.payload().map(|range| &self.packet[range])
    }

    fn transport(&self, wanted: Transport) -> Option<&'a [u8]> {
        (self.layout.transport == Some(wanted)).then(|| self.ip_payload())
    }

    fn address(&self, at_v4: usize, at_v6: usize) -> IpAddr {
        fn octets<const N: usize>(packet: &[u8], at: usize) -> [u8; N] {
            let mut octets = [0; N];
            octets.copy_from_slice(&packet[at..at + N]);
            octets
        }
        match self.layout.version {
            Version::V4 => octets::<4>(self.packet, at_v4).into(),
            Version::V6 => octets::<16>(self.packet, at_v6).into(),
        }
    }
}

impl fmt::Debug for PacketView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PacketView").field(&format_args!("{self}")).finish()
    }
}

impl fmt::Display for PacketView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn end(f: &mut fmt::Formatter<'_>, address: IpAddr, port: Option<u16>) -> fmt::Result {
            match port {
                Some(port) => SocketAddr::new(address, port).fmt(f),
                None => address.fmt(f),
            }
        }
        end(f, self.source(), self.source_port())?;
        f.write_str(" > ")?;
        end(f, self.destination(), self.destination_port())?;
        match self.layout.protocol {
            ip_number::TCP => f.write_str(" TCP")?,
            ip_number::UDP => f.write_str(" UDP")?,
            ip_number::ICMP => f.write_str(" ICMP")?,
            ip_number::IPV6_ICMP => f.write_str(" ICMPv6")?,
            IpNumber(number) => write!(f, " protocol {number}")?,
        }
        match self.layout.stated_len {
            Some(length) => write!(f, ", {length} bytes")?,
            None => write!(f, ", {} bytes", self.layout.end)?,
        }
        if let Some(header) = self.ipv4() {
            let tos = header.dcp().value() << 2 | header.ecn().value();
            write!(f, ", TTL {}, TOS {tos:#04x}", header.ttl())?;
        } else if let Some(header) = self.ipv6() {
            write!(f, ", hop limit {}, traffic class {:#04x}", header.hop_limit(), header.traffic_class())?;
        }
        if let Some(tcp) = self.tcp() {
            let flags = [
                (tcp.syn(), " SYN"),
                (tcp.fin(), " FIN"),
                (tcp.rst(), " RST"),
                (tcp.psh(), " PSH"),
                (tcp.ack(), " ACK"),
                (tcp.urg(), " URG"),
                (tcp.ece(), " ECE"),
                (tcp.cwr(), " CWR"),
            ];
            f.write_str(",")?;
            flags.iter().filter(|(set, _)| *set).try_for_each(|(_, name)| f.write_str(name))?;
            let (sequence, acknowledgment) = (tcp.sequence_number(), tcp.acknowledgment_number());
            write!(f, " seq {sequence} ack {acknowledgment} window {}", tcp.window_size())?;
        }
        if let (Some(Transport::Icmpv4 | Transport::Icmpv6), [kind, code, ..]) =
            (self.layout.transport, self.ip_payload())
        {
            write!(f, ", type {kind} code {code}")?;
        }
        match (self.payload(), self.layout.obstacle) {
            (_, Some(Obstacle::Fragment)) => f.write_str(", fragment"),
            (Some(payload), _) => write!(f, ", payload {} bytes", payload.len()),
            (None, _) => Ok(()),
        }
    }
}
