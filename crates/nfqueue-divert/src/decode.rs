//! What this crate reads of the kernel's messages. Nothing here panics on any input, and the size
//! of a result is at most linear in that of the input.

use std::time::Duration;

use crate::{dump, dump::RuleCounter, socket};

/// The attributes of each message of a datagram, without the headers.
pub fn attributes(datagram: &[u8]) -> Vec<&[u8]> {
    const NETFILTER_HEADER: usize = 4;
    socket::messages(datagram).map(|message| message.payload().get(NETFILTER_HEADER..).unwrap_or_default()).collect()
}

/// The number of replies in a datagram.
pub fn replies(datagram: &[u8]) -> usize {
    socket::replies(datagram).len()
}

/// The chain of a rule and its counter, from the attributes of a rule.
pub fn rule_counter(rule: &[u8]) -> Option<(String, RuleCounter)> {
    dump::counter(rule)
}

/// The keys of a set's elements, and for how long they stay, from the attributes of a list of
/// elements.
pub fn elements(list: &[u8]) -> Vec<(Vec<u8>, Option<Duration>)> {
    dump::elements(list)
}
