//! The interfaces of a network namespace, as far as a flowtable needs them.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{
    dump::attribute,
    socket::{DUMP_LENGTH, messages},
};

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) loopback: bool,
    /// uapi/linux/if_arp.h
    pub(super) kind: u16,
    /// The interface that carries its packets, in the same namespace.
    pub(super) lower: Option<u32>,
    /// The interface that it belongs to.
    pub(super) master: Option<u32>,
    /// Whether packets that arrive are the master's, and not the interface's own: not with VRF.
    pub(super) port: bool,
}

impl Link {
    /// Why it cannot be in a flowtable beside these. Packets of a flow in a tunnel, with a VLAN tag
    /// or in PPPoE come to the flowtable of the lower interface, and no rule sees what is in them.
    /// The kernel looks for the lower interface among those of the flowtable
    /// (`nft_dev_forward_path`).
    pub(super) fn unfit(&self, beside: &[String], links: &[Self]) -> Option<String> {
        if self.loopback {
            return Some("it is the loopback interface".to_owned());
        }
        if ![ARPHRD_ETHER, ARPHRD_NONE].contains(&self.kind) {
            return Some("it is neither Ethernet nor TUN or WireGuard".to_owned());
        }
        if self.port {
            let master = links.iter().find(|link| Some(link.index) == self.master);
            let master = master.map_or_else(|| "another interface".to_owned(), |master| format!("{:?}", master.name));
            return Some(format!("it is a port of {master}"));
        }
        let below = beside.iter().find(|name| self.is_on(name, links))?;
        Some(format!("it is on {below:?}, of which it cannot be told apart; name one of them"))
    }

    /// Whether the interface with this name carries packets of this one, perhaps through others.
    pub(super) fn is_on(&self, name: &str, links: &[Self]) -> bool {
        let mut seen = vec![self.index];
        let mut next = 0;
        while let Some(index) = seen.get(next).copied() {
            next += 1;
            let upper = links.iter().find(|link| link.index == index);
            let lower = upper.and_then(|link| link.lower);
            let ports = links.iter().filter(|link| link.port && link.master == Some(index)).map(|link| link.index);
            for below in lower.into_iter().chain(ports) {
                if !seen.contains(&below) {
                    seen.push(below);
                }
            }
        }
        links.iter().any(|link| link.name == name && seen[1..].contains(&link.index))
    }

    /// From the header, `struct ifinfomsg`, and the attributes of a message.
    fn read(message: &[u8]) -> Option<Self> {
        let (header, attributes) = message.split_at_checked(IFINFOMSG_LENGTH)?;
        let number = |bytes: &[u8]| Some(u32::from_ne_bytes(*bytes.first_chunk()?));
        let name = String::from_utf8_lossy(attribute(attributes, IFLA_IFNAME)?).trim_end_matches('\0').to_owned();
        let flags = number(&header[8..])?;
        let index_in = |kind| attribute(attributes, kind).and_then(number);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
        let info = |kind| attribute(attributes, IFLA_LINKINFO).and_then(|info| attribute(info, kind)).map(text);
        // The other end of a pair carries no packets of this one.
        let pair = info(IFLA_INFO_KIND).is_some_and(|kind| kind == "veth" || kind == "netkit");
        let elsewhere = attribute(attributes, IFLA_LINK_NETNSID).is_some();
        Some(Self {
            index: number(&header[4..])?,
            name,
            up: flags & IFF_UP != 0,
            loopback: flags & IFF_LOOPBACK != 0,
            kind: u16::from_ne_bytes(*header[2..].first_chunk()?),
            lower: index_in(IFLA_LINK).filter(|lower| *lower != 0 && !pair && !elsewhere),
            master: index_in(IFLA_MASTER),
            port: attribute(attributes, IFLA_MASTER).is_some()
                && info(IFLA_INFO_SLAVE_KIND).is_none_or(|kind| kind != "vrf"),
        })
    }
}

/// The interfaces of the calling thread's network namespace.
pub(super) fn links() -> io::Result<Vec<Link>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let length = (NLMSG_LENGTH + IFINFOMSG_LENGTH) as u32;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.resize(length as usize, 0);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut links = Vec::new();
    loop {
        let mut datagram = Vec::with_capacity(DUMP_LENGTH);
        match socket.recv_from(&mut datagram, 0) {
            Ok((_, sender)) if sender.port_number() == 0 => {}
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        for message in messages(&datagram) {
            match message.message_type() {
                NLMSG_DONE => return Ok(links),
                NLMSG_ERROR => return Err(io::Error::other("the kernel does not list the interfaces")),
                RTM_NEWLINK => links.extend(Link::read(message.payload())),
                _ => {}
            }
        }
    }
}

const NLMSG_LENGTH: usize = 16;
const IFINFOMSG_LENGTH: usize = 16;
// uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
// uapi/linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
// uapi/linux/if.h
const IFF_UP: u32 = 1 << 0;
const IFF_LOOPBACK: u32 = 1 << 3;
// uapi/linux/if_arp.h
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_NONE: u16 = 0xfffe;
