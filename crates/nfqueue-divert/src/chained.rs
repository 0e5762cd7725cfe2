//! Builds the rules of chains that carry out verdicts for whole connections.

use super::{
    action::{Action, Change, Target},
    chain::Place,
    checked::{KernelRule, Surroundings},
    denied::{self, DeniedSet, Remember},
    facts::Facts,
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::{Match, Protocol, TcpFlags},
    tuple::Of,
};

/// Builds rules for one chain.
pub(super) struct Chained<'a> {
    pub(super) chain: String,
    place: Place,
    pub(super) surroundings: Surroundings<'a>,
    pub(super) rules: Vec<KernelRule<'a>>,
}

impl<'a> Chained<'a> {
    pub(super) fn new(chain: impl Into<String>, place: Place, surroundings: Surroundings<'a>) -> Self {
        Self { chain: chain.into(), place, surroundings, rules: Vec::new() }
    }

    /// A chain of [`Flows::common_rules`].
    pub(super) fn common(chain: FlowChain, way: Way, surroundings: Surroundings<'a>) -> Self {
        Self::new(chain.name(), Place { hook: way.hook(), priority: 0 }, surroundings)
    }

    /// Adds a rule.
    pub(super) fn push(&mut self, conditions: &[Match], action: Action) -> &mut KernelRule<'a> {
        let facts = Facts {
            table: self.surroundings.family,
            hook: self.place.hook,
            version: self.surroundings.family.version(),
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
            changes: Vec::new(),
            remember: None,
            counts: false,
            action,
        });
        let last = self.rules.len() - 1;
        &mut self.rules[last]
    }

    /// Adds a rule for packets of one version, if the table has them.
    pub(super) fn push_for(&mut self, version: IpVersion, conditions: &[Match], action: Action) {
        if self.surroundings.family.version().is_none_or(|only| only == version) {
            self.push(conditions, action).facts.version = Some(version);
        }
    }

    pub(super) fn change(&mut self, conditions: &[Match], change: Change) {
        self.push(conditions, Action::Continue).changes.push(change);
    }

    /// Adds rules for packets of denied connections.
    pub(super) fn push_denied(&mut self, action: Action) {
        for set in DeniedSet::all(self.surroundings.family) {
            self.push_for(set.version, &[Match::denied(set, Of::Connection)], action);
        }
    }

    /// Adds rules for packets whose connections the other side of a denied one has begun.
    pub(super) fn push_other_side(&mut self, action: Action) {
        for set in DeniedSet::of_replies(self.surroundings.family) {
            self.push_for(set.version, &[Match::denied(set, Of::Connection)], action);
        }
        // An entry that has the same replies as a denied connection is not its other side.
        for set in DeniedSet::all(self.surroundings.family) {
            let of = Of::ConnectionReversed;
            let rule = self.push(&[Match::source_not_translated(), Match::denied(set, of)], action);
            rule.facts.version = Some(set.version);
            let replies = DeniedSet::of(set.version).into_iter().filter(|set| set.replies);
            rule.conditions.extend(replies.map(|set| (Match::denied(set, of), true)));
        }
    }

    /// Adds rules that remember the connection by this tuple, as a dropped or as a rejected one.
    pub(super) fn remember(
        &mut self,
        sets: impl Iterator<Item = DeniedSet>,
        reject: bool,
        of: Of,
        conditions: &[(Match, bool)],
    ) {
        for set in sets.filter(|set| set.reject == reject) {
            let rule = self.push(&[], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.conditions.extend_from_slice(conditions);
            rule.remember = Some(Remember::Denied(set, of));
        }
    }

    /// Lets the time begin anew for what these sets contain.
    pub(super) fn renew(&mut self, sets: impl Iterator<Item = DeniedSet>, of: Of, conditions: &[(Match, bool)]) {
        for set in sets {
            let rule = self.push(&[Match::denied(set, of)], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.conditions.extend_from_slice(conditions);
            rule.remember = Some(Remember::Denied(set, of));
        }
    }

    /// Lets the time begin anew for a connection beside a denied one.
    pub(super) fn renew_beside(&mut self, of: Of, conditions: &[Match]) {
        for version in denied::versions(self.surroundings.family) {
            let rule = self.push(conditions, Action::Continue);
            rule.facts.version = Some(version);
            rule.conditions.push((Match::beside(version, of), false));
            rule.remember = Some(Remember::Beside(version, of));
        }
    }

    pub(super) fn remember_translated(&mut self) {
        for version in denied::versions(self.surroundings.family) {
            let rule = self.push(&[Match::destination_translated()], Action::Continue);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Translated(version));
        }
    }

    /// Adds the rules that remember a connection that a verdict denies. Each is tried even if there
    /// is no room in another's set.
    pub(super) fn remember_verdict(&mut self, reject: bool) {
        let family = self.surroundings.family;
        self.remember(DeniedSet::all(family), reject, Of::Connection, &[]);
        // Only then it is known how they are translated.
        let known = [(Match::confirmed(), false)];
        self.remember(DeniedSet::of_replies(family), reject, Of::ConnectionReversed, &known);
        // Where no packet shows that it begins a connection, the other side's next packet is of the
        // same conversation, also without its entry.
        let conversation = [(Match::answered(), false), (begin_so(), true)];
        self.remember(DeniedSet::all(family), reject, Of::ConnectionReversed, &conversation);
        for version in denied::versions(self.surroundings.family) {
            let rule = self.push(&[], Action::Continue);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::NotBeside(version));
        }
        self.remember_translated();
        for version in denied::versions(self.surroundings.family) {
            let rule = self.push(&[Match::unconfirmed()], Action::Continue);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Recent(version));
        }
    }

    /// Adds a rule for each kind of packet that begins a connection, where the protocol has such.
    pub(super) fn push_first(&mut self, further: &[Match], action: Action, change: Option<Change>) {
        for first in first_packets() {
            let conditions: Vec<Match> = first.into_iter().chain(further.iter().cloned()).collect();
            self.push(&conditions, action).changes.extend(change);
        }
    }

    /// Adds rules that reject. At `Postrouting` the kernel cannot: they drop.
    pub(super) fn reject(&mut self, can_reject: bool) {
        if can_reject {
            self.push(&[Match::protocol(Protocol::Tcp)], Action::ResetTcp).counts = true;
            self.push(&[], Action::Unreachable).counts = true;
        } else {
            self.drop();
        }
    }

    pub(super) fn drop(&mut self) {
        self.push(&[], Action::Drop).counts = true;
    }
}

