//! What a packet meets behind the queue: its verdict for the connection is carried out.

use super::{
    context::{CLEAR, Flows},
    places::chain_behind,
};
use crate::{
    action::Action,
    chain::Place,
    chained::{Chained, answers, authenticated, begin_so, goto, jump},
    checked::KernelRule,
    denied::{self, Remember},
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::Match,
    tuple::Of,
};
use nfqueue_proto::types::flow_codes;

impl<'a> Flows<'a> {
    /// The rules of [`chain_behind`]. `places` are those of rules of the user.
    pub(crate) fn rules_behind(self, place: Place, places: &[Place]) -> Vec<KernelRule<'a>> {
        let way = Way::of(place.hook);
        let behind = chain_behind(place, self.surroundings.priority);
        let mut chain = Chained::new(behind.name, place, self.surroundings);
        // Nothing else concerns most packets.
        let accepted = self.marked(self.table.marks.accepted());
        chain.push(&[accepted], jump(FlowChain::Known)).conditions.push((self.has_code(), true));
        let accepts = self.verdict_accepts();
        let start = chain.rules.len();
        let known = [self.marked(self.table.marks.accepted()), Match::confirmed()];
        chain.push_first(&known, Action::Continue, Some(self.save(self.table.marks.begun_again())));
        chain.rules[start..].iter_mut().for_each(|rule| rule.conditions.push((accepts.clone(), true)));
        // What passes, also by a rule of the user that accepts it.
        self.push_passing(&mut chain, place, places);
        chain.push(&[self.marked(self.table.marks.accepting())], jump(FlowChain::Alone));
        // What has come from the queue.
        chain.push(&[], Action::Accept).conditions.push((self.has_code(), true));
        self.denying_verdicts(&mut chain, way);
        chain.push(&[accepts], jump(FlowChain::VerdictAccept));
        for version in denied::versions(self.surroundings.family) {
            let crossed = [Match::unconfirmed(), Match::listed(Of::Connection)];
            if let Some(rule) = chain.push_for(version, &crossed, Action::Continue) {
                rule.remember = Some(Remember::NotRecent(version));
            }
        }
        chain.change(&[], CLEAR);
        chain.rules
    }

    /// Of two first packets that waited at once, the other one's verdict has accepted, and this one
    /// passes alone. A packet without a code, or another program's priority in its place, has not
    /// waited here.
    pub(super) fn alone(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Alone);
        chain.push_first(&[], Action::Return, Some(self.save(self.table.marks.begun_again())));
        let accepted = self.verdict_accepts();
        for rule in &mut chain.rules {
            rule.conditions.extend([(accepted.clone(), true), (Match::priority(0, flow_codes::CODE), true)]);
        }
        chain
    }

    /// A denial wins, whichever comes first.
    pub(super) fn verdict_accept(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::VerdictAccept);
        chain.push(&[self.marked(self.table.marks.denied())], Action::Return);
        let not_listed = chain.push(&[], goto(FlowChain::Save));
        not_listed.conditions.push((Match::listed(Of::Connection), true));
        chain.push_denied(Action::Return);
        chain.push_other_side(Action::Return);
        chain.push(&[], goto(FlowChain::Save));
        chain
    }

    pub(super) fn save_chain(self) -> Chained<'a> {
        let marks = self.table.marks;
        let mut chain = self.common(FlowChain::Save);
        // It may begin a connection, or be of an older one.
        chain.push_for(IpVersion::V6, &authenticated(), Action::Return);
        chain.push_first(&[], goto(FlowChain::SaveFirst), None);
        // It is in the middle of a connection that has no other entry, or whose first packet has
        // passed with an entry that is gone: then it may be of an older connection.
        chain.push(&[begin_so(), Match::unconfirmed()], Action::Return);
        // The entry is that of a connection that begins, and conntrack counts late packets of an
        // older one to it: it ignores them (`NFCT_TCP_IGNORE`), and does not compare the
        // verification tag of each SCTP packet. The packet that completes a handshake of TCP or
        // DCCP assures the entry before it comes here.
        let [syn_ack, init_ack, response] = answers();
        for ([protocol, answer], undecided) in [
            (syn_ack, (Match::answered(), false)),
            (init_ack, (Match::assured(), true)),
            (response, (Match::answered(), false)),
        ] {
            chain.push(&[protocol], Action::Return).conditions.extend([undecided, (answer, true)]);
        }
        for undecided in [marks.begun_again(), marks.accepting()] {
            chain.push(&[self.marked(undecided)], Action::Return);
        }
        chain.change(&[], self.save(marks.accepted()));
        chain
    }

    pub(super) fn save_first(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::SaveFirst);
        chain.change(&[], self.save(self.table.marks.accepting()));
        chain
    }

    pub(super) fn verdict_drop(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::VerdictDrop);
        chain.remember_verdict(false);
        self.recall(&mut chain);
        chain.change(&[], self.save(self.table.marks.denied()));
        chain.drop();
        chain
    }

    pub(super) fn verdict_reject(self, can_reject: bool) -> Chained<'a> {
        let way = if can_reject { Way::In } else { Way::Leaving };
        let mut chain = self.of_way(FlowChain::VerdictReject { can_reject }, way);
        chain.remember_verdict(true);
        self.recall(&mut chain);
        chain.change(&[], self.save(self.table.marks.denied()));
        chain.reject(can_reject);
        chain
    }

    /// The denied connection may be in the flowtable, or enter it now: by a packet that has seen
    /// its mark before, and not that it is listed.
    pub(super) fn recall(self, chain: &mut Chained<'a>) {
        if self.surroundings.offloads() {
            let rule = chain.push(&[self.marked(self.table.marks.accepted())], Action::Continue);
            rule.remember = Some(Remember::Recalled);
        }
    }

    pub(super) fn reject_packet(self, can_reject: bool) -> Chained<'a> {
        let way = if can_reject { Way::In } else { Way::Leaving };
        let mut chain = self.of_way(FlowChain::RejectPacket { can_reject }, way);
        // The reply to a first packet shows by its entry what it is, and one to a packet of a flood
        // may never come: the kernel limits ICMP errors.
        for version in denied::versions(self.surroundings.family) {
            let rule = chain.push(&[Match::confirmed()], Action::Continue);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Replied(version));
        }
        chain.reject(can_reject);
        chain
    }
}
