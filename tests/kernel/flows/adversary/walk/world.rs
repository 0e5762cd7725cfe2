//! The hosts: this one, which has the queue, and one at each side of it, to which it forwards.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nfqueue_divert::Divert;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, send, sendto, setsockopt, socket,
    sockopt,
};
use socket2::{Domain, SockFilter, Socket, Type};
use tokio_nfqueue::{Hook, Protocol, Rule, divert::Match};

use super::segment::{self, ICMP, ICMPV6, Label, SENTINEL, TCP, UDP};
use crate::{
    common::unlimited_icmp_errors,
    support::{self, FrameSocket, Peer, VethOptions},
};

/// Where a packet begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    Left,
    /// The host of the queue.
    This,
    Right,
}

/// The ports of this host at which neither TCP nor UDP replies.
pub(super) const SILENT_PORTS: std::ops::Range<u16> = 7000..7064;

/// Enough for what one step of the test sends.
const BUFFER: usize = 8 << 20;

pub(super) struct World {
    left: Side,
    right: Side,
    senders: [OwnedFd; 2],
    /// The protocol, whether there is an IP header, and the socket.
    receivers: Vec<(u8, bool, OwnedFd)>,
    buffer: Vec<u8>,
    _silent: Vec<Socket>,
}

/// A host at one side. Its own IP stack takes no part: packets are sent and received as frames.
struct Side {
    peer: Peer,
    frames: FrameSocket,
    /// The link-layer addresses of a frame to this host.
    header: [u8; 12],
    _deaf: Divert,
}

impl Side {
    fn new(index: u8) -> Self {
        let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
        let (frames, deaf) = peer.run(|| {
            let rules = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Other(SENTINEL)]
                .map(|protocol| Rule::new(Hook::Input).protocol(protocol).drop());
            // Other messages of ICMPv6 find the neighbours.
            let errors = Rule::new(Hook::Input).when(Match::icmpv6_type(segment::ERROR_TYPES.1)).drop();
            let deaf = Divert::builder().rules(rules).rule(errors).install().expect("make a host deaf");
            (FrameSocket::open(&peer.far), deaf)
        });
        enlarge(&frames);
        let mut header = [0; 12];
        header[..6].copy_from_slice(&FrameSocket::open(&peer.near).address());
        header[6..].copy_from_slice(&frames.address());
        Self { peer, frames, header, _deaf: deaf }
    }
}

impl World {
    pub(super) fn new() -> Self {
        let [left, right] = [1, 2].map(Side::new);
        support::forwarding();
        unlimited_icmp_errors();
        let raw = |family, protocol| {
            let socket = i32::from(protocol);
            let domain = if family == AddressFamily::Inet { Domain::IPV4 } else { Domain::IPV6 };
            let socket = Socket::new(domain, Type::RAW, Some(socket.into())).expect("open a raw socket");
            socket.set_nonblocking(true).expect("set non-blocking");
            enlarge(&socket);
            OwnedFd::from(socket)
        };
        let v4 = [TCP, UDP, ICMP, SENTINEL].map(|protocol| (protocol, true, raw(AddressFamily::Inet, protocol)));
        let v6 = [TCP, UDP, ICMPV6, SENTINEL].map(|protocol| (protocol, false, raw(AddressFamily::Inet6, protocol)));
        let sender = |family| {
            let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
            let socket = socket.expect("open a raw socket");
            setsockopt(&socket, sockopt::SndBufForce, &BUFFER).ok();
            socket
        };
        Self {
            left,
            right,
            senders: [AddressFamily::Inet, AddressFamily::Inet6].map(sender),
            receivers: v4.into_iter().chain(v6).collect(),
            buffer: vec![0; 4096],
            _silent: SILENT_PORTS.flat_map(|port| [Type::STREAM, Type::DGRAM].map(|kind| silent(kind, port))).collect(),
        }
    }

