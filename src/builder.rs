//! The settings of a queue, and whether they are valid. `builder/bind.rs` binds the queue.

mod bind;

use std::{borrow::Cow, time::Duration};

#[cfg(feature = "divert")]
use nfqueue_divert::DivertBuilder;

use crate::{
    io::Settings,
    namespace::NetworkNamespace,
    numbers::QueueNumbers,
    queue::Queue,
    rules::Wanted,
    state::flush::FlushPolicy,
    types::{Action, Error, ErrorKind, FlowMarks},
    wire::{
        MAX_PAYLOAD,
        config::{
            Command, Config, CopyMode, FLAG_CONNTRACK, FLAG_FAIL_OPEN, FLAG_GSO, FLAG_SECURITY_CONTEXT, FLAG_UID_GID,
            FLAGS_ALL,
        },
    },
};

/// The settings of a queue: [`Queue::builder`]. [`bind`](Self::bind) sends them to the kernel in
/// one message for each number.
#[derive(Debug, Clone)]
#[must_use = "nothing happens until `bind`"]
pub struct QueueBuilder {
    numbers: QueueNumbers,
    copy: CopyMode,
    max_len: u32,
    flags: u32,
    receive_buffer: Option<usize>,
    policy: FlushPolicy,
    on_unanswered: Action,
    deadline: Option<(Duration, Action)>,
    close_timeout: Duration,
    busy_poll: Duration,
    namespace: Option<NetworkNamespace>,
    flow_marks: Option<FlowMarks>,
    in_submission_order: bool,
    rules: Wanted,
}

impl Queue {
    /// The settings for a queue with this number (`7`), or with these (`0..4`,
    /// [`Queue::ANY`], [`Queue::any(4)`](Queue::any)): see [`QueueNumbers`].
    ///
    /// Several numbers are bound with the same settings, each with a limit and a socket of its own.
    pub fn builder(numbers: impl Into<QueueNumbers>) -> QueueBuilder {
        QueueBuilder {
            numbers: numbers.into(),
            copy: CopyMode::Packet(MAX_PAYLOAD as u32),
            max_len: 1024,
            flags: FLAG_GSO,
            receive_buffer: None,
            policy: FlushPolicy::default(),
            on_unanswered: Action::Drop,
            deadline: None,
            close_timeout: Duration::from_secs(5),
            busy_poll: Duration::ZERO,
            namespace: None,
            flow_marks: None,
            in_submission_order: false,
            rules: Wanted::none(),
        }
    }
}

impl QueueBuilder {
    /// Copies the first `bytes` bytes of each packet, 1 to 65 531. Default: 65 531, the whole
    /// packet. As in the kernel, 0 and more than 65 531 mean 65 531.
    ///
    /// Most filters read only headers; a short range then saves memory and time. A replaced payload
    /// ([`Verdict::payload`](crate::Verdict::payload)) must be a whole packet, so a program that
    /// edits needs whole packets.
    #[doc(alias = "NFQNL_COPY_PACKET")]
    pub fn copy_range(mut self, bytes: u32) -> Self {
        self.copy = CopyMode::payload(bytes);
        self
    }

    /// Copies no payload, only metadata.
    #[doc(alias = "NFQNL_COPY_META")]
    pub fn copy_metadata(mut self) -> Self {
        self.copy = CopyMode::Metadata;
        self
    }

    /// How many packets the kernel queues before it drops further packets (with
    /// [`fail_open`](Self::fail_open): accepts them). Default: 1024, as in the kernel. 0 counts as
    /// 1: the kernel would drop every packet.
    ///
    /// Linux 6.12.83, 6.18.24 and later queue at most 65 536 packets, whatever the value.
    #[doc(alias = "NFQA_CFG_QUEUE_MAXLEN")]
    pub fn max_len(mut self, packets: u32) -> Self {
        self.max_len = packets.max(1);
        self
    }

    /// Accepts packets unseen if the queue or the receive buffer is full, instead of dropping them.
    /// Default: off.
    #[doc(alias = "NFQA_CFG_F_FAIL_OPEN")]
    pub fn fail_open(self, on: bool) -> Self {
        self.flag(FLAG_FAIL_OPEN, on)
    }

