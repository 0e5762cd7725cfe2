//! Transactions: a batch of messages that the kernel takes as a whole or not at all.

use std::{io, os::fd::AsFd, time::Duration};

use netlink_packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
    none::ControlMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::{
    RecvFlags,
    sockopt::{Timeout, set_socket_send_buffer_size, set_socket_send_buffer_size_force, set_socket_timeout},
};

use super::nft::Command;

/// The kernel answers before `send` returns (`nfnetlink_rcv_batch` runs inside it), so this is never waited for; it is
/// here so that a kernel that behaves otherwise cannot hang the caller.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer is a header, an error number, the refused message's header and a line of text.
const ANSWER_LENGTH: usize = 4096;
/// A message of a transaction longer than the default send buffer (212 992 bytes) needs a larger one.
const DEFAULT_SEND_BUFFER: usize = 212_992 - 32;

// uapi/linux/netlink.h
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A netlink socket to netfilter, and who it is.
pub(super) struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
}

/// What becomes of a batch without errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It takes effect.
    Commit,
    /// It is undone: without the closing message the kernel checks and aborts (`NFNL_ABORT_VALIDATE`).
    Abort,
}

/// A batch the kernel refused, or an exchange that failed.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: io::Error,
    /// Which message, by its index; `None` if it was not a particular one.
    pub(super) command: Option<usize>,
    /// What the kernel says about it, on the rare occasions when it says anything.
    pub(super) text: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, command: None, text: None }
    }
}

impl Connection {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = socket.bind_auto()?.port_number();
        set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        // Errors carry a text, and not the message they are about. That a thousand errors overflow the receive buffer
        // is no loss, as only the first counts; a kernel without the one or the other option does as well.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_no_enobufs(true);
        Ok(Self { socket, port, sequence: 0 })
    }

    /// The socket's address, unique in its network namespace while it is open.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends a batch and waits until the kernel has taken or refused it.
    pub(super) fn transact(&mut self, commands: &[Command], outcome: Outcome) -> Result<(), Refusal> {
        self.discard_old_answers();
        let begin = self.sequence.wrapping_add(1);
        let batch = encode(commands, begin, outcome);
        self.sequence = begin.wrapping_add(commands.len() as u32).wrapping_add(1);
        self.make_room(batch.len());
        loop {
            match self.socket.send_to(&batch, &SocketAddr::new(0, 0), 0) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.answer(begin, commands.len())
    }

    /// Reads until the first error, or the acknowledgement of the last message, which is the only one asked for.
    ///
    /// Errors come in the order of the messages; an error of the batch as a whole names the opening message and comes
    /// before all others.
    fn answer(&self, begin: u32, count: usize) -> Result<(), Refusal> {
        loop {
            let mut buffer = Vec::with_capacity(ANSWER_LENGTH);
            match self.socket.recv_from(&mut buffer, 0) {
                Ok((_, sender)) if sender.port_number() == 0 => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            for Answer { sequence, errno, text } in answers(&buffer) {
                let index = sequence.wrapping_sub(begin) as usize;
                if index > count {
                    continue;
                }
                if errno != 0 {
                    let error = io::Error::from_raw_os_error(errno);
                    return Err(Refusal { error, command: index.checked_sub(1), text });
                }
                if index == count {
                    return Ok(());
                }
            }
        }
    }

    /// The errors that followed the first one of an earlier batch.
    fn discard_old_answers(&self) {
        let flags = RecvFlags::DONTWAIT.bits().cast_signed();
        while self.socket.recv_from(&mut Vec::with_capacity(ANSWER_LENGTH), flags).is_ok() {}
    }

    /// A larger send buffer where the batch needs one. If it is not granted, `send` says so.
    fn make_room(&self, length: usize) {
        if length > DEFAULT_SEND_BUFFER
            && set_socket_send_buffer_size_force(self.socket.as_fd(), length.saturating_add(32)).is_err()
        {
            let _ = set_socket_send_buffer_size(self.socket.as_fd(), length.saturating_add(32));
        }
    }
}

/// The batch: the opening message with sequence number `begin`, the commands with the numbers after it, the end.
fn encode(commands: &[Command], begin: u32, outcome: Outcome) -> Vec<u8> {
    let control = |message| {
        let header =
            NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, u8::from(NetfilterSubsystem::NfTables).into());
        NetfilterMessage::new::<NetfilterMessageInner>(header, ControlMessage::into(message))
    };
    let mut batch = Vec::new();
    let mut sequence = begin;
    append(&mut batch, control(ControlMessage::BatchBegin), sequence, 0);
    for (index, command) in commands.iter().enumerate() {
        sequence = sequence.wrapping_add(1);
        let header = NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0);
        let message = NetfilterMessage::new(header, command.message.clone());
        let acknowledge = if index + 1 == commands.len() { NLM_F_ACK } else { 0 };
        append(&mut batch, message, sequence, command.flags | acknowledge);
    }
    if outcome == Outcome::Commit {
        append(&mut batch, control(ControlMessage::BatchEnd), sequence.wrapping_add(1), 0);
    }
    batch
}

