//! A kernel in memory, to test policies without privileges.
//!
//! A [`Kernel`] behaves like nfnetlink_queue. [`queue`] binds a queue in it, which is an ordinary
//! [`Queue`]: the whole crate runs as it does with the real kernel, from the messages' bytes on, in
//! any runtime. It needs no privilege and no kernel module. [`Kernel::send`] sends a [`TestPacket`]
//! to the queue, and its [`Outcome`] says what has become of it. The page
//! [`guide::testing`](crate::guide::testing) shows a policy with its tests.
//!
//! ```
//! use tokio_nfqueue::{Queue, simulated::{self, TestPacket}};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokio_nfqueue::Error> {
//! let (kernel, mut queue) = simulated::queue(Queue::builder(0))?;
//! let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! let query = kernel.send(TestPacket::udp(client, server, b"query"));
//!
//! let packet = queue.recv().await.unwrap()?;
//! packet.accept().mark(7).submit()?;
//!
//! let outcome = query.outcome().await;
//! assert!(outcome.accepted);
//! assert_eq!(outcome.mark, 7);
//! # Ok(())
//! # }
//! ```
//!
//! # Time
//!
//! The kernel's clock runs with the system's until [`Kernel::advance`] is called for the first
//! time. From then on it stands still, except in `advance`. Deadlines, the limits of flush
//! policies, time-outs of `close`, intervals of statistics and the attempts of
//! [`bind_when_free`](crate::QueueBuilder::bind_when_free) follow it. Busy polling does not.
//!
//! # What is simulated
//!
//! What [`Kernel`] and [`TestPacket`] have methods for, and: the length of the queue and fail-open,
//! the socket's receive buffer, copy ranges, batches of verdicts, errors and acknowledgements,
//! replaced payloads as Linux 6.18 takes them. The kernel tests run the same scenarios against the
//! real kernel.
//!
//! There is no network stack: a packet that was accepted has its outcome at once, without the
//! chains of other programs. There are no rules beyond the packet's own
//! ([`to_queue`](TestPacket::to_queue), [`bypass`](TestPacket::bypass),
//! [`unless_mark`](TestPacket::unless_mark)) and those for connections. Expectations in verdicts
//! are ignored.
//!
//! # Verdicts for connections
//!
//! Packets for a queue that was bound with [`flow_marks`](crate::QueueBuilder::flow_marks) are sent
//! to it as a `Divert` with flow marks does, whatever the marks are:
//! [`for_flow`](crate::Verdict::for_flow) and [`Packet::reject`](crate::Packet::reject) do what
//! [`guide::flows`](crate::guide::flows) says. The outcome of a packet that such a verdict decides
//! without the queue has [`Cause::FlowVerdict`]; packets to which the kernel replies are
//! [`rejected`](Outcome::rejected). The replies themselves are not sent.
//!
//! - The bytes of a packet say which connection it belongs to: addresses, ports, flags, and what an
//!   ICMP error quotes. [`TestPacket::of_connection`] makes no difference. In the middle of an
//!   unknown TCP connection, a segment with ACK and without SYN, FIN and RST begins a connection;
//!   other segments belong to none.
//! - A connection exists after a packet of it was accepted. It ends when no packet has come for the
//!   default time of Linux: 30 s for UDP and ICMP (UDP with replies after its first two seconds:
//!   120 s), 210 s for SCTP, 12 hours for DCCP, 5 days for TCP, 10 minutes for other protocols.
//!   Denials hold for 10 minutes. FIN, RST and the TCP window make no difference.
//! - The rules belong to the number of the queue. They and what they remember stay when the queue
//!   is unbound, as with a `Divert` that stays installed; [`Kernel::forget_flows`] forgets the
//!   verdicts. All queues of a kernel share them.
//!
//! Not simulated: address translation, packets that traverse several hooks, connections that a
//! helper expects, keys of PPTP, limits on the number of denied connections, the marks of
//! connections ([`Outcome::connection_mark`] does not show verdicts), first packets and segments
//! that connection tracking drops because another one of the connection passed before. A packet is
//! looked at where it is sent to the queue, and not at the hook of this host's packets in the other
//! direction.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use rustix::io::Errno;

