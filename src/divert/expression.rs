//! Encodes the expressions of a rule. This module uses no socket.

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Meta, MetaKey, Operator,
    Payload, Register, Verdict, VerdictAttribute,
};

use super::rule::{Family, Network, Rule, RuleAction};

/// How a rule sends packets to a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueMethod {
    /// The `queue` expression of nf_tables (`NFT_QUEUE`).
    Expression,
    /// The `NFQUEUE` target of xtables, revision 3 (`NFT_COMPAT`, `NETFILTER_XT_TARGET_NFQUEUE`).
    Target,
}

/// Encodes the conditions of a rule and then its action. If a comparison fails, the kernel skips
/// the rest of the rule.
pub(super) fn expressions(
    rule: &Rule,
    action: RuleAction,
    method: QueueMethod,
) -> Vec<ListAttribute<ExpressionAttribute>> {
    let mut list: Vec<Expressions> = Vec::new();
    // The family comes first, because the offsets of the addresses depend on it.
    let networks = [rule.source, rule.destination];
    if let Some(family) = rule.family.or_else(|| networks.into_iter().flatten().map(Network::family).next()) {
        let number = match family {
            Family::Ipv4 => NFPROTO_IPV4,
            Family::Ipv6 => NFPROTO_IPV6,
        };
        list.extend([meta(MetaKey::Nfproto), equal(vec![number])]);
    }
    if let Some(name) = &rule.interface {
        let key = if super::rule::sees_input(rule.hook) { MetaKey::Iifname } else { MetaKey::Oifname };
        // The register holds the name, padded with zeros (`nft_meta_store_ifname`).
        let mut padded = name.clone().into_bytes();
        padded.resize(IFNAMSIZ, 0);
        list.extend([meta(key), equal(padded)]);
    }
    for (network, end) in networks.into_iter().zip([Endpoint::Source, Endpoint::Destination]) {
        if let Some(network) = network {
            list.extend([address(network.family(), end), masked(network.mask()), equal(network.network())]);
        }
    }
    for mark in &rule.marks {
        let operator = if mark.equal { Operator::Equal } else { Operator::NotEqual };
        list.extend([
            meta(MetaKey::Mark),
            masked(mark.mask.to_ne_bytes().to_vec()),
            compare(operator, mark.value.to_ne_bytes().to_vec()),
        ]);
    }
    if let Some(protocol) = rule.protocol {
        list.extend([meta(MetaKey::L4Proto), equal(vec![protocol.number()])]);
    }
    for (end, number) in [(Endpoint::Source, rule.source_port), (Endpoint::Destination, rule.destination_port)] {
        if let Some(number) = number {
            list.extend([port(end), equal(number.to_be_bytes().to_vec())]);
        }
    }
    list.push(match action {
        RuleAction::Drop => verdict(NF_DROP),
        RuleAction::Accept => verdict(NF_ACCEPT),
        RuleAction::Queue(first, last) => {
            let total = last.saturating_sub(first).saturating_add(1);
            match method {
                QueueMethod::Expression => queue_expression(rule, first, total),
                QueueMethod::Target => queue_target(rule, first, total),
            }
        }
    });
    list.into_iter().map(Into::into).collect()
}

fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::DestinationRegister(Register::Reg1), Meta::Key(key)])
}

/// Selects the source or the destination of a packet.
#[derive(Debug, Clone, Copy)]
enum Endpoint {
    Source,
    Destination,
}

fn address(family: Family, end: Endpoint) -> Expressions {
    let (offset, length) = match (family, end) {
        (Family::Ipv4, Endpoint::Source) => (12, 4),
        (Family::Ipv4, Endpoint::Destination) => (16, 4),
        (Family::Ipv6, Endpoint::Source) => (8, 16),
        (Family::Ipv6, Endpoint::Destination) => (24, 16),
    };
    payload(NFT_PAYLOAD_NETWORK_HEADER, offset, length)
}

fn port(end: Endpoint) -> Expressions {
    let offset = match end {
        Endpoint::Source => 0,
        Endpoint::Destination => 2,
    };
    payload(NFT_PAYLOAD_TRANSPORT_HEADER, offset, 2)
}

fn payload(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn equal(value: Vec<u8>) -> Expressions {
    compare(Operator::Equal, value)
}

fn compare(operator: Operator, value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

/// `register = register & mask ^ 0`.
fn masked(mask: Vec<u8>) -> Expressions {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(mask.len() as u32),
        Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
        Bitwise::Mask(DataAttribute::Value(mask)),
    ])
}

