//! Sockets for traffic, and the kernel's own account of its queues.

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
    sockopt,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::{PATIENCE, cpus::on_each_cpu};

/// Enough for tens of thousands of small packets, wherever the system allows it.
const BUFFER: usize = 64 << 20;

/// Waits until `condition` holds.
///
/// # Panics
///
/// After [`PATIENCE`].
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The numbers of a queue in the calling thread's network namespace, `None` if no socket has it
/// bound: queue, portid, outstanding, copy mode, copy range, dropped because the queue was full,
/// dropped because the socket was, last id, 1.
///
/// The portid is read as the unsigned number that it is, though it is printed as signed.
pub fn queue_line(queue: u16) -> Option<[u64; 9]> {
    let text = fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")
        .unwrap_or_else(|error| panic!("the kernel's list of queues: {error}"));
    text.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|word| match word.strip_prefix('-') {
            Some(_) => word.parse::<i32>().map(|number| number.cast_unsigned().into()),
            None => word.parse(),
        });
        let line = [(); 9].map(|()| numbers.next().and_then(Result::ok).unwrap_or_else(|| panic!("{line:?}")));
        (line[0] == u64::from(queue)).then_some(line)
    })
}

/// A UDP socket with generous buffers, whose reads end with an error after [`PATIENCE`].
///
/// Waits while the address is in use: a process that another thread starts has copies of all
/// sockets until it executes its program, also of those that have been closed here.
pub fn udp(address: impl ToSocketAddrs) -> UdpSocket {
    let mut bound = UdpSocket::bind(&address);
    wait_until("the address is free", || {
        let in_use = bound.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse);
        if in_use {
            bound = UdpSocket::bind(&address);
        }
        !in_use
    });
    let socket = bound.expect("bind a UDP socket");
    // The forced sizes need a capability that root in a user namespace does not have; then the
    // system's limit holds.
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &BUFFER);
    }
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER);
    }
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// As [`udp`], and all that it sends carries this mark.
pub fn udp_marked(address: impl ToSocketAddrs, mark: u32) -> UdpSocket {
    let socket = udp(address);
    set_mark(&socket, mark);
    socket
}

/// The datagrams that have come to a socket when all has arrived that was sent to it before, with
/// their senders. Behind them `marker` sends one from each CPU on which this thread may run, and
/// all of these are awaited. At most 4096 bytes of each datagram are returned.
///
/// # Panics
///
/// After [`PATIENCE`], if `receiver` has that time limit: see [`udp`].
pub fn received_before(marker: &UdpSocket, receiver: &UdpSocket) -> Vec<(Vec<u8>, SocketAddr)> {
    const MARKER: &[u8] = b"the last one from a CPU";
    let to = receiver.local_addr().expect("the socket's address");
    let mut markers = 0;
    on_each_cpu(|_| {
        marker.send_to(MARKER, to).expect("send a marker");
        markers += 1;
    });
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    while markers > 0 {
        let (length, from) = receiver.recv_from(&mut buffer).expect("the markers");
        match &buffer[..length] {
            MARKER => markers -= 1,
            datagram => received.push((datagram.to_vec(), from)),
        }
    }
    received
}

/// Marks all that a socket sends from now on.
pub fn set_mark(socket: impl AsFd, mark: u32) {
    setsockopt(&socket, sockopt::Mark, &mark).expect("set a socket's mark");
}

/// Gives all that a socket sends from now on this priority.
pub fn set_priority(socket: impl AsFd, priority: u32) {
    setsockopt(&socket, sockopt::Priority, &priority.cast_signed()).expect("set a socket's priority");
}

/// A raw socket that sends whole IPv4 packets; the kernel fills in the header's checksum, and id
/// and source if zero.
pub fn raw_ipv4() -> OwnedFd {
    socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).expect("open a raw socket")
}

/// Sends a whole IPv4 packet.
pub fn send_raw_ipv4(socket: &OwnedFd, packet: &[u8], to: std::net::Ipv4Addr) -> io::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to.into(), 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
    Ok(())
}

/// Sends a whole IPv6 packet, with any extension headers.
pub fn send_raw_ipv6(packet: &[u8], to: Ipv6Addr) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let to = SockaddrStorage::from(SocketAddr::new(to.into(), 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
    Ok(())
}

/// Sends one echo request and waits for the reply; says whether it came in time.
pub fn ping(to: IpAddr, patience: Duration) -> bool {
    // Only one process sends echo requests in these namespaces, so the identifier suffices.
    const IDENTIFIER: [u8; 2] = *b"nf";
    let (family, protocol, request, reply) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).expect("open a raw socket");
    let mut message = [request, 0, 0, 0, IDENTIFIER[0], IDENTIFIER[1], 0, 1];
    if to.is_ipv4() {
        // For IPv6 the kernel does it.
        let sum: u32 = message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let address = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(socket.as_raw_fd(), &message, &address, MsgFlags::empty()).expect("send an echo request");

    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        set_socket_timeout(&socket, Timeout::Recv, Some(left)).expect("set a timeout");
        let mut buffer = [0; 256];
        let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
        // IPv4 raw sockets see the IP header, IPv6 ones do not.
        let header = if to.is_ipv4() { usize::from(buffer[0] & 0xf) * 4 } else { 0 };
        if let Some([kind, _, _, _, first, second, ..]) = buffer[..length].get(header..)
            && *kind == reply
            && [*first, *second] == IDENTIFIER
        {
            return true;
        }
    }
}
