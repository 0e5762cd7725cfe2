//! The queue, and its receiving half.

use std::{
    fmt,
    future::Future,
    os::fd::BorrowedFd,
    pin::{Pin, pin},
    sync::{Arc, MutexGuard},
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use futures::{Stream, stream::FusedStream};
use tokio::task::coop;

use crate::{Action, Error, ErrorKind, Packet, QueueBuilder, Stats, VerdictSink, state::Life};

mod binding;
mod busy_poll;
mod closing;
mod driver;
mod foreign;
mod inbox;
mod limits;
mod outbox;
mod shared;

use foreign::Foreign;
use inbox::{Inbox, RECEIVE_BATCH};
use shared::lock;
pub(crate) use shared::{Answer, Extra, Settings, Shared};

/// A bound queue: a stream of packets, with a sink for their verdicts.
///
/// Use it whole, or [`split`](Self::split) it into a [`PacketStream`] and a [`VerdictSink`]; [`sink`](Self::sink) makes sinks
/// without splitting.
///
/// Dropping it ends the queue as [`close`](Self::close) does, except that nobody waits: what is decided is sent, what is
/// unread gets the [`on_unanswered`](QueueBuilder::on_unanswered) answer, and the queue is unbound when the last packet
/// still held somewhere has been decided. That happens within the drop, some microseconds for each packet queued; where
/// another thread is just sending verdicts, that one unbinds the queue right after.
#[derive(Debug)]
pub struct Queue {
    stream: PacketStream,
    sink: VerdictSink,
}

impl Queue {
    /// The settings for a queue of this number, to be bound.
    pub fn builder(queue: u16) -> QueueBuilder {
        QueueBuilder::new(queue)
    }

    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { sink: VerdictSink::new(Arc::clone(&shared)), stream: PacketStream { shared, ended: false } }
    }

    pub(crate) fn from_halves(stream: PacketStream, sink: VerdictSink) -> Self {
        Self { stream, sink }
    }

    /// The two halves.
    pub fn split(self) -> (PacketStream, VerdictSink) {
        (self.stream, self.sink)
    }

    /// A sink for verdicts.
    pub fn sink(&self) -> VerdictSink {
        self.sink.clone()
    }

    /// Receives a packet; as [`PacketStream::recv`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        self.stream.recv().await
    }

    /// Takes a packet if one is there; as [`PacketStream::try_recv`].
    ///
    /// # Errors
    /// As [`PacketStream::try_recv`].
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        self.stream.try_recv()
    }

    /// Receives what is there; as [`PacketStream::recv_many`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, Error> {
        self.stream.recv_many(packets, limit).await
    }

    /// Ends the queue without losing a packet: see [`VerdictSink::close`].
    ///
    /// # Errors
    /// As [`VerdictSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close(self) -> Result<(), Error> {
        self.sink.close().await
    }

    /// As [`close`](Self::close), but waits for owed verdicts for `timeout` at most: see [`VerdictSink::close_within`].
    ///
    /// # Errors
    /// As [`VerdictSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_within(self, timeout: Duration) -> Result<(), Error> {
        self.sink.close_within(timeout).await
    }

    /// As [`close`](Self::close), with another action for unread packets: see [`VerdictSink::close_with`].
    ///
    /// # Errors
    /// As [`VerdictSink::close_with`].
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_with(self, action: Action) -> Result<(), Error> {
        self.sink.close_with(action).await
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.sink.stats()
    }

    /// The queue's number.
    pub fn number(&self) -> u16 {
        self.sink.queue()
    }
}

impl Stream for Queue {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(cx)
    }
}

impl FusedStream for Queue {
    fn is_terminated(&self) -> bool {
        self.stream.is_terminated()
    }
}