fn verdict(code: u32) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(Verdict::Other(code))])),
    ])
}

fn queue_expression(rule: &Rule, first: u16, total: u16) -> Expressions {
    let flags = flag(rule.bypass, NFT_QUEUE_FLAG_BYPASS) | flag(rule.fanout, NFT_QUEUE_FLAG_CPU_FANOUT);
    let attributes = [(NFTA_QUEUE_NUM, first), (NFTA_QUEUE_TOTAL, total), (NFTA_QUEUE_FLAGS, flags)]
        .map(|(kind, value)| DefaultNla::new(kind, value.to_be_bytes().to_vec()))
        .to_vec();
    Expressions::Other { expression_type: "queue".to_owned(), attributes }
}

/// `struct xt_NFQ_info_v3 { u16 queuenum, queues_total, flags; }` in host byte order, padded as
/// `XT_ALIGN` requires.
fn queue_target(rule: &Rule, first: u16, total: u16) -> Expressions {
    let flags = flag(rule.bypass, NFQ_FLAG_BYPASS) | flag(rule.fanout, NFQ_FLAG_CPU_FANOUT);
    let info = [first, total, flags, 0].into_iter().flat_map(u16::to_ne_bytes).collect();
    let attributes = vec![
        DefaultNla::new(NFTA_TARGET_NAME, b"NFQUEUE\0".to_vec()),
        DefaultNla::new(NFTA_TARGET_REV, 3_u32.to_be_bytes().to_vec()),
        DefaultNla::new(NFTA_TARGET_INFO, info),
    ];
    Expressions::Other { expression_type: "target".to_owned(), attributes }
}

fn flag(on: bool, bit: u16) -> u16 {
    if on { bit } else { 0 }
}

// uapi/linux/netfilter/nf_tables.h
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
const NFT_QUEUE_FLAG_BYPASS: u16 = 1;
const NFT_QUEUE_FLAG_CPU_FANOUT: u16 = 2;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
// uapi/linux/netfilter/nf_tables_compat.h
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_REV: u16 = 2;
const NFTA_TARGET_INFO: u16 = 3;
// uapi/linux/netfilter/xt_NFQUEUE.h; the values are those of `NFT_QUEUE_FLAG_*`.
const NFQ_FLAG_BYPASS: u16 = 1;
const NFQ_FLAG_CPU_FANOUT: u16 = 2;
// uapi/linux/netfilter.h
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// The maximum length of an interface name with its NUL, uapi/linux/if.h.
const IFNAMSIZ: usize = 16;

#[cfg(test)]
mod tests {
    use crate::Hook;

    use std::net::Ipv4Addr;

    use netlink_packet_core::{Emitable, NLA_F_NESTED};

    use super::{super::rule::Protocol, *};

