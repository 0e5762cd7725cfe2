//! Removes flow marks from the entries of connection tracking.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage},
};
use rustix::io::Errno;

use crate::types::{Error, ErrorKind, FlowMarks};

use super::{
    dump,
    encoder::{nested, number},
    family::IpVersion,
    socket::Connection,
    tuple::FlowTuple,
};

/// Removes the marks of all connections.
pub(super) fn forget_marks(connection: &mut Connection, marks: FlowMarks) -> Result<(), Error> {
    // The bit that all marks of connections have.
    let decided = marks.queued();
    let filter = vec![
        ConntrackAttribute::Other(number(CTA_MARK, decided)),
        ConntrackAttribute::Other(number(CTA_MARK_MASK, decided)),
    ];
    let request = message(NetfilterProtoFamily::Unspec, ConntrackMessage::Get(filter));
    let result = connection.change_all(request, |header, entry| {
        let mark = dump::attribute(entry, CTA_MARK).and_then(|mark| Some(u32::from_be_bytes(mark.try_into().ok()?)));
        if mark.unwrap_or(0) & marks.mask() == 0 {
            return None;
        }
        let copied = |kind| Some(DefaultNla::new(kind, dump::attribute(entry, kind)?.to_vec()));
        let tuple = DefaultNla::new(CTA_TUPLE_ORIG | NLA_F_NESTED, dump::attribute(entry, CTA_TUPLE_ORIG)?.to_vec());
        let family = NetfilterProtoFamily::from(*header.first()?);
        Some(unmark(family, [Some(tuple), copied(CTA_ZONE)].into_iter().flatten(), marks))
    });
    result.map_err(failed)
}

/// Removes the mark of one connection. Returns whether there is such a connection.
pub(super) fn forget_mark(connection: &mut Connection, marks: FlowMarks, flow: FlowTuple) -> Result<bool, Error> {
    let family = match flow.version() {
        Some(IpVersion::V6) => NetfilterProtoFamily::IPv6,
        _ => NetfilterProtoFamily::IPv4,
    };
    // The tuple of a reply differs from the reversed tuple if there is NAT.
    for tuple in [flow, flow.reversed()] {
        let request = unmark(family, [encode(tuple)], marks);
        match connection.request(request) {
            Ok(()) => return Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(false)
}

fn unmark(
    family: NetfilterProtoFamily,
    of_entry: impl IntoIterator<Item = DefaultNla>,
    marks: FlowMarks,
) -> NetfilterMessage {
    let change = [number(CTA_MARK, 0), number(CTA_MARK_MASK, marks.mask())];
    let attributes = of_entry.into_iter().chain(change).map(ConntrackAttribute::Other).collect();
    message(family, ConntrackMessage::New(attributes))
}

fn message(family: NetfilterProtoFamily, message: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

fn encode(tuple: FlowTuple) -> DefaultNla {
    let address = |kind_v4, kind_v6, address: SocketAddr| match address.ip() {
        IpAddr::V4(address) => DefaultNla::new(kind_v4, address.octets().to_vec()),
        IpAddr::V6(address) => DefaultNla::new(kind_v6, address.octets().to_vec()),
    };
    let addresses = nested(
        CTA_TUPLE_IP,
        &[
            address(CTA_IP_V4_SRC, CTA_IP_V6_SRC, tuple.source),
            address(CTA_IP_V4_DST, CTA_IP_V6_DST, tuple.destination),
        ],
    );
    let port = |kind, address: SocketAddr| DefaultNla::new(kind, address.port().to_be_bytes().to_vec());
    let protocol = nested(
        CTA_TUPLE_PROTO,
        &[
            DefaultNla::new(CTA_PROTO_NUM, vec![tuple.protocol]),
            port(CTA_PROTO_SRC_PORT, tuple.source),
            port(CTA_PROTO_DST_PORT, tuple.destination),
        ],
    );
    nested(CTA_TUPLE_ORIG, &[addresses, protocol])
}

fn failed(error: std::io::Error) -> Error {
    let (kind, detail) = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM) => {
            (ErrorKind::NotPermitted, "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace")
        }
        // nfnetlink_rcv_msg: the kernel has no such subsystem.
        Some(Errno::INVAL | Errno::OPNOTSUPP) => {
            (ErrorKind::Unsupported, "the kernel has no NF_CT_NETLINK, which flow marks need")
        }
        _ => (ErrorKind::Other, "cannot change the marks of connections"),
    };
    Error::new(kind, "").with_source(error).with_detail(detail)
}

// uapi/linux/netfilter/nfnetlink_conntrack.h
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_MARK: u16 = 8;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
