//! The flowtable: accepted connections that this host forwards leave the hooks.
//!
//! The kernel forwards packets of the flowtable's connections when they arrive, before all other
//! hooks. It looks only for FIN and RST (`nf_flow_state_check`), so that a SYN on the same ports
//! would pass, and so would packets of a connection that has been denied since. Therefore a chain
//! before the flowtable moves past it what could be of another connection than the accepted one.
//! There, no rule can make the kernel skip a hook. But the flowtable leaves packets alone that
//! must not be forwarded any further (TTL or hop limit 0 or 1). So the chain takes the TTL away and
//! puts it into the packet's priority, and a chain before all that reads it restores both. Since
//! Linux 7.3, rules can change no other field that the flowtable looks at (`nft_nh_write_ok`).
//!
//! | chain | content |
//! |---|---|
//! | `flow_ingress`, a base chain before the flowtable | leads packets to `flow_past` that begin a connection, and those with the ports of a connection that is denied or recalled |
//! | `flow_past` | takes the TTL |
//! | `flow_restore`, a base chain before reassembly | restores the TTL |
//! | `to_queue_N_forward` | what a rule at `Forward` to a queue leads to: as `to_queue_N`, but leads packets of accepted and established connections to `flow_offload` before |
//! | `flow_offload`, `flow_offload_to` | put connections between the interfaces into the flowtable |
//! | `flow_recall` | remembers the ports of a connection: its packets are moved past the flowtable |
//!
//! A connection is recalled before its mark changes, and one that is to be offloaded is looked up
//! after its mark has been compared. So of two packets at once, one sees the other's change.

use nfqueue_proto::types::Hook;

use super::{
    action::{Action, Change, Field},
    chain::{Chain, ChainType, FLOWTABLE_PRIORITY, INGRESS, Place},
    chained::{Chained, first_packets, goto},
    checked::{KernelRule, Surroundings},
    denied::{self, Remember},
    flow_chain::{FlowChain, Way},
    links::{self, Link},
    matching::{Match, check_interface_name},
    tuple::Of,
};

/// The interfaces between which accepted connections leave the hooks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Interfaces {
    Named(Vec<String>),
    /// All that can.
    All,
}

impl Interfaces {
    /// Checks what can be checked without the kernel.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self::Named(names) = self else { return Ok(()) };
        if names.is_empty() {
            return Err("offload: there is no interface".to_owned());
        }
        for name in names {
            check_interface_name(name).map_err(|reason| format!("offload: {reason}"))?;
            if name.ends_with('*') {
                return Err("offload: an interface is named by its whole name".to_owned());
            }
        }
        Ok(())
    }

    /// The names, in order, of the interfaces of the calling thread's network namespace.
    pub(super) fn names(&self) -> std::io::Result<Result<Vec<String>, String>> {
        Ok(self.of(&links::links()?))
    }

    fn of(&self, links: &[Link]) -> Result<Vec<String>, String> {
        let mut names: Vec<String> = match self {
            Self::Named(names) => {
                for name in names {
                    let found = links.iter().find(|link| link.name == *name);
                    let link = found.ok_or_else(|| format!("offload: there is no interface {name:?}"))?;
                    if let Some(reason) = link.unfit(names, links) {
                        return Err(format!("offload: interface {name:?}: {reason}"));
                    }
                }
                names.clone()
            }
            Self::All => {
                let up = links.iter().filter(|link| link.up && link.unfit(&[], links).is_none());
                let all: Vec<String> = up.map(|link| link.name.clone()).collect();
                let below =
                    |name: &String| links.iter().any(|link| all.contains(&link.name) && link.is_on(name, links));
                let names: Vec<String> = all.iter().filter(|name| !below(name)).cloned().collect();
                if names.is_empty() {
                    return Err("offload: there is no interface that is up and fit for it".to_owned());
                }
                names
            }
        };
        names.sort();
        names.dedup();
        Ok(names)
    }
}

/// The shortest time for which denials must be remembered.
pub(super) const SHORTEST_DENIAL: std::time::Duration = std::time::Duration::from_secs(60);

/// The chains of the table that have no hook.
pub(super) fn common_chains<'a>(surroundings: Surroundings<'a>) -> [Chained<'a>; 4] {
    let chain = |chain, way| Chained::common(chain, way, surroundings);
    let devices = surroundings.offload;

    let mut offload = chain(FlowChain::Offload, Way::Forward);
    // As in `flow_known`.
    let [syn, ..] = first_packets();
    offload.push(&syn, Action::Return);
    for name in devices {
        offload.push(&[Match::input_interface(name)], goto(FlowChain::OffloadTo));
    }

    let mut offload_to = chain(FlowChain::OffloadTo, Way::Forward);
    for name in devices {
        let rule = offload_to.push(&[Match::output_interface(name)], Action::Offload);
        rule.conditions.push((Match::listed(Of::Connection), true));
    }

    // A packet that begins a connection and cannot be remembered does not pass.
    let mut recall = chain(FlowChain::Recall, Way::Forward);
    recall.push(&[], Action::Return).remember = Some(Remember::Recalled);
    recall.drop();

    let mut past = Chained::new(FlowChain::Past.name(), BEFORE, surroundings);
    for version in denied::versions(surroundings.family) {
        let rule = past.push(&[Match::ttl(version)], Action::Accept);
        rule.facts.version = Some(version);
        rule.changes.push(Change { field: Field::TakenTtl(version), value: 0, mask: 0 });
    }
    [offload, offload_to, recall, past]
}