pub(super) const SCTP: Protocol = Protocol::Other(132);
pub(super) const DCCP: Protocol = Protocol::Other(33);
/// Of IPv6, what connection tracking skips and nf_tables takes for the transport protocol
/// (`ipv6_skip_exthdr`, `nft_set_pktinfo_ipv6`).
const AUTHENTICATION_HEADER: Protocol = Protocol::Other(51);

/// Packets that begin a connection. Connection tracking may count them to an older one.
pub(super) fn first_packets() -> [[Match; 2]; 3] {
    // As `get_conntrack_index` does it: FIN does not count.
    let syn = Match::tcp_flags(TcpFlags::SYN, TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK);
    [
        [Match::protocol(Protocol::Tcp), syn],
        [Match::protocol(SCTP), Match::sctp_init()],
        [Match::protocol(DCCP), Match::dccp_request()],
    ]
}

/// Packets with an authentication header in front of what connection tracking reads. Any of them
/// may be a first packet.
pub(super) fn authenticated() -> [Match; 2] {
    [Match::protocol(AUTHENTICATION_HEADER), Match::tracked_with_first_packets()]
}

pub(super) fn goto(chain: FlowChain) -> Action {
    Action::Goto(Target::Flow(chain))
}

pub(super) fn jump(chain: FlowChain) -> Action {
    Action::Jump(Target::Flow(chain))
}

/// Packets of protocols whose ports connection tracking reads. Of GRE, it reads the keys of PPTP
/// only.
pub(super) fn with_ports() -> Match {
    const UDP_LITE: Protocol = Protocol::Other(136);
    Match::protocols([Protocol::Tcp, Protocol::Udp, UDP_LITE, SCTP, DCCP])
}

/// Packets of protocols that have packets of [`first_packets`].
pub(super) fn begin_so() -> Match {
    Match::protocols([Protocol::Tcp, SCTP, DCCP])
}