    /// Receives super-packets (GSO) unchanged: up to 64 KiB, and with unfinished checksums. If off,
    /// the kernel segments them first, and each segment needs a verdict. Default: on, because it
    /// multiplies TCP throughput (one stream on Linux 6.18: 17 Gbit/s instead of 4).
    ///
    /// Linux 3.10 and later.
    ///
    /// Turn it off to see packets as they are on the wire. Leave it on for a bridge, because the
    /// kernel loses the link-layer headers of the segments (Linux 6.1 and 6.12).
    ///
    /// If it is off and the kernel tracks connections, a UDP super-packet (`UDP_SEGMENT`) that
    /// opens a connection needs care. Its segments must be accepted in the order of their ids. If
    /// the first one is dropped, or accepted after another one, the kernel drops all but one of
    /// them: no counter reports it, and the verdicts are acknowledged. The verdicts of one flush
    /// are in this order. Earlier kernels (from 6.1.107 and 6.10.7 until 6.12.75 and 6.18.14; Linux
    /// 6.1 and 6.6 still) drop all segments before they are queued. Segments arrive in any order,
    /// and on every kernel, if they are queued before connection tracking: at prerouting or output
    /// with a priority below −200, such as `Priority::RAW`. With GSO on, the super-packet is one
    /// packet, and nothing is lost.
    #[doc(alias = "NFQA_CFG_F_GSO")]
    pub fn gso(self, on: bool) -> Self {
        self.flag(FLAG_GSO, on)
    }

    /// Requests the user and group id of a packet's local socket: of its sender, and at the input
    /// hook of its *receiver*. See [`Packet::uid`](crate::Packet::uid). Default: off.
    ///
    /// Linux 3.14 and later.
    #[doc(alias = "NFQA_CFG_F_UID_GID")]
    pub fn uid_gid(self, on: bool) -> Self {
        self.flag(FLAG_UID_GID, on)
    }

    /// Requests the security context of a packet's sender. Default: off.
    ///
    /// Linux 4.3 and later. A kernel without `NETWORK_SECMARK` refuses it.
    #[doc(alias = "NFQA_CFG_F_SECCTX")]
    pub fn security_context(self, on: bool) -> Self {
        self.flag(FLAG_SECURITY_CONTEXT, on)
    }

    /// Requests the packet's connection tracking entry. Default: off.
    ///
    /// A kernel without `NETFILTER_NETLINK_GLUE_CT` refuses it.
    #[doc(alias = "NFQA_CFG_F_CONNTRACK")]
    pub fn conntrack(self, on: bool) -> Self {
        self.flag(FLAG_CONNTRACK, on)
    }

