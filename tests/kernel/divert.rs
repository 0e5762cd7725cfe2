//! Rules on a real kernel: what they match, where they send packets, and how they are removed.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind as IoErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    thread,
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{NfTablesMessage, TableAttribute, TableMessage},
    none::ControlMessage,
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_NETFILTER};
use nfqueue_divert::Divert;
use rustix::thread::CapabilitySet;
use tokio_nfqueue::{ErrorKind, Hook, NetworkNamespace, Protocol, Rule};

use crate::support::{self, Namespace, PATIENCE, RawPacket, RawQueue, VethOptions, udp, udp_marked, wait_until};

/// Set for the child process that [`a_killed_process_leaves_no_table`] kills.
const CHILD: &str = "TOKIO_NFQUEUE_TEST_DIVERT_CHILD";
const CHILD_TABLE: &str = "killed";

tests![
    sync destination_ports_match,
    sync source_ports_match,
    sync protocols_match,
    sync interfaces_match,
    sync families_match,
    sync address_prefixes_match,
    sync marks_match,
    sync rules_apply_in_order,
    sync lower_priorities_come_first,
    sync rules_work_at_all_local_hooks,
    sync rules_work_at_the_forward_hook,
    sync balanced_queues_keep_pairs_of_addresses_together,
    sync fanout_selects_the_queue_by_cpu,
    sync bypass_accepts_packets_while_no_queue_is_bound,
    sync dropping_removes_the_table,
    sync a_killed_process_leaves_no_table,
    sync removing_rules_drops_no_queued_packet,
    sync rules_in_another_namespace_act_only_there,
    sync closing_one_of_two_drops_queued_packets_and_keeps_the_other,
    sync an_existing_table_name_is_refused,
    sync install_and_remove_need_the_capability,
    sync many_rules_are_installed_or_refused,
    sync invalid_rules_are_refused,
    multi divert_works_in_a_task,
];

/// A receiver and a sender on loopback.
struct Loopback {
    to: UdpSocket,
    from: UdpSocket,
}

impl Loopback {
    fn new() -> Self {
        Self::at(Ipv4Addr::LOCALHOST, 0)
    }

    fn at(address: impl Into<IpAddr>, mark: u32) -> Self {
        let address = SocketAddr::new(address.into(), 0);
        Self { to: udp(address), from: udp_marked(address, mark) }
    }

    /// The receiver's port.
    fn port(&self) -> u16 {
        self.to.local_addr().unwrap().port()
    }

    fn send(&self, text: &str) {
        self.from.send_to(text.as_bytes(), self.to.local_addr().unwrap()).unwrap();
    }

    #[track_caller]
    fn expect(&self, text: &str) {
        expect(&self.to, text);
    }

    /// Asserts that a datagram is delivered without being queued.
    #[track_caller]
    fn passes(&self, text: &str) {
        self.send(text);
        self.expect(text);
    }

    /// Asserts that a datagram is queued, and is delivered when it is accepted.
    #[track_caller]
    fn queued(&self, queue: &RawQueue, text: &str) -> RawPacket {
        self.send(text);
        let packet = accept(queue, text);
        self.expect(text);
        packet
    }
}

#[track_caller]
fn expect(socket: &UdpSocket, text: &str) {
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("waiting for {text:?}: {error}"));
    assert_eq!(String::from_utf8_lossy(&buffer[..length]), text);
}

/// Takes the next packet, which must be this one.
#[track_caller]
fn hold(queue: &RawQueue, text: &str) -> RawPacket {
    let packet = queue.next(PATIENCE).unwrap_or_else(|| panic!("{text:?} did not come to the queue"));
    assert!(packet.payload.ends_with(text.as_bytes()), "{packet:?} is not {text:?}");
    packet
}

#[track_caller]
fn accept(queue: &RawQueue, text: &str) -> RawPacket {
    let packet = hold(queue, text);
    queue.accept(&packet);
    packet
}

