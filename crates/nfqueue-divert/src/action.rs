//! What rules do with packets that match.

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::MetaKey;

use super::{
    chain::{Place, chain_name},
    encoder::{Encoder, QueueMethod, number, text},
    facts::Facts,
    family::{IpVersion, TableFamily},
    flow_chain::FlowChain,
};

/// The last expression of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Queue(Queues),
    Accept,
    Drop,
    /// Drop the packet and reply with a TCP segment that has RST set.
    ResetTcp,
    /// Drop the packet and reply with an ICMP or ICMPv6 error: port unreachable.
    Unreachable,
    /// Continue with the next rule.
    Continue,
    /// Continue in another chain, and not come back.
    Goto(Target),
    /// Continue in another chain, and come back at its end.
    Jump(Target),
    /// Continue in the chain that has led to this one.
    Return,
    /// Put the connection into the flowtable, if the kernel can, and continue with the next rule.
    Offload,
}

/// A chain to which rules lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Sends packets to queues, except those of accepted connections.
    Queues(Queues),
    /// The same at `Forward`, in a table with a flowtable: puts accepted connections into it.
    OffloadOrQueues(Queues),
    /// Carries out verdicts for connections.
    Flow(FlowChain),
    /// The chain of a place, in a table with this default priority, before the user's rules.
    First(Place, i32),
    /// The same, for packets that are not of an established connection.
    Unusual(Place, i32),
}

impl Target {
    /// The name of the chain.
    pub(super) fn name(self) -> String {
        match self {
            Self::OffloadOrQueues(queues) => format!("{}_forward", Self::Queues(queues).name()),
            Self::Queues(Queues { first, last, fanout, bypass }) => {
                let mut name = format!("to_queue_{first}");
                name.push_str(&if first == last { String::new() } else { format!("_{last}") });
                name.push_str(if fanout { "_fanout" } else { "" });
                name.push_str(if bypass { "_bypass" } else { "" });
                name
            }
            Self::Flow(chain) => chain.name(),
            Self::First(place, default) => format!("{}_first", chain_name(place, default)),
            Self::Unusual(place, default) => format!("{}_unusual", chain_name(place, default)),
        }
    }
}

/// The queues of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Queues {
    pub(super) first: u16,
    pub(super) last: u16,
    pub(super) fanout: bool,
    pub(super) bypass: bool,
}

/// What a [`Change`] changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Mark,
    Priority,
    ConnectionMark,
    /// The priority becomes what the packet has as TTL or hop limit, and that becomes 0.
    TakenTtl(IpVersion),
    /// The reverse. The priority becomes 0.
    RestoredTtl(IpVersion),
}

/// `field = field & !mask | value`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) field: Field,
    pub(super) value: u32,
    pub(super) mask: u32,
}

impl Change {
    pub(super) fn encode(self, encoder: &mut Encoder) {
        let [keep, value] = [!self.mask, self.value].map(|bits| bits.to_ne_bytes().to_vec());
        let key = match self.field {
            Field::Mark => MetaKey::Mark,
            Field::Priority => MetaKey::Priority,
            Field::ConnectionMark => {
                encoder.connection(CT_MARK);
                encoder.bitwise(keep, value);
                return encoder.set_connection(CT_MARK);
            }
            Field::TakenTtl(version) => {
                encoder.ttl(version);
                encoder.set_meta(MetaKey::Priority);
                encoder.value(vec![0]);
                return encoder.set_ttl(version);
            }
            Field::RestoredTtl(version) => {
                encoder.meta(MetaKey::Priority);
                encoder.set_ttl(version);
                encoder.value(vec![0; 4]);
                return encoder.set_meta(MetaKey::Priority);
            }
        };
        encoder.meta(key);
        encoder.bitwise(keep, value);
        encoder.set_meta(key);
    }

    pub(super) fn nft(self) -> String {
        let field = match self.field {
            Field::Mark => "meta mark",
            Field::Priority => "meta priority",
            Field::ConnectionMark => "ct mark",
            Field::TakenTtl(version) => {
                let ttl = ttl(version);
                let map: Vec<String> = TTLS.map(|ttl| format!("{ttl} : {ttl:#x}")).collect();
                return format!("meta priority set {ttl} map {{ {} }} {ttl} set 0", map.join(", "));
            }
            // See `KernelRule::nft_rules`.
            Field::RestoredTtl(_) => return String::new(),
        };
        if self.mask == u32::MAX {
            return format!("{field} set {:#x}", self.value);
        }
        format!("{field} set {field} & {:#010x} | {:#x}", !self.mask, self.value)
    }
}

impl Action {
    pub(super) fn encode(self, facts: &Facts<'_>, encoder: &mut Encoder) {
        match self {
            Self::Drop => encoder.verdict(NF_DROP),
            Self::Accept => encoder.verdict(NF_ACCEPT),
            Self::Queue(queues) => match encoder.encoding.method {
                QueueMethod::Expression => queue_expression(queues, encoder),
                QueueMethod::Target => queue_target(queues, encoder),
            },
            Self::ResetTcp => reject(NFT_REJECT_TCP_RST, 0, encoder),
            Self::Unreachable => match facts.table {
                TableFamily::Inet | TableFamily::Bridge => {
                    reject(NFT_REJECT_ICMPX_UNREACH, ICMPX_PORT_UNREACH, encoder)
                }
                TableFamily::Ip => reject(NFT_REJECT_ICMP_UNREACH, ICMP_PORT_UNREACH, encoder),
                TableFamily::Ip6 => reject(NFT_REJECT_ICMP_UNREACH, ICMPV6_PORT_UNREACH, encoder),
            },
            Self::Continue => {}
            Self::Goto(target) => encoder.chain(NFT_GOTO, target.name()),
            Self::Jump(target) => encoder.chain(NFT_JUMP, target.name()),
            Self::Return => encoder.verdict(NFT_RETURN as u32),
            Self::Offload => encoder.expression("flow_offload", &[text(NFTA_FLOW_TABLE_NAME, FLOWTABLE)]),
        }
    }

