//! The chains that carry out verdicts for whole connections: their names, and where they exist.

use nfqueue_proto::types::Hook;

/// A chain of the rules for verdicts for connections. [`flows`](super::flows) says what each does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlowChain {
    Back(Way),
    Inherits,
    BegunStray,
    BegunRecord,
    BegunAgain,
    Begins,
    /// Those of other protocols than TCP.
    BeginsOther,
    Accepted,
    Known,
    Stray(Way),
    StrayIcmp,
    Listed(Way),
    Reversed(Way),
    Crossed,
    Beside,
    BesideBegins,
    BesideRecord,
    Alone,
    ReversedDenied(Way),
    Denied(Way),
    Rejected(Way),
    Replies(Way),
    VerdictAccept,
    Save,
    SaveFirst,
    VerdictDrop,
    VerdictReject {
        can_reject: bool,
    },
    RejectPacket {
        can_reject: bool,
    },
    Offload,
    OffloadTo,
    Recall,
    Past,
}

impl FlowChain {
    /// The name of the chain.
    pub(super) fn name(self) -> String {
        let rejecting = |name: &str, can_reject| if can_reject { name.to_owned() } else { format!("{name}_never") };
        let (name, way) = match self {
            Self::Back(way) => ("back", way),
            Self::Stray(way) => ("stray", way),
            Self::Listed(way) => ("listed", way),
            Self::Reversed(way) => ("reversed", way),
            Self::ReversedDenied(way) => ("reversed_denied", way),
            Self::Denied(way) => ("denied", way),
            Self::Rejected(way) => ("rejected", way),
            Self::Replies(way) => ("replies", way),
            Self::StrayIcmp => return "flow_stray_icmp".to_owned(),
            Self::BesideBegins => return "flow_beside_begins".to_owned(),
            Self::BesideRecord => return "flow_beside_record".to_owned(),
            Self::Alone => return "flow_alone".to_owned(),
            Self::Beside => return "flow_beside".to_owned(),
            Self::Crossed => return "flow_crossed".to_owned(),
            Self::BegunStray => return "flow_begun_stray".to_owned(),
            Self::BegunRecord => return "flow_begun_record".to_owned(),
            Self::BegunAgain => return "flow_begun_again".to_owned(),
            Self::Inherits => return "flow_inherits".to_owned(),
            Self::BeginsOther => return "flow_begins_other".to_owned(),
            Self::Begins => return "flow_begins".to_owned(),
            Self::Accepted => return "flow_accepted".to_owned(),
            Self::Known => return "flow_known".to_owned(),
            Self::VerdictAccept => return "flow_verdict_accept".to_owned(),
            Self::Save => return "flow_save".to_owned(),
            Self::SaveFirst => return "flow_save_first".to_owned(),
            Self::VerdictDrop => return "flow_verdict_drop".to_owned(),
            Self::VerdictReject { can_reject } => return rejecting("flow_verdict_reject", can_reject),
            Self::Offload => return "flow_offload".to_owned(),
            Self::OffloadTo => return "flow_offload_to".to_owned(),
            Self::Recall => return "flow_recall".to_owned(),
            Self::Past => return "flow_past".to_owned(),
            Self::RejectPacket { can_reject } => return rejecting("flow_reject_packet", can_reject),
        };
        format!("flow_{name}_{}", way.name())
    }
}

/// The way of a packet that comes to a hook. It decides which packets can be replies of this host,
/// and whether the kernel can reject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// `Prerouting` and `Input`.
    In,
    Forward,
    /// `Output`
    Out,
    /// `Postrouting`: both forwarded packets and those of this host.
    Leaving,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::In, Self::Forward, Self::Out, Self::Leaving];

    pub(super) fn of(hook: Hook) -> Self {
        match hook {
            Hook::Forward => Self::Forward,
            Hook::Output => Self::Out,
            Hook::Postrouting => Self::Leaving,
            _ => Self::In,
        }
    }

    /// A hook that packets of this way traverse.
    pub(super) fn hook(self) -> Hook {
        match self {
            Self::In => Hook::Input,
            Self::Forward => Hook::Forward,
            Self::Out => Hook::Output,
            Self::Leaving => Hook::Postrouting,
        }
    }

    /// Whether the kernel can reject packets there (`nft_reject_inet_validate`).
    pub(super) fn can_reject(self) -> bool {
        self != Self::Leaving
    }

    /// Whether this host's own replies pass there.
    pub(super) fn has_replies(self) -> bool {
        self != Self::Forward
    }

    fn name(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Forward => "forward",
            Self::Out => "out",
            Self::Leaving => "leaving",
        }
    }
}
