//! State and direction of the connection.

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

/// The state of a packet's connection, as connection tracking sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// The packet is not valid in its connection.
    Invalid,
    /// Packets in both directions have been seen.
    Established,
    /// The packet opens a connection, or is an ICMP error, that belongs to another connection.
    Related,
    /// The packet opens a connection, or packets in one direction only have been seen.
    New,
    /// The packet is not tracked.
    Untracked,
}

impl ConnectionState {
    /// `NF_CT_STATE_BIT` and the like of uapi/linux/netfilter/nf_conntrack_common.h.
    fn bit(self) -> u32 {
        match self {
            Self::Invalid => 1 << 0,
            Self::Established => 1 << 1,
            Self::Related => 1 << 2,
            Self::New => 1 << 3,
            Self::Untracked => 1 << 6,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Established => "established",
            Self::Related => "related",
            Self::New => "new",
            Self::Untracked => "untracked",
        }
    }
}

/// The direction of a packet in its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the side that opened the connection.
    Original,
    /// To the side that opened the connection.
    Reply,
}

const NEEDS: fn() -> Needs = || Needs { tracking: true, ..Needs::default() };

#[derive(Debug)]
struct States(Vec<ConnectionState>);

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
        match self.0.iter().fold(0, |bits, state| bits | state.bit()) {
            0 => Err("there is no state".to_owned()),
            ALL if negated => Err("the rule can never match: every state is excluded".to_owned()),
            _ => Ok(()),
        }
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let bits: u32 = self.0.iter().fold(0, |bits, state| bits | state.bit());
        encoder.connection(CT_STATE);
        encoder.mask(bits.to_ne_bytes().to_vec());
        encoder.equal(vec![0; 4], !negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let names: Vec<&str> = self.0.iter().map(|state| state.name()).collect();
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
