//! Encodes the expressions of a rule. This module uses no socket.

use std::time::Duration;

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, Nla};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Immediate, Lookup, Meta, MetaKey, Operator, Payload, Register, Verdict,
    VerdictAttribute,
};

use super::family::IpVersion;

/// How a rule sends packets to a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueMethod {
    /// The `queue` expression of nf_tables (`NFT_QUEUE`).
    Expression,
    /// The `NFQUEUE` target of xtables, revision 3 (`NFT_COMPAT`, `NETFILTER_XT_TARGET_NFQUEUE`).
    Target,
}

/// How the expressions of a transaction are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encoding {
    pub(super) method: QueueMethod,
    /// Leaves out what registers hooks: expressions of connection tracking. To abort a trial, the
    /// kernel would unregister these hooks, which drops all queued packets.
    pub(super) trial: bool,
}

/// Collects the expressions of a rule, and the anonymous sets that they look up.
#[derive(Debug)]
pub(super) struct Encoder {
    pub(super) encoding: Encoding,
    list: Vec<DefaultNla>,
    sets: Vec<AnonymousSet>,
    /// The id of the next set. It is unique in a transaction.
    next_set: u32,
}

/// A set that belongs to one rule and is removed with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AnonymousSet {
    pub(super) id: u32,
    pub(super) value_type: ValueType,
    /// Ascending ranges that do not touch.
    pub(super) ranges: Vec<Range>,
}

/// The first and the last value. Addresses and ports are numbers in host byte order.
pub(super) type Range = (u128, u128);

/// A type of nft's values: its number, its length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ValueType {
    pub(super) number: u32,
    pub(super) length: usize,
}

impl ValueType {
    /// In network byte order.
    pub(super) fn bytes(self, value: u128) -> Vec<u8> {
        let bytes = value.to_be_bytes();
        bytes[bytes.len() - self.length..].to_vec()
    }

    pub(super) fn highest(self) -> u128 {
        u128::MAX >> (128 - 8 * self.length)
    }
}

// The kernel only stores the numbers; `nft` uses them to print the elements of a set.
pub(super) const IPV4_ADDRESS: ValueType = ValueType { number: 7, length: 4 };
pub(super) const IPV6_ADDRESS: ValueType = ValueType { number: 8, length: 16 };
pub(super) const PROTOCOL: ValueType = ValueType { number: 12, length: 1 };
pub(super) const PORT: ValueType = ValueType { number: 13, length: 2 };

/// The type of the elements of a set with several fields, for `nft`: 6 bits for each field.
pub(super) fn concatenated(fields: impl IntoIterator<Item = ValueType>) -> u32 {
    fields.into_iter().fold(0, |number, field| number << 6 | field.number)
}

impl Encoder {
    /// `next_set` is the id of the first anonymous set.
    pub(super) fn new(encoding: Encoding, next_set: u32) -> Self {
        Self { encoding, list: Vec::new(), sets: Vec::new(), next_set }
    }

    /// The elements of the list `NFTA_RULE_EXPRESSIONS`, and the sets.
    pub(super) fn finish(self) -> (Vec<DefaultNla>, Vec<AnonymousSet>) {
        (self.list, self.sets)
    }