fn outstanding(queue: u16) -> u64 {
    support::queue_line(queue).expect("the queue is bound")[2]
}

fn udp_out() -> Rule {
    Rule::new(Hook::Output).protocol(Protocol::Udp)
}

fn install(rules: impl IntoIterator<Item = Rule>) -> Divert {
    Divert::builder().rules(rules).install().unwrap()
}

fn netlink_message(family: NetfilterProtoFamily, flags: u16, inner: impl Into<NetfilterMessageInner>) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let subsystem = if family == NetfilterProtoFamily::Unspec { 10 } else { 0 };
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, subsystem), inner);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

/// Sends messages, and returns the error of the first reply, 0 for none.
fn exchange(messages: &[u8]) -> i32 {
    let socket = Socket::new(NETLINK_NETFILTER).unwrap();
    socket.send_to(messages, &NetlinkAddr::new(0, 0), 0).unwrap();
    let mut reply = Vec::with_capacity(4096);
    socket.recv(&mut reply, 0).unwrap();
    let reply = NetlinkBuffer::new_checked(&reply[..]).unwrap();
    match reply.message_type() {
        NLMSG_ERROR => -i32::from_ne_bytes(*reply.payload().first_chunk().unwrap()),
        _ => 0,
    }
}

fn table(name: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] }
}

/// Whether nf_tables has a table with this name in family inet.
pub(crate) fn table_exists(name: &str) -> bool {
    match exchange(&netlink_message(NetfilterProtoFamily::Inet, NLM_F_ACK, NfTablesMessage::GetTable(table(name)))) {
        0 => true,
        errno => {
            assert_eq!(errno, rustix::io::Errno::NOENT.raw_os_error(), "table {name}");
            false
        }
    }
}

/// Creates a table without an owner, as `nft` does.
pub(crate) fn make_table(name: &str) {
    let (unspec, inet) = (NetfilterProtoFamily::Unspec, NetfilterProtoFamily::Inet);
    let batch = [
        netlink_message(unspec, 0, ControlMessage::BatchBegin),
        netlink_message(inet, NLM_F_ACK | NLM_F_CREATE, NfTablesMessage::NewTable(table(name))),
        netlink_message(unspec, 0, ControlMessage::BatchEnd),
    ];
    assert_eq!(exchange(&batch.concat()), 0);
}

fn destination_ports_match() {
    let (lo, other) = (Loopback::new(), Loopback::new());
    let queue = RawQueue::bind(5).unwrap();
    let divert = install([udp_out().destination_port(lo.port()).to_queue(5)]);
    assert!(table_exists(divert.table()));

    other.passes("another port");
    let packet = lo.queued(&queue, "this port");
    assert_eq!(packet.hook, 3);

    // The same port of another protocol does not match.
    let listener = TcpListener::bind(lo.to.local_addr().unwrap()).unwrap();
    TcpStream::connect_timeout(&listener.local_addr().unwrap(), PATIENCE).unwrap();
    assert_eq!(support::queue_line(5).unwrap()[7], 1, "one packet in all");
    divert.close().unwrap();
    lo.passes("no rule");
}

fn source_ports_match() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let queue = RawQueue::bind(6).unwrap();
    let rule = Rule::new(Hook::Input).protocol(Protocol::Tcp).source_port(address.port()).interface("lo");
    let _divert = install([rule.to_queue(6)]);

    let client = thread::scope(|scope| {
        let client = scope.spawn(|| TcpStream::connect_timeout(&address, PATIENCE));
        // Only packets of the server are queued: the first is its SYN-ACK.
        let packet = queue.next(PATIENCE).expect("the server's SYN-ACK");
        assert_eq!(packet.hook, 1);
        assert_eq!(packet.payload[20..22], address.port().to_be_bytes());
        assert_eq!(packet.payload[33] & 0x12, 0x12, "SYN and ACK");
        queue.accept(&packet);
        client.join().unwrap().unwrap()
    });
    drop(client);
}