    /// The size of the socket's receive buffer in bytes, as the kernel accounts them (832 for a
    /// small packet, 2304 for one of 1500 bytes). Must not be 0. Default: enough for `max_len`
    /// packets of the copy range, so that `max_len` is reached first.
    ///
    /// Without `CAP_NET_ADMIN` in the initial user namespace the kernel limits it to
    /// `net.core.rmem_max`. The result is in
    /// [`QueueLimits::receive_buffer`](crate::stats::QueueLimits::receive_buffer).
    #[doc(alias = "SO_RCVBUF")]
    pub fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = Some(bytes);
        self
    }

    /// When gathered verdicts are sent. Default: [`FlushPolicy::default`].
    pub fn flush_policy(mut self, policy: FlushPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Sends the verdicts in the order in which they were submitted, by whichever tasks. Default:
    /// within one flush, in the order of the packets' ids.
    ///
    /// For programs that reorder packets on purpose, such as emulators of networks (the example
    /// `netem`). Verdicts that were submitted in the order of the ids still share messages; others
    /// have a message each, of which many fit into one system call. A packet that is decided by a
    /// deadline, or gets the default action, has its place in this order too. To keep the packets
    /// of a connection in order although they are decided in another order, use
    /// [`Serve::in_flow_order`](crate::Serve::in_flow_order).
    pub fn in_submission_order(mut self) -> Self {
        self.in_submission_order = true;
        self
    }

    /// The default action: for packets and verdicts that are dropped (by a task that panics, is
    /// aborted or returns early), and for packets whose verdict was refused. Default:
    /// [`Action::Drop`], to fail closed.
    ///
    /// [`Action::Repeat`] and a requeue to the same queue are refused, because the packet would be
    /// queued indefinitely.
    ///
    /// The default action also applies while the queue [closes](Queue::close): with
    /// [`Action::Accept`], new packets are accepted in the meantime; with any other action they are
    /// dropped.
    pub fn on_unanswered(mut self, action: Action) -> Self {
        self.on_unanswered = action;
        self
    }

    /// Decides a packet with `action` if it is still undecided when the time `after` has passed
    /// since it was received from the kernel, whether or not a task polls the stream. Default: no
    /// deadline. `after` must not be zero; [`Action::Repeat`] and a requeue to the same queue are
    /// refused.
    ///
    /// The action is sent at the deadline or up to 1/32 of `after` later (plus 200 µs if no task
    /// polls the stream). The stream does not return a packet that was decided like this.
    /// [`Packet::is_expired`](crate::Packet::is_expired) is true for one that was returned before.
    pub fn deadline(mut self, after: Duration, action: Action) -> Self {
        self.deadline = Some((after, action));
        self
    }

    /// How long [`close`](Queue::close) waits for verdicts that tasks still owe. Default: 5 s.
    /// [`Duration::MAX`] means no limit. [`close_within`](Queue::close_within) sets another
    /// time-out for one call.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// How long to busy-poll an empty queue before sleeping. Default: zero, which means not at all.
    /// At most 1 ms.
    ///
    /// It is active only while the average time between packets is shorter than `limit`. The other
    /// tasks of the runtime run in between. It is meant for hosts with an idle CPU: there it lowers
    /// the median latency at 100 000 packets per second from 12 to 6 µs. If the CPUs have other
    /// work, it takes their time and raises latency: with three busy threads on two CPUs, the 99th
    /// percentile at 100 000 packets per second rose from 0.3 to 3.6 ms. At saturation it changes
    /// nothing.
    #[doc(alias = "SO_BUSY_POLL")]
    pub fn busy_poll(mut self, limit: Duration) -> Self {
        self.busy_poll = limit;
        self
    }

    /// Binds the queue in another network namespace. Default: that of the calling thread.
    ///
    /// The caller's threads do not change their namespace: a temporary thread opens the socket,
    /// which stays in its namespace. Entering another namespace needs `CAP_SYS_ADMIN` in the
    /// process's own user namespace and in the one that owns the network namespace.
    pub fn namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// The queue's own rules, which send packets to it. They are installed when the queue is bound,
    /// and removed when it is closed or dropped, in the order that loses no packet of it:
    ///
    /// | when | what happens |
    /// |---|---|
    /// | [`bind`](Self::bind) | the queue is bound, then the rules are installed; if they cannot be, the queue is unbound |
    /// | [`close`](Queue::close) and the like | the rules are removed, the queue is closed, the table is removed |
    /// | the stream is dropped | the same, in a thread, while the program continues; rules that [fail closed](DivertBuilder::fail_closed) stay, and the kernel drops what they match |
    /// | the process ends first | the kernel removes the table and the queue, in any order, so that a few packets may be dropped; rules that fail closed stay |
    /// | [`hand_over`](crate::VerdictSink::hand_over) | the table goes along with the queue |
    ///
    /// These steps lose no packet of this queue. The removal of its table drops what is queued in
    /// all other queues of the network namespace, also those of other programs. So a program with
    /// several queues binds their numbers at once, with one table, and gives the rules targets:
    /// `Queue::builder(5..7).divert(Divert::builder().rule(a.to_queue(5)).rule(b.to_queue(6)))`;
    /// [`PacketStream::into_each`](crate::PacketStream::into_each) then tells them apart.
    ///
    /// Rules without a target ([`Rule::to_queue`] and so on) send their packets to this queue, to
    /// all its numbers. The table has [flow marks](DivertBuilder::flow_marks): those of this
    /// builder or of the rules, of which one suffices, or [`FlowMarks::default`]. So verdicts for
    /// connections and verdicts that reject work, and the kernel tracks connections. To do without,
    /// give the rules `flow_marks(None)`.
    ///
    /// [`divert`](Queue::divert) returns the rules, to change them. In a simulated kernel, the
    /// rules are checked, but nothing is installed.
    ///
    /// [`Rule::to_queue`]: crate::Rule::to_queue
    #[cfg(feature = "divert")]
    pub fn divert(mut self, rules: DivertBuilder) -> Self {
        self.rules = Wanted::new(rules);
        self
    }

    /// Allows verdicts for whole connections, and verdicts that reject packets. Default: none, or
    /// those of the queue's own rules.
    ///
    /// The rules that queue the packets must have the same flow marks: those of a
    /// `DivertBuilder::flow_marks`, or your own. See [`guide::flows`](crate::guide::flows).
    ///
    /// [`Packet::priority`](crate::Packet::priority) then returns the priority without the code of
    /// the rules, and [`Verdict::priority`](crate::Verdict::priority) must not be such a code
    /// (`0xa800_0000` to `0xafff_ffff` with the default marks). The marks of packets are not used.
    pub fn flow_marks(mut self, marks: FlowMarks) -> Self {
        self.flow_marks = Some(marks);
        self
    }

    fn flag(mut self, flag: u32, on: bool) -> Self {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
        self
    }

    fn config(&self) -> Config {
        Config {
            command: Some(Command::Bind),
            copy: Some(self.copy),
            max_len: Some(self.max_len),
            flags: Some((FLAGS_ALL, self.flags)),
        }
    }

    fn settings(&self, queue: u16) -> Settings {
        Settings {
            queue,
            receive_buffer: self.receive_buffer,
            on_unanswered: self.on_unanswered,
            deadline: self.deadline,
            close_timeout: self.close_timeout,
            busy_poll: self.busy_poll,
            conntrack: self.flags & FLAG_CONNTRACK != 0,
            attributes: attributes(self.flags),
            flow_marks: self.flow_marks,
            in_submission_order: self.in_submission_order,
            fail_closed: self.rules.fail_closed(),
        }
    }

    /// With the flow marks of the rules.
    fn checked(mut self) -> Result<Self, Error> {
        let marks = self.rules.flow_marks(self.flow_marks);
        let fault = self.fault(&self.config()).and(marks.map_err(Into::into));
        self.flow_marks = fault
            .map_err(|what| Error::new(ErrorKind::InvalidInput, format!("bind {}", self.numbers)).with_detail(what))?;
        Ok(self)
    }

    fn fault(&self, config: &Config) -> Result<(), Cow<'static, str>> {
        self.numbers.check()?;
        config.check()?;
        if self.receive_buffer == Some(0) {
            return Err("receive buffer is 0".into());
        }
        self.check_default(self.on_unanswered).map_err(|what| format!("on_unanswered: {what}"))?;
        if let Some(marks) = self.flow_marks {
            marks.check()?;
        }
        if self.busy_poll > MAX_BUSY_POLL {
            return Err("busy_poll is more than 1 ms".into());
        }
        if let Some((after, action)) = self.deadline {
            if after.is_zero() {
                return Err("deadline is zero".into());
            }
            self.check_default(action).map_err(|what| format!("deadline: {what}"))?;
        }
        self.policy.check().map_err(Into::into)
    }

    /// Whether an action may be taken for packets that are not decided.
    fn check_default(&self, action: Action) -> Result<(), &'static str> {
        self.numbers.known().try_for_each(|number| action.check_default(number))
    }

    /// As `check_default`, for a number that has been found.
    fn check_found(&self, number: u16) -> Result<(), Error> {
        let actions = [Some(self.on_unanswered), self.deadline.map(|(_, action)| action)];
        let invalid = |what| Error::new(ErrorKind::InvalidInput, format!("bind queue {number}")).with_detail(what);
        actions.into_iter().flatten().try_for_each(|action| action.check_default(number)).map_err(invalid)
    }
}

