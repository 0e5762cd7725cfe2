//! How a table remembers denied connections.

use std::time::Duration;

use crate::types::FlowMarks;

use super::{
    chain::Place,
    family::{IpVersion, TableFamily},
    set::check_timeout,
};
use crate::types::Hook;

/// Flow marks of a table, and how it remembers denied connections of which no packet has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FlowTable {
    pub(super) marks: FlowMarks,
    pub(super) capacity: u32,
    pub(super) timeout: Duration,
}

impl FlowTable {
    /// What is wrong with the settings, beginning with the field.
    pub(super) fn check(self, family: TableFamily) -> Result<(), String> {
        self.marks.check()?;
        if family == TableFamily::Bridge {
            return Err("flow marks: they do not work in the family bridge".to_owned());
        }
        if self.capacity == 0 {
            return Err("denied flows: the capacity is 0".to_owned());
        }
        check_timeout(self.timeout).map_err(|reason| format!("denied flows: {reason}"))
    }

    /// Connection tracking must come before a base chain.
    pub(super) fn check_place(self, place: Place) -> Result<(), String> {
        if place.hook != Hook::Forward && place.priority <= CONNECTION_TRACKING {
            return Err(format!(
                "priority: {} is not above that of connection tracking ({CONNECTION_TRACKING}), which flow marks need",
                place.priority
            ));
        }
        Ok(())
    }
}

/// A set of connections that were denied by their first packet. The kernel forgets the mark of
/// such a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeniedSet {
    pub(super) version: IpVersion,
    pub(super) reject: bool,
}

impl DeniedSet {
    pub(super) fn name(self) -> &'static str {
        match (self.reject, self.version) {
            (false, IpVersion::V4) => "flow_dropped_ip",
            (false, IpVersion::V6) => "flow_dropped_ip6",
            (true, IpVersion::V4) => "flow_rejected_ip",
            (true, IpVersion::V6) => "flow_rejected_ip6",
        }
    }

    /// The sets of a table.
    pub(super) fn all(family: TableFamily) -> impl Iterator<Item = Self> {
        let versions = [IpVersion::V4, IpVersion::V6].into_iter();
        let versions = versions.filter(move |version| family.version().is_none_or(|only| only == *version));
        versions.flat_map(|version| [false, true].map(|reject| Self { version, reject }))
    }
}

/// `NF_IP_PRI_CONNTRACK`
const CONNECTION_TRACKING: i32 = -200;