fn protocols_match() {
    let queue = RawQueue::bind(0).unwrap();
    let pinged = |rule: Rule, to: IpAddr, kinds: [u8; 2]| {
        let divert = install([rule.to_queue(0)]);
        thread::scope(|scope| {
            let ping = scope.spawn(|| support::ping(to, PATIENCE));
            let at = if to.is_ipv4() { 20 } else { 40 };
            for kind in kinds {
                let packet = queue.next(PATIENCE).expect("an echo request or reply");
                assert_eq!(packet.payload[at], kind);
                queue.accept(&packet);
            }
            assert!(ping.join().unwrap());
        });
        divert.close().unwrap();
    };
    let out = || Rule::new(Hook::Output);
    pinged(out().protocol(Protocol::Icmp), Ipv4Addr::LOCALHOST.into(), [8, 0]);
    pinged(out().protocol(Protocol::Icmpv6), Ipv6Addr::LOCALHOST.into(), [128, 129]);
    pinged(out().protocol(Protocol::Other(1)), Ipv4Addr::LOCALHOST.into(), [8, 0]);

    let divert = install([out().protocol(Protocol::Icmp).to_queue(0)]);
    Loopback::new().passes("not ICMP");
    divert.close().unwrap();
    let lo = Loopback::new();
    let _divert =
        install([out().protocol(Protocol::Other(17)).source_port(lo.from.local_addr().unwrap().port()).to_queue(0)]);
    Loopback::new().passes("another source");
    lo.queued(&queue, "this source");
}

fn interfaces_match() {
    let peer = support::veth();
    let lo = Loopback::new();
    let (here, there) = (udp((peer.near_v4, 0)), peer.run(|| udp((peer.far_v4, 0))));
    let (here_at, there_at) = (here.local_addr().unwrap(), there.local_addr().unwrap());
    let queue = RawQueue::bind(1).unwrap();
    let through = |rule: Rule, name: &str| install([rule.protocol(Protocol::Udp).interface(name).to_queue(1)]);

    for hook in [Hook::Output, Hook::Postrouting] {
        let divert = through(Rule::new(hook), &peer.near);
        lo.passes("loopback");
        here.send_to(b"out", there_at).unwrap();
        accept(&queue, "out");
        expect(&there, "out");
        there.send_to(b"in", here_at).unwrap();
        expect(&here, "in");
        divert.close().unwrap();
    }
    for hook in [Hook::Prerouting, Hook::Input] {
        let divert = through(Rule::new(hook), &peer.near);
        lo.passes("loopback");
        here.send_to(b"out", there_at).unwrap();
        expect(&there, "out");
        there.send_to(b"in", here_at).unwrap();
        accept(&queue, "in");
        expect(&here, "in");
        divert.close().unwrap();
    }
    // A prefix of a name does not match; a name need not belong to an interface yet.
    let _divert = through(Rule::new(Hook::Output), "vet");
    here.send_to(b"out", there_at).unwrap();
    expect(&there, "out");
}

fn families_match() {
    let (v4, v6) = (Loopback::new(), Loopback::at(Ipv6Addr::LOCALHOST, 0));
    let queue = RawQueue::bind(2).unwrap();

    let divert = install([udp_out().ipv4().to_queue(2)]);
    v6.passes("six");
    v4.queued(&queue, "four");
    divert.close().unwrap();

    let divert = install([udp_out().ipv6().to_queue(2)]);
    v4.passes("four");
    v6.queued(&queue, "six");
    divert.close().unwrap();

    let _divert = install([udp_out().to_queue(2)]);
    v4.queued(&queue, "four");
    v6.queued(&queue, "six");
}

