use netlink_packet_core::{Emitable, NLA_F_NESTED};

use crate::{
    Match, Protocol, Rule,
    chain::{ChainType, Place},
    checked::Surroundings,
    encoder::QueueMethod,
    set::SetField,
};
use nfqueue_proto::types::Hook;

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

fn bytes(message: &NfTablesMessage) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn batch() -> Batch<'static> {
    Batch::new("t", Encoding { method: QueueMethod::Expression, trial: false })
}

#[test]
fn tables_and_chains_are_encoded() {
    let mut batch = batch();
    batch.create_table(Creation { ownership: Ownership::Process, replaces: false });
    let place = Place { hook: Hook::Output, priority: -150 };
    let chain = Chain { name: "output".to_owned(), base: Some((place, ChainType::Filter)), fixed: false };
    batch.create_chain(&chain, ChainKind::Base, &[]);
    batch.create_chain(&chain, ChainKind::Regular, &[]);
    let commands = batch.commands;
    // NFTA_TABLE_NAME, NFTA_TABLE_FLAGS
    assert_eq!(bytes(&commands[0].message), [attribute(1, b"t\0"), attribute(2, &[0, 0, 0, 2])].concat());
    // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK { HOOKNUM, PRIORITY }, NFTA_CHAIN_TYPE
    let name = [attribute(1, b"t\0"), attribute(3, b"output\0")].concat();
    let hook = nested(4, &[attribute(1, &[0, 0, 0, 3]), attribute(2, &(-150_i32).to_be_bytes())]);
    let hooked = [name.clone(), hook, attribute(7, b"filter\0")].concat();
    assert_eq!(bytes(&commands[1].message), hooked);
    assert_eq!(bytes(&commands[2].message), name);
}

#[test]
fn flowtable_and_the_chain_before_it_are_bound_to_interfaces() {
    let devices = ["eth0".to_owned(), "wg0".to_owned()];
    let names = [attribute(1, b"eth0\0"), attribute(1, b"wg0\0")];
    // NFTA_FLOWTABLE_TABLE, _NAME, _HOOK { _NUM, _PRIORITY, _DEVS { NFTA_DEVICE_NAME } }, _FLAGS
    let table = [attribute(1, b"t\0"), attribute(2, b"flow_accepted_connections\0")].concat();
    let numbers = [attribute(1, &[0; 4]), attribute(2, &[0; 4])].concat();
    let flags = attribute(7, &[0, 0, 0, 2]);
    let hooked = [numbers.clone(), nested(3, &names)];
    let mut batch = batch();
    batch.create_flowtable(&devices);
    assert_eq!(bytes(&batch.commands[0].message), [table.clone(), nested(3, &hooked), flags.clone()].concat());
    // Without interfaces, it has no hooks.
    let mut trial = Batch::new("t", Encoding { method: QueueMethod::Expression, trial: true });
    trial.create_flowtable(&devices);
    assert_eq!(bytes(&trial.commands[0].message), [table, nested(3, &[numbers]), flags].concat());

    let place = Place { hook: INGRESS, priority: -1 };
    let chain = Chain { name: "in".to_owned(), base: Some((place, ChainType::Filter)), fixed: true };
    batch.create_chain(&chain, ChainKind::Base, &devices);
    // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_HOOK_DEVS
    let hook = [attribute(1, &[0, 0, 0, 5]), attribute(2, &[0xff; 4]), nested(4, &names)];
    let name = [attribute(1, b"t\0"), attribute(3, b"in\0")].concat();
    let hooked = [name, nested(4, &hook), attribute(7, b"filter\0")].concat();
    assert_eq!(bytes(&batch.commands[1].message), hooked);
}

#[test]
fn rule_comes_after_its_sets_and_has_a_comment() {
    let rule = Rule::new(Hook::Prerouting)
        .protocol(Protocol::Tcp)
        .when(Match::destination_ports((1..=20_u16).map(|number| 100 * number..=100 * number + 9)))
        .unless(Match::source_ports([1_u16, 3]))
        .comment("web")
        .accept();
    let rules = rule.check(7, Surroundings::PLAIN).unwrap();
    let mut batch = batch();
    batch.add_rule(&rules[0]);
    let commands = batch.commands;
    assert!(commands.iter().all(|command| command.subject == Subject::Rule(7)));
    let [first, first_elements, second, second_elements, rule] = commands.as_slice() else { panic!("{commands:?}") };
    let table = attribute(1, b"t\0");
    let set = |flags, id| {
        // NFTA_SET_TABLE, _NAME, _FLAGS, _KEY_TYPE, _KEY_LEN, _ID
        let name = attribute(2, b"__set%d\0");
        let numbers = [(3, flags), (4, 13), (5, 2), (10, id)].map(|(kind, value)| attribute(kind, &[0, 0, 0, value]));
        [table.clone(), name, numbers.concat()].concat()
    };
    assert_eq!(bytes(&first.message), set(7, 1));
    assert_eq!(bytes(&second.message), set(3, 2));
    let element = |port: u16, end: bool| {
        let key = nested(1, &[attribute(1, &port.to_be_bytes())]);
        let flags = if end { attribute(3, &[0, 0, 0, 1]) } else { Vec::new() };
        nested(1, &[key, flags])
    };
    let list = |id, elements: &[Vec<u8>]| {
        [table.clone(), attribute(2, b"__set%d\0"), attribute(4, &[0, 0, 0, id]), nested(3, elements)].concat()
    };
    let of_range = |number: u16| [element(100 * number, false), element(100 * number + 10, true)];
    let ranges: Vec<_> = std::iter::once(element(0, true)).chain((1..=20).flat_map(of_range)).collect();
    assert_eq!(bytes(&first_elements.message), list(1, &ranges));
    assert_eq!(bytes(&second_elements.message), list(2, &[element(1, false), element(3, false)]));
    let NfTablesMessage::NewRule(rule) = &rule.message else { panic!("{rule:?}") };
    assert!(rule.attributes.contains(&RuleAttribute::UserData(b"\x00\x04web\x00".to_vec())));
}

#[test]
fn named_sets_have_a_time_out_and_a_size() {
    let set = NamedSet::new("s", [SetField::Ipv4Address, SetField::Port]).timeout(Duration::from_secs(5)).capacity(9);
    let mut batch = batch();
    batch.create_set(&set);
    batch.insert_elements("s", &[(vec![1; 8], Some(Duration::from_millis(10)))], true);
    let numbers = [(3, 0x10), (5, 8), (10, 1)].map(|(kind, value)| attribute(kind, &[0, 0, 0, value]));
    let [flags, length, id] = numbers;
    let key_type = attribute(4, &[0, 0, 0x01, 0xcd]);
    let [table, name] = [(1, b"t\0"), (2, b"s\0")].map(|(kind, name)| attribute(kind, name));
    // NFTA_SET_DESC { NFTA_SET_DESC_SIZE }, NFTA_SET_TIMEOUT
    let description = bytes(&batch.commands[0].message);
    let timeout = attribute(11, &5000_u64.to_be_bytes());
    let size = attribute(1, &[0, 0, 0, 9]);
    let start = [table.clone(), name.clone(), flags, key_type, length, id].concat();
    assert!(description.starts_with(&start));
    assert!(description.ends_with(&[size, timeout].concat()));
    let key = nested(1, &[attribute(1, &[1; 8])]);
    let element = nested(1, &[key, attribute(4, &10_u64.to_be_bytes())]);
    assert_eq!(bytes(&batch.commands[1].message), [table, name, nested(3, &[element])].concat());
}
