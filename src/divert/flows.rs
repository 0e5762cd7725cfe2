//! The chains, sets and rules that carry out verdicts for whole connections.
//!
//! A denied connection is remembered by its tuple ([`denied`](super::denied)), which is looked up
//! before anything is accepted. An accepted connection is remembered by the mark of its entry
//! ([`FlowMarks`](crate::FlowMarks)), which never holds for a packet that begins a connection.
//! A verdict comes back from the queue in the packet's priority
//! ([`flow_codes`](crate::types::flow_codes)).
//!
//! | chain | content |
//! |---|---|
//! | a base chain of the user's rules | first a jump to `CHAIN_first`; last the rules of [`Flows::last_rules`] |
//! | `CHAIN_first` | stops packets of denied connections |
//! | `CHAIN_unusual` | the same for packets that are not of an established connection |
//! | `CHAIN_opposite`, a base chain | the same at the other hook that packets of this host's connections traverse, where it has no rules of the user |
//! | `to_queue_N` | what a rule to a queue leads to: accepts packets of accepted connections, and marks the others as queued |
//! | `CHAIN_flows`, at the same hook and priority, and so behind the queue | carries out the verdict that the packet's priority contains, and removes it from the priority |
//!
//! The chains between have these names, with `_in`, `_forward`, `_out` or `_leaving` where the hook
//! makes a difference:
//!
//! | chain | packets that come to it |
//! |---|---|
//! | `flow_back` | have a code in their priority before the queue: the verdict of a packet that comes to its hook once more (`nf_reinject` counts hooks, and another may have been registered since), or a foreign value |
//! | `flow_inherits` | have an entry that no packet has confirmed, and come to their first place of the table |
//! | `flow_begins` | begin a connection, at their first place of the table: TCP SYN, SCTP INIT, DCCP Request |
//! | `flow_begun_stray`, `flow_begun_record` | pass, and belong to no connection, as connection tracking sees it |
//! | `flow_begun_again` | belong to a connection that such a packet has begun |
//! | `flow_stray`, `flow_stray_icmp` | belong to no connection, as connection tracking sees it |
//! | `flow_listed` | have the ports of a denied connection, or of one of which a packet has just been rejected |
//! | `flow_reversed`, `flow_reversed_denied` | have the tuple of a denied connection, with source and destination exchanged |
//! | `flow_beside`, `flow_beside_begins` | pass, and may begin a connection with such a tuple |
//! | `flow_alone` | pass, and belong to a connection that was accepted by a packet that begins one |
//! | `flow_crossed` | come from the other side of a connection that has just been denied, and no rule has decided about them |
//! | `flow_accepted` | belong to a connection that was accepted by such a packet, and not yet answered |
//! | `flow_denied`, `flow_rejected` | are denied |
//! | `flow_replies` | may be replies of this host to a rejected packet |
//! | `flow_verdict_accept`, `flow_save`, `flow_save_first` | have a verdict that accepts their connection |
//! | `flow_verdict_drop`, `flow_verdict_reject`, `flow_reject_packet` | have another verdict |
//!
//! With [`offload`](super::offload) there are more.

use crate::types::{
    Hook,
    flow_codes::{self, FlowCodes},
};

use super::{
    action::{Action, Change, Field, Queues, Target},
    chain::{Chain, ChainType, Place, chain_name},
    chained::{Chained, DCCP, SCTP, begin_so, first_packets, goto, jump},
    checked::{KernelRule, Surroundings},
    denied::{self, DeniedSet, FlowTable, Remember},
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::{ConnectionState, Match, Protocol, TcpFlags},
    offload,
    tuple::Of,
};

/// The conditions, each perhaps negated, under which this is the first place of the table that a
/// packet comes to. `None` if it never is. A verdict that the packet has had at an earlier place
/// stands in the connection's mark.
fn first_traversal(place: Place, places: &[Place]) -> Option<Vec<(Match, bool)>> {
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
        _ => match (has(Hook::Output), has(Hook::Prerouting) || has(Hook::Forward)) {
            (false, false) => Some(Vec::new()),
            (false, true) => Some(vec![(Match::arrived(), true)]),
            (true, false) => Some(vec![(Match::arrived(), false)]),
            (true, true) => None,
        },
    }
}

