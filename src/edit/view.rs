//! Reads the headers of a packet.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use etherparse::{IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice, TcpSlice, ip_number};

use super::layout::{Layout, Obstacle, Transport, Version};
use crate::{
    packet::Packet,
    types::{Error, ErrorKind, Protocol},
};

/// The headers of a packet. They are read in place, without a copy.
///
/// If only a part of the packet was copied, or if it is malformed after the IP header, the methods
/// return what can be read and `None` for the rest. For fields without a method, give
/// [`ip_header`](Self::ip_header) or [`transport_header`](Self::transport_header) to a parser of
/// your choice. `Display` writes one line:
///
/// ```
/// use tokio_nfqueue::edit::PacketView;
///
/// # let bytes = [
/// #     0x45, 0, 0, 33, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 7, 0xa0, 0x01,
/// #     0, 53, 0, 13, 0, 0, b'h', b'e', b'l', b'l', b'o',
/// # ];
/// let view = PacketView::new(&bytes)?;
/// assert_eq!(
///     view.to_string(),
///     "192.0.2.1:40961 > 192.0.2.7:53 UDP, 33 bytes, TTL 64, TOS 0x00, payload 5 bytes"
/// );
/// assert_eq!(view.payload(), Some(&b"hello"[..]));
/// assert_eq!((view.is_udp(), view.destination_port()), (true, Some(53)));
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
    /// Reads the IP and transport headers of the packet.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it does not begin with a complete IPv4 or
    /// IPv6 header.
    #[cfg_attr(docsrs, doc(cfg(feature = "edit")))]
    pub fn view(&self) -> Result<PacketView<'_>, Error> {
        PacketView::new(self.payload()).map_err(|error| error.with_packet(self.id()))
    }
}

impl<'a> PacketView<'a> {
    /// Reads a packet that begins with its IP header. Bytes after the packet are ignored.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it does not begin with a complete IPv4 or
    /// IPv6 header.
    pub fn new(packet: &'a [u8]) -> Result<Self, Error> {
        let layout = Layout::of(packet)
            .map_err(|detail| Error::new(ErrorKind::InvalidInput, "parse a packet").with_detail(detail))?;
        Ok(Self::with_layout(packet, layout))
    }

    /// `layout` must be the layout of `packet`.
    pub(super) fn with_layout(packet: &'a [u8], layout: Layout) -> Self {
        Self { packet, layout }
    }

    /// Whether the packet is an IPv4 packet. Otherwise it is an IPv6 packet.
    pub fn is_ipv4(&self) -> bool {
        self.layout.version == Version::V4
    }

    /// The IP header, with its options or extension headers.
    #[doc(alias = "nfq_ip_get_hdr")]
    #[doc(alias = "nfq_ip6_get_hdr")]
    pub fn ip_header(&self) -> &'a [u8] {
        &self.packet[..self.layout.at]
    }

    /// The TTL of IPv4, or the hop limit of IPv6.
    pub fn ttl(&self) -> u8 {
        self.ipv4().map(|header| header.ttl()).or_else(|| self.ipv6().map(|header| header.hop_limit())).unwrap_or(0)
    }

    /// The TOS byte of IPv4, or the traffic class of IPv6: DSCP in the upper six bits, ECN in the
    /// lower two.
    pub fn tos(&self) -> u8 {
        let v4 = self.ipv4().map(|header| header.dcp().value() << 2 | header.ecn().value());
        v4.or_else(|| self.ipv6().map(|header| header.traffic_class())).unwrap_or(0)
    }

    fn ipv4(&self) -> Option<Ipv4HeaderSlice<'a>> {
        Ipv4HeaderSlice::from_slice(self.packet).ok()
    }

    fn ipv6(&self) -> Option<Ipv6HeaderSlice<'a>> {
        Ipv6HeaderSlice::from_slice(self.packet).ok()
    }

    /// The source address in the IP header.
    pub fn source_address(&self) -> IpAddr {
        self.address(12, 8)
    }

    /// The destination address in the IP header.
    ///
    /// This is the next hop while an IPv4 source route is not completed, or an IPv6 routing header
    /// has segments left.
    pub fn destination_address(&self) -> IpAddr {
        self.address(16, 24)
    }

    /// The transport protocol. In IPv6, this is the protocol after the extension headers.
    #[doc(alias = "nfq_ip6_set_transport_header")]
    pub fn protocol(&self) -> Protocol {
        self.layout.protocol.0.into()
    }

    /// Whether the packet is a fragment of a datagram. Only the first fragment has a transport
    /// header.
    pub fn is_fragment(&self) -> bool {
        self.layout.obstacle == Some(Obstacle::Fragment)
    }

    /// The transport header and its payload: all bytes after the IP header and its extension
    /// headers.
    #[doc(alias = "nfq_ip_set_transport_header")]
    #[doc(alias = "pktb_transport_header")]
    pub fn ip_payload(&self) -> &'a [u8] {
        &self.packet[self.layout.at..self.layout.end]
    }

    /// The header of TCP (with its options) or UDP, or the first 8 bytes of ICMP or ICMPv6.
    ///
    /// `None` for other protocols, or if the header is incomplete.
    #[doc(alias = "nfq_tcp_get_hdr")]
    #[doc(alias = "nfq_udp_get_hdr")]
    #[doc(alias = "nfq_icmp_get_hdr")]
    pub fn transport_header(&self) -> Option<&'a [u8]> {
        self.layout.transport.map(|_| &self.packet[self.layout.at..self.layout.at + self.layout.header_len])
    }

    /// Whether the packet has a complete TCP header.
    pub fn is_tcp(&self) -> bool {
        self.layout.transport == Some(Transport::Tcp)
    }

    /// Whether the packet has a complete UDP header.
    pub fn is_udp(&self) -> bool {
        self.layout.transport == Some(Transport::Udp)
    }

    /// The fields of the TCP header. `None` if the packet has no complete TCP header.
    pub fn tcp(&self) -> Option<TcpFields> {
        let tcp = self.tcp_slice()?;
        Some(TcpFields {
            sequence_number: tcp.sequence_number(),
            acknowledgment_number: tcp.acknowledgment_number(),
            window: tcp.window_size(),
            fin: tcp.fin(),
            syn: tcp.syn(),
            rst: tcp.rst(),
            psh: tcp.psh(),
            ack: tcp.ack(),
            urg: tcp.urg(),
            ece: tcp.ece(),
            cwr: tcp.cwr(),
        })
    }

    /// The type and the code of an ICMP or ICMPv6 message.
    pub fn icmp(&self) -> Option<(u8, u8)> {
        match (self.layout.transport?, self.ip_payload()) {
            (Transport::Icmpv4 | Transport::Icmpv6, [kind, code, ..]) => Some((*kind, *code)),
            _ => None,
        }
    }

    fn tcp_slice(&self) -> Option<TcpSlice<'a>> {
        self.is_tcp().then(|| TcpSlice::from_slice(self.ip_payload()).ok()).flatten()
    }

    /// The source port of TCP or UDP. Only its bytes must be present, so a first fragment and a
    /// part of a packet have it as well. Later fragments have no ports.
    pub fn source_port(&self) -> Option<u16> {
        self.port(0)
    }

    /// The destination port of TCP or UDP, as [`source_port`](Self::source_port).
    pub fn destination_port(&self) -> Option<u16> {
        self.port(2)
    }

    fn port(&self, at: usize) -> Option<u16> {
        let has_ports = !self.layout.headerless && matches!(self.layout.protocol, ip_number::TCP | ip_number::UDP);
        let port = self.ip_payload().get(at..)?.first_chunk()?;
        has_ports.then(|| u16::from_be_bytes(*port))
    }

    /// The transport payload: the bytes after the header of TCP or UDP, or after the first 8 bytes
    /// of ICMP or ICMPv6.
    #[doc(alias = "nfq_tcp_get_payload")]
    #[doc(alias = "nfq_tcp_get_payload_len")]
    #[doc(alias = "nfq_udp_get_payload")]
    #[doc(alias = "nfq_udp_get_payload_len")]
    pub fn payload(&self) -> Option<&'a [u8]> {
        self.layout.payload().map(|range| &self.packet[range])
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

