//! How a table remembers denied connections.
//!
//! A set for each IP version, and for dropped and for rejected connections, contains the tuples of
//! denied connections: protocol, addresses and ports of the first packet, before address
//! translation. Unlike a mark, a tuple outlives the entry of connection tracking, and holds for all
//! entries that packets of the same connection may have.
//!
//! Another such set contains the tuples of the other side's packets, before address translation,
//! of denied connections whose first packet had passed: before that, it is not known how they are
//! translated. An entry whose first packet has such a tuple is the denied connection as the other
//! side continues it, or, where that packet shows that it begins a connection, one of the other
//! side's own. So may be one without source translation whose replies have the tuple of a denied
//! connection. (With source translation, connections of different hosts have the same replies.)
//!
//! Connections beside denied ones are remembered by the addresses and ports of their true ends: of
//! the senders of both directions. These name the same two ends whatever is translated between.
//!
//! A further set contains the ports of all these tuples, in both directions. Nearly every packet is
//! found not to be denied by one lookup of eight bytes in it. A tuple is added after its ports, and
//! only if their set was not full.

use std::time::Duration;

use nfqueue_proto::types::FlowMarks;

use super::{
    chain::Place,
    encoder::{Encoder, REG32_00},
    family::{IpVersion, TableFamily},
    set::check_timeout,
    tuple::{self, Of},
};
use nfqueue_proto::types::Hook;

/// Flow marks of a table, and how it remembers denied connections.
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

    /// For how long a connection beside a denied one is remembered. Both times begin anew together,
    /// and the denial must end first.
    pub(super) fn beside_timeout(self) -> Duration {
        self.timeout.saturating_mul(2)
    }

    /// Connection tracking must come before a base chain.
    pub(super) fn check_place(self, place: Place) -> Result<(), String> {
        if place.hook != Hook::Forward && place.priority <= CONNECTION_TRACKING {
            return Err(format!(
                "priority: {} is not above that of connection tracking ({CONNECTION_TRACKING}), which flow marks need; \
                 the rules of a queue have these unless flow_marks(None) says otherwise",
                place.priority
            ));
        }
        Ok(())
    }
}

/// A set of tuples of denied connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeniedSet {
    pub(super) version: IpVersion,
    pub(super) reject: bool,
    /// The tuples of the other side's packets.
    pub(super) replies: bool,
}

impl DeniedSet {
    pub(super) fn name(self) -> &'static str {
        match (self.reject, self.replies, self.version) {
            (false, false, IpVersion::V4) => "flow_dropped_ip",
            (false, false, IpVersion::V6) => "flow_dropped_ip6",
            (true, false, IpVersion::V4) => "flow_rejected_ip",
            (true, false, IpVersion::V6) => "flow_rejected_ip6",
            (false, true, IpVersion::V4) => "flow_dropped_replies_ip",
            (false, true, IpVersion::V6) => "flow_dropped_replies_ip6",
            (true, true, IpVersion::V4) => "flow_rejected_replies_ip",
            (true, true, IpVersion::V6) => "flow_rejected_replies_ip6",
        }
    }

    /// The sets of the denied connections themselves.
    pub(super) fn all(family: TableFamily) -> impl Iterator<Item = Self> {
        Self::every(family).filter(|set| !set.replies)
    }

    /// The sets of the other side's tuples.
    pub(super) fn of_replies(family: TableFamily) -> impl Iterator<Item = Self> {
        Self::every(family).filter(|set| set.replies)
    }

    /// All sets of a table.
    pub(super) fn every(family: TableFamily) -> impl Iterator<Item = Self> {
        versions(family).flat_map(Self::of)
    }

    /// Those for one IP version.
    pub(super) fn of(version: IpVersion) -> [Self; 4] {
        [(false, false), (true, false), (false, true), (true, true)].map(|(reject, replies)| Self {
            version,
            reject,
            replies,
        })
    }
}