fn address_prefixes_match() {
    let (v4, v6) = (Loopback::new(), Loopback::at(Ipv6Addr::LOCALHOST, 0));
    let other = Loopback::at(Ipv4Addr::new(127, 1, 2, 3), 0);
    let queue = RawQueue::bind(7).unwrap();

    let divert = install([udp_out().source_address(Ipv4Addr::new(127, 1, 99, 99), 16).to_queue(7)]);
    v4.passes("another network");
    v6.passes("another family");
    other.queued(&queue, "this network");
    other.from.send_to(b"from it", v4.to.local_addr().unwrap()).unwrap();
    accept(&queue, "from it");
    v4.expect("from it");
    divert.close().unwrap();

    let divert = install([udp_out().destination_address(Ipv4Addr::LOCALHOST, 32).to_queue(7)]);
    other.passes("another address");
    v4.queued(&queue, "this address");
    divert.close().unwrap();

    let local = udp_out().source_address(Ipv6Addr::LOCALHOST, 127).destination_address(Ipv6Addr::LOCALHOST, 128);
    let _divert = install([local.to_queue(7)]);
    v4.passes("another family");
    v6.queued(&queue, "these addresses");
}

fn marks_match() {
    let plain = Loopback::new();
    let [low, high, both] = [0x0000_0012, 0x8000_0000, 0x8000_0012].map(|mark| Loopback::at(Ipv4Addr::LOCALHOST, mark));
    let queue = RawQueue::bind(3).unwrap();

    let divert = install([udp_out().mark(0x12, 0xff).to_queue(3)]);
    plain.passes("no mark");
    high.passes("no mark in these bits");
    assert_eq!(low.queued(&queue, "the mark").mark, 0x12);
    assert_eq!(both.queued(&queue, "the mark and more").mark, 0x8000_0012);
    divert.close().unwrap();

    let divert = install([udp_out().unless_mark(0x8000_0000, 0x8000_0000).to_queue(3)]);
    high.passes("marked");
    both.passes("marked and more");
    plain.queued(&queue, "no mark");
    low.queued(&queue, "another mark");
    divert.close().unwrap();

    let _divert = install([udp_out().mark(0x12, u32::MAX).unless_mark(0x8000_0000, 0x8000_0000).to_queue(3)]);
    both.passes("the one but not the other");
    low.queued(&queue, "both conditions");
}

fn rules_apply_in_order() {
    let (lo, marked) = (Loopback::new(), Loopback::at(Ipv4Addr::LOCALHOST, 7));
    let queue = RawQueue::bind(4).unwrap();
    let _divert = install([
        udp_out().mark(7, u32::MAX).accept(),
        udp_out().destination_port(lo.port()).to_queue(4),
        udp_out().drop(),
    ]);
    marked.passes("accepted first");
    lo.queued(&queue, "then queued");
    // At the output hook, the sender gets an error for a dropped packet.
    let other = Loopback::new();
    let error = other.from.send_to(b"dropped", other.to.local_addr().unwrap()).unwrap_err();
    assert_eq!(error.kind(), IoErrorKind::PermissionDenied);
}

fn lower_priorities_come_first() {
    let lo = Loopback::new();
    let [first, second] = [1, 2].map(|number| RawQueue::bind(number).unwrap());
    let at = |priority, queue| Divert::builder().priority(priority).rule(udp_out().to_queue(queue)).install().unwrap();
    let _later = at(10, 2);
    let _sooner = at(-10, 1);
    lo.send("twice");
    accept(&first, "twice");
    accept(&second, "twice");
    lo.expect("twice");
}

fn rules_work_at_all_local_hooks() {
    let lo = Loopback::new();
    let queue = RawQueue::bind(0).unwrap();
    let hooks = [(Hook::Output, 3), (Hook::Postrouting, 4), (Hook::Prerouting, 0), (Hook::Input, 1)];
    // All rules are in one table; the packet traverses the hooks in this order.
    let _divert = install(hooks.map(|(hook, _)| Rule::new(hook).protocol(Protocol::Udp).to_queue(0)));
    lo.send("four times");
    for (hook, number) in hooks {
        assert_eq!(accept(&queue, "four times").hook, number, "{hook:?}");
    }
    lo.expect("four times");
}