/// The receiving half of a queue.
///
/// Its items are packets. An `Err` item is fatal and the last one: the socket cannot be used any more, the runtime has ended
/// (`NoRuntime`), or the process has lost `CAP_NET_ADMIN` for good (`NotPermitted`). So a program may write `?` behind each
/// item. What concerns one verdict or one message is in [`VerdictSink::refusals`].
///
/// Overload is no error: packets lost are counted in [`Stats::lost`], and the stream goes on. `None` comes only after the queue
/// was closed, or after an error.
///
/// It belongs to the runtime in which the queue was bound: that runtime's I/O driver tells when packets have come. Where
/// that runtime is not driven, [`try_recv`](Self::try_recv) still receives.
///
/// Dropping it ends the queue: see [`Queue`]. `let (_, sink) = queue.split()` drops it at once.
pub struct PacketStream {
    shared: Arc<Shared>,
    ended: bool,
}

impl PacketStream {
    /// Receives a packet.
    ///
    /// # Errors
    /// As the stream's items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Waits for a packet, then appends what has been received already, up to `limit`, to `packets`. Returns how many;
    /// 0 means that the queue has ended, or that `limit` is 0.
    ///
    /// # Errors
    /// As the stream's items; nothing has been appended then.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, Error> {
        if limit == 0 {
            return Ok(0);
        }
        match self.recv().await {
            None => Ok(0),
            Some(Err(error)) => Err(error),
            Some(Ok(first)) => {
                packets.push(first);
                let before = packets.len();
                let mut inbox = lock(&self.shared.inbox);
                self.shared.drop_answered(&mut inbox);
                let more = inbox.packets.len().min(limit - 1);
                packets.extend(inbox.packets.drain(..more).map(|packet| packet.claimed(Arc::clone(&self.shared))));
                Ok(1 + packets.len() - before)
            }
        }
    }

    /// Takes a packet if one is there: from what has been received, or else from the socket. For loops without a runtime;
    /// where none is left, what is gathered is sent.
    ///
    /// # Errors
    /// * `Empty`: no packet is there.
    /// * `Closed`: the queue is closed.
    /// * `Failed`: as an `Err` item of the stream.
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        if self.ended {
            return Err(TryRecvError::Closed);
        }
        let result = self.shared.try_packet();
        self.ended = matches!(result, Err(TryRecvError::Closed | TryRecvError::Failed(_)));
        result
    }

    /// A descriptor that is readable when [`try_recv`](Self::try_recv) may have something, for loops that wait by
    /// `poll(2)` or `epoll(7)`. It stays the same while the stream lives, and must not be read.
    ///
    /// The rule: after `try_recv` has returned `Empty`, wait until the descriptor is readable; then call `try_recv` until
    /// it returns `Empty` again.
    ///
    /// It is made at the first call and covers the socket and packets that were received on behalf of others (a
    /// [`confirm`](VerdictSink::confirm), a deadline). It costs two more descriptors.
    ///
    /// # Errors
    /// The process or the system has no descriptor left.
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.shared.readable_fd()
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }
}

/// | found | next |
/// |---|---|
/// | a packet in the inbox | it |
/// | an error | it |
/// | the queue is closing | the end |
/// | the socket may have more | receive, and look again |
/// | the socket was empty | ask the flush policy |
/// | nothing is to be read | look once, if it stays awake (see [`busy_poll`](QueueBuilder::busy_poll)); wait |
impl Stream for PacketStream {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let coop = ready!(coop::poll_proceed(cx));
        let result = self.shared.poll_packet(cx);
        if let Poll::Ready(item) = &result {
            coop.made_progress();
            self.ended = match item {
                None => true,
                Some(Err(error)) => error.is_fatal(),
                Some(Ok(_)) => false,
            };
        }
        result
    }
}

impl FusedStream for PacketStream {
    fn is_terminated(&self) -> bool {
        self.ended
    }
}

impl Drop for PacketStream {
    fn drop(&mut self) {
        self.shared.stream_dropped();
    }
}

impl fmt::Debug for PacketStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketStream").field("queue", &self.shared.number()).finish_non_exhaustive()
    }
}

/// Why [`PacketStream::try_recv`] has no packet.
#[derive(Debug)]
pub enum TryRecvError {
    /// No packet is there now.
    Empty,
    /// The queue is closed.
    Closed,
    /// The queue is of no more use.
    Failed(Error),
}