fn append(batch: &mut Vec<u8>, message: NetfilterMessage, sequence: u32, flags: u16) {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let start = batch.len();
    batch.resize(start + message.buffer_len().next_multiple_of(usize::from(NLMSG_ALIGNTO)), 0);
    message.serialize(&mut batch[start..]);
}

/// An acknowledgement (`errno` 0) or an error.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    sequence: u32,
    errno: i32,
    text: Option<String>,
}

/// The answers in a datagram; what is not one is passed over.
fn answers(mut datagram: &[u8]) -> Vec<Answer> {
    let mut found = Vec::new();
    while let Ok(message) = NetlinkBuffer::new_checked(datagram) {
        if message.message_type() == NLMSG_ERROR
            && let Ok(error) = ErrorBuffer::new_checked(message.payload())
        {
            let errno = error.code().map_or(0, |code| code.get().saturating_neg());
            let told = message.flags() & NLM_F_ACK_TLVS != 0;
            let text = if told { text(error.payload()) } else { None };
            found.push(Answer { sequence: message.sequence_number(), errno, text });
        }
        let length = (message.length() as usize).next_multiple_of(usize::from(NLMSG_ALIGNTO));
        datagram = datagram.get(length..).unwrap_or_default();
    }
    found
}

/// The kernel's own words, after the header of the message that they are about (the socket asks for no more of it).
fn text(payload: &[u8]) -> Option<String> {
    const HEADER: usize = 16;
    NlasIterator::new(payload.get(HEADER..)?)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned())
}

#[cfg(test)]
mod tests {
    use super::{super::nft, *};

    const BEGIN: u16 = 16;
    const END: u16 = 17;
    const DELETE_TABLE: u16 = 10 << 8 | 2;
    const DELETE_RULE: u16 = 10 << 8 | 8;

    /// Type, flags and sequence number of each message, whose lengths must add up.
    fn headers(mut batch: &[u8]) -> Vec<(u16, u16, u32)> {
        let mut headers = Vec::new();
        while !batch.is_empty() {
            let message = NetlinkBuffer::new_checked(batch).unwrap();
            headers.push((message.message_type(), message.flags(), message.sequence_number()));
            batch = &batch[(message.length() as usize).next_multiple_of(4)..];
        }
        headers
    }

    #[test]
    fn a_batch_is_opened_acknowledged_once_and_closed() {
        let commands = [nft::delete_rules("odd"), nft::delete_table("odd")].concat();
        let expected = [
            (BEGIN, NLM_F_REQUEST, u32::MAX - 1),
            (DELETE_RULE, NLM_F_REQUEST, u32::MAX),
            (DELETE_TABLE, NLM_F_REQUEST | NLM_F_ACK, 0),
            (END, NLM_F_REQUEST, 1),
        ];
        let batch = encode(&commands, u32::MAX - 1, Outcome::Commit);
        assert_eq!(headers(&batch), expected);
        // Family, version, and in network byte order the subsystem that the batch is for.
        assert_eq!(batch[16..20], [0, 0, 0, 10]);
        assert_eq!(batch[36..40], [1, 0, 0, 0]);
        assert_eq!(headers(&encode(&commands, u32::MAX - 1, Outcome::Abort)), expected[..3]);
    }

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn answers_are_told_apart() {
        let header = [0; 16];
        // NLMSGERR_ATTR_OFFS, NLMSGERR_ATTR_MSG
        let offset = [&8_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &20_u32.to_ne_bytes()].concat();
        let told = [&9_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"oops\0\0\0\0"].concat();
        let error = [&(-17_i32).to_ne_bytes()[..], &header, &offset, &told].concat();
        let datagram = [
            message(NLMSG_ERROR, 0, 1, &[&[0; 4][..], &header].concat()),
            message(3, 0, 2, &[]),
            message(NLMSG_ERROR, NLM_F_ACK_TLVS, 3, &error),
            message(NLMSG_ERROR, 0, 4, &error),
        ]
        .concat();
        let answer = |sequence, errno, text: Option<&str>| Answer { sequence, errno, text: text.map(str::to_owned) };
        assert_eq!(answers(&datagram), [answer(1, 0, None), answer(3, 17, Some("oops")), answer(4, 17, None)]);
    }

    #[test]
    fn no_answer_is_too_strange() {
        let error = [&i32::MIN.to_ne_bytes()[..], &[0xff; 40]].concat();
        let whole = message(NLMSG_ERROR, NLM_F_ACK_TLVS, 1, &error);
        for length in 0..=whole.len() {
            let _ = answers(&whole[..length]);
            // Every length the header may claim, true or not.
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            let _ = answers(&lying);
        }
        assert!(answers(&[]).is_empty());
        assert!(answers(&[0xff; 64]).is_empty());
    }
}