fn rules_work_at_the_forward_hook() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    left.route_through_near();
    right.route_through_near();
    let queue = RawQueue::bind(9).unwrap();
    let _divert = install([Rule::new(Hook::Forward).protocol(Protocol::Udp).interface(&left.near).to_queue(9)]);

    let addresses: [(IpAddr, IpAddr); 2] =
        [(left.far_v4.into(), right.far_v4.into()), (left.far_v6.into(), right.far_v6.into())];
    for (from, to) in addresses {
        let (from, to) = (left.run(|| udp((from, 0))), right.run(|| udp((to, 0))));
        from.send_to(b"through", to.local_addr().unwrap()).unwrap();
        assert_eq!(accept(&queue, "through").hook, 2);
        expect(&to, "through");
        // Its input interface is another one.
        to.send_to(b"back", from.local_addr().unwrap()).unwrap();
        expect(&from, "back");
    }
}

fn balanced_queues_keep_pairs_of_addresses_together() {
    const PAIRS: u8 = 64;
    let to = udp("127.0.0.1:0");
    let queues = [10, 11, 12, 13].map(|number| RawQueue::bind(number).unwrap());
    let _divert = install([udp_out().to_queues(10..=13)]);
    // The kernel's hash covers the addresses but not the ports.
    for host in (0..PAIRS).chain(0..PAIRS) {
        udp((Ipv4Addr::new(127, 0, 1, host), 0)).send_to(b"one of many", to.local_addr().unwrap()).unwrap();
    }
    let counts = [10, 11, 12, 13].map(outstanding);
    assert_eq!(counts.iter().sum::<u64>(), 2 * u64::from(PAIRS));
    // The probability that one of four stays empty is 4 * 0.75^64.
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    for (queue, count) in queues.iter().zip(counts) {
        let mut sources: Vec<u8> = (0..count).map(|_| accept(queue, "one of many").payload[15]).collect();
        sources.sort_unstable();
        assert!(sources.chunks(2).all(|pair| pair[0] == pair[1]), "a pair of addresses stays in its queue");
    }
    (0..2 * PAIRS).for_each(|_| expect(&to, "one of many"));
}

fn fanout_selects_the_queue_by_cpu() {
    let lo = Loopback::new();
    let queues = [20, 21].map(|number| RawQueue::bind(number).unwrap());
    let _divert = install([udp_out().to_queues(20..=21).fanout(true)]);
    support::on_each_cpu(|cpu| {
        lo.queued(&queues[cpu % 2], "by the CPU");
    });
}

fn bypass_accepts_packets_while_no_queue_is_bound() {
    let lo = Loopback::new();
    let divert = install([udp_out().to_queue(30)]);
    lo.send("lost");
    divert.close().unwrap();

    // A bypassed rule still ends the traversal of its chain.
    let divert = install([udp_out().to_queue(30).bypass(true), udp_out().drop()]);
    lo.passes("no socket is bound");
    let queue = RawQueue::bind(30).unwrap();
    lo.queued(&queue, "a socket is bound");
    support::drop_now(queue);
    lo.passes("no socket is bound any more");
    divert.close().unwrap();

    let _divert = install([udp_out().to_queues(30..=31).bypass(true)]);
    lo.passes("no queue is bound");
}

fn dropping_removes_the_table() {
    let lo = Loopback::new();
    let divert = install([udp_out().drop()]);
    let name = divert.table().to_owned();
    assert!(table_exists(&name));
    assert_eq!(lo.from.send_to(b"no", lo.to.local_addr().unwrap()).unwrap_err().kind(), IoErrorKind::PermissionDenied);
    support::drop_now(divert);
    assert!(!table_exists(&name));
    lo.passes("yes");

    let divert = Divert::builder().table("a name of its own").rule(udp_out().accept()).install().unwrap();
    assert_eq!(divert.table(), "a name of its own");
    assert!(table_exists("a name of its own"));
    divert.close().unwrap();
    assert!(!table_exists("a name of its own"));
}

