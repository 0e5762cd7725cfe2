//! The two kernels behind one face.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
};

use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio_nfqueue::{
    Hook,
    simulated::{Kernel, RawSocket, Sent, TestPacket},
};

use crate::{
    common::{
        Divert, PORT, divert,
        rules::{NetfilterProtoFamily, Place, install_hook, remove},
        udp_in,
    },
    support,
};

/// Rules pass packets with this mark.
pub(crate) const PASS: u32 = 0x40;

/// A datagram over loopback that is queued to queue 0 at the input hook.
#[derive(Debug, Clone)]
pub(crate) struct Datagram {
    pub(crate) payload: Vec<u8>,
    pub(crate) mark: u32,
    /// Its rule has `bypass`.
    pub(crate) bypass: bool,
    /// The payload of each segment, for a super-packet.
    pub(crate) segment: Option<u16>,
}

impl Datagram {
    fn port(&self) -> u16 {
        PORT + u16::from(self.bypass)
    }
}

/// The addresses of datagrams. The port is also that of replaced payloads.
pub(crate) fn addresses() -> (SocketAddr, SocketAddr) {
    ((Ipv4Addr::LOCALHOST, SENDER).into(), (Ipv4Addr::LOCALHOST, PORT).into())
}

const SENDER: u16 = 8999;

pub(crate) trait World {
    /// Opens a netlink socket; sockets are numbered from 0.
    fn open(&mut self, no_enobufs: bool, receive_buffer: Option<usize>);
    fn close(&mut self, socket: usize);
    fn transmit(&mut self, socket: usize, datagram: &[u8]) -> io::Result<()>;
    fn receive(&mut self, socket: usize) -> io::Result<Vec<u8>>;
    fn datagram(&mut self, datagram: &Datagram);
    /// The payloads that have arrived since the last call.
    fn arrived(&mut self) -> Vec<Vec<u8>>;
    /// Queued, copy range, dropped by the queue, dropped by the socket, last id.
    fn stats(&mut self, queue: u16) -> Option<[u64; 5]>;
    /// Sends without the capability.
    fn transmit_incapable(&mut self, socket: usize, datagram: &[u8]);
    fn unregister_hook(&mut self);
    fn take_interface_down(&mut self);
}

pub(crate) struct Simulated {
    kernel: Kernel,
    sockets: Vec<Option<RawSocket>>,
    /// With the payload length of each segment.
    sent: Vec<(Sent, Option<u16>)>,
}

impl Simulated {
    pub(crate) fn new(small_head: usize) -> Self {
        let kernel = Kernel::new();
        kernel.set_small_head(small_head);
        Self { kernel, sockets: Vec::new(), sent: Vec::new() }
    }

    fn socket(&self, socket: usize) -> &RawSocket {
        self.sockets[socket].as_ref().expect("an open socket")
    }
}

impl World for Simulated {
    fn open(&mut self, no_enobufs: bool, receive_buffer: Option<usize>) {
        let socket = self.kernel.raw_socket(no_enobufs);
        receive_buffer.into_iter().for_each(|bytes| socket.set_receive_buffer(bytes));
        self.sockets.push(Some(socket));
    }

    fn close(&mut self, socket: usize) {
        self.sockets[socket] = None;
    }

    fn transmit(&mut self, socket: usize, datagram: &[u8]) -> io::Result<()> {
        self.socket(socket).send(datagram)
    }

    fn receive(&mut self, socket: usize) -> io::Result<Vec<u8>> {
        self.socket(socket).receive().map(|bytes| bytes.to_vec())
    }

    fn datagram(&mut self, datagram: &Datagram) {
        let (from, mut to) = addresses();
        to.set_port(datagram.port());
        // As over loopback: no device finishes checksums.
        let packet = TestPacket::udp(from, to, &datagram.payload)
            .interface_in(1)
            .hardware_address(&[0; 6])
            .checksum_unfinished()
            .mark(datagram.mark)
            .to_queue(0)
            .bypass(datagram.bypass)
            .unless_mark(PASS, PASS)
            .gso(datagram.segment.unwrap_or(0));
        self.sent.push((self.kernel.send(packet), datagram.segment));
    }

    fn arrived(&mut self) -> Vec<Vec<u8>> {
        let mut arrived = Vec::new();
        self.sent.retain(|(sent, segment)| {
            let Some(outcome) = sent.try_outcome() else { return true };
            let parts = if outcome.segments.is_empty() { vec![outcome] } else { outcome.segments };
            for part in parts.iter().filter(|part| part.accepted) {
                // The receiver gets the segments of a super-packet.
                let data = &part.payload[28..];
                let size = segment.map_or(data.len(), usize::from);
                arrived.extend(data.chunks(size.max(1)).map(<[u8]>::to_vec));
            }
            false
        });
        arrived
    }

    fn stats(&mut self, queue: u16) -> Option<[u64; 5]> {
        let stats = self.kernel.stats(queue)?;
        let numbers = [stats.queued, stats.copy_range, stats.dropped_queue, stats.dropped_socket, stats.last_id];
        Some(numbers.map(u64::from))
    }

    fn transmit_incapable(&mut self, socket: usize, datagram: &[u8]) {
        self.kernel.set_capable(false);
        self.socket(socket).send(datagram).expect("the send itself succeeds");
        self.kernel.set_capable(true);
    }

