//! Pages by task, most with a program that a test runs; and on this page what to know before a
//! queue goes into production: surprises, limits, and observability.
//!
//! | task | page |
//! |---|---|
//! | write a first filter | `first_filter` |
//! | decide whole connections | [`flows`] |
//! | block TLS connections by the server's name | `sni` |
//! | ask something slow before deciding | [`slow_judge`] |
//! | rewrite packets | `rewriting` |
//! | reply to packets | [`replies`] |
//! | not to filter one's own traffic | `own_traffic` |
//! | use all cores | `one_queue_a_core` |
//! | know what many queues, connections, rules and packets cost | `scale` |
//! | have a web service beside the filter | [`web`] |
//! | export metrics | `metrics` |
//! | test a policy | `testing` |
//! | run it as a service of systemd | [`service`] |
//! | run it in a container, or in Kubernetes | `containers` |
//! | restart it without losing a packet | `restarting` |
//! | find out why nothing arrives, all is slow, or nothing works any more | [`trouble`] |
//! | know what differs by kernel | [`kernels`] |
//!
//! # Threads and runtimes
//!
//! - A queue belongs to the runtime in which it was bound. The I/O driver of that runtime wakes the
//!   stream, whichever runtime polls the stream. If that runtime ends, the stream ends with
//!   `NoRuntime`; [`PacketStream::try_recv`](crate::PacketStream::try_recv) still receives.
//! - Each process has one thread named `nfqueue-timer`, from the first queue on. It sends gathered
//!   verdicts when the time limit of the flush policy is reached, keeps deadlines, and ends a
//!   `close` at its time-out. So these work while a task is busy for long without an `await`, while
//!   a current-thread runtime is outside of `block_on`, and after the runtime has ended. The thread
//!   sleeps while nothing is due. While there is traffic, it wakes once in each `max_delay` of the
//!   flush policy. It blocks all signals except those that report a fault of the thread itself
//!   (`SIGSEGV`, `SIGBUS`, `SIGFPE`, `SIGILL`, `SIGTRAP`, `SIGSYS`), so a program may read its
//!   signals from a `signalfd`.
//! - [`AfterReadyTasks`](crate::flush::FlushDecision::AfterReadyTasks) needs the runtime. If the
//!   runtime does not get to it, the thread asks the policy again after `max_delay`; for a custom
//!   policy, after 1 ms.
//! - The time limit is the time until the send begins, provided that the system runs the thread in
//!   time. A send takes about 1.5 µs for each accepted packet. If all CPUs are busy, the thread
//!   waits for its turn like any other.
//! - Users' code (wakers, `tracing` subscribers, flush policies, drops of payloads) runs under no
//!   lock of this crate, and may call any of its functions.
//!
//! # Privileges
//!
//! - The kernel checks `CAP_NET_ADMIN` at every send, for the thread that sends. A verdict that
//!   such a thread may not send is [refused](crate::VerdictSink::refusals). Its packet gets the
//!   default action when a thread of the runtime can send again. If that does not happen within 3
//!   s, the stream ends with `NotPermitted`.
//! - The thread asks for its capabilities with `capget` after each send. If a seccomp filter
//!   refuses that call, only the kernel's replies show whether a verdict was refused; such a reply
//!   can be lost if the receive buffer is full. Allow `capget`.
//! - A thread that flushes also sends the verdicts of other threads, with its own capabilities.
//! - The timer thread has the capabilities of the thread that bound the first queue. It sends only
//!   while no verdict has been refused because the capability was missing.
//! - Reading the kernel's counters needs root, or `CAP_DAC_READ_SEARCH` when the queue is bound:
//!   [`kernel_stats`](crate::VerdictSink::kernel_stats).
//!
//! # Packets that wait
//!
//! - A packet that waits at the output hook counts against the `SO_SNDBUF` of the socket that sent
//!   it. A sender with a small buffer blocks until its packets are decided. To delay packets, queue
//!   them at another hook, preferably on a router.
//! - When any hook of the network namespace is unregistered (a base chain or its table is deleted,
//!   an `iptables-nft-restore` replaces everything, an owner of tables exits), the kernel drops all
//!   queued packets of all queues in the namespace. Verdicts for them are counted in
//!   [`Sent::gone_at_least`](crate::stats::Sent::gone_at_least), and reported by an event and by
//!   [`Advice::DroppedWhileQueued`](crate::Advice::DroppedWhileQueued). This also happens when a
//!   program deletes and builds its own table again, whatever that table does.
//! - When a base chain is added at the same hook, with the priority of the queue's chain or an
//!   earlier one, packets that wait are queued again with new ids after they have been accepted.
//! - When an interface goes down, the kernel drops the queued packets that arrived on it or would
//!   leave on it.
//! - Within one flush, verdicts are sent in the order of the packets' ids. To release packets in
//!   another order on purpose, use [`FlushPolicy::immediate`](crate::FlushPolicy::immediate), or
//!   flush after each verdict.
//!
//! # Rules
//!
//! - A rule that matches everything at the output hook also queues IPv6 neighbour discovery. IPv6
//!   stops working if a policy drops what it does not know. Accept ICMPv6 in a rule before it, or
//!   exclude it: `unless(Match::protocol(Protocol::Icmpv6))`. ARP does not pass these hooks.
//! - Such a rule also queues the packets that the program itself sends. A policy that asks a
//!   resolver before it decides then waits for a packet that waits for the policy. Set a mark on
//!   the sockets of the program (`SO_MARK`) and exclude it with `Rule::unless_mark`, or exclude the
//!   user of the program: `unless(Match::user(id))`.
//! - `Match::first_packets` does not limit a burst. While the first packets of a connection wait in
//!   a queue, the kernel does not count them, and further packets match as well.
//! - Rules fail open. When the process ends, also when it is killed, the kernel removes them, and
//!   the packets pass unfiltered. With `DivertBuilder::fail_closed` the kernel keeps them, and
//!   drops the packets until a new process has replaced them.
//!
//! # Connection tracking
//!
//! Two packets of a new connection may share one entry of connection tracking before the kernel has
//! confirmed it, that is before one of them has left the host or has been delivered. The kernel
//! drops such a packet (Linux 6.1.107, 6.10.7 and later). No counter reports it, and a verdict for
//! it is acknowledged.
//!
//! - The segments of a UDP super-packet (`UDP_SEGMENT`) that opens a connection:
//!   [`gso(false)`](crate::QueueBuilder::gso) says how they arrive.
//! - Broadcast and multicast through a bridge with `br_netfilter`. At the forward hook of IP, the
//!   first packet of a connection is lost before it is queued. It arrives if the rule is at the
//!   prerouting hook, if the rule excludes these destinations, or if the kernel does not track
//!   connections.
//!
//! # Shutdown
//!
//! - Dropping the stream closes the queue. `let (_, verdicts) = queue.split()` drops the stream at
//!   once; `let (_packets, verdicts)` keeps it.
//! - A queue whose stream was dropped stays bound, with length 0, while a packet is still held. The
//!   kernel drops new packets (with `on_unanswered(Accept)` it accepts them), and `bypass` in the
//!   rule has no effect until the queue is unbound.
//!
//! # Children by `fork`
//!
//! - A child has the sockets of its parent's queues, and no timer thread. Its first call of a
//!   queue's function, or of `bind`, starts a thread of its own. So a daemon may bind its queues
//!   before or after it forks. If it binds them before, time limits hold in the child from its
//!   first call for the queue on.
//! - After the fork one of the two processes may use the queue. If that is the child, the parent
//!   ends with `std::process::exit` or `_exit`, which drop nothing. If it is the parent, the child
//!   calls `exec` or `_exit`. As long as the child exists without `exec`, it keeps the queue bound.
//! - For the kernel, both are the owner of the queue. Each receives packets that the other one then
//!   does not see. Each can decide the packets that were held at the time of the fork: of two
//!   verdicts, the first is executed. If one drops the queue, it unbinds that of the other. If one
//!   drops a packet, the packet gets the default action.
//! - `fork` copies locks as they are. If another thread uses the queue at the time of the fork, a
//!   call for this queue in the child may wait indefinitely. That thread may be a worker of the
//!   runtime, or the timer thread: it sends what is due, and with a deadline it also receives. So
//!   fork before packets arrive. Queues that the child binds itself are not affected, unless
//!   another thread was binding or dropping a queue at the time of the fork.
//! - A multi-thread runtime does not exist in the child: only the thread that forked does. A
//!   current-thread runtime works there if the parent ends. While both run, they take each other's
//!   events.
//!
//! # Memory and descriptors
//!
//! - Each queue has two descriptors: the socket and the kernel's table of queues.
//!   [`readable_fd`](crate::PacketStream::readable_fd) adds two. The timer thread has two for the
//!   process.
//! - The socket's receive buffer is limited to `max_len` × the memory of one message + 64 KiB. This
//!   is a limit, not a reservation: the kernel accounts only messages that wait.
//!   [`QueueLimits::receive_buffer`](crate::stats::QueueLimits::receive_buffer) is the limit.
//!
//!   | copy range | memory of one message at most | limit at `max_len` 1024 |
//!   |---|---|---|
//!   | metadata, 128 | 1.3 KB | 1.4 MB |
//!   | 528 | 1.5 KB | 1.6 MB |
//!   | 1500 | 2.8 KB | 2.9 MB |
//!   | 4000 | 8.4 KB | 8.7 MB |
//!   | 16 000 | 33 KB | 34 MB |
//!   | 65 531 (the default) | 131 KB | 135 MB |
//!
//!   A small packet takes 0.8 to 1 KB whatever the copy range, a TCP super-packet its length. A
//!   shorter copy range or a shorter queue lowers the limit. Measured on Linux 6.1, 6.12, 6.18 and
//!   7.3.
//! - In addition, the kernel keeps the queued packets themselves.
//! - In the process, packets of up to 2 KiB share buffers of 8 KiB, packets of up to 16 KiB share
//!   buffers of 32 KiB, and a longer packet has a buffer of 72 KiB. A buffer stays allocated while
//!   one of its packets exists, or bytes of it from
//!   [`payload_bytes`](crate::Packet::payload_bytes).
//!   [`Held::bytes`](crate::stats::Held::bytes) counts whole buffers.
//!   [`Packet::detach`](crate::Packet::detach) frees the memory and keeps the right to decide.
//!
//! # Tracing
//!
//! All events have the target `tokio_nfqueue` and are in the span `nfqueue`, which has the field
//! `queue`. Frequent events are reported once a second at most: `count` is their number since the
//! last report, and `packet` the first packet's id.
//!
//! | event | level | fields |
//! |---|---|---|
//! | `bound` | DEBUG | `max_len`, `receive_buffer` |
//! | `reconfigured`, `reconfigure failed` | DEBUG, WARN | `error` |
//! | `closing` | DEBUG | `action` |
//! | `closed`, `unbind failed` | DEBUG, WARN | `received`, `in_flight`, `error` |
//! | `handed over`, `taken over` | DEBUG | `unread`: packets that were received and not handed out |
//! | `default action` | DEBUG | `count`, `packet` |
//! | `deadline expired` | DEBUG | `count`, `packet` |
//! | `verdict too late` | DEBUG | `count`, `packet` |
//! | `packets lost to a full receive buffer` | WARN | `count`; once for each episode |
//! | `packets dropped by the kernel while they were queued` | WARN | `count`, `packet` (not for a batch), `likely_cause` |
//! | `verdict refused` | WARN | `count`, `packet` |
//! | `malformed message` | WARN | `count`, `packet` |
//! | `send failed` | WARN | `count` |
//! | `capability missing` | ERROR | `count` |
//! | `flush policy panicked` | ERROR | `count` |
//! | `deadlines of unread packets are not kept` | ERROR | `error` |
//! | `queue failed` | ERROR | `count` |
//! | `the timer thread cannot sleep` | ERROR | `error`; in no span, because the thread serves all queues |
//! | `the timer thread cannot be started` | ERROR | `error`; in no span; only in a child by `fork` |

#[cfg(all(feature = "divert", feature = "edit"))]
pub mod containers;
#[cfg(feature = "divert")]
pub mod first_filter;
pub mod flows;
pub mod kernels;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(feature = "divert")]
pub mod one_queue_a_core;
#[cfg(all(feature = "divert", feature = "inject"))]
pub mod own_traffic;
pub mod replies;
#[cfg(all(feature = "divert", feature = "handover"))]
pub mod restarting;
#[cfg(all(feature = "divert", feature = "edit"))]
pub mod rewriting;
#[cfg(feature = "divert")]
pub mod scale;
pub mod service;
pub mod slow_judge;
#[cfg(feature = "divert")]
pub mod sni;
#[cfg(feature = "test-util")]
pub mod testing;
pub mod trouble;
pub mod web;
