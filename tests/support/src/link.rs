//! Interfaces, addresses and routes of the calling thread's network namespace, over rtnetlink.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    thread,
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

use super::{
    Namespace, SLOWNESS,
    rtnetlink::{
        Action, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU, IFLA_NET_NS_FD,
        IFLA_NUM_RX_QUEUES, IFLA_NUM_TX_QUEUES, Request, VETH_INFO_PEER, attribute, family, text,
    },
    sockets::wait_until,
    sys,
};

/// An object must not exist before.
const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// `RT_TABLE_MAIN`
const MAIN_TABLE: u8 = 254;

/// What a pair of interfaces is like.
#[derive(Debug, Clone)]
pub struct VethOptions {
    /// The interfaces are named `veth{index}` and `peer{index}`, their networks are
    /// `10.9.{index}.0/24` and `fd09:0:0:{index}::/64`.
    pub index: u8,
    /// In bytes.
    pub mtu: u32,
    /// Whether segmentation and checksums are left to the (virtual) hardware, as is the kernel's
    /// default.
    pub offloads: bool,
}

impl Default for VethOptions {
    fn default() -> Self {
        Self { index: 0, mtu: 1500, offloads: true }
    }
}

/// A second network namespace, joined to the one it was made in by a pair of interfaces.
#[derive(Debug)]
pub struct Peer {
    /// The second namespace.
    pub namespace: Namespace,
    /// The interface on this side.
    pub near: String,
    /// The interface in the second namespace.
    pub far: String,
    /// This side's address.
    pub near_v4: Ipv4Addr,
    /// The second namespace's.
    pub far_v4: Ipv4Addr,
    /// This side's address.
    pub near_v6: Ipv6Addr,
    /// The second namespace's.
    pub far_v6: Ipv6Addr,
}

impl Peer {
    /// Runs `body` in the second namespace; see [`Namespace::run`].
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(body)
    }

    /// Starts a thread in the second namespace.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        self.namespace.spawn(body)
    }

    /// Makes this side the default route of the second namespace.
    pub fn route_through_near(&self) {
        self.run(|| {
            default_route(self.near_v4.into());
            default_route(self.near_v6.into());
        });
    }
}

/// A fresh namespace joined to this one, ready for traffic: [`veth_with`] its defaults.
pub fn veth() -> Peer {
    veth_with(&VethOptions::default())
}

/// A fresh namespace joined to this one. Returns when both sides are up, with addresses ready to
/// use.
pub fn veth_with(options: &VethOptions) -> Peer {
    let VethOptions { index, mtu, offloads } = *options;
    let v4 = |host| Ipv4Addr::new(10, 9, index, host);
    let v6 = |host| Ipv6Addr::new(0xfd09, 0, 0, index.into(), 0, 0, 0, host);
    let peer = Peer {
        namespace: Namespace::new(),
        near: format!("veth{index}"),
        far: format!("peer{index}"),
        near_v4: v4(1),
        far_v4: v4(2),
        near_v6: v6(1),
        far_v6: v6(2),
    };

    make_pair(&peer.near, &peer.far, &peer.namespace, mtu);
    let set_up = |name: &str, v4: Ipv4Addr, v6: Ipv6Addr| {
        if !offloads {
            for offload in Offload::ALL {
                set_offload(name, offload, false).expect("switch an offload off");
            }
        }
        // A router asks for its neighbours from the link-local address. Until the kernel has looked
        // for duplicates of that, it cannot, and what waits for a neighbour is lost after three
        // seconds.
        let file = format!("/proc/sys/net/ipv6/conf/{name}/accept_dad");
        fs::write(&file, "0").unwrap_or_else(|error| panic!("{file}: {error}"));
        // The three questions of these seconds may all wait in a queue, so it asks more often.
        // (Some kernels before 6.0 hide the files from user namespaces.)
        for version in [4, 6] {
            let file = format!("/proc/sys/net/ipv{version}/neigh/{name}/mcast_solicit");
            let _ = fs::write(file, (60 * SLOWNESS).to_string());
        }
        add_address(name, v4.into(), 24);
        add_address(name, v6.into(), 64);
        link_up(name);
    };
    peer.run(|| set_up(&peer.far, peer.far_v4, peer.far_v6));
    set_up(&peer.near, peer.near_v4, peer.near_v6);
    let running = |name: &str| link_flags(name).contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING);
    wait_until("the near interface runs", || running(&peer.near));
    peer.run(|| wait_until("the far interface runs", || running(&peer.far)));
    wait_for_local(peer.near_v6);
    peer.run(|| wait_for_local(peer.far_v6));
    peer
}

