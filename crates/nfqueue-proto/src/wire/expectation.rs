//! Encodes expectations: connections that connection tracking expects as related to another one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::NLA_F_NESTED;

use super::{tuple, writer::put_attribute};
use crate::types::{FlowTuple, Protocol};

/// A connection that connection tracking expects, and then treats as related:
/// `Verdict::expectation`.
///
/// Some protocols open a second connection, for example the data connection of FTP or the media of
/// SIP. A program that understands the protocol reads the addresses of the second connection from
/// the first one, and sets an expectation for it.
///
/// Submitting the verdict returns `InvalidInput` if the expectation mixes IPv4 and IPv6 addresses,
/// or if a name in it is empty, too long or contains NUL.
///
/// ```
/// # use nfqueue_proto::wire::expectation::Expectation;
/// // A data connection from any port of 192.0.2.1 to port 40000 of 192.0.2.7.
/// let server = [192, 0, 2, 1].into();
/// let data = Expectation::tcp(([192, 0, 2, 7], 40_000).into()).source_address(server);
/// # let _ = data;
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    protocol: Protocol,
    destination: SocketAddr,
    source: Option<IpAddr>,
    source_port: Option<u16>,
    helper: Option<String>,
    function: Option<String>,
    class: Option<u32>,
    flags: u32,
    translation: Option<(bool, SocketAddr)>,
}

impl Expectation {
    /// Expects a connection to `destination`. The protocol must have ports.
    pub fn new(protocol: Protocol, destination: SocketAddr) -> Self {
        Self {
            protocol,
            destination,
            source: None,
            source_port: None,
            helper: None,
            function: None,
            class: None,
            flags: 0,
            translation: None,
        }
    }

    /// Expects a TCP connection to `destination`.
    pub fn tcp(destination: SocketAddr) -> Self {
        Self::new(Protocol::Tcp, destination)
    }

    /// Expects a UDP flow to `destination`.
    pub fn udp(destination: SocketAddr) -> Self {
        Self::new(Protocol::Udp, destination)
    }

    /// Expects the connection only from this address. Default: any address.
    pub fn source_address(mut self, address: IpAddr) -> Self {
        self.source = Some(address);
        self
    }

    /// Expects the connection only from this port. Default: any port.
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// Keeps the expectation until it expires. Default: it is removed when the first connection
    /// matches it.
    #[doc(alias = "NF_CT_EXPECT_PERMANENT")]
    pub fn permanent(mut self) -> Self {
        self.flags |= PERMANENT;
        self
    }

    /// Keeps the expectation, but lets no connection match it.
    #[doc(alias = "NF_CT_EXPECT_INACTIVE")]
    pub fn inactive(mut self) -> Self {
        self.flags |= INACTIVE;
        self
    }

    /// Assigns this helper to the expected connection. The name has 1 to 15 bytes.
    ///
    /// The kernel must have a helper of this name for the network and transport protocols of the
    /// first connection.
    #[doc(alias = "CTA_EXPECT_HELP_NAME")]
    pub fn helper(mut self, name: impl Into<String>) -> Self {
        self.helper = Some(name.into());
        self
    }

    /// Sets the kernel function to call when a connection matches, for example `nat-follow-master`.
    /// The name has 1 to 255 bytes.
    #[doc(alias = "CTA_EXPECT_FN")]
    pub fn function(mut self, name: impl Into<String>) -> Self {
        self.function = Some(name.into());
        self
    }

    /// Sets the class of the expectation, one of the classes of the helper. Default: 0.
    #[doc(alias = "CTA_EXPECT_CLASS")]
    pub fn class(mut self, class: u32) -> Self {
        self.class = Some(class);
        self
    }

    /// Sets the address and port before translation, which [`function`](Self::function) needs.
    ///
    /// `reply` is `true` if the expected connection has the reply direction of the first
    /// connection.
    #[doc(alias = "CTA_EXPECT_NAT")]
    pub fn translation(mut self, reply: bool, address: SocketAddr) -> Self {
        self.translation = Some((reply, address));
        self
    }

