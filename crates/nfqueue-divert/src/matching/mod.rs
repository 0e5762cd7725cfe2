//! The conditions of rules: a file for each kind.

mod address;
mod amount;
mod connection;
mod flow;
mod interface;
mod mark;
mod named_set;
mod port;
mod protocol;
mod rate;
mod transport;
mod user;

use std::{fmt, sync::Arc};

use super::{
    encoder::{Encoder, Range},
    facts::Facts,
    family::IpVersion,
};

pub(super) use self::interface::check_name as check_interface_name;
pub use self::{named_set::PacketField, port::PortRange, rate::Rate, transport::TcpFlags};

/// A condition on a packet, for [`Rule::when`](super::Rule::when) and
/// [`Rule::unless`](super::Rule::unless).
///
/// Each function makes a condition of one kind. `when` requires that a packet meets it, `unless`
/// that it does not: there are no separate functions for negated conditions.
///
/// A condition on an address still requires the IP version of the address if it is negated: with
/// `unless(Match::source_address(Ipv4Addr::LOCALHOST, 8))` a rule matches IPv4 packets from
/// elsewhere, and no IPv6 packet. In the same way, a condition on a port, on TCP flags or on an
/// ICMP type still requires the protocol.
///
/// ```
/// use nfqueue_divert::{ConnectionState, Hook, Match, Protocol, Rule};
///
/// // New connections to all ports but two go to a queue.
/// let rule = Rule::new(Hook::Input)
///     .protocol(Protocol::Tcp)
///     .unless(Match::destination_ports([22, 443]))
///     .when(Match::connection_state([ConnectionState::New]))
///     .to_queue(0);
/// # let _ = rule;
/// ```
#[derive(Clone)]
#[must_use = "a condition does nothing until it is added to a rule"]
pub struct Match(Arc<dyn Condition>);

impl Match {
    fn new(condition: impl Condition + 'static) -> Self {
        Self(Arc::new(condition))
    }

    pub(super) fn condition(&self) -> &dyn Condition {
        &*self.0
    }
}

impl fmt::Debug for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A kind of condition: its check, its expressions and its texts.
pub(super) trait Condition: fmt::Debug + Send + Sync {
    /// The name of what is compared, for errors.
    fn field(&self) -> &'static str;

    /// The place among the conditions of a rule.
    fn order(&self) -> Order;

    /// What the condition requires of the rule, also if it is negated.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The IP version that the condition requires, also if it is negated.
    fn version(&self, _facts: &Facts<'_>) -> Option<IpVersion> {
        None
    }

    /// The values that meet the condition, if they are numbers. Conditions that contradict each
    /// other are found by these.
    fn values(&self) -> Option<Values> {
        None
    }

    /// The reason why the condition is invalid, or can never be met.
    fn check(&self, facts: &Facts<'_>, negated: bool) -> Result<(), String>;

    fn encode(&self, facts: &Facts<'_>, negated: bool, encoder: &mut Encoder);

    /// The condition in the language of nft.
    fn nft(&self, facts: &Facts<'_>, negated: bool) -> String;
}

/// The order in which the kernel checks the conditions of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Order {
    Interface,
    Address,
    Mark,
    /// Before the fields of the transport header.
    Protocol,
    Port,
    User,
    Connection,
    Set,
    /// Only packets that meet all other conditions count for a rate.
    Rate,
}

/// What a condition requires of a rule.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs {
    pub(super) protocol: ProtocolNeed,
    /// Connection tracking.
    pub(super) tracking: bool,
    /// Packets with a transport header, and so no fragments.
    pub(super) whole_packets: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum ProtocolNeed {
    #[default]
    Any,
    /// The rule must have a condition on the protocol, and all its protocols must have ports.
    WithPorts,
    /// This protocol. The rule gets such a condition if it has none.
    Exactly(u8),
}

/// Ranges of numbers, out of all numbers up to the highest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) ranges: Vec<Range>,
    pub(super) highest: u128,
}

/// `!= ` or nothing.
fn operator(negated: bool) -> &'static str {
    if negated { "!= " } else { "" }
}

/// Ranges as nft writes them: `1-3`, or `{ 1-3, 7 }`.
fn nft_ranges(ranges: &[Range], text: impl Fn(u128) -> String) -> String {
    let items: Vec<String> = ranges
        .iter()
        .map(|(first, last)| if first == last { text(*first) } else { format!("{}-{}", text(*first), text(*last)) })
        .collect();
    match items.as_slice() {
        [one] => one.clone(),
        several => format!("{{ {} }}", several.join(", ")),
    }
}