    /// The attributes become bytes at once. In a tree of attributes each counts the lengths of all
    /// within it several times, so that the time doubles with each level (`Emitable`).
    pub(super) fn expression<A: Nla>(&mut self, name: &str, attributes: &[A]) {
        let expression = [text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, attributes)];
        self.list.push(nested(NFTA_LIST_ELEM, &expression));
    }

    /// Loads metadata of the packet into the first register.
    pub(super) fn meta(&mut self, key: MetaKey) {
        self.meta_into(key, REG_1);
    }

    pub(super) fn meta_into(&mut self, key: MetaKey, register: u32) {
        self.expression("meta", &[Meta::DestinationRegister(Register::Other(register)), Meta::Key(key)]);
    }

    /// Stores the first register in metadata of the packet.
    pub(super) fn set_meta(&mut self, key: MetaKey) {
        self.expression("meta", &[Meta::Key(key), Meta::SourceRegister(Register::Other(REG_1))]);
    }

    /// Loads a field of the connection into the first register.
    pub(super) fn connection(&mut self, key: u32) {
        if self.encoding.trial {
            return self.meta(MetaKey::Mark);
        }
        self.expression("ct", &[number(NFTA_CT_DREG, REG_1), number(NFTA_CT_KEY, key)]);
    }

    /// Stores the first register in a field of the connection.
    pub(super) fn set_connection(&mut self, key: u32) {
        if !self.encoding.trial {
            self.expression("ct", &[number(NFTA_CT_KEY, key), number(NFTA_CT_SREG, REG_1)]);
        }
    }

    /// Loads the source or the destination address into a register.
    pub(super) fn address(&mut self, version: IpVersion, end: Endpoint, register: u32) {
        let (offset, length) = address(version, end);
        self.payload(NFT_PAYLOAD_NETWORK_HEADER, offset, length, register);
    }

    /// That of the packet that an ICMP error quotes.
    pub(super) fn quoted_address(&mut self, version: IpVersion, end: Endpoint, register: u32) {
        let (offset, length) = address(version, end);
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, QUOTED + offset, length, register);
    }

    /// Loads the protocol of the packet that an ICMP error quotes into a register.
    pub(super) fn quoted_protocol(&mut self, version: IpVersion, register: u32) {
        let offset = match version {
            IpVersion::V4 => 9,
            IpVersion::V6 => 6,
        };
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, QUOTED + offset, 1, register);
    }

    /// Loads a port of the packet that an ICMP error quotes, whose header has no options, into a
    /// register.
    pub(super) fn quoted_port(&mut self, version: IpVersion, end: Endpoint, register: u32) {
        let header = match version {
            IpVersion::V4 => 20,
            IpVersion::V6 => 40,
        };
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, QUOTED + header + port(end), 2, register);
    }

    /// Loads what connection tracking has in place of the ports of an echo request into two
    /// registers: identifier, type and code. The packet is the request.
    pub(super) fn echo_request(&mut self, register: u32) {
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 4, 2, register);
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2, register + 1);
    }

    /// The same, if the packet is the reply.
    pub(super) fn echo_reply(&mut self, version: IpVersion, register: u32) {
        self.echo_request(register);
        let other_type = match version {
            IpVersion::V4 => 8,
            IpVersion::V6 => 128 ^ 129,
        };
        self.bitwise_in(Register::Other(register + 1), vec![0xff; 2], vec![other_type, 0]);
    }

    /// Loads the ports of a protocol without ports, as connection tracking has them, into two
    /// registers.
    pub(super) fn no_ports(&mut self, register: u32) {
        self.expression(
            "immediate",
            &[
                Immediate::DestinationRegister(Register::Other(register)),
                Immediate::Data(DataAttribute::Value(vec![0; 8])),
            ],
        );
    }

    /// Loads the source or the destination port into a register.
    pub(super) fn port(&mut self, end: Endpoint, register: u32) {
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, port(end), 2, register);
    }

    /// Loads a byte of the transport header into the first register.
    pub(super) fn transport_byte(&mut self, offset: u32) {
        self.transport(offset, 1);
    }

    /// Loads up to 16 bytes of the transport header into the first register.
    pub(super) fn transport(&mut self, offset: u32, length: u32) {
        self.payload(NFT_PAYLOAD_TRANSPORT_HEADER, offset, length, REG_1);
    }

    /// Loads one byte of the network header into the first register.
    pub(super) fn network_byte(&mut self, offset: u32) {
        self.payload(NFT_PAYLOAD_NETWORK_HEADER, offset, 1, REG_1);
    }

    /// Loads 1 into the first register if an IPv6 packet has this extension header, otherwise 0.
    pub(super) fn has_extension(&mut self, header: u8) {
        self.expression(
            "exthdr",
            &[
                number(NFTA_EXTHDR_DREG, REG_1),
                DefaultNla::new(NFTA_EXTHDR_TYPE, vec![header]),
                number(NFTA_EXTHDR_OFFSET, 0),
                number(NFTA_EXTHDR_LEN, 1),
                number(NFTA_EXTHDR_FLAGS, NFT_EXTHDR_F_PRESENT),
            ],
        );
    }

    /// Loads the TTL or the hop limit into the first register.
    pub(super) fn ttl(&mut self, version: IpVersion) {
        self.payload(NFT_PAYLOAD_NETWORK_HEADER, ttl(version), 1, REG_1);
    }

    /// Stores the first byte of the first register as TTL or hop limit.
    pub(super) fn set_ttl(&mut self, version: IpVersion) {
        let mut attributes = vec![
            number(NFTA_PAYLOAD_SREG, REG_1),
            number(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER),
            number(NFTA_PAYLOAD_OFFSET, ttl(version)),
            number(NFTA_PAYLOAD_LEN, 1),
        ];
        if version == IpVersion::V4 {
            let checksum = [(NFTA_PAYLOAD_CSUM_TYPE, NFT_PAYLOAD_CSUM_INET), (NFTA_PAYLOAD_CSUM_OFFSET, 10)];
            attributes.extend(checksum.map(|(kind, value)| number(kind, value)));
        }
        self.expression("payload", &attributes);
    }

    /// Loads the EtherType of the frame into the first register. Ends the rule for packets without
    /// a link-layer header. That of a frame with a VLAN tag is the VLAN's.
    pub(super) fn ethertype(&mut self) {
        self.payload(NFT_PAYLOAD_LL_HEADER, 12, 2, REG_1);
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.expression(
            "payload",
            &[
                Payload::DestinationRegister(Register::Other(register)),
                Payload::Base(base),
                Payload::Offset(offset),
                Payload::Len(length),
            ],
        );
    }

    /// Continues with the rule if the first register has this value, or if `negated` and it has
    /// not.
    pub(super) fn equal(&mut self, value: Vec<u8>, negated: bool) {
        let operator = if negated { Operator::NotEqual } else { Operator::Equal };
        self.expression(
            "cmp",
            &[Cmp::SourceRegister(Register::Reg1), Cmp::Op(operator), Cmp::Data(DataAttribute::Value(value))],
        );
    }

    /// Continues with the rule if the first register, in network byte order, is at most this value,
    /// or if `negated` and it is greater.
    pub(super) fn at_most(&mut self, value: Vec<u8>, negated: bool) {
        let operator = if negated { Operator::GreaterThan } else { Operator::LessThanEqual };
        self.expression(
            "cmp",
            &[Cmp::SourceRegister(Register::Reg1), Cmp::Op(operator), Cmp::Data(DataAttribute::Value(value))],
        );
    }

    /// `register = register & mask ^ change`, for the first register.
    pub(super) fn bitwise(&mut self, mask: Vec<u8>, change: Vec<u8>) {
        self.bitwise_in(Register::Reg1, mask, change);
    }

    fn bitwise_in(&mut self, register: Register, mask: Vec<u8>, change: Vec<u8>) {
        self.expression(
            "bitwise",
            &[
                Bitwise::SourceRegister(register),
                Bitwise::DestinationRegister(register),
                Bitwise::Length(mask.len() as u32),
                Bitwise::Xor(DataAttribute::Value(change)),
                Bitwise::Mask(DataAttribute::Value(mask)),
            ],
        );
    }

    pub(super) fn mask(&mut self, mask: Vec<u8>) {
        let zeros = vec![0; mask.len()];
        self.bitwise(mask, zeros);
    }

    /// Continues with the rule if the first register is in one of the ranges, or if `negated` and
    /// it is in none. The ranges are [merged](merge).
    ///
    /// A few ranges are compared one by one, single values are looked up in a set with a hash, and
    /// many ranges in a set with a tree. The tree is avoided because a lookup in it can miss while
    /// a transaction replaces it: seen on Linux 6.18 in 9 of 14 runs of 20 000 packets, and with a
    /// hash or comparisons in none of 43.
    pub(super) fn one_of(&mut self, value_type: ValueType, ranges: &[Range], negated: bool) {
        match ranges {
            [(first, last)] if first == last => self.equal(value_type.bytes(*first), negated),
            _ => {
                // A comparison excludes a range. To be in one of the ranges is to be in none of
                // the gaps between them.
                let gaps = complement(ranges, value_type.highest());
                let several = ranges.len() > 1;
                let intervals = ranges.iter().any(|(first, last)| first != last);
                match (several, negated) {
                    (false, _) => ranges.iter().for_each(|range| self.range(value_type, *range, negated)),
                    (true, true) if intervals && ranges.len() <= COMPARISONS => {
                        ranges.iter().for_each(|range| self.range(value_type, *range, true));
                    }
                    (true, false) if intervals && gaps.len() <= COMPARISONS => {
                        gaps.iter().for_each(|gap| self.range(value_type, *gap, true));
                    }
                    _ => self.anonymous_set(value_type, ranges, negated),
                }
            }
        }
    }

    fn range(&mut self, value_type: ValueType, (first, last): Range, negated: bool) {
        let data = |kind, value| {
            let value = DefaultNla::new(NFTA_DATA_VALUE, value_type.bytes(value));
            nested(kind, &[value])
        };
        let attributes = vec![
            number(NFTA_RANGE_SREG, REG_1),
            number(NFTA_RANGE_OP, u32::from(negated)),
            data(NFTA_RANGE_FROM_DATA, first),
            data(NFTA_RANGE_TO_DATA, last),
        ];
        self.expression("range", &attributes);
    }

    fn anonymous_set(&mut self, value_type: ValueType, ranges: &[Range], negated: bool) {
        let id = self.next_set;
        self.next_set += 1;
        self.sets.push(AnonymousSet { id, value_type, ranges: ranges.to_vec() });
        self.expression(
            "lookup",
            &[
                Lookup::Set(ANONYMOUS.to_owned()),
                Lookup::SourceRegister(Register::Reg1),
                Lookup::Other(number(NFTA_LOOKUP_SET_ID, id)),
                Lookup::Other(number(NFTA_LOOKUP_FLAGS, u32::from(negated))),
            ],
        );
    }

    /// Looks the registers from the first on up in a named set.
    pub(super) fn named_set(&mut self, name: &str, negated: bool) {
        self.expression(
            "lookup",
            &[
                Lookup::Set(name.to_owned()),
                Lookup::SourceRegister(Register::Reg1),
                Lookup::Other(number(NFTA_LOOKUP_FLAGS, u32::from(negated))),
            ],
        );
    }

    pub(super) fn verdict(&mut self, code: u32) {
        self.expression(
            "immediate",
            &[
                Immediate::DestinationRegister(Register::Verdict),
                Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(Verdict::Other(code))])),
            ],
        );
    }

    /// Continues in another chain.
    pub(super) fn chain(&mut self, code: i32, chain: String) {
        self.expression(
            "immediate",
            &[
                Immediate::DestinationRegister(Register::Verdict),
                Immediate::Data(DataAttribute::Verdict(vec![
                    VerdictAttribute::Code(Verdict::Other(code as u32)),
                    VerdictAttribute::Chain(chain),
                ])),
            ],
        );
    }

    /// Adds the registers from the first on to a named set, or lets the time-out of the element
    /// begin anew. If the set is full, the rest of the rule is skipped.
    ///
    /// For a map, the data is in the registers from `data` on. The data of an element that exists
    /// stays as it is.
    pub(super) fn update_set(&mut self, name: &str, data: Option<u32>) {
        let mut attributes = vec![
            text(NFTA_DYNSET_SET_NAME, name),
            number(NFTA_DYNSET_OP, NFT_DYNSET_OP_UPDATE),
            number(NFTA_DYNSET_SREG_KEY, REG_1),
        ];
        attributes.extend(data.map(|register| number(NFTA_DYNSET_SREG_DATA, register)));
        self.expression("dynset", &attributes);
    }

    /// Adds the registers from the first on to a named set, for this time. An element that exists
    /// stays as it is.
    pub(super) fn add_to_set(&mut self, name: &str, timeout: Duration) {
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let attributes = [
            text(NFTA_DYNSET_SET_NAME, name),
            number(NFTA_DYNSET_OP, NFT_DYNSET_OP_ADD),
            number(NFTA_DYNSET_SREG_KEY, REG_1),
            DefaultNla::new(NFTA_DYNSET_TIMEOUT, milliseconds.to_be_bytes().to_vec()),
        ];
        self.expression("dynset", &attributes);
    }

    /// Deletes the element in the registers from the first on, if it is there (`nft_rhash_delete`).
    pub(super) fn delete_from_set(&mut self, name: &str) {
        let attributes = [
            text(NFTA_DYNSET_SET_NAME, name),
            number(NFTA_DYNSET_OP, NFT_DYNSET_OP_DELETE),
            number(NFTA_DYNSET_SREG_KEY, REG_1),
        ];
        self.expression("dynset", &attributes);
    }

    /// Loads bytes into the first register.
    pub(super) fn value(&mut self, value: Vec<u8>) {
        self.expression(
            "immediate",
            &[Immediate::DestinationRegister(Register::Reg1), Immediate::Data(DataAttribute::Value(value))],
        );
    }
}