    /// Returns an error for expectations that the kernel would silently ignore.
    #[doc(hidden)]
    pub fn check(&self) -> Result<(), &'static str> {
        let other_family = |address: IpAddr| address.is_ipv4() != self.destination.is_ipv4();
        if self.source.is_some_and(other_family)
            || self.translation.is_some_and(|(_, address)| other_family(address.ip()))
        {
            return Err("the expectation mixes IPv4 and IPv6 addresses");
        }
        let invalid = |name: &Option<String>, longest| {
            name.as_ref().is_some_and(|name| name.is_empty() || name.len() > longest || name.contains('\0'))
        };
        if invalid(&self.helper, LONGEST_HELPER) || invalid(&self.function, LONGEST_FUNCTION) {
            return Err("the expectation has a helper or function name that is empty, too long or contains NUL");
        }
        Ok(())
    }

    /// Encodes the attributes in `NFQA_EXP` (`ctnetlink_glue_attach_expect`).
    #[doc(hidden)]
    pub fn encode(&self) -> Vec<u8> {
        let none = if self.destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let all = if self.destination.is_ipv4() { Ipv4Addr::BROADCAST.into() } else { IpAddr::from([0xff; 16]) };
        let port = |port: Option<u16>| port.map_or(0, |_| u16::MAX);
        let wanted = SocketAddr::new(self.source.unwrap_or(none), self.source_port.unwrap_or(0));
        let masked = SocketAddr::new(self.source.map_or(none, |_| all), port(self.source_port));
        let tuple = |source, destination| tuple::encode(FlowTuple { protocol: self.protocol, source, destination });
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, TUPLE | NLA_F_NESTED, &tuple(wanted, self.destination));
        // The kernel always compares the whole destination.
        put_attribute(&mut bytes, MASK | NLA_F_NESTED, &tuple(masked, SocketAddr::new(all, u16::MAX)));
        if self.flags != 0 {
            put_attribute(&mut bytes, FLAGS, &self.flags.to_be_bytes());
        }
        if let Some(class) = self.class {
            put_attribute(&mut bytes, CLASS, &class.to_be_bytes());
        }
        for (kind, name) in [(HELPER, &self.helper), (FUNCTION, &self.function)] {
            if let Some(name) = name {
                put_attribute(&mut bytes, kind, &[name.as_bytes(), b"\0"].concat());
            }
        }
        if let Some((reply, address)) = self.translation {
            let mut translation = Vec::new();
            put_attribute(&mut translation, TRANSLATION_DIRECTION, &u32::from(reply).to_be_bytes());
            let translated = tuple(address, SocketAddr::new(none, 0));
            put_attribute(&mut translation, TRANSLATION_TUPLE | NLA_F_NESTED, &translated);
            put_attribute(&mut bytes, TRANSLATION | NLA_F_NESTED, &translation);
        }
        bytes
    }
}

// enum ctattr_expect
const TUPLE: u16 = 2;
const MASK: u16 = 3;
const HELPER: u16 = 6;
const FLAGS: u16 = 8;
const CLASS: u16 = 9;
const TRANSLATION: u16 = 10;
const FUNCTION: u16 = 11;
// enum ctattr_expect_nat
const TRANSLATION_DIRECTION: u16 = 1;
const TRANSLATION_TUPLE: u16 = 2;
// NF_CT_EXPECT_*
const PERMANENT: u32 = 1;
const INACTIVE: u32 = 2;

/// The longest helper name, in bytes: `NF_CT_HELPER_NAME_LEN` without the NUL.
const LONGEST_HELPER: usize = 15;
/// The longest function name, in bytes. The kernel sets no limit, but no kernel function has a
/// longer name.
const LONGEST_FUNCTION: usize = 255;

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NlaBuffer, NlasIterator};

    use super::*;

    fn parts(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let part = |nla: NlaBuffer<&[u8]>| (nla.kind(), nla.value().to_vec());
        NlasIterator::new(bytes).map(|nla| part(nla.unwrap())).collect()
    }

    fn tuple(bytes: &[u8]) -> [Vec<(u16, Vec<u8>)>; 2] {
        let parts_of_it = parts(bytes);
        assert_eq!(parts_of_it.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [1, 2]);
        [parts(&parts_of_it[0].1), parts(&parts_of_it[1].1)]
    }

    #[test]
    fn unset_fields_match_any_value() {
        let encoded = parts(&Expectation::udp(([192, 0, 2, 7], 258).into()).encode());
        let kinds: Vec<u16> = encoded.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [TUPLE, MASK]);
        let [addresses, ports] = tuple(&encoded[0].1);
        assert_eq!(addresses, [(1, vec![0; 4]), (2, vec![192, 0, 2, 7])]);
        assert_eq!(ports, [(1, vec![17]), (2, vec![0, 0]), (3, vec![1, 2])]);
        let [addresses, ports] = tuple(&encoded[1].1);
        assert_eq!((&addresses[0].1[..], &ports[1].1[..]), (&[0; 4][..], &[0; 2][..]));
    }

    #[test]
    fn all_fields_are_encoded() {
        let expectation = Expectation::tcp("[2001:db8::1]:21".parse().unwrap())
            .source_address("2001:db8::2".parse().unwrap())
            .source_port(7)
            .permanent()
            .inactive()
            .helper("ftp")
            .function("nat-follow-master")
            .class(1)
            .translation(true, "[2001:db8::3]:22".parse().unwrap());
        assert_eq!(expectation.check(), Ok(()));
        let encoded = parts(&expectation.encode());
        let kinds: Vec<u16> = encoded.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [TUPLE, MASK, FLAGS, CLASS, HELPER, FUNCTION, TRANSLATION]);
        let [addresses, ports] = tuple(&encoded[1].1);
        assert_eq!((&addresses[0], &ports[1]), (&(3, vec![0xff; 16]), &(2, vec![0xff; 2])));
        assert_eq!(encoded[2].1, [0, 0, 0, 3]);
        assert_eq!(encoded[4].1, b"ftp\0");
        let translation = parts(&encoded[6].1);
        assert_eq!(translation[0], (1, vec![0, 0, 0, 1]));
        assert_eq!(tuple(&translation[1].1)[1][1], (2, vec![0, 22]));
    }

    #[test]
    fn expectations_that_the_kernel_would_ignore_are_refused() {
        let udp = || Expectation::udp(([192, 0, 2, 7], 1).into());
        for bad in [
            udp().source_address(Ipv6Addr::LOCALHOST.into()),
            udp().translation(false, (Ipv6Addr::LOCALHOST, 1).into()),
            udp().helper(""),
            udp().helper("a name of 16 by."),
            udp().function("a\0b"),
            udp().function("f".repeat(256)),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
