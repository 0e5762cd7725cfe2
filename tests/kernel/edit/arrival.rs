//! Which reply to a query arrives, by hook: the table of `guide::replies`.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use netlink_packet_core::DefaultNla;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Error, Hook, Protocol, Queue, Rule,
    edit::{Edit, Unreachable},
    inject::Injector,
};

use crate::{
    common::{
        self,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
    },
    support::{self, Peer, VethOptions},
};

const PORT: u16 = 9000;
const MARKER_PORT: u16 = 9100;
const MARK: u32 = 0x40;
/// A priority before connection tracking.
const BEFORE_TRACKING: i32 = -300;
const AFTER_QUEUE: i32 = 10;

/// Where the program runs that replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    Client,
    Server,
    Router,
}

/// How it replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The turned packet is the payload of the verdict.
    Verdict,
    /// The query is dropped, and an injector sends the turned packet.
    Injector,
}

/// What lets a reply pass a rule that drops replies outside of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Nothing,
    /// The rule excludes the mark of the reply.
    Mark,
    /// The kernel knows the connection, because an earlier query was accepted.
    Earlier,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    v6: bool,
    host: Host,
    hook: Hook,
    way: Way,
    rp_filter: bool,
    /// The queue's priority.
    priority: i32,
    /// The hook where replies are dropped that do not belong to a connection.
    stateful: Option<Hook>,
    pass: Pass,
}

impl Case {
    /// The table of `guide::replies`.
    fn expected(self) -> bool {
        let hooks: &[Hook] = match (self.way, self.host, self.hook) {
            (Way::Verdict, Host::Client, Hook::Output) => &[Hook::Output, Hook::Input],
            (Way::Verdict, Host::Router, Hook::Prerouting) => {
                if self.rp_filter && !self.v6 {
                    return false;
                }
                &[Hook::Forward]
            }
            (Way::Verdict, ..) => return false,
            (Way::Injector, Host::Client, _) => &[Hook::Output, Hook::Input],
            (Way::Injector, ..) => &[Hook::Output],
        };
        let stopped = self.stateful.is_some_and(|hook| hooks.contains(&hook));
        let passes = match self.pass {
            Pass::Nothing => false,
            Pass::Mark => true,
            Pass::Earlier => self.way == Way::Injector,
        };
        !stopped || passes
    }
}

/// Where a queue can be.
pub(super) const PLACES: [(Host, Hook); 7] = [
    (Host::Client, Hook::Output),
    (Host::Client, Hook::Postrouting),
    (Host::Server, Hook::Prerouting),
    (Host::Server, Hook::Input),
    (Host::Router, Hook::Prerouting),
    (Host::Router, Hook::Forward),
    (Host::Router, Hook::Postrouting),
];