/// What a rule remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remember {
    /// A denied connection, by these addresses and ports.
    Denied(DeniedSet, Of),
    /// The translated destination of a denied connection, so that the connection can be named by
    /// the addresses that its packets show in the queue.
    Translated(IpVersion),
    /// A connection that has just been denied.
    Recent(IpVersion),
    /// A connection of the other side, beside a denied one.
    Beside(IpVersion, Of),
    /// The other side's connection is no longer one beside a denied one: it is denied itself.
    NotBeside(IpVersion),
    /// No longer the connection of the other side that has just been denied.
    NotRecent(IpVersion),
    /// A connection of which a packet has just been rejected.
    Replied(IpVersion),
    /// No longer such a connection.
    NotReplied(IpVersion),
    /// A connection that a packet without an entry begins, by the packet's addresses and ports.
    Begun(IpVersion),
    /// A connection whose packets must not take the flowtable, by the ports that they arrive with.
    Recalled,
}

impl Remember {
    /// In the language of nft.
    pub(super) fn nft(self) -> String {
        let update = |name: &str, key: String| format!("update @{name} {{ {key} }}");
        let delete = |name: &str, version, of| format!("delete @{name} {{ {} }}", tuple::nft(version, of));
        match self {
            Self::Denied(set, of) => {
                let [ports, reversed] = of.both().map(|of| update(PORTS, tuple::nft_ports(of)));
                [ports, reversed, update(set.name(), tuple::nft(set.version, of))].join(" ")
            }
            Self::Recent(version) => update(recent(version), tuple::nft(version, Of::Connection)),
            Self::Beside(version, of) => update(beside(version), tuple::nft(version, of)),
            Self::NotBeside(version) => delete(beside(version), version, Of::EndsReversed),
            Self::NotRecent(version) => delete(recent(version), version, Of::ConnectionReversed),
            Self::NotReplied(version) => delete(replied(version), version, Of::Connection),
            Self::Begun(version) => {
                let [ports, reversed] = Of::Packet.both().map(|of| update(PORTS, tuple::nft_ports(of)));
                [update(begun(version), tuple::nft(version, Of::Packet)), ports, reversed].join(" ")
            }
            Self::Replied(version) => {
                let add = |of| format!("add @{PORTS} {{ {} timeout {}s }}", tuple::nft_ports(of), RECENT.as_secs());
                let [ports, reversed] = Of::Connection.both().map(add);
                [update(replied(version), tuple::nft(version, Of::Connection)), ports, reversed].join(" ")
            }
            Self::Recalled => Of::Connection.both().map(|of| update(RECALLED, tuple::nft_ports(of))).join(" "),
            // nft has no type for the ports of a connection.
            Self::Translated(_) => String::new(),
        }
    }

    pub(super) fn encode(self, encoder: &mut Encoder) {
        match self {
            Self::Recalled => {
                tuple::load_ports(Of::Connection, REG32_00, encoder);
                encoder.update_set(RECALLED, None);
                tuple::load_reply_ports(REG32_00, encoder);
                encoder.update_set(RECALLED, None);
            }
            Self::Denied(set, of) => {
                // The ports come first: if their set is full, the rule ends here.
                for of in of.both() {
                    tuple::load_ports(of, REG32_00, encoder);
                    encoder.update_set(PORTS, None);
                }
                tuple::load(set.version, of, REG32_00, encoder);
                encoder.update_set(set.name(), None);
            }
            Self::Translated(version) => {
                let data = REG32_00 + tuple::key(version).0 as u32 / 4;
                tuple::load(version, Of::Connection, REG32_00, encoder);
                tuple::load_translated(version, data, encoder);
                encoder.update_set(translated(version), Some(data));
            }
            Self::Recent(version) => {
                tuple::load(version, Of::Connection, REG32_00, encoder);
                encoder.update_set(recent(version), None);
            }
            Self::Beside(version, of) => {
                tuple::load(version, of, REG32_00, encoder);
                encoder.update_set(beside(version), None);
            }
            Self::NotBeside(version) => {
                tuple::load(version, Of::EndsReversed, REG32_00, encoder);
                encoder.delete_from_set(beside(version));
            }
            Self::NotRecent(version) => {
                tuple::load(version, Of::ConnectionReversed, REG32_00, encoder);
                encoder.delete_from_set(recent(version));
            }
            Self::NotReplied(version) => {
                tuple::load(version, Of::Connection, REG32_00, encoder);
                encoder.delete_from_set(replied(version));
            }
            Self::Begun(version) => {
                // The tuple comes first, as below.
                tuple::load(version, Of::Packet, REG32_00, encoder);
                encoder.update_set(begun(version), None);
                for of in Of::Packet.both() {
                    tuple::load_ports(of, REG32_00, encoder);
                    encoder.update_set(PORTS, None);
                }
            }
            Self::Replied(version) => {
                // The tuple comes first: its set limits how many of the ports these take.
                tuple::load(version, Of::Connection, REG32_00, encoder);
                encoder.update_set(replied(version), None);
                for of in Of::Connection.both() {
                    tuple::load_ports(of, REG32_00, encoder);
                    // Those of a denied connection must not be removed earlier.
                    encoder.add_to_set(PORTS, RECENT);
                }
            }
        }
    }
}

