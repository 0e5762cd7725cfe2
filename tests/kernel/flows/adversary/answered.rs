//! A rejected first packet is answered, whatever else the rules send to the queue: the answer too,
//! for example.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    thread::JoinHandle,
};

use tokio_nfqueue::{Hook, Packet, Rule};

use super::walk::segment::{TCP, UDP};
use crate::{
    common::{PATIENCE, next},
    flows::{LOOPBACKS, bind, confirm, table, unlimited_icmp_errors},
    support::{self, Namespace, Peer, VethOptions},
};

/// Where the client is, and whom it connects to.
struct Way {
    name: &'static str,
    client: Namespace,
    server: [IpAddr; 2],
    /// The hooks at which everything is queued.
    hooks: &'static [&'static [Hook]],
}

/// Nothing listens there.
const PORT: u16 = 9;

pub(super) async fn rejected_first_packets_are_answered() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    unlimited_icmp_errors();
    left.route_through_near();
    right.route_through_near();
    let far = |peer: &Peer| [peer.far_v4.into(), peer.far_v6.into()];
    let ways = [
        Way {
            name: "over loopback",
            client: Namespace::current(),
            server: LOOPBACKS,
            hooks: &[&[Hook::Output], &[Hook::Input, Hook::Output], &[Hook::Prerouting, Hook::Output], &[Hook::Input]],
        },
        Way {
            name: "to another host",
            client: Namespace::current(),
            server: far(&right),
            hooks: &[&[Hook::Output], &[Hook::Input, Hook::Output]],
        },
        Way {
            name: "from another host",
            client: left.namespace.try_clone(),
            server: [left.near_v4.into(), left.near_v6.into()],
            hooks: &[&[Hook::Input], &[Hook::Input, Hook::Output], &[Hook::Prerouting, Hook::Output]],
        },
        Way {
            name: "forwarded",
            client: left.namespace.try_clone(),
            server: far(&right),
            hooks: &[&[Hook::Forward], &[Hook::Forward, Hook::Input, Hook::Output], &[Hook::Prerouting, Hook::Output]],
        },
    ];
    for way in &ways {
        for hooks in way.hooks {
            for server in way.server {
                for tcp in [false, true] {
                    for for_flow in [false, true] {
                        let case = format!("{} {server}, all of {hooks:?}, TCP: {tcp}, for flow: {for_flow}", way.name);
                        let client = connect(&way.client, (server, PORT).into(), tcp);
                        let error = reject(hooks, client, for_flow).await;
                        assert_eq!(error, io::ErrorKind::ConnectionRefused, "{case}");
                    }
                }
            }
        }
    }
}

/// Rejects what goes to the port, and accepts everything else. Returns what the client gets.
async fn reject(hooks: &[Hook], client: Client, for_flow: bool) -> io::ErrorKind {
    let mut queue = bind();
    let rules = hooks.iter().map(|hook| Rule::new(*hook).to_queue(0));
    let _divert = table(rules).install().expect("install the rules");
    let client = client.start();
    while !client.is_finished() {
        let packet = tokio::time::timeout(std::time::Duration::from_millis(10), next(&mut queue)).await;
        let Ok(packet) = packet else { continue };
        let verdict = match is_first(&packet) {
            true if for_flow => packet.reject().for_flow(),
            true => packet.reject(),
            false => packet.accept(),
        };
        confirm(verdict).await.expect("a verdict");
    }
    client.join().expect("the client")
}

/// TCP or UDP to the port.
fn is_first(packet: &Packet) -> bool {
    let payload = packet.payload();
    let (protocol, header) = if payload[0] >> 4 == 4 { (payload[9], 20) } else { (payload[6], 40) };
    matches!(protocol, TCP | UDP) && payload[header + 2..header + 4] == PORT.to_be_bytes()
}

struct Client(Box<dyn FnOnce() -> JoinHandle<io::ErrorKind>>);

impl Client {
    fn start(self) -> JoinHandle<io::ErrorKind> {
        self.0()
    }
}

/// A client that connects when it is started, and returns the error.
fn connect(client: &Namespace, to: SocketAddr, tcp: bool) -> Client {
    let namespace = client.try_clone();
    let connect = move || {
        if tcp {
            return TcpStream::connect_timeout(&to, PATIENCE).map(drop);
        }
        let socket = support::udp(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        socket.connect(to)?;
        socket.send(&[1])?;
        socket.recv(&mut [0]).map(drop)
    };
    Client(Box::new(move || {
        namespace.spawn(move || connect().map_or_else(|error| error.kind(), |()| io::ErrorKind::Other))
    }))
}
