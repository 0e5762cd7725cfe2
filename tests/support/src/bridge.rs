//! A bridge, and link-layer frames that cross it.

use std::{
    fs,
    io::IoSliceMut,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NlasIterator};
use nix::{
    cmsg_space,
    errno::Errno,
    ifaddrs::getifaddrs,
    libc, setsockopt_impl,
    sys::socket::{
        AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, send,
        setsockopt, socket, sockopt::SetBool,
    },
};

use super::{
    Namespace,
    link::{index, link_up, make_pair},
    rtnetlink::{
        IFLA_BR_MCAST_SNOOPING, IFLA_BRPORT_STATE, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_INFO_SLAVE_DATA,
        IFLA_LINKINFO, IFLA_MASTER, LINK_HEADER, Request, attribute, text,
    },
    sockets::wait_until,
};

/// A bridge with two ports in the calling thread's network namespace. It does not filter VLANs and
/// forwards tags unchanged.
///
/// No interface has an address, so only the frames of a test cross it.
#[derive(Debug)]
pub struct Bridge {
    /// The bridge's interface.
    pub name: String,
    /// What is beyond its ports.
    pub ends: [End; 2],
}

/// A network namespace whose one interface leads to a bridge.
#[derive(Debug)]
pub struct End {
    /// The bridge's port, in the bridge's namespace.
    pub port: String,
    /// Where the far end of it is, by the name of [`End::INTERFACE`].
    pub namespace: Namespace,
    /// Sends and receives at the far end.
    pub socket: FrameSocket,
}

impl End {
    /// The interface in the namespace.
    pub const INTERFACE: &str = "end";
}

impl Bridge {
    /// Returns when frames can cross it.
    pub fn new() -> Self {
        let name = "bridge".to_owned();
        no_ipv6();
        // A bridge that listens for multicast joins a group of it, and says so on all ports.
        let data = attribute(IFLA_BR_MCAST_SNOOPING, &[0]);
        let information = [attribute(IFLA_INFO_KIND, b"bridge"), attribute(IFLA_INFO_DATA, &data)].concat();
        let bridge = Request::new_link().with(IFLA_IFNAME, &text(&name)).with(IFLA_LINKINFO, &information);
        bridge.send(NLM_F_CREATE | NLM_F_EXCL).expect("make a bridge");
        link_up(&name);
        let ends = ["port0", "port1"].map(|port| {
            let namespace = Namespace::new();
            namespace.run(no_ipv6);
            make_pair(port, End::INTERFACE, &namespace, 1500);
            let joined = Request::set_link(index(port)).with(IFLA_MASTER, &index(&name).to_ne_bytes());
            joined.send(0).expect("join a bridge");
            link_up(port);
            let socket = namespace.run(|| {
                link_up(End::INTERFACE);
                FrameSocket::open(End::INTERFACE)
            });
            End { port: port.to_owned(), namespace, socket }
        });
        for end in &ends {
            wait_until("the port forwards", || forwards(&end.port));
        }
        Self { name, ends }
    }
}

/// Interfaces made from now on in this namespace do not look for neighbours and routers.
fn no_ipv6() {
    let path = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    fs::write(path, "1").unwrap_or_else(|error| panic!("{path}: {error}"));
}

fn forwards(port: &str) -> bool {
    /// `BR_STATE_FORWARDING`
    const FORWARDING: u8 = 3;
    let answer = Request::get_link(index(port)).exchange(0).expect("ask about a port").expect("facts about a port");
    let state = value(&answer[LINK_HEADER..], IFLA_LINKINFO)
        .and_then(|information| value(&information, IFLA_INFO_SLAVE_DATA))
        .and_then(|facts| value(&facts, IFLA_BRPORT_STATE));
    state.as_deref() == Some(&[FORWARDING])
}

/// The value of an attribute among others.
fn value(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let mut all = NlasIterator::new(attributes).filter_map(Result::ok);
    all.find(|found| found.kind() == kind).map(|found| found.value().to_vec())
}

/// An Ethernet frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Protocol and control information of the outermost VLAN tag, which the kernel keeps beside
    /// the frame.
    pub tag: Option<(u16, u16)>,
    /// Destination, source, EtherType, body; without that tag.
    pub bytes: Vec<u8>,
}

/// A packet socket of one interface.
#[derive(Debug)]
pub struct FrameSocket {
    socket: OwnedFd,
    address: [u8; 6],
}

setsockopt_impl!(AuxiliaryData, libc::SOL_PACKET, libc::PACKET_AUXDATA, bool, SetBool);
setsockopt_impl!(IgnoreOutgoing, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, bool, SetBool);

/// Makes the kernel report removed tags.
#[derive(Debug, Clone, Copy)]
struct AuxiliaryData;
/// Ignores outgoing frames, including those of this socket.
#[derive(Debug, Clone, Copy)]
struct IgnoreOutgoing;

impl FrameSocket {
    /// On an interface of the calling thread's network namespace.
    pub fn open(interface: &str) -> Self {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .expect("open a packet socket");
        setsockopt(&socket, AuxiliaryData, &true).expect("ask for VLAN tags");
        setsockopt(&socket, IgnoreOutgoing, &true).expect("ask for arriving frames alone");
        let mut interfaces = getifaddrs().expect("list the interfaces");
        let address: LinkAddr = interfaces
            .find_map(|entry| (entry.interface_name == interface).then_some(*entry.address?.as_link_addr()?))
            .expect("the interface has a link-layer address");
        bind(socket.as_raw_fd(), &address).expect("bind a packet socket");
        Self { socket, address: address.addr().expect("an Ethernet address") }
    }

    /// The interface's address.
    pub fn address(&self) -> [u8; 6] {
        self.address
    }

    /// Sends a frame, its tag in its place.
    pub fn send(&self, frame: &Frame) {
        let (addresses, rest) = frame.bytes.split_at(12);
        let tag = frame.tag.map(|(protocol, control)| [protocol.to_be_bytes(), control.to_be_bytes()].concat());
        let bytes = [addresses, &tag.unwrap_or_default(), rest].concat();
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).expect("send a frame");
    }

    /// A frame that has arrived, without waiting for one.
    pub fn arrived(&self) -> Option<Frame> {
        let mut bytes = vec![0; 1 << 17];
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let mut space = cmsg_space!([u8; 20]);
        let received = match recvmsg::<LinkAddr>(
            self.socket.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_DONTWAIT,
        ) {
            Err(Errno::EAGAIN) => return None,
            received => received.expect("receive a frame"),
        };
        let tag = received.cmsgs().expect("control messages").find_map(|message| match message {
            ControlMessageOwned::Unknown(message) => tag(&message.data_bytes),
            _ => None,
        });
        let length = received.bytes;
        bytes.truncate(length);
        Some(Frame { tag, bytes })
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for FrameSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The tag in a `struct tpacket_auxdata`, uapi/linux/if_packet.h.
fn tag(auxiliary: &[u8]) -> Option<(u16, u16)> {
    const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
    const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;
    const BOTH: u32 = TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID;
    let status = u32::from_ne_bytes(*auxiliary.first_chunk()?);
    let u16_at = |at| Some(u16::from_ne_bytes(*auxiliary.get(at..)?.first_chunk()?));
    (status & BOTH == BOTH).then_some((u16_at(18)?, u16_at(16)?))
}
