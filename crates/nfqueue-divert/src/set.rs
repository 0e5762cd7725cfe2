//! Named sets: their declaration and their elements.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use nfqueue_proto::types::Protocol;

use super::encoder::{IPV4_ADDRESS, IPV6_ADDRESS, PORT, PROTOCOL, ValueType, concatenated};

/// A named set of a [`Divert`](super::Divert)'s table: addresses, ports, protocols, or tuples of
/// them.
///
/// Rules match its elements with [`Match::in_set`](super::Match::in_set).
/// [`Divert::set`](super::Divert::set) changes the elements while the rules are installed.
///
/// ```
/// use std::time::Duration;
/// use nfqueue_divert::{NamedSet, SetField};
///
/// let ttl = Duration::from_secs(600);
/// let blocked = NamedSet::new("blocked", [SetField::Ipv4Address]).timeout(ttl);
/// let services = NamedSet::new("services", [SetField::Ipv6Address, SetField::Port]).capacity(100);
/// # let _ = (blocked, services);
/// ```
#[derive(Debug, Clone)]
#[must_use = "a set is created by `DivertBuilder::install`"]
pub struct NamedSet {
    name: String,
    fields: Vec<SetField>,
    timeout: Option<Duration>,
    capacity: u32,
}

impl NamedSet {
    /// Returns a set whose elements have these fields, 1 to 4. It holds up to 65 535 elements.
    ///
    /// The name has 1 to 127 bytes: letters, digits and `_`, beginning with a letter.
    pub fn new(name: impl Into<String>, fields: impl IntoIterator<Item = SetField>) -> Self {
        Self { name: name.into(), fields: fields.into_iter().collect(), timeout: None, capacity: 65_535 }
    }

    /// Sets the time after which the kernel removes an element that was inserted without a time of
    /// its own. The resolution is one millisecond. Default: never.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets the number of elements that the set can hold, at least 1. Default: 65 535.
    pub fn capacity(mut self, elements: u32) -> Self {
        self.capacity = elements;
        self
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn fields(&self) -> &[SetField] {
        &self.fields
    }

    pub(super) fn default_timeout(&self) -> Option<Duration> {
        self.timeout
    }

    pub(super) fn size(&self) -> u32 {
        self.capacity
    }

    /// The reason why the declaration is invalid.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(problem) = name_problem(&self.name) {
            return Err(format!("name: {problem}"));
        }
        if self.fields.is_empty() || self.fields.len() > 4 {
            return Err("fields: an element has 1 to 4 fields".to_owned());
        }
        let versions = [SetField::Ipv4Address, SetField::Ipv6Address];
        if versions.iter().all(|version| self.fields.contains(version)) {
            return Err("fields: no packet has addresses of both IPv4 and IPv6".to_owned());
        }
        if self.capacity == 0 {
            return Err("capacity: the set can hold no element".to_owned());
        }
        if let Some(timeout) = self.timeout {
            check_timeout(timeout)?;
        }
        Ok(())
    }

    /// The length of an element in bytes. In tuples, each field is padded to 4 bytes.
    pub(super) fn key_length(&self) -> usize {
        match self.fields.as_slice() {
            [one] => one.value_type().length,
            several => several.iter().map(|field| field.value_type().length.next_multiple_of(4)).sum(),
        }
    }

    /// The type of an element, for `nft`.
    pub(super) fn key_type(&self) -> u32 {
        concatenated(self.fields.iter().map(|field| field.value_type()))
    }

    /// The bytes of an element, or the reason why it does not fit.
    pub(super) fn encode(&self, element: &SetElement) -> Result<Vec<u8>, String> {
        let fits = element.0.len() == self.fields.len()
            && element.0.iter().zip(&self.fields).all(|(value, field)| value.field() == *field);
        if !fits {
            let fields: Vec<SetField> = element.0.iter().map(SetValue::field).collect();
            return Err(format!("element {fields:?} does not fit the fields {:?}", self.fields));
        }
        let mut bytes = Vec::with_capacity(self.key_length());
        for value in &element.0 {
            bytes.extend(value.bytes());
            if self.fields.len() > 1 {
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
        }
        Ok(bytes)
    }

    /// The element with these bytes.
    pub(super) fn decode(&self, mut bytes: &[u8]) -> Option<SetElement> {
        let mut values = Vec::with_capacity(self.fields.len());
        for field in &self.fields {
            let length = field.value_type().length;
            values.push(field.decode(bytes.get(..length)?)?);
            bytes = bytes.get(length.next_multiple_of(4).min(bytes.len())..)?;
        }
        Some(SetElement(values))
    }
}

/// A field of the elements of a [`NamedSet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SetField {
    /// An IPv4 address.
    Ipv4Address,
    /// An IPv6 address.
    Ipv6Address,
    /// A port.
    Port,
    /// A transport protocol.
    Protocol,
}

impl SetField {
    pub(super) fn value_type(self) -> ValueType {
        match self {
            Self::Ipv4Address => IPV4_ADDRESS,
            Self::Ipv6Address => IPV6_ADDRESS,
            Self::Port => PORT,
            Self::Protocol => PROTOCOL,
        }
    }

    /// The name of the type in nft.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ipv4Address => "ipv4_addr",
            Self::Ipv6Address => "ipv6_addr",
            Self::Port => "inet_service",
            Self::Protocol => "inet_proto",
        }
    }

    fn decode(self, bytes: &[u8]) -> Option<SetValue> {
        Some(match self {
            Self::Ipv4Address => SetValue::Address(<[u8; 4]>::try_from(bytes).ok()?.into()),
            Self::Ipv6Address => SetValue::Address(<[u8; 16]>::try_from(bytes).ok()?.into()),
            Self::Port => SetValue::Port(u16::from_be_bytes(bytes.try_into().ok()?)),
            Self::Protocol => SetValue::Protocol((*bytes.first()?).into()),
        })
    }
}