/// A pair of interfaces, the far one in another namespace; both are down.
pub(crate) fn make_pair(near: &str, far: &str, namespace: &Namespace, mtu: u32) {
    let mtu = mtu.to_ne_bytes();
    // Otherwise the kernel makes one queue for each processor, takes all but one away, and waits
    // until no processor uses these.
    let queues = 1_u32.to_ne_bytes();
    let interface = |name| {
        Request::new_link()
            .with(IFLA_IFNAME, &text(name))
            .with(IFLA_MTU, &mtu)
            .with(IFLA_NUM_TX_QUEUES, &queues)
            .with(IFLA_NUM_RX_QUEUES, &queues)
    };
    let peer = interface(far).with(IFLA_NET_NS_FD, &namespace.file().as_raw_fd().to_ne_bytes());
    let data = attribute(VETH_INFO_PEER, &peer.into_body());
    let information = [attribute(IFLA_INFO_KIND, b"veth"), attribute(IFLA_INFO_DATA, &data)].concat();
    let pair = interface(near).with(IFLA_LINKINFO, &information);
    pair.send(NEW).expect("make a pair of interfaces");
}

/// Brings an interface up.
pub fn link_up(name: &str) {
    Request::set_link_up(index(name), true).send(0).unwrap_or_else(|error| panic!("bring {name} up: {error}"));
}

/// Takes an interface down.
pub fn link_down(name: &str) {
    Request::set_link_up(index(name), false).send(0).unwrap_or_else(|error| panic!("take {name} down: {error}"));
}

/// An interface's flags.
pub fn link_flags(name: &str) -> InterfaceFlags {
    let mut interfaces = getifaddrs().expect("list the interfaces");
    interfaces.find(|entry| entry.interface_name == name).map_or(InterfaceFlags::empty(), |entry| entry.flags)
}

/// Sets how long packets may be, in bytes.
pub fn set_mtu(name: &str, mtu: u32) {
    let request = Request::set_link(index(name)).with(IFLA_MTU, &mtu.to_ne_bytes());
    request.send(0).unwrap_or_else(|error| panic!("set the MTU of {name}: {error}"));
}

/// Gives an interface an address, without looking for duplicates of it.
pub fn add_address(name: &str, address: IpAddr, prefix: u8) {
    Request::new_address(index(name), address, prefix)
        .send(NEW)
        .unwrap_or_else(|error| panic!("give {name} the address {address}: {error}"));
    if let (IpAddr::V6(address), true) = (address, link_flags(name).contains(InterfaceFlags::IFF_UP)) {
        wait_for_local(address);
    }
}

/// Waits until packets to an IPv6 address reach this host. The kernel adds the route a little later
/// than the address, in a worker (`addrconf_dad_work`). Until then the packets leave by the
/// interface.
fn wait_for_local(address: Ipv6Addr) {
    /// `RTF_LOCAL`
    const LOCAL: u32 = 0x8000_0000;
    // Destination, prefix length, then others; the flags are before the interface.
    let route = format!("{:032x} 80 ", u128::from(address));
    wait_until("the route of the address", || {
        let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route").expect("the IPv6 routes");
        routes.lines().filter(|line| line.starts_with(&route)).any(|line| {
            let flags = line.split_ascii_whitespace().nth(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
            flags.is_some_and(|flags| flags & LOCAL != 0)
        })
    });
}

/// Sends everything that has no other route through `gateway`.
pub fn default_route(gateway: IpAddr) {
    default_route_in(MAIN_TABLE, gateway);
}

/// Sends everything with this mark, all 32 bits, through `gateway`.
pub fn marked_route(mark: u32, gateway: IpAddr) {
    const TABLE: u8 = 100;
    default_route_in(TABLE, gateway);
    Request::new_rule(family(gateway), Action::Table(TABLE), mark)
        .send(NEW)
        .unwrap_or_else(|error| panic!("route by the mark {mark:#x}: {error}"));
}

/// Lets packets with another mark reach no host but this one.
pub fn unreachable_unless_marked(mark: u32) {
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let rule = Request::new_rule(family(any), Action::UnreachableUnless, mark);
        rule.send(NEW).expect("make a rule for routes");
    }
}

fn default_route_in(table: u8, gateway: IpAddr) {
    Request::new_default_route(table, gateway)
        .send(NEW)
        .unwrap_or_else(|error| panic!("route through {gateway}: {error}"));
}

/// Makes the calling thread's namespace a router.
pub fn forwarding() {
    for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let path = format!("/proc/sys/net/{file}");
        fs::write(&path, "1").unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Work that the kernel leaves to the interface, or does for it in bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Checksums of packets sent.
    SendChecksum,
    /// TCP segmentation.
    TcpSegmentation,
    /// Segmentation in software.
    Segmentation,
    /// Joining of received packets.
    Receive,
}

impl Offload {
    /// All of them; segmentation first, as it depends on checksums.
    pub const ALL: [Self; 4] = [Self::TcpSegmentation, Self::Segmentation, Self::SendChecksum, Self::Receive];
}

/// Switches an offload of an interface on or off.
pub fn set_offload(name: &str, offload: Offload, on: bool) -> io::Result<()> {
    // uapi/linux/ethtool.h
    let command = match offload {
        Offload::SendChecksum => 0x17,
        Offload::TcpSegmentation => 0x1f,
        Offload::Segmentation => 0x24,
        Offload::Receive => 0x2c,
    };
    sys::ethtool(name, command, on.into())
}

pub(crate) fn index(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap_or_else(|error| panic!("interface {name}: {error}"))
}
