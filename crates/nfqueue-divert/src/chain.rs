//! Chains: what they are and how they are called.

use nfqueue_proto::types::Hook;

/// A chain of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    /// `None`: it is no base chain. Packets come to it from rules that jump to it.
    pub(super) base: Option<(Place, ChainType)>,
    /// Whether the rules of the chain stay the same while the table exists.
    pub(super) fixed: bool,
}

/// The hook of packets that arrive by an interface, before all others. A chain there is bound to
/// interfaces (`NF_INET_INGRESS`, uapi/linux/netfilter.h).
pub(super) const INGRESS: Hook = Hook::Other(5);

/// The priority of the flowtable at this hook: that of other programs' flowtables and filters.
pub(super) const FLOWTABLE_PRIORITY: i32 = 0;

/// `NFT_NAME_MAXLEN` of the kernel, without the NUL.
pub(super) const LONGEST_NAME: usize = 255;

impl Chain {
    /// Whether the kernel can have a chain of this name.
    pub(super) fn has_valid_name(&self) -> bool {
        (1..=LONGEST_NAME).contains(&self.name.len()) && !self.name.contains('\0')
    }
}

/// The place of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) hook: Hook,
    pub(super) priority: i32,
}

/// The types of base chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChainType {
    Filter,
    /// Routes packets again whose mark the chain has changed.
    Route,
}

impl ChainType {
    /// The name in the kernel and in nft.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Route => "route",
        }
    }
}

/// The name of a hook in nft.
pub(super) fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
        INGRESS => "ingress",
        _ => "other",
    }
}

/// The name of a base chain. It is that of the hook if the priority is the table's.
pub(super) fn chain_name(place: Place, default_priority: i32) -> String {
    let Place { hook, priority } = place;
    let hook = hook_name(hook);
    match priority {
        _ if priority == default_priority => hook.to_owned(),
        ..0 => format!("{hook}_before_{}", priority.unsigned_abs()),
        _ => format!("{hook}_{priority}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_named_by_hook_and_priority() {
        let name = |priority| chain_name(Place { hook: Hook::Input, priority }, 5);
        assert_eq!([name(5), name(0), name(10), name(-150)], ["input", "input_0", "input_10", "input_before_150"]);
    }
}
