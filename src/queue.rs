//! The queue.

use std::{
    ops::RangeInclusive,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream::FusedStream};

#[cfg(feature = "divert")]
use crate::divert::Divert;
#[cfg(feature = "handover")]
use crate::handover::Handover;
use crate::{
    io::Shared,
    numbers::QueueNumbers,
    packet::Packet,
    rules::Rules,
    sink::VerdictSink,
    stream::PacketStream,
    types::{Action, Error, Stats, TryRecvError},
};

/// A bound queue, of one number or of several: a stream of packets, and a sink for their verdicts.
///
/// ```no_run
/// use tokio_nfqueue::Queue;
///
/// # async fn example() -> Result<(), tokio_nfqueue::Error> {
/// let mut queue = Queue::builder(0).bind().await?;
/// while let Some(packet) = queue.recv().await.transpose()? {
///     packet.accept().submit()?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// Use it as a whole, or [`split`](Self::split) it into a [`PacketStream`] and a [`VerdictSink`].
/// It has the most used methods of both; for the others there is [`sink`](Self::sink).
///
/// Several numbers are for a rule that balances its packets among them (`queue num 0-3`). The
/// kernel balances by a hash of the addresses without the ports, so that a connection stays in one
/// queue; with `fanout` it balances by CPU. For a task each, use [`PacketStream::into_each`].
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
    /// The first number that no socket has bound.
    ///
    /// The kernel reports only by refusing which numbers are bound, so each is tried, from 0.
    /// [`queue_number`](crate::VerdictSink::queue_number) says which it is.
    pub const ANY: QueueNumbers = QueueNumbers::any(1);

    /// The first `count` numbers in a row that no socket has bound, for a rule that balances among
    /// them. [`queue_numbers`](crate::VerdictSink::queue_numbers) says which they are.
    pub const fn any(count: u16) -> QueueNumbers {
        QueueNumbers::any(count)
    }

    /// At least one queue, in the order of their numbers.
    pub(crate) fn new(queues: Vec<Arc<Shared>>, rules: Option<Arc<Rules>>) -> Self {
        Self { stream: PacketStream::new(&queues, rules.clone()), sink: VerdictSink::new(queues.into(), rules) }
    }

    /// The queue's own [rules](crate::QueueBuilder::divert), if it has some: see
    /// [`VerdictSink::divert`].
    #[cfg(feature = "divert")]
    pub fn divert(&self) -> Option<Divert> {
        self.sink.divert()
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
    #[cfg(feature = "handover")]
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        self.sink.hand_over(within).await
    }

    /// The counters: see [`VerdictSink::stats`].
    pub fn stats(&self) -> Stats {
        self.sink.stats()
    }

    /// A descriptor for other event loops, in a runtime that need not be driven: see
    /// [`PacketStream::readable_fd`], which has an example.
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

    /// The number; the first, if there are several.
    pub fn queue_number(&self) -> u16 {
        self.sink.queue_number()
    }

    /// The numbers.
    pub fn queue_numbers(&self) -> RangeInclusive<u16> {
        self.sink.queue_numbers()
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
