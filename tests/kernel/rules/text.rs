//! The table as a script, and as `nft` lists it.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    time::Duration,
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    ErrorKind, FlowMarks, Hook, Protocol, Rule,
    divert::{
        ConnectionState, Direction, DivertBuilder, Match, NamedSet, PacketField, Priority, Rate, SetField, TableFamily,
        TcpFlags,
    },
};

use super::udp_out;
use crate::support;

tests![
    sync script_is_accepted_by_nft,
    sync script_with_flow_marks_is_accepted_by_nft,
    sync script_with_a_flowtable_is_accepted_by_nft,
    sync time_outs_of_any_length_are_accepted_by_nft,
    sync script_has_all_parts,
    sync comments_are_listed_by_nft,
    sync names_that_nft_cannot_read_are_refused,
];

/// What a program prints, or `None` if it is not installed, or may not send as much at once as it
/// needs: only the initial user namespace may raise that limit (`SO_SNDBUFFORCE`).
fn run(program: &str, arguments: &[&str], input: &str) -> Option<Result<String, String>> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = support::start_process(&mut command).ok()?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let result = if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) };
    Some(result).filter(|result| !matches!(result, Err(error) if error.contains("Message too long")))
}

/// A table with each condition, both ways, and each action.
fn everything(family: TableFamily) -> DivertBuilder {
    use ConnectionState::{Established, Invalid, New, Related, Untracked};
    let network = |address: IpAddr, prefix| (address, prefix);
    let (four, six) = (Ipv4Addr::new(10, 1, 2, 3), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    let tcp_or_udp = || Match::protocols([Protocol::Tcp, Protocol::Udp, Protocol::Other(132)]);
    let flags = TcpFlags::FIN | TcpFlags::SYN | TcpFlags::RST | TcpFlags::PSH | TcpFlags::ACK;
    let more = TcpFlags::URG | TcpFlags::ECE | TcpFlags::CWR;
    let mut conditions = vec![
        (None, Match::interface("lo")),
        (None, Match::output_interface("eth*")),
        (None, Match::mark(1, 0xff)),
        (None, Match::mark(1, u32::MAX)),
        (None, Match::protocol(Protocol::Other(47))),
        (None, tcp_or_udp()),
        (Some(tcp_or_udp()), Match::destination_port(80)),
        (Some(tcp_or_udp()), Match::source_ports([1..=10, 20..=20])),
        (Some(tcp_or_udp()), Match::destination_port(5..=10)),
        (None, Match::tcp_syn()),
        (None, Match::tcp_flags(TcpFlags::NONE, flags | more)),
        (None, Match::tcp_flags(flags | more, flags | more)),
        (None, Match::user(1000)),
        (None, Match::rate_below(Rate::packets_per_second(10).burst(20))),
        (None, Match::rate_above(Rate::packets_per_hour(10))),
        (None, Match::rate_above(Rate::packets_per_minute(10))),
        (None, Match::rate_below(Rate::bytes_per_second(1000))),
        (None, Match::rate_above(Rate::bytes_per_second(1000).burst(2000))),
    ];
    if family != TableFamily::Bridge {
        conditions.extend([
            (None, Match::connection_mark(0x10, 0x70)),
            (None, Match::connection_state([New])),
            (None, Match::connection_state([Established, Related, Untracked, Invalid])),
            (None, Match::direction(Direction::Original)),
            (None, Match::direction(Direction::Reply)),
            (None, Match::first_packets(5)),
            (None, Match::first_bytes(70_000)),
        ]);
    }
    if family != TableFamily::Ip6 {
        let several = [network(four.into(), 8), network(Ipv4Addr::LOCALHOST.into(), 32)];
        conditions.extend([
            (None, Match::source_address(four, 20)),
            (None, Match::destination_addresses(several)),
            (None, Match::icmp_type(8)),
            (None, Match::in_set("hosts", [PacketField::DestinationAddress])),
        ]);
    }
    if family != TableFamily::Ip {
        let several = [network(six.into(), 32), network(Ipv6Addr::LOCALHOST.into(), 128)];
        let fields = [PacketField::SourceAddress, PacketField::SourcePort, PacketField::Protocol];
        conditions.extend([
            (None, Match::source_address(six, 64)),
            (None, Match::destination_addresses(several)),
            (None, Match::icmpv6_type(128)),
            (Some(tcp_or_udp()), Match::in_set("flows", fields)),
        ]);
    }
    let out = || Rule::new(Hook::Output);
    let mut rules = Vec::new();
    for (other, condition) in conditions {
        let rule = other.map_or(out(), |other| out().when(other));
        let comment = format!("condition {}", rules.len() / 2);
        rules.push(rule.clone().when(condition.clone()).comment(comment).accept());
        rules.push(rule.unless(condition).drop());
    }
    rules.extend([
        out().set_mark(5, 0xff).count(),
        out().set_mark(5, u32::MAX),
        out().priority(Priority::MANGLE).accept(),
    ]);
    let arriving = Rule::new(Hook::Prerouting);
    rules.push(if family == TableFamily::Ip6 { arriving.ipv6().drop() } else { arriving.ipv4().drop() });
    if family != TableFamily::Bridge {
        rules.extend([
            out().set_connection_mark(1, 1).set_mark(1, 1).accept(),
            Rule::new(Hook::Input).reject(),
            Rule::new(Hook::Forward).protocol(Protocol::Udp).reject(),
        ]);
    }
    let hosts = NamedSet::new("hosts", [SetField::Ipv4Address]).timeout(Duration::from_millis(1500)).capacity(10);
    let flows = NamedSet::new("flows", [SetField::Ipv6Address, SetField::Port, SetField::Protocol]);
    Divert::builder().family(family).set(hosts).set(flows).rules(rules).chain(Hook::Postrouting, Priority::from(-7))
}

fn script_is_accepted_by_nft() {
    for family in [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6, TableFamily::Bridge] {
        let builder = everything(family);
        let script = builder.to_nft().unwrap();
        if let Some(result) = run("nft", &["-c", "-f", "-"], &script) {
            assert!(result.is_ok(), "{family:?}: {}\n{script}", result.unwrap_err());
        }
        // The kernel accepts the same rules.
        let divert = builder.table("same").install().unwrap();
        assert_eq!(divert.to_nft().unwrap(), script.replacen("tokio_nfqueue", "same", 1));
    }
    // Not every kernel has the statement `queue`. Its syntax is checked even so.
    let rules = [(false, false), (true, false), (true, true)]
        .map(|(bypass, fanout)| udp_out().to_queues(1..=3).bypass(bypass).fanout(fanout));
    let script = Divert::builder().rules(rules).rule(udp_out().to_queue(5)).to_nft().unwrap();
    if let Some(Err(error)) = run("nft", &["-c", "-f", "-"], &script) {
        assert!(!error.contains("syntax"), "{error}\n{script}");
        assert!(error.contains("No such file or directory"), "{error}\n{script}");
    }
}

fn script_with_flow_marks_is_accepted_by_nft() {
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    for family in [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6] {
        let builder = Divert::builder().family(family).flow_marks(FlowMarks::default());
        let builder = builder.rules(hooks.map(|hook| Rule::new(hook).count()));
        let script = builder.to_nft().unwrap();
        if let Some(result) = run("nft", &["-c", "-f", "-"], &script) {
            assert!(result.is_ok(), "{family:?}: {}\n{script}", result.unwrap_err());
        }
        // Not every kernel has the statement `queue`.
        let script = builder.rule(Rule::new(Hook::Input).to_queues(2..=4).bypass(true)).to_nft().unwrap();
        let chain = script.split_once("chain to_queue_2_4_bypass {\n").unwrap().1.split_once("\n\t}").unwrap().0;
        assert!(chain.starts_with("\t\tct mark & 0x00001012 == 0x1012 jump flow_known\n"), "{chain}");
        assert!(chain.ends_with("\t\tcounter queue num 2-4 bypass"), "{chain}");
        assert!(script.contains("counter goto to_queue_2_4_bypass"), "{script}");
        if let Some(Err(error)) = run("nft", &["-c", "-f", "-"], &script) {
            assert!(error.contains("queue num 2-4 bypass") && error.contains("No such file or directory"), "{error}");
        }
    }
}

fn script_with_a_flowtable_is_accepted_by_nft() {
    let builder = Divert::builder().flow_marks(FlowMarks::default()).offload(["lo"]);
    // Interfaces are looked up by `install` only.
    let script = builder.rule(Rule::new(Hook::Forward).to_queue(2)).to_nft().unwrap();
    for part in [
        "\tflowtable flow_accepted_connections {\n\t\thook ingress priority 0\n\t\tdevices = { \"lo\" }\n\t\tcounter\n",
        "\t\ttype filter hook ingress devices = { \"lo\" } priority -1; policy accept;\n",
        "\t\toifname \"lo\" th sport . th dport != @flow_denied_ports flow add @flow_accepted_connections\n",
        "\tchain to_queue_2_forward {\n\t\tct mark & 0x00001012 == 0x1012 ct state { established } meta l4proto { 6, 17 } \
         jump flow_offload\n",
        "\t\tmeta nfproto ipv4 ip ttl 0 meta priority 0x40 ip ttl set 64 meta priority set 0x0 accept\n",
    ] {
        assert!(script.contains(part), "{part}\n{script}");
    }
    // Not every kernel has flowtables and the statement `queue`.
    if let Some(Err(error)) = run("nft", &["-c", "-f", "-"], &script) {
        assert!(!error.contains("syntax") && !error.contains("mismatch"), "{error}\n{script}");
        assert!(error.contains("No such file or directory"), "{error}\n{script}");
    }
}

fn time_outs_of_any_length_are_accepted_by_nft() {
    let years = Duration::from_secs(100 * 365 * 86_400);
    let milliseconds = [1, 999, 1000, 1001, 60_000, 99_999_999, 100_000_000, 86_400_001, 31_536_061_001];
    for timeout in milliseconds.map(Duration::from_millis).into_iter().chain([years - Duration::from_millis(1), years])
    {
        let set = NamedSet::new("hosts", [SetField::Ipv4Address]).timeout(timeout);
        let builder = Divert::builder().set(set).flow_marks(FlowMarks::default()).denied_flows(10, timeout);
        let script = builder.rule(Rule::new(Hook::Input).count()).to_nft().unwrap();
        if let Some(result) = run("nft", &["-c", "-f", "-"], &script) {
            assert!(result.is_ok(), "{timeout:?}: {}\n{script}", result.unwrap_err());
        }
    }
}

fn script_has_all_parts() {
    let divert = Divert::builder()
        .table("example")
        .set(NamedSet::new("blocked", [SetField::Ipv4Address, SetField::Port]).timeout(Duration::from_secs(60)))
        .rule(
            udp_out()
                .destination_port(53)
                .unless(Match::in_set("blocked", [PacketField::SourceAddress, PacketField::SourcePort]))
                .to_queues(0..=3)
                .bypass(true),
        )
        .rule(
            Rule::new(Hook::Input).priority(Priority::MANGLE).interface("eth*").set_mark(1, 1).comment("from outside"),
        )
        .rule(Rule::new(Hook::Input).protocol(Protocol::Tcp).destination_port(25).reject());
    let expected = "\
table inet example {
	set blocked {
		type ipv4_addr . inet_service
		flags timeout
		size 65535
		timeout 1m
	}
	chain input_before_150 {
		type filter hook input priority -150; policy accept;
		iifname \"eth*\" counter meta mark set meta mark & 0xfffffffe | 0x1 comment \"from outside\"
	}
	chain input {
		type filter hook input priority 0; policy accept;
		meta l4proto 6 th dport 25 counter reject with tcp reset
	}
	chain output {
		type filter hook output priority 0; policy accept;
		meta nfproto ipv4 meta l4proto 17 th dport 53 ip saddr . th sport != @blocked counter queue num 0-3 bypass
	}
}
";
    assert_eq!(divert.to_nft().unwrap(), expected);
}

fn comments_are_listed_by_nft() {
    let divert =
        Divert::builder().table("commented").rule(udp_out().comment("größer < 5 & more").accept()).install().unwrap();
    if let Some(listed) = run("nft", &["list", "ruleset"], "") {
        let listed = listed.unwrap();
        assert!(listed.contains("comment \"größer < 5 & more\""), "{listed}");
        assert!(listed.contains("counter packets 0 bytes 0 accept"), "{listed}");
    }
    divert.close().unwrap();
}

fn names_that_nft_cannot_read_are_refused() {
    let builder = Divert::builder().table("a name of its own").rule(udp_out().accept());
    let error = builder.to_nft().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("nft cannot read the table name"), "{error}");
    assert!(builder.install().unwrap().to_nft().is_err());
}
