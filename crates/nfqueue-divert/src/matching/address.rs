//! Source and destination addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    super::{
        encoder::{Encoder, Endpoint, IPV4_ADDRESS, IPV6_ADDRESS, REG_1, Range, ValueType, merge},
        facts::Facts,
        family::IpVersion,
    },
    Condition, Match, Order, Values, nft_ranges, operator,
};

impl Match {
    /// Packets from this network.
    ///
    /// `prefix` is the prefix length in bits, at most 32 for IPv4 and 128 for IPv6.
    pub fn source_address(address: impl Into<IpAddr>, prefix: u8) -> Self {
        Self::source_addresses([(address.into(), prefix)])
    }

    /// Packets from one of these networks: addresses with the length of their prefix. All must be
    /// of the same IP version.
    pub fn source_addresses(networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        Self::addresses(Endpoint::Source, networks)
    }

    /// Packets to this network. See [`source_address`](Self::source_address).
    pub fn destination_address(address: impl Into<IpAddr>, prefix: u8) -> Self {
        Self::destination_addresses([(address.into(), prefix)])
    }

    /// Packets to one of these networks. See [`source_addresses`](Self::source_addresses).
    pub fn destination_addresses(networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        Self::addresses(Endpoint::Destination, networks)
    }

    fn addresses(end: Endpoint, networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        let networks = networks.into_iter().map(|(address, prefix)| Network { address, prefix }).collect();
        Self::new(Addresses { end, networks })
    }
}

#[derive(Debug)]
struct Addresses {
    end: Endpoint,
    networks: Vec<Network>,
}

impl Addresses {
    fn ip_version(&self) -> Option<IpVersion> {
        self.networks.first().map(|network| network.version())
    }

    fn ranges(&self) -> Vec<Range> {
        merge(self.networks.iter().map(|network| network.range()))
    }
}

impl Condition for Addresses {
    fn field(&self) -> &'static str {
        match self.end {
            Endpoint::Source => "source address",
            Endpoint::Destination => "destination address",
        }
    }

    fn order(&self) -> Order {
        Order::Address
    }

    fn version(&self, _facts: &Facts<'_>) -> Option<IpVersion> {
        self.ip_version()
    }

    fn values(&self) -> Option<Values> {
        let highest = value_type(self.ip_version()?).highest();
        Some(Values { ranges: self.ranges(), highest })
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        if self.networks.is_empty() {
            return Err("there is no address".to_owned());
        }
        for Network { address, prefix } in &self.networks {
            if *prefix > if address.is_ipv4() { 32 } else { 128 } {
                return Err(format!("the prefix of {address}/{prefix} is longer than the address"));
            }
            if self.networks.iter().any(|other| other.address.is_ipv4() != address.is_ipv4()) {
                return Err("the addresses are of both IPv4 and IPv6".to_owned());
            }
        }
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let Some(version) = self.ip_version() else { return };
        encoder.address(version, self.end, REG_1);
        match self.networks.as_slice() {
            [network] => {
                encoder.mask(network.mask());
                encoder.equal(network.network(), negated);
            }
            _ => encoder.one_of(value_type(version), &self.ranges(), negated),
        }
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let protocol = match self.ip_version() {
            Some(IpVersion::V6) => "ip6",
            _ => "ip",
        };
        let field = match self.end {
            Endpoint::Source => "saddr",
            Endpoint::Destination => "daddr",
        };
        let value = match self.networks.as_slice() {
            [network] => network.text(),
            _ => nft_ranges(&self.ranges(), |value| match self.ip_version() {
                Some(IpVersion::V6) => Ipv6Addr::from(value).to_string(),
                _ => Ipv4Addr::from(value as u32).to_string(),
            }),
        };
        format!("{protocol} {field} {}{value}", operator(negated))
    }
}

fn value_type(version: IpVersion) -> ValueType {
    match version {
        IpVersion::V4 => IPV4_ADDRESS,
        IpVersion::V6 => IPV6_ADDRESS,
    }
}

/// All addresses with the same first `prefix` bits as `address`.
#[derive(Debug, Clone, Copy)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    fn version(self) -> IpVersion {
        if self.address.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 }
    }

    /// The network mask.
    fn mask(self) -> Vec<u8> {
        let ones = u128::MAX.checked_shl(128 - u32::from(self.prefix.min(128))).unwrap_or(0).to_be_bytes();
        ones[..self.octets().len()].to_vec()
    }

    /// The network address: the address with the host bits cleared.
    fn network(self) -> Vec<u8> {
        self.octets().iter().zip(self.mask()).map(|(octet, mask)| octet & mask).collect()
    }

    fn range(self) -> Range {
        let number = |octets: Vec<u8>| octets.iter().fold(0, |number, octet| number << 8 | u128::from(*octet));
        let first = number(self.network());
        (first, first | number(self.mask().iter().map(|octet| !octet).collect()))
    }

    fn octets(self) -> Vec<u8> {
        match self.address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        }
    }

    fn text(self) -> String {
        let (first, _) = self.range();
        match self.address {
            IpAddr::V4(_) => format!("{}/{}", Ipv4Addr::from(first as u32), self.prefix),
            IpAddr::V6(_) => format!("{}/{}", Ipv6Addr::from(first), self.prefix),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_length_gives_the_network_mask() {
        let network = |prefix| Network { address: Ipv4Addr::new(10, 11, 255, 255).into(), prefix };
        assert_eq!(network(0).mask(), [0; 4]);
        assert_eq!(network(32).mask(), [0xff; 4]);
        assert_eq!(network(20).mask(), [0xff, 0xff, 0xf0, 0]);
        assert_eq!(network(20).network(), [10, 11, 0xf0, 0]);
        assert_eq!(network(20).range(), (0x0a0b_f000, 0x0a0b_ffff));
        assert_eq!(network(0).range(), (0, u128::from(u32::MAX)));
        let network = Network { address: Ipv6Addr::from(u128::MAX).into(), prefix: 127 };
        assert_eq!(network.network(), (u128::MAX - 1).to_be_bytes());
    }
}