use self::{
    model::{Finished, Model},
    outcome::Slot,
};
use crate::{
    builder::QueueBuilder,
    io::{
        clock::MemoryClock,
        kernel::KernelStats,
        memory::{MemoryKernel, Signal},
    },
    namespace::NetworkNamespace,
    queue::Queue,
    types::{Error, FlowMarks},
};

mod connection;
#[cfg(test)]
mod flow_tests;
mod flows;
#[cfg(test)]
mod late_tests;
mod message;
mod model;
mod outcome;
mod packet;
mod pcap;
mod raw;
mod segment;
mod socket;
#[cfg(test)]
mod tests;
mod tuple;

pub use self::{
    connection::Connection,
    outcome::{Cause, Outcome, Sent},
    packet::TestPacket,
    raw::RawSocket,
};

/// Makes a kernel, and binds a queue in it.
///
/// # Errors
/// As [`QueueBuilder::bind`].
pub fn queue(builder: QueueBuilder) -> Result<(Kernel, Queue), Error> {
    let kernel = Kernel::new();
    let queue = kernel.bind(builder)?;
    Ok((kernel, queue))
}

/// A kernel in memory. Clones refer to the same kernel.
#[derive(Debug, Clone)]
pub struct Kernel(Arc<Shared>);

impl Kernel {
    /// A kernel without queues, with the interfaces 1 (`lo`) and 2 (`eth0`).
    pub fn new() -> Self {
        let interfaces = [(1, "lo".to_owned()), (2, "eth0".to_owned())].into();
        let inner = Inner { model: Model::default(), signals: HashMap::new(), interfaces, to_wake: Vec::new() };
        Self(Arc::new(Shared { inner: Mutex::new(inner), clock: Arc::default(), begin: Instant::now() }))
    }

    /// Binds a queue in this kernel.
    ///
    /// # Errors
    /// As [`QueueBuilder::bind`].
    pub fn bind(&self, builder: QueueBuilder) -> Result<Queue, Error> {
        builder.namespace(self.namespace()).bind_in_memory()
    }

    /// The network namespace of this kernel, for
    /// [`QueueBuilder::namespace`](crate::QueueBuilder::namespace). Nothing but queues can be in
    /// it.
    pub fn namespace(&self) -> NetworkNamespace {
        NetworkNamespace::in_memory(Arc::clone(&self.0) as Arc<dyn MemoryKernel>)
    }

    /// Sends a packet to the queue that it is for.
    pub fn send(&self, packet: TestPacket) -> Sent {
        let slot = Arc::new(Slot::default());
        let tag = Arc::clone(&slot);
        self.0.with(|inner, now| inner.model.packet(tag, packet, now));
        Sent(slot)
    }

    /// Sends packets in this order, which takes less time than to send them one by one.
    pub fn send_all(&self, packets: impl IntoIterator<Item = TestPacket>) -> Vec<Sent> {
        // The iterator is users' code: it is not called under the lock.
        let packets: Vec<(TestPacket, Sent)> =
            packets.into_iter().map(|packet| (packet, Sent(Arc::new(Slot::default())))).collect();
        self.0.with(|inner, now| {
            let send = |(packet, sent): (_, Sent)| {
                inner.model.packet(Arc::clone(&sent.0), packet, now);
                sent
            };
            packets.into_iter().map(send).collect()
        })
    }

    /// Puts a datagram of any content into the socket of a queue, as if the kernel had sent it: to
    /// test what a program does when the kernel sends what it should not.
    pub fn forge(&self, queue: u16, datagram: &[u8]) {
        self.0.with(|inner, _| inner.model.forge(queue, datagram));
    }