/// The value of one field of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum SetValue {
    /// An address.
    Address(IpAddr),
    /// A port in host byte order.
    Port(u16),
    /// A transport protocol.
    Protocol(Protocol),
}

impl SetValue {
    fn field(&self) -> SetField {
        match self {
            Self::Address(IpAddr::V4(_)) => SetField::Ipv4Address,
            Self::Address(IpAddr::V6(_)) => SetField::Ipv6Address,
            Self::Port(_) => SetField::Port,
            Self::Protocol(_) => SetField::Protocol,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Address(IpAddr::V4(address)) => address.octets().to_vec(),
            Self::Address(IpAddr::V6(address)) => address.octets().to_vec(),
            Self::Port(port) => port.to_be_bytes().to_vec(),
            Self::Protocol(protocol) => vec![protocol.number()],
        }
    }
}

impl From<IpAddr> for SetValue {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

impl From<Ipv4Addr> for SetValue {
    fn from(address: Ipv4Addr) -> Self {
        Self::Address(address.into())
    }
}

impl From<Ipv6Addr> for SetValue {
    fn from(address: Ipv6Addr) -> Self {
        Self::Address(address.into())
    }
}

impl From<Protocol> for SetValue {
    fn from(protocol: Protocol) -> Self {
        Self::Protocol(protocol)
    }
}

impl From<u16> for SetValue {
    fn from(port: u16) -> Self {
        Self::Port(port)
    }
}

/// An element of a [`NamedSet`]: from an address, from a port, from a protocol, from a
/// [`SocketAddr`](std::net::SocketAddr) (address and port), or from a tuple of values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetElement(Vec<SetValue>);

impl SetElement {
    /// The values of the fields.
    pub fn values(&self) -> &[SetValue] {
        &self.0
    }
}

impl<V: Into<SetValue>> From<V> for SetElement {
    fn from(value: V) -> Self {
        Self(vec![value.into()])
    }
}

impl From<SocketAddr> for SetElement {
    fn from(address: SocketAddr) -> Self {
        (address.ip(), address.port()).into()
    }
}

impl<A: Into<SetValue>, B: Into<SetValue>> From<(A, B)> for SetElement {
    fn from((a, b): (A, B)) -> Self {
        Self(vec![a.into(), b.into()])
    }
}

impl<A: Into<SetValue>, B: Into<SetValue>, C: Into<SetValue>> From<(A, B, C)> for SetElement {
    fn from((a, b, c): (A, B, C)) -> Self {
        Self(vec![a.into(), b.into(), c.into()])
    }
}

impl<A: Into<SetValue>, B: Into<SetValue>, C: Into<SetValue>, D: Into<SetValue>> From<(A, B, C, D)> for SetElement {
    fn from((a, b, c, d): (A, B, C, D)) -> Self {
        Self(vec![a.into(), b.into(), c.into(), d.into()])
    }
}

/// Why `nft` could not read a name.
pub(super) fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > 127 {
        return Some("it must have 1 to 127 bytes");
    }
    let valid = name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (!valid).then_some("it may contain letters, digits and '_', and must begin with a letter")
}

/// The kernel counts milliseconds, and takes 0 for "never".
pub(super) fn check_timeout(timeout: Duration) -> Result<(), String> {
    if timeout < Duration::from_millis(1) {
        return Err("time-out: it is shorter than a millisecond".to_owned());
    }
    // The limit of the kernel is 2^64 nanoseconds (`nf_msecs_to_jiffies64`).
    if timeout > Duration::from_secs(365 * 24 * 3600 * 100) {
        return Err("time-out: it is longer than a hundred years".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_encoded_and_decoded() {
        let set = NamedSet::new("s", [SetField::Ipv4Address, SetField::Port, SetField::Protocol]);
        let element = SetElement(vec![Ipv4Addr::new(10, 0, 0, 1).into(), 0x1234.into(), Protocol::Tcp.into()]);
        let bytes = set.encode(&element).unwrap();
        assert_eq!(bytes, [10, 0, 0, 1, 0x12, 0x34, 0, 0, 6, 0, 0, 0]);
        assert_eq!(set.key_length(), 12);
        assert_eq!(set.key_type(), (7 << 6 | 13) << 6 | 12);
        assert_eq!(set.decode(&bytes), Some(element));
        assert_eq!(set.decode(&bytes[..8]), None);

        let ports = NamedSet::new("p", [SetField::Port]);
        assert_eq!(ports.encode(&53.into()).unwrap(), [0, 53]);
        assert_eq!(ports.decode(&[0, 53]), Some(53.into()));
        assert!(ports.encode(&Ipv4Addr::LOCALHOST.into()).is_err());
        assert!(ports.encode(&(1, 2).into()).is_err());
    }

    #[test]
    fn declarations_are_checked() {
        let fields = || [SetField::Port];
        for name in ["", "1a", "a-b", "a b", &"n".repeat(128)] {
            assert!(NamedSet::new(name, fields()).check().unwrap_err().starts_with("name: "), "{name:?}");
        }
        assert!(NamedSet::new("n".repeat(127), fields()).check().is_ok());
        assert!(NamedSet::new("a", []).check().is_err());
        assert!(NamedSet::new("a", [SetField::Port; 5]).check().is_err());
        assert!(NamedSet::new("a", [SetField::Ipv4Address, SetField::Ipv6Address]).check().is_err());
        assert!(NamedSet::new("a", fields()).capacity(0).check().is_err());
        assert!(NamedSet::new("a", fields()).timeout(Duration::from_micros(1)).check().is_err());
    }
}
