use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{Emitable, NLA_F_NESTED};

use crate::{ConnectionState, Direction, PacketField, Priority, Rate, SetField, TcpFlags, encoder::QueueMethod};

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

/// NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA }
fn expression(name: &[u8], attributes: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, name), nested(2, attributes)])
}

fn load(key: u8) -> Vec<u8> {
    expression(b"meta\0", &[attribute(1, &[0, 0, 0, 1]), attribute(2, &[0, 0, 0, key])])
}

fn compare(operator: u8, value: &[u8]) -> Vec<u8> {
    let register = attribute(1, &[0, 0, 0, 1]);
    expression(b"cmp\0", &[register, attribute(2, &[0, 0, 0, operator]), nested(3, &[attribute(1, value)])])
}

fn load_header(base: u8, offset: u8, length: u8) -> Vec<u8> {
    let numbers = [1, base, offset, length].into_iter().zip(1..);
    let attributes: Vec<_> = numbers.map(|(number, kind)| attribute(kind, &[0, 0, 0, number])).collect();
    expression(b"payload\0", &attributes)
}

fn mask(mask: &[u8]) -> Vec<u8> {
    let [register, length] = [1, mask.len() as u8].map(|number| [0, 0, 0, number]);
    let xor = nested(5, &[attribute(1, &vec![0; mask.len()])]);
    let mask = nested(4, &[attribute(1, mask)]);
    expression(b"bitwise\0", &[attribute(1, &register), attribute(2, &register), attribute(3, &length), xor, mask])
}

fn surroundings(sets: &[NamedSet]) -> Surroundings<'_> {
    Surroundings { sets, ..Surroundings::PLAIN }
}

fn encoded(rule: &Rule, method: QueueMethod) -> Vec<u8> {
    let rules = rule.check(0, surroundings(&[])).unwrap();
    let [rule] = rules.as_slice() else { panic!("{rules:?}") };
    let (list, sets) = rule.expressions(Encoding { method, trial: false }, 1);
    assert!(sets.is_empty());
    let mut bytes = vec![0; list.as_slice().buffer_len()];
    list.as_slice().emit(&mut bytes);
    bytes
}

fn after_counter(expression: Vec<u8>) -> Vec<u8> {
    [self::expression(b"counter\0", &[]), expression].concat()
}

#[test]
fn queue_expression_is_encoded() {
    let rule = Rule::new(Hook::Output).to_queues(0x1234..=0x1237);
    let numbers = |flags| [attribute(1, &[0x12, 0x34]), attribute(2, &[0, 4]), attribute(3, &[0, flags])];
    assert_eq!(encoded(&rule, QueueMethod::Expression), after_counter(expression(b"queue\0", &numbers(0))));
    assert_eq!(
        encoded(&rule.clone().bypass(true), QueueMethod::Expression),
        after_counter(expression(b"queue\0", &numbers(1)))
    );
    assert_eq!(
        encoded(&rule.fanout(true), QueueMethod::Expression),
        after_counter(expression(b"queue\0", &numbers(2)))
    );
}

#[test]
fn queue_target_is_encoded() {
    let rule = Rule::new(Hook::Output).to_queue(u16::MAX);
    let target = |info: [u16; 4]| {
        let info: Vec<u8> = info.into_iter().flat_map(u16::to_ne_bytes).collect();
        after_counter(expression(
            b"target\0",
            &[attribute(1, b"NFQUEUE\0"), attribute(2, &[0, 0, 0, 3]), attribute(3, &info)],
        ))
    };
    assert_eq!(encoded(&rule, QueueMethod::Target), target([u16::MAX, 1, 0, 0]));
    assert_eq!(encoded(&rule.clone().bypass(true).fanout(true), QueueMethod::Target), target([u16::MAX, 1, 3, 0]));
    assert_eq!(encoded(&rule.to_queues(1..=u16::MAX), QueueMethod::Target), target([1, u16::MAX, 0, 0]));
}