/// The `main` of the process that [`a_killed_process_leaves_no_table`] kills; `None` in all other
/// processes. It creates a table, reports that, and waits until it is killed.
pub(crate) fn child() -> Option<ExitCode> {
    std::env::var_os(CHILD)?;
    let installed = Divert::builder().table(CHILD_TABLE).rule(udp_out().drop()).install();
    println!("{}", if installed.is_ok() { "installed" } else { "failed" });
    thread::park();
    drop(installed);
    Some(ExitCode::FAILURE)
}

/// The rules belong to the process, not to a thread, so the owner is a separate process.
fn a_killed_process_leaves_no_table() {
    let lo = Loopback::new();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(CHILD, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = support::start_process(&mut command).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let there = table_exists(CHILD_TABLE);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(line.trim(), "installed");
    assert!(there);
    wait_until("the table is gone", || !table_exists(CHILD_TABLE));
    lo.passes("after the kill");
}

fn removing_rules_drops_no_queued_packet() {
    let lo = Loopback::new();
    let queue = RawQueue::bind(40).unwrap();
    let divert = install([udp_out().to_queue(40), Rule::new(Hook::Input).protocol(Protocol::Tcp).to_queue(40)]);
    lo.send("first");
    lo.send("second");
    assert_eq!(outstanding(40), 2);

    divert.remove_rules().unwrap();
    assert_eq!(outstanding(40), 2, "removing rules drops nothing");
    lo.passes("third");
    divert.remove_rules().expect("a second time");
    assert!(table_exists(divert.table()));
    accept(&queue, "first");
    accept(&queue, "second");
    lo.expect("first");
    lo.expect("second");
    assert_eq!(outstanding(40), 0);
    divert.close().unwrap();
}

fn rules_in_another_namespace_act_only_there() {
    let there = Namespace::new();
    let handle = there.run(|| NetworkNamespace::current().unwrap());
    let here = present();
    let (lo_here, lo_there) = (Loopback::new(), there.run(Loopback::new));
    let queue_here = RawQueue::bind(7).unwrap();
    let queue_there = there.run(|| RawQueue::bind(7).unwrap());
    let builder = Divert::builder().table("both").rule(udp_out().to_queue(7));
    let divert = handle.run(|| builder.install()).unwrap().unwrap();
    assert_eq!(present(), here, "this thread has not moved");
    let exists = || (table_exists("both"), there.run(|| table_exists("both")));
    assert_eq!(exists(), (false, true));
    lo_here.passes("no rule is here");
    lo_there.queued(&queue_there, "the rule is there");

    let divert_here = builder.install().unwrap();
    lo_here.queued(&queue_here, "a rule is here");
    support::drop_now(divert_here);
    assert_eq!(exists(), (false, true));

    // This thread can remove rules in the other namespace.
    divert.remove_rules().unwrap();
    lo_there.passes("no rule is there any more");
    support::drop_now(divert);
    assert_eq!(exists(), (false, false));

    // Dropping the value removes its rules.
    let divert = handle.run(|| builder.install()).unwrap().unwrap();
    lo_there.queued(&queue_there, "a rule is there again");
    support::drop_now(divert);
    assert_eq!(exists(), (false, false));
    lo_there.passes("dropped");
}

/// The calling thread's network namespace.
fn present() -> PathBuf {
    fs::read_link("/proc/thread-self/ns/net").unwrap()
}

fn closing_one_of_two_drops_queued_packets_and_keeps_the_other() {
    let lo = Loopback::new();
    let queue = RawQueue::bind(50).unwrap();
    let first = install([udp_out().to_queue(50)]);
    lo.send("before");
    // Neither the trial transaction nor the new chains drop queued packets.
    let second = install([Rule::new(Hook::Input).protocol(Protocol::Tcp).to_queue(51)]);
    assert_ne!(first.table(), second.table());
    assert_eq!(outstanding(50), 1);
    accept(&queue, "before");
    lo.expect("before");

    // As the documentation warns, removing a table drops the queued packets of all queues.
    lo.send("lost");
    let lost = hold(&queue, "lost");
    assert_eq!(outstanding(50), 1);
    second.close().unwrap();
    assert_eq!(outstanding(50), 0);
    assert_eq!(queue.confirmed_verdict(lost.id, 1), rustix::io::Errno::NOENT.raw_os_error());

    lo.queued(&queue, "the first is still there");
    first.close().unwrap();
}

fn an_existing_table_name_is_refused() {
    let lo = Loopback::new();
    let queue = RawQueue::bind(60).unwrap();
    let builder = Divert::builder().table("taken").rule(udp_out().to_queue(60));
    let _first = builder.install().unwrap();
    lo.send("queued");
    let error = builder.install().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::PERM.raw_os_error()));
    assert!(error.to_string().contains("another socket owns a table of this name"), "{error}");

    make_table("nobody's");
    let error = builder.clone().table("nobody's").install().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::EXIST.raw_os_error()));
    assert!(error.to_string().contains("a table of this name exists"), "{error}");

    assert_eq!(outstanding(60), 1);
    accept(&queue, "queued");
    lo.expect("queued");
}