/// The chains with hooks, and their rules.
pub(super) fn base_chains<'a>(surroundings: Surroundings<'a>) -> ([Chain; 2], Vec<KernelRule<'a>>) {
    let [restore, ingress] = [("flow_restore", RESTORE), ("flow_ingress", BEFORE)].map(|(name, place)| Chain {
        name: name.to_owned(),
        base: Some((place, ChainType::Filter)),
        fixed: true,
    });

    let mut restoring = Chained::new(&*restore.name, RESTORE, surroundings);
    for version in denied::versions(surroundings.family) {
        let rule = restoring.push(&[Match::no_ttl(version)], Action::Accept);
        rule.facts.version = Some(version);
        rule.changes.push(Change { field: Field::RestoredTtl(version), value: 0, mask: 0 });
    }

    let mut moving = Chained::new(&*ingress.name, BEFORE, surroundings);
    // The VLAN's interface changes the priority. Offloaded connections have no VLAN: see `Link`.
    for tagged in [0x8100, 0x88a8] {
        moving.push(&[Match::ethertype(tagged)], Action::Accept);
    }
    let [syn, ..] = first_packets();
    moving.push(&syn, goto(FlowChain::Past));
    moving.push(&[Match::listed(Of::Packet)], goto(FlowChain::Past));
    moving.push(&[Match::recalled(Of::Packet)], goto(FlowChain::Past));

    // The chain that restores must be there first.
    ([restore, ingress], [restoring.rules, moving.rules].concat())
}

/// Directly before the flowtable.
const BEFORE: Place = Place { hook: INGRESS, priority: FLOWTABLE_PRIORITY - 1 };
/// `NF_IP_PRI_RAW_BEFORE_DEFRAG`
const RESTORE: Place = Place { hook: Hook::Prerouting, priority: -450 };

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), up: true, kind: 1, ..Link::default() }
    }

    fn links() -> Vec<Link> {
        vec![
            Link { loopback: true, kind: 772, ..link(1, "lo") },
            link(2, "eth0"),
            Link { lower: Some(2), ..link(3, "eth0.10") },
            Link { up: false, ..link(4, "eth1") },
            Link { master: Some(6), port: true, ..link(5, "eth2") },
            link(6, "br0"),
            Link { kind: 512, ..link(7, "ppp0") },
            Link { kind: 65534, ..link(8, "wg0") },
            Link { lower: Some(5), master: Some(10), port: true, ..link(9, "eth2.7") },
            link(10, "br7"),
            Link { master: Some(12), ..link(11, "eth3") },
            link(12, "vrf0"),
        ]
    }

    fn named(names: &[&str]) -> Result<Vec<String>, String> {
        Interfaces::Named(names.iter().map(|name| (*name).to_owned()).collect()).of(&links())
    }

    #[test]
    fn all_interfaces_are_those_where_every_packet_can_be_seen() {
        let all = Interfaces::All.of(&links()).unwrap();
        assert_eq!(all, ["br0", "br7", "eth0.10", "eth3", "vrf0", "wg0"]);
        let none = Interfaces::All.of(&links()[..1]).unwrap_err();
        assert!(none.contains("no interface that is up"), "{none}");
    }

    #[test]
    fn interfaces_that_would_hide_packets_are_refused() {
        assert_eq!(named(&["wg0", "eth0", "eth0"]).unwrap(), ["eth0", "wg0"]);
        assert_eq!(named(&["eth1", "br0"]).unwrap(), ["br0", "eth1"]);
        for (names, reason) in [
            (&["eth9"][..], "no interface \"eth9\""),
            (&["eth0", "lo"], "loopback"),
            (&["ppp0"], "neither Ethernet"),
            (&["eth2"], "is a port of"),
            (&["eth0", "eth0.10"], "interface \"eth0.10\": it is on \"eth0\""),
        ] {
            let error = named(names).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        assert!(Interfaces::Named(Vec::new()).check().is_err());
        assert!(Interfaces::Named(vec!["a b".to_owned()]).check().is_err());
        assert!(Interfaces::Named(vec!["eth*".to_owned()]).check().is_err());
    }
}