    fn unregister_hook(&mut self) {
        self.kernel.unregister_hook();
    }

    fn take_interface_down(&mut self) {
        self.kernel.take_interface_down(1);
    }
}

/// What the smallest head of a message takes of a receive buffer of this kernel, in bytes.
pub(crate) fn small_head() -> usize {
    /// `sizeof(struct sk_buff)`, aligned.
    const SKB: usize = 256;
    let mut socket = Socket::new(NETLINK_NETFILTER).expect("open a socket");
    socket.bind_auto().expect("bind a socket");
    // A message of an unknown kind, which is answered by a short error.
    let unknown = [20, 0, 0, 0, 0xff, 0x3f, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    socket.send_to(&unknown, &NetlinkAddress::new(0, 0), 0).expect("send a message");
    let mut address = NetlinkAddress::new(0, 0);
    socket.get_address(&mut address).expect("an address");
    let (family, port) = (NETLINK_NETFILTER.to_string(), address.port_number().to_string());
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").expect("the table of sockets");
    let rows = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.into_iter().find(|row| row[1] == family && row[2] == port).expect("a row of this socket");
    row[4].parse::<usize>().expect("a number of bytes") - SKB
}

pub(crate) struct Real {
    sockets: Vec<Option<Socket>>,
    sender: UdpSocket,
    receivers: [UdpSocket; 2],
    /// Sends to itself, behind the sender's datagrams.
    behind: UdpSocket,
    _divert: Divert,
}

impl Real {
    pub(crate) fn new() -> Self {
        let receivers = [0, 1].map(|index| {
            let socket = support::udp((Ipv4Addr::LOCALHOST, PORT + index));
            socket.set_nonblocking(true).expect("set non-blocking");
            socket
        });
        let rules = [false, true].map(|bypass| {
            let rule = udp_in().destination_port(PORT + u16::from(bypass)).unless_mark(PASS, PASS);
            rule.to_queue(0).bypass(bypass)
        });
        let sender = support::udp((Ipv4Addr::LOCALHOST, SENDER));
        let behind = support::udp((Ipv4Addr::LOCALHOST, 0));
        Self { sockets: Vec::new(), sender, receivers, behind, _divert: divert(rules) }
    }

    fn socket(&self, socket: usize) -> &Socket {
        self.sockets[socket].as_ref().expect("an open socket")
    }
}

impl World for Real {
    fn open(&mut self, no_enobufs: bool, receive_buffer: Option<usize>) {
        let mut socket = Socket::new(NETLINK_NETFILTER).expect("open a socket");
        socket.bind_auto().expect("bind a socket");
        socket.connect(&NetlinkAddress::new(0, 0)).expect("connect a socket");
        socket.set_non_blocking(true).expect("set non-blocking");
        socket.set_no_enobufs(no_enobufs).expect("set NETLINK_NO_ENOBUFS");
        if let Some(bytes) = receive_buffer {
            // The forced size needs a capability that root in a user namespace does not have.
            set_socket_recv_buffer_size_force(&socket, bytes / 2)
                .or_else(|_| set_socket_recv_buffer_size(&socket, bytes / 2))
                .expect("set the receive buffer");
        }
        self.sockets.push(Some(socket));
    }

    fn close(&mut self, socket: usize) {
        support::drop_now(self.sockets[socket].take());
    }

    fn transmit(&mut self, socket: usize, datagram: &[u8]) -> io::Result<()> {
        self.socket(socket).send(datagram, 0).map(drop)
    }

    fn receive(&mut self, socket: usize) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(1 << 17);
        self.socket(socket).recv(&mut buffer, 0)?;
        Ok(buffer)
    }

    fn datagram(&mut self, datagram: &Datagram) {
        support::set_mark(&self.sender, datagram.mark);
        setsockopt(&self.sender, sockopt::UdpGsoSegment, &i32::from(datagram.segment.unwrap_or(0)))
            .expect("set UDP_SEGMENT");
        self.sender.send_to(&datagram.payload, (Ipv4Addr::LOCALHOST, datagram.port())).expect("send a datagram");
        // It has come to the queue when those behind it have arrived.
        support::received_before(&self.behind, &self.behind);
    }

    fn arrived(&mut self) -> Vec<Vec<u8>> {
        let mut arrived = Vec::new();
        let mut buffer = vec![0; 65_536];
        for receiver in &self.receivers {
            while let Ok(length) = receiver.recv(&mut buffer) {
                arrived.push(buffer[..length].to_vec());
            }
        }
        arrived
    }

    fn stats(&mut self, queue: u16) -> Option<[u64; 5]> {
        let line = support::queue_line(queue)?;
        Some([line[2], line[4], line[5], line[6], line[7]])
    }

    fn transmit_incapable(&mut self, socket: usize, datagram: &[u8]) {
        let socket = self.socket(socket);
        let sent = crate::common::without_net_admin(|| socket.send(datagram, 0));
        sent.expect("the send itself succeeds");
    }

    fn unregister_hook(&mut self) {
        let place = Place { hook: Hook::Forward.number().into(), priority: 0 };
        install_hook(NetfilterProtoFamily::Inet, "other", place).expect("add a base chain");
        remove(NetfilterProtoFamily::Inet, "other").expect("remove a table");
    }

    fn take_interface_down(&mut self) {
        support::link_down("lo");
    }
}
