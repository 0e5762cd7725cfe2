//! The places of a table, and in which order packets come to them.

use crate::{
    chain::{Chain, ChainType, Place, chain_name},
    matching::Match,
};
use nfqueue_proto::types::Hook;

/// The conditions, each perhaps negated, under which this is the first place of the table that a
/// packet comes to. `None` if it never is. `places` are all places of the table. A verdict that the
/// packet has had at an earlier place stands in the connection's mark.
pub(super) fn first_traversal(place: Place, places: &[Place]) -> Option<Vec<(Match, bool)>> {
    let has = |hook: Hook| places.iter().any(|other| other.hook == hook);
    if places.iter().any(|other| other.hook == place.hook && other.priority < place.priority) {
        return None;
    }
    // Packets over the loopback interface come from `Output` or `Postrouting`, where each table
    // with this hook has a place too.
    let not_from_here = || vec![(Match::on_loopback(), true)];
    match place.hook {
        Hook::Prerouting => Some(not_from_here()),
        Hook::Input => (!has(Hook::Prerouting)).then(not_from_here),
        Hook::Forward => (!has(Hook::Prerouting)).then(Vec::new),
        Hook::Output => Some(Vec::new()),
        // All packets have come to an earlier place, or none has.
        _ => (!has(Hook::Output)).then(Vec::new),
    }
}

/// Whether packets come to no later place of `places`, except over the loopback interface.
pub(super) fn is_last(place: Place, places: &[Place]) -> bool {
    let later = |hook: Hook| places.iter().any(|other| other.hook == hook);
    let last_hook = match place.hook {
        Hook::Prerouting => ![Hook::Input, Hook::Forward, Hook::Postrouting].into_iter().any(later),
        Hook::Forward | Hook::Output => !later(Hook::Postrouting),
        _ => true,
    };
    last_hook && !places.iter().any(|other| other.hook == place.hook && other.priority > place.priority)
}

/// The other hook that packets of a connection of this host traverse.
fn opposite(hook: Hook) -> Option<Hook> {
    match hook {
        Hook::Prerouting | Hook::Input => Some(Hook::Output),
        Hook::Output | Hook::Postrouting => Some(Hook::Input),
        _ => None,
    }
}

/// The places where both directions of the connections pass.
pub(crate) fn places(places: &[Place]) -> Vec<Place> {
    let others = places.iter().filter_map(|place| Some(Place { hook: opposite(place.hook)?, ..*place }));
    let mut all: Vec<Place> = places.iter().copied().chain(others).collect();
    // Later than `Prerouting` is `Input` for packets to this host, and `Forward` for others.
    let has = |hook: Hook| places.iter().any(|place| place.hook == hook);
    let mut behind_prerouting = |hook: Hook| {
        let before = places.iter().filter(|place| place.hook == Hook::Prerouting);
        all.extend(before.map(|place| Place { hook, ..*place }));
    };
    if has(Hook::Input) && !has(Hook::Forward) && !has(Hook::Postrouting) {
        behind_prerouting(Hook::Forward);
    }
    if !has(Hook::Input) && (has(Hook::Forward) || has(Hook::Postrouting)) {
        behind_prerouting(Hook::Input);
    }
    // At `Postrouting` nothing tells for certain where a packet comes from: bridged packets have
    // no interface, and those that this host puts into a tunnel have one. So either none has come
    // to an earlier place, or each has.
    let leaving: Vec<Place> = all.iter().copied().filter(|place| place.hook == Hook::Postrouting).collect();
    let has = |hook: Hook| all.iter().any(|place| place.hook == hook);
    let forwarded = has(Hook::Forward) || has(Hook::Prerouting);
    if has(Hook::Output) && !forwarded {
        all.extend(leaving.iter().map(|place| Place { hook: Hook::Forward, ..*place }));
    } else if forwarded && !has(Hook::Output) {
        all.extend(leaving.iter().map(|place| Place { hook: Hook::Output, ..*place }));
    }
    all.sort();
    all.dedup();
    all
}

/// The chain of a place without rules of the user.
pub(crate) fn opposite_chain(place: Place, default_priority: i32) -> Chain {
    let name = format!("{}_opposite", chain_name(place, default_priority));
    Chain { name, base: Some((place, ChainType::Filter)), fixed: false }
}

/// The chain behind a place.
pub(crate) fn chain_behind(place: Place, default_priority: i32) -> Chain {
    let name = format!("{}_flows", chain_name(place, default_priority));
    Chain { name, base: Some((place, ChainType::Filter)), fixed: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    /// The hooks that packets meet, in order: to this host, forwarded or bridged, of this host.
    const WAYS: [&[Hook]; 3] = [
        &[Hook::Prerouting, Hook::Input],
        &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
        &[Hook::Output, Hook::Postrouting],
    ];

    #[test]
    fn of_the_places_that_a_packet_meets_the_first_is_the_first_one() {
        for rules in
            (1..1 << HOOKS.len()).map(|chosen| HOOKS.iter().enumerate().filter(move |(bit, _)| chosen >> bit & 1 == 1))
        {
            let rules: Vec<Place> = rules.map(|(_, hook)| Place { hook: *hook, priority: 0 }).collect();
            let all = places(&rules);
            for way in WAYS {
                let met = way.iter().flat_map(|hook| all.iter().filter(move |place| place.hook == *hook));
                let firsts: Vec<bool> = met.map(|place| first_traversal(*place, &all).is_some()).collect();
                assert!(
                    firsts.iter().enumerate().all(|(at, first)| *first == (at == 0)),
                    "{rules:?} {way:?} {firsts:?}"
                );
            }
        }
    }
}
