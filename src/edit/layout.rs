//! Finds the headers and the payload in a packet.

use std::{fmt, ops::Range};

use etherparse::{
    IpAuthHeaderSlice, IpNumber, Ipv4Header, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6Header, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, TcpSlice, UdpHeaderSlice, ip_number,
};

use super::route;

/// Offsets into a packet. They are valid only for the bytes that they were computed from.
///
/// `at <= end <= bytes.len()`. If there is a `transport`, also
/// `at + header_len <= payload_end <= end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: Version,
    /// The offset of the destination address that the transport checksum covers. It is in the IP
    /// header, or in a route that is not completed.
    pub(super) destination: usize,
    /// The protocol after the IP header and its extension headers.
    pub(super) protocol: IpNumber,
    /// Where the header of that protocol begins.
    pub(super) at: usize,
    /// Where the packet ends, or where the copied part of it ends.
    pub(super) end: usize,
    /// The length that the IP header states. `None` if it states none, as in jumbograms.
    pub(super) stated_len: Option<usize>,
    /// Whether no header can be read at `at`: the packet is a fragment other than the first, or an
    /// extension header is malformed.
    pub(super) headerless: bool,
    /// The kind of the transport header. `None` if there is no complete one.
    pub(super) transport: Option<Transport>,
    /// The length of the transport header, with its options.
    pub(super) header_len: usize,
    /// Where the transport payload ends. This is before `end` if other bytes follow a UDP datagram.
    pub(super) payload_end: usize,
    /// Why the transport header and payload must not be changed. `None` only if there is a
    /// transport header.
    pub(super) obstacle: Option<Obstacle>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V4,
    V6,
}

impl Version {
    /// The offset of the destination address in the IP header.
    pub(super) fn destination_at(self) -> usize {
        match self {
            Self::V4 => 16,
            Self::V6 => 24,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
    Icmpv4,
    Icmpv6,
}

impl Transport {
    /// The offset of the checksum in the transport header.
    pub(super) fn checksum_at(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
            Self::Icmpv4 | Self::Icmpv6 => 2,
        }
    }

    pub(super) fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

/// Why a transport header cannot be changed and its checksum cannot be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The packet is a fragment of a datagram.
    Fragment,
    /// An authentication header covers the whole packet.
    Authenticated,
    /// The checksum covers a final destination that cannot be found in the routing header.
    Routed,
    /// The protocol is not supported.
    Protocol(IpNumber),
    /// This part of the packet is incomplete or inconsistent.
    Malformed(&'static str),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fragment => f.write_str("the packet is a fragment"),
            Self::Authenticated => f.write_str("an authentication header covers the packet"),
            Self::Routed => {
                f.write_str("the final destination is in a routing header that is malformed or of an unknown type")
            }
            Self::Protocol(ip_number::ENCAP_SEC) => f.write_str("the content is encrypted (ESP)"),
            Self::Protocol(ip_number::IPV6_NO_NEXT_HEADER) => f.write_str("nothing follows the IP header"),
            Self::Protocol(IpNumber(number)) => {
                write!(f, "protocol {number} is not supported; TCP, UDP, ICMP over IPv4 and ICMPv6 over IPv6 are")
            }
            Self::Malformed(what) => write!(f, "{what} is malformed"),
        }
    }
}

impl Layout {
    /// Returns an error if there is no complete IP header. The bytes after it may be malformed or
    /// missing.
    pub(super) fn of(packet: &[u8]) -> Result<Self, &'static str> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::of_ipv4(packet),
            Some(6) => Self::of_ipv6(packet),
            Some(_) => Err("the packet is neither IPv4 nor IPv6"),
            None => Err("the packet has no bytes"),
        }
    }

    fn of_ipv4(packet: &[u8]) -> Result<Self, &'static str> {
        let header = Ipv4HeaderSlice::from_slice(packet).map_err(|_| "the IPv4 header is malformed")?;
        let at = header.slice().len();
        let total = usize::from(header.total_len());
        let stated_len = (total >= at).then_some(total);
        let end = stated_len.unwrap_or(packet.len()).min(packet.len());
        let mut chain = Chain::new(header.protocol(), at, Version::V4);
        if let Some(place) = route::in_options(header.options()) {
            chain.destination = Ipv4Header::MIN_LEN + place;
        }
        if header.is_fragmenting_payload() {
            chain.fragment(header.fragments_offset().value() != 0);
        }
        chain.follow(&packet[..end]);
        Ok(chain.into_layout(&packet[..end], stated_len))
    }

    fn of_ipv6(packet: &[u8]) -> Result<Self, &'static str> {
        let header = Ipv6HeaderSlice::from_slice(packet).map_err(|_| "the IPv6 header is malformed")?;
        let at = Ipv6Header::LEN;
        let stated_len = match header.payload_length() {
            // A jumbogram has its length in an option. A super-packet of more than 64 KiB has its
            // length nowhere.
            0 if packet.len() > at && header.next_header() != ip_number::IPV6_NO_NEXT_HEADER => None,
            length => Some(at + usize::from(length)),
        };
        let end = stated_len.unwrap_or(packet.len()).min(packet.len());
        let mut chain = Chain::new(header.next_header(), at, Version::V6);
        chain.follow(&packet[..end]);
        Ok(chain.into_layout(&packet[..end], stated_len))
    }

    /// Whether the packet has a route that is not completed. The destination in the IP header is
    /// then the next hop.
    pub(super) fn is_routed(&self) -> bool {
        self.destination != self.version.destination_at()
    }

    /// Whether all bytes of the packet are present.
    pub(super) fn is_whole(&self) -> bool {
        self.stated_len == Some(self.end)
    }

    /// The range of the transport payload, or of the part of it that is present.
    pub(super) fn payload(&self) -> Option<Range<usize>> {
        self.transport.map(|_| self.at + self.header_len..self.payload_end)
    }

    /// The kind of the transport header, if that header and its payload may be changed.
    pub(super) fn editable(&self) -> Result<Transport, Obstacle> {
        match (self.obstacle, self.transport) {
            (None, Some(transport)) => Ok(transport),
            (Some(obstacle), _) => Err(obstacle),
            (None, None) => Err(Obstacle::Protocol(self.protocol)),
        }
    }
}

