//! Fields of the TCP and ICMP headers.

use std::ops::BitOr;

use super::{
    super::{encoder::Encoder, facts::Facts, family::IpVersion},
    Condition, Match, Needs, Order, ProtocolNeed, Values, operator,
};

impl Match {
    /// TCP segments in which of the flags `of` exactly the flags `set` are set.
    ///
    /// The rule then matches only TCP. See [`tcp_syn`](Self::tcp_syn) for new connections.
    pub fn tcp_flags(set: TcpFlags, of: TcpFlags) -> Self {
        Self::new(Flags { set, of })
    }

    /// The first segment of a TCP connection: SYN is set; FIN, RST and ACK are not.
    pub fn tcp_syn() -> Self {
        Self::tcp_flags(TcpFlags::SYN, TcpFlags::FIN | TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK)
    }

    /// ICMP messages of this type, for IPv4. The rule then matches only ICMP.
    pub fn icmp_type(number: u8) -> Self {
        Self::new(IcmpType { version: IpVersion::V4, number })
    }

    /// ICMPv6 messages of this type. The rule then matches only ICMPv6.
    pub fn icmpv6_type(number: u8) -> Self {
        Self::new(IcmpType { version: IpVersion::V6, number })
    }
}

/// Flags of a TCP header, for [`Match::tcp_flags`]. Combine them with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TcpFlags(u8);

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: Self = Self(0x01);
    /// Opens a connection.
    pub const SYN: Self = Self(0x02);
    /// Aborts a connection.
    pub const RST: Self = Self(0x04);
    /// Data is to be passed to the receiver at once.
    pub const PSH: Self = Self(0x08);
    /// The acknowledgement number is valid.
    pub const ACK: Self = Self(0x10);
    /// The urgent pointer is valid.
    pub const URG: Self = Self(0x20);
    /// Congestion was experienced.
    pub const ECE: Self = Self(0x40);
    /// The congestion window was reduced.
    pub const CWR: Self = Self(0x80);
    /// No flag.
    pub const NONE: Self = Self(0);

    /// The flags as nft writes them.
    fn nft(self) -> String {
        const NAMES: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"];
        let names: Vec<&str> = (0..8).filter(|bit| self.0 & 1 << bit != 0).map(|bit| NAMES[bit]).collect();
        if names.is_empty() { "0x0".to_owned() } else { names.join(" | ") }
    }
}

impl BitOr for TcpFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

#[derive(Debug)]
struct Flags {
    set: TcpFlags,
    of: TcpFlags,
}

impl Condition for Flags {
    fn field(&self) -> &'static str {
        "TCP flags"
    }

    fn order(&self) -> Order {
        Order::Port
    }

    fn needs(&self) -> Needs {
        Needs { protocol: ProtocolNeed::Exactly(6), whole_packets: true, ..Needs::default() }
    }

    fn check(&self, _facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        if self.set.0 & !self.of.0 != 0 {
            return Err("a flag that must be set is not among those that are compared".to_owned());
        }
        if self.of.0 == 0 && negated {
            return Err("the rule can never match: no flag is compared".to_owned());
        }
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.transport_byte(13);
        encoder.mask(vec![self.of.0]);
        encoder.equal(vec![self.set.0], negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let operator = if negated { "!=" } else { "==" };
        format!("tcp flags & ({}) {operator} {}", self.of.nft(), self.set.nft())
    }
}

#[derive(Debug)]
struct IcmpType {
    version: IpVersion,
    number: u8,
}

impl Condition for IcmpType {
    fn field(&self) -> &'static str {
        match self.version {
            IpVersion::V4 => "ICMP type",
            IpVersion::V6 => "ICMPv6 type",
        }
    }

    fn order(&self) -> Order {
        Order::Port
    }

    fn needs(&self) -> Needs {
        let protocol = match self.version {
            IpVersion::V4 => 1,
            IpVersion::V6 => 58,
        };
        Needs { protocol: ProtocolNeed::Exactly(protocol), whole_packets: true, ..Needs::default() }
    }

    fn version(&self, _facts: &Facts<'_>) -> Option<IpVersion> {
        Some(self.version)
    }

    fn values(&self) -> Option<Values> {
        Some(Values { ranges: vec![(self.number.into(), self.number.into())], highest: 255 })
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.transport_byte(0);
        encoder.equal(vec![self.number], negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let protocol = match self.version {
            IpVersion::V4 => "icmp",
            IpVersion::V6 => "icmpv6",
        };
        format!("{protocol} type {}{}", operator(negated), self.number)
    }
}
