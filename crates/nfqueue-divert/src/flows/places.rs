//! The places of a table, and in which order packets come to them.

use crate::{
    chain::{Chain, ChainType, Place, chain_name},
    flow_chain::Origin,
    matching::Match,
};
use nfqueue_proto::types::Hook;

/// Packets for which a place is the first one of the table.
pub(super) struct First {
    /// Each perhaps negated.
    pub(super) conditions: Vec<(Match, bool)>,
    pub(super) origin: Origin,
}

/// The packets for which this is the first place of the table. A verdict that a packet has had at
/// an earlier place stands in the connection's mark.
pub(super) fn first_traversals(place: Place, places: &[Place]) -> Vec<First> {
    let has = |hook: Hook| places.iter().any(|other| other.hook == hook);
    if places.iter().any(|other| other.hook == place.hook && other.priority < place.priority) {
        return Vec::new();
    }
    let first = |conditions, origin| First { conditions, origin };
    // Packets over the loopback interface come from `Output` or `Postrouting`, where each table
    // with this hook has a place too.
    let not_from_here = vec![(Match::on_loopback(), true)];
    let has_arrived = |has_not: bool| vec![(Match::arrived(), has_not)];
    match place.hook {
        Hook::Input | Hook::Forward if has(Hook::Prerouting) => Vec::new(),
        Hook::Prerouting | Hook::Input => vec![first(not_from_here, Origin::Any)],
        Hook::Forward | Hook::Output => vec![first(Vec::new(), Origin::Any)],
        _ => match (has(Hook::Output), has(Hook::Prerouting) || has(Hook::Forward)) {
            (false, false) => vec![first(Vec::new(), Origin::Any)],
            (false, true) => vec![first(has_arrived(true), Origin::Local)],
            (true, false) => {
                vec![first(has_arrived(false), Origin::Any), first(has_arrived(true), Origin::Bridged)]
            }
            (true, true) => Vec::new(),
        },
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
