//! What the rules of a table for verdicts for connections have in common.

use crate::{
    action::{Change, Field},
    chained::{Chained, goto},
    checked::Surroundings,
    denied::FlowTable,
    flow_chain::{FlowChain, Way},
    matching::Match,
};
use nfqueue_proto::types::{
    ConnectionState,
    flow_codes::{self, FlowCodes},
};

/// The rules of a table. Each file of this directory adds those of its packets.
#[derive(Clone, Copy)]
pub(crate) struct Flows<'a> {
    pub(super) table: FlowTable,
    pub(super) surroundings: Surroundings<'a>,
}

impl<'a> Flows<'a> {
    pub(crate) fn new(table: FlowTable, surroundings: Surroundings<'a>) -> Self {
        Self { table, surroundings }
    }

    /// A chain for packets of any way.
    pub(super) fn common(self, chain: FlowChain) -> Chained<'a> {
        Chained::common(chain, Way::In, self.surroundings)
    }

    pub(super) fn of_way(self, chain: FlowChain, way: Way) -> Chained<'a> {
        Chained::common(chain, way, self.surroundings)
    }

    /// Packets of connections with this mark.
    pub(super) fn marked(self, value: u32) -> Match {
        Match::connection_mark(value, self.table.marks.mask())
    }

    pub(super) fn codes(self) -> FlowCodes {
        FlowCodes::of(self.table.marks)
    }

    /// Packets whose priority is a code of this table.
    pub(super) fn has_code(self) -> Match {
        Match::priority(self.codes().value, flow_codes::MASK)
    }

    /// Packets whose verdict accepts their connection.
    pub(super) fn verdict_accepts(self) -> Match {
        Match::priority(self.codes().accepted(), flow_codes::CODE)
    }

    pub(super) fn save(self, value: u32) -> Change {
        Change { field: Field::ConnectionMark, value, mask: self.table.marks.mask() }
    }

    pub(super) fn denying_verdicts(self, chain: &mut Chained<'a>, way: Way) {
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
}

/// Packets without an entry.
pub(super) fn stray() -> Match {
    Match::connection_state([ConnectionState::Invalid, ConnectionState::Untracked])
}

/// Packets with a link-layer header: what this host sends gets it behind `Postrouting`.
pub(super) fn framed() -> (Match, bool) {
    (Match::ethertype(0), true)
}

/// Leaves the packet's own priority.
pub(super) const CLEAR: Change = Change { field: Field::Priority, value: 0, mask: flow_codes::CODE };