#[test]
fn conditions_are_encoded_in_order() {
    let rule = Rule::new(Hook::Input)
        .protocol(Protocol::Tcp)
        .source_port(80)
        .destination_port(0x1f90)
        .interface("lo")
        .mark(0x12, 0xff)
        .unless_mark(0x8000_0000, 0x8000_0000)
        .ipv6()
        .drop();
    let expected = [
        load(15),
        compare(0, &[10]),
        load(6),
        compare(0, b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        load(3),
        mask(&0xff_u32.to_ne_bytes()),
        compare(0, &0x12_u32.to_ne_bytes()),
        load(3),
        mask(&0x8000_0000_u32.to_ne_bytes()),
        compare(1, &0x8000_0000_u32.to_ne_bytes()),
        load(16),
        compare(0, &[6]),
        load_header(2, 0, 2),
        compare(0, &[0, 80]),
        load_header(2, 2, 2),
        compare(0, &[0x1f, 0x90]),
        expression(b"counter\0", &[]),
        // NFTA_IMMEDIATE_DREG 0, NFTA_IMMEDIATE_DATA { NFTA_DATA_VERDICT { NFTA_VERDICT_CODE
        // NF_DROP } }
        expression(b"immediate\0", &[attribute(1, &[0; 4]), nested(2, &[nested(2, &[attribute(1, &[0, 0, 0, 0])])])]),
    ];
    assert_eq!(encoded(&rule, QueueMethod::Expression), expected.concat());
}

#[test]
fn address_adds_a_condition_on_the_family() {
    let rule = Rule::new(Hook::Output).destination_address(Ipv4Addr::new(10, 1, 2, 3), 8).accept();
    let expected = [
        load(15),
        compare(0, &[2]),
        load_header(1, 16, 4),
        mask(&[0xff, 0, 0, 0]),
        compare(0, &[10, 0, 0, 0]),
        expression(b"counter\0", &[]),
        expression(b"immediate\0", &[attribute(1, &[0; 4]), nested(2, &[nested(2, &[attribute(1, &[0, 0, 0, 1])])])]),
    ];
    assert_eq!(encoded(&rule, QueueMethod::Target), expected.concat());
}

#[test]
fn hook_selects_input_or_output_interface() {
    for (hook, key) in
        [(Hook::Prerouting, 6), (Hook::Input, 6), (Hook::Forward, 6), (Hook::Output, 7), (Hook::Postrouting, 7)]
    {
        let bytes = encoded(&Rule::new(hook).interface("a").accept(), QueueMethod::Expression);
        assert!(bytes.starts_with(&load(key)), "{hook:?}");
    }
}

fn queued() -> Rule {
    Rule::new(Hook::Output).to_queue(1)
}

fn tcp() -> Rule {
    queued().protocol(Protocol::Tcp)
}

/// The reason for which a rule is refused.
#[track_caller]
fn refused(rule: &Rule) -> String {
    rule.check(0, surroundings(&[])).expect_err("the rule is invalid")
}

#[track_caller]
fn refused_for(rule: &Rule, reason: &str) {
    assert_eq!(refused(rule), reason);
}

fn valid(rule: &Rule) -> bool {
    rule.check(0, surroundings(&[])).is_ok()
}

fn action(rule: &Rule) -> Action {
    rule.check(0, surroundings(&[])).unwrap()[0].action
}

#[test]
fn port_needs_a_protocol_with_ports() {
    refused_for(&queued().destination_port(53), "destination port: a port needs a protocol; set it with protocol()");
    for protocol in [Protocol::Icmp, Protocol::Icmpv6, Protocol::Other(47)] {
        let reason = refused(&queued().protocol(protocol).source_port(53));
        assert_eq!(reason, format!("source port: protocol {} has no ports", protocol.number()));
    }
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Other(132), Protocol::Other(6)] {
        assert!(valid(&queued().protocol(protocol).source_port(0)));
    }
    let both = Match::protocols([Protocol::Tcp, Protocol::Udp]);
    assert!(valid(&queued().when(both.clone()).destination_port(53)));
    let not_tcp = queued().when(both).unless(Match::protocol(Protocol::Tcp)).destination_port(53);
    assert!(valid(&not_tcp));
    let reason = refused(&queued().unless(Match::protocol(Protocol::Icmp)).destination_port(53));
    assert!(reason.contains("a port needs a protocol"), "{reason}");
}

