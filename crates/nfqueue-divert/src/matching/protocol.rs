//! The transport protocol.

use netlink_packet_netfilter::nftables::MetaKey;
use nfqueue_proto::types::Protocol;

use super::{
    super::{
        encoder::{Encoder, PROTOCOL, Range, merge},
        facts::Facts,
        family::IpVersion,
    },
    Condition, Match, Order, Values, nft_ranges, operator,
};

impl Match {
    /// Packets of this transport protocol (`meta l4proto`).
    pub fn protocol(protocol: Protocol) -> Self {
        Self::protocols([protocol])
    }

    /// Packets of one of these transport protocols.
    pub fn protocols(protocols: impl IntoIterator<Item = Protocol>) -> Self {
        Self::new(Protocols { numbers: protocols.into_iter().map(Protocol::number).collect() })
    }
}

#[derive(Debug)]
struct Protocols {
    numbers: Vec<u8>,
}

impl Protocols {
    fn ranges(&self) -> Vec<Range> {
        merge(self.numbers.iter().map(|number| (u128::from(*number), u128::from(*number))))
    }
}

impl Condition for Protocols {
    fn field(&self) -> &'static str {
        "protocol"
    }

    fn order(&self) -> Order {
        Order::Protocol
    }

    fn values(&self) -> Option<Values> {
        Some(Values { ranges: self.ranges(), highest: PROTOCOL.highest() })
    }

    fn check(&self, facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        let only = |number: u8| !negated && self.numbers.iter().all(|other| *other == number);
        if self.numbers.is_empty() {
            return Err("there is no protocol".to_owned());
        }
        if facts.version == Some(IpVersion::V6) && only(1) {
            return Err("ICMP can never match with IPv6".to_owned());
        }
        if facts.version == Some(IpVersion::V4) && only(58) {
            return Err("ICMPv6 can never match with IPv4".to_owned());
        }
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.meta(MetaKey::L4Proto);
        encoder.one_of(PROTOCOL, &self.ranges(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        format!("meta l4proto {}{}", operator(negated), nft_ranges(&self.ranges(), |number| number.to_string()))
    }
}
