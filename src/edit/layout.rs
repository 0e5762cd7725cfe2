//! Where things are in a packet.

use std::{fmt, ops::Range};

use etherparse::{
    IpAuthHeaderSlice, IpNumber, Ipv4Header, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6Header, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, TcpSlice, UdpHeaderSlice, ip_number,
};

use super::route;

/// Offsets into a packet. They hold for the bytes they were taken from and no others: `at <= end <= bytes.len()`, and
/// where there is a `transport`, `at + header_len <= payload_end <= end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: Version,
    /// Where the destination is that the transport checksum covers: in the IP header, or in a route
    /// that is not used up.
    pub(super) destination: usize,
    /// What follows the IP header and its extensions.
    pub(super) protocol: IpNumber,
    /// Where that begins.
    pub(super) at: usize,
    /// Where the packet ends, or what was captured of it.
    pub(super) end: usize,
    /// How long the IP header says the packet is; `None` for jumbograms and their like.
    pub(super) stated_len: Option<usize>,
    /// Whether the packet is a fragment that begins in the midst of a datagram.
    pub(super) headless: bool,
    /// The transport header, where there is a whole one.
    pub(super) transport: Option<Transport>,
    /// Of the transport header, options included.
    pub(super) header_len: usize,
    /// Of the transport payload: before `end` if something follows a UDP datagram.
    pub(super) payload_end: usize,
    /// What forbids to change the transport header or payload. `None` only where there is a transport header.
    pub(super) obstacle: Option<Obstacle>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V4,
    V6,
}

impl Version {
    /// Where the IP header has its destination.
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
    /// Where in the header the checksum is.
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

/// Why a transport header cannot be changed, its checksum not be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The packet is a part of a datagram.
    Fragment,
    /// An authentication header covers everything.
    Authenticated,
    /// The checksum covers a destination that is not found in a routing header.
    Routed,
    /// The protocol is none of those known here.
    Protocol(IpNumber),
    /// This is cut off or contradicts the rest.
    Damaged(&'static str),
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
                write!(f, "protocol {number}; TCP, UDP and the ICMP of the packet's family can be edited")
            }
            Self::Damaged(what) => write!(f, "{what} is damaged"),
        }
    }
}

impl Layout {
    /// Fails where there is no whole IP header. What follows it may be damaged or missing.
    pub(super) fn of(packet: &[u8]) -> Result<Self, &'static str> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::of_ipv4(packet),
            Some(6) => Self::of_ipv6(packet),
            Some(_) => Err("neither IPv4 nor IPv6"),
            None => Err("no bytes"),
        }
    }

    fn of_ipv4(packet: &[u8]) -> Result<Self, &'static str> {
        let header = Ipv4HeaderSlice::from_slice(packet).map_err(|_| "the IPv4 header is damaged")?;
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
        let header = Ipv6HeaderSlice::from_slice(packet).map_err(|_| "the IPv6 header is damaged")?;
        let at = Ipv6Header::LEN;
        let stated_len = match header.payload_length() {
            // The length is in a jumbo option or, of a super-packet, nowhere.
            0 if packet.len() > at && header.next_header() != ip_number::IPV6_NO_NEXT_HEADER => None,
            length => Some(at + usize::from(length)),
        };
        let end = stated_len.unwrap_or(packet.len()).min(packet.len());
        let mut chain = Chain::new(header.next_header(), at, Version::V6);
        chain.follow(&packet[..end]);
        Ok(chain.into_layout(&packet[..end], stated_len))
    }

    /// Whether the packet carries a route that is not used up, so that the header's destination is
    /// the next hop.
    pub(super) fn is_routed(&self) -> bool {
        self.destination != self.version.destination_at()
    }

    /// Whether all of the packet is there.
    pub(super) fn is_whole(&self) -> bool {
        self.stated_len == Some(self.end)
    }

    /// Where the transport payload is, or as much of it as there is.
    pub(super) fn payload(&self) -> Option<Range<usize>> {
        self.transport.map(|_| self.at + self.header_len..self.payload_end)
    }

    /// The transport header, if it and what follows it may be changed.
    pub(super) fn editable(&self) -> Result<Transport, Obstacle> {
        match (self.obstacle, self.transport) {
            (None, Some(transport)) => Ok(transport),
            (Some(obstacle), _) => Err(obstacle),
            (None, None) => Err(Obstacle::Protocol(self.protocol)),
        }
    }
}

