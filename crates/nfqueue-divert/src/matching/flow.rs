//! Conditions of the rules for verdicts for whole connections.

use netlink_packet_netfilter::nftables::MetaKey;

use super::{
    super::{
        action::ttl,
        denied::{DeniedSet, PORTS, RECALLED, begun, beside, recent, replied},
        encoder::{Encoder, PROTOCOL as ONE_BYTE, REG32_00, Range},
        facts::Facts,
        family::IpVersion,
        tuple::{self, Of},
    },
    Condition, Match, Needs, Order, operator,
};

/// What a condition compares.
#[derive(Debug, Clone, Copy)]
enum Flow {
    /// `ct status & mask == value`
    Status {
        mask: u32,
        value: u32,
    },
    /// `meta priority & mask == value`
    Priority {
        mask: u32,
        value: u32,
    },
    /// The length of the packet from its network header on.
    Length(u32),
    /// A transport protocol with a higher number.
    HigherProtocol(u8),
    /// The ports of denied connections.
    Listed(Of),
    Denied(DeniedSet, Of),
    /// Source and destination exchanged.
    Recent(IpVersion),
    Replied(IpVersion),
    Begun(IpVersion, Of),
    Beside(IpVersion, Of),
    /// `ct direction`
    IsReply(bool),
    /// `ct protocol`: TCP, DCCP or SCTP
    TrackedWithFirstPackets,
    /// The ports of connections whose packets must not take the flowtable.
    Recalled(Of),
    /// TTL or hop limit 0.
    NoTtl(IpVersion),
    /// TTL or hop limit above 1.
    Ttl(IpVersion),
    /// An extension header of IPv6.
    Extension(u8),
    /// Options of IPv4.
    Options,
    /// The EtherType of the frame.
    EtherType(u16),
    OfUser,
    OnLoopback,
    ToLoopback,
    Arrived,
    SctpInit,
    SctpInitAck,
    /// The type of a packet.
    Dccp(u8),
    IcmpAbout(Of),
}

impl Match {
    /// The first packets of connections of which no packet has passed yet. A packet without a
    /// connection does not match, also if the condition is negated.
    pub(in super::super) fn unconfirmed() -> Self {
        Self::status(IPS_CONFIRMED, 0)
    }

    /// All other packets of connections.
    pub(in super::super) fn confirmed() -> Self {
        Self::status(IPS_CONFIRMED, IPS_CONFIRMED)
    }

    /// Packets of connections that have been established. Of TCP, the kernel offloads no others
    /// (`nf_conntrack_tcp_established`).
    pub(in super::super) fn assured() -> Self {
        Self::status(IPS_ASSURED, IPS_ASSURED)
    }

    /// Packets of connections that have been answered, and are not established.
    pub(in super::super) fn answered() -> Self {
        Self::status(IPS_SEEN_REPLY | IPS_ASSURED, IPS_SEEN_REPLY)
    }

    /// Packets with the ports of a connection whose packets must not take the flowtable.
    pub(in super::super) fn recalled(of: Of) -> Self {
        Self::new(Flow::Recalled(of))
    }

    /// Packets with TTL or hop limit 0. The rule must be limited to the version.
    pub(in super::super) fn no_ttl(version: IpVersion) -> Self {
        Self::new(Flow::NoTtl(version))
    }

    /// Packets with TTL or hop limit above 1. The rule must be limited to the version.
    pub(in super::super) fn ttl(version: IpVersion) -> Self {
        Self::new(Flow::Ttl(version))
    }

    /// IPv6 packets with a fragment header. The rule must be limited to IPv6.
    pub(in super::super) fn fragment_header() -> Self {
        Self::new(Flow::Extension(FRAGMENT_HEADER))
    }

