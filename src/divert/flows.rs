//! The chains, sets and rules that carry out verdicts for whole connections.
//!
//! | chain | content |
//! |---|---|
//! | a base chain of the user's rules | first the rules of [`first_rules`], which stop packets of denied connections |
//! | `to_queue_N` | what a rule to a queue leads to: accepts packets of accepted connections, and marks the others as queued |
//! | `CHAIN_flows`, at the same hook and priority, and so behind the queue | carries out the verdict that the packet's mark contains, and removes it from the mark |
//! | `CHAIN_flows_route`, at `Output` | removes the mark of a connection's acceptance; as a chain of type `route`, it routes the packet without it |
//! | `flow_new` | denies connections of which no packet has passed |
//! | `flow_denied`, `flow_rejected` | drop, or reject, packets of denied connections |

use crate::types::Hook;

use super::{
    action::{Action, MarkChange, Queues, Target},
    chain::{Chain, ChainType, Place, chain_name},
    checked::{KernelRule, Surroundings},
    denied::{DeniedSet, FlowTable},
    facts::Facts,
    family::IpVersion,
    matching::{ConnectionState, Match, Protocol, TcpFlags},
};

/// Builds rules for one chain.
struct Chained<'a> {
    chain: String,
    place: Place,
    surroundings: Surroundings<'a>,
    rules: Vec<KernelRule<'a>>,
}

impl<'a> Chained<'a> {
    fn new(chain: impl Into<String>, place: Place, surroundings: Surroundings<'a>) -> Self {
        Self { chain: chain.into(), place, surroundings, rules: Vec::new() }
    }

    /// Adds a rule for packets of one version, or of both.
    fn push(&mut self, version: Option<IpVersion>, conditions: &[Match], action: Action) -> &mut KernelRule<'a> {
        let facts = Facts {
            table: self.surroundings.family,
            hook: self.place.hook,
            version: version.or(self.surroundings.family.version()),
            protocols: None,
            sets: self.surroundings.sets,
        };
        self.rules.push(KernelRule {
            index: None,
            chain: self.chain.clone(),
            place: self.place,
            comment: None,
            facts,
            conditions: conditions.iter().map(|condition| (condition.clone(), false)).collect(),
            mark_changes: Vec::new(),
            remember: None,
            action,
        });
        let last = self.rules.len() - 1;
        &mut self.rules[last]
    }

    /// Adds rules that reject.
    fn reject(&mut self, condition: &Match, change: Option<MarkChange>) {
        let tcp = [condition.clone(), Match::protocol(Protocol::Tcp)];
        self.push(None, &tcp, Action::ResetTcp).mark_changes.extend(change);
        self.push(None, std::slice::from_ref(condition), Action::Unreachable).mark_changes.extend(change);
    }
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
pub(super) fn places(places: &[Place]) -> Vec<Place> {
    let others = places.iter().filter_map(|place| Some(Place { hook: opposite(place.hook)?, ..*place }));
    let mut all: Vec<Place> = places.iter().copied().chain(others).collect();
    all.sort();
    all.dedup();
    all
}

/// The chains that stay as they are while the table exists, except those of a place.
pub(super) fn common_chains() -> Vec<Chain> {
    [Target::Rejected { can_reject: true }, Target::Rejected { can_reject: false }]
        .into_iter()
        .chain([Target::Denied { can_reject: true }, Target::Denied { can_reject: false }])
        .chain([Target::New { can_reject: true }, Target::New { can_reject: false }])
        .map(|target| Chain { name: target.name(), base: None, fixed: true })
        .collect()
}

/// The chains behind a place.
pub(super) fn chains_behind(place: Place, default_priority: i32) -> Vec<Chain> {
    let name = chain_name(place, default_priority);
    let chain = |suffix, kind| Chain { name: format!("{name}_{suffix}"), base: Some((place, kind)), fixed: true };
    let mut chains = vec![chain("flows", ChainType::Filter)];
    if place.hook == Hook::Output {
        chains.push(chain("flows_route", ChainType::Route));
    }
    chains
}

/// The rules of [`common_chains`].
pub(super) fn common_rules<'a>(table: FlowTable, surroundings: Surroundings<'a>) -> Vec<KernelRule<'a>> {
    let mut rules = Vec::new();
    for can_reject in [true, false] {
        // Of no base chain: these rules compare nothing of the hook.
        let place = Place { hook: if can_reject { Hook::Input } else { Hook::Postrouting }, priority: 0 };
        let chain = |target: Target| Chained::new(target.name(), place, surroundings);
        let rejected = Target::Rejected { can_reject };

        let mut chain_of_rejected = chain(rejected);
        // The replies belong to the connection too.
        let reset = Match::tcp_flags(TcpFlags::RST, TcpFlags::RST);
        chain_of_rejected.push(None, &[Match::protocol(Protocol::Tcp), reset], Action::Accept);
        let error = Match::connection_state([ConnectionState::Related]);
        for (version, protocol) in [(IpVersion::V4, Protocol::Icmp), (IpVersion::V6, Protocol::Icmpv6)] {
            if surroundings.family.version().is_none_or(|only| only == version) {
                let conditions = [Match::protocol(protocol), error.clone()];
                chain_of_rejected.push(Some(version), &conditions, Action::Accept);
            }
        }
        if can_reject {
            chain_of_rejected.push(None, &[Match::protocol(Protocol::Tcp)], Action::ResetTcp);
            chain_of_rejected.push(None, &[], Action::Unreachable);
        } else {
            chain_of_rejected.push(None, &[], Action::Drop);
        }
        rules.append(&mut chain_of_rejected.rules);

        let mut denied = chain(Target::Denied { can_reject });
        let mark = Match::connection_mark(table.marks.rejected(), table.marks.mask());
        denied.push(None, &[mark], Action::Goto(rejected));
        denied.push(None, &[], Action::Drop);
        rules.append(&mut denied.rules);

        let mut new = chain(Target::New { can_reject });
        for set in DeniedSet::all(surroundings.family) {
            let action = if set.reject { Action::Goto(rejected) } else { Action::Drop };
            new.push(Some(set.version), &[Match::denied(set, false)], action).remember = Some(set);
            new.push(Some(set.version), &[Match::denied(set, true)], action);
        }
        rules.append(&mut new.rules);
    }
    rules
}

