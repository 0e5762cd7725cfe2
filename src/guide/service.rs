//! Running as a service: privileges, system calls, memory, readiness.
//!
//! # Capabilities
//!
//! | what | capability | checked |
//! |---|---|---|
//! | [`bind`](crate::QueueBuilder::bind), verdicts, [`reconfigure`](crate::VerdictSink::reconfigure), [`close`](crate::VerdictSink::close) | `CAP_NET_ADMIN` | **at every send**, for the sending thread, in the user namespace that owns the network namespace |
//! | `Divert` (feature `divert`): every change, `counters` | `CAP_NET_ADMIN` | at every call |
//! | [`Injector`](crate::inject::Injector) | `CAP_NET_RAW`; with a mark before Linux 5.17 also `CAP_NET_ADMIN` | when it is built |
//! | [`kernel_stats`](crate::VerdictSink::kernel_stats) | root, or `CAP_DAC_READ_SEARCH`: the kernel's file belongs to root and has mode 0440 | at `bind` |
//! | [`namespace`](crate::QueueBuilder::namespace) | `CAP_SYS_ADMIN` in both user namespaces | at `bind`, `install`, `build` |
//! | a receive buffer beyond `net.core.rmem_max` | `CAP_NET_ADMIN` in the initial user namespace | at `bind`, `reconfigure` |
//!
//! Do not drop `CAP_NET_ADMIN` after `bind`: the kernel would refuse every verdict, and the packets
//! would wait until the queue ends with `NotPermitted` after 3 s. The threads of the runtime and
//! the thread `nfqueue-timer` need it, and so does every thread that drops, submits or flushes.
//!
//! An ordinary user gets it as an ambient capability of the service, as below, or from the file:
//! `setcap cap_net_admin+ep /usr/local/bin/my-filter`. In a container, the container must share the
//! network namespace whose packets it decides, and have the capability in the user namespace that
//! owns it; `--cap-add=NET_ADMIN` does both for the container's own network.
//!
//! # A unit file
//!
//! `examples/nfqueue.service`:
//!
//! ```ini
#![doc = include_str!("../../examples/nfqueue.service")]
//! ```
//!
//! # System calls
//!
//! After start, with Tokio's current-thread runtime on Linux 6.18 (`strace -f` of the example
//! `per_flow`): `recvfrom`, `sendto`, `ppoll`, `epoll_wait`, `epoll_ctl`, `read`, `write`,
//! `capget`, `futex`, `close`, `fcntl`, and what the allocator needs. To start: `socket`,
//! `connect`, `bind`, `getsockname`, `getsockopt`, `setsockopt`, `openat`, `ioctl`,
//! `epoll_create1`, `eventfd2`, `socketpair`, `clone3`. A hand-over needs `sendmsg`, `recvmsg` and
//! `memfd_create`; another namespace `setns`. All are in systemd's `@system-service`.
//!
//! `capget` is called after each send, to learn whether a missing refusal means success. A filter
//! that kills for it kills the program at its first verdict.
//!
//! # Memory
//!
//! For `MemoryMax=`, in bytes:
//!
//! ```text
//! 16 MiB + max_len × B + receive buffer
//! ```
//!
//! with B = 8 KiB for a `copy_range` of up to 1900, 32 KiB up to 16 000, 72 KiB beyond. That is the
//! worst case: each undecided packet keeps a whole buffer alive. The receive buffer is
//! [`QueueLimits::receive_buffer`](crate::stats::QueueLimits::receive_buffer), see the table in
//! [`guide`](crate::guide#memory-and-descriptors); whether the kernel charges it to the service
//! depends on its version. Bytes that the program keeps
//! ([`Packet::payload_bytes`](crate::Packet::payload_bytes)) come on top. Example: `max_len` 1024
//! and `copy_range` 1500 are 16 + 8 + 3 MiB.
//!
//! # Readiness
//!
//! The queue is bound, and the kernel keeps packets for it, when
//! [`bind`](crate::QueueBuilder::bind) returns. Tell the service manager then:
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! if let Some(socket) = std::env::var_os("NOTIFY_SOCKET") {
//!     std::os::unix::net::UnixDatagram::unbound()?.send_to(b"READY=1", socket)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The stop
//!
//! `systemctl stop` sends SIGTERM. A program that awaits only Ctrl-C (SIGINT) is killed by it:
//! queued packets are dropped, and rules that fail closed stay and drop packets. Await both:
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use tokio::signal::unix::{SignalKind, signal};
//!
//! let mut terminate = signal(SignalKind::terminate())?;
//! tokio::select! {
//!     _ = terminate.recv() => {}
//!     _ = tokio::signal::ctrl_c() => {}
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Rules
//!
//! Install rules after the queue is bound, or with `bypass`. Otherwise the rule drops the packets
//! while no socket has bound its queue.
//!
//! The rules of a queue or of a `Divert` are removed when the service ends or is killed, and
//! packets pass unfiltered until it has been started again. With `DivertBuilder::fail_closed`,
//! packets are dropped in between if the service was killed or has failed, but not after `close`.
//! Before its first start, only rules that `nft` has installed can do that.
