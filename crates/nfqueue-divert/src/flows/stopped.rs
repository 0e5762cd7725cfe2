//! Packets of denied connections are dropped, with an error to the sender if the connection is
//! rejected.

use nfqueue_proto::types::{ConnectionState, Protocol};

use super::context::{Flows, framed};
use crate::{
    action::Action,
    chained::{Chained, DCCP, SCTP, goto, jump, with_ports},
    denied::{self, DeniedSet, Remember},
    family::IpVersion,
    flow_chain::{FlowChain, Way},
    matching::{Match, TcpFlags},
    tuple::Of,
};

impl<'a> Flows<'a> {
    pub(super) fn listed(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Listed(way), way);
        if way.has_replies() {
            for version in denied::versions(self.surroundings.family) {
                chain.push_for(version, &[Match::replied(version)], jump(FlowChain::Replies(way)));
            }
        }
        chain.push_denied(goto(FlowChain::Denied(way)));
        for version in denied::versions(self.surroundings.family) {
            for of in Of::Connection.both() {
                chain.push_for(version, &[Match::begun(version, of)], jump(FlowChain::BegunAgain));
            }
        }
        chain.push_other_side(goto(FlowChain::Reversed(way)));
        chain
    }

    /// Lets the time of the memory begin anew. The entry stays denied when that is over: it may be
    /// another one than that of the packet with the verdict, and may have been accepted.
    pub(super) fn denied(self, way: Way) -> Chained<'a> {
        let family = self.surroundings.family;
        let mut chain = self.of_way(FlowChain::Denied(way), way);
        chain.remember_translated();
        chain.renew(DeniedSet::of_replies(family), Of::ConnectionReversed, &[]);
        chain.renew_beside(Of::EndsReversed, &[]);
        chain.change(&[], self.save(self.table.marks.denied()));
        // As a verdict for a packet of this entry would.
        for set in DeniedSet::all(family).filter(|set| set.reject) {
            let rejected = [(Match::denied(set, Of::Connection), false)];
            chain.remember_connection([set], &rejected);
            chain.push_for(set.version, &[Match::denied(set, Of::Connection)], goto(FlowChain::Rejected(way)));
        }
        chain.remember_connection(DeniedSet::all(family).filter(|set| !set.reject), &[]);
        chain.drop();
        chain
    }

    pub(super) fn rejected(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Rejected(way), way);
        if way.has_replies() {
            chain.push(&[], jump(FlowChain::Replies(way)));
        }
        chain.reject(way.can_reject());
        chain
    }

    /// Accepts what the kernel sends for a rejected packet (`nf_send_reset`, `nf_send_unreach`):
    /// segments without options or data, and ICMP errors, which come from no process.
    pub(super) fn replies(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Replies(way), way);
        match way {
            // What comes over the loopback interface has passed `Output`.
            Way::In | Way::Forward => {
                chain.push(&[], Action::Return).conditions.push((Match::on_loopback(), true));
            }
            Way::Out => {}
            // Nor do those of other hosts that are bridged show an interface.
            Way::Leaving => {
                chain.push(&[Match::arrived()], Action::Return);
                chain.push(&[], Action::Return).conditions.push(framed());
            }
        }
        let reset = Match::tcp_flags(TcpFlags::RST, TcpFlags::RST);
        let error = Match::connection_state([ConnectionState::Related]);
        let replies = [
            (IpVersion::V4, vec![Match::protocol(Protocol::Tcp), reset.clone(), Match::length(40)]),
            (IpVersion::V6, vec![Match::protocol(Protocol::Tcp), reset, Match::length(60)]),
            (IpVersion::V4, vec![Match::protocol(Protocol::Icmp), error.clone()]),
            (IpVersion::V6, vec![Match::protocol(Protocol::Icmpv6), error]),
        ];
        if way == Way::Out {
            // `Input` does not see that a process has sent it.
            for (version, reply) in &replies {
                let conditions: Vec<Match> = reply.iter().cloned().chain([Match::of_user()]).collect();
                if let Some(rule) = chain.push_for(*version, &conditions, Action::Continue) {
                    rule.remember = Some(Remember::NotReplied(*version));
                }
            }
        }
        if way != Way::In {
            chain.push(&[Match::of_user()], Action::Return);
        }
        for (version, reply) in &replies {
            chain.push_for(*version, reply, Action::Accept);
        }
        chain
    }

    /// By addresses and ports of the packet: connection tracking may have been misled, for example
    /// about the window of a TCP connection.
    pub(super) fn stray(self, way: Way) -> Chained<'a> {
        let mut chain = self.of_way(FlowChain::Stray(way), way);
        chain.push(&[Match::protocols([Protocol::Icmp, Protocol::Icmpv6])], goto(FlowChain::StrayIcmp));
        let listed = Match::listed(Of::Packet);
        // A connection beside a denied one is remembered as long as that.
        Of::Packet.both().into_iter().for_each(|of| chain.renew_beside(of, std::slice::from_ref(&listed)));
        let deny = |chain: &mut Chained<'a>, set: DeniedSet, protocol: Option<Protocol>, of: Of| {
            let conditions = [Match::listed(of), Match::denied(set, of)];
            let conditions: Vec<Match> = protocol.map(Match::protocol).into_iter().chain(conditions).collect();
            let action = if set.reject { goto(FlowChain::Rejected(way)) } else { Action::Drop };
            let rule = chain.push(&conditions, action);
            rule.facts.version = Some(set.version);
            rule.remember = Some(Remember::Denied(set, of));
            rule.counts = !set.reject;
        };
        let family = self.surroundings.family;
        chain.renew(DeniedSet::of_replies(family), Of::PacketReversed, &[(listed.clone(), false)]);
        DeniedSet::all(family).for_each(|set| deny(&mut chain, set, None, Of::Packet));
        chain.push_first(&[], Action::Return, None);
        for version in denied::versions(family) {
            chain.push_for(version, &[listed.clone(), Match::beside(version, Of::Packet)], Action::Return);
        }
        for protocol in [Protocol::Tcp, SCTP, DCCP] {
            let conditions = [(Match::protocol(protocol), false), (listed.clone(), false)];
            chain.renew(DeniedSet::all(family), Of::PacketReversed, &conditions);
        }
        DeniedSet::of_replies(family).for_each(|set| deny(&mut chain, set, None, Of::Packet));
        for protocol in [Protocol::Tcp, SCTP, DCCP] {
            DeniedSet::all(family).for_each(|set| deny(&mut chain, set, Some(protocol), Of::PacketReversed));
        }
        chain.push(&[with_ports()], Action::Return);
        DeniedSet::every(family).for_each(|set| deny(&mut chain, set, None, Of::WithoutPorts));
        chain
    }

    /// Errors about packets of denied connections, denied echo requests, and replies to these. They
    /// are not rejected: no ICMP error is sent about an error.
    pub(super) fn stray_icmp(self) -> Chained<'a> {
        let mut chain = self.common(FlowChain::StrayIcmp);
        for set in DeniedSet::every(self.surroundings.family) {
            let protocol = match set.version {
                IpVersion::V4 => Protocol::Icmp,
                IpVersion::V6 => Protocol::Icmpv6,
            };
            let about = [Of::Quoted, Of::QuotedReversed, Of::EchoReply, Of::EchoRequest];
            for of in about[..if set.replies { 2 } else { 4 }].iter().map(|of| of(set.version)) {
                let conditions =
                    [Match::protocol(protocol), Match::icmp_about(of), Match::listed(of), Match::denied(set, of)];
                let rule = chain.push(&conditions, Action::Drop);
                rule.facts.version = Some(set.version);
                rule.counts = true;
            }
        }
        chain
    }
}
