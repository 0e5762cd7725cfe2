//! Real TCP whose ports come again soon: the server resets each connection, so that neither side
//! keeps the port.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    ops::RangeInclusive,
    thread,
    time::{Duration, Instant},
};

use tokio_nfqueue::{Hook, Protocol, Rule};

use super::walk::segment::SYN;
use crate::{
    common::{PATIENCE, next},
    flows::{bind, table},
    support::{self, VethOptions},
};

/// The client's last connection.
const LAST: u8 = b'.';

/// The client takes its ports from this range; `None`: from the default one. It opens `rate`
/// connections a second.
pub(super) async fn every_syn_is_queued(ports: Option<RangeInclusive<u16>>, rate: u32, duration: Duration) {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    left.route_through_near();
    right.route_through_near();
    if let Some(ports) = ports {
        let range = format!("{} {}", ports.start(), ports.end());
        left.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)).expect("set the client's ports");
    }
    let listener = right.run(|| TcpListener::bind((right.far_v4, 0))).expect("listen");
    let to = listener.local_addr().expect("an address");
    let mut queue = bind();
    let rule = Rule::new(Hook::Forward).protocol(Protocol::Tcp).to_queue(0);
    let _divert = table([rule]).install().expect("install the rule");
    let server = thread::spawn(move || serve(&listener));
    let client = left.spawn(move || connect(to, rate, duration));
    let mut syns = BTreeSet::new();
    while !client.is_finished() {
        let packet = tokio::time::timeout(Duration::from_millis(10), next(&mut queue)).await;
        let Ok(packet) = packet else { continue };
        let segment = &packet.payload()[20..];
        if segment[13] == SYN {
            // A SYN that is sent again is the same.
            syns.insert((segment[..2].to_vec(), segment[4..8].to_vec()));
        }
        packet.accept().for_flow().submit().expect("accept a connection");
    }
    let connections = client.join().expect("the client");
    server.join().expect("the server");
    assert_eq!(syns.len(), connections, "SYNs that came to the queue, and connections");
    eprintln!("adversary: {connections} connections, each of which came to the queue");
}

/// Resets each connection after its first byte.
fn serve(listener: &TcpListener) {
    loop {
        let (mut stream, _) = listener.accept().expect("accept a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("set a time-out");
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a byte of the client");
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
        if byte == [LAST] {
            return;
        }
    }
}

/// Opens connections, not faster than at the rate; returns their number.
fn connect(to: SocketAddr, rate: u32, duration: Duration) -> usize {
    let begin = Instant::now();
    let mut connections = 0;
    loop {
        let last = begin.elapsed() > duration;
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).expect("connect");
        connections += 1;
        stream.set_read_timeout(Some(PATIENCE)).expect("set a time-out");
        stream.write_all(&[if last { LAST } else { 0 }]).expect("send a byte");
        match stream.read(&mut [0]).map_err(|error| error.kind()) {
            Err(io::ErrorKind::ConnectionReset) => {}
            other => panic!("the server resets connection {connections}, but it ended with {other:?}"),
        }
        if last {
            return connections;
        }
        let next = begin + Duration::from_secs(1) * connections as u32 / rate;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
