//! The families of tables, and IP versions.

/// The family of a [`Divert`](super::Divert)'s table: which packets its rules see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum TableFamily {
    /// IPv4 and IPv6.
    #[default]
    Inet,
    /// IPv4 only.
    Ip,
    /// IPv6 only.
    Ip6,
    /// Frames that pass a bridge, of any protocol.
    ///
    /// With `br_netfilter`, rules for IP see them as well. There, the first broadcast or multicast
    /// packet of a tracked connection is lost at the forward hook: see
    /// `guide` of tokio-nfqueue.
    Bridge,
}

impl TableFamily {
    /// The name of the family in nft.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Bridge => "bridge",
        }
    }

    /// The IP version that all packets of the table have.
    pub(super) fn version(self) -> Option<IpVersion> {
        match self {
            Self::Inet | Self::Bridge => None,
            Self::Ip => Some(IpVersion::V4),
            Self::Ip6 => Some(IpVersion::V6),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IpVersion {
    V4,
    V6,
}

impl IpVersion {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}
