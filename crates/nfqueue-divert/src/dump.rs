//! Reads the kernel's dumps of rules and of the elements of sets. It cannot panic on any input.

use std::{collections::HashSet, time::Duration};

use netlink_packet_core::NLA_TYPE_MASK;

/// The packets that a rule has matched, from [`Divert::counters`](super::Divert::counters).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct RuleCounter {
    /// The number of packets.
    pub packets: u64,
    /// The sum of their lengths in bytes, from the IP header on.
    pub bytes: u64,
}

/// The chain and the counter of a rule, from the attributes of a message.
pub(super) fn counter(rule: &[u8]) -> Option<(String, RuleCounter)> {
    let chain = String::from_utf8_lossy(attribute(rule, NFTA_RULE_CHAIN)?).trim_end_matches('\0').to_owned();
    let expressions = attribute(rule, NFTA_RULE_EXPRESSIONS)?;
    let data = attributes(expressions).find_map(|(_, expression)| {
        let name = attribute(expression, NFTA_EXPR_NAME)?;
        if name == b"counter\0" { attribute(expression, NFTA_EXPR_DATA) } else { None }
    })?;
    let counter = RuleCounter {
        packets: long(attribute(data, NFTA_COUNTER_PACKETS)?)?,
        bytes: long(attribute(data, NFTA_COUNTER_BYTES)?)?,
    };
    Some((chain, counter))
}

/// The keys of elements, and the times until they expire, from the attributes of a message.
pub(super) fn elements(list: &[u8]) -> Vec<(Vec<u8>, Option<Duration>)> {
    let Some(elements) = attribute(list, NFTA_SET_ELEM_LIST_ELEMENTS) else { return Vec::new() };
    attributes(elements)
        .filter_map(|(_, element)| {
            let key = attribute(attribute(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec();
            let expires = attribute(element, NFTA_SET_ELEM_EXPIRATION).and_then(long).map(Duration::from_millis);
            Some((key, expires))
        })
        .collect()
}

/// The keys of the elements of a set, from its messages.
pub(super) fn keys(lists: &[Vec<u8>]) -> HashSet<Vec<u8>> {
    lists.iter().flat_map(|list| elements(list)).map(|(key, _)| key).collect()
}

/// The keys and the data of the elements of a map, from the attributes of a message.
pub(super) fn mapped(list: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let Some(elements) = attribute(list, NFTA_SET_ELEM_LIST_ELEMENTS) else { return Vec::new() };
    let value = |element, kind| Some(attribute(attribute(element, kind)?, NFTA_DATA_VALUE)?.to_vec());
    attributes(elements)
        .filter_map(|(_, element)| Some((value(element, NFTA_SET_ELEM_KEY)?, value(element, NFTA_SET_ELEM_DATA)?)))
        .collect()
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

pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(other, _)| *other == kind).map(|(_, value)| value)
}

fn long(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(value.try_into().ok()?))
}

// uapi/linux/netfilter/nf_tables.h
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_EXPIRATION: u16 = 5;
const NFTA_DATA_VALUE: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_attributes_do_not_panic() {
        for length in 0..40_u16 {
            let mut bytes = [0xff; 40];
            bytes[..2].copy_from_slice(&length.to_ne_bytes());
            bytes[2..4].copy_from_slice(&NFTA_RULE_CHAIN.to_ne_bytes());
            for end in 0..bytes.len() {
                let _ = counter(&bytes[..end]);
                let _ = elements(&bytes[..end]);
                let _ = mapped(&bytes[..end]);
            }
        }
    }
}
