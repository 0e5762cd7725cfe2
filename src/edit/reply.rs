//! Turns a packet into a reply to its sender: a packet in the reverse direction, a TCP reset, or an
//! ICMP error.

use std::net::IpAddr;

use etherparse::{Ipv4Header, Ipv6Header, ip_number};

use super::{
    Edit, invalid,
    layout::{Layout, Obstacle, Transport, Version},
    refused,
};
use crate::types::Error;

/// Why a packet does not reach its destination, for [`Edit::icmp_unreachable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unreachable {
    /// There is no route: ICMP code 0, ICMPv6 code 0.
    #[doc(alias = "ICMP_NET_UNREACH")]
    #[doc(alias = "ICMPV6_NOROUTE")]
    Network,
    /// The host does not answer: ICMP code 1, ICMPv6 code 3 (address unreachable).
    #[doc(alias = "ICMP_HOST_UNREACH")]
    #[doc(alias = "ICMPV6_ADDR_UNREACH")]
    Host,
    /// No socket is bound to the port: ICMP code 3, ICMPv6 code 4.
    #[doc(alias = "ICMP_PORT_UNREACH")]
    #[doc(alias = "ICMPV6_PORT_UNREACH")]
    Port,
    /// A firewall forbids the packet: ICMP code 13, ICMPv6 code 1.
    #[doc(alias = "ICMP_PKT_FILTERED")]
    #[doc(alias = "ICMPV6_ADM_PROHIBITED")]
    AdministrativelyProhibited,
}

impl Unreachable {
    /// RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3.1.
    fn code(self, version: Version) -> u8 {
        match (self, version) {
            (Self::Network, _) => 0,
            (Self::Host, Version::V4) => 1,
            (Self::Host, Version::V6) => 3,
            (Self::Port, Version::V4) => 3,
            (Self::Port, Version::V6) => 4,
            (Self::AdministrativelyProhibited, Version::V4) => 13,
            (Self::AdministrativelyProhibited, Version::V6) => 1,
        }
    }
}

impl Edit {
    /// Turns the packet around: exchanges the addresses and the ports, and sets the TTL or hop
    /// limit to 64. An echo request of ICMP or ICMPv6 becomes the echo reply.
    ///
    /// The payload stays, and can be [replaced](Self::replace_payload). All other fields stay too,
    /// so the sequence numbers and flags of TCP do not fit the new direction; to refuse a
    /// connection, use [`tcp_reset`](Self::tcp_reset).
    ///
    /// [Which reply arrives](crate::guide::replies) depends on the hook.
    ///
    /// ```
    /// use tokio_nfqueue::{Error, Packet, Verdict, inject::Injector};
    ///
    /// /// Replies to a query instead of the server.
    /// async fn reply(packet: Packet, injector: &Injector) -> Result<Verdict, Error> {
    ///     let mut reply = packet.edit()?;
    ///     reply.turn_around()?;
    ///     reply.replace_payload(b"the payload of the reply")?;
    ///     injector.send(&reply.finish()).await?;
    ///     Ok(packet.drop())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput)
    /// * for the same reasons as [`payload_mut`](Self::payload_mut), fragments among them;
    /// * if the packet is ICMP or ICMPv6 and not an echo request;
    /// * if it has an IPv4 source route that is not completed, or an IPv6 routing header with
    ///   segments left;
    /// * if one of its addresses is not the address of a host, for example a multicast address. Set
    ///   another address before;
    /// * if it is a [super-packet](Self#super-packets).
    ///
    /// The packet is then unchanged.
    pub fn turn_around(&mut self) -> Result<(), Error> {
        const OPERATION: &str = "turn a packet around";
        if self.gso {
            return Err(invalid(OPERATION, "it is a super-packet; bind the queue with gso(false)"));
        }
        let transport = self.layout.editable().map_err(|obstacle| refused(OPERATION, obstacle))?;
        self.check_direction(OPERATION)?;
        let at = self.layout.at;
        match (transport, self.packet[at]) {
            (Transport::Tcp | Transport::Udp, _) => self.exchange(at, 2),
            (Transport::Icmpv4, ECHO_REQUEST) => self.packet[at] = ECHO_REPLY,
            (Transport::Icmpv6, ECHO_REQUEST_V6) => self.packet[at] = ECHO_REPLY_V6,
            (Transport::Icmpv4 | Transport::Icmpv6, kind) => {
                return Err(invalid(OPERATION, format!("an ICMP message of type {kind} is not an echo request")));
            }
        }
        self.reverse();
        Ok(())
    }

