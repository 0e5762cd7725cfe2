//! Packets for the queues, sent on loopback or over a pair of interfaces and caught at the output hook.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{SndBuf, SndBufForce, UdpGsoSegment},
};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use tokio_nfqueue::{Divert, Hook, Protocol, Rule};

use super::support;

/// What is sent here is queued.
pub const PORT: u16 = 9000;
/// Packets of one system call; the kernel cuts them apart (`UDP_SEGMENT`).
pub const BURST: usize = 64;
/// Addresses to send to, so that several queues each get their share: the kernel balances by addresses.
const ADDRESSES: u8 = 16;
/// For tens of thousands of small packets, if the system allows it.
const SEND_BUFFER: usize = 256 << 20;

/// The rule, for as long as it is kept.
pub fn divert(hook: Hook, protocol: Protocol, queues: u16) -> Divert {
    let rule = Rule::new(hook).protocol(protocol).destination_port(PORT).to_queues(0..=queues - 1);
    Divert::builder().rule(rule).install().expect("install the rule")
}

/// A socket that takes what arrives and has room for next to nothing: the rest is dropped, which costs little, and
/// the same whoever let it pass.
pub fn abyss() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("bind a UDP socket");
    set_socket_recv_buffer_size(&socket, 1).expect("set SO_RCVBUF");
    socket
}

/// Sends packets in bursts.
pub struct Sender {
    socket: UdpSocket,
    payload: Vec<u8>,
    segment: usize,
    turn: u8,
}

impl Sender {
    /// Of packets with so many bytes of payload.
    pub fn new(segment: usize) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a UDP socket");
        grow_send_buffer(&socket);
        setsockopt(&socket, UdpGsoSegment, &(segment as i32)).expect("set UDP_SEGMENT");
        let burst = BURST.min(60_000 / segment);
        Self { socket, payload: vec![0x55; segment * burst], segment, turn: 0 }
    }

    /// Sends a burst and tells how many packets that was. It waits while the socket's send buffer is full: packets in a
    /// queue are charged to it.
    pub fn burst(&mut self) -> usize {
        let packets = self.payload.len() / self.segment;
        self.send(packets).expect("send a burst");
        packets
    }

    /// Sends so many packets, or as many as the buffers have room for.
    pub fn fill(&mut self, packets: usize) {
        self.socket.set_nonblocking(true).expect("set non-blocking");
        let mut left = packets;
        while left > 0 {
            let burst = left.min(self.payload.len() / self.segment);
            match self.send(burst) {
                Ok(()) => left -= burst,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("send a burst: {error}"),
            }
        }
        self.socket.set_nonblocking(false).expect("set blocking");
    }

    /// One packet to each address.
    pub fn kick(&mut self) {
        for _ in 0..ADDRESSES {
            // A full send buffer means that there are packets to wake by.
            self.fill(1);
        }
    }

    fn send(&mut self, packets: usize) -> io::Result<()> {
        self.turn = (self.turn + 1) % ADDRESSES;
        let to = SocketAddr::from(([127, 0, 0, 1 + self.turn], PORT));
        self.socket.send_to(&self.payload[..packets * self.segment], to).map(drop)
    }
}

pub fn grow_send_buffer(socket: &impl std::os::fd::AsFd) {
    if setsockopt(socket, SndBufForce, &SEND_BUFFER).is_err() {
        // Capped at net.core.wmem_max.
        setsockopt(socket, SndBuf, &SEND_BUFFER).expect("set SO_SNDBUF");
    }
}

/// Packets that wait in the first queues for a verdict.
pub fn outstanding(queues: u16) -> u64 {
    (0..queues).filter_map(support::queue_line).map(|line| line[2]).sum()
}