impl fmt::Display for TryRecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("no packet is there"),
            Self::Closed => f.write_str("the queue is closed"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TryRecvError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Empty | Self::Closed => None,
        }
    }
}

impl Shared {
    fn poll_packet(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Packet, Error>>> {
        let mut looked = false;
        loop {
            if let Some(packet) = self.take_packet(&mut lock(&self.inbox)) {
                return Poll::Ready(Some(Ok(packet)));
            }
            match self.end_of_stream(Some(cx.waker())) {
                None => {}
                Some(end) => return Poll::Ready(end.map(Err)),
            }
            let readable = self.socket.poll_readable(cx);
            let mut inbox = lock(&self.inbox);
            if !inbox.packets.is_empty() {
                // Somebody else has received them before the waker was in place.
                continue;
            }
            let ready = match readable {
                // The runtime wants the task to make room for others.
                Poll::Pending if !coop::has_budget_remaining() => return Poll::Pending,
                Poll::Pending => {
                    if !inbox.busy_poll.dry(Instant::now()) {
                        return Poll::Pending;
                    }
                    if looked {
                        poll_again(cx);
                        return Poll::Pending;
                    }
                    None
                }
                Poll::Ready(Ok(ready)) => Some(ready),
                Poll::Ready(Err(source)) => {
                    let error = Error::new(ErrorKind::NoRuntime, "receive packet").with_source(source);
                    return Poll::Ready(Some(Err(error.fatal())));
                }
            };
            // After a long pause the packet is most likely alone: to see that no other has come can wait until it is decided.
            let most = if inbox.busy_poll.is_long_dry(Instant::now()) { 1 } else { RECEIVE_BATCH };
            let received = self.receive(&mut inbox, most);
            let none = inbox.packets.is_empty();
            drop(inbox);
            match received {
                Ok(true) => {
                    if let Some(mut ready) = ready {
                        ready.clear_ready();
                    }
                    self.with(|core| {
                        if none {
                            core.machine.drained();
                        }
                    });
                    looked = true;
                }
                Ok(false) => self.attend(),
                Err(source) => return Poll::Ready(Some(Err(Error::os("receive packet", source).fatal()))),
            }
        }
    }

    /// The next packet that has been received and nobody has answered for.
    fn take_packet(self: &Arc<Self>, inbox: &mut MutexGuard<'_, Inbox>) -> Option<Packet> {
        self.drop_answered(inbox);
        inbox.packets.pop_front().map(|packet| packet.claimed(Arc::clone(self)))
    }

    /// Removes received packets from the front for which the deadline has answered.
    fn drop_answered(&self, inbox: &mut Inbox) {
        if self.settings.deadline.is_some() && !inbox.packets.is_empty() {
            let core = self.core();
            while inbox.packets.front().is_some_and(|packet| !core.machine.is_undecided(packet.id)) {
                inbox.packets.pop_front();
            }
        }
    }

    /// Whether the stream has come to its end, and with what. If not, the waker is kept.
    fn end_of_stream(&self, waker: Option<&Waker>) -> Option<Option<Error>> {
        let mut core = self.core();
        if let Some(error) = core.machine.take_failure() {
            return Some(Some(error));
        }
        if core.machine.life() != Life::Open {
            return Some(None);
        }
        let waker = waker.filter(|waker| core.stream.as_ref().is_none_or(|old| !old.will_wake(waker)));
        if let Some(waker) = waker {
            // Clones and drops of wakers may be users' code.
            drop(core);
            let waker = waker.clone();
            let old = self.core().stream.replace(waker);
            drop(old);
            // What happened in between has woken the old one.
            let core = self.core();
            if core.machine.has_failed() || core.machine.life() != Life::Open {
                drop(core);
                return self.end_of_stream(None);
            }
        }
        None
    }

    fn try_packet(self: &Arc<Self>) -> Result<Packet, TryRecvError> {
        if let Some(foreign) = self.foreign.get() {
            foreign.lower();
        }
        loop {
            let mut inbox = lock(&self.inbox);
            if let Some(packet) = self.take_packet(&mut inbox) {
                if let Some(foreign) = self.foreign.get()
                    && !inbox.packets.is_empty()
                {
                    foreign.raise();
                }
                return Ok(packet);
            }
            match self.end_of_stream(None) {
                None => {}
                Some(None) => return Err(TryRecvError::Closed),
                Some(Some(error)) => return Err(TryRecvError::Failed(error)),
            }
            let received = self.receive(&mut inbox, RECEIVE_BATCH);
            let none = inbox.packets.is_empty();
            drop(inbox);
            match received {
                Ok(true) if none => {
                    self.with(|core| core.machine.flush());
                    return Err(TryRecvError::Empty);
                }
                Ok(_) => self.attend(),
                Err(source) => return Err(TryRecvError::Failed(Error::os("receive packet", source).fatal())),
            }
        }
    }

    fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        if self.foreign.get().is_none() {
            let foreign = Foreign::new(self.socket.fd()).map_err(|source| Error::os("make a descriptor", source))?;
            let foreign = self.foreign.get_or_init(|| foreign);
            if !lock(&self.inbox).packets.is_empty() {
                foreign.raise();
            }
        }
        self.foreign.get().map(Foreign::fd).ok_or_else(|| self.closed("make a descriptor for queue"))
    }