    /// Turns a TCP packet into the reset (RST) that refuses its connection, as RFC 9293, section
    /// 3.10.7.1, describes for a connection that does not exist. The receiver accepts the reset if
    /// it is the sender of the packet.
    ///
    /// The reset has no payload and no TCP options. Addresses and ports are exchanged, and the TTL
    /// or hop limit is 64. The rest of the IP header stays. The reset of a
    /// [super-packet](Self#super-packets) must be sent by an [`Injector`](crate::inject::Injector),
    /// because as the payload of a verdict it would be lost.
    ///
    /// It closes one side. To close the other side as well, send it a reset of its own, or accept
    /// no more packets of the connection.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput)
    /// * if the packet is not TCP, or is a fragment;
    /// * if it is a reset, which is never replied to;
    /// * for the same routes and addresses as [`turn_around`](Self::turn_around).
    ///
    /// The packet is then unchanged.
    pub fn tcp_reset(&mut self) -> Result<(), Error> {
        const OPERATION: &str = "make a TCP reset";
        let transport = self.layout.editable().map_err(|obstacle| refused(OPERATION, obstacle))?;
        let Some(tcp) = self.view().tcp().filter(|_| transport == Transport::Tcp) else {
            return Err(invalid(OPERATION, "the packet is not TCP"));
        };
        if tcp.rst {
            return Err(invalid(OPERATION, "the packet is a reset itself"));
        }
        self.check_direction(OPERATION)?;
        let data = self.layout.payload().map_or(0, |payload| payload.len());
        let (sequence, acknowledgment, flags) = if tcp.ack {
            (tcp.acknowledgment_number, 0, RST)
        } else {
            // SYN and FIN take a sequence number each.
            let length = data as u32 + u32::from(tcp.syn) + u32::from(tcp.fin);
            (0, tcp.sequence_number.wrapping_add(length), RST | ACK)
        };
        let at = self.layout.at;
        self.exchange(at, 2);
        self.packet.truncate(at + TCP_HEADER);
        self.packet[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
        self.packet[at + 8..at + 12].copy_from_slice(&acknowledgment.to_be_bytes());
        // Header length in units of 4 bytes, flags; window, checksum and urgent pointer are 0.
        self.packet[at + 12..].fill(0);
        self.packet[at + 12] = (TCP_HEADER as u8 / 4) << 4;
        self.packet[at + 13] = flags;
        let end = at + TCP_HEADER;
        self.layout = Layout { end, header_len: TCP_HEADER, payload_end: end, ..self.layout };
        self.write_ip_len();
        self.gso = false;
        self.reverse();
        Ok(())
    }

    /// Turns a packet into an ICMP or ICMPv6 error (destination unreachable) for its sender.
    ///
    /// The error quotes the packet as it is now, up to a total length of 576 bytes (RFC 1812,
    /// section 4.3.2.3), or 1280 bytes for IPv6 (RFC 4443, section 2.4). Its source address is the
    /// destination of the packet. A router uses an address of its own: set it afterwards with
    /// [`set_source_address`](Self::set_source_address). The IP header is new, without options or
    /// extension headers; only the DF bit stays.
    ///
    /// Send it with an [`Injector`](crate::inject::Injector): as the payload of a verdict, some
    /// kernels and hooks lose it. The kernel sends such errors itself, with a limit of their rate
    /// (the `reject` statement of nftables). This method has no limit.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for packets to which no error may be sent
    /// (RFC 1812, section 4.3.2.7; RFC 4443, section 2.4):
    /// * an ICMP or ICMPv6 error, an ICMPv6 redirect, an incomplete ICMP message;
    /// * a fragment other than the first, or a packet with a malformed extension header;
    /// * a packet whose source or destination is not the address of a host, for example a multicast
    ///   address. Broadcast addresses of a subnet and broadcast link-layer addresses are not
    ///   recognised.
    ///
    /// The packet is then unchanged.
    pub fn icmp_unreachable(&mut self, reason: Unreachable) -> Result<(), Error> {
        const OPERATION: &str = "make an ICMP error";
        if let Some(obstacle) = self.layout.obstacle.filter(|_| self.layout.headerless) {
            return Err(refused(OPERATION, obstacle));
        }
        self.check_replies(OPERATION)?;
        self.check_hosts(OPERATION)?;
        let code = reason.code(self.layout.version);
        let packet = match self.layout.version {
            Version::V4 => self.unreachable_v4(code),
            Version::V6 => self.unreachable_v6(code),
        };
        let layout = Layout::of(&packet).map_err(|detail| invalid(OPERATION, detail))?;
        *self = Self { packet, layout, gso: false };
        Ok(())
    }

    fn unreachable_v4(&self, code: u8) -> Vec<u8> {
        let length = (Ipv4Header::MIN_LEN + ICMP_HEADER + self.packet.len()).min(LONGEST_ERROR_V4);
        let mut error = Vec::with_capacity(length);
        // Precedence "internetwork control" (RFC 1812, section 4.3.2.5).
        let tos = 0xc0 | self.packet[1] & 0x1e;
        let dont_fragment = self.packet[6] & 0x40;
        error.extend_from_slice(&[0x45, tos]);
        error.extend_from_slice(&(length as u16).to_be_bytes());
        error.extend_from_slice(&[0, 0, dont_fragment, 0, FRESH_TTL, ip_number::ICMP.0, 0, 0]);
        error.extend_from_slice(&self.packet[16..20]);
        error.extend_from_slice(&self.packet[12..16]);
        error.extend_from_slice(&[DESTINATION_UNREACHABLE, code, 0, 0, 0, 0, 0, 0]);
        error.extend_from_slice(&self.packet[..length - error.len()]);
        error
    }

    fn unreachable_v6(&self, code: u8) -> Vec<u8> {
        let length = (Ipv6Header::LEN + ICMP_HEADER + self.packet.len()).min(LONGEST_ERROR_V6);
        let mut error = Vec::with_capacity(length);
        error.extend_from_slice(&[0x60, 0, 0, 0]);
        error.extend_from_slice(&((length - Ipv6Header::LEN) as u16).to_be_bytes());
        error.extend_from_slice(&[ip_number::IPV6_ICMP.0, FRESH_TTL]);
        error.extend_from_slice(&self.packet[24..40]);
        error.extend_from_slice(&self.packet[8..24]);
        error.extend_from_slice(&[DESTINATION_UNREACHABLE_V6, code, 0, 0, 0, 0, 0, 0]);
        error.extend_from_slice(&self.packet[..length - error.len()]);
        error
    }

    /// Whether an ICMP error may be sent in reply to this protocol.
    fn check_replies(&self, operation: &'static str) -> Result<(), Error> {
        let icmp = match (self.layout.protocol, self.layout.version) {
            (ip_number::ICMP, Version::V4) | (ip_number::IPV6_ICMP, Version::V6) => self.view().icmp(),
            _ => return Ok(()),
        };
        let Some((kind, _)) = icmp else {
            return Err(refused(operation, Obstacle::Malformed("the ICMP header")));
        };
        let may = match self.layout.version {
            Version::V4 => ICMP_QUERIES.contains(&kind),
            Version::V6 => kind >= FIRST_INFORMATIONAL_V6 && kind != REDIRECT_V6,
        };
        if may { Ok(()) } else { Err(invalid(operation, format!("the packet is an ICMP error (type {kind})"))) }
    }

    /// Whether the destination can be the source of a reply, and the source its destination.
    fn check_direction(&self, operation: &'static str) -> Result<(), Error> {
        if self.layout.is_routed() {
            return Err(invalid(operation, "the route of the packet is not completed"));
        }
        self.check_hosts(operation)
    }

    fn check_hosts(&self, operation: &'static str) -> Result<(), Error> {
        let view = self.view();
        match [view.source_address(), view.destination_address()].into_iter().find(|address| !is_host(*address)) {
            Some(address) => Err(invalid(operation, format!("{address} is not the address of a host"))),
            None => Ok(()),
        }
    }

    /// Exchanges the addresses, and sets a fresh TTL.
    fn reverse(&mut self) {
        match self.layout.version {
            Version::V4 => self.exchange(12, 4),
            Version::V6 => self.exchange(8, 16),
        }
        self.set_ttl(FRESH_TTL);
    }

    /// Exchanges two fields of `length` bytes each, of which the first begins at `at`.
    fn exchange(&mut self, at: usize, length: usize) {
        self.packet[at..at + 2 * length].rotate_left(length);
    }
}

/// Whether it can be the address of a single host. Broadcast addresses of subnets are not
/// recognised.
fn is_host(address: IpAddr) -> bool {
    match address {
        // 224/4 is multicast; 240/4 is reserved and contains the limited broadcast address.
        IpAddr::V4(address) => (1..224).contains(&address.octets()[0]),
        IpAddr::V6(address) => !address.is_multicast() && !address.is_unspecified(),
    }
}

/// The default TTL that IANA recommends, and that Linux uses.
const FRESH_TTL: u8 = 64;

const TCP_HEADER: usize = 20;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

// RFC 792, RFC 4443.
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const DESTINATION_UNREACHABLE: u8 = 3;
const DESTINATION_UNREACHABLE_V6: u8 = 1;
/// ICMPv6 types below are errors.
const FIRST_INFORMATIONAL_V6: u8 = 128;
const REDIRECT_V6: u8 = 137;
/// The types of ICMP that are not errors: echo, router discovery, timestamp, information, address
/// mask, extended echo. Unknown types count as errors, as they do for the kernel (`__icmp_send`).
const ICMP_QUERIES: [u8; 12] = [0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43];
/// The length of the header of an ICMP error.
const ICMP_HEADER: usize = 8;
const LONGEST_ERROR_V4: usize = 576;
const LONGEST_ERROR_V6: usize = 1280;
