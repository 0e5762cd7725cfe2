//! Input and output interfaces.

use netlink_packet_netfilter::nftables::MetaKey;

use nfqueue_proto::types::Hook;

use super::{
    super::{encoder::Encoder, facts::Facts},
    Condition, Match, Order, operator,
};

impl Match {
    /// Packets of the interface with this name, or of the interfaces whose names begin with the
    /// text before a final `*`.
    ///
    /// At `Prerouting`, `Input` and `Forward`, this is the input interface. At `Output` and
    /// `Postrouting`, it is the output interface. The interface need not exist yet.
    ///
    /// A name has 1 to 15 bytes and contains no white space, `/`, `"` or NUL. The names of bridge
    /// ports are meant in a table of family [`Bridge`](crate::TableFamily::Bridge).
    pub fn interface(name: impl Into<String>) -> Self {
        Self::new(Interface { side: None, name: name.into() })
    }

    /// Packets that came in by this interface: at every hook but `Output`. See
    /// [`interface`](Self::interface) for the name.
    pub fn input_interface(name: impl Into<String>) -> Self {
        Self::new(Interface { side: Some(Side::Input), name: name.into() })
    }

    /// Packets that leave by this interface: at `Forward`, `Output` and `Postrouting`. See
    /// [`interface`](Self::interface) for the name.
    pub fn output_interface(name: impl Into<String>) -> Self {
        Self::new(Interface { side: Some(Side::Output), name: name.into() })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Input,
    Output,
}

#[derive(Debug)]
struct Interface {
    /// `None`: the hook selects it.
    side: Option<Side>,
    name: String,
}

impl Interface {
    fn side(&self, facts: &Facts<'_>) -> Side {
        self.side.unwrap_or(match facts.hook {
            Hook::Output | Hook::Postrouting => Side::Output,
            _ => Side::Input,
        })
    }
}

impl Condition for Interface {
    fn field(&self) -> &'static str {
        match self.side {
            None => "interface",
            Some(Side::Input) => "input interface",
            Some(Side::Output) => "output interface",
        }
    }

    fn order(&self) -> Order {
        Order::Interface
    }

    fn check(&self, facts: &Facts<'_>, negated: bool) -> Result<(), String> {
        check_name(&self.name)?;
        if self.name == "*" && negated {
            return Err("the rule can never match: every interface is excluded".to_owned());
        }
        match self.side(facts) {
            Side::Input if !facts.has_input() => {
                Err("the rule can never match: packets at this hook have no input interface".to_owned())
            }
            Side::Output if !facts.has_output() => {
                Err("the rule can never match: packets at this hook have no output interface".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn encode(&self, facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let value = match self.name.strip_suffix('*') {
            // Every interface has a name.
            Some("") => return,
            Some(beginning) => beginning.as_bytes().to_vec(),
            None => {
                // The register holds the name, padded with zeros (`nft_meta_store_ifname`).
                let mut padded = self.name.clone().into_bytes();
                padded.resize(IFNAMSIZ, 0);
                padded
            }
        };
        encoder.meta(match self.side(facts) {
            Side::Input => MetaKey::Iifname,
            Side::Output => MetaKey::Oifname,
        });
        encoder.equal(value, negated);
    }

    fn nft(&self, facts: &Facts<'_>, negated: bool) -> String {
        if self.name == "*" {
            return String::new();
        }
        let key = match self.side(facts) {
            Side::Input => "iifname",
            Side::Output => "oifname",
        };
        format!("{key} {}\"{}\"", operator(negated), self.name)
    }
}

/// Checks for the same names as the kernel (`dev_valid_name`), except that `:` is not checked here.
pub(in super::super) fn check_name(name: &str) -> Result<(), String> {
    let problem = match name.len() {
        0 => "the interface name is empty",
        16.. => "the interface name is longer than 15 bytes",
        _ if name.bytes().any(|byte| matches!(byte, 0 | b'/' | b'"') || byte.is_ascii_whitespace()) => {
            "the interface name contains white space, '/', '\"' or NUL"
        }
        _ => return Ok(()),
    };
    Err(problem.to_owned())
}

/// The maximum length of an interface name with its NUL, uapi/linux/if.h.
const IFNAMSIZ: usize = 16;
