//! What the other side of a denied connection sends: packets of that connection, or of one of its
//! own.

use super::context::Flows;
use crate::{
    action::Action,
    chained::{Chained, begin_so, goto, jump},
    denied::{self, DeniedSet, Remember},
    flow_chain::{FlowChain, Way},
    matching::Match,
    tuple::Of,
};

impl<'a> Flows<'a> {
    /// The connection's tuple is that of the other side of a denied one. If a packet has begun it
    /// after the denial (`flow_beside_ip`), it is one of its own, which no verdict has denied: with
    /// forged addresses, a sender could otherwise block the connections of others. If not, its
    /// packets have crossed the denied one, or the entry of the denied connection was lost and the
    /// other side has made a new one.
    pub(super) fn reversed(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Reversed(way), way);
        // It is remembered as long as the denial, which any packet of the denied side renews.
        chain.renew_beside(Of::Ends, &[]);
        // An accept that it had does not come back when the memory of the denial is gone.
        chain.push(&[], jump(FlowChain::Inherits));
        // The denied side would begin its connection again.
        chain.push_first(&[Match::is_reply(true)], goto(FlowChain::ReversedDenied(way)), None);
        for version in denied::versions(self.surroundings.family) {
            chain.push_for(version, &[Match::beside(version, Of::Ends)], Action::Return);
        }
        chain.push_first(&[], Action::Return, None);
        chain.push(&[Match::confirmed()], goto(FlowChain::ReversedDenied(way)));
        chain.push_conversation(goto(FlowChain::ReversedDenied(way)));
        chain
    }

    pub(super) fn reversed_denied(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::ReversedDenied(way), way);
        let family = self.surroundings.family;
        // By which of its tuples the connection is found.
        let of = |set: DeniedSet| if set.replies { Of::Connection } else { Of::ConnectionReversed };
        // It is the other side's of the same conversation also when its entry is gone.
        for set in DeniedSet::every(family) {
            let rule = chain.push(&[Match::denied(set, of(set))], Action::Continue);
            rule.facts.version = Some(set.version);
            rule.remember = Some(Remember::Denied(DeniedSet { replies: true, ..set }, Of::Connection));
        }
        chain.renew(DeniedSet::all(family), Of::ConnectionReversed, &[]);
        // Otherwise the other side's own SYN would be denied as long as the entry is there.
        let denied = chain.push(&[], Action::Continue);
        denied.conditions.push((begin_so(), true));
        denied.changes.push(self.save(self.table.marks.denied()));
        for set in DeniedSet::every(family).filter(|set| set.reject) {
            chain.push_for(set.version, &[Match::denied(set, of(set))], goto(FlowChain::Rejected(way)));
        }
        chain.drop();
        chain
    }

    /// The packet passes.
    pub(super) fn beside(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Beside);
        let codes = self.codes();
        for denied in [codes.dropped(), codes.rejected(), codes.rejected_packet()] {
            chain.push(&[Match::priority(denied, u32::MAX)], Action::Return);
        }
        chain.push_other_side(goto(FlowChain::BesideBegins));
        chain
    }

    /// It may begin a connection beside a denied one.
    pub(super) fn beside_begins(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BesideBegins);
        chain.push(&[Match::is_reply(true)], Action::Return);
        chain.push_first(&[], goto(FlowChain::BesideRecord), None);
        chain.push_conversation(Action::Return);
        chain.push(&[], goto(FlowChain::BesideRecord));
        chain
    }

    /// A packet that cannot be remembered does not pass: its connection would be taken for the
    /// denied one.
    pub(super) fn beside_record(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BesideRecord);
        // An earlier place may have accepted it, before the denial.
        chain.push(&[], jump(FlowChain::Inherits));
        for version in denied::versions(self.surroundings.family) {
            let rule = chain.push(&[], Action::Return);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Beside(version, Of::Ends));
        }
        chain.drop();
        chain
    }

    /// A first packet of the other side may have crossed the denied one. Where the protocol shows
    /// that it begins a connection, it has not.
    pub(super) fn crossed(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::Crossed);
        chain.push_first(&[], Action::Return, None);
        for version in denied::versions(self.surroundings.family) {
            if let Some(rule) = chain.push_for(version, &[Match::recent(version)], Action::Drop) {
                rule.counts = true;
            }
        }
        chain
    }

    /// Connection tracking calls a SYN invalid that comes from the side which has not begun the
    /// older connection, as it sees it. Later packets of the new connection it may count to the
    /// older one.
    pub(super) fn begun_stray(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BegunStray);
        // It does not pass.
        chain.push(&[Match::priority(self.codes().rejected_packet(), u32::MAX)], Action::Return);
        chain.push_first(&[], goto(FlowChain::BegunRecord), None);
        chain
    }

    /// A packet that cannot be remembered does not pass.
    pub(super) fn begun_record(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::BegunRecord);
        for version in denied::versions(self.surroundings.family) {
            let rule = chain.push(&[], Action::Return);
            rule.facts.version = Some(version);
            rule.remember = Some(Remember::Begun(version));
        }
        chain.drop();
        chain
    }
}
