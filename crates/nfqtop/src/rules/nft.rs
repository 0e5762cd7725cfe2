//! Reads the kernel's dump of nf_tables rules. It cannot panic on any input.

use netlink_packet_core::NLA_TYPE_MASK;

use super::{Counter, Rule};
use crate::kernel::printable;

/// The rule in a message's bytes after the netlink header, if it sends packets to a queue. A rule
/// of iptables-nft, or of a kernel without `NFT_QUEUE`, has the target of xtables.
pub(crate) fn rule(message: &[u8]) -> Option<Rule> {
    // struct nfgenmsg { family, version, resource id }
    let (family, attributes_of_rule) = (*message.first()?, message.get(4..)?);
    let mut found = Rule { source: "nft", family: family_name(family), ..Rule::default() };
    let mut expressions = None;
    for (kind, value) in attributes(attributes_of_rule) {
        match kind {
            NFTA_RULE_TABLE => found.table = text(value),
            NFTA_RULE_CHAIN => found.chain = text(value),
            NFTA_RULE_HANDLE => found.handle = value.try_into().ok().map(u64::from_be_bytes),
            NFTA_RULE_EXPRESSIONS => expressions = Some(value),
            _ => {}
        }
    }
    for (_, expression) in attributes(expressions?) {
        let Some(data) = attribute(expression, NFTA_EXPR_DATA) else { continue };
        match attribute(expression, NFTA_EXPR_NAME) {
            // The last one before the queue counts what is sent there.
            Some(b"counter\0") => found.counter = counter(data),
            Some(b"queue\0") => {
                queue(data, &mut found)?;
                return Some(found);
            }
            Some(b"target\0") if attribute(data, NFTA_TARGET_NAME) == Some(b"NFQUEUE\0") => {
                target(data, &mut found)?;
                return Some(found);
            }
            _ => {}
        }
    }
    None
}

fn counter(data: &[u8]) -> Option<Counter> {
    let number = |kind| Some(u64::from_be_bytes(attribute(data, kind)?.try_into().ok()?));
    Some(Counter { packets: number(NFTA_COUNTER_PACKETS)?, bytes: number(NFTA_COUNTER_BYTES)? })
}

fn queue(data: &[u8], rule: &mut Rule) -> Option<()> {
    let number = |kind| Some(u16::from_be_bytes(attribute(data, kind)?.try_into().ok()?));
    let flags = number(NFTA_QUEUE_FLAGS).unwrap_or(0);
    (rule.bypass, rule.fanout) = (flags & BYPASS != 0, flags & FANOUT != 0);
    if attribute(data, NFTA_QUEUE_SREG_QNUM).is_none() {
        rule.queues = Some(range(number(NFTA_QUEUE_NUM)?, number(NFTA_QUEUE_TOTAL).unwrap_or(1)));
    }
    Some(())
}

/// `struct xt_NFQ_info_v3` { number, total, flags }, and the shorter ones of earlier revisions, in
/// the byte order of the machine.
fn target(data: &[u8], rule: &mut Rule) -> Option<()> {
    let info = attribute(data, NFTA_TARGET_INFO)?;
    let revision =
        attribute(data, NFTA_TARGET_REV).and_then(|value| value.try_into().ok()).map_or(0, u32::from_be_bytes);
    let number = |index: usize| Some(u16::from_ne_bytes(*info.get(2 * index..)?.first_chunk()?));
    let total = if revision >= 1 { number(1)? } else { 1 };
    let flags = if revision >= 2 { number(2)? } else { 0 };
    rule.queues = Some(range(number(0)?, total));
    (rule.bypass, rule.fanout) = (flags & BYPASS != 0, flags & FANOUT != 0);
    Some(())
}

fn range(first: u16, total: u16) -> (u16, u16) {
    (first, first.saturating_add(total.max(1) - 1))
}

fn text(value: &[u8]) -> String {
    printable(String::from_utf8_lossy(value).trim_end_matches('\0'))
}

fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(other, _)| *other == kind).map(|(_, value)| value)
}

// uapi/linux/netfilter/nf_tables.h, nf_tables_compat.h and xt_NFQUEUE.h
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
const NFTA_QUEUE_SREG_QNUM: u16 = 4;
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_REV: u16 = 2;
const NFTA_TARGET_INFO: u16 = 3;
/// The same for both kinds of expressions.
const BYPASS: u16 = 1;
const FANOUT: u16 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn put(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(value.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn expression(name: &str, data: &[u8]) -> Vec<u8> {
        let name = put(NFTA_EXPR_NAME, format!("{name}\0").as_bytes());
        put(1, &[name, put(NFTA_EXPR_DATA | 0x8000, data)].concat())
    }

    fn message(expressions: &[Vec<u8>]) -> Vec<u8> {
        [
            vec![1, 0, 0, 0],
            put(NFTA_RULE_TABLE, b"filter\0"),
            put(NFTA_RULE_CHAIN, b"out\0"),
            put(NFTA_RULE_HANDLE, &4_u64.to_be_bytes()),
            put(NFTA_RULE_EXPRESSIONS | 0x8000, &expressions.concat()),
        ]
        .concat()
    }

    fn counted(packets: u64) -> Vec<u8> {
        let packets = put(NFTA_COUNTER_PACKETS, &packets.to_be_bytes());
        expression("counter", &[packets, put(NFTA_COUNTER_BYTES, &99_u64.to_be_bytes())].concat())
    }

    #[test]
    fn a_queue_statement_has_its_range_flags_and_counter() {
        let queue = [put(NFTA_QUEUE_NUM, &[0, 3]), put(NFTA_QUEUE_TOTAL, &[0, 2]), put(NFTA_QUEUE_FLAGS, &[0, 3])];
        let message = message(&[counted(1), counted(5), expression("queue", &queue.concat()), counted(9)]);
        let rule = rule(&message).unwrap();
        assert_eq!((rule.family, rule.table.as_str(), rule.chain.as_str()), ("inet", "filter", "out"));
        assert_eq!((rule.handle, rule.queues), (Some(4), Some((3, 4))));
        assert!(rule.bypass && rule.fanout);
        assert_eq!(rule.counter, Some(Counter { packets: 5, bytes: 99 }));
        for end in 0..message.len() {
            let _ = super::rule(&message[..end]);
        }
    }

    #[test]
    fn a_computed_queue_has_no_number() {
        let rule = rule(&message(&[expression("queue", &put(NFTA_QUEUE_SREG_QNUM, &[0, 0, 0, 1]))])).unwrap();
        assert_eq!((rule.queues, rule.bypass), (None, false));
    }

    #[test]
    fn the_target_of_xtables_is_read_by_its_revision() {
        let info: Vec<u8> = [7_u16, 4, 1, 0].iter().flat_map(|number| number.to_ne_bytes()).collect();
        for (revision, queues, bypass) in [(0_u32, (7, 7), false), (1, (7, 10), false), (3, (7, 10), true)] {
            let revision = put(NFTA_TARGET_REV, &revision.to_be_bytes());
            let data = [put(NFTA_TARGET_NAME, b"NFQUEUE\0"), revision, put(NFTA_TARGET_INFO, &info)].concat();
            let rule = rule(&message(&[expression("target", &data)])).unwrap();
            assert_eq!((rule.queues, rule.bypass), (Some(queues), bypass));
        }
        let other = put(NFTA_TARGET_NAME, b"LOG\0");
        assert_eq!(rule(&message(&[expression("target", &other)])), None);
    }
}
