//! Several queues as one.

use std::{
    fmt,
    ops::RangeInclusive,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    Sink, Stream,
    future::join_all,
    stream::{FusedStream, select_all},
};

use crate::{Error, ErrorKind, Packet, PacketStream, Queue, QueueBuilder, Stats, Verdict, VerdictSink};

/// Several queues, as a rule with `queue num 0-3` (queue-balance) feeds them: one fair stream of packets and one sink, or one
/// queue for each task.
///
/// The kernel balances by a hash of the addresses, not of the ports, so that a flow stays in one queue; with `fanout` it goes
/// by the CPU instead.
///
/// ```no_run
/// use futures::StreamExt;
/// use tokio_nfqueue::QueueGroup;
///
/// # async fn example() -> Result<(), tokio_nfqueue::Error> {
/// let (mut packets, verdicts) = QueueGroup::bind(0..=3, |builder| builder.max_len(4096))?.split();
/// while let Some(packet) = packets.next().await {
///     verdicts.submit(packet?.accept())?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// Errors, ends and drops are as with the [`Queue`]s it is made of. The stream ends when the last queue's has.
#[derive(Debug)]
pub struct QueueGroup {
    streams: GroupStream,
    sink: GroupSink,
}

impl QueueGroup {
    /// Binds every queue of a range, each with the settings that `settings` gives it. If one cannot be bound, none stays bound.
    ///
    /// # Errors
    /// [`InvalidInput`](ErrorKind::InvalidInput) if the range is empty. Otherwise as
    /// [`QueueBuilder::bind`], for the first queue that fails.
    ///
    /// # Panics
    /// As [`QueueBuilder::bind`].
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
        (self.streams, self.sink)
    }

    /// A sink for the verdicts of all the queues.
    pub fn sink(&self) -> GroupSink {
        self.sink.clone()
    }

    /// The queues one by one, for a task each.
    pub fn into_queues(self) -> Vec<Queue> {
        self.streams
            .streams
            .into_iter()
            .zip(self.sink.sinks)
            .map(|(stream, sink)| Queue::from_halves(stream, sink))
            .collect()
    }

    /// Receives a packet of any of the queues.
    ///
    /// # Errors
    /// As [`PacketStream`]'s items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        self.streams.recv().await
    }

    /// Ends all the queues: see [`GroupSink::close_within`].
    ///
    /// # Errors
    /// As [`GroupSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_within(self, timeout: Duration) -> Result<(), Error> {
        self.sink.close_within(timeout).await
    }

    /// Ends all the queues: see [`GroupSink::close`].
    ///
    /// # Errors
    /// As [`GroupSink::close`].
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close(self) -> Result<(), Error> {
        self.sink.close().await
    }
}

/// Of queues bound one by one, of any numbers. The stream of a group of no queues ends at once.
impl FromIterator<Queue> for QueueGroup {
    fn from_iter<I: IntoIterator<Item = Queue>>(queues: I) -> Self {
        let (streams, sinks) = queues.into_iter().map(Queue::split).unzip();
        Self { streams: GroupStream { streams, turn: 0, given: 0 }, sink: GroupSink { sinks } }
    }
}

impl Stream for QueueGroup {
    type Item = Result<Packet, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.streams).poll_next(cx)
    }
}

impl FusedStream for QueueGroup {
    fn is_terminated(&self) -> bool {
        self.streams.is_terminated()
    }
}

/// The receiving half of a [`QueueGroup`]: the queues' packets, from each in turn. [`Packet::queue`] tells whose it is.
#[derive(Debug)]
pub struct GroupStream {
    streams: Vec<PacketStream>,
    /// Whose turn it is, and how many packets it has given in this turn.
    turn: usize,
    given: usize,
}

/// Packets a queue gives before it is the next one's turn: as many as one round of receiving brings, so that looking at
/// the others, most of them empty, is not paid for each packet.
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
                    self.given = if offset == 0 { self.given + 1 } else { 1 };
                    self.turn = index;
                    if self.given == TURN {
                        (self.turn, self.given) = ((index + 1) % count, 0);
                    }
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

/// Takes the verdicts of a [`QueueGroup`], each for its packet's own queue. Clone it freely, as a [`VerdictSink`].
#[derive(Clone)]
pub struct GroupSink {
    sinks: Vec<VerdictSink>,
}

impl GroupSink {
    /// Gives a verdict; as [`VerdictSink::submit`].
    ///
    /// # Errors
    /// As [`VerdictSink::submit`].
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        // A verdict knows its queue.
        crate::sink::submit(verdict)
    }

    /// Gives a verdict and awaits the kernel's acknowledgement; as [`VerdictSink::confirm`].
    ///
    /// # Errors
    /// As [`VerdictSink::confirm`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::confirm`].
    pub fn confirm(&self, verdict: Verdict) -> crate::Confirm {
        crate::sink::confirm(verdict)
    }

    /// Sends everything gathered, of all the queues.
    ///
    /// # Errors
    /// As [`VerdictSink::flush`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::flush`].
    pub async fn flush(&self) -> Result<(), Error> {
        join_all(self.sinks.iter().map(VerdictSink::flush)).await.into_iter().collect()
    }

    /// Ends all the queues at once, each as [`VerdictSink::close`] does.
    ///
    /// # Errors
    /// The first queue's that has one. Every queue is closed regardless.
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close(&self) -> Result<(), Error> {
        join_all(self.sinks.iter().map(VerdictSink::close)).await.into_iter().collect()
    }

    /// As [`close`](Self::close), and waits for owed verdicts for `timeout` at most; as [`VerdictSink::close_within`].
    ///
    /// # Errors
    /// The first queue's that has one. Every queue is closed regardless.
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_within(&self, timeout: Duration) -> Result<(), Error> {
        join_all(self.sinks.iter().map(|sink| sink.close_within(timeout))).await.into_iter().collect()
    }

    /// The refusals of all the queues; as [`VerdictSink::refusals`]. It ends when all queues are closed.
    pub fn refusals(&self) -> impl FusedStream<Item = Error> + Send + Unpin + use<> {
        select_all(self.sinks.iter().map(VerdictSink::refusals))
    }

    /// The queues' own sinks, in the order of the queues: for settings and statistics of one.
    pub fn queues(&self) -> &[VerdictSink] {
        &self.sinks
    }

    /// Each queue's number and counters.
    pub fn stats(&self) -> impl Iterator<Item = (u16, Stats)> {
        self.sinks.iter().map(|sink| (sink.queue(), sink.stats()))
    }
}

impl fmt::Debug for GroupSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.sinks).finish()
    }
}

/// As [`VerdictSink`]'s: always ready until closed; closing flushes and closes this clone alone.
impl Sink<Verdict> for GroupSink {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_all(|sink| sink.poll_ready(cx))
    }

    fn start_send(mut self: Pin<&mut Self>, verdict: Verdict) -> Result<(), Error> {
        match self.sinks.first_mut() {
            // Any of them passes it on to its queue, and knows whether this clone is closed.
            Some(sink) => Pin::new(sink).start_send(verdict),
            None => self.submit(verdict),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_all(|sink| sink.poll_flush(cx))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_all(|sink| sink.poll_close(cx))
    }
}

impl GroupSink {
    fn poll_all(
        &mut self,
        mut poll: impl FnMut(Pin<&mut VerdictSink>) -> Poll<Result<(), Error>>,
    ) -> Poll<Result<(), Error>> {
        let mut all = Poll::Ready(Ok(()));
        for sink in &mut self.sinks {
            match poll(Pin::new(sink)) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => all = Poll::Pending,
            }
        }
        all
    }
}
