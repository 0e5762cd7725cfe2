//! TCP connections through a program, and a queue before the program's that changes their segments.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{Action, Hook, Packet, Protocol, Queue, Rule, inject::Injector};

use super::PORT;
use crate::{common, support::wait_until};

pub(super) const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Both sides of a connection.
pub(super) struct Talk {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
}

/// An earlier listener that has been closed may live for a moment: a child process that another
/// test has just begun has a copy of it until it executes its program.
fn listen(address: IpAddr) -> TcpListener {
    let mut listener = None;
    wait_until("the port is free", || match TcpListener::bind((address, PORT)) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => false,
        bound => {
            listener = Some(bound.unwrap());
            true
        }
    });
    listener.unwrap()
}

impl Talk {
    /// Connections to this address.
    pub(super) fn several(address: IpAddr, count: usize) -> Vec<Self> {
        let listener = listen(address);
        let connect = |_| Self::new(TcpStream::connect((address, PORT)).unwrap(), &listener);
        (0..count).map(connect).collect()
    }

    pub(super) fn new(client: TcpStream, listener: &TcpListener) -> Self {
        let (server, from) = listener.accept().unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        }
        Self { client, server }
    }

    pub(super) fn passes(&mut self, text: &[u8]) {
        transfer(&mut self.client, &mut self.server, text);
    }

    /// The server receives what the client has sent.
    pub(super) fn receives(&mut self, text: &[u8]) {
        let mut received = vec![0; text.len()];
        self.server.read_exact(&mut received).unwrap();
        assert_eq!(received, text);
    }

    pub(super) fn replies(&mut self, text: &[u8]) {
        transfer(&mut self.server, &mut self.client, text);
    }

    /// The client is reset, and the server when it sends. The server has nothing to read.
    pub(super) fn expect_reset(mut self) {
        assert_eq!(self.client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        // Its acknowledgement of earlier bytes may have been rejected already.
        let replied = self.server.write_all(b"reply").and_then(|()| self.server.read(&mut [0]));
        assert_eq!(replied.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

fn transfer(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).unwrap();
    let mut received = vec![0; text.len()];
    to.read_exact(&mut received).unwrap();
    assert_eq!(received, text);
}

/// A queue before the program's, and an injector whose packets the program gets, but the server
/// does not.
pub(super) struct Before {
    queue: Queue,
    pub(super) injector: Injector,
    pub(super) rules: Divert,
}

impl Before {
    const MARK: u32 = 0x50;

    pub(super) fn new() -> Self {
        let queue = common::bind_now(Queue::builder(5).gso(false));
        // What is sent again has the segments that it had.
        fs::write("/proc/sys/net/ipv4/tcp_retrans_collapse", "0").unwrap();
        let injector = Injector::builder().mark(Self::MARK).bind().unwrap();
        let to_port = |hook| Rule::new(hook).protocol(Protocol::Tcp).destination_port(PORT);
        let held = to_port(Hook::Output).priority(-10).unless_mark(Self::MARK, u32::MAX).to_queue(5);
        let injected = to_port(Hook::Input).mark(Self::MARK, u32::MAX).drop();
        Self { queue, injector, rules: common::divert([injected, held]) }
    }

    /// The client sends a segment, which is held.
    pub(super) async fn hold(&mut self, talk: &mut Talk, text: &[u8]) -> Packet {
        talk.client.write_all(text).unwrap();
        self.next(text).await
    }

    /// The next packet with this text. Others are acknowledgements, or come again.
    pub(super) async fn next(&mut self, text: &[u8]) -> Packet {
        loop {
            let packet = common::next(&mut self.queue).await;
            if packet.view().unwrap().payload() == Some(text) {
                return packet;
            }
            self.release(packet).await;
        }
    }

    /// Sends the packet on to the program's queue.
    pub(super) async fn release(&self, packet: Packet) {
        common::soon("the acknowledgement", packet.accept().confirm()).await.unwrap();
    }

    /// Sends a packet, and waits until the program has accepted it.
    pub(super) async fn inject(&self, packet: Vec<u8>) {
        self.injector.send(&packet).await.unwrap();
        common::eventually("the program accepts it", || self.rules.counters().unwrap()[0].packets == 1).await;
    }

    /// Packets that come now are accepted.
    pub(super) async fn end(self) {
        // Those that wait in the program's queue are dropped with the rules.
        common::eventually("the program decides", || common::account(0).unwrap().waiting == 0).await;
        self.rules.remove_rules().unwrap();
        self.queue.sink().close_with(Action::Accept).await.unwrap();
    }
}