/// The way along the extension headers. etherparse can walk them too, but not tell a later fragment's data from headers,
/// nor where a chain that breaks off does so.
struct Chain {
    version: Version,
    /// As [`Layout::destination`].
    destination: usize,
    protocol: IpNumber,
    at: usize,
    obstacle: Option<Obstacle>,
    /// What comes next is in the midst of a datagram.
    headless: bool,
}

impl Chain {
    fn new(protocol: IpNumber, at: usize, version: Version) -> Self {
        Self { version, destination: version.destination_at(), protocol, at, obstacle: None, headless: false }
    }

    fn follow(&mut self, packet: &[u8]) {
        while !self.headless {
            let rest = &packet[self.at..];
            let (next, length) = match (self.protocol, self.version) {
                (ip_number::AUTH, _) => {
                    let Ok(header) = IpAuthHeaderSlice::from_slice(rest) else { return self.broken() };
                    self.obstacle = Some(Obstacle::Authenticated);
                    (header.next_header(), header.slice().len())
                }
                (ip_number::IPV6_FRAG, Version::V6) => {
                    let Ok(header) = Ipv6FragmentHeaderSlice::from_slice(rest) else { return self.broken() };
                    if header.is_fragmenting_payload() {
                        self.fragment(header.fragment_offset().value() != 0);
                    }
                    (header.next_header(), header.slice().len())
                }
                (ip_number::IPV6_HOP_BY_HOP | ip_number::IPV6_DEST_OPTIONS | ip_number::IPV6_ROUTE, Version::V6) => {
                    let Ok(header) = Ipv6RawExtHeaderSlice::from_slice(rest) else { return self.broken() };
                    // Behind next header and length: routing type, segments left.
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

    fn fragment(&mut self, headless: bool) {
        self.headless = headless;
        self.obstacle.get_or_insert(Obstacle::Fragment);
    }

    fn broken(&mut self) {
        self.headless = true;
        self.obstacle = Some(Obstacle::Damaged("an extension header"));
    }

    fn into_layout(self, packet: &[u8], stated_len: Option<usize>) -> Layout {
        let Self { version, destination, protocol, at, obstacle, headless } = self;
        let end = packet.len();
        let layout = Layout {
            version,
            destination,
            protocol,
            at,
            end,
            stated_len,
            headless,
            transport: None,
            header_len: 0,
            payload_end: end,
            obstacle,
        };
        if headless {
            // What it begins with is not known, but an authentication header covers it.
            let authenticated = (protocol == ip_number::AUTH).then_some(Obstacle::Authenticated);
            return Layout { obstacle: authenticated.or(obstacle), ..layout };
        }
        let or = |new| Some(obstacle.unwrap_or(new));
        let rest = &packet[at..];
        let whole_tcp = || TcpSlice::from_slice(rest).ok().map(|tcp| tcp.header_len());
        let whole_8 = || (rest.len() >= 8).then_some(8);
        let (transport, header_len, name) = match (protocol, version) {
            (ip_number::TCP, _) => (Transport::Tcp, whole_tcp(), "the TCP header"),
            (ip_number::UDP, _) => (Transport::Udp, whole_8(), "the UDP header"),
            (ip_number::ICMP, Version::V4) => (Transport::Icmpv4, whole_8(), "the ICMP header"),
            (ip_number::IPV6_ICMP, Version::V6) => (Transport::Icmpv6, whole_8(), "the ICMP header"),
            (other, _) => return Layout { obstacle: or(Obstacle::Protocol(other)), ..layout },
        };
        let Some(header_len) = header_len else {
            return Layout { obstacle: or(Obstacle::Damaged(name)), ..layout };
        };
        let layout = Layout { transport: Some(transport), header_len, ..layout };
        if transport != Transport::Udp {
            return layout;
        }
        let length = UdpHeaderSlice::from_slice(rest).map_or(0, |udp| udp.length().into());
        if (header_len..=rest.len()).contains(&length) {
            Layout { payload_end: at + length, ..layout }
        } else {
            Layout { obstacle: or(Obstacle::Damaged("the UDP length")), ..layout }
        }
    }
}
