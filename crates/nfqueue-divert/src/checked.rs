//! Checks rules, and turns them into rules of the kernel.

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::MetaKey;

use nfqueue_proto::types::{Hook, Protocol};

use super::{
    action::{Action, Change, Field, Queues, TTLS, Target, ttl},
    chain::{Place, chain_name},
    denied::{FlowTable, Remember},
    encoder::{AnonymousSet, Encoder, Encoding, Range, complement, merge},
    facts::{Facts, has_ports},
    family::{IpVersion, TableFamily},
    matching::{Condition, Match, ProtocolNeed, Values},
    rule::{Rule, RuleAction},
    set::NamedSet,
};

/// A rule of the kernel: a checked [`Rule`], or one of the two that it becomes.
#[derive(Debug, Clone)]
pub(super) struct KernelRule<'a> {
    /// The index of the [`Rule`]. `None` for a rule that carries out verdicts for connections.
    pub(super) index: Option<usize>,
    /// The name of its chain.
    pub(super) chain: String,
    pub(super) place: Place,
    pub(super) comment: Option<&'a str>,
    pub(super) facts: Facts<'a>,
    pub(super) conditions: Vec<(Match, bool)>,
    pub(super) changes: Vec<Change>,
    pub(super) remember: Option<Remember>,
    /// Whether the rule has a counter.
    pub(super) counts: bool,
    pub(super) action: Action,
}

/// What a rule may refer to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub(super) family: TableFamily,
    pub(super) sets: &'a [NamedSet],
    /// The priority of rules without one of their own.
    pub(super) priority: i32,
    pub(super) flows: Option<FlowTable>,
    /// The interfaces between which accepted connections leave the hooks.
    pub(super) offload: &'a [String],
    /// The first and the last queue of rules without a target.
    pub(super) queues: Option<(u16, u16)>,
    pub(super) fail_closed: bool,
}

impl Surroundings<'_> {
    /// A table of the family `inet` without settings.
    #[cfg(test)]
    pub(super) const PLAIN: Surroundings<'static> = Surroundings {
        family: TableFamily::Inet,
        sets: &[],
        priority: 0,
        flows: None,
        offload: &[],
        queues: None,
        fail_closed: false,
    };

    pub(super) fn offloads(self) -> bool {
        !self.offload.is_empty()
    }
}

