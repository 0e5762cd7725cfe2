//! The chains and rules that a table consists of.

use nfqueue_proto::types::Hook;

use super::{
    action::{Action, Target},
    chain::{Chain, ChainType, Place, chain_name},
    chained::Chained,
    checked::{KernelRule, Surroundings},
    family::{IpVersion, TableFamily},
    flows::{self, Flows},
    matching::Match,
    offload,
    priority::Priority,
};

/// The chains, in the order of their creation, and the rules, in the order of each chain.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub(super) chains: Vec<Chain>,
    pub(super) rules: Vec<KernelRule<'a>>,
}

impl<'a> Layout<'a> {
    /// `places` are those of the rules and further ones, ascending.
    pub(super) fn new(rules: Vec<KernelRule<'a>>, places: &[Place], surroundings: Surroundings<'a>) -> Self {
        let base = |place: &Place| Chain {
            name: chain_name(*place, surroundings.priority),
            base: Some((*place, ChainType::Filter)),
            fixed: false,
        };
        let Some(table) = surroundings.flows else {
            return Self { chains: places.iter().map(base).collect(), rules };
        };
        let flows = Flows::new(table, surroundings);
        let mut all = flows.common_rules();
        let mut chains: Vec<Chain> = Vec::new();
        for rule in &all {
            if chains.last().is_none_or(|last| last.name != rule.chain) {
                chains.push(Chain { name: rule.chain.clone(), base: None, fixed: true });
            }
        }
        for rule in &rules {
            let Action::Goto(target @ (Target::Queues(queues) | Target::OffloadOrQueues(queues))) = rule.action else {
                continue;
            };
            let chain = Chain { name: target.name(), base: None, fixed: false };
            if !chains.contains(&chain) {
                chains.push(chain);
                all.extend(flows.queue_rules(rule.index, target, queues, rule.place));
            }
        }
        if surroundings.offloads() {
            let (base, of_base) = offload::base_chains(surroundings);
            chains.extend(base);
            all.extend(of_base);
        }
        let all_places = flows::places(places);
        for place in &all_places {
            chains.extend(flows.first_chains(*place));
            all.extend(flows.first_rules(*place, &all_places));
            if places.contains(place) {
                // A new hook comes before those of the same priority (`nf_hook_entries_grow`), so
                // that nothing can come between these chains.
                chains.push(flows::chain_behind(*place, surroundings.priority));
                chains.push(base(place));
                all.push(flows.first_rule(*place));
                all.extend(flows.rules_behind(*place, places));
            } else {
                chains.push(flows::opposite_chain(*place, surroundings.priority));
                all.extend(flows.opposite_rules(*place, places));
            }
        }
        all.extend(rules);
        for place in places {
            all.extend(flows.last_rules(*place, places));
        }
        Self { chains, rules: all }
    }

    /// The rules of a chain.
    pub(super) fn rules_of<'b>(&'b self, chain: &'b Chain) -> impl Iterator<Item = &'b KernelRule<'a>> {
        self.rules.iter().filter(|rule| rule.chain == chain.name)
    }
}

/// The rules before the user's where the kernel reassembles. It removes one fragment header, and
/// what still has one behind that would come to the rules in parts (`nf_ct_frag6_gather`). With
/// verdicts for connections, [`Flows::first_rules`] has such a rule.
///
/// Packets of this host that arrive over the loopback interface are not reassembled again if
/// connection tracking knows them (`ipv6_defrag`).
pub(super) fn guards<'a>(places: &[Place], surroundings: Surroundings<'a>) -> Vec<KernelRule<'a>> {
    if surroundings.flows.is_some() || surroundings.family == TableFamily::Bridge {
        return Vec::new();
    }
    // The kernel reassembles at these two.
    let sees_fragments = |place: &Place| {
        matches!(place.hook, Hook::Prerouting | Hook::Output) && place.priority <= Priority::DEFRAGMENTATION.number()
    };
    let rules = places.iter().filter(|place| !sees_fragments(place)).flat_map(|place| {
        let mut chain = Chained::new(chain_name(*place, surroundings.priority), *place, surroundings);
        let local = match place.hook {
            Hook::Output | Hook::Postrouting => Match::to_loopback(),
            _ => Match::on_loopback(),
        };
        if let Some(rule) = chain.push_for(IpVersion::V6, &[Match::fragment_header()], Action::Drop) {
            rule.conditions.push((local, true));
        }
        chain.rules
    });
    rules.collect()
}
