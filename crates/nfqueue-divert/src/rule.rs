//! A rule: its conditions, and its action for matching packets.

use std::{net::IpAddr, ops::RangeInclusive};

use nfqueue_proto::types::{Hook, Protocol};

use super::{
    action::{Change, Field},
    family::IpVersion,
    matching::Match,
    priority::Priority,
};

/// A rule: conditions on packets, and an action for the packets that match.
///
/// A packet matches if it meets all conditions. A rule without conditions matches every packet of
/// its table at its hook. [`when`](Self::when) adds a condition, [`unless`](Self::unless) adds the
/// negation of one. The methods for single conditions, such as
/// [`destination_port`](Self::destination_port), are short for `when`, but replace an earlier
/// condition on the same field; those on the mark do not.
/// [`install`](super::DivertBuilder::install) checks the rule.
///
/// ```
/// use nfqueue_divert::{Hook, Match, Protocol, Rule};
///
/// // Sends the DNS queries of this host to four queues. Accepts them while the queue is not bound.
/// let dns = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53);
/// let rule = dns.to_queues(0..=3).bypass(true);
/// // Rejects connections to other hosts, unless root opens them.
/// let rejected = Rule::new(Hook::Output)
///     .when(Match::tcp_syn())
///     .unless(Match::interface("lo"))
///     .unless(Match::user(0))
///     .reject();
/// # let _ = (rule, rejected);
/// ```
#[derive(Debug, Clone)]
#[must_use = "a rule does nothing until it is installed"]
pub struct Rule {
    pub(super) hook: Hook,
    pub(super) priority: Option<Priority>,
    pub(super) version: Option<IpVersion>,
    /// The conditions, and whether they are negated.
    pub(super) conditions: Vec<(Match, bool)>,
    pub(super) changes: Vec<Change>,
    pub(super) action: Option<RuleAction>,
    pub(super) fanout: bool,
    pub(super) bypass: bool,
    pub(super) comment: Option<String>,
}

impl Rule {
    /// Returns a rule that matches every packet at `hook`.
    ///
    /// Without an action its packets go to the queue that it is given to (`QueueBuilder::divert` of
    /// tokio-nfqueue) or to [`default_queues`](crate::DivertBuilder::default_queues); in other
    /// tables it needs one: [`to_queue`](Self::to_queue), [`to_queues`](Self::to_queues),
    /// [`accept`](Self::accept), [`drop`](Self::drop), [`reject`](Self::reject), or
    /// [`count`](Self::count). A rule that changes a mark and has no action only does that.
    pub fn new(hook: Hook) -> Self {
        Self {
            hook,
            priority: None,
            version: None,
            conditions: Vec::new(),
            changes: Vec::new(),
            action: None,
            fanout: false,
            bypass: false,
            comment: None,
        }
    }

    /// Matches only packets that meet this condition.
    pub fn when(mut self, condition: Match) -> Self {
        self.conditions.push((condition, false));
        self
    }

    /// Matches only packets that do not meet this condition.
    ///
    /// See [`Match`] for what the negation of a condition on addresses and ports requires.
    pub fn unless(mut self, condition: Match) -> Self {
        self.conditions.push((condition, true));
        self
    }

    /// Replaces the conditions on the same field that are not negated.
    fn replace(mut self, condition: Match) -> Self {
        let field = condition.condition().field();
        self.conditions.retain(|(other, negated)| *negated || other.condition().field() != field);
        self.when(condition)
    }

    /// Matches only packets of this transport protocol.
    pub fn protocol(self, protocol: Protocol) -> Self {
        self.replace(Match::protocol(protocol))
    }

    /// Matches only packets to this port (host byte order). The [`protocol`](Self::protocol) must
    /// be set to one that has ports.
    ///
    /// A fragment other than the first carries no port and does not match; see
    /// [`DivertBuilder::defragment`](super::DivertBuilder::defragment). For several ports, see
    /// [`Match::destination_ports`].
    pub fn destination_port(self, port: u16) -> Self {
        self.replace(Match::destination_port(port))
    }

