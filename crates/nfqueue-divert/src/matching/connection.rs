//! State and direction of the connection.

use nfqueue_proto::types::{ConnectionState, Direction};

use super::{
    super::{encoder::Encoder, facts::Facts},
    Condition, Match, Needs, Order, operator,
};

impl Match {
    /// Packets whose connection is in one of these states.
    ///
    /// The condition needs connection tracking; see
    /// [`DivertBuilder::track_connections`](crate::DivertBuilder::track_connections).
    pub fn connection_state(states: impl IntoIterator<Item = ConnectionState>) -> Self {
        Self::new(States(states.into_iter().collect()))
    }

    /// Packets in this direction of their connection. A packet without a connection does not match.
    ///
    /// The condition needs connection tracking, as [`connection_state`](Self::connection_state)
    /// does.
    pub fn direction(direction: Direction) -> Self {
        Self::new(direction)
    }
}

/// `NF_CT_STATE_BIT` and the like of uapi/linux/netfilter/nf_conntrack_common.h, and the name in
/// nft.
fn bit_and_name(state: &ConnectionState) -> Option<(u32, &'static str)> {
    match state {
        ConnectionState::Invalid => Some((1 << 0, "invalid")),
        ConnectionState::Established => Some((1 << 1, "established")),
        ConnectionState::Related => Some((1 << 2, "related")),
        ConnectionState::New => Some((1 << 3, "new")),
        ConnectionState::Untracked => Some((1 << 6, "untracked")),
        _ => None,
    }
}

const NEEDS: fn() -> Needs = || Needs { tracking: true, ..Needs::default() };

#[derive(Debug)]
struct States(Vec<ConnectionState>);

impl States {
    fn bits(&self) -> u32 {
        self.0.iter().filter_map(bit_and_name).fold(0, |bits, (bit, _)| bits | bit)
    }
}

impl Condition for States {
    fn field(&self) -> &'static str {
        "connection state"
    }

    fn order(&self) -> Order {
        Order::Connection
    }

    fn needs(&self) -> Needs {
        NEEDS()
    }

    fn check(&self, _facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        const ALL: u32 = 0b100_1111;
        if let Some(unknown) = self.0.iter().find(|state| bit_and_name(state).is_none()) {
            return Err(format!("rules cannot match {unknown:?}"));
        }
        match self.bits() {
            0 => Err("there is no state".to_owned()),
            ALL if negated => Err("the rule can never match: every state is excluded".to_owned()),
            _ => Ok(()),
        }
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.connection(CT_STATE);
        encoder.mask(self.bits().to_ne_bytes().to_vec());
        encoder.equal(vec![0; 4], !negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let names: Vec<&str> = self.0.iter().filter_map(bit_and_name).map(|(_, name)| name).collect();
        format!("ct state {}{{ {} }}", operator(negated), names.join(", "))
    }
}

impl Condition for Direction {
    fn field(&self) -> &'static str {
        "direction"
    }

    fn order(&self) -> Order {
        Order::Connection
    }

    fn needs(&self) -> Needs {
        NEEDS()
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.connection(CT_DIRECTION);
        encoder.equal(vec![u8::from(*self == Self::Reply)], negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let name = match self {
            Self::Original => "original",
            Self::Reply => "reply",
        };
        format!("ct direction {}{name}", operator(negated))
    }
}

// uapi/linux/netfilter/nf_tables.h, enum nft_ct_keys
const CT_STATE: u32 = 0;
const CT_DIRECTION: u32 = 1;
