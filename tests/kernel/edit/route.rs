//! Sockets that send along a route: an IPv4 source route, or an IPv6 segment routing header.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

// The macros refer to `libc` as a dependency.
use nix::{
    libc,
    sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket},
};
use nix::{setsockopt_impl, sockopt_impl};

sockopt_impl!(Options, SetOnly, libc::IPPROTO_IP, libc::IP_OPTIONS, [u8; 8]);
sockopt_impl!(RoutingHeader, SetOnly, libc::IPPROTO_IPV6, libc::IPV6_RTHDR, [u8; 40]);

/// Sends the packets of a socket through `hop`, which is an IPv4 or IPv6 address.
pub(crate) fn set(socket: &impl AsFd, hop: IpAddr) {
    match hop {
        IpAddr::V4(hop) => {
            // No operation; loose source route, its length, the pointer to the first address. The
            // kernel adds the destination.
            let mut options = [1, 131, 7, 4, 0, 0, 0, 0];
            options[4..].copy_from_slice(&hop.octets());
            setsockopt(socket, Options, &options).expect("set a source route");
        }
        IpAddr::V6(hop) => {
            // Next header, length, type 4, segments left, last entry; the kernel sets the first
            // address in the list, which is the destination.
            let mut header = [0; 40];
            header[..5].copy_from_slice(&[0, 4, 4, 1, 1]);
            header[24..].copy_from_slice(&hop.octets());
            setsockopt(socket, RoutingHeader, &header).expect("set a routing header");
        }
    }
}

/// Connects through `hop`.
pub(crate) fn connect(hop: IpAddr, to: SocketAddr) -> TcpStream {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("open a socket");
    set(&socket, hop);
    socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).expect("connect through a hop");
    socket.into()
}