    /// Moves the clock forward. What is due on the way (deadlines, gathered verdicts, time-outs) is
    /// done at its time, in order, before this returns. The first call stops the clock: see the
    /// [module's documentation](self#time). Calls of several threads add up. Wakers may call it as
    /// well. A time beyond the range of [`Instant`] does not move the clock.
    pub fn advance(&self, by: Duration) {
        self.0.clock.advance(by);
    }

    /// The time since this kernel was made, on its clock.
    pub fn now(&self) -> Duration {
        self.0.now()
    }

    /// The kernel's counters of a queue; `None` if the queue is not bound.
    pub fn stats(&self, queue: u16) -> Option<KernelStats> {
        self.0.inner().model.stats(queue)
    }

    /// The mark of a connection (`ct mark`), by the id of the [`Connection`].
    pub fn connection_mark(&self, connection: u32) -> Option<u32> {
        self.0.inner().model.connection_mark(connection)
    }

    /// Forgets all verdicts for connections, as
    #[cfg_attr(feature = "divert", doc = "[`Divert::forget_flows`](crate::Divert::forget_flows)")]
    #[cfg_attr(not(feature = "divert"), doc = "`Divert::forget_flows`")]
    /// does: the next packets of these connections come to the queue. Packets that are in a queue
    /// are not affected.
    pub fn forget_flows(&self) {
        self.0.inner().model.forget_flows();
    }

    /// Adds an interface, for [`Packet::interface_name`](crate::Packet::interface_name).
    pub fn add_interface(&self, index: u32, name: &str) {
        self.0.inner().interfaces.insert(index, name.to_owned());
    }

    /// Queues that are bound later give this id to their first packet, instead of 1.
    pub fn start_ids_at(&self, first: u32) {
        self.0.inner().model.first_id = first;
    }

    /// An interface goes down: queued packets that touch it are dropped.
    pub fn take_interface_down(&self, index: u32) {
        self.0.with(|inner, now| inner.model.device_down(index, now));
    }

    /// A hook is unregistered, for example because another program deletes a base chain: all queued
    /// packets are dropped.
    pub fn unregister_hook(&self) {
        self.0.with(|inner, now| inner.model.hook_unregistered(now));
    }

    /// Gives the process `CAP_NET_ADMIN`, or takes it: without it the kernel refuses everything.
    pub fn set_capable(&self, capable: bool) {
        self.0.inner().model.capable = capable;
    }

    /// Leaves out support for connection tracking, as kernels without `NETFILTER_NETLINK_GLUE_CT`
    /// do: [`conntrack`](crate::QueueBuilder::conntrack) is refused.
    pub fn remove_conntrack(&self) {
        self.0.inner().model.known_flags &= !crate::wire::config::FLAG_CONNTRACK;
    }

    /// The next `times` sends fail with an errno, and nothing in them is executed. This replaces
    /// what was left of an earlier call.
    ///
    /// # Panics
    /// `errno` is not between 1 and 4095.
    pub fn fail_sends(&self, errno: i32, times: usize) {
        self.0.inner().model.send_errors = std::iter::repeat_n(checked(errno), times).collect();
    }

    /// The next `times` attempts to receive fail with an errno. This replaces what was left of an
    /// earlier call.
    ///
    /// # Panics
    /// As [`fail_sends`](Self::fail_sends).
    pub fn fail_receives(&self, errno: i32, times: usize) {
        let mut inner = self.0.inner();
        inner.model.receive_errors = std::iter::repeat_n(checked(errno), times).collect();
        if times > 0 {
            inner.signals.values().for_each(Signal::raise);
        }
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self::new()
    }
}

fn checked(errno: i32) -> Errno {
    assert!((1..4096).contains(&errno), "{errno} is not an errno");
    Errno::from_raw_os_error(errno)
}

thread_local! {
    /// Whether this thread had the capability when it sent last: another thread may take it, or
    /// give it back, before this one asks.
    static MIGHT_SEND: Cell<bool> = const { Cell::new(true) };
}

struct Shared {
    inner: Mutex<Inner>,
    clock: Arc<MemoryClock>,
    begin: Instant,
}

