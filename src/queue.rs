//! The queue and its receive half.

use std::{
    fmt,
    future::Future,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, stream::FusedStream};
use tokio::task::coop;

use crate::{
    advice::Advice,
    handover::Handover,
    io::{Received, Shared, kernel::KernelStats},
    packet::Packet,
    reconfigure::Reconfigure,
    sink::{Refusals, VerdictSink},
    types::{Action, Error, Stats, TryRecvError},
    verdict::{Confirm, Verdict},
};

/// A bound queue: a stream of packets, and a sink for their verdicts.
///
/// Use it as a whole, or [`split`](Self::split) it into a [`PacketStream`] and a [`VerdictSink`].
/// It has the methods of both.
///
/// Dropping it closes the queue as [`close`](Self::close) does, except that it does not wait.
/// Gathered verdicts are sent, and unread packets get the [default
/// action](crate::QueueBuilder::on_unanswered). The queue is unbound when the last packet that is
/// still held has been decided. The drop takes some microseconds for each queued packet. If another
/// thread is sending verdicts at that time, that thread unbinds the queue afterwards.
#[derive(Debug)]
pub struct Queue {
    stream: PacketStream,
    sink: VerdictSink,
}

impl Queue {
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

    /// Receives a packet: see [`PacketStream::recv`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        self.stream.recv().await
    }

    /// Takes a packet if there is one: see [`PacketStream::try_recv`].
    ///
    /// # Errors
    /// As [`PacketStream::try_recv`].
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        self.stream.try_recv()
    }

    /// Receives several packets: see [`PacketStream::recv_many`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, Error> {
        self.stream.recv_many(packets, limit).await
    }

    /// Closes the queue without losing a packet: see [`VerdictSink::close`].
    ///
    /// # Errors
    /// As [`VerdictSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close(self) -> Result<(), Error> {
        self.sink.close().await
    }

    /// As [`close`](Self::close), but waits for `timeout` at most: see
    /// [`VerdictSink::close_within`].
    ///
    /// # Errors
    /// As [`VerdictSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_within(self, timeout: Duration) -> Result<(), Error> {
        self.sink.close_within(timeout).await
    }

    /// As [`close`](Self::close), but with another action for undecided packets: see
    /// [`VerdictSink::close_with`].
    ///
    /// # Errors
    /// As [`VerdictSink::close_with`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_with(self, action: Action) -> Result<(), Error> {
        self.sink.close_with(action).await
    }

    /// Begins to hand the queue over to another process: see [`VerdictSink::hand_over`].
    ///
    /// # Errors
    /// As [`VerdictSink::hand_over`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::hand_over`].
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        self.sink.hand_over(within).await
    }

    /// Submits a verdict: see [`VerdictSink::submit`].
    ///
    /// # Errors
    /// As [`VerdictSink::submit`].
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        verdict.submit()
    }

    /// Submits a verdict and waits for the kernel's acknowledgement: see [`VerdictSink::confirm`].
    ///
    /// # Errors
    /// As [`VerdictSink::confirm`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::confirm`].
    pub fn confirm(&self, verdict: Verdict) -> Confirm {
        verdict.confirm()
    }

    /// Sends all gathered verdicts: see [`VerdictSink::flush`].
    ///
    /// # Errors
    /// As [`VerdictSink::flush`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::flush`].
    pub async fn flush(&self) -> Result<(), Error> {
        self.sink.flush().await
    }

    /// Errors that concern one verdict or message: see [`VerdictSink::refusals`].
    pub fn refusals(&self) -> Refusals {
        self.sink.refusals()
    }

    /// Changes settings while the queue runs: see [`VerdictSink::reconfigure`].
    ///
    /// # Errors
    /// As [`VerdictSink::reconfigure`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::reconfigure`].
    #[must_use = "the change has been sent, but only the future returns the kernel's reply"]
    pub fn reconfigure(&self, change: &Reconfigure) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.sink.reconfigure(change)
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.sink.stats()
    }

    /// The queue's counters at a fixed interval: see [`VerdictSink::watch`].
    ///
    /// # Errors
    /// As [`VerdictSink::watch`].
    pub fn watch(&self, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
        self.sink.watch(every)
    }

    /// The kernel's own counters of the queue: see [`VerdictSink::kernel_stats`].
    ///
    /// # Errors
    /// As [`VerdictSink::kernel_stats`].
    pub fn kernel_stats(&self) -> Result<KernelStats, Error> {
        self.sink.kernel_stats()
    }

    /// Which limits have cost packets so far: see [`VerdictSink::advice`].
    pub fn advice(&self) -> Vec<Advice> {
        self.sink.advice()
    }

    /// A descriptor for other event loops: see [`PacketStream::readable_fd`].
    ///
    /// # Errors
    /// As [`PacketStream::readable_fd`].
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.stream.readable_fd()
    }

    /// Whether the queue is closing or closed.
    pub fn is_closed(&self) -> bool {
        self.sink.is_closed()
    }

    /// The queue's number.
    pub fn queue_number(&self) -> u16 {
        self.sink.queue_number()
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

/// The receive half of a queue.
///
/// Its items are packets. An `Err` item is fatal and the last item, so a program may use `?` on
/// every item. The error's text says what to do:
///
/// | kind | reason | what to do |
/// |---|---|---|
/// | `NotPermitted` | the process has lost `CAP_NET_ADMIN` for more than 3 s | start again, and keep it |
/// | `NoRuntime` | the runtime in which the queue was bound has ended | bind in another runtime; [`try_recv`](Self::try_recv) still receives |
/// | `Other` | a system call on the socket fails, with this [errno](Error::raw_os_error) | drop the queue and bind it again |
///
/// Errors that concern one verdict or one message are in [`VerdictSink::refusals`]. A network
/// namespace does not go away under a queue: its socket keeps the namespace in existence, also when
/// the last process has left it and its name has been removed.
///
/// Overload is not an error: lost packets are counted in
/// [`Lost::packets`](crate::stats::Lost::packets), and the stream continues. `None` follows only
/// when the queue has been closed, or after an error.
///
/// The stream belongs to the runtime in which the queue was bound: the I/O driver of that runtime
/// wakes it. If that runtime is not driven, [`try_recv`](Self::try_recv) still receives.
///
/// Dropping it closes the queue: see [`Queue`]. `let (_, sink) = queue.split()` drops it at once.
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

    /// Waits for a packet, then appends what has been received already, up to `limit` packets in
    /// all, to `packets`. Returns their number; 0 means that the stream has ended, or that `limit`
    /// is 0.
    ///
    /// # Errors
    /// As the stream's items; then nothing has been appended.
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
                Ok(1 + self.take_received(packets, limit - 1))
            }
        }
    }

    /// Appends up to `limit` packets that have been received already; returns their number.
    pub(crate) fn take_received(&mut self, packets: &mut Vec<Packet>, limit: usize) -> usize {
        let before = packets.len();
        self.shared.take_packets(limit, |received| packets.push(handed_out(received)));
        packets.len() - before
    }

    /// Takes a packet if there is one: of those received already, or else from the socket. For
    /// event loops without a runtime. If there is no packet, the gathered verdicts are sent.
    ///
    /// # Errors
    /// * `Empty`: there is no packet now.
    /// * `Closed`: the queue is closed.
    /// * `Failed`: as an `Err` item of the stream.
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        if self.ended {
            return Err(TryRecvError::Closed);
        }
        let result = self.shared.try_packet().map(handed_out);
        self.ended = matches!(result, Err(TryRecvError::Closed | TryRecvError::Failed(_)));
        result
    }

    /// A descriptor that is readable when [`try_recv`](Self::try_recv) may have a packet or the end
    /// of the stream, for event loops that use `poll(2)` or `epoll(7)`. It stays the same while the
    /// stream exists, and must not be read from.
    ///
    /// The rule: after `try_recv` has returned `Empty`, wait until the descriptor is readable. Then
    /// call `try_recv` until it returns `Empty` again, or until the stream has ended.
    ///
    /// While the queue is [handed over](VerdictSink::hand_over), the descriptor may be readable
    /// although `try_recv` returns `Empty`: wait for the end of the hand-over instead.
    ///
    /// It is created at the first call and covers the socket, the packets that were received for
    /// another reason (a [`confirm`](VerdictSink::confirm), a deadline), and the end of the stream,
    /// also if another handle closes the queue or hands it over. It costs two more descriptors.
    ///
    /// # Errors
    /// The process or the system has no free descriptor.
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.shared.readable_fd()
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The queue's number.
    pub fn queue_number(&self) -> u16 {
        self.shared.number()
    }
}

fn handed_out(Received { packet, guard }: Received) -> Packet {
    Packet::new(packet, guard)
}

/// | state | what a poll does |
/// |---|---|
/// | a packet has been received | return it |
/// | the queue has failed | return the error |
/// | the queue is closing | end |
/// | the socket may be readable | receive, and start again |
/// | the socket was found empty | ask the flush policy |
/// | the socket is not readable | look once more if busy polling is active (see [`busy_poll`](crate::QueueBuilder::busy_poll)), then wait |
impl Stream for PacketStream {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let coop = ready!(coop::poll_proceed(cx));
        let result = self.shared.poll_packet(cx).map(|item| item.map(|received| received.map(handed_out)));
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
