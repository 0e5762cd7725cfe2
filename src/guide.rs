//! What to know before a queue goes into production: surprises, limits, and what can be observed.
//!
//! # Threads and runtimes
//!
//! - A queue belongs to the runtime in which it was bound. That runtime's I/O driver tells the stream when packets have come,
//!   whichever runtime polls the stream. If it ends, the stream ends with `NoRuntime`;
//!   [`PacketStream::try_recv`](crate::PacketStream::try_recv) still receives.
//! - Each process has one thread named `nfqueue-timer`, from the first queue on. It sends what is gathered when the cap of the
//!   flush policy is over, keeps deadlines, and ends a `close` that takes too long. So these hold while a task works for long
//!   without an `await`, while a runtime of one thread is outside of `block_on`, and after the runtime has ended. The thread
//!   sleeps while nothing is due. While there is traffic it wakes once in each `max_delay` of the flush policy.
//! - [`AtPassEnd`](crate::Flush::AtPassEnd) needs the runtime. If the runtime does not come to it, the thread sends after
//!   `max_delay`; for a policy of your own, after 1 ms.
//! - The cap is the time until the send begins, if the system runs the thread in time. A send takes some 1.5 µs for each
//!   accepted packet. Where all processors are busy the thread waits for its turn like any other.
//! - Users' code (wakers, `tracing` subscribers, flush policies, drops of payloads) runs under no lock of this crate, and may
//!   call any of its functions.
//!
//! # Privileges
//!
//! - The kernel checks `CAP_NET_ADMIN` at every send, of the thread that sends. A verdict that such a thread may not send is
//!   [refused](crate::VerdictSink::refusals), and its packet gets the default action when a thread of the runtime can send
//!   again. If that does not happen within 3 s, the stream ends with `NotPermitted`.
//! - Whoever flushes sends the verdicts of others along, by its own capability.
//! - The timer thread has the capabilities of the thread that bound the first queue. It sends only while no verdict has been
//!   refused for want of the capability.
//! - Reading the kernel's counters takes root, or `CAP_DAC_READ_SEARCH` when the queue is bound:
//!   [`kernel_stats`](crate::VerdictSink::kernel_stats).
//!
//! # Packets that wait
//!
//! - A packet that waits at the output hook counts against the `SO_SNDBUF` of the socket that sent it. A sender with a small
//!   buffer blocks until its packets are decided. To delay packets, queue them at another hook, best on a router.
//! - When any hook of the network namespace is unregistered (a base chain or its table is deleted, an `iptables-nft-restore`
//!   replaces everything, an owner of tables exits), the kernel drops all queued packets of all queues in the namespace.
//!   Verdicts for them are counted in [`Stats::gone_at_least`](crate::Stats::gone_at_least).
//! - When a base chain is added at the same hook, with the priority of the queueing chain or one before it, packets that wait
//!   come back with new ids when they are accepted.
//! - When an interface goes down, the kernel drops the queued packets that came or go by it.
//! - Within one flush, verdicts leave in the order of the packets' ids. To release packets in another order on purpose, use
//!   [`FlushPolicy::immediate`](crate::FlushPolicy::immediate), or flush after each.
//!
//! # The end
//!
//! - Dropping the stream ends the queue. `let (_, verdicts) = queue.split()` drops it at once; write `_packets`.
//! - After that the queue stays bound, with length 0, as long as a packet is held somewhere: the kernel drops new packets
//!   (with `on_unanswered(Accept)` it passes them), and `bypass` on the rule does not act until the queue is unbound.
//! - A child made by `fork` has a copy of the queue's socket. If the child drops the queue, it unbinds the parent's.
//!
//! # Memory and descriptors
//!
//! - Each queue has two descriptors: the socket and the kernel's table of queues.
//!   [`readable_fd`](crate::PacketStream::readable_fd) adds two. The timer thread has two for the process.
//! - The socket's receive buffer may hold `max_len` × the charge of one message + 64 KiB. That is a limit, not a reservation;
//!   the kernel charges what is there. [`Stats::receive_buffer`](crate::Stats::receive_buffer) tells the limit.
//!
//!   | copy range | charge of one message at most | limit at `max_len` 1024 |
//!   |---|---|---|
//!   | metadata, 128 | 1.3 KB | 1.4 MB |
//!   | 528 | 1.5 KB | 1.6 MB |
//!   | 1500 | 2.8 KB | 2.9 MB |
//!   | 4000 | 8.4 KB | 8.7 MB |
//!   | 16 000 | 33 KB | 34 MB |
//!   | 65 531 (the default) | 131 KB | 135 MB |
//!
//!   Small packets are charged 0.8 to 1 KB whatever the copy range, and TCP super-packets their length. A shorter copy range
//!   or a shorter queue lowers the limit. Measured on Linux 6.1, 6.12, 6.18 and 7.3.
//! - The kernel keeps the queued packets themselves beside that.
//! - In the process, packets of up to 2 KiB share buffers of 8 KiB, packets of up to 16 KiB buffers of 32 KiB, and a longer one
//!   has a buffer of 72 KiB. A buffer lives as long as one of its packets, or bytes of it from
//!   [`payload_bytes`](crate::Packet::payload_bytes). [`Stats::held_bytes`](crate::Stats::held_bytes) counts whole buffers.
//!   [`Packet::detach`](crate::Packet::detach) gives the memory back and keeps the right to decide.
//!
//! # Tracing
//!
//! All events have the target `tokio_nfqueue` and lie in the span `nfqueue` with the field `queue`. What may happen often is
//! told once a second at most, with the `count` since the last time and the first `packet` id.
//!
//! | event | level | fields |
//! |---|---|---|
//! | `bound` | DEBUG | `max_len`, `receive_buffer` |
//! | `reconfigured`, `reconfigure failed` | DEBUG, WARN | `error` |
//! | `closing` | DEBUG | `action` |
//! | `closed`, `unbind failed` | DEBUG, WARN | `received`, `in_flight`, `error` |
//! | `default action` | DEBUG | `count`, `packet` |
//! | `deadline expired` | DEBUG | `count`, `packet` |
//! | `verdict too late` | DEBUG | `count`, `packet` |
//! | `packets lost to a full receive buffer` | WARN | `count`; once for each episode |
//! | `verdict refused` | WARN | `count`, `packet` |
//! | `malformed message` | WARN | `count`, `packet` |
//! | `send failed` | WARN | `count` |
//! | `capability missing` | ERROR | `count` |
//! | `flush policy panicked` | ERROR | `count` |
//! | `queue failed` | ERROR | `count` |