#[test]
fn ports_are_checked() {
    #[expect(clippy::reversed_empty_ranges, reason = "the range must be refused")]
    let reversed = 5..=3;
    refused_for(
        &tcp().when(Match::destination_ports([1..=2, reversed])),
        "destination port: the range 5-3 is reversed",
    );
    refused_for(&tcp().when(Match::source_ports::<u16>([])), "source port: there is no port");
    let never = "destination port: the rule can never match: the conditions exclude every value";
    refused_for(&tcp().unless(Match::destination_port(0..=65535)), never);
    refused_for(&tcp().destination_port(80).when(Match::destination_port(81)), never);
    refused_for(&tcp().destination_port(80).unless(Match::destination_ports([1..=79, 80..=90])), never);
    assert!(valid(&tcp().when(Match::destination_port(1..=100)).unless(Match::destination_port(2))));
    assert!(valid(&tcp().when(Match::destination_port(80)).when(Match::source_port(81))));
}

#[test]
fn interface_name_must_be_valid_for_the_kernel() {
    for bad in ["", "sixteen-bytes-xx", "a b", "a/b", "a\0b", "a\"b"] {
        assert!(refused(&queued().interface(bad)).starts_with("interface: "), "{bad:?}");
    }
    for good in ["lo", "fifteen-bytes-x", "eth0.1", "ä", "eth*", "*"] {
        assert!(valid(&queued().interface(good)), "{good:?}");
    }
    assert!(refused(&queued().unless(Match::interface("*"))).contains("never match"));
    refused_for(
        &queued().when(Match::input_interface("lo")),
        "input interface: the rule can never match: packets at this hook have no input interface",
    );
    for hook in [Hook::Prerouting, Hook::Input] {
        let rule = Rule::new(hook).accept().when(Match::output_interface("lo"));
        assert!(refused(&rule).starts_with("output interface: the rule can never match"));
    }
    assert!(valid(&Rule::new(Hook::Postrouting).accept().when(Match::input_interface("lo"))));
}

#[test]
fn rule_needs_an_action_and_a_valid_range_of_queues() {
    #[expect(clippy::reversed_empty_ranges, reason = "the range must be refused")]
    let reversed = 3..=2;
    let rule = || Rule::new(Hook::Input);
    refused_for(&rule().to_queues(reversed), "queues: the range 3-2 is reversed");
    assert!(refused(&rule().to_queues(0..=65535)).starts_with("queues: the range is too large"));
    let all_but_one = Queues { first: 1, last: 65535, fanout: false, bypass: false };
    assert_eq!(action(&rule().to_queues(1..=65535)), Action::Queue(all_but_one));
    assert!(refused(&rule()).starts_with("action: there is none"));
    assert!(refused(&rule().accept().bypass(true)).starts_with("action: bypass"));
    assert_eq!(action(&rule().to_queue(9).drop()), Action::Drop);
    assert_eq!(action(&rule().set_mark(1, 1)), Action::Continue);
    assert_eq!(action(&rule().count()), Action::Continue);
    assert!(refused(&Rule::new(Hook::Other(9)).accept()).starts_with("hook: "));
}

