//! How much a connection has transferred.

use super::{
    super::{
        encoder::{Encoder, number},
        facts::Facts,
    },
    Condition, Match, Needs, Order,
};

impl Match {
    /// The first `count` packets of each connection, in both directions together.
    ///
    /// A super-packet (GSO) counts as one. Packets that wait in a queue are not counted before the
    /// first of them has been accepted: in a burst at the beginning of a connection, more than
    /// `count` packets match. A program that must see no more than `count` counts itself.
    ///
    /// The condition needs connection tracking; see
    /// [`DivertBuilder::track_connections`](crate::DivertBuilder::track_connections). It also needs
    /// the kernel to count the packets of connections (`net.netfilter.nf_conntrack_acct`), which it
    /// does from the installation of the rule on, and until it is switched off. Connections that
    /// are older are not counted: all their packets match.
    pub fn first_packets(count: u64) -> Self {
        Self::new(Amount { limit: count, bytes: false })
    }

    /// Packets that, together with the earlier packets of their connection in both directions, have
    /// at most `count` bytes, from the IP header on.
    ///
    /// The packet that exceeds the number does not match, also if its beginning does not: a
    /// super-packet (GSO) may be the first one with data. Count
    /// [packets](Self::first_packets) if that matters. The condition needs the same as
    /// `first_packets`.
    pub fn first_bytes(count: u64) -> Self {
        Self::new(Amount { limit: count, bytes: true })
    }
}

#[derive(Debug)]
struct Amount {
    limit: u64,
    bytes: bool,
}

impl Condition for Amount {
    fn field(&self) -> &'static str {
        if self.bytes { "first bytes" } else { "first packets" }
    }

    fn order(&self) -> Order {
        Order::Connection
    }

    fn needs(&self) -> Needs {
        Needs { tracking: true, ..Needs::default() }
    }

    fn check(&self, _facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        match self.limit {
            0 if !negated => Err("the rule can never match: the number is 0".to_owned()),
            u64::MAX if negated => Err("the rule can never match: the number is the highest one".to_owned()),
            _ => Ok(()),
        }
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        if encoder.encoding.trial {
            return;
        }
        encoder.connection(if self.bytes { CT_BYTES } else { CT_PACKETS });
        // The kernel loads the sum in host byte order, and compares bytes.
        let attributes = [
            (NFTA_BYTEORDER_SREG, 1),
            (NFTA_BYTEORDER_DREG, 1),
            (NFTA_BYTEORDER_OP, NFT_BYTEORDER_HTON),
            (NFTA_BYTEORDER_LEN, 8),
            (NFTA_BYTEORDER_SIZE, 8),
        ];
        encoder.expression("byteorder", &attributes.map(|(kind, value)| number(kind, value)));
        encoder.at_most(self.limit.to_be_bytes().to_vec(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let field = if self.bytes { "bytes" } else { "packets" };
        format!("ct {field} {} {}", if negated { ">" } else { "<=" }, self.limit)
    }
}

// uapi/linux/netfilter/nf_tables.h
const CT_PACKETS: u32 = 14;
const CT_BYTES: u32 = 15;
const NFTA_BYTEORDER_SREG: u16 = 1;
const NFTA_BYTEORDER_DREG: u16 = 2;
const NFTA_BYTEORDER_OP: u16 = 3;
const NFTA_BYTEORDER_LEN: u16 = 4;
const NFTA_BYTEORDER_SIZE: u16 = 5;
const NFT_BYTEORDER_HTON: u32 = 1;
