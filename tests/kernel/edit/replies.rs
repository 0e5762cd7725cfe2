//! Replies instead of the receiver's: the sender's kernel verifies what comes.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use nfqueue_divert::Divert;
use nix::errno::Errno;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};
use tokio::task::JoinHandle;
use tokio_nfqueue::{
    Error, Hook, Packet, Protocol, Queue, Rule, VerdictSink,
    edit::{Edit, Unreachable},
    inject::Injector,
};

use super::setup::{Case, Editor, PORT, Path};
use crate::{common, support};

const MARK: u32 = 0x40;

/// A queue whose packets are dropped, and an injector that replies to them.
struct Replier {
    divert: Divert,
    sink: VerdictSink,
    task: JoinHandle<()>,
}

impl Replier {
    /// `reply` makes the reply, or returns `false` to accept the packet.
    fn start(case: Case, rule: Rule, mut reply: impl FnMut(&mut Edit) -> Result<bool, Error> + Send + 'static) -> Self {
        let mut queue = common::bind_now(Queue::builder(0).gso(case.gso));
        let injector = Injector::builder().mark(MARK).bind().expect("bind the injector");
        let sink = queue.sink();
        let divert = common::divert([rule.unless_mark(MARK, u32::MAX).to_queue(0)]);
        let mut decide = async move |packet: Packet| -> Result<(), Error> {
            let mut edit = packet.edit()?;
            if reply(&mut edit)? {
                injector.send(&edit.finish()).await?;
                packet.drop().submit()
            } else {
                packet.accept().submit()
            }
        };
        let task = tokio::spawn(async move {
            while let Some(packet) = queue.recv().await {
                let packet = packet.expect("a packet and no error");
                let text = format!("{:?}", packet.view());
                decide(packet).await.unwrap_or_else(|error| panic!("{text}: {error}"));
            }
        });
        Self { divert, sink, task }
    }

    /// Ends the queue. Fails if a reply did.
    async fn stop(self) {
        self.divert.remove_rules().unwrap();
        self.sink.close().await.unwrap();
        self.task.await.expect("every reply succeeds");
    }
}

fn reply_to_query(edit: &mut Edit) -> Result<(), Error> {
    edit.turn_around()?;
    edit.replace_payload(b"a longer reply to the query")
}

/// Only the asked address and port may reply.
#[track_caller]
fn ask(client: &UdpSocket, server: IpAddr) {
    client.connect((server, PORT)).unwrap();
    for _ in 0..5 {
        client.send(b"query").unwrap();
        let mut datagram = [0; 64];
        let length = client.recv(&mut datagram).expect("a reply");
        assert_eq!(&datagram[..length], b"a longer reply to the query");
    }
}

pub(crate) async fn query_by_verdict(case: Case) {
    let path = Path::new(case);
    let editor = Editor::start(case, [Path::udp_to(Hook::Output, PORT)], reply_to_query);
    ask(&path.near_udp(), path.far);
    assert_eq!(editor.stop().await.packets, 5);
    path.assert_checksums();
}

pub(crate) async fn query_by_injector(case: Case) {
    let path = Path::new(case);
    for hook in [Hook::Output, Hook::Prerouting, Hook::Input] {
        let replier = Replier::start(case, Path::udp_to(hook, PORT), |edit| reply_to_query(edit).map(|()| true));
        match hook {
            Hook::Output => ask(&path.near_udp(), path.far),
            _ => ask(&path.far_udp(0), path.near),
        }
        replier.stop().await;
    }
    path.assert_checksums();
}

/// No host has the address.
pub(crate) async fn echo(case: Case) {
    let path = Path::new(case);
    let protocol = if case.v6 { Protocol::Icmpv6 } else { Protocol::Icmp };
    let replier = Replier::start(case, Rule::new(Hook::Output).protocol(protocol), |edit| {
        let is_request = matches!(edit.view().icmp(), Some((8 | 128, 0)));
        if is_request {
            edit.turn_around()?;
        }
        Ok(is_request)
    });
    assert!(support::ping(super::second(path.far), common::PATIENCE));
    replier.stop().await;
    path.assert_checksums();
}

fn tcp_to(hook: Hook) -> Rule {
    Rule::new(hook).protocol(Protocol::Tcp).destination_port(PORT)
}

