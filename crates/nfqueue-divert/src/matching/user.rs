//! The user of the local socket.

use netlink_packet_netfilter::nftables::MetaKey;

use nfqueue_proto::types::Hook;

use super::{
    super::{encoder::Encoder, facts::Facts},
    Condition, Match, Order, Values, operator,
};

impl Match {
    /// Packets of a local socket that this user opened: at `Output` and `Postrouting`, and at
    /// `Input` of the socket that receives them, as far as the kernel knows it already.
    ///
    /// A packet without a socket does not match, also if the condition is negated. The kernel's own
    /// packets, such as IPv6 neighbour discovery, have none. The number is that of the user
    /// namespace of the network namespace.
    ///
    /// With [`Rule::unless`](crate::Rule::unless) it keeps the packets that a program itself sends
    /// out of its queue, if the program has a user of its own.
    #[doc(alias = "skuid")]
    pub fn user(id: u32) -> Self {
        Self::new(User(id))
    }
}

#[derive(Debug)]
struct User(u32);

impl Condition for User {
    fn field(&self) -> &'static str {
        "user"
    }

    fn order(&self) -> Order {
        Order::User
    }

    fn values(&self) -> Option<Values> {
        Some(Values { ranges: vec![(self.0.into(), self.0.into())], highest: u32::MAX.into() })
    }

    fn check(&self, facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        match facts.hook {
            Hook::Prerouting | Hook::Forward => {
                Err("the rule can never match: packets at this hook have no local socket".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        encoder.meta(MetaKey::SocketUserId);
        encoder.equal(self.0.to_ne_bytes().to_vec(), negated);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        format!("meta skuid {}{}", operator(negated), self.0)
    }
}
