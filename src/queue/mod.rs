//! The queue, and its receiving half.

use std::{
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use futures::{Stream, stream::FusedStream};
use tokio::task::coop;

use crate::{Action, Error, ErrorKind, Packet, QueueBuilder, Stats, VerdictSink};

mod binding;
mod busy_poll;
mod closing;
mod driver;
mod inbox;
mod limits;
mod outbox;
mod shared;
mod times;

use inbox::RECEIVE_BATCH;
pub(crate) use shared::{Extra, Settings, Shared};
use shared::{Phase, lock};

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

    /// As [`close`](Self::close), with another answer for unread packets: see [`VerdictSink::close_with`].
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
/// Its items are packets, and errors:
/// * what the kernel refused (`NotPermitted` where the process has lost its capability, with the packet's id where the
///   kernel tells it) and messages that could not be understood: the stream goes on;
/// * an error of the socket or the end of the runtime (`NoRuntime`): the stream ends.
///
/// Overload is no error: packets lost are counted in [`Stats::lost`], and the stream goes on. `None` comes only after the queue
/// was closed, or after an error that ends it.
///
/// Dropping it ends the queue: see [`Queue`].
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
                let mut inbox = lock(&self.shared.inbox);
                let more = inbox.packets.len().min(limit - 1);
                packets.extend(inbox.packets.drain(..more).map(|packet| packet.claimed(Arc::clone(&self.shared))));
                Ok(1 + more)
            }
        }
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
        self.shared.abandon();
    }
}

impl fmt::Debug for PacketStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketStream").field("queue", &self.shared.number()).finish_non_exhaustive()
    }
}

impl Shared {
    fn poll_packet(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Packet, Error>>> {
        let mut looked = false;
        loop {
            let mut inbox = lock(&self.inbox);
            if let Some(packet) = inbox.packets.pop_front() {
                drop(inbox);
                return Poll::Ready(Some(Ok(packet.claimed(Arc::clone(self)))));
            }
            {
                let mut core = self.core();
                if let Some(error) = core.errors.pop_front() {
                    return Poll::Ready(Some(Err(error)));
                }
                if core.phase != Phase::Open {
                    return Poll::Ready(None);
                }
                if core.stream.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    core.stream = Some(cx.waker().clone());
                }
            }
            let ready = match self.socket.poll_readable(cx) {
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
            match self.receive(&mut inbox, most) {
                Ok(true) => {
                    if let Some(mut ready) = ready {
                        ready.clear_ready();
                    }
                    if inbox.packets.is_empty() {
                        drop(inbox);
                        let next = self.core().consult(crate::Occasion::Drained);
                        self.proceed(next);
                    }
                    looked = true;
                }
                Ok(false) => {}
                Err(source) => return Poll::Ready(Some(Err(Error::os("receive packet", source).fatal()))),
            }
        }
    }

    pub(crate) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut core = self.core();
        if core.all_sent() {
            return Poll::Ready(());
        }
        core.flush_wanted = true;
        core.wait(cx.waker());
        drop(core);
        // The waker is in place: whoever is sending meanwhile wakes it when done.
        if self.flush() || self.core().all_sent() { Poll::Ready(()) } else { Poll::Pending }
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
}

/// Has the task polled again when the runtime has run what else is ready and has looked for I/O. Beside the readiness that
/// is waited for, not in its place: the runtime may lose such a wish (one of a task within the root future, when
/// `block_on` returns).
fn poll_again(cx: &mut Context<'_>) {
    let polled = pin!(tokio::task::yield_now()).poll(cx);
    debug_assert!(polled.is_pending(), "it yields once");
}
