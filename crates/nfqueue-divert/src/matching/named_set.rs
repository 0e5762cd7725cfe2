//! Named sets.

use netlink_packet_netfilter::nftables::MetaKey;

use super::{
    super::{
        encoder::{Encoder, Endpoint, REG32_00},
        facts::Facts,
        family::IpVersion,
        set::SetField,
    },
    Condition, Match, Needs, Order, ProtocolNeed, operator,
};

impl Match {
    /// Packets of which these fields, in this order, are an element of a named set.
    ///
    /// The set must be one of the [`DivertBuilder::set`](crate::DivertBuilder::set), and have
    /// fields of the same kinds. The rule then matches only packets of the IP version of the set's
    /// addresses. If a field is a port, the rule must be limited to protocols that have ports.
    pub fn in_set(name: impl Into<String>, fields: impl IntoIterator<Item = PacketField>) -> Self {
        Self::new(InSet { name: name.into(), fields: fields.into_iter().collect() })
    }
}

/// A field of a packet that is looked up in a named set, for [`Match::in_set`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PacketField {
    /// The source address, for [`SetField::Ipv4Address`] and [`SetField::Ipv6Address`].
    SourceAddress,
    /// The destination address, for [`SetField::Ipv4Address`] and [`SetField::Ipv6Address`].
    DestinationAddress,
    /// The source port, for [`SetField::Port`].
    SourcePort,
    /// The destination port, for [`SetField::Port`].
    DestinationPort,
    /// The transport protocol, for [`SetField::Protocol`].
    Protocol,
}

impl PacketField {
    fn fits(self, field: SetField) -> bool {
        match self {
            Self::SourceAddress | Self::DestinationAddress => {
                matches!(field, SetField::Ipv4Address | SetField::Ipv6Address)
            }
            Self::SourcePort | Self::DestinationPort => field == SetField::Port,
            Self::Protocol => field == SetField::Protocol,
        }
    }
}

#[derive(Debug)]
struct InSet {
    name: String,
    fields: Vec<PacketField>,
}

impl InSet {
    /// The fields of the packet, and those of the set.
    fn pairs<'a>(&'a self, facts: &'a Facts<'_>) -> impl Iterator<Item = (PacketField, SetField)> + 'a {
        let of_set = facts.set(&self.name).into_iter().flat_map(|set| set.fields().iter().copied());
        self.fields.iter().copied().zip(of_set)
    }
}

impl Condition for InSet {
    fn field(&self) -> &'static str {
        "set"
    }

    fn order(&self) -> Order {
        Order::Set
    }

    fn needs(&self) -> Needs {
        let ports =
            self.fields.iter().any(|field| matches!(field, PacketField::SourcePort | PacketField::DestinationPort));
        Needs {
            protocol: if ports { ProtocolNeed::WithPorts } else { ProtocolNeed::Any },
            whole_packets: ports,
            ..Needs::default()
        }
    }

    fn version(&self, facts: &Facts<'_>) -> Option<IpVersion> {
        let fields = facts.set(&self.name)?.fields();
        fields.iter().find_map(|field| match field {
            SetField::Ipv4Address => Some(IpVersion::V4),
            SetField::Ipv6Address => Some(IpVersion::V6),
            _ => None,
        })
    }

    fn check(&self, facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        let name = &self.name;
        let Some(set) = facts.set(name) else { return Err(format!("there is no set {name:?}")) };
        if self.fields.len() != set.fields().len() {
            return Err(format!(
                "set {name:?} has elements of {} fields, not {}",
                set.fields().len(),
                self.fields.len()
            ));
        }
        match self.pairs(facts).find(|(field, of_set)| !field.fits(*of_set)) {
            Some((field, of_set)) => Err(format!("{field:?} does not fit {of_set:?} of set {name:?}")),
            None => Ok(()),
        }
    }

    fn encode(&self, facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let mut register = REG32_00;
        for (field, of_set) in self.pairs(facts) {
            let version = if of_set == SetField::Ipv6Address { IpVersion::V6 } else { IpVersion::V4 };
            match field {
                PacketField::SourceAddress => encoder.address(version, Endpoint::Source, register),
                PacketField::DestinationAddress => encoder.address(version, Endpoint::Destination, register),
                PacketField::SourcePort => encoder.port(Endpoint::Source, register),
                PacketField::DestinationPort => encoder.port(Endpoint::Destination, register),
                PacketField::Protocol => encoder.meta_into(MetaKey::L4Proto, register),
            }
            // Each field begins a new register of 4 bytes.
            register += of_set.value_type().length.div_ceil(4) as u32;
        }
        encoder.named_set(&self.name, negated);
    }

    fn nft(&self, facts: &Facts<'_>, negated: bool) -> String {
        let fields: Vec<&str> = self
            .pairs(facts)
            .map(|(field, of_set)| match (field, of_set) {
                (PacketField::SourceAddress, SetField::Ipv6Address) => "ip6 saddr",
                (PacketField::SourceAddress, _) => "ip saddr",
                (PacketField::DestinationAddress, SetField::Ipv6Address) => "ip6 daddr",
                (PacketField::DestinationAddress, _) => "ip daddr",
                (PacketField::SourcePort, _) => "th sport",
                (PacketField::DestinationPort, _) => "th dport",
                (PacketField::Protocol, _) => "meta l4proto",
            })
            .collect();
        format!("{} {}@{}", fields.join(" . "), operator(negated), self.name)
    }
}