/// Offset and length in the network header.
fn address(version: IpVersion, end: Endpoint) -> (u32, u32) {
    match (version, end) {
        (IpVersion::V4, Endpoint::Source) => (12, 4),
        (IpVersion::V4, Endpoint::Destination) => (16, 4),
        (IpVersion::V6, Endpoint::Source) => (8, 16),
        (IpVersion::V6, Endpoint::Destination) => (24, 16),
    }
}

/// Offset in the network header.
fn ttl(version: IpVersion) -> u32 {
    match version {
        IpVersion::V4 => 8,
        IpVersion::V6 => 7,
    }
}

/// Offset in the transport header.
fn port(end: Endpoint) -> u32 {
    match end {
        Endpoint::Source => 0,
        Endpoint::Destination => 2,
    }
}

/// Where an ICMP error quotes a packet.
const QUOTED: u32 = 8;

/// Selects the source or the destination of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Source,
    Destination,
}

/// An attribute with a number of 32 bits in network byte order.
pub(super) fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

/// An attribute with a text.
pub(super) fn text(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), b"\0"].concat())
}

/// An attribute that contains attributes.
pub(super) fn nested(kind: u16, attributes: &[impl Nla]) -> DefaultNla {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

/// Sorts ranges, and merges those that overlap or touch.
pub(super) fn merge(ranges: impl IntoIterator<Item = Range>) -> Vec<Range> {
    let mut sorted: Vec<Range> = ranges.into_iter().collect();
    sorted.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The values in none of the [merged](merge) ranges.
pub(super) fn complement(ranges: &[Range], highest: u128) -> Vec<Range> {
    let mut rest = Vec::new();
    let mut next = Some(0);
    for (first, last) in ranges {
        if let Some(next) = next.filter(|next| next < first) {
            rest.push((next, first - 1));
        }
        next = last.checked_add(1);
    }
    rest.extend(next.filter(|next| *next <= highest).map(|next| (next, highest)));
    rest
}

/// A rule of the kernel has at most 128 expressions (`NFT_RULE_MAXEXPRS`).
const COMPARISONS: usize = 16;

/// The kernel replaces `%d` by a number.
pub(super) const ANONYMOUS: &str = "__set%d";

// uapi/linux/netfilter/nf_tables.h
/// The first register of 16 bytes. Its parts of 4 bytes are the registers from `REG32_00` on.
pub(super) const REG_1: u32 = 1;
pub(super) const REG32_00: u32 = 8;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
pub(super) const NFTA_DATA_VALUE: u16 = 1;
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFTA_RANGE_SREG: u16 = 1;
const NFTA_RANGE_OP: u16 = 2;
const NFTA_RANGE_FROM_DATA: u16 = 3;
const NFTA_RANGE_TO_DATA: u16 = 4;
const NFTA_DYNSET_SET_NAME: u16 = 1;
const NFTA_DYNSET_OP: u16 = 3;
const NFTA_DYNSET_SREG_KEY: u16 = 4;
const NFTA_DYNSET_SREG_DATA: u16 = 5;
const NFTA_DYNSET_TIMEOUT: u16 = 6;
const NFT_DYNSET_OP_ADD: u32 = 0;
const NFT_DYNSET_OP_UPDATE: u32 = 1;
const NFT_DYNSET_OP_DELETE: u32 = 2;
const NFTA_LOOKUP_SET_ID: u16 = 4;
const NFTA_LOOKUP_FLAGS: u16 = 5;
const NFTA_EXTHDR_DREG: u16 = 1;
const NFTA_EXTHDR_TYPE: u16 = 2;
const NFTA_EXTHDR_OFFSET: u16 = 3;
const NFTA_EXTHDR_LEN: u16 = 4;
const NFTA_EXTHDR_FLAGS: u16 = 5;
const NFT_EXTHDR_F_PRESENT: u32 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_PAYLOAD_SREG: u16 = 5;
const NFTA_PAYLOAD_CSUM_TYPE: u16 = 6;
const NFTA_PAYLOAD_CSUM_OFFSET: u16 = 7;
const NFT_PAYLOAD_CSUM_INET: u32 = 1;
const NFT_PAYLOAD_LL_HEADER: u32 = 0;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_merged_if_they_overlap_or_touch() {
        assert_eq!(merge([(5, 7), (1, 2), (3, 4), (6, 9), (11, 11)]), [(1, 9), (11, 11)]);
        assert_eq!(merge([(0, u128::MAX), (3, 4)]), [(0, u128::MAX)]);
        assert!(merge([]).is_empty());
    }

    #[test]
    fn complement_is_what_the_ranges_leave() {
        assert_eq!(complement(&[(2, 3), (5, 9)], 9), [(0, 1), (4, 4)]);
        assert_eq!(complement(&[], 9), [(0, 9)]);
        assert_eq!(complement(&[(0, u128::MAX)], u128::MAX), []);
    }

    #[test]
    fn only_many_ranges_need_a_tree() {
        let sets = |ranges: &[Range], negated| {
            let encoding = Encoding { method: QueueMethod::Expression, trial: false };
            let mut encoder = Encoder::new(encoding, 1);
            encoder.one_of(PORT, ranges, negated);
            let (list, sets) = encoder.finish();
            (list.len(), sets.len())
        };
        assert_eq!(sets(&[(5, 5)], false), (1, 0));
        assert_eq!(sets(&[(5, 6)], false), (1, 0));
        assert_eq!(sets(&[(5, 6), (8, 8)], false), (3, 0));
        assert_eq!(sets(&[(5, 6), (8, 8)], true), (2, 0));
        assert_eq!(sets(&[(0, 6), (8, 65535)], false), (1, 0));
        assert_eq!(sets(&[(5, 5), (8, 8)], false), (1, 1));
        let many: Vec<Range> = (0..17).map(|number| (3 * number, 3 * number + 1)).collect();
        assert_eq!(sets(&many, true), (1, 1));
    }

    #[test]
    fn values_are_in_network_byte_order() {
        assert_eq!(PORT.bytes(0x1234), [0x12, 0x34]);
        assert_eq!(IPV4_ADDRESS.bytes(0x0a00_0001), [10, 0, 0, 1]);
        assert_eq!(PORT.highest(), 65535);
        assert_eq!(IPV6_ADDRESS.highest(), u128::MAX);
    }
}
