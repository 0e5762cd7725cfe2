//! Which rewritten packets arrive, and which replies, by hook: the tables of `guide::rewriting`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nfqueue_divert::Divert;
use tokio_nfqueue::{Error, Hook, Protocol, Queue, Rule, edit::Edit};

use crate::{
    common::{
        self, PORT,
        rules::{self, NetfilterProtoFamily, Place},
    },
    edit::arrival::drop_unless_established,
    support::{self, Peer, VethOptions},
};

/// Of what the test itself sends.
const MARK: u32 = 0x40;
/// The client's port in the first case, below those that the kernel chooses.
const FIRST_PORT: u16 = 20_000;
/// Before connection tracking.
const RAW: i32 = -300;
const FILTER: i32 = 0;
const BEHIND: i32 = 10;

/// Where the program runs that rewrites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    Client,
    Server,
    Router,
}

/// What it changes in questions. In replies it changes the same back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Another payload, of another length.
    Payload,
    /// To another address of the same host.
    Destination,
    Source,
    /// To another host, with a route of its own. Only questions.
    OtherHost,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    /// Whether replies pass only if connection tracking knows them.
    stateful: bool,
    /// The hook of questions, and that of replies.
    hooks: (Hook, Hook),
    priority: i32,
    change: Change,
}

impl Case {
    /// Whether a packet is changed before connection tracking has seen it.
    fn untracked(self, hook: Hook) -> bool {
        self.priority == RAW && matches!(hook, Hook::Output | Hook::Prerouting)
    }

    fn question_arrives(self) -> bool {
        self.change != Change::OtherHost || matches!(self.hooks.0, Hook::Output | Hook::Prerouting)
    }

    /// Connection tracking knows the reply if it has seen both packets with the same addresses.
    fn reply_arrives(self) -> bool {
        !self.stateful || self.change == Change::Payload || self.untracked(self.hooks.0) != self.untracked(self.hooks.1)
    }
}