    /// Sends everything gathered. `round` is of the waiting caller, `None` at first.
    pub(crate) fn poll_flush(&self, round: &mut Option<u64>, cx: &mut Context<'_>) -> Poll<()> {
        let wanted = match *round {
            Some(wanted) => Some(wanted),
            None => self.with(|core| core.machine.flush()),
        };
        let Some(wanted) = wanted else { return Poll::Ready(()) };
        let waker = cx.waker().clone();
        let mut core = self.core();
        if core.machine.has_ended(wanted) {
            *round = None;
            return Poll::Ready(());
        }
        // Whoever is sending wakes it when that is done.
        *round = Some(wanted);
        let spare = core.wait(waker);
        drop(core);
        drop(spare);
        Poll::Pending
    }

    /// The next refusal that nobody has read.
    pub(crate) fn poll_refusal(&self, cx: &mut Context<'_>) -> Poll<Option<Error>> {
        let waker = cx.waker().clone();
        let mut core = self.core();
        if let Some(error) = core.machine.next_refusal() {
            return Poll::Ready(Some(error));
        }
        if core.machine.life() == Life::Closed {
            return Poll::Ready(None);
        }
        if !core.refusals.iter().any(|other| other.will_wake(&waker)) {
            core.refusals.push(waker);
        }
        Poll::Pending
    }

    pub(crate) fn interface_name(&self, index: u32) -> Result<String, Error> {
        self.socket.interface_name(index)
    }

    /// Whether the queue was bound with connection tracking, which proves that this kernel has the glue for it.
    #[cfg(feature = "conntrack")]
    pub(crate) fn has_conntrack(&self) -> bool {
        self.settings.conntrack
    }

    pub(crate) fn number(&self) -> u16 {
        self.settings.queue
    }

    pub(crate) fn on_unanswered(&self) -> Action {
        self.settings.on_unanswered
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        self.settings.close_timeout
    }

    /// Why a replaced payload of an IP packet is not taken in this network namespace, where it is not.
    pub(crate) fn no_payload(&self) -> Option<&'static str> {
        crate::kernel::payload_obstacle(self.network_owner)
    }
}

/// Has the task polled again when the runtime has run what else is ready and has looked for I/O. Beside the readiness that
/// is waited for, not in its place: the runtime may lose such a wish (one of a task within the root future, when
/// `block_on` returns).
fn poll_again(cx: &mut Context<'_>) {
    let polled = pin!(tokio::task::yield_now()).poll(cx);
    debug_assert!(polled.is_pending(), "it yields once");
}
