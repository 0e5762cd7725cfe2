//! The traffic for the queues, and the rule that queues it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use nfqueue_divert::Divert;
use nix::sys::socket::{
    setsockopt,
    sockopt::{SndBuf, SndBufForce, UdpGsoSegment},
};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use tokio_nfqueue::{Hook, Protocol, Rule};

use super::support;

/// The destination port that the rule matches.
pub const PORT: u16 = 9000;
/// Packets per system call. The kernel splits them (`UDP_SEGMENT`).
pub const BURST: usize = 64;
/// How many destination addresses are used. The kernel balances over several queues by address.
const ADDRESSES: u8 = 16;
/// In bytes: for tens of thousands of small packets, if the system allows it.
const SEND_BUFFER: usize = 256 << 20;

/// Installs the rule. It is removed when this is dropped.
pub fn divert(hook: Hook, protocol: Protocol, queues: u16) -> Divert {
    let rule = Rule::new(hook).protocol(protocol).destination_port(PORT).to_queues(0..=queues - 1);
    Divert::builder().rule(rule).install().expect("install the rule")
}

/// A receiving socket with the smallest buffer. Nearly all packets are dropped there, at a low cost
/// that is the same for all contenders.
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
    /// `segment` is the UDP payload of each packet, in bytes.
    pub fn new(segment: usize) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a UDP socket");
        grow_send_buffer(&socket);
        setsockopt(&socket, UdpGsoSegment, &(segment as i32)).expect("set UDP_SEGMENT");
        let burst = BURST.min(60_000 / segment);
        Self { socket, payload: vec![0x55; segment * burst], segment, turn: 0 }
    }

    /// Sends a burst and returns its number of packets. Waits while the send buffer is full: queued
    /// packets are charged to it.
    pub fn burst(&mut self) -> usize {
        let packets = self.payload.len() / self.segment;
        self.send(packets).expect("send a burst");
        packets
    }

    /// Sends `packets` packets, or as many as fit into the buffers.
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

    /// Sends one packet to each address.
    pub fn kick(&mut self) {
        for _ in 0..ADDRESSES {
            // If the send buffer is full, queued packets wake the consumer.
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

/// Packets that wait for a verdict in the first `queues` queues.
pub fn outstanding(queues: u16) -> u64 {
    (0..queues).filter_map(support::queue_line).map(|line| line[2]).sum()
}