/// All that can be changed on a host.
pub(super) async fn everywhere(v6: bool, host: Host) {
    use Hook::{Forward, Input, Output, Postrouting, Prerouting};
    let (questions, replies): (&[Hook], &[Hook]) = match host {
        Host::Client => (&[Output, Postrouting], &[Prerouting, Input]),
        Host::Server => (&[Prerouting, Input], &[Output, Postrouting]),
        Host::Router => (&[Prerouting, Forward, Postrouting], &[Prerouting, Forward, Postrouting]),
    };
    let mut network = Network::new(v6, host);
    let mut wrong = Vec::new();
    for stateful in [false, true] {
        if stateful && host == Host::Server {
            // Replies leave here, and no rule expects to know them.
            continue;
        } else if stateful {
            let hook = if host == Host::Router { Forward } else { Input };
            let place = Place { hook: hook.number().into(), priority: BEHIND };
            let rule = drop_unless_established(Some(MARK));
            rules::install(NetfilterProtoFamily::Inet, "stateful", Some(place), rule).unwrap();
        }
        for priority in [RAW, FILTER] {
            for hooks in questions.iter().flat_map(|question| replies.iter().map(|reply| (*question, *reply))) {
                for change in [Change::Payload, Change::Destination, Change::Source, Change::OtherHost] {
                    let case = Case { stateful, hooks, priority, change };
                    let (expected, arrived) =
                        ((case.question_arrives(), case.reply_arrives()), network.rewrite(case).await);
                    let expected = if change == Change::OtherHost { (expected.0, false) } else { expected };
                    if arrived != expected {
                        wrong.push(format!("{host:?}, {case:?}: {arrived:?}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

struct Network {
    client: Peer,
    server: Peer,
    other: Peer,
    /// The client, another address of it, the server, another address of it.
    addresses: [IpAddr; 4],
    /// The other host.
    elsewhere: IpAddr,
    host: Host,
    marker: UdpSocket,
    /// The client's port in the next case: connection tracking knows none of it.
    port: u16,
}

impl Network {
    fn new(v6: bool, host: Host) -> Self {
        let [client, server, other] = [0, 1, 2].map(|index| {
            let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
            peer.route_through_near();
            peer
        });
        support::forwarding();
        let address = |network: u8, host: u8| match v6 {
            false => IpAddr::from(Ipv4Addr::new(10, 9, network, host)),
            true => Ipv6Addr::new(0xfd09, 0, 0, network.into(), 0, 0, 0, host.into()).into(),
        };
        // This host has the number 1, the others 2.
        let addresses = match host {
            Host::Client => [address(1, 1), address(1, 3), address(1, 2), address(1, 4)],
            Host::Server => [address(0, 2), address(0, 4), address(0, 1), address(0, 3)],
            Host::Router => [address(0, 2), address(0, 4), address(1, 2), address(1, 4)],
        };
        let elsewhere = address(2, 2);
        let marker = support::udp_marked((if v6 { "::" } else { "0.0.0.0" }, 0), MARK);
        let network = Self { client, server, other, addresses, elsewhere, host, marker, port: FIRST_PORT };
        let prefix = if v6 { 64 } else { 24 };
        let [_, other_client, _, other_server] = addresses;
        let client = if host == Host::Client { &network.server.near } else { &network.client.far };
        network.at_client(|| support::add_address(client, other_client, prefix));
        let server = if host == Host::Server { &network.client.near } else { &network.server.far };
        network.at_server(|| support::add_address(server, other_server, prefix));
        network
    }

    fn at_client<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        if self.host == Host::Client { body() } else { self.client.run(body) }
    }

    fn at_server<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        if self.host == Host::Server { body() } else { self.server.run(body) }
    }

    /// Sends a question and its reply through the queue; says whether they arrive, rewritten.
    async fn rewrite(&mut self, case: Case) -> (bool, bool) {
        let [client, other_client, server, other_server] = self.addresses;
        let port = self.port;
        self.port += 1;
        let from = self.at_client(|| support::udp((client, port)));
        let to = match case.change {
            Change::Payload | Change::Source => self.at_server(|| support::udp((server, PORT))),
            Change::Destination => self.at_server(|| support::udp((other_server, PORT))),
            Change::OtherHost => self.other.run(|| support::udp((self.elsewhere, PORT))),
        };
        // The timer thread may still have the queue of the case before.
        common::freed(0).await;
        let mut queue = Queue::builder(0).bind().await.unwrap();
        let udp = |hook| Rule::new(hook).protocol(Protocol::Udp).unless_mark(MARK, MARK).to_queue(0);
        let rules = [udp(case.hooks.0).destination_port(PORT), udp(case.hooks.1).source_port(PORT)];
        let divert = Divert::builder().rules(rules).priority(case.priority).install().unwrap();

        from.send_to(b"question", (server, PORT)).unwrap();
        let (text, source) = match case.change {
            Change::Payload => (&b"another question"[..], client),
            Change::Source => (&b"question"[..], other_client),
            Change::Destination | Change::OtherHost => (&b"question"[..], client),
        };
        rewrite_next(&mut queue, |edit| match case.change {
            Change::Payload => edit.replace_payload(text),
            Change::Source => edit.set_source_address(other_client),
            Change::Destination => edit.set_destination_address(other_server),
            Change::OtherHost => edit.set_destination_address(self.elsewhere),
        })
        .await;
        let Some((received, source)) = self.received(&to, text, source) else {
            support::drop_now(divert);
            return (false, false);
        };
        if case.change == Change::OtherHost {
            support::drop_now(divert);
            return (received, false);
        }
        to.send_to(b"reply", source).unwrap();
        // A stateful rule at `Forward` drops it before.
        if case.reply_arrives() || case.hooks.1 != Hook::Postrouting {
            rewrite_next(&mut queue, |edit| match case.change {
                Change::Payload => edit.replace_payload(b"another reply"),
                Change::Source => edit.set_destination_address(client),
                Change::Destination | Change::OtherHost => edit.set_source_address(server),
            })
            .await;
        }
        let text: &[u8] = if case.change == Change::Payload { b"another reply" } else { b"reply" };
        let reply = self.received(&from, text, server);
        assert!(queue.try_recv().is_err(), "{case:?}");
        support::drop_now(divert);
        (received, reply.is_some_and(|(is_right, from)| is_right && from.port() == PORT))
    }

    /// What a socket has received, if anything: whether it is as expected, and from where it came.
    fn received(&self, socket: &UdpSocket, text: &[u8], from: IpAddr) -> Option<(bool, SocketAddr)> {
        let received = support::received_before(&self.marker, socket);
        assert!(received.len() <= 1, "{received:?}");
        received.into_iter().next().map(|(datagram, source)| (datagram == text && source.ip() == from, source))
    }
}

/// Rewrites the next packet.
async fn rewrite_next(queue: &mut Queue, change: impl FnOnce(&mut Edit) -> Result<(), Error>) {
    let packet = common::next(queue).await;
    let mut edit = packet.edit().unwrap();
    change(&mut edit).unwrap();
    packet.accept().payload(edit.finish()).submit().unwrap();
    queue.sink().flush().await;
}

/// Which addresses a queue on a router sees that translates: a client asks the router, which sends
/// the question on to the server under its own address.
pub(super) async fn addresses() {
    let [clients, servers] = [0, 1].map(|index| {
        let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
        peer.route_through_near();
        peer
    });
    support::forwarding();
    let (client, asked) = (clients.far_v4, clients.near_v4);
    let (server, router) = (servers.far_v4, servers.near_v4);
    // NF_INET_PRE_ROUTING, NF_IP_PRI_NAT_DST
    rules::install_nat_at("destination", Place { hook: 0, priority: -100 }, PORT, (server, PORT)).unwrap();
    rules::install_source_nat("source", PORT, router).unwrap();
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let places = [
        (Hook::Prerouting, RAW),
        (Hook::Prerouting, FILTER),
        (Hook::Forward, FILTER),
        (Hook::Postrouting, FILTER),
        // Behind the translation of sources, 100.
        (Hook::Postrouting, 200),
    ];
    let install = |(index, (hook, priority)): (usize, (Hook, i32))| {
        let rule = Rule::new(hook).protocol(Protocol::Udp).ipv4().to_queue(0);
        Divert::builder().table(format!("seen_{index}")).rule(rule).priority(priority).install().unwrap()
    };
    let _tables: Vec<Divert> = places.into_iter().enumerate().map(install).collect();
    let from = clients.run(|| support::udp((client, 0)));
    let to = servers.run(|| support::udp((server, PORT)));
    // The payload becomes longer at each place.
    let mut seen = async || {
        let mut seen = Vec::new();
        for _ in places {
            let packet = common::next(&mut queue).await;
            seen.push(packet.addresses().unwrap());
            let mut edit = packet.edit().unwrap();
            edit.splice_payload(0..0, b"+").unwrap();
            packet.accept().payload(edit.finish()).submit().unwrap();
            queue.sink().flush().await;
        }
        seen
    };
    let expect = |addresses: [(Ipv4Addr, Ipv4Addr); 5]| addresses.map(|(from, to)| (from.into(), to.into()));
    let mut datagram = [0; 20];

    from.send_to(b"question", (asked, PORT)).unwrap();
    let questions = expect([(client, asked), (client, server), (client, server), (client, server), (router, server)]);
    assert_eq!(seen().await, questions);
    let (length, source) = to.recv_from(&mut datagram).unwrap();
    assert_eq!((&datagram[..length], source.ip()), (&b"+++++question"[..], router.into()));

    to.send_to(b"reply", source).unwrap();
    let replies = expect([(server, router), (server, client), (server, client), (server, client), (asked, client)]);
    assert_eq!(seen().await, replies);
    let (length, source) = from.recv_from(&mut datagram).unwrap();
    assert_eq!((&datagram[..length], source), (&b"+++++reply"[..], (asked, PORT).into()));
}
