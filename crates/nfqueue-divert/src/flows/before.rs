//! What a packet meets before the queue: the rules around those of the user.

use super::{
    context::{CLEAR, Flows, stray},
    places::{first_traversal, is_last, opposite_chain},
};
use crate::{
    action::{Action, Change, Field, Queues, Target},
    chain::{Chain, Place, chain_name},
    chained::{AUTHENTICATION_HEADER, Chained, answers, authenticated, first_packets, goto, jump},
    checked::KernelRule,
    denied,
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::Match,
    tuple::Of,
};
use nfqueue_proto::types::{ConnectionState, Hook, Protocol, flow_codes};

impl<'a> Flows<'a> {
    /// The chains of a place before the user's rules.
    pub(crate) fn first_chains(self, place: Place) -> [Chain; 2] {
        let default = self.surroundings.priority;
        let targets = [Target::First(place, default), Target::Unusual(place, default)];
        targets.map(|target| Chain { name: target.name(), base: None, fixed: false })
    }

    /// The rule before the user's.
    pub(crate) fn first_rule(self, place: Place) -> KernelRule<'a> {
        let mut chain = Chained::new(chain_name(place, self.surroundings.priority), place, self.surroundings);
        chain.push(&[], Action::Jump(Target::First(place, self.surroundings.priority)));
        chain.rules.remove(0)
    }

    /// The rules of a place that only packets of the other direction traverse. `places` are those
    /// of the user's rules.
    pub(crate) fn opposite_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
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
    pub(crate) fn first_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
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
        // Behind the fragment header that the kernel has removed there is another one. Connection
        // tracking has no entry for parts.
        let invalid = Match::connection_state([ConnectionState::Invalid]);
        unusual.push_for(IpVersion::V6, &[invalid, Match::fragment_header()], Action::Drop);
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
    pub(crate) fn last_rules(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let mut chain = Chained::new(chain_name(place, self.surroundings.priority), place, self.surroundings);
        // At a later place, a rule may ask about the packet.
        if is_last(place, places) {
            chain.push(&[Match::unconfirmed(), Match::listed(Of::Connection)], jump(FlowChain::Crossed));
        }
        chain.rules
    }

    /// The rules of a chain that sends packets to queues, for the rule of this index.
    pub(crate) fn queue_rules(
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
        chain.push(&[self.marked(marks.accepted())], jump(FlowChain::Known));
        let codes = self.codes();
        let code = |code| Change { field: Field::Priority, value: code, mask: flow_codes::CODE };
        let has = |code| Match::priority(code, flow_codes::CODE);
        chain.change(&[has(0)], code(codes.alone()));
        let known = Match::connection_state([ConnectionState::New, ConnectionState::Established]);
        chain.change(&[has(codes.alone()), known], code(codes.queued()));
        // The first packet of a connection that another one has announced. ICMP errors are related
        // too, also behind an authentication header, where rules do not see what they are.
        let related = [has(codes.alone()), Match::connection_state([ConnectionState::Related])];
        let rule = chain.push(&related, Action::Continue);
        rule.conditions.push((Match::protocols([Protocol::Icmp, Protocol::Icmpv6, AUTHENTICATION_HEADER]), true));
        rule.changes.push(code(codes.queued()));
        chain.push(&[], Action::Queue(queues)).counts = true;
        let mut rules = chain.rules;
        rules.iter_mut().for_each(|rule| rule.index = index);
        rules
    }

    /// Adds the rules for packets that pass a place.
    pub(super) fn push_passing(self, chain: &mut Chained<'a>, place: Place, places: &[Place]) {
        // Others than those that connection tracking calls invalid do not come to an older entry.
        chain.push(&[Match::connection_state([ConnectionState::Invalid])], jump(FlowChain::BegunStray));
        // At a later place, a verdict may deny the packet.
        if is_last(place, places) {
            for condition in [Match::unconfirmed(), self.marked(self.table.marks.begun_again())] {
                chain.push(&[condition, Match::listed(Of::Connection)], jump(FlowChain::Beside));
            }
        }
    }

    /// Verdicts of packets that come to their hook once more: those that deny are carried out. An
    /// accepted packet is as one that comes for the first time.
    pub(super) fn back(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Back(way), way);
        self.denying_verdicts(&mut chain, way);
        chain.change(&[], CLEAR);
        chain
    }

    /// An entry gets its mark from the connection that has announced it (`init_conntrack`). The
    /// other side of a denied connection loses its accept here too.
    pub(super) fn inherits(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Inherits);
        chain.change(&[self.marked(marks.accepted())], self.save(0));
        chain.change(&[self.marked(marks.accepting())], self.save(0));
        chain.change(&[self.marked(marks.begun_again()), Match::unconfirmed()], self.save(0));
        chain
    }

    pub(super) fn begins_other(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BeginsOther);
        let [_, sctp, dccp] = first_packets();
        chain.push(&sctp, goto(FlowChain::Begins));
        chain.push(&dccp, goto(FlowChain::Begins));
        // Connection tracking reads what comes behind an authentication header, and rules cannot:
        // each such packet may begin a connection.
        // But an ICMP error there does not begin the connection that it quotes.
        let related = Match::connection_state([ConnectionState::Related]);
        let quotes: Vec<Match> = authenticated().into_iter().chain([related]).collect();
        chain.push_for(IpVersion::V6, &quotes, Action::Return);
        chain.push_for(IpVersion::V6, &authenticated(), goto(FlowChain::Begins));
        chain
    }

    /// Connection tracking counts a packet that begins a connection to an older one, for example
    /// if the server has reset that.
    pub(super) fn begins(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Begins);
        chain.push(&[self.marked(marks.denied())], Action::Return);
        // The older connection may be in the flowtable, or enter it now.
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

    /// A packet that begins a connection comes to the queue: a verdict for an older one may have
    /// been carried out on another processor after `flow_begins`, or another program may have
    /// restored the mark. So does one whose addresses are not those of its connection: a packet
    /// with a source route is for another host, and its connection is that with the next hop.
    pub(super) fn known(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Known);
        for version in denied::versions(self.surroundings.family) {
            for hidden in Match::hidden_addresses(version) {
                chain.push_for(version, &[hidden], Action::Return);
            }
        }
        chain.push(&[Match::protocol(Protocol::Udp)], Action::Accept);
        let [syn, others @ ..] = first_packets();
        chain.push(&syn, Action::Return);
        chain.push(&[Match::protocol(Protocol::Tcp)], Action::Accept);
        for first in &others {
            chain.push(first, Action::Return);
        }
        chain.push_for(IpVersion::V6, &authenticated(), Action::Return);
        chain.push(&[], Action::Accept);
        chain
    }

    pub(super) fn begun_again(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::BegunAgain);
        for value in [marks.accepted(), marks.accepting()] {
            chain.change(&[self.marked(value)], self.save(marks.begun_again()));
        }
        chain
    }

    /// The reply to a SYN shows that the connection is the one whose first packet was accepted.
    /// Until then, packets of an older one are asked about.
    pub(super) fn accepted(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Accepted);
        let accepted = self.save(self.table.marks.accepted());
        let [syn_ack, others @ ..] = answers();
        chain.change(&syn_ack, accepted);
        for [protocol, answer] in others {
            chain.change(&[protocol, answer, Match::is_reply(true)], accepted);
        }
        chain
    }
}
