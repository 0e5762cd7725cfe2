//! Sends nf_tables transactions: batches of messages that the kernel applies or refuses as a whole.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use netlink_packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
    nftables::NfTablesMessage, none::ControlMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nfqueue_proto::wire::port;
use rustix::net::{
    RecvFlags,
    sockopt::{
        Timeout, set_socket_send_buffer_size, set_socket_send_buffer_size_force, set_socket_timeout,
        socket_send_buffer_size,
    },
};

use super::{family::TableFamily, nft::Command};
use crate::sys;

/// A netlink socket to netfilter, with its port id and its last sequence number.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` when it has been closed.
    socket: Option<Socket>,
    /// The family of the table.
    family: TableFamily,
    port: u32,
    sequence: u32,
    /// The socket is being handed over, or has been: it must not be used here.
    lent: Arc<AtomicBool>,
}

/// What the kernel does with a batch without errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The kernel applies the batch.
    Commit,
    /// The kernel checks the batch and then aborts it, because the batch has no end message
    /// (`NFNL_ABORT_VALIDATE`).
    Abort,
}

/// A transaction that failed: the kernel refused the batch, or a system call returned an error.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: io::Error,
    /// The index of the refused command. `None` if the error does not belong to a single command.
    pub(super) command: Option<usize>,
    /// The extended error message of the kernel. The kernel rarely sends one.
    pub(super) text: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, command: None, text: None }
    }
}

