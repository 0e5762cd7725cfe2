//! Every setting of a queue, and the one message that applies them.

use std::{borrow::Cow, time::Duration};

use crate::{
    Action, Error, ErrorKind, FlushPolicy, NetworkNamespace, Queue,
    queue::{Settings, Shared},
    wire::{
        MAX_PAYLOAD,
        config::{
            Command, Config, CopyMode, FLAG_CONNTRACK, FLAG_FAIL_OPEN, FLAG_GSO, FLAG_SECURITY_CONTEXT, FLAG_UID_GID,
            FLAGS_ALL,
        },
    },
};

/// The settings of a queue. Made by [`Queue::builder`]; [`bind`](Self::bind) sends them as one message.
#[derive(Debug)]
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
}

impl QueueBuilder {
    pub(crate) fn new(queue: u16) -> Self {
        Self {
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
        }
    }

    /// Copies the first so many bytes of each packet, from 1 to 65 531. Default: 65 531, the whole packet.
    ///
    /// Most filters look at headers alone; a short range then saves memory and time. A packet replaced by
    /// [`Verdict::payload`](crate::Verdict::payload) must be given whole, so a program that edits needs whole packets.
    #[doc(alias = "NFQNL_COPY_PACKET")]
    pub fn copy_range(mut self, bytes: u32) -> Self {
        self.copy = CopyMode::Packet(bytes);
        self
    }

    /// Copies no payload, metadata only.
    #[doc(alias = "NFQNL_COPY_META")]
    pub fn copy_metadata(mut self) -> Self {
        self.copy = CopyMode::Metadata;
        self
    }

    /// How many packets the kernel queues before it drops (or with [`fail_open`](Self::fail_open) passes) the next.
    /// Default: 1024, the kernel's own. Not 0. Linux 6.12.117, 6.18 and later hold 65 536 at most, whatever is said here.
    #[doc(alias = "NFQA_CFG_QUEUE_MAXLEN")]
    pub fn max_len(mut self, packets: u32) -> Self {
        self.max_len = packets;
        self
    }

    /// Passes packets unseen when the queue or the receive buffer is full, instead of dropping them. Default: off.
    #[doc(alias = "NFQA_CFG_F_FAIL_OPEN")]
    pub fn fail_open(self, on: bool) -> Self {
        self.flag(FLAG_FAIL_OPEN, on)
    }

    /// Takes super-packets as they are, up to 64 KiB and with unfinished checksums, instead of having the kernel cut them
    /// into segments, each with a verdict of its own. Default: on, for it multiplies TCP throughput (on Linux 6.18, one
    /// stream: 4 Gbit/s without, 17 with).
    ///
    /// Turn it off to see packets as they go over the wire; but not for a bridge, for the kernel then loses the segments' link-layer
    /// headers (Linux 6.1 and 6.12).
    #[doc(alias = "NFQA_CFG_F_GSO")]
    pub fn gso(self, on: bool) -> Self {
        self.flag(FLAG_GSO, on)
    }

    /// Asks for the user and group id of the socket that sent a packet. Default: off.
    #[doc(alias = "NFQA_CFG_F_UID_GID")]
    pub fn uid_gid(self, on: bool) -> Self {
        self.flag(FLAG_UID_GID, on)
    }

    /// Asks for the security context of a packet's sender. Default: off. Refused by kernels without `NETWORK_SECMARK`.
    #[doc(alias = "NFQA_CFG_F_SECCTX")]
    pub fn security_context(self, on: bool) -> Self {
        self.flag(FLAG_SECURITY_CONTEXT, on)
    }

    /// Asks for the packet's connection tracking entry. Default: off. Refused by kernels without
    /// `NETFILTER_NETLINK_GLUE_CT`.
    #[doc(alias = "NFQA_CFG_F_CONNTRACK")]
    pub fn conntrack(self, on: bool) -> Self {
        self.flag(FLAG_CONNTRACK, on)
    }

    /// Size of the socket's receive buffer in bytes, as the kernel charges them (a small packet is charged 832, a
    /// full-sized one 2304). Not 0. Default: enough that `max_len` packets of the copy range fit, so that the queue's limit is
    /// the one that is reached.
    ///
    /// Without `CAP_NET_ADMIN` in the initial user namespace it is cut to `net.core.rmem_max`. What came of it is in
    /// [`Stats::receive_buffer`](crate::Stats::receive_buffer).
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

    /// The default action: for packets, tickets and verdicts that are dropped, by a task that panics, is aborted or returns
    /// early, and for packets whose verdict was refused. Default: [`Action::Drop`], to fail closed. [`Action::Repeat`] and a
    /// requeue to the same queue are refused, for such a packet would go round for ever.
    ///
    /// It also says how the queue [ends](Queue::close): with [`Action::Accept`] traffic passes while the queue drains, with any
    /// other action it stops.
    pub fn on_unanswered(mut self, action: Action) -> Self {
        self.on_unanswered = action;
        self
    }

    /// Decides a packet with `action` that is still undecided `after` the kernel has handed it over, whether or not anybody
    /// polls the stream. Default: none. Not zero; [`Action::Repeat`] and a requeue to the same queue are refused.
    ///
    /// The action comes at the deadline or up to a 32nd of it later (and 200 µs, where nobody polls the stream). A packet
    /// that was decided so is not handed out any more; [`Packet::is_expired`](crate::Packet::is_expired) tells of one that
    /// was before.
    pub fn deadline(mut self, after: Duration, action: Action) -> Self {
        self.deadline = Some((after, action));
        self
    }

