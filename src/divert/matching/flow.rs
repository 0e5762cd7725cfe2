//! Conditions of the rules for verdicts for whole connections.

use super::{
    super::{
        denied::DeniedSet,
        encoder::{Encoder, REG32_00},
        facts::Facts,
        tuple,
    },
    Condition, Match, Needs, Order, operator,
};

impl Match {
    /// The first packets of connections of which no packet has passed yet.
    pub(in super::super) fn unconfirmed() -> Self {
        Self::new(Unconfirmed)
    }

    /// Packets of connections in a set; or, if `reversed`, of connections in the other direction.
    pub(in super::super) fn denied(set: DeniedSet, reversed: bool) -> Self {
        Self::new(Denied { set, reversed })
    }
}

const NEEDS: fn() -> Needs = || Needs { tracking: true, ..Needs::default() };

#[derive(Debug)]
struct Unconfirmed;

impl Condition for Unconfirmed {
    fn field(&self) -> &'static str {
        "connection status"
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
        encoder.connection(CT_STATUS);
        encoder.mask(IPS_CONFIRMED.to_ne_bytes().to_vec());
        encoder.equal(vec![0; 4], negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        format!("ct status & confirmed {} 0", if negated { "!=" } else { "==" })
    }
}

#[derive(Debug)]
struct Denied {
    set: DeniedSet,
    reversed: bool,
}

impl Condition for Denied {
    fn field(&self) -> &'static str {
        "connection"
    }

    fn order(&self) -> Order {
        Order::Set
    }

    fn needs(&self) -> Needs {
        NEEDS()
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        if encoder.encoding.trial {
            return;
        }
        tuple::load(self.set.version, self.reversed, REG32_00, encoder);
        encoder.named_set(self.set.name(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        format!("{} {}@{}", tuple::nft(self.set.version, self.reversed), operator(negated), self.set.name())
    }
}

/// uapi/linux/netfilter/nf_tables.h, enum nft_ct_keys
const CT_STATUS: u32 = 2;
/// uapi/linux/netfilter/nf_conntrack_common.h
const IPS_CONFIRMED: u32 = 1 << 3;
