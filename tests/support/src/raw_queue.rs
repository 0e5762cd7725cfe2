//! A minimal NFQUEUE implementation, independent of the crate, to test against.

use std::{
    io,
    time::{Duration, Instant},
};

use netlink_packet_core::{NLMSG_ERROR, NetlinkBuffer, NlasIterator, parse_u32_be};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::rtnetlink::attribute;

// uapi/linux/netfilter/nfnetlink_queue.h
const NFNL_SUBSYS_QUEUE: u16 = 3 << 8;
const NFQNL_MSG_PACKET: u16 = NFNL_SUBSYS_QUEUE;
const NFQNL_MSG_VERDICT: u16 = NFNL_SUBSYS_QUEUE | 1;
const NFQNL_MSG_CONFIG: u16 = NFNL_SUBSYS_QUEUE | 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

/// A queue that this socket has bound, in the network namespace it was made in.
pub struct RawQueue {
    socket: Socket,
    number: u16,
}

/// A packet in a [`RawQueue`].
#[derive(Debug, Clone)]
pub struct RawPacket {
    /// The kernel's id.
    pub id: u32,
    /// The hook's number: 0 prerouting, 1 input, 2 forward, 3 output, 4 postrouting.
    pub hook: u8,
    /// 0 if it has none.
    pub mark: u32,
    /// From the IP header on.
    pub payload: Vec<u8>,
}

impl RawQueue {
    /// Binds a queue, packets copied whole.
    pub fn bind(number: u16) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let queue = Self { socket, number };
        // NFQA_CFG_CMD { BIND, 0, PF_UNSPEC }, NFQA_CFG_PARAMS { copy range 65 531, COPY_PACKET }
        // and a byte of padding
        let attributes = [&attribute(1, &[1, 0, 0, 0])[..], &attribute(2, &[0, 0, 0xff, 0xfb, 2])].concat();
        queue.send(NFQNL_MSG_CONFIG, NLM_F_ACK, &attributes)?;
        match queue.receive(Duration::from_secs(5))? {
            Some(Received::Answer(0)) => Ok(queue),
            Some(Received::Answer(errno)) => Err(io::Error::from_raw_os_error(errno)),
            // Before the reply, no rule sends packets here.
            _ => Err(io::Error::other("a packet before the answer to the bind")),
        }
    }

    /// The next packet, or `None` when none has come for `patience`.
    ///
    /// # Panics
    ///
    /// If the kernel refuses a verdict.
    pub fn next(&self, patience: Duration) -> Option<RawPacket> {
        match self.receive(patience).expect("read the queue") {
            Some(Received::Packet(packet)) => Some(packet),
            Some(Received::Answer(errno)) => {
                panic!("the kernel refused a verdict: {}", io::Error::from_raw_os_error(errno))
            }
            None => None,
        }
    }

    /// Accepts a packet.
    pub fn accept(&self, packet: &RawPacket) {
        self.verdict(packet.id, 1);
    }

    /// Sends a verdict by its number.
    pub fn verdict(&self, id: u32, verdict: u32) {
        let header = [verdict.to_be_bytes(), id.to_be_bytes()].concat();
        self.send(NFQNL_MSG_VERDICT, 0, &attribute(2, &header)).expect("send a verdict");
    }

    /// Sends a verdict and waits for the kernel's reply: 0, or the error number.
    pub fn confirmed_verdict(&self, id: u32, verdict: u32) -> i32 {
        let header = [verdict.to_be_bytes(), id.to_be_bytes()].concat();
        self.confirmed(&attribute(2, &header))
    }

    /// As [`Self::confirmed_verdict`], and replaces the payload.
    pub fn confirmed_replacement(&self, id: u32, verdict: u32, payload: &[u8]) -> i32 {
        let header = [verdict.to_be_bytes(), id.to_be_bytes()].concat();
        self.confirmed(&[attribute(2, &header), attribute(10, payload)].concat())
    }

    fn confirmed(&self, verdict: &[u8]) -> i32 {
        self.send(NFQNL_MSG_VERDICT, NLM_F_ACK, verdict).expect("send a verdict");
        loop {
            match self.receive(Duration::from_secs(5)).expect("read the queue") {
                Some(Received::Answer(errno)) => return errno,
                Some(Received::Packet(_)) => {}
                None => panic!("no answer to a verdict"),
            }
        }
    }

    fn send(&self, kind: u16, flags: u16, attributes: &[u8]) -> io::Result<()> {
        let mut message = Vec::new();
        message.extend_from_slice(&(20 + attributes.len() as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // Sequence number, port, family, version.
        message.extend_from_slice(&[0; 10]);
        message.extend_from_slice(&self.number.to_be_bytes());
        message.extend_from_slice(attributes);
        self.socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
        Ok(())
    }

    fn receive(&self, patience: Duration) -> io::Result<Option<Received>> {
        let deadline = Instant::now() + patience;
        loop {
            // A timeout of zero would mean none.
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left))?;
            let mut buffer = Vec::with_capacity(1 << 17);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let message = NetlinkBuffer::new_checked(&buffer[..]).map_err(io::Error::other)?;
            match message.message_type() {
                NLMSG_ERROR => {
                    let code = message.payload().first_chunk().expect("an error has a number");
                    return Ok(Some(Received::Answer(-i32::from_ne_bytes(*code))));
                }
                NFQNL_MSG_PACKET => return Ok(Some(Received::Packet(packet(&message.payload()[4..])))),
                _ => {}
            }
        }
    }
}

enum Received {
    Packet(RawPacket),
    /// An error number, 0 for success.
    Answer(i32),
}

fn packet(attributes: &[u8]) -> RawPacket {
    let mut packet = RawPacket { id: 0, hook: 0, mark: 0, payload: Vec::new() };
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.expect("attributes are well formed");
        let value = attribute.value();
        match attribute.kind() {
            // NFQA_PACKET_HDR { id, protocol, hook }, NFQA_MARK, NFQA_PAYLOAD
            1 => (packet.id, packet.hook) = (parse_u32_be(&value[..4]).expect("four bytes"), value[6]),
            3 => packet.mark = parse_u32_be(value).expect("four bytes"),
            10 => packet.payload = value.to_vec(),
            _ => {}
        }
    }
    packet
}