    /// An attribute in the format of the kernel, with padding.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | NLA_F_NESTED, &attributes.concat())
    }

    /// NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA }
    fn expression(name: &[u8], attributes: &[Vec<u8>]) -> Vec<u8> {
        nested(1, &[attribute(1, name), nested(2, attributes)])
    }

    fn load(key: u8) -> Vec<u8> {
        expression(b"meta\0", &[attribute(1, &[0, 0, 0, 1]), attribute(2, &[0, 0, 0, key])])
    }

    fn compare(operator: u8, value: &[u8]) -> Vec<u8> {
        let register = attribute(1, &[0, 0, 0, 1]);
        expression(b"cmp\0", &[register, attribute(2, &[0, 0, 0, operator]), nested(3, &[attribute(1, value)])])
    }

    fn load_header(base: u8, offset: u8, length: u8) -> Vec<u8> {
        let numbers = [1, base, offset, length].into_iter().zip(1..);
        let attributes: Vec<_> = numbers.map(|(number, kind)| attribute(kind, &[0, 0, 0, number])).collect();
        expression(b"payload\0", &attributes)
    }

    fn mask(mask: &[u8]) -> Vec<u8> {
        let [register, length] = [1, mask.len() as u8].map(|number| [0, 0, 0, number]);
        let xor = nested(5, &[attribute(1, &vec![0; mask.len()])]);
        let mask = nested(4, &[attribute(1, mask)]);
        expression(b"bitwise\0", &[attribute(1, &register), attribute(2, &register), attribute(3, &length), xor, mask])
    }

    fn encoded(rule: &Rule, method: QueueMethod) -> Vec<u8> {
        let list = expressions(rule, rule.check().unwrap(), method);
        let mut bytes = vec![0; list.as_slice().buffer_len()];
        list.as_slice().emit(&mut bytes);
        bytes
    }

    #[test]
    fn queue_expression_is_encoded() {
        let rule = Rule::new(Hook::Output).to_queues(0x1234..=0x1237);
        let numbers = |flags| [attribute(1, &[0x12, 0x34]), attribute(2, &[0, 4]), attribute(3, &[0, flags])];
        assert_eq!(encoded(&rule, QueueMethod::Expression), expression(b"queue\0", &numbers(0)));
        assert_eq!(encoded(&rule.clone().bypass(true), QueueMethod::Expression), expression(b"queue\0", &numbers(1)));
        assert_eq!(encoded(&rule.fanout(true), QueueMethod::Expression), expression(b"queue\0", &numbers(2)));
    }

    #[test]
    fn queue_target_is_encoded() {
        let rule = Rule::new(Hook::Output).to_queue(u16::MAX);
        let target = |info: [u16; 4]| {
            let info: Vec<u8> = info.into_iter().flat_map(u16::to_ne_bytes).collect();
            expression(b"target\0", &[attribute(1, b"NFQUEUE\0"), attribute(2, &[0, 0, 0, 3]), attribute(3, &info)])
        };
        assert_eq!(encoded(&rule, QueueMethod::Target), target([u16::MAX, 1, 0, 0]));
        assert_eq!(encoded(&rule.clone().bypass(true).fanout(true), QueueMethod::Target), target([u16::MAX, 1, 3, 0]));
        assert_eq!(encoded(&rule.to_queues(1..=u16::MAX), QueueMethod::Target), target([1, u16::MAX, 0, 0]));
    }

    #[test]
    fn conditions_are_encoded_in_order() {
        let rule = Rule::new(Hook::Input)
            .protocol(Protocol::Tcp)
            .source_port(80)
            .destination_port(0x1f90)
            .interface("lo")
            .mark(0x12, 0xff)
            .unless_mark(0x8000_0000, 0x8000_0000)
            .ipv6()
            .drop();
        let expected = [
            load(15),
            compare(0, &[10]),
            load(6),
            compare(0, b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            load(3),
            mask(&0xff_u32.to_ne_bytes()),
            compare(0, &0x12_u32.to_ne_bytes()),
            load(3),
            mask(&0x8000_0000_u32.to_ne_bytes()),
            compare(1, &0x8000_0000_u32.to_ne_bytes()),
            load(16),
            compare(0, &[6]),
            load_header(2, 0, 2),
            compare(0, &[0, 80]),
            load_header(2, 2, 2),
            compare(0, &[0x1f, 0x90]),
            // NFTA_IMMEDIATE_DREG 0, NFTA_IMMEDIATE_DATA { NFTA_DATA_VERDICT { NFTA_VERDICT_CODE
            // NF_DROP } }
            expression(
                b"immediate\0",
                &[attribute(1, &[0; 4]), nested(2, &[nested(2, &[attribute(1, &[0, 0, 0, 0])])])],
            ),
        ];
        assert_eq!(encoded(&rule, QueueMethod::Expression), expected.concat());
    }

    #[test]
    fn address_adds_a_condition_on_the_family() {
        let rule = Rule::new(Hook::Output).destination_address(Ipv4Addr::new(10, 1, 2, 3), 8).accept();
        let expected = [
            load(15),
            compare(0, &[2]),
            load_header(1, 16, 4),
            mask(&[0xff, 0, 0, 0]),
            compare(0, &[10, 0, 0, 0]),
            expression(
                b"immediate\0",
                &[attribute(1, &[0; 4]), nested(2, &[nested(2, &[attribute(1, &[0, 0, 0, 1])])])],
            ),
        ];
        assert_eq!(encoded(&rule, QueueMethod::Target), expected.concat());
    }

    #[test]
    fn hook_selects_input_or_output_interface() {
        for (hook, key) in
            [(Hook::Prerouting, 6), (Hook::Input, 6), (Hook::Forward, 6), (Hook::Output, 7), (Hook::Postrouting, 7)]
        {
            let bytes = encoded(&Rule::new(hook).interface("a").accept(), QueueMethod::Expression);
            assert!(bytes.starts_with(&load(key)), "{hook:?}");
        }
    }
}
