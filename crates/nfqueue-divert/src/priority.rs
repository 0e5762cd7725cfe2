//! Priorities of base chains.

/// The priority of rules at their hook. At each hook, the kernel calls chains with lower numbers
/// first.
///
/// The constants are netfilter's, uapi/linux/netfilter_ipv4.h and netfilter_bridge.h. Any other
/// number works too: `Priority::from(10)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Priority(i32);

impl Priority {
    /// −400: defragmentation. Chains before it see fragments.
    pub const DEFRAGMENTATION: Self = Self(-400);
    /// −300: before connection tracking.
    pub const RAW: Self = Self(-300);
    /// −200: connection tracking.
    pub const CONNECTION_TRACKING: Self = Self(-200);
    /// −150.
    pub const MANGLE: Self = Self(-150);
    /// −100: destination NAT.
    pub const DESTINATION_NAT: Self = Self(-100);
    /// 0, the default.
    pub const FILTER: Self = Self(0);
    /// 50.
    pub const SECURITY: Self = Self(50);
    /// 100: source NAT.
    pub const SOURCE_NAT: Self = Self(100);
    /// −200, in a table of family [`Bridge`](super::TableFamily::Bridge).
    pub const BRIDGE_FILTER: Self = Self(-200);

    /// The number of the kernel.
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl From<i32> for Priority {
    fn from(number: i32) -> Self {
        Self(number)
    }
}
