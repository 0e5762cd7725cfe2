//! Sets single header fields: TTL, TOS, addresses and ports.

use std::{net::IpAddr, ops::Range};

use etherparse::{IpNumber, ip_number};

use super::{
    Edit, checksum, invalid,
    layout::{Obstacle, Transport, Version},
    refused,
};
use crate::types::Error;

impl Edit {
    /// Sets the TTL of IPv4, or the hop limit of IPv6. This works for every packet, also for
    /// fragments.
    pub fn set_ttl(&mut self, ttl: u8) {
        let at = match self.layout.version {
            Version::V4 => 8,
            Version::V6 => 7,
        };
        self.packet[at] = ttl;
    }

    /// Sets the TOS byte of IPv4, or the traffic class of IPv6: DSCP in the upper six bits, ECN in
    /// the lower two. This works for every packet, also for fragments.
    pub fn set_tos(&mut self, tos: u8) {
        match self.layout.version {
            Version::V4 => self.packet[1] = tos,
            Version::V6 => {
                self.packet[0] = 0x60 | tos >> 4;
                self.packet[1] = tos << 4 | self.packet[1] & 0x0f;
            }
        }
    }

    /// Sets the source address.
    ///
    /// # Errors
    ///
    /// As [`set_destination_address`](Self::set_destination_address).
    pub fn set_source_address(&mut self, address: impl Into<IpAddr>) -> Result<(), Error> {
        self.set_address("set the source address", address.into(), 12, 8)
    }

    /// Sets the destination address.
    ///
    /// The kernel chooses the route again only at the hooks prerouting and output. At forward and
    /// postrouting the packet still goes to the next hop of its old destination, and at input it is
    /// still delivered to this host.
    ///
    /// This also works for fragments. Set the address in every fragment of a datagram. In the first
    /// fragment, the transport checksum is updated.
    ///
    /// While an IPv4 source route is not completed, or an IPv6 routing header has segments left,
    /// this address is the next hop. The final destination, which the transport checksum covers,
    /// stays unchanged.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if
    /// * the address is IPv4 and the packet is IPv6, or the reverse;
    /// * an authentication header covers the packet;
    /// * the transport checksum covers the addresses and cannot be updated: the transport header is
    ///   malformed, the protocol is unknown, or the packet has an IPv6 routing header with segments
    ///   left that is malformed or whose type is not 0, 2 or 4.
    pub fn set_destination_address(&mut self, address: impl Into<IpAddr>) -> Result<(), Error> {
        self.set_address("set the destination address", address.into(), 16, 24)
    }

    /// Sets the source port of TCP or UDP.
    ///
    /// # Errors
    ///
    /// As [`set_destination_port`](Self::set_destination_port).
    pub fn set_source_port(&mut self, port: u16) -> Result<(), Error> {
        self.set_port("set the source port", port, 0)
    }

    /// Sets the destination port of TCP or UDP.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if the packet is ICMP or ICMPv6, which have
    /// no ports, and for the same reasons as [`payload_mut`](Self::payload_mut).
    pub fn set_destination_port(&mut self, port: u16) -> Result<(), Error> {
        self.set_port("set the destination port", port, 2)
    }

    fn set_port(&mut self, operation: &'static str, port: u16, at: usize) -> Result<(), Error> {
        let transport = self.layout.editable().map_err(|obstacle| refused(operation, obstacle))?;
        if !transport.has_ports() {
            return Err(invalid(operation, "ICMP has no ports"));
        }
        self.write_u16(self.layout.at + at, port.into());
        Ok(())
    }

    fn set_address(
        &mut self,
        operation: &'static str,
        address: IpAddr,
        at_v4: usize,
        at_v6: usize,
    ) -> Result<(), Error> {
        match (self.layout.version, address) {
            (Version::V4, IpAddr::V4(address)) => self.write_address(operation, at_v4, &address.octets()),
            (Version::V6, IpAddr::V6(address)) => self.write_address(operation, at_v6, &address.octets()),
            (Version::V4, _) => {
                Err(invalid(operation, format!("{address} is not an IPv4 address, and the packet is IPv4")))
            }
            (Version::V6, _) => {
                Err(invalid(operation, format!("{address} is not an IPv6 address, and the packet is IPv6")))
            }
        }
    }

    fn write_address(&mut self, operation: &'static str, at: usize, octets: &[u8]) -> Result<(), Error> {
        let place = at..at + octets.len();
        match (self.layout.obstacle, self.layout.transport) {
            // `finish` computes the checksum.
            (None, _) => {}
            (Some(Obstacle::Fragment), _) if self.layout.headerless => {}
            (Some(Obstacle::Fragment), Some(transport)) => self.adjust_checksum(transport, &place, octets),
            (Some(Obstacle::Fragment | Obstacle::Protocol(_)), None)
                if ADDRESSES_NOT_IN_CHECKSUM.contains(&self.layout.protocol) => {}
            (Some(obstacle), _) => return Err(refused(operation, obstacle)),
        }
        self.packet[place].copy_from_slice(octets);
        Ok(())
    }

    /// Updates the checksum in a first fragment for a new address at `place`. `finish` cannot
    /// compute it, because the rest of the datagram is in other fragments.
    fn adjust_checksum(&mut self, transport: Transport, place: &Range<usize>, address: &[u8]) {
        if self.layout.is_routed() && place.start == self.layout.version.destination_at() {
            // The checksum does not cover the next hop.
            return;
        }
        let at = self.layout.at + transport.checksum_at();
        let old = [self.packet[at], self.packet[at + 1]];
        let has_none = transport == Transport::Udp && old == [0, 0];
        if transport != Transport::Icmpv4 && !has_none {
            let new = checksum::adjusted(old, &self.packet[place.clone()], address, transport);
            self.packet[at..at + 2].copy_from_slice(&new);
        }
    }
}

/// Protocols whose checksum, if they have one, does not cover the IP addresses.
const ADDRESSES_NOT_IN_CHECKSUM: [IpNumber; 5] =
    [ip_number::IGMP, ip_number::IPV4, ip_number::IPV6, ip_number::GRE, ip_number::SCTP];
