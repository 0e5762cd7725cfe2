//! The settings of a queue, and `bind`.

use std::{borrow::Cow, future::Future, time::Duration};

use crate::{
    handover::Takeover,
    io::{Opened, Settings, Shared},
    namespace::NetworkNamespace,
    queue::Queue,
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
/// one message.
#[derive(Debug, Clone)]
#[must_use = "nothing happens until `bind`"]
pub struct QueueBuilder {
    queue: u16,
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
}

impl Queue {
    /// The settings for a queue with this number.
    pub fn builder(queue: u16) -> QueueBuilder {
        QueueBuilder {
            queue,
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
        }
    }
}

impl QueueBuilder {
    /// Copies the first `bytes` bytes of each packet, 1 to 65 531. Default: 65 531, the whole
    /// packet.
    ///
    /// Most filters read only headers; a short range then saves memory and time. A replaced payload
    /// ([`Verdict::payload`](crate::Verdict::payload)) must be a whole packet, so a program that
    /// edits needs whole packets.
    #[doc(alias = "NFQNL_COPY_PACKET")]
    pub fn copy_range(mut self, bytes: u32) -> Self {
        self.copy = CopyMode::Packet(bytes);
        self
    }

    /// Copies no payload, only metadata.
    #[doc(alias = "NFQNL_COPY_META")]
    pub fn copy_metadata(mut self) -> Self {
        self.copy = CopyMode::Metadata;
        self
    }

    /// How many packets the kernel queues before it drops further packets (with
    /// [`fail_open`](Self::fail_open): accepts them). Must not be 0. Default: 1024, as in the
    /// kernel.
    ///
    /// Linux 6.12.83, 6.18.24 and later queue at most 65 536 packets, whatever the value.
    #[doc(alias = "NFQA_CFG_QUEUE_MAXLEN")]
    pub fn max_len(mut self, packets: u32) -> Self {
        self.max_len = packets;
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

    /// Allows verdicts for whole connections, and verdicts that reject packets. Default: none.
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

    /// Opens a socket in the calling thread's network namespace (or in [another](Self::namespace))
    /// and binds the queue, with every setting in one message that the kernel applies or refuses as
    /// a whole. It waits only for that system call.
    ///
    /// Packets that arrive before the acknowledgement are kept. Bind before a rule sends packets to
    /// the queue: until the queue is bound, the rule drops them, or accepts them with `bypass`.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change.
    /// * `AlreadyBound`: another socket owns the queue.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN` in the user namespace that owns the
    ///   network namespace, or not the capability that [`namespace`](Self::namespace) needs.
    /// * `Unsupported`: this kernel lacks nfnetlink_queue or does not support a setting. The error
    ///   names nfnetlink_queue, `conntrack` or `security_context` if that is the reason.
    /// * `NoRuntime`: not called within a Tokio runtime, or in a runtime without an I/O driver. In
    ///   the latter case Tokio's panic message is printed, because Tokio has no other way to find
    ///   out.
    /// * `Other`: another error of the operating system, for example no free descriptor, or
    ///   [`namespace`](Self::namespace) is not a network namespace.
    pub fn bind(self) -> Result<Queue, Error> {
        let config = self.config();
        let opened = self.open(&config)?;
        Shared::bind(self.settings(), &config, self.policy, opened).map(Queue::new)
    }

    /// Binds the queue as soon as no other socket owns it: for a restart in which the old process
    /// ends without handing it over. If the number is free, it does what [`bind`](Self::bind) does.
    ///
    /// The socket is opened by this call, in the calling thread's network namespace. The kernel
    /// does not report that a queue has been unbound, so it is asked again while another socket
    /// owns the queue: after 1 ms, and then in growing intervals of up to 20 ms. Until the queue is
    /// bound, the rule drops packets, or accepts them with `bypass`.
    ///
    /// It waits without a limit. A queue that was closed gracefully is free as soon as `close` has
    /// returned; that of a killed process when the last copy of its socket is closed.
    ///
    /// # Errors
    /// As [`bind`](Self::bind), except that it waits instead of returning `AlreadyBound`. (A thread
    /// that does not know whether it has the capability gets `NotPermitted` in both cases: see
    /// there.)
    ///
    /// # Cancel safety
    /// Cancel safe: a future that is dropped leaves nothing behind.
    pub fn bind_when_free(self) -> impl Future<Output = Result<Queue, Error>> + Send + use<> {
        let config = self.config();
        let opened = self.open(&config);
        let begun = opened.and_then(|opened| Shared::bind_when_free(self.settings(), config, self.policy, opened));
        async move { begun?.await.map(Queue::new) }
    }

    /// Checks the settings and opens the socket.
    fn open(&self, config: &Config) -> Result<Opened, Error> {
        self.check(config).map_err(|what| {
            Error::new(ErrorKind::InvalidInput, format!("bind queue {}", self.queue)).with_detail(what)
        })?;
        Shared::check_runtime(self.queue)?;
        let settings = self.settings();
        let open = || Opened::new(&settings, config);
        match &self.namespace {
            None => Ok(open()),
            Some(namespace) => {
                #[cfg(feature = "test-util")]
                let in_memory = namespace.memory().map(|kernel| Opened::in_memory(kernel, &settings, config));
                #[cfg(not(feature = "test-util"))]
                let in_memory = None;
                in_memory.map_or_else(|| namespace.run(open), Ok)
            }
        }
    }

    /// Takes over the queue with this builder's number from another process. It returns packets
    /// when the [`Takeover`] has been [accepted](Takeover::accept).
    ///
    /// The settings of this crate are those of this builder: default action, deadline, flush policy
    /// and times. What the predecessor has set in the kernel stays: the copy range, `max_len`, the
    /// flags and the receive buffer. To change these, call
    /// [`reconfigure`](crate::VerdictSink::reconfigure) afterwards.
    ///
    /// [Flow marks](Self::flow_marks) must be those of the predecessor if its table goes along.
    ///
    /// The socket stays in its network namespace, so [`namespace`](Self::namespace) has no effect.
    /// A deadline begins anew for packets that the predecessor had received.
    ///
    /// # Errors
    /// The predecessor then continues, if the `Takeover` is dropped:
    /// * `InvalidInput`: the predecessor does not hand over this queue, or a setting is invalid.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN` in the user namespace that owns the
    ///   socket's network namespace.
    /// * `NoRuntime`: as [`bind`](Self::bind).
    /// * `Malformed`: what the predecessor has sent is damaged.
    /// * `Other`: another error of the operating system.
    pub fn take_over(self, takeover: &mut Takeover) -> Result<Queue, Error> {
        let config = self.config();
        let operation = || format!("take over queue {}", self.queue);
        let invalid = |what| Error::new(ErrorKind::InvalidInput, operation()).with_detail(what);
        self.check(&config).map_err(invalid)?;
        let index = takeover.find(self.queue).ok_or_else(|| invalid("the predecessor does not hand it over".into()))?;
        Shared::check_runtime(self.queue).map_err(|error| error.with_operation(operation()))?;
        let shared = Shared::take_over(self.settings(), self.policy, takeover.queue(index))?;
        takeover.taken(index, &shared);
        Ok(Queue::new(shared))
    }

    fn config(&self) -> Config {
        Config {
            command: Some(Command::Bind),
            copy: Some(self.copy),
            max_len: Some(self.max_len),
            flags: Some((FLAGS_ALL, self.flags)),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            queue: self.queue,
            receive_buffer: self.receive_buffer,
            on_unanswered: self.on_unanswered,
            deadline: self.deadline,
            close_timeout: self.close_timeout,
            busy_poll: self.busy_poll,
            conntrack: self.flags & FLAG_CONNTRACK != 0,
            attributes: attributes(self.flags),
            flow_marks: self.flow_marks,
        }
    }

    fn check(&self, config: &Config) -> Result<(), Cow<'static, str>> {
        config.check()?;
        if self.receive_buffer == Some(0) {
            return Err("receive buffer is 0".into());
        }
        self.on_unanswered.check_default(self.queue).map_err(|what| format!("on_unanswered: {what}"))?;
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
            action.check_default(self.queue).map_err(|what| format!("deadline: {what}"))?;
        }
        self.policy.check().map_err(Into::into)
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
    use super::*;

    #[test]
    fn invalid_values_are_refused_by_name() {
        let builder = || Queue::builder(3);
        for (builder, name) in [
            (builder().copy_range(0), "copy range"),
            (builder().copy_range(65_532), "copy range"),
            (builder().max_len(0), "max_len"),
            (builder().receive_buffer(0), "receive buffer"),
            (builder().on_unanswered(Action::Repeat), "on_unanswered"),
            (builder().deadline(Duration::ZERO, Action::Drop), "deadline"),
            (builder().deadline(Duration::from_secs(1), Action::Repeat), "deadline"),
            (builder().busy_poll(Duration::from_millis(2)), "busy_poll"),
            (builder().flow_marks(FlowMarks::new(3)), "flow marks"),
            (builder().flush_policy(FlushPolicy::fixed(0, Duration::ZERO)), "flush policy"),
        ] {
            let error = builder.bind().expect_err(name);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let text = error.to_string();
            assert!(text.starts_with("bind queue 3: invalid value") && text.contains(name), "{text}");
        }
    }

    #[test]
    fn bind_outside_a_runtime_is_an_error() {
        assert_eq!(Queue::builder(3).bind().expect_err("no runtime").kind(), ErrorKind::NoRuntime);
    }
}