/// The rules before the user's.
pub(super) fn first_rules<'a>(table: FlowTable, place: Place, surroundings: Surroundings<'a>) -> Vec<KernelRule<'a>> {
    let marks = table.marks;
    let mut chain = Chained::new(chain_name(place, surroundings.priority), place, surroundings);
    // These bits must come from a verdict.
    let clear = MarkChange { value: 0, mask: marks.mask(), of_connection: false };
    let foreign = chain.push(None, &[], Action::Continue);
    foreign.conditions.push((Match::mark(0, marks.mask()), true));
    foreign.mark_changes.push(clear);
    let can_reject = place.hook != Hook::Postrouting;
    // The bit that only the marks of dropped and rejected connections have.
    let bit = marks.dropped() & !marks.accepted();
    let denied = Match::connection_mark(bit, bit);
    chain.push(None, &[denied], Action::Goto(Target::Denied { can_reject }));
    chain.push(None, &[Match::unconfirmed()], Action::Jump(Target::New { can_reject }));
    chain.rules
}

/// The rules of a chain that sends packets to queues, for the rule of this index.
pub(super) fn queue_rules<'a>(
    table: FlowTable,
    (index, queues): (Option<usize>, Queues),
    place: Place,
    surroundings: Surroundings<'a>,
) -> Vec<KernelRule<'a>> {
    let marks = table.marks;
    let mut chain = Chained::new(Target::Queues(queues).name(), place, surroundings);
    let accepted = Match::connection_mark(marks.accepted(), marks.mask());
    chain.push(None, &[accepted], Action::Accept).index = index;
    let queued = MarkChange { value: marks.queued(), mask: marks.mask(), of_connection: false };
    let rule = chain.push(None, &[], Action::Queue(queues));
    rule.index = index;
    rule.mark_changes.push(queued);
    chain.rules
}

/// The rules of [`chains_behind`].
pub(super) fn rules_behind<'a>(table: FlowTable, place: Place, surroundings: Surroundings<'a>) -> Vec<KernelRule<'a>> {
    let marks = table.marks;
    let [filter, rest @ ..] = &*chains_behind(place, surroundings.priority) else { return Vec::new() };
    let mut chain = Chained::new(&filter.name, place, surroundings);
    let has = |value| Match::mark(value, marks.mask());
    let clear = MarkChange { value: 0, mask: marks.mask(), of_connection: false };
    let save = |value| MarkChange { value, mask: marks.mask(), of_connection: true };
    chain.push(None, &[has(0)], Action::Accept);
    chain.push(None, &[has(marks.queued())], Action::Accept).mark_changes.push(clear);
    let accepted = marks.accepted();
    chain.push(None, &[has(accepted)], Action::Continue).mark_changes.push(save(accepted));
    let rule = chain.push(None, &[has(accepted)], Action::Accept);
    if rest.is_empty() {
        rule.mark_changes.push(clear);
    }
    for (value, reject) in [(marks.dropped(), false), (marks.rejected(), true)] {
        // The next rules must follow even if a packet has no connection, or the set is full.
        chain.push(None, &[has(value)], Action::Continue).mark_changes.push(save(value));
        for set in DeniedSet::all(surroundings.family).filter(|set| set.reject == reject) {
            let conditions = [has(value), Match::unconfirmed()];
            chain.push(Some(set.version), &conditions, Action::Continue).remember = Some(set);
        }
    }
    chain.push(None, &[has(marks.dropped())], Action::Drop);
    for value in [marks.rejected(), marks.rejected_packet()] {
        if place.hook == Hook::Postrouting {
            chain.push(None, &[has(value)], Action::Drop);
        } else {
            chain.reject(&has(value), Some(clear));
        }
    }
    chain.push(None, &[], Action::Continue).mark_changes.push(clear);
    let mut rules = chain.rules;
    for route in rest {
        let mut chain = Chained::new(&route.name, place, surroundings);
        chain.push(None, &[has(accepted)], Action::Accept).mark_changes.push(clear);
        rules.append(&mut chain.rules);
    }
    rules
}