    /// Matches only packets from this port (host byte order). See
    /// [`destination_port`](Self::destination_port).
    pub fn source_port(self, port: u16) -> Self {
        self.replace(Match::source_port(port))
    }

    /// Matches only packets of the interface with this name. A final `*` stands for any text. See
    /// [`Match::interface`].
    ///
    /// At `Prerouting`, `Input` and `Forward`, this is the input interface. At `Output` and
    /// `Postrouting`, it is the output interface. The interface need not exist yet.
    pub fn interface(self, name: impl Into<String>) -> Self {
        self.replace(Match::interface(name))
    }

    /// Matches only IPv4 packets.
    pub fn ipv4(mut self) -> Self {
        self.version = Some(IpVersion::V4);
        self
    }

    /// Matches only IPv6 packets.
    pub fn ipv6(mut self) -> Self {
        self.version = Some(IpVersion::V6);
        self
    }

    /// Matches only packets from this network.
    ///
    /// `prefix` is the prefix length in bits, at most 32 for IPv4 and 128 for IPv6. The rule then
    /// matches only packets of the family of the address.
    pub fn source_address(self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.replace(Match::source_address(address, prefix))
    }

    /// Matches only packets to this network. See [`source_address`](Self::source_address) for
    /// `prefix`.
    pub fn destination_address(self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.replace(Match::destination_address(address, prefix))
    }

    /// Matches only packets with `packet mark & mask == value`.
    ///
    /// `value` must have no bits outside `mask`. To compare the whole mark, use `u32::MAX` as
    /// `mask`. The mark of an unmarked packet is 0.
    pub fn mark(self, value: u32, mask: u32) -> Self {
        self.when(Match::mark(value, mask))
    }

    /// Matches only packets with `packet mark & mask != value`.
    ///
    /// Use this to exclude packets that already have a mark from a verdict or a socket, so that a
    /// repeated packet or your own traffic is not queued again. `value` must have no bits outside
    /// `mask`.
    pub fn unless_mark(self, value: u32, mask: u32) -> Self {
        self.unless(Match::mark(value, mask))
    }

    /// Matches only the first `count` packets of each connection. See [`Match::first_packets`] for
    /// what it needs.
    pub fn first_packets(self, count: u64) -> Self {
        self.replace(Match::first_packets(count))
    }

    /// Matches only packets within the first `count` bytes of each connection. See
    /// [`Match::first_bytes`] for what it needs.
    pub fn first_bytes(self, count: u64) -> Self {
        self.replace(Match::first_bytes(count))
    }

    /// Sets the priority of the rule at its hook. Default: the
    /// [`DivertBuilder::priority`](super::DivertBuilder::priority).
    ///
    /// Rules with the same hook and priority are one chain, in the order in which they were added.
    pub fn priority(mut self, priority: impl Into<Priority>) -> Self {
        self.priority = Some(priority.into());
        self
    }

    /// Sets a comment, which `nft list ruleset` shows: up to 127 bytes, without control characters
    /// and `"`.
    pub fn comment(mut self, text: impl Into<String>) -> Self {
        self.comment = Some(text.into());
        self
    }

    /// Changes the mark of matching packets before the action: `mark & !mask | value`.
    ///
    /// Without an action, the next rules see the packet with the new mark. `value` must have no
    /// bits outside `mask`. At `Output`, the packet is not routed again.
    pub fn set_mark(mut self, value: u32, mask: u32) -> Self {
        self.changes.push(Change { field: Field::Mark, value, mask });
        self
    }

    /// Changes the mark of the connection of matching packets, as [`set_mark`](Self::set_mark)
    /// changes that of the packet. A packet without a connection does not match.
    ///
    /// This needs connection tracking, as
    /// [`DivertBuilder::track_connections`](super::DivertBuilder::track_connections) describes. The
    /// kernel forgets the mark of a new connection if its first packet is dropped.
    pub fn set_connection_mark(mut self, value: u32, mask: u32) -> Self {
        self.changes.push(Change { field: Field::ConnectionMark, value, mask });
        self
    }

