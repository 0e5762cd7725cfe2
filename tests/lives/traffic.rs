//! The traffic of a history, and what has arrived.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::Port;
use crate::support::{self, Peer};

/// Datagrams from the other host: allowed and forbidden ones, without an end. Each carries the
/// number of the promise that held when it was sent, and a number of its own.
pub(super) struct Flood {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    promise: AtomicU32,
    sent: AtomicU32,
    dense: AtomicBool,
    stop: AtomicBool,
}

impl Flood {
    pub(super) fn start(peer: &Peer) -> Self {
        let shared = Arc::new(Shared::default());
        let to = peer.near_v4;
        let thread = peer.spawn({
            let shared = Arc::clone(&shared);
            move || {
                let socket = support::udp((Ipv4Addr::UNSPECIFIED, 0));
                while !shared.stop.load(SeqCst) {
                    let ports: &[Port] = match shared.dense.load(SeqCst) {
                        true => &[Port::Allowed],
                        false => &[Port::Allowed, Port::Forbidden, Port::Rejected],
                    };
                    for port in ports {
                        let (promise, number) = (shared.promise.load(SeqCst), shared.sent.load(SeqCst));
                        let datagram = [promise.to_be_bytes(), number.to_be_bytes()].concat();
                        // While the interface is down it cannot be sent.
                        let _ = socket.send_to(&datagram, (to, port.number()));
                    }
                    shared.sent.fetch_add(1, SeqCst);
                    thread::sleep(Duration::from_micros(if ports.len() == 1 { 20 } else { 500 }));
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Allowed datagrams alone, one closely behind the other.
    pub(super) fn dense(&self, on: bool) {
        self.shared.dense.store(on, SeqCst);
    }

    /// The number of the datagram that is sent next, or now.
    pub(super) fn sent(&self) -> u32 {
        self.shared.sent.load(SeqCst)
    }

    /// The number of the promise that holds for what is sent from now on.
    pub(super) fn promise(&self, number: u32) {
        self.shared.promise.store(number, SeqCst);
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A port of this host at which datagrams arrive.
pub(super) struct Receiver(UdpSocket);

impl Receiver {
    pub(super) fn at(port: Port) -> Self {
        let socket = support::udp((Ipv4Addr::UNSPECIFIED, port.number()));
        socket.set_nonblocking(true).expect("set non-blocking");
        Self(socket)
    }

    /// The next one that has arrived.
    pub(super) fn next(&self) -> Option<[u8; 8]> {
        let mut datagram = [0; 8];
        self.0.recv(&mut datagram).ok().map(|_| datagram)
    }
}

/// Replies with each byte that comes to some ports of TCP.
pub(super) struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(super) fn start<const N: usize>(ports: [Port; N]) -> Self {
        let listeners = ports.map(|port| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.number())).expect("listen");
            listener.set_nonblocking(true).expect("set non-blocking");
            listener
        });
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut streams = Vec::new();
                while !stop.load(SeqCst) {
                    for (stream, _) in listeners.iter().filter_map(|listener| listener.accept().ok()) {
                        stream.set_nonblocking(true).expect("set non-blocking");
                        streams.push(stream);
                    }
                    streams.retain_mut(|stream| {
                        let mut byte = [0];
                        match stream.read(&mut byte) {
                            Ok(0) => false,
                            Ok(_) => stream.write_all(&byte).is_ok(),
                            Err(error) => error.kind() == ErrorKind::WouldBlock,
                        }
                    });
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Connects from the other host.
pub(super) fn connect(peer: &Peer, port: Port, within: Duration) -> Option<TcpStream> {
    let to = SocketAddr::from((peer.near_v4, port.number()));
    let stream = peer.run(move || TcpStream::connect_timeout(&to, within)).ok()?;
    stream.set_nodelay(true).expect("set TCP_NODELAY");
    Some(stream)
}

/// A socket of the other host that talks to a port of this one.
pub(super) fn talk(peer: &Peer, port: Port) -> UdpSocket {
    let socket = peer.run(|| support::udp((Ipv4Addr::UNSPECIFIED, 0)));
    socket.connect((peer.near_v4, port.number())).expect("connect a UDP socket");
    socket
}

/// Sends a byte, which is to come back.
pub(super) fn ask(stream: &mut TcpStream, byte: u8, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).expect("set a time-out");
    stream.write_all(&[byte]).and_then(|()| stream.read_exact(&mut [0])).is_ok()
}