impl Connection {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open(family: TableFamily) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = port::bind_port(|port| socket.bind(&SocketAddr::new(port, 0)))?;
        set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(REPLY_TIMEOUT))?;
        // With these options, error replies contain a text but not the refused message, and an
        // overflow of the receive buffer is not reported. Only the first error is used, so an
        // overflow loses nothing. The code also works on kernels that lack an option.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_no_enobufs(true);
        Ok(Self { socket: Some(socket), family, port, sequence: 0, lent: Arc::default() })
    }

    /// A socket from another process, with its options and the last sequence number.
    pub(super) fn adopt(socket: OwnedFd, family: TableFamily, sequence: u32) -> io::Result<Self> {
        let socket = sys::netlink_socket(socket);
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address)?;
        Ok(Self { port: address.port_number(), socket: Some(socket), family, sequence, lent: Arc::default() })
    }

    /// Whether the socket must not be used here.
    pub(super) fn lent(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.lent)
    }

    pub(super) fn sequence(&self) -> u32 {
        self.sequence
    }

    /// The kernel then removes a table that ends with the socket.
    pub(super) fn close(&mut self) {
        if self.check_not_lent().is_ok() {
            self.socket = None;
        }
    }

    pub(super) fn socket(&self) -> io::Result<&Socket> {
        self.socket.as_ref().ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the table is closed"))
    }

    fn check_not_lent(&self) -> io::Result<()> {
        let lent = self.lent.load(Ordering::SeqCst);
        if lent { Err(io::Error::new(io::ErrorKind::ResourceBusy, "the table is handed over")) } else { Ok(()) }
    }

    /// The netlink port id of the socket. It is unique in the network namespace while the socket is
    /// open.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends a batch and waits until the kernel has applied or refused it.
    pub(super) fn transact(&mut self, commands: &[Command], outcome: Outcome) -> Result<(), Refusal> {
        self.discard_old_replies();
        let begin = self.sequence.wrapping_add(1);
        let batch = encode(commands, self.family, begin, outcome);
        self.sequence = begin.wrapping_add(commands.len() as u32).wrapping_add(1);
        self.enlarge_send_buffer(batch.len());
        self.send(&batch)?;
        self.wait_for_reply(begin, commands.len())
    }

    /// The longest batch that fits in the send buffer, which [`transact`](Self::transact) has
    /// enlarged as far as the kernel allows.
    pub(super) fn longest_batch(&self) -> usize {
        let size = self.socket().and_then(send_buffer_size);
        // netlink_sendmsg wants 32 bytes more.
        size.map_or(DEFAULT_SEND_BUFFER, |size| size.saturating_sub(32))
    }

    /// Requests objects, and returns the attributes of each.
    ///
    /// If a transaction changes them meanwhile, the request is repeated a few times.
    pub(super) fn dump(&mut self, request: &NfTablesMessage) -> io::Result<Vec<Vec<u8>>> {
        const TRIES: u32 = 10;
        for _ in 0..TRIES {
            self.discard_old_replies();
            self.sequence = self.sequence.wrapping_add(1);
            let header = NetfilterHeader::new(protocol_family(self.family), 0, 0);
            let mut bytes = Vec::new();
            append(&mut bytes, NetfilterMessage::new(header, request.clone()), self.sequence, NLM_F_DUMP);
            self.send(&bytes)?;
            let mut objects = Vec::new();
            let undisturbed = self.visit(|_, of_datagram| {
                objects.extend(of_datagram.into_iter().map(|(_, attributes)| attributes.to_vec()));
                Ok(())
            })?;
            if undisturbed {
                return Ok(objects);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Requests objects, and sends the messages that `change` makes of them: of the header of an
    /// object, `struct nfgenmsg`, and its attributes. Errors of these messages are ignored: the
    /// object has gone meanwhile.
    pub(super) fn change_all(
        &mut self,
        request: NetfilterMessage,
        change: impl Fn(&[u8], &[u8]) -> Option<NetfilterMessage>,
    ) -> io::Result<()> {
        self.discard_old_replies();
        // So that replies to the changes are not taken for objects.
        let of_changes = self.sequence.wrapping_add(1);
        self.sequence = of_changes.wrapping_add(1);
        let mut bytes = Vec::new();
        append(&mut bytes, request, self.sequence, NLM_F_DUMP);
        self.send(&bytes)?;
        self.visit(|connection, objects| {
            let changes = objects.into_iter().filter_map(|(header, attributes)| change(header, attributes));
            let mut bytes = Vec::new();
            changes.for_each(|message| append(&mut bytes, message, of_changes, 0));
            if bytes.is_empty() { Ok(()) } else { connection.send(&bytes) }
        })?;
        self.discard_old_replies();
        Ok(())
    }

    /// Requests one object of nf_tables, and returns an error if there is none.
    pub(super) fn ask(&mut self, request: NfTablesMessage) -> io::Result<()> {
        let header = NetfilterHeader::new(protocol_family(self.family), 0, 0);
        let message = NetfilterMessage::new(header, request);
        self.discard_old_replies();
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        append(&mut bytes, message, self.sequence, NLM_F_ACK);
        self.send(&bytes)?;
        self.wait_for_reply(self.sequence, 0).map_err(|refusal| refusal.error)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.check_not_lent()?;
        loop {
            match self.socket()?.send_to(bytes, &SocketAddr::new(0, 0), 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Calls `each` with the objects of each datagram: their headers (`struct nfgenmsg`) and their
    /// attributes. Returns false if a transaction has changed the objects meanwhile.
    fn visit(&self, mut each: impl FnMut(&Self, Vec<(&[u8], &[u8])>) -> io::Result<()>) -> io::Result<bool> {
        let mut interrupted = false;
        loop {
            let mut buffer = Vec::with_capacity(DUMP_LENGTH);
            match self.socket()?.recv_from(&mut buffer, 0) {
                Ok((_, sender)) if sender.port_number() == 0 => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let mut objects = Vec::new();
            let mut last = false;
            for message in messages(&buffer).filter(|message| message.sequence_number() == self.sequence) {
                interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
                match message.message_type() {
                    NLMSG_DONE => last = true,
                    NLMSG_ERROR => {
                        let errno = ErrorBuffer::new_checked(message.payload()).ok().and_then(|error| error.code());
                        let errno = errno.map_or(0, |code| code.get().saturating_neg());
                        return Err(io::Error::from_raw_os_error(errno));
                    }
                    _ => objects.extend(message.payload().split_at_checked(NFGENMSG_LENGTH)),
                }
            }
            each(self, objects)?;
            if last {
                return Ok(!interrupted);
            }
        }
    }

    /// Reads replies until the first error, or until the acknowledgement of the last command. Only
    /// the last command requests an acknowledgement.
    ///
    /// Errors arrive in the order of the commands. An error of the whole batch has the sequence
    /// number of the begin message and arrives first.
    fn wait_for_reply(&self, begin: u32, count: usize) -> Result<(), Refusal> {
        loop {
            let mut buffer = Vec::with_capacity(REPLY_LENGTH);
            match self.socket()?.recv_from(&mut buffer, 0) {
                Ok((_, sender)) if sender.port_number() == 0 => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            for Reply { sequence, errno, text } in replies(&buffer) {
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

    /// Discards the errors that followed the first error of an earlier batch.
    fn discard_old_replies(&self) {
        let flags = RecvFlags::DONTWAIT.bits() as i32;
        // Those of a lent socket are for another process.
        let receive = |socket: &Socket| socket.recv_from(&mut Vec::with_capacity(REPLY_LENGTH), flags);
        while self.check_not_lent().and_then(|()| receive(self.socket()?)).is_ok() {}
    }

    /// Enlarges the send buffer if the batch needs it. If the kernel refuses, `send` returns an
    /// error.
    fn enlarge_send_buffer(&self, length: usize) {
        let (Ok(socket), DEFAULT_SEND_BUFFER..) = (self.socket(), length) else { return };
        let wanted = length.saturating_add(32);
        if set_socket_send_buffer_size_force(socket.as_fd(), wanted).is_ok() {
            return;
        }
        // The size may also fall, to twice net.core.wmem_max: tried with another socket.
        let grows = Socket::new(NETLINK_NETFILTER).is_ok_and(|trial| {
            set_socket_send_buffer_size(trial.as_fd(), wanted).is_ok()
                && send_buffer_size(&trial).ok() > send_buffer_size(socket).ok()
        });
        if grows {
            let _ = set_socket_send_buffer_size(socket.as_fd(), wanted);
        }
    }
}

/// Encodes a batch: the begin message with sequence number `begin`, the commands with the following
/// numbers, and the end message.
fn encode(commands: &[Command], family: TableFamily, begin: u32, outcome: Outcome) -> Vec<u8> {
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
        let header = NetfilterHeader::new(protocol_family(family), 0, 0);
        let message = NetfilterMessage::new(header, command.message.clone());
        let acknowledge = if index + 1 == commands.len() { NLM_F_ACK } else { 0 };
        append(&mut batch, message, sequence, command.flags | acknowledge);
    }
    if outcome == Outcome::Commit {
        append(&mut batch, control(ControlMessage::BatchEnd), sequence.wrapping_add(1), 0);
    }
    batch
}

fn send_buffer_size(socket: &Socket) -> io::Result<usize> {
    Ok(socket_send_buffer_size(socket.as_fd())?)
}

/// The length of a batch.
pub(super) fn length(commands: &[Command], family: TableFamily) -> usize {
    encode(commands, family, 0, Outcome::Commit).len()
}

/// Where to cut commands so that each part is a batch of at most this length. A rule stays with its
/// sets, even if they are longer.
pub(super) fn parts(commands: &[Command], family: TableFamily, longest: usize) -> Vec<Range<usize>> {
    let length = |range: Range<usize>| length(&commands[range], family);
    let around = length(0..0);
    let mut parts = Vec::new();
    let (mut part, mut sum) = (0..0, around);
    for end in (1..=commands.len()).filter(|end| !commands[end - 1].needs_the_next()) {
        let more = length(part.end..end) - around;
        if sum + more > longest && !part.is_empty() {
            parts.push(part.clone());
            (part, sum) = (part.end..part.end, around);
        }
        (part.end, sum) = (end, sum + more);
    }
    parts.extend((!part.is_empty()).then_some(part));
    parts
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
pub(super) struct Reply {
    sequence: u32,
    errno: i32,
    text: Option<String>,
}

fn protocol_family(family: TableFamily) -> NetfilterProtoFamily {
    match family {
        TableFamily::Inet => NetfilterProtoFamily::Inet,
        TableFamily::Ip => NetfilterProtoFamily::IPv4,
        TableFamily::Ip6 => NetfilterProtoFamily::IPv6,
        TableFamily::Bridge => NetfilterProtoFamily::Bridge,
    }
}

/// The messages in a datagram.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = (message.length() as usize).next_multiple_of(usize::from(NLMSG_ALIGNTO));
        datagram = datagram.get(length..).unwrap_or_default();
        Some(message)
    })
}

/// The acknowledgements and errors in a datagram. Other messages are skipped.
pub(super) fn replies(datagram: &[u8]) -> Vec<Reply> {
    let mut found = Vec::new();
    for message in messages(datagram) {
        if message.message_type() != NLMSG_ERROR {
            continue;
        }
        let Ok(error) = ErrorBuffer::new_checked(message.payload()) else { continue };
        let errno = error.code().map_or(0, |code| code.get().saturating_neg());
        let has_attributes = message.flags() & NLM_F_ACK_TLVS != 0;
        let text = if has_attributes { text(error.payload()) } else { None };
        found.push(Reply { sequence: message.sequence_number(), errno, text });
    }
    found
}

/// The extended error message of the kernel. It follows the header of the refused message
/// (`NETLINK_CAP_ACK` omits the rest of that message).
fn text(payload: &[u8]) -> Option<String> {
    const HEADER: usize = 16;
    NlasIterator::new(payload.get(HEADER..)?)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned())
}

/// The kernel replies before `send` returns, because `nfnetlink_rcv_batch` runs inside `send`. The
/// timeout only ensures that a different kernel cannot block the caller indefinitely.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// The size of the receive buffer in bytes. A reply has a header, an error number, the header of
/// the refused message and a line of text.
const REPLY_LENGTH: usize = 4096;
/// The kernel fills datagrams of up to 32 KiB with the objects of a dump (`netlink_dump`).
pub(super) const DUMP_LENGTH: usize = 32 * 1024;
/// `struct nfgenmsg` precedes the attributes.
const NFGENMSG_LENGTH: usize = 4;
/// The longest batch in bytes that fits in the default send buffer (212 992 bytes). A longer one
/// needs a larger send buffer.
const DEFAULT_SEND_BUFFER: usize = 212_992 - 32;

// uapi/linux/netlink.h
const NLMSGERR_ATTR_MSG: u16 = 1;

#[cfg(test)]
mod tests {
    use nfqueue_proto::types::Hook;

    use super::{
        super::{
            Match, Protocol, Rule,
            checked::Surroundings,
            encoder::{Encoding, QueueMethod},
            nft::Batch,
        },
        *,
    };

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
    fn parts_fit_and_keep_a_rule_with_its_sets() {
        let encoding = Encoding { method: QueueMethod::Expression, trial: false };
        let mut batch = Batch::new("t", encoding);
        let ports = |first: u16| Match::destination_ports([first, first + 2]);
        let rules: Vec<Rule> =
            (1..20).map(|first| Rule::new(Hook::Input).protocol(Protocol::Udp).when(ports(first)).accept()).collect();
        let checked = rules.iter().flat_map(|rule| rule.check(0, Surroundings::PLAIN).unwrap());
        checked.for_each(|rule| batch.add_rule(&rule));
        let commands = &batch.commands;
        assert_eq!(commands.len(), 3 * 19);
        assert_eq!(parts(&[], TableFamily::Inet, 0), []);
        let length = |part: &Range<usize>| length(&commands[part.clone()], TableFamily::Inet);
        for longest in [0, 500, 1000, 5000, 100_000] {
            let parts = parts(commands, TableFamily::Inet, longest);
            assert!(parts.is_sorted_by(|part, next| part.end == next.start), "{parts:?}");
            assert_eq!((parts[0].start, parts.last().unwrap().end), (0, commands.len()));
            assert!(parts.iter().all(|part| part.len() % 3 == 0 && (length(part) <= longest || part.len() == 3)));
            // Not more of them than necessary.
            assert!(parts.windows(2).all(|two| length(&(two[0].start..two[1].start + 3)) > longest), "{parts:?}");
        }
    }

    #[test]
    fn batch_has_begin_and_end_and_requests_one_acknowledgement() {
        let encoding = Encoding { method: QueueMethod::Expression, trial: false };
        let mut batch = Batch::new("odd", encoding);
        batch.delete_rules("output");
        batch.delete_table();
        let commands = batch.commands;
        let expected = [
            (BEGIN, NLM_F_REQUEST, u32::MAX - 1),
            (DELETE_RULE, NLM_F_REQUEST, u32::MAX),
            (DELETE_TABLE, NLM_F_REQUEST | NLM_F_ACK, 0),
            (END, NLM_F_REQUEST, 1),
        ];
        let batch = encode(&commands, TableFamily::Inet, u32::MAX - 1, Outcome::Commit);
        assert_eq!(headers(&batch), expected);
        // Family, version, and the subsystem of the batch in network byte order.
        assert_eq!(batch[16..20], [0, 0, 0, 10]);
        assert_eq!(batch[36..40], [1, 0, 0, 0]);
        assert_eq!(headers(&encode(&commands, TableFamily::Inet, u32::MAX - 1, Outcome::Abort)), expected[..3]);
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
    fn acknowledgements_and_errors_are_decoded() {
        let header = [0; 16];
        // NLMSGERR_ATTR_OFFS, NLMSGERR_ATTR_MSG
        let offset = [&8_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &20_u32.to_ne_bytes()].concat();
        let message_text = [&9_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"oops\0\0\0\0"].concat();
        let error = [&(-17_i32).to_ne_bytes()[..], &header, &offset, &message_text].concat();
        let datagram = [
            message(NLMSG_ERROR, 0, 1, &[&[0; 4][..], &header].concat()),
            message(3, 0, 2, &[]),
            message(NLMSG_ERROR, NLM_F_ACK_TLVS, 3, &error),
            message(NLMSG_ERROR, 0, 4, &error),
        ]
        .concat();
        let reply = |sequence, errno, text: Option<&str>| Reply { sequence, errno, text: text.map(str::to_owned) };
        assert_eq!(replies(&datagram), [reply(1, 0, None), reply(3, 17, Some("oops")), reply(4, 17, None)]);
    }

    #[test]
    fn malformed_replies_do_not_panic() {
        let error = [&i32::MIN.to_ne_bytes()[..], &[0xff; 40]].concat();
        let whole = message(NLMSG_ERROR, NLM_F_ACK_TLVS, 1, &error);
        for length in 0..=whole.len() {
            let _ = replies(&whole[..length]);
            // Tests every value of the length field, correct or not.
            let mut wrong = whole.clone();
            wrong[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            let _ = replies(&wrong);
        }
        assert!(replies(&[]).is_empty());
        assert!(replies(&[0xff; 64]).is_empty());
    }
}
