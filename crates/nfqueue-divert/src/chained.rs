//! Builds the rules of chains that carry out verdicts for whole connections.

use nfqueue_proto::types::Protocol;

use super::{
    action::{Action, Change, Target},
    chain::Place,
    checked::{KernelRule, Surroundings},
    denied::{self, DeniedSet, Remember},
    facts::Facts,
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::{Match, TcpFlags},
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
    pub(super) fn push_for(
        &mut self,
        version: IpVersion,
        conditions: &[Match],
        action: Action,
    ) -> Option<&mut KernelRule<'a>> {
        self.surroundings.family.version().is_none_or(|only| only == version).then(|| {
            let rule = self.push(conditions, action);
            rule.facts.version = Some(version);
            rule
        })
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
        for set in DeniedSet::all(self.surroundings.family) {
            let conditions = [Match::source_not_translated(), Match::denied(set, Of::ConnectionReversed)];
            self.push_for(set.version, &conditions, action);
        }
    }

    /// Of packets of the other side that are not first ones, adds rules for those that are of the
    /// denied connection, also without its entry: where first packets can be told apart, and where
    /// the other side is known to have been sent to.
    pub(super) fn push_conversation(&mut self, action: Action) {
        self.push(&[begin_so()], action);
        for set in DeniedSet::of_replies(self.surroundings.family) {
            self.push_for(set.version, &[Match::denied(set, Of::Connection)], action);
        }
    }

    /// Adds rules that remember the connection in these sets, and the other side's tuple in those
    /// of the same kind. Each is tried even if another's set is full.
    pub(super) fn remember_connection(
        &mut self,
        sets: impl IntoIterator<Item = DeniedSet>,
        conditions: &[(Match, bool)],
    ) {
        let mut remember = |set: DeniedSet, of, further: Option<Match>| {
            let rule = self.push(&[], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.conditions.extend_from_slice(conditions);
            rule.conditions.extend(further.map(|condition| (condition, false)));
            rule.remember = Some(Remember::Denied(set, of));
        };
        for set in sets {
            remember(set, Of::Connection, None);
            // Only then it is known how its replies are translated.
            remember(DeniedSet { replies: true, ..set }, Of::ConnectionReversed, Some(Match::confirmed()));
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

    /// Adds the rules that remember a connection that a verdict denies.
    pub(super) fn remember_verdict(&mut self, reject: bool) {
        self.remember_connection(DeniedSet::all(self.surroundings.family).filter(|set| set.reject == reject), &[]);
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
pub(super) const AUTHENTICATION_HEADER: Protocol = Protocol::Other(51);

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

/// The answers of the other side to [`first_packets`].
pub(super) fn answers() -> [[Match; 2]; 3] {
    let compared = TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK;
    let syn_ack = Match::tcp_flags(TcpFlags::SYN | TcpFlags::ACK, compared);
    [
        [Match::protocol(Protocol::Tcp), syn_ack],
        [Match::protocol(SCTP), Match::sctp_init_ack()],
        [Match::protocol(DCCP), Match::dccp_response()],
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

/// Packets of protocols whose ports every kernel's connection tracking reads. Support for others is
/// optional, and of GRE it reads the keys of PPTP only.
pub(super) fn with_ports() -> Match {
    Match::protocols([Protocol::Tcp, Protocol::Udp])
}

/// Packets of connections whose protocol has packets of [`first_packets`]. That is the protocol of
/// the connection, not of the packet: an ICMP error, or what is in an authentication header, begins
/// nothing, and is no conversation of another protocol.
pub(super) fn begin_so() -> Match {
    Match::tracked_with_first_packets()
}