    /// The address of a host; for this host the one that is next to `neighbour`.
    pub(super) fn address(&self, host: Host, neighbour: Host, v6: bool) -> IpAddr {
        let side =
            if Host::Left == (if host == Host::This { neighbour } else { host }) { &self.left } else { &self.right };
        match (host, neighbour, v6) {
            (Host::This, Host::This, false) => Ipv4Addr::LOCALHOST.into(),
            (Host::This, Host::This, true) => std::net::Ipv6Addr::LOCALHOST.into(),
            (Host::This, _, false) => side.peer.near_v4.into(),
            (Host::This, _, true) => side.peer.near_v6.into(),
            (_, _, false) => side.peer.far_v4.into(),
            (_, _, true) => side.peer.far_v6.into(),
        }
    }

    /// Sends an IP packet, which has the addresses of its choice.
    pub(super) fn send(&self, from: Host, packet: &[u8]) {
        let v6 = packet[0] >> 4 == 6;
        let side = match from {
            Host::Left => &self.left,
            Host::Right => &self.right,
            Host::This => return self.send_from_here(packet, v6),
        };
        let protocol: [u8; 2] = if v6 { [0x86, 0xdd] } else { [8, 0] };
        let frame = [&side.header[..], &protocol, packet].concat();
        send(side.frames.as_raw_fd(), &frame, MsgFlags::empty()).expect("send a frame");
    }

    fn send_from_here(&self, packet: &[u8], v6: bool) {
        let to: IpAddr = if v6 {
            let to: [u8; 16] = *packet[24..].first_chunk().expect("a header");
            to.into()
        } else {
            let to: [u8; 4] = *packet[16..].first_chunk().expect("a header");
            to.into()
        };
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        match sendto(self.senders[usize::from(v6)].as_raw_fd(), packet, &to, MsgFlags::empty()) {
            // The packet is dropped at the output hook, or an ICMP error has come before.
            Ok(_) | Err(nix::Error::EPERM | nix::Error::ECONNREFUSED) => {}
            Err(error) => panic!("send {packet:?}: {error}"),
        }
    }

    /// What has arrived, without waiting.
    pub(super) fn arrived(&mut self) -> Vec<Label> {
        let mut labels = Vec::new();
        for side in [&self.left, &self.right] {
            // The link-layer header comes before the IP header.
            while let Some(length) = receive(side.frames.as_raw_fd(), &mut self.buffer) {
                labels.extend(self.buffer[..length].get(14..).and_then(segment::label));
            }
        }
        for (protocol, with_header, receiver) in &self.receivers {
            while let Some(length) = receive(receiver.as_raw_fd(), &mut self.buffer) {
                let packet = &self.buffer[..length];
                labels.extend(if *with_header {
                    segment::label(packet)
                } else {
                    segment::number(*protocol, packet).map(|number| Label { number, from: None })
                });
            }
        }
        labels
    }
}

fn receive(socket: i32, buffer: &mut [u8]) -> Option<usize> {
    match recv(socket, buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(length) => Some(length),
        Err(nix::Error::EAGAIN) => None,
        Err(error) => panic!("receive: {error}"),
    }
}

fn enlarge(socket: &impl std::os::fd::AsFd) {
    // Root in a user namespace may not: the default holds some hundreds of packets as well.
    setsockopt(socket, sockopt::RcvBufForce, &BUFFER).ok();
}

/// A socket at a port, whose filter discards everything: so this host does not reply.
fn silent(kind: Type, port: u16) -> Socket {
    let open = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, kind, None)?;
        socket.set_only_v6(false)?;
        // BPF_RET, of zero bytes.
        socket.attach_filter(&[SockFilter::new(6, 0, 0, 0)])?;
        socket.bind(&SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port).into())?;
        if kind == Type::STREAM {
            socket.listen(1)?;
        }
        Ok(socket)
    };
    open().unwrap_or_else(|error| panic!("a silent port {port}: {error}"))
}
