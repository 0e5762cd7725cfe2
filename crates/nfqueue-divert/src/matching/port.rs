//! Source and destination ports.

use std::ops::RangeInclusive;

use super::{
    super::{
        encoder::{Encoder, Endpoint, PORT, REG_1, Range, merge},
        facts::Facts,
    },
    Condition, Match, Needs, Order, ProtocolNeed, Values, nft_ranges, operator,
};

impl Match {
    /// Packets from this port. See [`destination_ports`](Self::destination_ports).
    pub fn source_port(port: impl Into<PortRange>) -> Self {
        Self::source_ports([port])
    }

    /// Packets from one of these ports. See [`destination_ports`](Self::destination_ports).
    pub fn source_ports<P: Into<PortRange>>(ports: impl IntoIterator<Item = P>) -> Self {
        Self::ports(Endpoint::Source, ports)
    }

    /// Packets to this port, or to a port of this range. See
    /// [`destination_ports`](Self::destination_ports).
    pub fn destination_port(port: impl Into<PortRange>) -> Self {
        Self::destination_ports([port])
    }

    /// Packets to one of these ports: numbers in host byte order, or ranges of them.
    ///
    /// The rule must be limited to protocols that have ports, by
    /// [`Rule::protocol`](crate::Rule::protocol) or [`protocols`](Self::protocols).
    pub fn destination_ports<P: Into<PortRange>>(ports: impl IntoIterator<Item = P>) -> Self {
        Self::ports(Endpoint::Destination, ports)
    }

    fn ports<P: Into<PortRange>>(end: Endpoint, ports: impl IntoIterator<Item = P>) -> Self {
        Self::new(Ports { end, ports: ports.into_iter().map(Into::into).collect() })
    }
}

/// A port or a range of ports, for [`Match::destination_ports`]: from a number, or from
/// `first..=last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl From<RangeInclusive<u16>> for PortRange {
    fn from(ports: RangeInclusive<u16>) -> Self {
        Self { first: *ports.start(), last: *ports.end() }
    }
}

#[derive(Debug)]
struct Ports {
    end: Endpoint,
    ports: Vec<PortRange>,
}

impl Ports {
    fn ranges(&self) -> Vec<Range> {
        merge(self.ports.iter().map(|ports| (ports.first.into(), ports.last.into())))
    }
}

impl Condition for Ports {
    fn field(&self) -> &'static str {
        match self.end {
            Endpoint::Source => "source port",
            Endpoint::Destination => "destination port",
        }
    }

    fn order(&self) -> Order {
        Order::Port
    }

    fn needs(&self) -> Needs {
        Needs { protocol: ProtocolNeed::WithPorts, whole_packets: true, ..Needs::default() }
    }

    fn values(&self) -> Option<Values> {
        Some(Values { ranges: self.ranges(), highest: PORT.highest() })
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        if self.ports.is_empty() {
            return Err("there is no port".to_owned());
        }
        match self.ports.iter().find(|ports| ports.first > ports.last) {
            Some(PortRange { first, last }) => Err(format!("the range {first}-{last} is reversed")),
            None => Ok(()),
        }
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.port(self.end, REG_1);
        encoder.one_of(PORT, &self.ranges(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let field = match self.end {
            Endpoint::Source => "sport",
            Endpoint::Destination => "dport",
        };
        format!("th {field} {}{}", operator(negated), nft_ranges(&self.ranges(), |port| port.to_string()))
    }
}
