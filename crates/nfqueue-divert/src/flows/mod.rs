//! The chains, sets and rules that carry out verdicts for whole connections.
//!
//! A denied connection is remembered by its tuple ([`denied`](super::denied)), which is looked up
//! before anything is accepted. An accepted connection is remembered by the mark of its entry
//! ([`FlowMarks`](crate::FlowMarks)), which never holds for a packet that begins a connection.
//! A verdict comes back from the queue in the packet's priority
//! ([`flow_codes`](nfqueue_proto::types::flow_codes)).
//!
//! | chain | content |
//! |---|---|
//! | a base chain of the user's rules | first a jump to `CHAIN_first`; last the rules of [`Flows::last_rules`] |
//! | `CHAIN_first` | stops packets of denied connections |
//! | `CHAIN_unusual` | the same for packets that are not of an established connection; drops fragments in fragments of IPv6 |
//! | `CHAIN_opposite`, a base chain | the same at the other hook that packets of this host's connections traverse, where it has no rules of the user; also at `Output` or `Forward`, so that no packet comes to `Postrouting` first |
//! | `to_queue_N` | what a rule to a queue leads to: accepts packets of accepted connections, and marks the others as queued |
//! | `CHAIN_flows`, at the same hook and priority, and so behind the queue | carries out the verdict that the packet's priority contains, and removes it from the priority. One that denies comes here only if an earlier chain at the hook has just been removed |
//!
//! The chains between have these names, with `_in`, `_forward`, `_out` or `_leaving` where the hook
//! makes a difference:
//!
//! | chain | packets that come to it |
//! |---|---|
//! | `flow_back` | have a code in their priority before the queue: a verdict that denies (`NF_REPEAT`), that of a packet that comes to its hook once more (`nf_reinject` counts hooks, and another may have been registered since), or a foreign value |
//! | `flow_inherits` | have an entry that no packet has confirmed, and come to their first place of the table; or are of the other side of a denied connection |
//! | `flow_begins` | begin a connection, at their first place of the table: TCP SYN, SCTP INIT, DCCP Request |
//! | `flow_known` | belong to an accepted connection, and would come to the queue |
//! | `flow_begun_stray`, `flow_begun_record` | pass, and belong to no connection, as connection tracking sees it |
//! | `flow_begun_again` | belong to a connection that such a packet has begun |
//! | `flow_stray`, `flow_stray_icmp` | belong to no connection, as connection tracking sees it |
//! | `flow_listed` | have the ports of a denied connection, or of one of which a packet has just been rejected |
//! | `flow_reversed`, `flow_reversed_denied` | have the tuple of the other side of a denied connection |
//! | `flow_beside`, `flow_beside_begins`, `flow_beside_record` | pass, and may begin a connection with such a tuple |
//! | `flow_alone` | pass, and belong to a connection that was accepted by a packet that begins one |
//! | `flow_crossed` | come from the other side of a connection that has just been denied, and no rule has decided about them |
//! | `flow_accepted` | belong to a connection that was accepted by such a packet, and not yet answered |
//! | `flow_denied`, `flow_rejected` | are denied |
//! | `flow_replies` | may be replies of this host to a rejected packet |
//! | `flow_verdict_accept`, `flow_save`, `flow_save_first` | have a verdict that accepts their connection |
//! | `flow_verdict_drop`, `flow_verdict_reject`, `flow_reject_packet` | have another verdict |
//!
//! With [`offload`](super::offload) there are more.

mod before;
mod behind;
mod context;
mod other_side;
mod places;
mod stopped;

pub(super) use context::Flows;
pub(super) use places::{chain_behind, opposite_chain, places};

use super::{checked::KernelRule, flow_chain::Way, offload};

impl<'a> Flows<'a> {
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
            self.known(),
            self.beside(),
            self.beside_begins(),
            self.beside_record(),
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
}