impl KernelRule<'_> {
    /// The conditions, a counter and the action. If a comparison fails, the kernel skips the rest
    /// of the rule.
    pub(super) fn expressions(&self, encoding: Encoding, next_set: u32) -> (Vec<DefaultNla>, Vec<AnonymousSet>) {
        let mut encoder = Encoder::new(encoding, next_set);
        // The version comes first, because the offsets of the addresses depend on it.
        if let Some(version) = self.version_condition() {
            encode_version(version, self.facts.table, &mut encoder);
        }
        for (condition, negated) in &self.conditions {
            condition.condition().encode(&self.facts, *negated, &mut encoder);
        }
        if self.counts {
            encoder.expression::<DefaultNla>("counter", &[]);
        }
        self.changes.iter().for_each(|change| change.encode(&mut encoder));
        if !encoding.trial {
            self.remember.into_iter().for_each(|remember| remember.encode(&mut encoder));
        }
        self.action.encode(&self.facts, &mut encoder);
        encoder.finish()
    }

    /// The rules in the language of nft that do what this one does.
    pub(super) fn nft_rules(&self) -> Vec<String> {
        let Some(Change { field: Field::RestoredTtl(version), .. }) = self.changes.first() else {
            return vec![self.nft()];
        };
        // nft writes only constants to the TTL.
        let field = ttl(*version);
        let restored = |number| format!(" meta priority {number:#x} {field} set {number} meta priority set 0x0 accept");
        TTLS.map(|number| self.nft().replace(" accept", &restored(number))).collect()
    }

    /// The rule in the language of nft.
    pub(super) fn nft(&self) -> String {
        let version = self.version_condition().map(|version| match (self.facts.table, version) {
            (TableFamily::Bridge, IpVersion::V4) => "meta protocol ip",
            (TableFamily::Bridge, IpVersion::V6) => "meta protocol ip6",
            (_, IpVersion::V4) => "meta nfproto ipv4",
            (_, IpVersion::V6) => "meta nfproto ipv6",
        });
        let mut parts: Vec<String> = version.into_iter().map(str::to_owned).collect();
        parts.extend(
            self.conditions.iter().map(|(condition, negated)| condition.condition().nft(&self.facts, *negated)),
        );
        parts.extend(self.counts.then(|| "counter".to_owned()));
        parts.extend(self.changes.iter().map(|change| change.nft()));
        parts.extend(self.remember.map(Remember::nft));
        parts.push(self.action.nft(&self.facts));
        parts.extend(self.comment.map(|text| format!("comment \"{text}\"")));
        parts.retain(|part| !part.is_empty());
        parts.join(" ")
    }

    /// Whether nft has a form of the rule.
    pub(super) fn has_nft(&self) -> bool {
        let empty = |(condition, negated): &(Match, bool)| condition.condition().nft(&self.facts, *negated).is_empty();
        !self.conditions.iter().any(empty) && !matches!(self.remember, Some(Remember::Translated(_)))
    }

    pub(super) fn queues(&self) -> bool {
        matches!(self.action, Action::Queue(_) | Action::Goto(Target::Queues(_) | Target::OffloadOrQueues(_)))
    }

    pub(super) fn rejects(&self) -> bool {
        matches!(self.action, Action::ResetTcp | Action::Unreachable)
    }

    /// Whether the rule moves packets past the flowtable, or puts connections into it.
    pub(super) fn moves_past(&self) -> bool {
        self.changes.iter().any(|change| matches!(change.field, Field::TakenTtl(_) | Field::RestoredTtl(_)))
    }

    /// Whether the rule needs connection tracking.
    pub(super) fn tracks(&self) -> bool {
        self.conditions.iter().any(|(condition, _)| condition.condition().needs().tracking)
            || self.changes.iter().any(|change| change.field == Field::ConnectionMark)
            || self.remember.is_some()
    }

    /// Whether fragments can come to the rule, and lack what its conditions compare.
    pub(super) fn needs_reassembly(&self) -> bool {
        let whole_packets = self.conditions.iter().any(|(condition, negated)| {
            let condition = condition.condition();
            // In IPv6 the protocol stands behind all extension headers. If a fragment does not show
            // it, a rule for all others does not match either.
            let others = *negated && condition.field() == "protocol" && self.facts.version != Some(IpVersion::V4);
            condition.needs().whole_packets || others
        });
        let fragments = match self.place.hook {
            Hook::Prerouting | Hook::Forward | Hook::Postrouting => true,
            // IPv4 reassembles before this hook (`ip_local_deliver`), IPv6 after it.
            Hook::Input => self.facts.version != Some(IpVersion::V4),
            _ => false,
        };
        whole_packets && fragments && self.facts.table != TableFamily::Bridge
    }

    /// The version that a condition must check.
    fn version_condition(&self) -> Option<IpVersion> {
        self.facts.version.filter(|_| self.facts.table.version().is_none())
    }
}

fn encode_version(version: IpVersion, table: TableFamily, encoder: &mut Encoder) {
    if table == TableFamily::Bridge {
        encoder.meta(MetaKey::EtherTypeProtocol);
        let protocol: u16 = match version {
            IpVersion::V4 => 0x0800,
            IpVersion::V6 => 0x86dd,
        };
        encoder.equal(protocol.to_be_bytes().to_vec(), false);
    } else {
        encoder.meta(MetaKey::Nfproto);
        let number = match version {
            IpVersion::V4 => NFPROTO_IPV4,
            IpVersion::V6 => NFPROTO_IPV6,
        };
        encoder.equal(vec![number], false);
    }
}