fn install_and_remove_need_the_capability() {
    let divert = install([udp_out().accept()]);
    let drop_capability = || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective -= CapabilitySet::NET_ADMIN;
        rustix::thread::set_capabilities(None, sets).unwrap();
    };
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            drop_capability();
            let error = Divert::builder().rule(udp_out().accept()).install().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
            let error = divert.remove_rules().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
        });
        thread.join().unwrap();
    });
    divert.remove_rules().unwrap();
    // The table is removed regardless: closing a socket needs no capability.
    let name = divert.table().to_owned();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            drop_capability();
            assert_eq!(divert.close().unwrap_err().kind(), ErrorKind::NotPermitted);
        });
        thread.join().unwrap();
    });
    // A process that another test starts may have a copy of the socket.
    wait_until("the table is gone", || !table_exists(&name));
}

fn many_rules_are_installed_or_refused() {
    // 1500 rules do not fit into a default send buffer.
    let lo = Loopback::new();
    let queue = RawQueue::bind(1).unwrap();
    let others = (0..1500).map(|port| udp_out().mark(1, 1).destination_port(port).to_queue(2));
    let last = udp_out().destination_port(lo.port()).to_queue(1);
    match Divert::builder().rules(others).rule(last).install() {
        Ok(_divert) => drop(lo.queued(&queue, "the last of many")),
        Err(error) => {
            // The buffer can be enlarged only with the capability in the initial user namespace.
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains("too many rules"), "{error}");
        }
    }
}

fn invalid_rules_are_refused() {
    let refused = |builder: tokio_nfqueue::divert::DivertBuilder, text: &str| {
        let error = builder.install().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    };
    let builder = Divert::builder;
    refused(builder(), "no rule");
    refused(builder().rule(udp_out().accept()).rule(udp_out()), "rule 1");
    refused(
        builder().rule(Rule::new(Hook::Output).destination_port(1).accept()),
        "rule 0: destination port: a port needs a protocol",
    );
    refused(builder().table("").rule(udp_out().accept()), "table");
    refused(builder().table("n".repeat(256)).rule(udp_out().accept()), "table");
    let longest = builder().table("n".repeat(255)).rule(udp_out().accept()).install().unwrap();
    longest.close().unwrap();
}

async fn divert_works_in_a_task() {
    let divert = tokio::spawn(async { install([udp_out().drop()]) }).await.unwrap();
    let lo = Loopback::new();
    assert!(lo.from.send_to(b"dropped", lo.to.local_addr().unwrap()).is_err());
    let name = divert.table().to_owned();
    tokio::task::spawn_blocking(move || divert.close()).await.unwrap().unwrap();
    assert!(!table_exists(&name));
}

/// A `Divert` can be sent to and closed in any thread.
const _: fn() = || {
    fn anywhere<T: Send + Sync + 'static>() {}
    anywhere::<Divert>();
    anywhere::<Rule>();
};