    /// How long [`close`](Queue::close) waits for verdicts that tasks still owe. Default: 5 s. A time beyond the clock's end is
    /// no limit. [`close_within`](Queue::close_within) has a time of its own.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// How long to busy-poll an empty queue before sleeping. Default: zero, not at all. 1 ms at most.
    ///
    /// It acts only while packets come sooner than that on average. Other tasks of the runtime run in between. It is for hosts
    /// that leave a processor idle for it: there it lowers the median latency at 100 000 packets a second from 12 to 5 µs.
    /// Where the processors have other work, it takes their time and raises latency: with three busy threads on two
    /// processors, the 99th percentile at 100 000 packets a second rose from 0.3 to 3.6 ms. At saturation it changes nothing.
    #[doc(alias = "SO_BUSY_POLL")]
    pub fn busy_poll(mut self, limit: Duration) -> Self {
        self.busy_poll = limit;
        self
    }

    /// Binds the queue of another network namespace. Default: the calling thread's.
    ///
    /// The caller's threads stay where they are: the socket is opened by a thread made for it, and remains in its namespace.
    /// Entering another namespace needs `CAP_SYS_ADMIN` in one's own user namespace and in the one that owns it.
    pub fn namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    fn flag(mut self, flag: u32, on: bool) -> Self {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
        self
    }

    /// Opens a socket in the calling thread's network namespace (or in [another](Self::namespace)) and binds the queue, with every setting in one message that
    /// the kernel acknowledges or refuses as a whole. Does not wait for anything but that system call.
    ///
    /// Packets that arrive before the acknowledgement are kept. Bind before a rule sends packets to the queue: until it is
    /// bound the rule drops them, or passes them if it says `bypass`.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change.
    /// * `AlreadyBound`: another socket owns the queue.
    /// * `NotPermitted`: no `CAP_NET_ADMIN` in the user namespace that owns the network namespace.
    /// * `Unsupported`: this kernel lacks nfnetlink_queue, or a setting, which is named.
    /// * `NoRuntime`: not called within a Tokio runtime, or in one without an I/O driver (in which case Tokio's own panic
    ///   message is printed, for it has no other way to find out).
    ///
    pub fn bind(self) -> Result<Queue, Error> {
        self.check().map_err(|what| {
            Error::new(ErrorKind::InvalidInput, format!("bind queue {}", self.queue)).with_detail(what)
        })?;
        let config = Config {
            command: Some(Command::Bind),
            copy: Some(self.copy),
            max_len: Some(self.max_len),
            flags: Some((FLAGS_ALL, self.flags)),
        };
        let settings = Settings {
            queue: self.queue,
            receive_buffer: self.receive_buffer,
            on_unanswered: self.on_unanswered,
            deadline: self.deadline,
            close_timeout: self.close_timeout,
            busy_poll: self.busy_poll,
            conntrack: self.flags & FLAG_CONNTRACK != 0,
            attributes: attributes(self.flags),
        };
        let namespace = self.namespace.as_ref();
        Shared::bind(settings, &config, self.policy, namespace).map(Queue::new)
    }

    /// What the kernel would refuse, or silently change.
    pub(crate) fn check_limits(copy: Option<CopyMode>, max_len: Option<u32>) -> Result<(), &'static str> {
        match (copy, max_len) {
            (Some(CopyMode::Packet(0)), _) => Err("copy range is 0; use copy_metadata for none"),
            (Some(CopyMode::Packet(range)), _) if range as usize > MAX_PAYLOAD => Err("copy range is more than 65531"),
            (_, Some(0)) => Err("max_len is 0"),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), Cow<'static, str>> {
        Self::check_limits(Some(self.copy), Some(self.max_len))?;
        if self.receive_buffer == Some(0) {
            return Err("receive buffer is 0".into());
        }
        check_default(self.on_unanswered, self.queue).map_err(|what| format!("on_unanswered: {what}"))?;
        if self.busy_poll > MAX_BUSY_POLL {
            return Err("busy_poll is more than 1 ms".into());
        }
        if let Some((after, action)) = self.deadline {
            if after.is_zero() {
                return Err("deadline is zero".into());
            }
            check_default(action, self.queue).map_err(|what| format!("deadline: {what}"))?;
        }
        self.policy.check().map_err(Into::into)
    }
}

/// A longer one is no busy poll but a fault.
const MAX_BUSY_POLL: Duration = Duration::from_millis(1);

/// Whether an action can stand in for a verdict that nobody gives, in this queue.
pub(crate) fn check_default(action: Action, queue: u16) -> Result<(), &'static str> {
    match action {
        Action::Repeat => Err("Repeat would bring the packet back for ever"),
        Action::Requeue { queue: other, .. } if other == queue => {
            Err("a requeue to the same queue would bring the packet back for ever")
        }
        _ => Ok(()),
    }
}

/// Bytes of attributes that may come beside a payload, more than always come.
fn attributes(flags: u32) -> usize {
    // An entry with all that ctnetlink tells takes some 600 bytes, a security context rarely more than 256.
    let parts = [(FLAG_CONNTRACK, 640), (FLAG_SECURITY_CONTEXT, 256)];
    parts.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, bytes)| bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_refused_by_name() {
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
            (builder().flush_policy(FlushPolicy::fixed(0, Duration::ZERO)), "flush policy"),
        ] {
            let error = builder.bind().expect_err(name);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let text = error.to_string();
            assert!(text.starts_with("bind queue 3: invalid value") && text.contains(name), "{text}");
        }
    }

    #[test]
    fn outside_a_runtime_is_an_error() {
        assert_eq!(Queue::builder(3).bind().expect_err("no runtime").kind(), ErrorKind::NoRuntime);
    }
}