impl Rule {
    /// Returns the rules of the kernel that do what this rule says, or the reason why it is
    /// invalid, beginning with the field.
    pub(super) fn check<'a>(
        &'a self,
        index: usize,
        surroundings: Surroundings<'a>,
    ) -> Result<Vec<KernelRule<'a>>, String> {
        if let Hook::Other(_) = self.hook {
            return Err("hook: it must be prerouting, input, forward, output or postrouting".to_owned());
        }
        let mut conditions = self.conditions.clone();
        for need in self.conditions.iter().map(|(condition, _)| condition.condition().needs().protocol) {
            let has_one = |conditions: &[(Match, bool)]| {
                conditions.iter().any(|(condition, negated)| !negated && condition.condition().field() == "protocol")
            };
            match need {
                ProtocolNeed::Exactly(number) if !has_one(&conditions) => {
                    conditions.push((Match::protocol(Protocol::Other(number)), false));
                }
                _ => {}
            }
        }
        conditions.sort_by_key(|(condition, _)| condition.condition().order());

        let facts = Facts {
            table: surroundings.family,
            hook: self.hook,
            version: surroundings.family.version(),
            protocols: None,
            sets: surroundings.sets,
        };
        let version = self.check_version(&conditions, &facts)?;
        let facts = Facts { version, ..facts };
        for (condition, negated) in &conditions {
            let condition = condition.condition();
            condition.check(&facts, *negated).map_err(|reason| in_field(condition, &reason))?;
        }
        let facts = Facts { protocols: check_values(&conditions)?, ..facts };
        for (condition, _) in &conditions {
            let condition = condition.condition();
            check_protocol(condition.needs().protocol, &facts).map_err(|reason| in_field(condition, &reason))?;
        }
        if self.changes.iter().any(|change| change.value & !change.mask != 0) {
            return Err("set mark: the value of the mark has bits outside the mask".to_owned());
        }
        if let Some(text) = &self.comment {
            check_comment(text)?;
        }
        let priority = self.priority.map_or(surroundings.priority, |priority| priority.number());
        let place = Place { hook: self.hook, priority };
        if surroundings.offloads() {
            check_sees_all(self.hook, &conditions)?;
        }
        if let Some(flows) = surroundings.flows {
            flows.check_place(place)?;
            let overlaps =
                |change: &Change| change.field == Field::ConnectionMark && change.mask & flows.marks.mask() != 0;
            if self.changes.iter().any(overlaps) {
                return Err("set connection mark: the mask overlaps the flow marks of the table".to_owned());
            }
        }
        let rule = |conditions, action| KernelRule {
            index: Some(index),
            chain: chain_name(place, surroundings.priority),
            place,
            comment: self.comment.as_deref(),
            facts: facts.clone(),
            conditions,
            changes: self.changes.clone(),
            remember: None,
            counts: true,
            action: match action {
                Action::Queue(queues) if surroundings.offloads() && self.hook == Hook::Forward => {
                    Action::Goto(Target::OffloadOrQueues(queues))
                }
                Action::Queue(queues) if surroundings.flows.is_some() => Action::Goto(Target::Queues(queues)),
                action => action,
            },
        };
        if self.bypass && surroundings.fail_closed {
            return Err("bypass: it accepts packets when the process has ended, which fail_closed forbids".to_owned());
        }
        let actions = self.actions(surroundings.queues, &facts, &conditions)?;
        if let [action] = actions.as_slice() {
            return Ok(vec![rule(conditions, *action)]);
        }
        // TCP is rejected in another way than all else.
        let with_tcp = |negated| {
            let mut conditions = conditions.clone();
            conditions.push((Match::protocol(Protocol::Tcp), negated));
            conditions.sort_by_key(|(condition, _)| condition.condition().order());
            conditions
        };
        Ok(vec![rule(with_tcp(false), Action::ResetTcp), rule(with_tcp(true), Action::Unreachable)])
    }

    /// The IP version that all conditions require.
    fn check_version(&self, conditions: &[(Match, bool)], facts: &Facts<'_>) -> Result<Option<IpVersion>, String> {
        let mut version = facts.version;
        let of_conditions = conditions
            .iter()
            .map(|(condition, _)| (condition.condition().field(), condition.condition().version(facts)));
        for (field, needed) in [("IP version", self.version)].into_iter().chain(of_conditions) {
            match (version, needed) {
                (Some(version), Some(needed)) if version != needed => {
                    return Err(format!(
                        "{field}: the rule can never match: it requires both {} and {}",
                        version.name(),
                        needed.name()
                    ));
                }
                (None, needed) => version = needed,
                _ => {}
            }
        }
        Ok(version)
    }

    /// One action, or two for a rule that rejects both TCP and other protocols.
    fn actions(
        &self,
        queues: Option<(u16, u16)>,
        facts: &Facts<'_>,
        conditions: &[(Match, bool)],
    ) -> Result<Vec<Action>, String> {
        let default = queues.filter(|_| self.changes.is_empty());
        let action = self.action.or(default.map(|(first, last)| RuleAction::Queue(first, last)));
        let queue = matches!(action, Some(RuleAction::Queue(..)));
        if (self.bypass || self.fanout) && !queue {
            return Err("action: bypass and fanout need to_queue() or to_queues()".to_owned());
        }
        let action = match action {
            None if self.changes.is_empty() => {
                return Err(
                    "action: there is none; set it with to_queue(), to_queues(), accept(), drop(), reject() or count()"
                        .to_owned(),
                );
            }
            None | Some(RuleAction::Count) => Action::Continue,
            Some(RuleAction::Queue(first, last)) if first > last => {
                return Err(format!("queues: the range {first}-{last} is reversed"));
            }
            Some(RuleAction::Queue(0, u16::MAX)) => {
                return Err("queues: the range is too large; it can contain at most 65535 queues".to_owned());
            }
            Some(RuleAction::Queue(first, last)) => {
                Action::Queue(Queues { first, last, fanout: self.fanout, bypass: self.bypass })
            }
            Some(RuleAction::Accept) => Action::Accept,
            Some(RuleAction::Drop) => Action::Drop,
            Some(RuleAction::Reject) => return self.reject_actions(facts, conditions),
        };
        Ok(vec![action])
    }

    fn reject_actions(&self, facts: &Facts<'_>, conditions: &[(Match, bool)]) -> Result<Vec<Action>, String> {
        let possible = match facts.table {
            TableFamily::Bridge => matches!(self.hook, Hook::Prerouting | Hook::Input),
            _ => self.hook != Hook::Postrouting,
        };
        if !possible {
            return Err("action: the kernel cannot reject packets at this hook".to_owned());
        }
        let no_tcp = conditions.iter().any(|(condition, negated)| {
            let condition = condition.condition();
            let tcp = condition.values().is_some_and(|values| contains(&values.ranges, 6));
            *negated && condition.field() == "protocol" && tcp
        });
        Ok(match &facts.protocols {
            Some(protocols) if protocols.iter().all(|protocol| *protocol == 6) => vec![Action::ResetTcp],
            Some(protocols) if !protocols.contains(&6) => vec![Action::Unreachable],
            None if no_tcp => vec![Action::Unreachable],
            _ => vec![Action::ResetTcp, Action::Unreachable],
        })
    }
}

