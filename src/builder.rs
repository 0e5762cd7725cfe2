//! Every setting of a queue, and the one message that applies them.

use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

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
    busy_poll: Option<Duration>,
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
            busy_poll: None,
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

    /// The answer for packets, tickets and verdicts that are dropped unanswered: by a task that panics, is aborted or returns
    /// early. Default: [`Action::Drop`], to fail closed. [`Action::Repeat`] is refused, for such a packet would go round for ever.
    ///
    /// It also says how the queue [ends](Queue::close): with [`Action::Accept`] traffic passes while the queue drains, with any
    /// other action it stops.
    pub fn on_unanswered(mut self, action: Action) -> Self {
        self.on_unanswered = action;
        self
    }

    /// Answers with `action` for a packet that is still undecided so long after it was received. Default: none. Not zero;
    /// [`Action::Repeat`] is refused. The answer comes at the deadline or up to a 64th of it later.
    pub fn deadline(mut self, after: Duration, action: Action) -> Self {
        self.deadline = Some((after, action));
        self
    }

    /// How long [`close`](Queue::close) waits for verdicts that tasks still owe. Default: 5 s.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// For how long the stream, when it has run dry, is polled again before it sleeps; and only while it has lately been dry for less
    /// than that on average. Zero turns it off, 1 ms is the most. Default: 30 µs on a runtime of one thread, where the process has
    /// more than one processor; zero otherwise.
    ///
    /// Going to sleep and being woken is what costs a packet of a steady stream the most time. With 30 µs nothing changes
    /// below some 30 000 packets a second; from there up to saturation a processor that would else doze now and then is kept
    /// busy, and latency falls to a half or less (see the crate's benches). Other tasks of the runtime run in between. A runtime
    /// of several threads wakes another of them at each such poll, which costs more than it wins where processors are few.
    #[doc(alias = "SO_BUSY_POLL")]
    pub fn busy_poll(mut self, limit: Duration) -> Self {
        self.busy_poll = Some(limit);
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
    /// * `NoRuntime`: not called within a Tokio runtime.
    ///
    /// # Panics
    /// As every Tokio socket: if the current runtime's I/O driver is not enabled.
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
            busy_poll: self.busy_poll.unwrap_or_else(default_busy_poll),
            conntrack: self.flags & FLAG_CONNTRACK != 0,
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

    fn check(&self) -> Result<(), &'static str> {
        Self::check_limits(Some(self.copy), Some(self.max_len))?;
        if self.receive_buffer == Some(0) {
            return Err("receive buffer is 0");
        }
        if self.on_unanswered == Action::Repeat {
            return Err("on_unanswered is Repeat: the packet would come back for ever");
        }
        if self.busy_poll.is_some_and(|limit| limit > MAX_BUSY_POLL) {
            return Err("busy_poll is more than 1 ms");
        }
        match self.deadline {
            Some((Duration::ZERO, _)) => return Err("deadline is zero"),
            Some((_, Action::Repeat)) => {
                return Err("deadline's action is Repeat: the packet would come back for ever");
            }
            _ => {}
        }
        self.policy.check()
    }
}

/// A longer one is no busy poll but a fault.
const MAX_BUSY_POLL: Duration = Duration::from_millis(1);

/// With one processor, whoever would send the next packet waits for us. A runtime of several threads wakes another one each
/// time that a task wants to be polled again.
fn default_busy_poll() -> Duration {
    let several = std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
    let alone = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread);
    if several && alone { Duration::from_micros(30) } else { Duration::ZERO }
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