/// Whether packets come to no later place of `places`, except over the loopback interface.
fn is_last(place: Place, places: &[Place]) -> bool {
    let later = |hook: Hook| places.iter().any(|other| other.hook == hook);
    is_last_but_for_input(place, places) && !(place.hook == Hook::Prerouting && later(Hook::Input))
}

/// The same for forwarded packets and those that leave; others may come to `Input`.
fn is_last_but_for_input(place: Place, places: &[Place]) -> bool {
    let later = |hook: Hook| places.iter().any(|other| other.hook == hook);
    let last_hook = match place.hook {
        Hook::Prerouting => !later(Hook::Forward) && !later(Hook::Postrouting),
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
pub(super) fn places(places: &[Place]) -> Vec<Place> {
    let others = places.iter().filter_map(|place| Some(Place { hook: opposite(place.hook)?, ..*place }));
    let mut all: Vec<Place> = places.iter().copied().chain(others).collect();
    // `Input` is later than `Prerouting`, but not for packets that are forwarded.
    let has = |hook: Hook| places.iter().any(|place| place.hook == hook);
    if has(Hook::Input) && !has(Hook::Forward) && !has(Hook::Postrouting) {
        let before = places.iter().filter(|place| place.hook == Hook::Prerouting);
        all.extend(before.map(|place| Place { hook: Hook::Forward, ..*place }));
    }
    all.sort();
    all.dedup();
    all
}

/// The chain of a place without rules of the user.
pub(super) fn opposite_chain(place: Place, default_priority: i32) -> Chain {
    let name = format!("{}_opposite", chain_name(place, default_priority));
    Chain { name, base: Some((place, ChainType::Filter)), fixed: false }
}

/// The chain behind a place.
pub(super) fn chain_behind(place: Place, default_priority: i32) -> Chain {
    let name = format!("{}_flows", chain_name(place, default_priority));
    Chain { name, base: Some((place, ChainType::Filter)), fixed: true }
}

/// The rules of a table.
#[derive(Clone, Copy)]
pub(super) struct Flows<'a> {
    table: FlowTable,
    surroundings: Surroundings<'a>,
}

impl<'a> Flows<'a> {
    pub(super) fn new(table: FlowTable, surroundings: Surroundings<'a>) -> Self {
        Self { table, surroundings }
    }

    /// A chain for packets of any way.
    fn common(self, chain: FlowChain) -> Chained<'a> {
        Chained::common(chain, Way::In, self.surroundings)
    }

    fn of_way(self, chain: FlowChain, way: Way) -> Chained<'a> {
        Chained::common(chain, way, self.surroundings)
    }

    /// Packets of connections with this mark.
    fn marked(self, value: u32) -> Match {
        Match::connection_mark(value, self.table.marks.mask())
    }

    fn codes(self) -> FlowCodes {
        FlowCodes::of(self.table.marks)
    }

    /// Packets whose priority is a code of this table.
    fn has_code(self) -> Match {
        Match::priority(self.codes().value, flow_codes::MASK)
    }

    fn save(self, value: u32) -> Change {
        Change { field: Field::ConnectionMark, value, mask: self.table.marks.mask() }
    }

    /// The rules that stay as they are while the table exists, except those of a place.
    pub(super) fn common_rules(self) -> Vec<KernelRule<'a>> {
        let mut chains = vec![
            self.begins(),
            self.begins_other(),
            self.inherits(),
            self.stray_icmp(),
            self.begun_stray(),
            self.begun_record(),
            self.begun_again(),
            self.crossed(),
            self.accepted(),
            self.beside(),
            self.beside_begins(),
            self.alone(),
            self.verdict_accept(),
            self.save_chain(),
            self.save_first(),
            self.verdict_drop(),
        ];
        for can_reject in [true, false] {
            chains.extend([self.verdict_reject(can_reject), self.reject_packet(can_reject)]);
        }
        for way in Way::ALL {
            let of_way = [Self::back, Self::stray, Self::listed, Self::reversed, Self::reversed_denied];
            chains.extend(of_way.map(|chain| chain(self, way)));
            chains.extend([self.denied(way), self.rejected(way)]);
            chains.extend(way.has_replies().then(|| self.replies(way)));
        }
        if self.surroundings.offloads() {
            chains.extend(offload::common_chains(self.surroundings));
        }
        chains.into_iter().flat_map(|chain| chain.rules).collect()
    }

    /// Verdicts of packets that come to their hook once more: those that deny hold. An accepted
    /// packet is as one that comes for the first time.
    fn back(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Back(way), way);
        self.denying_verdicts(&mut chain, way);
        chain.change(&[], CLEAR);
        chain
    }

    fn denying_verdicts(self, chain: &mut Chained<'a>, way: Way) {
        let can_reject = way.can_reject();
        let codes = self.codes();
        for (code, target) in [
            (codes.dropped(), FlowChain::VerdictDrop),
            (codes.rejected(), FlowChain::VerdictReject { can_reject }),
            (codes.rejected_packet(), FlowChain::RejectPacket { can_reject }),
        ] {
            chain.push(&[Match::priority(code, u32::MAX)], goto(target));
        }
    }

    fn begins_other(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BeginsOther);
        let [_, sctp, dccp] = first_packets();
        chain.push(&sctp, goto(FlowChain::Begins));
        chain.push(&dccp, goto(FlowChain::Begins));
        chain
    }

    /// An entry gets its mark from the connection that has announced it (`init_conntrack`).
    fn inherits(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Inherits);
        chain.change(&[self.marked(marks.accepted())], self.save(0));
        chain.change(&[self.marked(marks.accepting())], self.save(0));
        chain
    }

    /// Connection tracking counts a packet that begins a connection to an older one, for example
    /// if the server has reset that.
    fn begins(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Begins);
        chain.push(&[self.marked(marks.denied())], Action::Return);
        // The older connection may be in the flowtable, or come into it at this moment.
        if self.surroundings.offloads() {
            chain.push(&[Match::assured()], jump(FlowChain::Recall));
        }
        // Packets of the older connection may be in the queue: their verdicts do not hold for the
        // new one.
        let confirmed = chain.push(&[Match::confirmed()], Action::Continue);
        confirmed.changes.push(self.save(marks.begun_again()));
        // Another program may copy the mark of the packet to the connection, as it has copied that
        // of the connection to the packet before.
        for value in [marks.accepted(), marks.accepting()] {
            let change = Change { field: Field::Mark, value: 0, mask: marks.mask() };
            chain.change(&[Match::mark(value, marks.mask())], change);
        }
        chain
    }

    /// Connection tracking calls a SYN invalid that comes from the side which has not begun the
    /// older connection, as it sees it. Later packets of the new connection it may count to the
    /// older one.
    fn begun_stray(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BegunStray);
        // It does not pass.
        chain.push(&[Match::priority(self.codes().rejected_packet(), u32::MAX)], Action::Return);
        chain.push_first(&[], goto(FlowChain::BegunRecord), None);
        chain
    }

    /// A packet that cannot be remembered does not pass.
    fn begun_record(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BegunRecord);
        for version in denied::versions(self.surroundings.family) {
            let rule = chain.push(&[], Action::Return);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Begun(version));
        }
        chain.drop();
        chain
    }

    fn begun_again(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::BegunAgain);
        for value in [marks.accepted(), marks.accepting()] {
            chain.change(&[self.marked(value)], self.save(marks.begun_again()));
        }
        chain
    }

    /// The answer to a SYN shows that the connection is the one whose first packet was accepted.
    /// Until then, packets of an older one are asked about.
    fn accepted(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Accepted);
        let compared = TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK;
        let answer = Match::tcp_flags(TcpFlags::SYN | TcpFlags::ACK, compared);
        let accepted = self.save(self.table.marks.accepted());
        chain.change(&[Match::protocol(Protocol::Tcp), answer], accepted);
        let by_other_side = Match::is_reply(true);
        chain.change(&[Match::protocol(SCTP), Match::sctp_init_ack(), by_other_side.clone()], accepted);
        chain.change(&[Match::protocol(DCCP), Match::dccp_response(), by_other_side], accepted);
        chain
    }

    /// By addresses and ports of the packet: connection tracking may have been misled, for example
    /// about the window of a TCP connection.
    fn stray(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Stray(way), way);
        chain.push(&[Match::protocols([Protocol::Icmp, Protocol::Icmpv6])], goto(FlowChain::StrayIcmp));
        let listed = Match::listed(Of::Packet);
        let deny = |chain: &mut Chained<'a>, protocol: Option<Protocol>, of: Of| {
            for set in DeniedSet::all(self.surroundings.family) {
                let conditions: Vec<Match> =
                    protocol.map(Match::protocol).into_iter().chain([listed.clone(), Match::denied(set, of)]).collect();
                let action = if set.reject { goto(FlowChain::Rejected(way)) } else { Action::Drop };
                let rule = chain.push(&conditions, action);
                rule.facts.version = Some(set.version);
                rule.remember = Some(Remember::Denied(set, of));
                rule.counts = !set.reject;
            }
        };
        deny(&mut chain, None, Of::Packet);
        chain.push_first(&[], Action::Return, None);
        for protocol in [Protocol::Tcp, SCTP, DCCP] {
            deny(&mut chain, Some(protocol), Of::PacketReversed);
        }
        chain
    }

    /// Errors about packets of denied connections, and replies to denied echo requests. The errors
    /// are not rejected: no ICMP error is sent about one.
    fn stray_icmp(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::StrayIcmp);
        for set in DeniedSet::all(self.surroundings.family) {
            let protocol = match set.version {
                IpVersion::V4 => Protocol::Icmp,
                IpVersion::V6 => Protocol::Icmpv6,
            };
            for of in [Of::Quoted(set.version), Of::QuotedReversed(set.version), Of::EchoReply(set.version)] {
                let conditions =
                    [Match::protocol(protocol), Match::icmp_about(of), Match::listed(of), Match::denied(set, of)];
                let rule = chain.push(&conditions, Action::Drop);
                rule.facts.version = Some(set.version);
                rule.counts = true;
            }
        }
        chain
    }

    fn listed(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Listed(way), way);
        if way.has_replies() {
            for version in denied::versions(self.surroundings.family) {
                chain.push_for(version, &[Match::replied(version)], jump(FlowChain::Replies(way)));
            }
        }
        chain.push_denied(Of::Connection, |_| goto(FlowChain::Denied(way)));
        for version in denied::versions(self.surroundings.family) {
            for of in Of::Connection.both() {
                chain.push_for(version, &[Match::begun(version, of)], jump(FlowChain::BegunAgain));
            }
        }
        chain.push_denied(Of::ConnectionReversed, |_| goto(FlowChain::Reversed(way)));
        chain
    }

    /// The connection's tuple is that of a denied one, reversed. If a packet has begun it after the
    /// denial (`flow_beside_ip`), it is one of its own, which no verdict has denied: with forged
    /// addresses, anybody could otherwise block the connections of others. If not, its packets have
    /// crossed the denied one, or the entry of the denied connection was lost and the other side
    /// has made a new one.
    fn reversed(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Reversed(way), way);
        // The denied side would begin its connection again.
        chain.push_first(&[Match::is_reply(true)], goto(FlowChain::ReversedDenied(way)), None);
        for version in denied::versions(self.surroundings.family) {
            chain.push_for(version, &[Match::beside(version)], Action::Return);
            chain.rules.last_mut().into_iter().for_each(|rule| rule.remember = Some(Remember::Beside(version)));
        }
        chain.push_first(&[], Action::Return, None);
        chain.push(&[Match::confirmed()], goto(FlowChain::ReversedDenied(way)));
        chain.push(&[begin_so()], goto(FlowChain::ReversedDenied(way)));
        chain
    }

    /// The packet passes.
    fn beside(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Beside);
        let codes = self.codes();
        for denied in [codes.dropped(), codes.rejected(), codes.rejected_packet()] {
            chain.push(&[Match::priority(denied, u32::MAX)], Action::Return);
        }
        chain.push_denied(Of::ConnectionReversed, |_| goto(FlowChain::BesideBegins));
        chain
    }

    /// It begins a connection beside a denied one.
    fn beside_begins(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BesideBegins);
        let first = first_packets().into_iter().map(|first| (first.to_vec(), false));
        for (conditions, others) in first.chain([(vec![begin_so()], true)]) {
            for version in denied::versions(self.surroundings.family) {
                let rule = chain.push(&[], Action::Return);
                rule.facts.version = Some(version);
                rule.conditions.push((Match::is_reply(false), false));
                rule.conditions.extend(conditions.iter().map(|condition| (condition.clone(), others)));
                rule.remember = Some(Remember::Beside(version));
            }
        }
        chain
    }

    /// A first packet of the other side may have crossed the denied one. Where the protocol tells
    /// that it begins a connection, it has not.
    fn crossed(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Crossed);
        chain.push_first(&[], Action::Return, None);
        for version in denied::versions(self.surroundings.family) {
            chain.push_for(version, &[Match::recent(version)], Action::Drop);
            chain.rules.last_mut().into_iter().for_each(|rule| rule.counts = true);
        }
        chain
    }

    fn reversed_denied(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::ReversedDenied(way), way);
        let of = Of::ConnectionReversed;
        // Without first packets, it is the same conversation also when its entry is gone.
        for set in DeniedSet::all(self.surroundings.family) {
            let rule = chain.push(&[Match::denied(set, of)], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.conditions.push((begin_so(), true));
            rule.remember = Some(Remember::Denied(set, Of::Connection));
        }
        for set in DeniedSet::all(self.surroundings.family).filter(|set| set.reject) {
            let rule = chain.push(&[Match::denied(set, of)], goto(FlowChain::Rejected(way)));
            rule.facts.version = Some(set.version);
            rule.remember = Some(Remember::Denied(set, of));
        }
        chain.remember(false, &[], of, Action::Continue);
        chain.drop();
        chain
    }

    /// Lets the time of the memory begin anew.
    fn denied(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Denied(way), way);
        chain.remember_translated();
        for set in DeniedSet::all(self.surroundings.family) {
            let of = Of::ConnectionReversed;
            let rule = chain.push(&[Match::denied(set, of)], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.conditions.push((begin_so(), true));
            rule.remember = Some(Remember::Denied(set, of));
        }
        for set in DeniedSet::all(self.surroundings.family).filter(|set| set.reject) {
            let rule = chain.push(&[Match::denied(set, Of::Connection)], goto(FlowChain::Rejected(way)));
            rule.facts.version = Some(set.version);
            rule.remember = Some(Remember::Denied(set, Of::Connection));
        }
        chain.remember(false, &[], Of::Connection, Action::Continue);
        chain.drop();
        chain
    }

    fn rejected(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Rejected(way), way);
        if way.has_replies() {
            chain.push(&[], jump(FlowChain::Replies(way)));
        }
        chain.reject(way.can_reject());
        chain
    }

    /// Accepts what the kernel sends for a rejected packet (`nf_send_reset`, `nf_send_unreach`):
    /// segments without options or data, and ICMP errors, which come from no process.
    fn replies(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Replies(way), way);
        match way {
            // What comes over the loopback interface has passed `Output`.
            Way::In | Way::Forward => {
                chain.push(&[], Action::Return).conditions.push((Match::on_loopback(), true));
            }
            Way::Out => {}
            Way::Leaving => {
                chain.push(&[Match::arrived()], Action::Return);
            }
        }
        if way != Way::In {
            chain.push(&[Match::of_user()], Action::Return);
        }
        let reset = Match::tcp_flags(TcpFlags::RST, TcpFlags::RST);
        for (version, length) in [(IpVersion::V4, 40), (IpVersion::V6, 60)] {
            let conditions = [Match::protocol(Protocol::Tcp), reset.clone(), Match::length(length)];
            chain.push_for(version, &conditions, Action::Accept);
        }
        let error = Match::connection_state([ConnectionState::Related]);
        for (version, protocol) in [(IpVersion::V4, Protocol::Icmp), (IpVersion::V6, Protocol::Icmpv6)] {
            chain.push_for(version, &[Match::protocol(protocol), error.clone()], Action::Accept);
        }
        chain
    }

    /// A denial wins, whichever comes first.
    fn verdict_accept(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::VerdictAccept);
        chain.push(&[self.marked(self.table.marks.denied())], Action::Return);
        let not_listed = chain.push(&[], goto(FlowChain::Save));
        not_listed.conditions.push((Match::listed(Of::Connection), true));
        for of in [Of::Connection, Of::ConnectionReversed] {
            chain.push_denied(of, |_| Action::Return);
        }
        chain.push(&[], goto(FlowChain::Save));
        chain
    }

    fn save_chain(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Save);
        chain.push_first(&[], goto(FlowChain::SaveFirst), None);
        for undecided in [marks.begun_again(), marks.accepting()] {
            chain.push(&[self.marked(undecided)], Action::Return);
        }
        chain.change(&[], self.save(marks.accepted()));
        chain
    }

    fn save_first(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::SaveFirst);
        chain.change(&[], self.save(self.table.marks.accepting()));
        chain
    }

    fn verdict_drop(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::VerdictDrop);
        chain.remember_verdict(false);
        self.recall(&mut chain);
        chain.change(&[], self.save(self.table.marks.denied()));
        chain.drop();
        chain
    }

    fn verdict_reject(self, can_reject: bool) -> Chained<'a> {
        let way = if can_reject { Way::In } else { Way::Leaving };
        let mut chain = self.of_way(FlowChain::VerdictReject { can_reject }, way);
        chain.remember_verdict(true);
        self.recall(&mut chain);
        chain.change(&[], self.save(self.table.marks.denied()));
        chain.reject(can_reject);
        chain
    }

    /// The denied connection may be in the flowtable, or come into it at this moment: by a packet
    /// that has seen its mark before, and not that it is listed.
    fn recall(self, chain: &mut Chained<'a>) {
        if self.surroundings.offloads() {
            let rule = chain.push(&[self.marked(self.table.marks.accepted())], Action::Continue);
            rule.remember = Some(Remember::Recalled);
        }
    }

    fn reject_packet(self, can_reject: bool) -> Chained<'a> {
        let way = if can_reject { Way::In } else { Way::Leaving };
        let mut chain = self.of_way(FlowChain::RejectPacket { can_reject }, way);
        for version in denied::versions(self.surroundings.family) {
            let rule = chain.push(&[], Action::Continue);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Replied(version));
        }
        chain.reject(can_reject);
        chain
    }

    /// The chains of a place before the user's rules.
    pub(super) fn first_chains(self, place: Place) -> [Chain; 2] {
        let default = self.surroundings.priority;
        let targets = [Target::First(place, default), Target::Unusual(place, default)];
        targets.map(|target| Chain { name: target.name(), base: None, fixed: false })
    }

    /// The rule before the user's.
    pub(super) fn first_rule(self, place: Place) -> KernelRule<'a> {
        let mut chain = Chained::new(chain_name(place, self.surroundings.priority), place, self.surroundings);
        chain.push(&[], Action::Jump(Target::First(place, self.surroundings.priority)));
        chain.rules.remove(0)
    }

    /// The rules of a place that only packets of the other direction traverse. `places` are those
    /// of the user's rules.
    pub(super) fn opposite_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let mut chain = Chained::new(opposite_chain(place, self.surroundings.priority).name, place, self.surroundings);
        // At `Output`, the packets of the other direction on the loopback interface have met the
        // same rules.
        if place.hook == Hook::Input && places.iter().any(|other| other.hook == Hook::Output) {
            chain.push(&[Match::on_loopback()], Action::Accept);
        }
        chain.push(&[], Action::Jump(Target::First(place, self.surroundings.priority)));
        let mut last = self.last_rules(place, places);
        last.iter_mut().for_each(|rule| rule.chain.clone_from(&chain.chain));
        chain.rules.extend(last);
        self.push_passing(&mut chain, place, places);
        chain.rules
    }

    /// The rules of [`first_chains`](Self::first_chains). `places` are all places of the table.
    pub(super) fn first_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let marks = self.table.marks;
        let way = Way::of(place.hook);
        let target = Target::First(place, self.surroundings.priority);
        let mut chain = Chained::new(target.name(), place, self.surroundings);
        chain.push(&[self.has_code()], jump(FlowChain::Back(way)));
        let first = first_traversal(place, places);
        if let Some(first) = &first {
            let [syn, ..] = first_packets();
            let rule = chain.push(&syn, jump(FlowChain::Begins));
            rule.conditions.extend(first.clone());
            let rule = chain.push(&[Match::higher_protocol(17)], jump(FlowChain::BeginsOther));
            rule.conditions.extend(first.clone());
        }
        // Nothing else concerns most packets. An entry that no packet has confirmed may have
        // inherited its mark.
        let accepted = chain.push(&[self.marked(marks.accepted()), Match::confirmed()], Action::Return);
        accepted.conditions.push((Match::listed(Of::Connection), true));
        // Packets of an established connection are not concerned.
        let states =
            [ConnectionState::New, ConnectionState::Related, ConnectionState::Invalid, ConnectionState::Untracked];
        let unusual = Target::Unusual(place, self.surroundings.priority);
        chain.push(&[Match::connection_state(states)], Action::Jump(unusual));
        chain.push(&[Match::listed(Of::Connection)], jump(FlowChain::Listed(way)));
        chain.push(&[self.marked(marks.denied())], goto(FlowChain::Denied(way)));
        chain.push(&[self.marked(marks.accepting())], jump(FlowChain::Accepted));

        let mut unusual = Chained::new(unusual.name(), place, self.surroundings);
        unusual.push(&[Match::confirmed()], Action::Return);
        unusual.push(&[stray()], goto(FlowChain::Stray(way)));
        if let Some(first) = first {
            unusual.push(&[], jump(FlowChain::Inherits)).conditions.extend(first);
        }
        // A packet that is queued twice with one unconfirmed entry is dropped
        // (`nfqnl_enqueue_packet`), so a reply to a rejected first packet must not be queued.
        if way.has_replies() {
            unusual.push(&[], jump(FlowChain::Replies(way)));
        }
        chain.rules.append(&mut unusual.rules);
        chain.rules
    }

    /// The rules behind the user's. `places` are those of rules of the user.
    pub(super) fn last_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let mut chain = Chained::new(chain_name(place, self.surroundings.priority), place, self.surroundings);
        // At a later place, a rule may ask about the packet.
        if is_last(place, places) {
            chain.push(&[Match::unconfirmed(), Match::listed(Of::Connection)], jump(FlowChain::Crossed));
        }
        chain.rules
    }

    /// Adds the rules for packets that pass a place.
    fn push_passing(self, chain: &mut Chained<'a>, place: Place, places: &[Place]) {
        chain.push(&[stray()], jump(FlowChain::BegunStray));
        // At a later place, a verdict may deny the packet.
        if is_last_but_for_input(place, places) {
            for condition in [Match::unconfirmed(), self.marked(self.table.marks.begun_again())] {
                chain.push(&[condition, Match::listed(Of::Connection)], jump(FlowChain::Beside));
            }
        }
    }

    /// The rules of a chain that sends packets to queues, for the rule of this index.
    pub(super) fn queue_rules(
        self,
        index: Option<usize>,
        target: Target,
        queues: Queues,
        place: Place,
    ) -> Vec<KernelRule<'a>> {
        let marks = self.table.marks;
        let mut chain = Chained::new(target.name(), place, self.surroundings);
        if let Target::OffloadOrQueues(_) = target {
            let established = Match::connection_state([ConnectionState::Established]);
            let protocols = Match::protocols([Protocol::Tcp, Protocol::Udp]);
            chain.push(&[self.marked(marks.accepted()), established, protocols], jump(FlowChain::Offload));
        }
        chain.push(&[self.marked(marks.accepted())], Action::Accept);
        let codes = self.codes();
        let code = |code| Change { field: Field::Priority, value: code, mask: flow_codes::CODE };
        let has = |code| Match::priority(code, flow_codes::CODE);
        chain.change(&[has(0)], code(codes.alone()));
        let known = Match::connection_state([ConnectionState::New, ConnectionState::Established]);
        chain.change(&[has(codes.alone()), known], code(codes.queued()));
        // The first packet of a connection that another one has announced. ICMP errors are related
        // too.
        let related = [has(codes.alone()), Match::connection_state([ConnectionState::Related])];
        let rule = chain.push(&related, Action::Continue);
        rule.conditions.push((Match::protocols([Protocol::Icmp, Protocol::Icmpv6]), true));
        rule.changes.push(code(codes.queued()));
        chain.push(&[], Action::Queue(queues)).counts = true;
        let mut rules = chain.rules;
        rules.iter_mut().for_each(|rule| rule.index = index);
        rules
    }

    /// Packets whose verdict accepts their connection.
    fn verdict_accepts(self) -> Match {
        Match::priority(self.codes().accepted(), flow_codes::CODE)
    }

    /// Of two first packets that waited at once, the other one's verdict has accepted, and this one
    /// passes alone. A packet without a code, or another program's priority in its place, has not
    /// waited here.
    fn alone(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Alone);
        chain.push_first(&[], Action::Return, Some(self.save(self.table.marks.begun_again())));
        let accepted = self.verdict_accepts();
        for rule in &mut chain.rules {
            rule.conditions.extend([(accepted.clone(), true), (Match::priority(0, flow_codes::CODE), true)]);
        }
        chain
    }

    /// The rules of [`chain_behind`]. `places` are those of rules of the user.
    pub(super) fn rules_behind(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let way = Way::of(place.hook);
        let behind = chain_behind(place, self.surroundings.priority);
        let mut chain = Chained::new(behind.name, place, self.surroundings);
        // Nothing else concerns most packets.
        let accepted = self.marked(self.table.marks.accepted());
        chain.push(&[accepted], Action::Accept).conditions.push((self.has_code(), true));
        // What passes, also by a rule of the user that accepts it.
        self.push_passing(&mut chain, place, places);
        chain.push(&[self.marked(self.table.marks.accepting())], jump(FlowChain::Alone));
        // What has come from the queue.
        chain.push(&[], Action::Accept).conditions.push((self.has_code(), true));
        self.denying_verdicts(&mut chain, way);
        let accepted = self.verdict_accepts();
        chain.push(std::slice::from_ref(&accepted), jump(FlowChain::VerdictAccept));
        for version in denied::versions(self.surroundings.family) {
            chain.push_for(version, &[Match::unconfirmed(), Match::listed(Of::Connection)], Action::Continue);
            chain.rules.last_mut().into_iter().for_each(|rule| rule.remember = Some(Remember::NotRecent(version)));
        }
        let again = self.save(self.table.marks.begun_again());
        let start = chain.rules.len();
        let known = [self.marked(self.table.marks.accepted()), Match::confirmed()];
        chain.push_first(&known, Action::Continue, Some(again));
        chain.rules[start..].iter_mut().for_each(|rule| rule.conditions.push((accepted.clone(), true)));
        chain.change(&[], CLEAR);
        chain.rules
    }
}

/// Packets without an entry.
fn stray() -> Match {
    Match::connection_state([ConnectionState::Invalid, ConnectionState::Untracked])
}

/// Leaves the packet's own priority.
const CLEAR: Change = Change { field: Field::Priority, value: 0, mask: flow_codes::CODE };