    /// Packets that may be for another host, or of another one, than their addresses say: those of
    /// IPv6 with a routing header or destination options (the home address), and those of IPv4 with
    /// options. The rule must be limited to the version.
    pub(in super::super) fn hidden_addresses(version: IpVersion) -> Vec<Self> {
        let hiding = match version {
            IpVersion::V4 => &[Flow::Options][..],
            IpVersion::V6 => &[Flow::Extension(ROUTING_HEADER), Flow::Extension(DESTINATION_OPTIONS)],
        };
        hiding.iter().copied().map(Self::new).collect()
    }

    /// Packets that leave to this host.
    pub(in super::super) fn to_loopback() -> Self {
        Self::new(Flow::ToLoopback)
    }

    /// Frames with this EtherType. A packet without a link-layer header does not match, also if the
    /// condition is negated.
    pub(in super::super) fn ethertype(number: u16) -> Self {
        Self::new(Flow::EtherType(number))
    }

    /// Packets of connections whose destination has been translated.
    pub(in super::super) fn destination_translated() -> Self {
        Self::status(IPS_DST_NAT, IPS_DST_NAT)
    }

    /// Packets of connections whose source has not been translated.
    pub(in super::super) fn source_not_translated() -> Self {
        Self::status(IPS_SRC_NAT, 0)
    }

    fn status(mask: u32, value: u32) -> Self {
        Self::new(Flow::Status { mask, value })
    }

    /// Packets with `priority & mask == value`.
    pub(in super::super) fn priority(value: u32, mask: u32) -> Self {
        Self::new(Flow::Priority { value, mask })
    }

    /// Packets of this length, from the network header on.
    pub(in super::super) fn length(bytes: u32) -> Self {
        Self::new(Flow::Length(bytes))
    }

    /// Packets of a transport protocol with a higher number.
    pub(in super::super) fn higher_protocol(number: u8) -> Self {
        Self::new(Flow::HigherProtocol(number))
    }

    /// Packets with the ports of a denied connection, in either direction.
    pub(in super::super) fn listed(of: Of) -> Self {
        Self::new(Flow::Listed(of))
    }

    /// Packets with the addresses and ports of a connection in a set.
    pub(in super::super) fn denied(set: DeniedSet, of: Of) -> Self {
        Self::new(Flow::Denied(set, of))
    }

    /// Packets of the other side of a connection that has just been denied.
    pub(in super::super) fn recent(version: IpVersion) -> Self {
        Self::new(Flow::Recent(version))
    }

    /// Packets of connections of which a packet has just been rejected.
    pub(in super::super) fn replied(version: IpVersion) -> Self {
        Self::new(Flow::Replied(version))
    }

    /// Packets of connections that packets without an entry have begun.
    pub(in super::super) fn begun(version: IpVersion, of: Of) -> Self {
        Self::new(Flow::Begun(version, of))
    }

    /// Packets of connections of the other side beside denied ones.
    pub(in super::super) fn beside(version: IpVersion, of: Of) -> Self {
        Self::new(Flow::Beside(version, of))
    }

    /// Packets of the side that has not begun the connection, or of the one that has.
    pub(in super::super) fn is_reply(reply: bool) -> Self {
        Self::new(Flow::IsReply(reply))
    }

    /// Packets of connections of protocols whose packets show that they begin a connection, as
    /// connection tracking sees the protocol.
    pub(in super::super) fn tracked_with_first_packets() -> Self {
        Self::new(Flow::TrackedWithFirstPackets)
    }

    /// Packets of a socket of a process of this host. A packet that the kernel itself has made does
    /// not match, also if the condition is negated.
    pub(in super::super) fn of_user() -> Self {
        Self::new(Flow::OfUser)
    }

    /// Packets that have come from this host.
    pub(in super::super) fn on_loopback() -> Self {
        Self::new(Flow::OnLoopback)
    }

    /// Packets that have come by an interface.
    pub(in super::super) fn arrived() -> Self {
        Self::new(Flow::Arrived)
    }

