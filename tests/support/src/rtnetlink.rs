//! The few requests of rtnetlink that links need. The crate with all of them takes a quarter of the
//! time of a release build of the demo.

use std::{io, net::IpAddr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A message: its type, its fixed part, its attributes.
pub(crate) struct Request {
    kind: u16,
    body: Vec<u8>,
}

impl Request {
    /// `RTM_NEWLINK`: makes an interface.
    pub(crate) fn new_link() -> Self {
        Self { kind: 16, body: link_header(0, 0) }
    }

    /// `RTM_GETLINK`: asks about an interface.
    pub(crate) fn get_link(index: u32) -> Self {
        Self { kind: 18, body: link_header(index, 0) }
    }

    /// `RTM_SETLINK`: changes an interface.
    pub(crate) fn set_link(index: u32) -> Self {
        Self { kind: 19, body: link_header(index, 0) }
    }

    /// `RTM_SETLINK`: brings an interface up, or takes it down.
    pub(crate) fn set_link_up(index: u32, up: bool) -> Self {
        // IFF_UP, in the flags and in the mask of what changes.
        let mut body = link_header(index, u32::from(up));
        body[12..16].copy_from_slice(&1_u32.to_ne_bytes());
        Self { kind: 19, body }
    }

    /// `RTM_NEWADDR` with `struct ifaddrmsg`: an address, without looking for duplicates of it
    /// (`IFA_F_NODAD`).
    pub(crate) fn new_address(index: u32, address: IpAddr, prefix: u8) -> Self {
        let body = [&[family(address), prefix, 2, 0][..], &index.to_ne_bytes()].concat();
        // IFA_LOCAL, IFA_ADDRESS
        Self { kind: 20, body }.with(2, &octets(address)).with(1, &octets(address))
    }

    /// `RTM_NEWROUTE` with `struct rtmsg`: the default route of a table.
    pub(crate) fn new_default_route(table: u8, gateway: IpAddr) -> Self {
        // RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST
        let body = vec![family(gateway), 0, 0, 0, table, 4, 0, 1, 0, 0, 0, 0];
        // RTA_GATEWAY
        Self { kind: 24, body }.with(5, &octets(gateway))
    }

    /// `RTM_NEWRULE` with `struct fib_rule_hdr`: what happens to packets with this mark.
    pub(crate) fn new_rule(family: u8, action: Action, mark: u32) -> Self {
        // FR_ACT_TO_TBL; FR_ACT_UNREACHABLE with FIB_RULE_INVERT.
        let (table, number, flags) = match action {
            Action::Table(table) => (table, 1, 0_u32),
            Action::UnreachableUnless => (0, 7, 2),
        };
        let body = [&[family, 0, 0, 0, table, 0, 0, number][..], &flags.to_ne_bytes()].concat();
        // FRA_FWMARK
        Self { kind: 32, body }.with(10, &mark.to_ne_bytes())
    }

    /// Adds an attribute.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.body.extend(attribute(kind, value));
        self
    }

    /// Fixed part and attributes: the value of an attribute that holds such a message.
    pub(crate) fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// Sends it and waits for the acknowledgement.
    pub(crate) fn send(self, flags: u16) -> io::Result<()> {
        self.exchange(flags).map(drop)
    }

    /// Sends it and waits for the answer, whose fixed part and attributes it returns; `None` if
    /// that is only an acknowledgement.
    pub(crate) fn exchange(self, flags: u16) -> io::Result<Option<Vec<u8>>> {
        // struct nlmsghdr: length, type, flags, sequence number, port id.
        let mut message = Vec::with_capacity(16 + self.body.len());
        message.extend_from_slice(&(16 + self.body.len() as u32).to_ne_bytes());
        message.extend_from_slice(&self.kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        message.extend_from_slice(&1_u32.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(&self.body);

        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(65_536);
        socket.recv(&mut answer, 0)?;
        let answer = NetlinkBuffer::new_checked(&answer[..]).map_err(io::Error::other)?;
        if answer.message_type() != NLMSG_ERROR {
            return Ok(Some(answer.payload().to_vec()));
        }
        match i32::from_ne_bytes(*answer.payload().first_chunk().expect("an error has a number")) {
            0 => Ok(None),
            code => Err(io::Error::from_raw_os_error(-code)),
        }
    }
}

/// What a rule for routes does.
pub(crate) enum Action {
    /// Packets with the mark use this table.
    Table(u8),
    /// Packets without the mark are unreachable.
    UnreachableUnless,
}

/// The length of `struct ifinfomsg`.
pub(crate) const LINK_HEADER: usize = 16;

/// `struct ifinfomsg`: family, type, index, flags, mask of the flags that change.
fn link_header(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), [0; 4]].concat()
}

/// An attribute, padded.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A name as the kernel reads it.
pub(crate) fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// `AF_INET` or `AF_INET6`.
pub(crate) fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

// The attributes of interfaces, uapi/linux/if_link.h and veth.h.
pub(crate) const IFLA_IFNAME: u16 = 3;
pub(crate) const IFLA_MTU: u16 = 4;
pub(crate) const IFLA_MASTER: u16 = 10;
pub(crate) const IFLA_LINKINFO: u16 = 18;
pub(crate) const IFLA_NET_NS_FD: u16 = 28;
pub(crate) const IFLA_NUM_TX_QUEUES: u16 = 31;
pub(crate) const IFLA_NUM_RX_QUEUES: u16 = 32;
pub(crate) const IFLA_INFO_KIND: u16 = 1;
pub(crate) const IFLA_INFO_DATA: u16 = 2;
pub(crate) const IFLA_INFO_SLAVE_DATA: u16 = 5;
pub(crate) const VETH_INFO_PEER: u16 = 1;
pub(crate) const IFLA_BR_MCAST_SNOOPING: u16 = 23;
pub(crate) const IFLA_BRPORT_STATE: u16 = 1;