/// The map of the translated destinations of denied connections.
pub(super) fn translated(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "flow_translated_ip",
        IpVersion::V6 => "flow_translated_ip6",
    }
}

/// The set of connections that have been denied within [`RECENT`].
pub(super) fn recent(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "flow_recent_ip",
        IpVersion::V6 => "flow_recent_ip6",
    }
}

/// The set of connections of which a packet behind the first has been rejected within [`RECENT`].
pub(super) fn replied(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "flow_replied_ip",
        IpVersion::V6 => "flow_replied_ip6",
    }
}

/// The set of connections that packets without an entry have begun.
pub(super) fn begun(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "flow_begun_ip",
        IpVersion::V6 => "flow_begun_ip6",
    }
}

/// The set of connections of the other side beside denied ones.
pub(super) fn beside(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "flow_beside_ip",
        IpVersion::V6 => "flow_beside_ip6",
    }
}

/// The number of connections beside denied ones that are remembered, for each IP version. The first
/// packet of a further one is dropped.
pub(super) const BESIDE: u32 = 4096;

/// The number of connections that packets without an entry have begun and that are remembered, for
/// each IP version. A further packet that would begin one so is dropped.
pub(super) const BEGUN: u32 = 4096;

/// For how long the other side's first packet is taken for a reply to the denied one, if the
/// protocol does not show it and no rule asks about it. Longer, and a sender with forged addresses
/// could block the connections of others for longer.
pub(super) const RECENT: Duration = Duration::from_secs(2);

/// The IP versions of a table.
pub(super) fn versions(family: TableFamily) -> impl Iterator<Item = IpVersion> {
    let versions = [IpVersion::V4, IpVersion::V6].into_iter();
    versions.filter(move |version| family.version().is_none_or(|only| only == *version))
}

/// The names of all sets and maps of a table.
pub(super) fn names(family: TableFamily) -> impl Iterator<Item = &'static str> {
    let of_versions =
        versions(family).flat_map(|version| [translated, recent, replied, begun, beside].map(|name| name(version)));
    DeniedSet::every(family).map(DeniedSet::name).chain(of_versions).chain([PORTS])
}

/// The set of the ports of denied connections.
pub(super) const PORTS: &str = "flow_denied_ports";

/// The set of the ports of connections whose packets must not take the flowtable.
pub(super) const RECALLED: &str = "flow_recalled_ports";

/// For how long they are remembered. The kernel removes a connection that gets no packets from the
/// flowtable earlier (`nf_flowtable_tcp_timeout`, `nf_flowtable_udp_timeout`: 30 s).
pub(super) const RECALL: Duration = Duration::from_secs(300);

/// How many elements [`RECALLED`] can have: two for each connection.
pub(super) const RECALLED_CAPACITY: u32 = 2 * 65_536;

/// The elements of [`PORTS`] for this number of dropped and of rejected connections of each IP
/// version: two for each, and room for the others. The kernel removes expired elements once a
/// second, so that rejected ones may be there twice.
pub(super) fn ports_capacity(connections: u32) -> u32 {
    connections.saturating_mul(4).saturating_add(4 * REPLIED + 2 * BEGUN).saturating_mul(2)
}

/// The number of connections of which a packet behind the first has been rejected within [`RECENT`]
/// and that are remembered until the reply comes, for each IP version. A reply to a further one may
/// come to the queue.
pub(super) const REPLIED: u32 = 1024;

/// `NF_IP_PRI_CONNTRACK`
const CONNECTION_TRACKING: i32 = -200;