    /// The first packet of an SCTP association: only there is the verification tag 0 (RFC 9260,
    /// section 8.5.1). The rule must be limited to SCTP.
    pub(in super::super) fn sctp_init() -> Self {
        Self::new(Flow::SctpInit)
    }

    /// The first packet of a DCCP connection (RFC 4340, section 5.1). The rule must be limited to
    /// DCCP.
    pub(in super::super) fn dccp_request() -> Self {
        Self::new(Flow::Dccp(0))
    }

    /// The reply to `sctp_init`: its first chunk is INIT ACK (RFC 9260, section 3.2). The rule must
    /// be limited to SCTP.
    pub(in super::super) fn sctp_init_ack() -> Self {
        Self::new(Flow::SctpInitAck)
    }

    /// The reply to a Request of DCCP. The rule must be limited to DCCP.
    pub(in super::super) fn dccp_response() -> Self {
        Self::new(Flow::Dccp(1))
    }

    /// ICMP errors, of which the packet that they quote has a header without options or extensions;
    /// or echo requests or replies. The rule must be limited to ICMP of the version.
    pub(in super::super) fn icmp_about(of: Of) -> Self {
        Self::new(Flow::IcmpAbout(of))
    }
}

impl Condition for Flow {
    fn field(&self) -> &'static str {
        "connection"
    }

    fn order(&self) -> Order {
        Order::Connection
    }

    fn needs(&self) -> Needs {
        let tracking = matches!(
            self,
            Self::Status { .. }
                | Self::Listed(_)
                | Self::Denied(..)
                | Self::Recent(_)
                | Self::Replied(_)
                | Self::Begun(..)
                | Self::Beside(..)
                | Self::IsReply(_)
                | Self::TrackedWithFirstPackets
        );
        Needs { tracking, ..Needs::default() }
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let masked = |encoder: &mut Encoder, mask: u32, value: u32| {
            encoder.mask(mask.to_ne_bytes().to_vec());
            encoder.equal(value.to_ne_bytes().to_vec(), negated);
        };
        match *self {
            Self::Status { mask, value } => {
                encoder.connection(CT_STATUS);
                masked(encoder, mask, value);
            }
            Self::Priority { mask, value } => {
                encoder.meta(MetaKey::Priority);
                if mask == u32::MAX {
                    encoder.equal(value.to_ne_bytes().to_vec(), negated);
                } else {
                    masked(encoder, mask, value);
                }
            }
            Self::Length(bytes) => {
                encoder.meta(MetaKey::Length);
                encoder.equal(bytes.to_ne_bytes().to_vec(), negated);
            }
            Self::HigherProtocol(number) => {
                encoder.meta(MetaKey::L4Proto);
                encoder.at_most(vec![number], !negated);
            }
            Self::Listed(of) => {
                if !encoder.encoding.trial {
                    tuple::load_ports(of, REG32_00, encoder);
                    encoder.named_set(PORTS, negated);
                }
            }
            Self::Denied(set, of) => {
                if !encoder.encoding.trial {
                    tuple::load(set.version, of, REG32_00, encoder);
                    encoder.named_set(set.name(), negated);
                }
            }
            Self::Recent(version) => {
                if !encoder.encoding.trial {
                    tuple::load(version, Of::ConnectionReversed, REG32_00, encoder);
                    encoder.named_set(recent(version), negated);
                }
            }
            Self::Replied(version) => {
                if !encoder.encoding.trial {
                    tuple::load(version, Of::Connection, REG32_00, encoder);
                    encoder.named_set(replied(version), negated);
                }
            }
            Self::Begun(version, of) => {
                if !encoder.encoding.trial {
                    tuple::load(version, of, REG32_00, encoder);
                    encoder.named_set(begun(version), negated);
                }
            }
            Self::Beside(version, of) => {
                if !encoder.encoding.trial {
                    tuple::load(version, of, REG32_00, encoder);
                    encoder.named_set(beside(version), negated);
                }
            }
            Self::IsReply(reply) => {
                if !encoder.encoding.trial {
                    encoder.connection(CT_DIRECTION);
                    encoder.equal(vec![reply.into()], negated);
                }
            }
            Self::TrackedWithFirstPackets => {
                if !encoder.encoding.trial {
                    tuple::load_protocol(encoder);
                    encoder.one_of(ONE_BYTE, &FIRST_PACKETS, negated);
                }
            }
            Self::Recalled(of) => {
                if !encoder.encoding.trial {
                    tuple::load_ports(of, REG32_00, encoder);
                    encoder.named_set(RECALLED, negated);
                }
            }
            Self::NoTtl(version) => {
                encoder.ttl(version);
                encoder.equal(vec![0], negated);
            }
            Self::Ttl(version) => {
                encoder.ttl(version);
                encoder.at_most(vec![1], !negated);
            }
            Self::Extension(header) => {
                encoder.has_extension(header);
                encoder.equal(vec![1], negated);
            }
            Self::Options => {
                encoder.network_byte(0);
                encoder.mask(vec![0x0f]);
                encoder.at_most(vec![WORDS_WITHOUT_OPTIONS], !negated);
            }
            Self::EtherType(number) => {
                encoder.ethertype();
                encoder.equal(number.to_be_bytes().to_vec(), negated);
            }
            Self::OfUser => {
                // Loading the number ends the rule if there is no such socket. No user has the
                // highest number.
                encoder.meta(MetaKey::SocketUserId);
                encoder.equal(u32::MAX.to_ne_bytes().to_vec(), !negated);
            }
            Self::OnLoopback => {
                encoder.meta(MetaKey::Iftype);
                encoder.equal(ARPHRD_LOOPBACK.to_ne_bytes().to_vec(), negated);
            }
            Self::ToLoopback => {
                encoder.meta(MetaKey::Oiftype);
                encoder.equal(ARPHRD_LOOPBACK.to_ne_bytes().to_vec(), negated);
            }
            Self::Arrived => {
                encoder.meta(MetaKey::Iif);
                encoder.equal(vec![0; 4], !negated);
            }
            Self::SctpInit => {
                encoder.transport(4, 4);
                encoder.equal(vec![0; 4], negated);
            }
            Self::SctpInitAck => {
                encoder.transport_byte(12);
                encoder.equal(vec![2], negated);
            }
            Self::Dccp(kind) => {
                encoder.transport_byte(8);
                encoder.mask(vec![0x1e]);
                encoder.equal(vec![kind << 1], negated);
            }
            Self::IcmpAbout(of) => {
                encoder.transport_byte(0);
                match of {
                    Of::EchoReply(IpVersion::V4) => encoder.equal(vec![0], false),
                    Of::EchoReply(IpVersion::V6) => encoder.equal(vec![129], false),
                    Of::EchoRequest(IpVersion::V4) => encoder.equal(vec![8], false),
                    Of::EchoRequest(IpVersion::V6) => encoder.equal(vec![128], false),
                    Of::Quoted(IpVersion::V6) | Of::QuotedReversed(IpVersion::V6) => {
                        encoder.at_most(vec![4], false);
                    }
                    _ => {
                        // Destination unreachable to redirect, time exceeded, parameter problem.
                        let types = [(3, 5), (11, 12)];
                        encoder.one_of(ONE_BYTE, &types, false);
                        encoder.transport_byte(8);
                        encoder.equal(vec![0x45], false);
                    }
                }
            }
        }
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let equality = |negated: bool| if negated { "!=" } else { "==" };
        let equal = equality(negated);
        match *self {
            Self::Status { mask, value } => format!("ct status & {mask:#x} {equal} {value:#x}"),
            Self::Priority { mask: u32::MAX, value } => format!("meta priority {}{value:#x}", operator(negated)),
            Self::Priority { mask, value } => format!("meta priority & {mask:#x} {equal} {value:#x}"),
            Self::Length(bytes) => format!("meta length {}{bytes}", operator(negated)),
            Self::HigherProtocol(number) => format!("meta l4proto {} {number}", if negated { "<=" } else { ">" }),
            // nft cannot look constants up in a set.
            Self::Listed(Of::WithoutPorts) => String::new(),
            Self::Listed(of) => format!("{} {}@{PORTS}", tuple::nft_ports(of), operator(negated)),
            Self::Denied(set, of) => format!("{} {}@{}", tuple::nft(set.version, of), operator(negated), set.name()),
            Self::Recent(version) => {
                format!("{} {}@{}", tuple::nft(version, Of::ConnectionReversed), operator(negated), recent(version))
            }
            Self::Replied(version) => {
                format!("{} {}@{}", tuple::nft(version, Of::Connection), operator(negated), replied(version))
            }
            Self::Begun(version, of) => {
                format!("{} {}@{}", tuple::nft(version, of), operator(negated), begun(version))
            }
            Self::Beside(version, of) => {
                format!("{} {}@{}", tuple::nft(version, of), operator(negated), beside(version))
            }
            Self::IsReply(reply) => {
                format!("ct direction {}{}", operator(negated), if reply { "reply" } else { "original" })
            }
            Self::TrackedWithFirstPackets => {
                let numbers = FIRST_PACKETS.map(|(number, _)| number.to_string()).join(", ");
                format!("ct original protocol {}{{ {numbers} }}", operator(negated))
            }
            Self::Recalled(of) => format!("{} {}@{RECALLED}", tuple::nft_ports(of), operator(negated)),
            Self::NoTtl(version) => format!("{} {}0", ttl(version), operator(negated)),
            Self::Ttl(version) => format!("{} {} 1", ttl(version), if negated { "<=" } else { ">" }),
            Self::Extension(header) => {
                let name = match header {
                    ROUTING_HEADER => "rt",
                    FRAGMENT_HEADER => "frag",
                    _ => "dst",
                };
                format!("exthdr {name} {}", if negated { "missing" } else { "exists" })
            }
            Self::Options => format!("ip hdrlength {} {WORDS_WITHOUT_OPTIONS}", if negated { "<=" } else { ">" }),
            Self::EtherType(number) => format!("@ll,96,16 {}{number:#06x}", operator(negated)),
            Self::OfUser => format!("meta skuid {}{}", operator(!negated), u32::MAX),
            Self::OnLoopback => format!("meta iiftype {}loopback", operator(negated)),
            Self::ToLoopback => format!("meta oiftype {}loopback", operator(negated)),
            Self::Arrived => format!("meta iif {}0", operator(!negated)),
            Self::SctpInit => format!("@th,32,32 {}0", operator(negated)),
            Self::SctpInitAck => format!("@th,96,8 {}2", operator(negated)),
            Self::Dccp(kind) => format!("@th,64,8 & 0x1e {equal} {:#x}", kind << 1),
            // nft cannot look such tuples up in a set.
            Self::IcmpAbout(_) => String::new(),
        }
    }
}

/// TCP, DCCP and SCTP.
const FIRST_PACKETS: [Range; 3] = [(6, 6), (33, 33), (132, 132)];
/// uapi/linux/netfilter/nf_tables.h, enum nft_ct_keys
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
// uapi/linux/netfilter/nf_conntrack_common.h
const IPS_SEEN_REPLY: u32 = 1 << 1;
const IPS_ASSURED: u32 = 1 << 2;
const IPS_CONFIRMED: u32 = 1 << 3;
const IPS_SRC_NAT: u32 = 1 << 4;
const IPS_DST_NAT: u32 = 1 << 5;
/// uapi/linux/if_arp.h
const ARPHRD_LOOPBACK: u16 = 772;
// uapi/linux/in6.h
const ROUTING_HEADER: u8 = 43;
const FRAGMENT_HEADER: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// The length of an IPv4 header, in words of 32 bits.
const WORDS_WITHOUT_OPTIONS: u8 = 5;
