//! The mark of the packet and the mark of its connection.

use netlink_packet_netfilter::nftables::MetaKey;

use super::{
    super::{encoder::Encoder, facts::Facts},
    Condition, Match, Needs, Order,
};

impl Match {
    /// Packets with `packet mark & mask == value`.
    ///
    /// `value` must have no bits outside `mask`. To compare the whole mark, use `u32::MAX` as
    /// `mask`. The mark of an unmarked packet is 0.
    pub fn mark(value: u32, mask: u32) -> Self {
        Self::new(Mark { value, mask, of_connection: false })
    }

    /// Packets with `connection mark & mask == value`. See [`mark`](Self::mark).
    ///
    /// A packet without a connection does not match, also if the condition is negated. The
    /// condition needs connection tracking; see
    /// [`DivertBuilder::track_connections`](crate::DivertBuilder::track_connections).
    pub fn connection_mark(value: u32, mask: u32) -> Self {
        Self::new(Mark { value, mask, of_connection: true })
    }
}

#[derive(Debug)]
struct Mark {
    value: u32,
    mask: u32,
    of_connection: bool,
}

impl Condition for Mark {
    fn field(&self) -> &'static str {
        if self.of_connection { "connection mark" } else { "mark" }
    }

    fn order(&self) -> Order {
        Order::Mark
    }

    fn needs(&self) -> Needs {
        Needs { tracking: self.of_connection, ..Needs::default() }
    }

    fn check(&self, _facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        if self.value & !self.mask != 0 {
            return Err("the value of the mark has bits outside the mask".to_owned());
        }
        if self.mask == 0 && negated {
            return Err("the rule can never match: no bit of the mark is compared".to_owned());
        }
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        if self.of_connection {
            encoder.connection(CT_MARK);
        } else {
            encoder.meta(MetaKey::Mark);
        }
        encoder.mask(self.mask.to_ne_bytes().to_vec());
        encoder.equal(self.value.to_ne_bytes().to_vec(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let field = if self.of_connection { "ct mark" } else { "meta mark" };
        let operator = if negated { "!=" } else { "==" };
        format!("{field} & {:#010x} {operator} {:#x}", self.mask, self.value)
    }
}

/// uapi/linux/netfilter/nf_tables.h, enum nft_ct_keys
const CT_MARK: u32 = 3;
