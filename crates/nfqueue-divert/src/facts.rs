//! What the parts of a rule need of each other and of the table.

use nfqueue_proto::types::Hook;

use super::{
    family::{IpVersion, TableFamily},
    set::NamedSet,
};

/// What is known of the packets that reach a condition or the action of a rule.
#[derive(Debug, Clone)]
pub(super) struct Facts<'a> {
    pub(super) table: TableFamily,
    pub(super) hook: Hook,
    /// The IP version that the rule requires, or that all packets of the table have.
    pub(super) version: Option<IpVersion>,
    /// The transport protocols that the rule is limited to.
    pub(super) protocols: Option<Vec<u8>>,
    /// The named sets of the table.
    pub(super) sets: &'a [NamedSet],
}

impl Facts<'_> {
    /// Whether packets at the hook have an input interface.
    pub(super) fn has_input(&self) -> bool {
        self.hook != Hook::Output
    }

    /// Whether packets at the hook have an output interface.
    pub(super) fn has_output(&self) -> bool {
        matches!(self.hook, Hook::Forward | Hook::Output | Hook::Postrouting)
    }

    pub(super) fn set(&self, name: &str) -> Option<&NamedSet> {
        self.sets.iter().find(|set| set.name() == name)
    }
}

/// Whether the header of a protocol begins with source and destination port: TCP, UDP, DCCP, SCTP,
/// UDP-Lite.
pub(super) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}