/// The fields of a TCP header, from [`PacketView::tcp`].
///
/// [`PacketView::source_port`] and [`PacketView::destination_port`] return the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpFields {
    /// The sequence number.
    pub sequence_number: u32,
    /// The acknowledgment number. It is valid only if `ack` is set.
    pub acknowledgment_number: u32,
    /// The window size, without window scaling.
    pub window: u16,
    /// The FIN flag.
    pub fin: bool,
    /// The SYN flag.
    pub syn: bool,
    /// The RST flag.
    pub rst: bool,
    /// The PSH flag.
    pub psh: bool,
    /// The ACK flag.
    pub ack: bool,
    /// The URG flag.
    pub urg: bool,
    /// The ECE flag.
    pub ece: bool,
    /// The CWR flag.
    pub cwr: bool,
}

impl fmt::Debug for PacketView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PacketView").field(&format_args!("{self}")).finish()
    }
}

impl fmt::Display for PacketView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn endpoint(f: &mut fmt::Formatter<'_>, address: IpAddr, port: Option<u16>) -> fmt::Result {
            match port {
                Some(port) => SocketAddr::new(address, port).fmt(f),
                None => address.fmt(f),
            }
        }
        endpoint(f, self.source_address(), self.source_port())?;
        f.write_str(" > ")?;
        endpoint(f, self.destination_address(), self.destination_port())?;
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
        let (ttl, tos) = (self.ttl(), self.tos());
        match self.layout.version {
            Version::V4 => write!(f, ", TTL {ttl}, TOS {tos:#04x}")?,
            Version::V6 => write!(f, ", hop limit {ttl}, traffic class {tos:#04x}")?,
        }
        if let Some(tcp) = self.tcp() {
            let flags = [
                (tcp.syn, " SYN"),
                (tcp.fin, " FIN"),
                (tcp.rst, " RST"),
                (tcp.psh, " PSH"),
                (tcp.ack, " ACK"),
                (tcp.urg, " URG"),
                (tcp.ece, " ECE"),
                (tcp.cwr, " CWR"),
            ];
            f.write_str(",")?;
            flags.iter().filter(|(set, _)| *set).try_for_each(|(_, name)| f.write_str(name))?;
            let (sequence, acknowledgment) = (tcp.sequence_number, tcp.acknowledgment_number);
            write!(f, " seq {sequence} ack {acknowledgment} window {}", tcp.window)?;
        }
        if let Some((kind, code)) = self.icmp() {
            write!(f, ", type {kind} code {code}")?;
        }
        match (self.payload(), self.layout.obstacle) {
            (_, Some(Obstacle::Fragment)) => f.write_str(", fragment"),
            (Some(payload), _) => write!(f, ", payload {} bytes", payload.len()),
            (None, _) => Ok(()),
        }
    }
}
