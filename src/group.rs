//! Several queues as one.

use std::{
    future::Future,
    ops::RangeInclusive,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::OnceLock,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream::FusedStream};

use crate::{
    advice::Advice,
    builder::QueueBuilder,
    group_sink::GroupSink,
    handover::Handover,
    io::{AnyReadyFd, kernel::KernelStats},
    packet::Packet,
    queue::{PacketStream, Queue},
    reconfigure::Reconfigure,
    types::{Action, Error, ErrorKind, Stats, TryRecvError},
    verdict::{Confirm, Verdict},
};

/// Several queues, as a rule with `queue num 0-3` (queue-balance) feeds them: one fair stream of
/// packets and one sink, or one queue for each task.
///
/// The kernel balances by a hash of the addresses without the ports, so that a flow stays in one
/// queue. With `fanout` it balances by CPU.
///
/// ```no_run
/// use futures::TryStreamExt;
/// use tokio_nfqueue::{Queue, QueueGroup};
///
/// # async fn example() -> Result<(), tokio_nfqueue::Error> {
/// let mut queues = QueueGroup::bind(0..=3, |builder| builder.max_len(4096))?;
/// while let Some(packet) = queues.try_next().await? {
///     packet.accept().submit()?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// It has the methods of a [`Queue`]; errors, graceful shutdown and drops are the same as well. The
/// stream ends when the streams of all queues have ended.
#[derive(Debug)]
pub struct QueueGroup {
    stream: GroupStream,
    sink: GroupSink,
}

impl QueueGroup {
    /// Binds every queue of a range, each with the settings that `settings` returns. If one cannot
    /// be bound, none stays bound.
    ///
    /// # Errors
    /// [`InvalidInput`](ErrorKind::InvalidInput) if the range is empty. Otherwise as
    /// [`QueueBuilder::bind`], for the first queue that fails.
    pub fn bind(
        queues: RangeInclusive<u16>,
        mut settings: impl FnMut(QueueBuilder) -> QueueBuilder,
    ) -> Result<Self, Error> {
        if queues.is_empty() {
            let operation = format!("bind queue group {queues:?}");
            return Err(Error::new(ErrorKind::InvalidInput, operation).with_detail("the range is empty"));
        }
        queues.map(|queue| settings(Queue::builder(queue)).bind()).collect()
    }

    /// The two halves.
    pub fn split(self) -> (GroupStream, GroupSink) {
        (self.stream, self.sink)
    }

    /// A sink for the verdicts of all queues.
    pub fn sink(&self) -> GroupSink {
        self.sink.clone()
    }

    /// The queues one by one, for one task each.
    pub fn into_queues(self) -> Vec<Queue> {
        let halves = self.stream.streams.into_iter().zip(self.sink.sinks);
        halves.map(|(stream, sink)| Queue::from_halves(stream, sink)).collect()
    }

    /// Receives a packet of any of the queues: see [`GroupStream::recv`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        self.stream.recv().await
    }

    /// Receives several packets: see [`GroupStream::recv_many`].
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, Error> {
        self.stream.recv_many(packets, limit).await
    }

    /// Takes a packet of any of the queues if there is one: see [`GroupStream::try_recv`].
    ///
    /// # Errors
    /// As [`GroupStream::try_recv`].
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        self.stream.try_recv()
    }

    /// A descriptor for other event loops: see [`GroupStream::readable_fd`].
    ///
    /// # Errors
    /// As [`PacketStream::readable_fd`].
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.stream.readable_fd()
    }

    /// Begins to hand all queues over to another process: see [`GroupSink::hand_over`].
    ///
    /// # Errors
    /// As [`GroupSink::hand_over`].
    ///
    /// # Cancel safety
    /// As [`GroupSink::hand_over`].
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        self.sink.hand_over(within).await
    }

    /// Submits a verdict: see [`GroupSink::submit`].
    ///
    /// # Errors
    /// As [`GroupSink::submit`].
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        verdict.submit()
    }

    /// Submits a verdict and waits for the kernel's acknowledgement: see [`GroupSink::confirm`].
    ///
    /// # Errors
    /// As [`GroupSink::confirm`].
    ///
    /// # Cancel safety
    /// As [`GroupSink::confirm`].
    pub fn confirm(&self, verdict: Verdict) -> Confirm {
        verdict.confirm()
    }

    /// Sends all gathered verdicts: see [`GroupSink::flush`].
    ///
    /// # Errors
    /// As [`GroupSink::flush`].
    ///
    /// # Cancel safety
    /// As [`GroupSink::flush`].
    pub async fn flush(&self) -> Result<(), Error> {
        self.sink.flush().await
    }

    /// Errors that concern one verdict or message: see [`GroupSink::refusals`].
    pub fn refusals(&self) -> impl FusedStream<Item = Error> + Send + Unpin + use<> {
        self.sink.refusals()
    }

    /// Closes all queues: see [`GroupSink::close`].
    ///
    /// # Errors
    /// As [`GroupSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close(self) -> Result<(), Error> {
        self.sink.close().await
    }

    /// Closes all queues: see [`GroupSink::close_within`].
    ///
    /// # Errors
    /// As [`GroupSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_within(self, timeout: Duration) -> Result<(), Error> {
        self.sink.close_within(timeout).await
    }

    /// Closes all queues: see [`GroupSink::close_with`].
    ///
    /// # Errors
    /// As [`GroupSink::close_with`].
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_with(self, action: Action) -> Result<(), Error> {
        self.sink.close_with(action).await
    }

    /// Changes settings of all queues: see [`GroupSink::reconfigure`].
    ///
    /// # Errors
    /// As [`GroupSink::reconfigure`].
    ///
    /// # Cancel safety
    /// As [`GroupSink::reconfigure`].
    #[must_use = "the change has been sent, but only the future returns the kernel's reply"]
    pub fn reconfigure(&self, change: &Reconfigure) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.sink.reconfigure(change)
    }

    /// Each queue's number and counters.
    pub fn stats(&self) -> impl Iterator<Item = (u16, Stats)> {
        self.sink.stats()
    }

    /// Each queue's number and counters at a fixed interval: see [`GroupSink::watch`].
    ///
    /// # Errors
    /// As [`GroupSink::watch`].
    pub fn watch(
        &self,
        every: Duration,
    ) -> Result<impl FusedStream<Item = (u16, Stats)> + Send + Unpin + use<>, Error> {
        self.sink.watch(every)
    }

    /// Each queue's number and the kernel's own counters: see [`GroupSink::kernel_stats`].
    ///
    /// # Errors
    /// As [`GroupSink::kernel_stats`].
    pub fn kernel_stats(&self) -> Result<Vec<(u16, KernelStats)>, Error> {
        self.sink.kernel_stats()
    }

    /// Which limits have cost packets so far, each with its queue's number: see
    /// [`GroupSink::advice`].
    pub fn advice(&self) -> Vec<(u16, Advice)> {
        self.sink.advice()
    }

    /// Whether all queues are closing or closed.
    pub fn is_closed(&self) -> bool {
        self.sink.is_closed()
    }
}