    /// Sends matching packets to this queue.
    ///
    /// While no socket has the queue bound, the kernel drops them, unless [`bypass`](Self::bypass)
    /// is set. Therefore bind the queue before you install the rule.
    ///
    /// A rule without conditions at [`Output`](Hook::Output) also queues IPv6 neighbour discovery,
    /// and what the program itself sends, such as a question to a resolver on which a verdict
    /// depends. Exclude both:
    ///
    /// ```
    /// use nfqueue_divert::{Hook, Match, Protocol, Rule};
    ///
    /// let rule = Rule::new(Hook::Output)
    ///     .unless(Match::protocol(Protocol::Icmpv6))
    ///     // The program sets this mark on its sockets (SO_MARK).
    ///     .unless_mark(0x40, 0x40)
    ///     .to_queue(0);
    /// # let _ = rule;
    /// ```
    #[doc(alias = "NFQUEUE")]
    pub fn to_queue(self, queue: u16) -> Self {
        self.to_queues(queue..=queue)
    }

    /// Distributes matching packets over several queues (queue-balance).
    ///
    /// The kernel selects the queue by a hash of both addresses, and for IPv4 also of the protocol
    /// (`nfqueue_hash`). The hash is the same for both directions of a connection. It does not
    /// contain the ports, so all connections between two hosts use the same queue. The seed of the
    /// hash is random and changes with each boot.
    ///
    /// The range must contain at least one queue. It must not contain all 65 536 queues, because
    /// the kernel stores the count in 16 bits.
    #[doc(alias = "queue-balance")]
    pub fn to_queues(mut self, queues: RangeInclusive<u16>) -> Self {
        self.action = Some(RuleAction::Queue(*queues.start(), *queues.end()));
        self
    }

    /// Accepts matching packets. The later rules of this table do not see them. Chains of other
    /// tables do.
    pub fn accept(mut self) -> Self {
        self.action = Some(RuleAction::Accept);
        self
    }

    /// Drops matching packets.
    pub fn drop(mut self) -> Self {
        self.action = Some(RuleAction::Drop);
        self
    }

    /// Drops matching packets, and the kernel replies: to TCP with a reset, to other protocols
    /// with the error "port unreachable" of ICMP or ICMPv6.
    ///
    /// The hook must be `Prerouting`, `Input`, `Forward` or `Output`; in the family
    /// [`Bridge`](super::TableFamily::Bridge), `Prerouting` or `Input`. The kernel limits the rate
    /// of ICMP errors. The reply is a packet of this host: it traverses `Output` and
    /// `Postrouting`, and on the loopback interface `Prerouting` and `Input` as well. If the rule
    /// matches both TCP and other protocols, it becomes two rules of the kernel.
    pub fn reject(mut self) -> Self {
        self.action = Some(RuleAction::Reject);
        self
    }

    /// Only counts matching packets; see [`Divert::counters`](super::Divert::counters). The next
    /// rules see them.
    pub fn count(mut self) -> Self {
        self.action = Some(RuleAction::Count);
        self
    }

    /// Selects one of [several queues](Self::to_queues) by the number of the CPU that handles the
    /// packet, not by the hash of the addresses. Default: off.
    #[doc(alias = "queue-cpu-fanout")]
    pub fn fanout(mut self, on: bool) -> Self {
        self.fanout = on;
        self
    }

    /// Accepts matching packets while no socket has the queue bound. Default: off; the kernel drops
    /// them.
    ///
    /// The effect is that of [`accept`](Self::accept): the later rules of this table do not see
    /// them.
    ///
    /// This has no effect while the queue is bound and full. For that case, use
    /// `QueueBuilder::fail_open`.
    #[doc(alias = "queue-bypass")]
    pub fn bypass(mut self, on: bool) -> Self {
        self.bypass = on;
        self
    }
}

/// What a rule does with matching packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RuleAction {
    /// The first and the last queue number.
    Queue(u16, u16),
    Drop,
    Accept,
    Reject,
    Count,
}