#[derive(Debug)]
struct Inner {
    model: Model<Arc<Slot>>,
    signals: HashMap<u32, Signal>,
    interfaces: BTreeMap<u32, String>,
    /// Tasks that wait for the outcomes of packets that have left the kernel.
    to_wake: Vec<Waker>,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.clock.now().saturating_duration_since(self.begin)
    }

    /// Does something in the model. Then signals sockets, and wakes those who wait for outcomes.
    fn with<R>(&self, body: impl FnOnce(&mut Inner, Duration) -> R) -> R {
        let result = self.execute(body);
        self.wake();
        result
    }

    /// As `with`, but wakes no task: the caller may hold locks, and a waker is users' code.
    fn execute<R>(&self, body: impl FnOnce(&mut Inner, Duration) -> R) -> R {
        let now = self.now();
        let mut inner = self.inner();
        let result = body(&mut inner, now);
        let Inner { model, signals, to_wake, .. } = &mut *inner;
        for port in model.readable.drain(..) {
            if let Some(signal) = signals.get(&port) {
                signal.raise();
            }
        }
        for Finished { tag, segment, outcome } in model.finished.drain(..) {
            to_wake.append(&mut tag.put(segment, outcome));
        }
        result
    }
}

impl MemoryKernel for Shared {
    fn open(&self, signal: Signal, flow_marks: Option<FlowMarks>) -> u32 {
        let mut inner = self.inner();
        let port = inner.model.open(true, flow_marks);
        inner.signals.insert(port, signal);
        port
    }

    fn close(&self, port: u32) {
        self.with(|inner, now| {
            inner.signals.remove(&port);
            inner.model.close(port, now);
        });
    }

    fn send(&self, port: u32, datagram: &[u8]) -> Result<(), Errno> {
        self.execute(|inner, now| {
            MIGHT_SEND.set(inner.model.capable);
            inner.model.send(port, datagram, now)
        })
    }

    fn wake(&self) {
        let to_wake = std::mem::take(&mut self.inner().to_wake);
        to_wake.into_iter().for_each(Waker::wake);
    }

    fn receive_two(&self, port: u32, [first, second]: [&mut BytesMut; 2]) -> Result<(usize, bool), Errno> {
        self.receive(port, first)?;
        let (is_readable, fails) = {
            let model = &self.inner().model;
            (model.is_readable(port), model.next_receive_fails(port))
        };
        // `do_recvmmsg` keeps an error for the next call.
        match (is_readable && !fails).then(|| self.receive(port, second)) {
            Some(Ok(())) => Ok((2, false)),
            Some(Err(_)) | None => Ok((1, !is_readable)),
        }
    }

    fn receive(&self, port: u32, buffer: &mut BytesMut) -> Result<(), Errno> {
        let mut inner = self.inner();
        let result = inner.model.receive(port, buffer);
        if let Some(signal) = inner.signals.get(&port) {
            match inner.model.is_readable(port) {
                false => signal.lower(),
                // It is readable although this attempt failed: a task that waits must be woken
                // again.
                true if result.is_err() => signal.raise(),
                true => {}
            }
        }
        result
    }

    fn set_receive_buffer(&self, port: u32, bytes: usize) -> usize {
        self.inner().model.set_receive_buffer(port, bytes)
    }

    fn is_capable(&self) -> bool {
        self.inner().model.capable
    }

    fn was_capable(&self) -> bool {
        MIGHT_SEND.get()
    }

    fn interface_name(&self, index: u32) -> Result<String, Errno> {
        self.inner().interfaces.get(&index).cloned().ok_or(Errno::NODEV)
    }

    fn stats(&self, queue: u16) -> Option<KernelStats> {
        self.inner().model.stats(queue)
    }

    fn first_id(&self) -> u32 {
        self.inner().model.first_id
    }

    fn clock(&self) -> Arc<MemoryClock> {
        Arc::clone(&self.clock)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("now", &self.now()).finish_non_exhaustive()
    }
}
