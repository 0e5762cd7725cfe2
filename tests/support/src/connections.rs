//! What connection tracking knows.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily, conntrack::ConntrackMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Connection tracking loses all connections of this network namespace, as after `conntrack -F`.
pub fn lose_connections() {
    // Without a tuple it concerns all (`ctnetlink_del_conntrack`).
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let all = NetfilterMessage::new::<ConntrackMessage>(header, ConntrackMessage::Delete(Vec::new()));
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(all));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    acknowledged(&bytes).expect("remove the entries of connection tracking");
}

/// Sends a request and waits for the answer.
pub(super) fn acknowledged(request: &[u8]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    let mut reply = Vec::with_capacity(4096);
    socket.recv(&mut reply, 0)?;
    let reply = NetlinkBuffer::new(&reply);
    assert_eq!(reply.message_type(), NLMSG_ERROR);
    match i32::from_ne_bytes(*reply.payload().first_chunk().expect("an error has a number")) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