    /// The action in the language of nft.
    pub(super) fn nft(self, facts: &Facts<'_>) -> String {
        match self {
            Self::Accept => "accept".to_owned(),
            Self::Drop => "drop".to_owned(),
            Self::Continue => String::new(),
            Self::Goto(target) => format!("goto {}", target.name()),
            Self::Jump(target) => format!("jump {}", target.name()),
            Self::Return => "return".to_owned(),
            Self::Offload => format!("flow add @{FLOWTABLE}"),
            Self::ResetTcp => "reject with tcp reset".to_owned(),
            Self::Unreachable => match facts.table {
                TableFamily::Inet | TableFamily::Bridge => "reject with icmpx type port-unreachable",
                TableFamily::Ip => "reject with icmp type port-unreachable",
                TableFamily::Ip6 => "reject with icmpv6 type port-unreachable",
            }
            .to_owned(),
            Self::Queue(Queues { first, last, fanout, bypass }) => {
                let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
                let flags: Vec<&str> = [(bypass, "bypass"), (fanout, "fanout")]
                    .iter()
                    .filter(|(on, _)| *on)
                    .map(|(_, name)| *name)
                    .collect();
                format!("queue num {range} {}", flags.join(",")).trim_end().to_owned()
            }
        }
    }
}

/// The name of the flowtable.
pub(super) const FLOWTABLE: &str = "flow_accepted_connections";

/// The TTLs and hop limits that [`Field::TakenTtl`] takes.
pub(super) const TTLS: std::ops::RangeInclusive<u8> = 2..=255;

/// The field in the language of nft.
pub(super) fn ttl(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "ip ttl",
        IpVersion::V6 => "ip6 hoplimit",
    }
}

fn queue_expression(queues: Queues, encoder: &mut Encoder) {
    let attributes =
        [(NFTA_QUEUE_NUM, queues.first), (NFTA_QUEUE_TOTAL, total(queues)), (NFTA_QUEUE_FLAGS, flags(queues))]
            .map(|(kind, value)| DefaultNla::new(kind, value.to_be_bytes().to_vec()));
    encoder.expression("queue", &attributes);
}

/// `struct xt_NFQ_info_v3 { u16 queuenum, queues_total, flags; }` in host byte order, padded as
/// `XT_ALIGN` requires.
fn queue_target(queues: Queues, encoder: &mut Encoder) {
    let info = [queues.first, total(queues), flags(queues), 0].into_iter().flat_map(u16::to_ne_bytes).collect();
    let attributes =
        [text(NFTA_TARGET_NAME, "NFQUEUE"), number(NFTA_TARGET_REV, 3), DefaultNla::new(NFTA_TARGET_INFO, info)];
    encoder.expression("target", &attributes);
}

fn total(queues: Queues) -> u16 {
    queues.last.saturating_sub(queues.first).saturating_add(1)
}

/// The flags of the target have the same values.
fn flags(queues: Queues) -> u16 {
    let flag = |on, bit| if on { bit } else { 0 };
    flag(queues.bypass, NFT_QUEUE_FLAG_BYPASS) | flag(queues.fanout, NFT_QUEUE_FLAG_CPU_FANOUT)
}

fn reject(kind: u32, code: u8, encoder: &mut Encoder) {
    encoder.expression("reject", &[number(NFTA_REJECT_TYPE, kind), DefaultNla::new(NFTA_REJECT_ICMP_CODE, vec![code])]);
}

// uapi/linux/netfilter/nf_tables.h
const NFT_JUMP: i32 = -3;
const NFT_GOTO: i32 = -4;
const NFT_RETURN: i32 = -5;
const NFTA_FLOW_TABLE_NAME: u16 = 1;
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
const NFT_QUEUE_FLAG_BYPASS: u16 = 1;
const NFT_QUEUE_FLAG_CPU_FANOUT: u16 = 2;
const NFTA_REJECT_TYPE: u16 = 1;
const NFTA_REJECT_ICMP_CODE: u16 = 2;
const NFT_REJECT_ICMP_UNREACH: u32 = 0;
const NFT_REJECT_TCP_RST: u32 = 1;
const NFT_REJECT_ICMPX_UNREACH: u32 = 2;
const ICMPX_PORT_UNREACH: u8 = 1;
/// enum nft_ct_keys
const CT_MARK: u32 = 3;
// uapi/linux/icmp.h, uapi/linux/icmpv6.h
const ICMP_PORT_UNREACH: u8 = 3;
const ICMPV6_PORT_UNREACH: u8 = 4;
// uapi/linux/netfilter/nf_tables_compat.h
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_REV: u16 = 2;
const NFTA_TARGET_INFO: u16 = 3;
// uapi/linux/netfilter.h
pub(super) const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