/// A socket listens, and does not learn of the connection.
pub(crate) async fn connection_refused(case: Case) {
    let path = Path::new(case);
    let listen = |address: IpAddr| {
        let listener = TcpListener::bind((address, PORT)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let listeners = [listen(path.near), path.peer.run(|| listen(path.far))];
    let connect = |to: IpAddr| TcpStream::connect(SocketAddr::new(to, PORT)).unwrap_err().kind();
    let editor = Editor::start(case, [tcp_to(Hook::Output)], Edit::tcp_reset);
    assert_eq!(connect(path.far), ErrorKind::ConnectionRefused);
    assert_eq!(editor.stop().await.packets, 1);
    for hook in [Hook::Output, Hook::Prerouting, Hook::Input] {
        let replier = Replier::start(case, tcp_to(hook), |edit| edit.tcp_reset().map(|()| true));
        let refused = match hook {
            Hook::Output => connect(path.far),
            _ => path.peer.run(|| connect(path.near)),
        };
        assert_eq!(refused, ErrorKind::ConnectionRefused);
        replier.stop().await;
    }
    for listener in listeners {
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    path.assert_checksums();
}

/// The reset replies to data, which may be a super-packet.
pub(crate) async fn connection_ended(case: Case) {
    let path = Path::new(case);
    let listener = path.peer.run(|| TcpListener::bind((path.far, PORT)).unwrap());
    let mut client = TcpStream::connect((path.far, PORT)).unwrap();
    client.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let _server = listener.accept().unwrap();
    let replier = Replier::start(case, tcp_to(Hook::Output), |edit| {
        let is_reset = edit.view().tcp().is_some_and(|tcp| tcp.rst);
        if !is_reset {
            edit.tcp_reset()?;
        }
        Ok(!is_reset)
    });
    client.write_all(&[7; 10_000]).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    replier.stop().await;
    path.assert_checksums();
}

pub(crate) async fn unreachable(case: Case) {
    let path = Path::new(case);
    for (reason, v4, v6) in [
        (Unreachable::Port, Errno::ECONNREFUSED, Errno::ECONNREFUSED),
        (Unreachable::AdministrativelyProhibited, Errno::EHOSTUNREACH, Errno::EACCES),
    ] {
        for hook in [Hook::Output, Hook::Input] {
            // As a router does it.
            let router = path.near;
            let replier = Replier::start(case, Path::udp_to(hook, PORT), move |edit| {
                edit.icmp_unreachable(reason)?;
                edit.set_source_address(router)?;
                Ok(true)
            });
            let (client, to) = match hook {
                Hook::Output => (path.near_udp(), path.far),
                _ => (path.far_udp(0), path.near),
            };
            client.connect((to, PORT)).unwrap();
            for length in [0, 9, 500, 1400] {
                client.send(&vec![7; length]).unwrap();
                let error = client.recv(&mut [0]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(if case.v6 { v6 } else { v4 } as i32), "{reason:?} {hook:?}");
            }
            replier.stop().await;
        }
    }
    path.assert_checksums();
}

pub(crate) async fn first_fragment(case: Case) {
    let path = Path::new(case);
    let far = path.far_udp(0);
    if case.v6 {
        set_ipv6_mtu_discover(&far, Ipv6PathMtuDiscovery::DONT).unwrap();
    } else {
        set_ip_mtu_discover(&far, Ipv4PathMtuDiscovery::DONT).unwrap();
    }
    let mut queue = Queue::builder(0).gso(case.gso).bind().await.unwrap();
    let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).destination_address(path.near, case.prefix());
    let _divert = common::divert([rule.to_queue(0)]);
    far.send_to(&[7; 4000], (path.near, PORT)).unwrap();
    let mut ports = Vec::new();
    for _ in 0..3 {
        let packet = common::next(&mut queue).await;
        let view = packet.view().unwrap();
        assert!(view.is_fragment());
        ports.push((view.source_port(), view.destination_port()));
        packet.accept().submit().unwrap();
    }
    ports.sort();
    let first = (Some(far.local_addr().unwrap().port()), Some(PORT));
    assert_eq!(ports, [(None, None), (None, None), first]);
}