/// Sends queries through a place, and replies to them in every way.
pub(super) fn arrive(v6: bool, (host, hook): (Host, Hook)) {
    let verdict = common::replaces_payloads().then_some(Way::Verdict);
    let mut wrong = Vec::new();
    for case in verdict.into_iter().chain([Way::Injector]).flat_map(|way| cases(v6, host, hook, way)) {
        let arrived = support::isolated(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(arrives(case))
        });
        if arrived != case.expected() {
            wrong.push(format!("{case:?}: {arrived}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

fn cases(v6: bool, host: Host, hook: Hook, way: Way) -> Vec<Case> {
    let plain = Case { v6, host, hook, way, rp_filter: false, priority: 0, stateful: None, pass: Pass::Nothing };
    let mut cases = vec![plain, Case { rp_filter: true, ..plain }];
    for stateful in [Hook::Input, Hook::Forward, Hook::Output] {
        let stateful = Case { stateful: Some(stateful), ..plain };
        cases.push(stateful);
        // At other hooks all packets are tracked before.
        if matches!(hook, Hook::Output | Hook::Prerouting) {
            cases.push(Case { priority: BEFORE_TRACKING, ..stateful });
        }
        if !stateful.expected() {
            cases.extend([Pass::Mark, Pass::Earlier].map(|pass| Case { pass, ..stateful }));
        }
    }
    cases
}

struct Network {
    client: Peer,
    server: Peer,
}

impl Network {
    fn new(rp_filter: bool, router: bool) -> Self {
        let client = support::veth_with(&VethOptions { index: 0, ..VethOptions::default() });
        let server = support::veth_with(&VethOptions { index: 1, ..VethOptions::default() });
        client.route_through_near();
        server.route_through_near();
        if router {
            support::forwarding();
        }
        for interface in ["all", "default", "lo", &client.near, &server.near] {
            let path = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
            fs::write(&path, if rp_filter { "1" } else { "0" }).unwrap();
        }
        Self { client, server }
    }
}

/// Sends a query, and says whether the reply to it arrives.
async fn arrives(case: Case) -> bool {
    let Case { v6, host, hook, way, rp_filter, priority, stateful, pass } = case;
    let Network { client: near_client, server: near_server } = Network::new(rp_filter, host == Host::Router);
    let pick = |v4: Ipv4Addr, v6_address: Ipv6Addr| if v6 { IpAddr::V6(v6_address) } else { IpAddr::V4(v4) };
    let near = pick(near_client.near_v4, near_client.near_v6);
    let far = pick(near_client.far_v4, near_client.far_v6);
    let (client, to) = match host {
        Host::Client => (support::udp((near, 0)), far),
        Host::Server => (near_client.run(|| support::udp((far, 0))), near),
        Host::Router => (near_client.run(|| support::udp((far, 0))), pick(near_server.far_v4, near_server.far_v6)),
    };
    if let Some(hook) = stateful {
        let place = Place { hook: hook.number().into(), priority: AFTER_QUEUE };
        let except = (pass == Pass::Mark).then_some(MARK);
        rules::install(NetfilterProtoFamily::Inet, "stateful", Some(place), drop_unless_established(except)).unwrap();
    }
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let rule = Rule::new(hook).protocol(Protocol::Udp).destination_port(PORT).to_queue(0);
    let _divert = Divert::builder().rule(rule).priority(priority).install().unwrap();
    let injector = Injector::builder().mark(MARK).bind().unwrap();
    if pass == Pass::Earlier {
        client.send_to(b"earlier query", (to, PORT)).unwrap();
        common::next(&mut queue).await.accept().submit().unwrap();
    }

    client.send_to(b"query", (to, PORT)).unwrap();
    let packet = common::next(&mut queue).await;
    let mut reply = packet.edit().unwrap();
    reply.turn_around().unwrap();
    reply.replace_payload(b"reply").unwrap();
    match way {
        Way::Verdict => packet.accept().payload(reply.finish()).mark(MARK).submit().unwrap(),
        Way::Injector => {
            packet.drop().submit().unwrap();
            let result = injector.send(&reply.finish()).await;
            if let Err(error) = result {
                assert!(stateful == Some(Hook::Output) && error.to_string().contains("a rule"), "{error}");
            }
        }
    }
    queue.sink().flush().await;
    let received = support::received_before(&support::udp((near, MARKER_PORT)), &client);
    assert!(received.is_empty() || received == [(b"reply".to_vec(), SocketAddr::new(to, PORT))], "{received:?}");
    !received.is_empty()
}

/// A client whose packets are queued at the output hook, behind a stateful rule at the input hook.
struct Stateful {
    peer: Peer,
    near: IpAddr,
    server: SocketAddr,
    queue: Queue,
    /// Its mark is not accepted.
    plain: Injector,
    marked: Injector,
    _divert: Divert,
}

impl Stateful {
    fn new(v6: bool, protocol: Protocol) -> Self {
        let peer = support::veth();
        let (near, far): (IpAddr, IpAddr) = match v6 {
            false => (peer.near_v4.into(), peer.far_v4.into()),
            true => (peer.near_v6.into(), peer.far_v6.into()),
        };
        let place = Place { hook: Hook::Input.number().into(), priority: AFTER_QUEUE };
        rules::install(NetfilterProtoFamily::Inet, "stateful", Some(place), drop_unknown(Some(MARK))).unwrap();
        let queue = common::bind_now(Queue::builder(0));
        let rule = Rule::new(Hook::Output).protocol(protocol).destination_port(PORT).to_queue(0);
        Self {
            near,
            server: (far, PORT).into(),
            queue,
            plain: Injector::builder().bind().unwrap(),
            marked: Injector::builder().mark(MARK).bind().unwrap(),
            _divert: common::divert([rule]),
            peer,
        }
    }

    /// Drops the next packet, and replies.
    async fn reply(&mut self, marked: bool, make: impl FnOnce(&mut Edit) -> Result<(), Error>) {
        let packet = common::next(&mut self.queue).await;
        let mut edit = packet.edit().unwrap();
        make(&mut edit).unwrap();
        packet.drop().submit().unwrap();
        self.queue.sink().flush().await;
        let injector = if marked { &self.marked } else { &self.plain };
        injector.send(&edit.finish()).await.unwrap();
    }
}

/// A rule at the input hook that knows connections drops a reset in reply to the first packet, and
/// accepts one in reply to a later packet.
pub(super) async fn resets_and_stateful_rules(v6: bool) {
    let mut case = Stateful::new(v6, Protocol::Tcp);
    let server = case.server;
    let connect = || tokio::task::spawn_blocking(move || TcpStream::connect(server));
    let refused = connect();
    case.reply(false, Edit::tcp_reset).await;
    // The client has not seen it, and tries again.
    case.reply(true, Edit::tcp_reset).await;
    assert_eq!(refused.await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // It may have tried more often.
    while let Ok(packet) = case.queue.try_recv() {
        packet.drop().submit().unwrap();
    }

    let _listener = case.peer.run(|| TcpListener::bind(server).unwrap());
    let connected = connect();
    // SYN, and ACK.
    for _ in 0..2 {
        common::next(&mut case.queue).await.accept().submit().unwrap();
    }
    let mut client = connected.await.unwrap().unwrap();
    client.set_read_timeout(Some(common::PATIENCE)).unwrap();
    client.write_all(b"data").unwrap();
    case.reply(false, Edit::tcp_reset).await;
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// As [`resets_and_stateful_rules`], for ICMP errors.
pub(super) async fn errors_and_stateful_rules(v6: bool) {
    let mut case = Stateful::new(v6, Protocol::Udp);
    let client = support::udp((case.near, 0));
    client.connect(case.server).unwrap();
    let unreachable = |edit: &mut Edit| edit.icmp_unreachable(Unreachable::Port);
    let refused = |client: &UdpSocket| client.recv(&mut [0]).unwrap_err().kind() == ErrorKind::ConnectionRefused;
    client.send(b"first").unwrap();
    case.reply(false, unreachable).await;
    // What comes is the turned packet that follows.
    client.send(b"second").unwrap();
    case.reply(true, Edit::turn_around).await;
    assert_eq!(client.recv(&mut [0; 8]).unwrap(), b"second".len());
    client.send(b"third").unwrap();
    case.reply(true, unreachable).await;
    assert!(refused(&client));
    client.send(b"fourth").unwrap();
    common::next(&mut case.queue).await.accept().submit().unwrap();
    // The far side has no such port, either.
    assert!(refused(&client));
    client.send(b"fifth").unwrap();
    case.reply(false, unreachable).await;
    assert!(refused(&client));
}

/// Drops UDP from [`PORT`], unless it belongs to a connection, or has the mark.
pub(crate) fn drop_unless_established(except: Option<u32>) -> Vec<Expressions> {
    let mut rule = vec![
        // meta: L4PROTO to register 1
        expression("meta", &[(1, number(1)), (2, number(16))]),
        expression("cmp", &[(1, number(1)), (2, number(0)), (3 | NESTED, value(&[17]))]),
        // payload: 2 bytes at 0 of the transport header to register 1
        expression("payload", &[(1, number(1)), (2, number(2)), (3, number(0)), (4, number(2))]),
        expression("cmp", &[(1, number(1)), (2, number(0)), (3 | NESTED, value(&PORT.to_be_bytes()))]),
    ];
    rule.extend(drop_unknown(except));
    rule
}

/// Drops what does not belong to a connection and is not related to one, unless it has the mark.
fn drop_unknown(except: Option<u32>) -> Vec<Expressions> {
    /// ESTABLISHED, RELATED, UNTRACKED (neighbour discovery)
    const KNOWN: u32 = 2 | 4 | 64;
    let mut rule = vec![
        // ct: STATE to register 1
        expression("ct", &[(1, number(1)), (2, number(0))]),
        expression(
            "bitwise",
            &[
                (1, number(1)),
                (2, number(1)),
                (3, number(4)),
                (4 | NESTED, value(&KNOWN.to_ne_bytes())),
                (5 | NESTED, value(&[0; 4])),
            ],
        ),
        expression("cmp", &[(1, number(1)), (2, number(0)), (3 | NESTED, value(&[0; 4]))]),
    ];
    if let Some(mark) = except {
        // meta: MARK to register 1; cmp: NEQ
        rule.push(expression("meta", &[(1, number(1)), (2, number(3))]));
        rule.push(expression("cmp", &[(1, number(1)), (2, number(1)), (3 | NESTED, value(&mark.to_ne_bytes()))]));
    }
    // immediate: the verdict NF_DROP
    rule.push(expression("immediate", &[(1, number(0)), (2 | NESTED, nla(2 | NESTED, &nla(1, &[0; 4])))]));
    rule
}

fn number(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

fn value(bytes: &[u8]) -> Vec<u8> {
    nla(1, bytes)
}

const NESTED: u16 = 0x8000;

fn expression(name: &str, attributes: &[(u16, Vec<u8>)]) -> Expressions {
    let attributes = attributes.iter().map(|(kind, bytes)| DefaultNla::new(*kind, bytes.clone())).collect();
    Expressions::Other { expression_type: name.to_owned(), attributes }
}

fn nla(kind: u16, bytes: &[u8]) -> Vec<u8> {
    let mut nla = (bytes.len() as u16 + 4).to_ne_bytes().to_vec();
    nla.extend_from_slice(&kind.to_ne_bytes());
    nla.extend_from_slice(bytes);
    nla.resize(nla.len().next_multiple_of(4), 0);
    nla
}
