//! Encodes tables, chains and rules as nf_tables messages. This module uses no socket.

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Hook as HookAttribute, HookNumber, InetHookNumber, NfTablesMessage, RuleAttribute,
    RuleMessage, TableAttribute, TableFlags, TableMessage,
};

use crate::types::Hook;

use super::{
    expression::{QueueMethod, expressions},
    rule::{Rule, RuleAction},
};

/// The kind of the chains to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChainKind {
    /// Regular chains. No packet reaches them. For a trial.
    Regular,
    /// Base chains with this priority.
    Base(i32),
}

/// What a message of a transaction creates or deletes, for error texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    Table,
    Chain(Hook),
    Rule(usize),
}

/// A message, its flags in addition to `NLM_F_REQUEST`, and its subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) subject: Subject,
    pub(super) flags: u16,
    pub(super) message: NfTablesMessage,
}

/// Creates a table that the socket owns, one chain for each used hook, and the rules in their
/// order.
///
/// [`Rule::check`] must have returned the [`RuleAction`] of each rule.
pub(super) fn create(
    table: &str,
    chains: ChainKind,
    method: QueueMethod,
    rules: &[(&Rule, RuleAction)],
) -> Vec<Command> {
    let mut hooks: Vec<Hook> = rules.iter().map(|(rule, _)| rule.hook).collect();
    hooks.sort();
    hooks.dedup();

    let owned = vec![TableAttribute::Name(table.to_owned()), TableAttribute::Flags(TableFlags::Owner)];
    let mut commands = vec![Command {
        subject: Subject::Table,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: NfTablesMessage::NewTable(TableMessage { attributes: owned }),
    }];
    commands.extend(hooks.into_iter().map(|hook| Command {
        subject: Subject::Chain(hook),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: NfTablesMessage::NewChain(ChainMessage { attributes: chain(table, hook, chains) }),
    }));
    commands.extend(rules.iter().enumerate().map(|(index, (rule, action))| Command {
        subject: Subject::Rule(index),
        flags: NLM_F_CREATE | NLM_F_APPEND,
        message: NfTablesMessage::NewRule(RuleMessage {
            attributes: vec![
                RuleAttribute::Table(table.to_owned()),
                RuleAttribute::Chain(chain_name(rule.hook).to_owned()),
                RuleAttribute::Expressions(expressions(rule, *action, method)),
            ],
        }),
    }));
    commands
}

/// Removes all rules of the table, but not its chains (`nf_tables_delrule` without a chain).
pub(super) fn delete_rules(table: &str) -> Vec<Command> {
    let attributes = vec![RuleAttribute::Table(table.to_owned())];
    let message = NfTablesMessage::DeleteRule(RuleMessage { attributes });
    vec![Command { subject: Subject::Table, flags: 0, message }]
}

/// Removes the table, its chains and its rules.
pub(super) fn delete_table(table: &str) -> Vec<Command> {
    let attributes = vec![TableAttribute::Name(table.to_owned())];
    let message = NfTablesMessage::DeleteTable(TableMessage { attributes });
    vec![Command { subject: Subject::Table, flags: 0, message }]
}

pub(super) fn chain_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
        Hook::Postrouting => "postrouting",
        Hook::Other(_) => "other",
    }
}

fn chain(table: &str, hook: Hook, chains: ChainKind) -> Vec<ChainAttribute> {
    let mut attributes =
        vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain_name(hook).to_owned())];
    if let ChainKind::Base(priority) = chains {
        let number = InetHookNumber::from(u32::from(hook.number()));
        attributes.push(ChainAttribute::Hook(vec![
            HookAttribute::Number(HookNumber::Inet(number)),
            // The kernel reads the priority as a signed number (`nft_chain_parse_hook`).
            HookAttribute::Priority(priority.cast_unsigned()),
        ]));
        attributes.push(ChainAttribute::Type("filter".to_owned()));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, NLA_F_NESTED};

    use super::*;

    /// An attribute in the format of the kernel, with padding.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | NLA_F_NESTED, &attributes.concat())
    }

    #[test]
    fn each_hook_gets_one_chain_and_rules_keep_their_order() {
        let rules = [
            Rule::new(Hook::Output).to_queue(1),
            Rule::new(Hook::Prerouting).to_queue(2),
            Rule::new(Hook::Output).accept(),
        ];
        let rules: Vec<_> = rules.iter().map(|rule| (rule, rule.check().unwrap())).collect();
        let commands = create("t", ChainKind::Base(-150), QueueMethod::Expression, &rules);
        let subjects: Vec<_> = commands.iter().map(|command| command.subject).collect();
        assert_eq!(
            subjects,
            [
                Subject::Table,
                Subject::Chain(Hook::Prerouting),
                Subject::Chain(Hook::Output),
                Subject::Rule(0),
                Subject::Rule(1),
                Subject::Rule(2),
            ]
        );

        let bytes = |message: &NfTablesMessage| {
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            bytes
        };
        // NFTA_TABLE_NAME, NFTA_TABLE_FLAGS
        assert_eq!(bytes(&commands[0].message), [attribute(1, b"t\0"), attribute(2, &[0, 0, 0, 2])].concat());
        // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK { HOOKNUM, PRIORITY }, NFTA_CHAIN_TYPE
        let name = [attribute(1, b"t\0"), attribute(3, b"output\0")].concat();
        let hook = nested(4, &[attribute(1, &[0, 0, 0, 3]), attribute(2, &(-150_i32).to_be_bytes())]);
        let hooked = [name.clone(), hook, attribute(7, b"filter\0")].concat();
        assert_eq!(bytes(&commands[2].message), hooked);
        let trial = create("t", ChainKind::Regular, QueueMethod::Expression, &rules);
        assert_eq!(bytes(&trial[2].message), name);
        let encoded = expressions(rules[1].0, rules[1].1, QueueMethod::Expression);
        let mut list = vec![0; encoded.as_slice().buffer_len()];
        encoded.as_slice().emit(&mut list);
        // NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS
        let expected = [attribute(1, b"t\0"), attribute(2, b"prerouting\0"), attribute(4 | NLA_F_NESTED, &list)];
        assert_eq!(bytes(&commands[4].message), expected.concat());
    }
}