/// A longer time is a mistake, and is refused.
const MAX_BUSY_POLL: Duration = Duration::from_millis(1);

/// Bytes of optional attributes that a message may contain.
fn attributes(flags: u32) -> usize {
    // A connection tracking entry with all attributes takes about 600 bytes, a security context
    // rarely more than 256.
    let parts = [(FLAG_CONNTRACK, 640), (FLAG_SECURITY_CONTEXT, 256)];
    parts.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, bytes)| bytes).sum()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn invalid_values_are_refused_by_name() {
        let builder = || Queue::builder(3);
        for (builder, name) in [
            (builder().receive_buffer(0), "receive buffer"),
            (builder().on_unanswered(Action::Repeat), "on_unanswered"),
            (builder().deadline(Duration::ZERO, Action::Drop), "deadline"),
            (builder().deadline(Duration::from_secs(1), Action::Repeat), "deadline"),
            (builder().busy_poll(Duration::from_millis(2)), "busy_poll"),
            (builder().flow_marks(FlowMarks::new(3)), "flow marks"),
            (builder().flush_policy(FlushPolicy::fixed(0, Duration::ZERO)), "flush policy"),
        ] {
            let error = builder.bind().now_or_never().expect("at once").expect_err(name);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let text = error.to_string();
            assert!(text.starts_with("bind queue 3: invalid value") && text.contains(name), "{text}");
        }
    }
}
