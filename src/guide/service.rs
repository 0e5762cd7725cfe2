//! Running as a service of systemd: privileges, a unit file, system calls, memory, readiness,
//! watchdog.
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
//! `setcap cap_net_admin+ep /usr/local/bin/my-filter`. In a container:
//! [`containers`](super::containers).
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
//! # Readiness and watchdog
//!
//! The queue is bound, and the kernel keeps packets for it, when
//! [`bind`](crate::QueueBuilder::bind) returns. Tell the service manager then (`Type=notify`). With
//! `WatchdogSec=30` in the unit it also wants a sign of life, and kills a service that sends none
//! (`Restart=always` starts it again). Give the sign only while packets are decided, and from the
//! runtime that decides them:
//!
//! ```
//! use std::{ffi::OsString, os::unix::net::UnixDatagram, time::Duration};
//!
//! use tokio_nfqueue::{Queue, VerdictSink};
//!
//! /// `socket` is the variable `NOTIFY_SOCKET`; without a service manager it does not exist.
//! fn notify(socket: &Option<OsString>, state: &str) -> std::io::Result<()> {
//!     let Some(path) = socket else { return Ok(()) };
//!     UnixDatagram::unbound()?.send_to(state.as_bytes(), path).map(drop)
//! }
//!
//! /// Until the queue is closed. `every`: half of `WATCHDOG_USEC` or less.
//! async fn signs_of_life(socket: Option<OsString>, queue: VerdictSink, every: Duration) {
//!     let mut interval = tokio::time::interval(every);
//!     while !queue.is_closed() {
//!         interval.tick().await;
//!         let oldest = queue.stats().held.oldest_undecided;
//!         // More than any packet of this program ever waits.
//!         if oldest.is_none_or(|waits| waits < Duration::from_secs(10)) {
//!             let _ = notify(&socket, "WATCHDOG=1");
//!         }
//!     }
//!     let _ = notify(&socket, "STOPPING=1");
//! }
//!
//! /// When the queue is bound: `started(&queue, std::env::var_os("NOTIFY_SOCKET"))`.
//! fn started(queue: &Queue, socket: Option<OsString>) -> std::io::Result<()> {
//!     notify(&socket, "READY=1")?;
//!     tokio::spawn(signs_of_life(socket, queue.sink(), Duration::from_secs(10)));
//!     Ok(())
//! }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = std::env::temp_dir().join(format!("guide-service-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder)?;
//! # let manager = tokio::net::UnixDatagram::bind(folder.join("notify"))?;
//! # let (kernel, mut queue) = tokio_nfqueue::simulated::queue(Queue::builder(0))?;
//! # started(&queue, Some(folder.join("notify").into_os_string()))?;
//! # async fn expect(manager: &tokio::net::UnixDatagram, state: &str) {
//! #     let mut bytes = [0; 32];
//! #     let length = manager.recv(&mut bytes).await.unwrap();
//! #     assert_eq!(&bytes[..length], state.as_bytes());
//! # }
//! # expect(&manager, "READY=1").await;
//! # expect(&manager, "WATCHDOG=1").await;
//! # tokio::time::pause();
//! # // A packet that no task decides.
//! # let [from, to] = ["10.0.0.1:1", "10.0.0.2:2"].map(|address| address.parse().unwrap());
//! # let _sent = kernel.send(tokio_nfqueue::simulated::TestPacket::udp(from, to, b""));
//! # let packet = queue.recv().await.unwrap()?;
//! # kernel.advance(Duration::from_secs(11));
//! # for _ in 0..5 {
//! #     tokio::time::sleep(Duration::from_secs(10)).await;
//! # }
//! # assert!(manager.try_recv(&mut [0; 32]).is_err(), "no sign of life");
//! # packet.accept().submit()?;
//! # expect(&manager, "WATCHDOG=1").await;
//! # queue.close().await?;
//! # let mut bytes = [0; 32];
//! # while !bytes.starts_with(b"STOPPING=1") {
//! #     manager.recv(&mut bytes).await?;
//! # }
//! # std::fs::remove_dir_all(folder)?;
//! # Ok(())
//! # }
//! ```
//!
//! - The watchdog's kill is SIGABRT: queued packets are dropped, and rules end as with every kill.
//! - A queue whose packets nothing reads has no undecided packet in this sense, because they wait
//!   in the kernel: [`kernel_stats`](crate::VerdictSink::kernel_stats)`().queued` says how many.
//! - A name that begins with `@` is an abstract one
//!   ([`SocketAddr::from_abstract_name`](std::os::linux::net::SocketAddrExt::from_abstract_name)).
//!   systemd itself uses a path.
//! - The state of a service must come from its main process, unless the unit says
//!   `NotifyAccess=all`.
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
//! # Restarts
//!
//! `Restart=always`, and a stop and start, let packets pass undecided or drop them, as the next
//! section says. With the service manager's descriptor store the queue stays bound meanwhile, and
//! loses no packet: [`restarting`](super::restarting#with-the-descriptor-store-of-systemd).
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