/// Makes a group of queues that were bound one by one, of any numbers. The stream of a group
/// without queues ends at once.
impl FromIterator<Queue> for QueueGroup {
    fn from_iter<I: IntoIterator<Item = Queue>>(queues: I) -> Self {
        let (streams, sinks) = queues.into_iter().map(Queue::split).unzip();
        Self { stream: GroupStream { streams, turn: 0, given: 0, ready: OnceLock::new() }, sink: GroupSink { sinks } }
    }
}

impl Stream for QueueGroup {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(cx)
    }
}

impl FusedStream for QueueGroup {
    fn is_terminated(&self) -> bool {
        self.stream.is_terminated()
    }
}

/// The receive half of a [`QueueGroup`]: the packets of all queues, taken from each queue in turn.
/// [`Packet::queue_number`] is the number of a packet's queue.
#[derive(Debug)]
pub struct GroupStream {
    streams: Vec<PacketStream>,
    /// Whose turn it is, and how many packets that queue has given in this turn.
    turn: usize,
    given: usize,
    /// Made at the first use.
    ready: OnceLock<AnyReadyFd>,
}

/// Packets that a queue gives before it is the next queue's turn: as many as one round of receiving
/// brings, so that the cost of polling the other queues is not paid for each packet.
const TURN: usize = 64;

impl GroupStream {
    /// Receives a packet of any of the queues.
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Waits for a packet, then appends what has been received already, up to `limit` packets in
    /// all, to `packets`. Returns their number; 0 means that all queues have ended, or that `limit`
    /// is 0.
    ///
    /// # Errors
    /// As [`PacketStream`]'s items; then nothing has been appended.
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
                let mut count = 1;
                for stream in &mut self.streams {
                    count += stream.take_received(packets, limit - count);
                }
                Ok(count)
            }
        }
    }

    /// Takes a packet of any of the queues if there is one: see [`PacketStream::try_recv`].
    ///
    /// # Errors
    /// * `Empty`: there is no packet in any queue.
    /// * `Closed`: all queues are closed.
    /// * `Failed`: as an `Err` item of the stream.
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        let count = self.streams.len();
        let mut closed = 0;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            match self.streams[index].try_recv() {
                Ok(packet) => {
                    self.took(index, offset);
                    return Ok(packet);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Closed) => closed += 1,
                Err(TryRecvError::Failed(error)) => return Err(TryRecvError::Failed(error)),
            }
        }
        Err(if closed == count { TryRecvError::Closed } else { TryRecvError::Empty })
    }

    /// A descriptor that is readable when [`try_recv`](Self::try_recv) may have a packet; used like
    /// [`PacketStream::readable_fd`]. It costs two more descriptors for each queue, and one for the
    /// group.
    ///
    /// # Errors
    /// As [`PacketStream::readable_fd`].
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        if self.ready.get().is_none() {
            let ready = AnyReadyFd::new().map_err(|source| Error::os("create a descriptor", source))?;
            for stream in &self.streams {
                ready.add(stream.readable_fd()?).map_err(|source| Error::os("create a descriptor", source))?;
            }
            return Ok(self.ready.get_or_init(|| ready).fd());
        }
        self.ready.get().map(AnyReadyFd::fd).ok_or_else(|| Error::new(ErrorKind::Closed, "create a descriptor"))
    }

    /// The packet came from the queue at `index`, which is `offset` behind the one whose turn it
    /// was.
    fn took(&mut self, index: usize, offset: usize) {
        self.given = if offset == 0 { self.given + 1 } else { 1 };
        self.turn = index;
        if self.given == TURN {
            (self.turn, self.given) = ((index + 1) % self.streams.len(), 0);
        }
    }
}

impl Stream for GroupStream {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let count = self.streams.len();
        let mut ended = 0;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            match Pin::new(&mut self.streams[index]).poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    self.took(index, offset);
                    return Poll::Ready(Some(item));
                }
                Poll::Ready(None) => ended += 1,
                Poll::Pending => {}
            }
        }
        if ended == count { Poll::Ready(None) } else { Poll::Pending }
    }
}

impl FusedStream for GroupStream {
    fn is_terminated(&self) -> bool {
        self.streams.iter().all(FusedStream::is_terminated)
    }
}