fn in_field(condition: &dyn Condition, reason: &str) -> String {
    format!("{}: {reason}", condition.field())
}

/// Refuses conditions that no value meets. Returns the protocols that are possible, if the rule is
/// limited to some.
fn check_values(conditions: &[(Match, bool)]) -> Result<Option<Vec<u8>>, String> {
    let mut protocols = None;
    for (condition, _) in conditions {
        let field = condition.condition().field();
        let same: Vec<(Values, bool)> = conditions
            .iter()
            .filter(|(other, _)| other.condition().field() == field)
            .filter_map(|(other, negated)| Some((other.condition().values()?, *negated)))
            .collect();
        let Some((first, _)) = same.first() else { continue };
        let mut possible = vec![(0, first.highest)];
        for (values, negated) in &same {
            let others = if *negated { complement(&values.ranges, values.highest) } else { values.ranges.clone() };
            possible = intersection(&possible, &others);
        }
        if possible.is_empty() {
            return Err(format!("{field}: the rule can never match: the conditions exclude every value"));
        }
        if field == "protocol" && same.iter().any(|(_, negated)| !negated) {
            protocols = Some(possible.iter().flat_map(|(first, last)| *first as u8..=*last as u8).collect());
        }
    }
    Ok(protocols)
}

fn check_protocol(need: ProtocolNeed, facts: &Facts<'_>) -> Result<(), String> {
    match (need, &facts.protocols) {
        (ProtocolNeed::Any, _) => Ok(()),
        (ProtocolNeed::WithPorts, None) => Err("a port needs a protocol; set it with protocol()".to_owned()),
        (ProtocolNeed::WithPorts, Some(protocols)) => match protocols.iter().find(|protocol| !has_ports(**protocol)) {
            Some(protocol) => Err(format!("protocol {protocol} has no ports")),
            None => Ok(()),
        },
        (ProtocolNeed::Exactly(number), Some(protocols)) if protocols.iter().any(|other| *other != number) => {
            Err(format!("the protocol must be {number}"))
        }
        (ProtocolNeed::Exactly(_), _) => Ok(()),
    }
}

fn check_comment(text: &str) -> Result<(), String> {
    if text.len() > 127 {
        return Err("comment: it is longer than 127 bytes".to_owned());
    }
    if text.chars().any(|c| c.is_control() || c == '"') {
        return Err("comment: it contains '\"' or a control character".to_owned());
    }
    Ok(())
}

/// Refuses rules that would silently miss packets of offloaded connections: those that limit a
/// rate, unless they concern only some packets of connections.
fn check_sees_all(hook: Hook, conditions: &[(Match, bool)]) -> Result<(), String> {
    let has = |fields: &[&str]| {
        let mut required = conditions.iter().filter(|(_, negated)| !negated);
        required.any(|(condition, _)| fields.contains(&condition.condition().field()))
    };
    // A negated rate is a rate too.
    let limits = conditions.iter().any(|(condition, _)| condition.condition().field() == "rate");
    let forwarded = matches!(hook, Hook::Prerouting | Hook::Forward | Hook::Postrouting);
    if forwarded && limits && !has(&["TCP flags", "connection state"]) {
        return Err("rate: packets of offloaded connections would not count; \
                    limit the rule to certain TCP flags or connection states"
            .to_owned());
    }
    Ok(())
}

fn contains(ranges: &[Range], value: u128) -> bool {
    ranges.iter().any(|(first, last)| (first..=last).contains(&&value))
}

fn intersection(one: &[Range], other: &[Range]) -> Vec<Range> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))));
    merge(pairs.filter(|(first, last)| first <= last))
}

// uapi/linux/netfilter.h
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

#[cfg(test)]
mod tests;