/// A walk along the IPv6 extension headers and the authentication header.
///
/// etherparse can also walk them. But it takes the data of a later fragment for headers, and does
/// not report where a chain becomes malformed.
struct Chain {
    version: Version,
    /// See [`Layout::destination`].
    destination: usize,
    protocol: IpNumber,
    at: usize,
    obstacle: Option<Obstacle>,
    /// See [`Layout::headerless`].
    headerless: bool,
}

impl Chain {
    fn new(protocol: IpNumber, at: usize, version: Version) -> Self {
        Self { version, destination: version.destination_at(), protocol, at, obstacle: None, headerless: false }
    }

    fn follow(&mut self, packet: &[u8]) {
        while !self.headerless {
            let rest = &packet[self.at..];
            let (next, length) = match (self.protocol, self.version) {
                (ip_number::AUTH, _) => {
                    let Ok(header) = IpAuthHeaderSlice::from_slice(rest) else { return self.malformed() };
                    self.obstacle = Some(Obstacle::Authenticated);
                    (header.next_header(), header.slice().len())
                }
                (ip_number::IPV6_FRAG, Version::V6) => {
                    let Ok(header) = Ipv6FragmentHeaderSlice::from_slice(rest) else { return self.malformed() };
                    if header.is_fragmenting_payload() {
                        self.fragment(header.fragment_offset().value() != 0);
                    }
                    (header.next_header(), header.slice().len())
                }
                (ip_number::IPV6_HOP_BY_HOP | ip_number::IPV6_DEST_OPTIONS | ip_number::IPV6_ROUTE, Version::V6) => {
                    let Ok(header) = Ipv6RawExtHeaderSlice::from_slice(rest) else { return self.malformed() };
                    // After next header and length: routing type, segments left.
                    let segments_left = header.payload().get(1).copied();
                    if self.protocol == ip_number::IPV6_ROUTE && segments_left != Some(0) {
                        match route::in_routing_header(header.slice()) {
                            Some(place) => self.destination = self.at + place,
                            None => {
                                self.obstacle.get_or_insert(Obstacle::Routed);
                            }
                        }
                    }
                    (header.next_header(), header.slice().len())
                }
                _ => return,
            };
            self.protocol = next;
            self.at += length;
        }
    }

    fn fragment(&mut self, headerless: bool) {
        self.headerless = headerless;
        self.obstacle.get_or_insert(Obstacle::Fragment);
    }

    fn malformed(&mut self) {
        self.headerless = true;
        self.obstacle = Some(Obstacle::Malformed("an extension header"));
    }

    fn into_layout(self, packet: &[u8], stated_len: Option<usize>) -> Layout {
        let Self { version, destination, protocol, at, obstacle, headerless } = self;
        let end = packet.len();
        let layout = Layout {
            version,
            destination,
            protocol,
            at,
            end,
            stated_len,
            headerless,
            transport: None,
            header_len: 0,
            payload_end: end,
            obstacle,
        };
        if headerless {
            // If the protocol is AUTH, an authentication header covers the packet, although that
            // header cannot be read here.
            let authenticated = (protocol == ip_number::AUTH).then_some(Obstacle::Authenticated);
            return Layout { obstacle: authenticated.or(obstacle), ..layout };
        }
        let or = |new| Some(obstacle.unwrap_or(new));
        let rest = &packet[at..];
        let complete_tcp = || TcpSlice::from_slice(rest).ok().map(|tcp| tcp.header_len());
        let complete_8 = || (rest.len() >= 8).then_some(8);
        let (transport, header_len, name) = match (protocol, version) {
            (ip_number::TCP, _) => (Transport::Tcp, complete_tcp(), "the TCP header"),
            (ip_number::UDP, _) => (Transport::Udp, complete_8(), "the UDP header"),
            (ip_number::ICMP, Version::V4) => (Transport::Icmpv4, complete_8(), "the ICMP header"),
            (ip_number::IPV6_ICMP, Version::V6) => (Transport::Icmpv6, complete_8(), "the ICMP header"),
            (other, _) => return Layout { obstacle: or(Obstacle::Protocol(other)), ..layout },
        };
        let Some(header_len) = header_len else {
            return Layout { obstacle: or(Obstacle::Malformed(name)), ..layout };
        };
        let layout = Layout { transport: Some(transport), header_len, ..layout };
        if transport != Transport::Udp {
            return layout;
        }
        let length = UdpHeaderSlice::from_slice(rest).map_or(0, |udp| udp.length().into());
        if (header_len..=rest.len()).contains(&length) {
            Layout { payload_end: at + length, ..layout }
        } else {
            Layout { obstacle: or(Obstacle::Malformed("the UDP length")), ..layout }
        }
    }
}