#[test]
fn conditions_must_have_the_same_version() {
    let (v4, v6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
    refused_for(
        &queued().source_address(v4, 33),
        "source address: the prefix of 127.0.0.1/33 is longer than the address",
    );
    assert!(refused(&queued().source_address(v6, 129)).starts_with("source address: "));
    refused_for(
        &queued().source_address(v4, 32).destination_address(v6, 128),
        "destination address: the rule can never match: it requires both IPv4 and IPv6",
    );
    assert!(!valid(&queued().source_address(v4, 0).ipv6()));
    assert!(valid(&queued().source_address(v6, 0).destination_address(v6, 128).ipv6()));
    let mixed = [(IpAddr::V4(v4), 8), (IpAddr::V6(v6), 8)];
    refused_for(
        &queued().when(Match::source_addresses(mixed)),
        "source address: the addresses are of both IPv4 and IPv6",
    );
    refused_for(&queued().when(Match::source_addresses([])), "source address: there is no address");
    let six = Surroundings { family: TableFamily::Ip6, ..Surroundings::PLAIN };
    let reason = queued().source_address(v4, 8).check(0, six).unwrap_err();
    assert_eq!(reason, "source address: the rule can never match: it requires both IPv6 and IPv4");
    assert!(!valid(&queued().unless(Match::source_address(v4, 0))));
    assert!(!valid(&queued().source_address(v4, 8).unless(Match::source_address(Ipv4Addr::new(126, 0, 0, 0), 7))));
}

#[test]
fn marks_are_checked() {
    refused_for(&queued().mark(0x10, 0x0f), "mark: the value of the mark has bits outside the mask");
    assert!(!valid(&queued().unless_mark(0x10, 0x0f)));
    assert!(!valid(&queued().unless_mark(0, 0)));
    assert!(valid(&queued().mark(0, 0).mark(0x0f, 0xff)));
    assert!(refused(&queued().when(Match::connection_mark(0x10, 0x0f))).starts_with("connection mark: "));
    assert!(refused(&queued().set_mark(0x10, 0x0f)).starts_with("set mark: "));
    assert!(refused(&queued().set_connection_mark(0x10, 0x0f)).starts_with("set mark: "));
}

#[test]
fn protocols_are_implied_or_checked() {
    let out = || Rule::new(Hook::Output).accept();
    assert!(valid(&out().when(Match::tcp_syn()).destination_port(80)));
    refused_for(&out().protocol(Protocol::Udp).when(Match::tcp_syn()), "TCP flags: the protocol must be 6");
    refused_for(
        &out().ipv6().when(Match::icmp_type(8)),
        "ICMP type: the rule can never match: it requires both IPv6 and IPv4",
    );
    refused_for(&out().ipv6().protocol(Protocol::Icmp), "protocol: ICMP can never match with IPv6");
    refused_for(&out().ipv4().protocol(Protocol::Icmpv6), "protocol: ICMPv6 can never match with IPv4");
    assert!(!valid(&out().when(Match::icmp_type(8)).when(Match::tcp_syn())));
    assert!(!valid(&out().when(Match::icmp_type(8)).when(Match::icmp_type(0))));
    let never = "protocol: the rule can never match: the conditions exclude every value";
    refused_for(&out().protocol(Protocol::Tcp).unless(Match::protocol(Protocol::Tcp)), never);
    refused_for(&out().when(Match::protocols([])), "protocol: there is no protocol");
    refused_for(
        &out().when(Match::tcp_flags(TcpFlags::SYN, TcpFlags::ACK)),
        "TCP flags: a flag that must be set is not among those that are compared",
    );
    assert!(!valid(&out().unless(Match::tcp_flags(TcpFlags::NONE, TcpFlags::NONE))));
}

#[test]
fn other_conditions_are_checked() {
    refused_for(&queued().when(Match::connection_state([])), "connection state: there is no state");
    use ConnectionState::{Established, Invalid, New, Other, Related, Untracked};
    let all = Match::connection_state([Invalid, Established, Related, New, Untracked]);
    assert!(refused(&queued().unless(all)).contains("never match"));
    refused_for(
        &queued().when(Match::connection_state([New, Other(9)])),
        "connection state: rules cannot match Other(9)",
    );
    assert!(valid(&queued().unless(Match::direction(Direction::Reply))));
    refused_for(&queued().when(Match::rate_above(Rate::packets_per_second(0))), "rate: the rate is 0");
    refused_for(&queued().when(Match::rate_above(Rate::packets_per_hour(1).burst(0))), "rate: the burst is 0");
    assert!(valid(&queued().when(Match::rate_below(Rate::bytes_per_second(1)))));
    for hook in [Hook::Prerouting, Hook::Forward] {
        let rule = Rule::new(hook).accept().when(Match::user(0));
        assert!(refused(&rule).starts_with("user: the rule can never match"));
    }
    assert!(!valid(&queued().when(Match::user(1)).when(Match::user(2))));
    assert!(refused(&queued().comment("a\"b")).starts_with("comment: "));
    assert!(refused(&queued().comment("a\nb")).starts_with("comment: "));
    assert!(refused(&queued().comment("a".repeat(128))).starts_with("comment: "));
    assert!(valid(&queued().comment("a".repeat(127))));
}

#[test]
fn sets_are_checked() {
    let sets = [
        NamedSet::new("four", [SetField::Ipv4Address]),
        NamedSet::new("service", [SetField::Ipv6Address, SetField::Port]),
    ];
    let check = |rule: Rule| rule.check(0, surroundings(&sets)).map(|_| ());
    let source = PacketField::SourceAddress;
    let reason = |rule| check(rule).unwrap_err();
    assert_eq!(reason(queued().when(Match::in_set("none", [source]))), "set: there is no set \"none\"");
    assert_eq!(check(queued().when(Match::in_set("four", [source]))), Ok(()));
    assert!(reason(queued().ipv6().when(Match::in_set("four", [source]))).starts_with("set: the rule can never match"));
    assert!(reason(queued().when(Match::in_set("four", [source, source]))).contains("elements of 1 fields, not 2"));
    assert!(reason(queued().when(Match::in_set("four", [PacketField::Protocol]))).contains("does not fit"));
    let service = Match::in_set("service", [source, PacketField::SourcePort]);
    assert!(reason(queued().when(service.clone())).starts_with("set: a port needs a protocol"));
    assert_eq!(check(tcp().unless(service)), Ok(()));
}

#[test]
fn reject_depends_on_the_protocol() {
    let rule = || Rule::new(Hook::Input).reject();
    let actions = |rule: Rule| -> Vec<Action> {
        rule.check(0, surroundings(&[])).unwrap().iter().map(|rule| rule.action).collect()
    };
    let both = [Action::ResetTcp, Action::Unreachable];
    assert_eq!(actions(rule()), both);
    assert_eq!(actions(rule().protocol(Protocol::Tcp)), both[..1]);
    assert_eq!(actions(rule().protocol(Protocol::Udp)), both[1..]);
    assert_eq!(actions(rule().unless(Match::protocol(Protocol::Tcp))), both[1..]);
    assert_eq!(actions(rule().unless(Match::protocol(Protocol::Udp))), both);
    assert_eq!(actions(rule().when(Match::protocols([Protocol::Udp, Protocol::Tcp]))), both);
    assert!(refused(&Rule::new(Hook::Postrouting).reject()).starts_with("action: "));
    let bridge = Surroundings { family: TableFamily::Bridge, ..Surroundings::PLAIN };
    assert!(Rule::new(Hook::Forward).reject().check(0, bridge).is_err());
    assert!(rule().check(0, bridge).is_ok());
}

#[test]
fn a_condition_is_replaced_only_by_the_short_methods() {
    let text = |rule: Rule| rule.check(0, surroundings(&[])).unwrap()[0].nft();
    assert_eq!(text(tcp().destination_port(1).destination_port(2).drop()), "meta l4proto 6 th dport 2 counter drop");
    assert_eq!(
        text(tcp().unless(Match::destination_port(1)).destination_port(2).drop()),
        "meta l4proto 6 th dport != 1 th dport 2 counter drop"
    );
    assert_eq!(
        text(queued().ipv4().interface("a").interface("b*").accept()),
        "meta nfproto ipv4 oifname \"b*\" counter accept"
    );
}

#[test]
fn fragments_are_reassembled_where_a_rule_needs_it() {
    let needs = |rule: Rule| rule.check(0, surroundings(&[])).unwrap()[0].needs_reassembly();
    let at = |hook| Rule::new(hook).protocol(Protocol::Udp).accept();
    for hook in [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Postrouting] {
        assert!(needs(at(hook).destination_port(1)), "{hook:?}");
        assert!(!needs(at(hook)), "{hook:?}");
    }
    assert!(!needs(at(Hook::Output).destination_port(1)));
    assert!(!needs(at(Hook::Input).ipv4().destination_port(1)));
}

#[test]
fn intersection_is_what_both_have() {
    assert_eq!(intersection(&[(0, 5), (8, 9)], &[(4, 8)]), [(4, 5), (8, 8)]);
}

#[test]
fn priority_of_a_rule_comes_before_that_of_the_table() {
    let place = |rule: Rule| rule.check(0, surroundings(&[])).unwrap()[0].place.priority;
    assert_eq!(place(queued()), 0);
    assert_eq!(place(queued().priority(Priority::MANGLE)), -150);
    assert_eq!(place(queued().priority(7)), 7);
}

/// The rules of a chain of a table with flow marks and a flowtable, encoded.
fn of_chain(name: &str) -> Vec<Vec<u8>> {
    let devices = ["eth0".to_owned()];
    let marks = nfqueue_proto::types::FlowMarks::default();
    let flows = FlowTable { marks, capacity: 1, timeout: std::time::Duration::from_secs(60) };
    let surroundings = Surroundings { flows: Some(flows), offload: &devices, ..surroundings(&[]) };
    let rules = [Rule::new(Hook::Forward).to_queue(3)];
    let checked = rules[0].check(0, surroundings).unwrap();
    let places = [checked[0].place];
    let layout = crate::layout::Layout::new(checked, &places, surroundings);
    let rules = layout.rules.iter().filter(|rule| rule.chain == name);
    let encoding = Encoding { method: QueueMethod::Expression, trial: false };
    rules
        .map(|rule| {
            let (list, _) = rule.expressions(encoding, 1);
            let mut bytes = vec![0; list.as_slice().buffer_len()];
            list.as_slice().emit(&mut bytes);
            bytes
        })
        .collect()
}

#[test]
fn offload_of_a_connection_is_encoded() {
    let [rule] = &of_chain("flow_offload_to")[..] else { panic!() };
    assert!(rule.starts_with(&[load(7), compare(0, b"eth0\0\0\0\0\0\0\0\0\0\0\0\0")].concat()));
    // NFTA_FLOW_TABLE_NAME
    assert!(rule.ends_with(&expression(b"flow_offload\0", &[attribute(1, b"flow_accepted_connections\0")])));
    let queue = of_chain("to_queue_3_forward");
    assert!(of_chain("to_queue_3").is_empty() && queue.len() > 2, "{queue:?}");
}

#[test]
fn ttl_is_taken_and_restored() {
    let store = |key: u8| expression(b"meta\0", &[attribute(2, &[0, 0, 0, key]), attribute(3, &[0, 0, 0, 1])]);
    let zeros = |length: usize| {
        let data = nested(2, &[attribute(1, &vec![0; length])]);
        expression(b"immediate\0", &[attribute(1, &[0, 0, 0, 1]), data])
    };
    // NFTA_PAYLOAD_SREG, _BASE, _OFFSET, _LEN, _CSUM_TYPE, _CSUM_OFFSET
    let write = |offset: u8, checksum: &[(u16, u8)]| {
        let numbers = [(5, 1), (2, 1), (3, offset), (4, 1)].into_iter().chain(checksum.iter().copied());
        let attributes: Vec<_> = numbers.map(|(kind, number)| attribute(kind, &[0, 0, 0, number])).collect();
        expression(b"payload\0", &attributes)
    };
    let accept =
        expression(b"immediate\0", &[attribute(1, &[0; 4]), nested(2, &[nested(2, &[attribute(1, &[0, 0, 0, 1])])])]);
    let [past, restore] = ["flow_past", "flow_restore"].map(of_chain);
    for (index, (protocol, offset, checksum)) in
        [(2, 8, &[(6, 1), (7, 10)][..]), (10, 7, &[][..])].into_iter().enumerate()
    {
        let version = [load(15), compare(0, &[protocol]), load_header(1, offset, 1)].concat();
        let taken = [load_header(1, offset, 1), store(2), zeros(1), write(offset, checksum), accept.clone()].concat();
        // NFT_CMP_GT
        assert_eq!(past[index], [version.clone(), compare(4, &[1]), taken].concat());
        let restored = [load(2), write(offset, checksum), zeros(4), store(2), accept.clone()].concat();
        assert_eq!(restore[index], [version, compare(0, &[0]), restored].concat());
    }
}

#[test]
fn rates_count_only_packets_that_are_not_offloaded() {
    let rate = || (Match::rate_above(Rate::packets_per_second(1)), false);
    for hook in [Hook::Prerouting, Hook::Forward, Hook::Postrouting] {
        assert!(check_sees_all(hook, &[rate()]).is_err());
        assert!(check_sees_all(hook, &[rate(), (Match::tcp_syn(), true)]).is_err());
        assert!(check_sees_all(hook, &[rate(), (Match::tcp_syn(), false)]).is_ok());
        assert!(check_sees_all(hook, &[rate(), (Match::connection_state([ConnectionState::New]), false)]).is_ok());
        assert!(check_sees_all(hook, &[(Match::tcp_flags(TcpFlags::SYN, TcpFlags::SYN), false)]).is_ok());
    }
    assert!(check_sees_all(Hook::Input, &[rate()]).is_ok());
}
