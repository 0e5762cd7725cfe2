//! The sink for verdicts.

use std::{
    fmt,
    future::Future,
    ops::RangeInclusive,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Sink, Stream, future::join_all, stream::FusedStream};

#[cfg(feature = "divert")]
use crate::divert::Divert;
#[cfg(feature = "handover")]
use crate::handover::Handover;
use crate::{
    advice::{Advice, advise},
    io::{Shared, kernel::KernelStats},
    reconfigure::Reconfigure,
    rules::{How, Rules},
    types::{Action, Error, ErrorKind, Stats},
    verdict::Verdict,
};

/// Takes the verdicts of a queue. Clones are independent and may be used in any task or thread.
///
/// Most programs submit with [`Verdict::submit`], which needs no sink. The queue's
/// [`FlushPolicy`](crate::FlushPolicy) decides when the verdict is sent to the kernel. As a
/// [`Sink`], `feed` and `forward` let the policy gather verdicts too, while `SinkExt::send` flushes
/// after each verdict.
///
/// Within one flush the verdicts are sent in the order of the packets' ids, whatever the order in
/// which they were submitted. If the order in which packets are released matters, flush in between.
///
/// If the queue has several numbers, each method concerns all of them; [`each`](Self::each) returns
/// a sink for each number.
#[derive(Clone)]
pub struct VerdictSink {
    /// At least one, in the order of their numbers.
    queues: Arc<[Arc<Shared>]>,
    closed: bool,
    /// The rounds of sending that `Sink::poll_flush` waits for, after its first call.
    flushing: Vec<Option<u64>>,
    /// Of a sink for all numbers.
    rules: Option<Arc<Rules>>,
}

impl VerdictSink {
    pub(crate) fn new(queues: Arc<[Arc<Shared>]>, rules: Option<Arc<Rules>>) -> Self {
        Self { queues, closed: false, flushing: Vec::new(), rules }
    }

    /// The queue's own [rules](crate::QueueBuilder::divert), if it has some.
    #[cfg(feature = "divert")]
    pub fn divert(&self) -> Option<Divert> {
        self.rules.as_ref().map(|rules| rules.divert())
    }

    /// A sink for each number of the queue, in their order: to read the counters of one number, or
    /// to close it alone. These sinks do not concern the queue's own rules.
    pub fn each(&self) -> impl Iterator<Item = Self> {
        self.queues.iter().map(|queue| Self::new([Arc::clone(queue)].into(), None))
    }

    /// Sends all gathered verdicts, whichever clone submitted them. Resolves when that has been
    /// done or tried: refused verdicts are reported by [`refusals`](Self::refusals), and verdicts
    /// of a failed send are sent later.
    ///
    /// # Cancel safety
    /// Cancel safe: once this has been polled, the verdicts are sent.
    pub async fn flush(&self) {
        join_all(self.queues.iter().map(|queue| {
            let mut round = None;
            std::future::poll_fn(move |cx| queue.poll_flush(&mut round, cx))
        }))
        .await;
    }

    /// As [`flush`](Self::flush), but does not wait: it sends what is gathered, or leaves it to a
    /// thread that is sending at this time. For programs without `await`.
    pub fn flush_now(&self) {
        self.queues.iter().for_each(|queue| queue.flush_gathered());
    }

    /// Errors that concern one verdict or one message and do not end the queue: verdicts that the
    /// kernel refused, verdicts for packets that had already been decided, and malformed messages.
    /// Each has its packet's id, if that is known. The kind is `NotPermitted`, `Expired`,
    /// `Malformed`, that of the kernel's error, or `InvalidInput` for a verdict whose message is
    /// longer than the socket's send buffer allows. A packet that had already left the queue is not
    /// an error: it is counted in
    /// [`Sent::gone_at_least`](crate::stats::Sent::gone_at_least), and
    /// [`confirm`](Verdict::confirm) reports it as `PacketGone`.
    ///
    /// What the kernel refuses because the capability is missing is reported when the socket is
    /// read next: while no task polls the stream, 250 ms after the verdict was sent at the latest.
    ///
    /// A refused verdict that was submitted by [`confirm`](Verdict::confirm) is reported there
    /// instead. Reading is optional: 1024 errors are kept; then the oldest are discarded and
    /// counted in [`Sent::refusals_unread`](crate::stats::Sent::refusals_unread). If there are
    /// several such streams, each error goes to one of them. The stream ends when the queue is
    /// closed and every packet that was handed out has been decided or dropped: verdicts for
    /// packets that the closing queue has decided are reported, too. It does not keep the queue
    /// open.
    pub fn refusals(&self) -> Refusals {
        Refusals { queues: Arc::clone(&self.queues), ended: false }
    }

    /// Closes the queue without losing a packet: a graceful shutdown. No new packet is queued,
    /// unread packets get the [default action](crate::QueueBuilder::on_unanswered), the verdicts
    /// that tasks still owe are awaited (for [`close_timeout`](crate::QueueBuilder::close_timeout)
    /// at most), then the queue is unbound. The stream ends.
    ///
    /// Packets that arrive meanwhile are accepted if the default action is [`Action::Accept`]. With
    /// any other action they are dropped until the queue is unbound. After that the rule drops
    /// them, or accepts them with `bypass`. With `Accept`, and `bypass` in the rule, a shutdown
    /// under load loses no packet.
    ///
    /// It ends in time in any executor, even if the queue's runtime has ended or is not driven. It
    /// may be called several times, by clones and concurrently: each call waits for the end, and
    /// the shortest time-out counts.
    ///
    /// During a [hand-over](Self::hand_over) it begins when the queue continues here, and returns
    /// `Ok` if the queue goes to the successor. The hand-over then waits for verdicts until the
    /// time-out at most, but how long a [`Handover`] exists is up to the program.
    ///
    /// # Errors
    /// The first caller that waits gets the error:
    /// * `TimedOut`: packets were still undecided after the time-out. They got the default action.
    /// * `Other`: the queue has rules of its own, and no thread can be started to end them. Nothing
    ///   is closed then.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN`. A thread of the runtime continues the
    ///   shutdown if it has the capability. Otherwise the kernel drops what is queued when the last
    ///   handle is dropped.
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close(&self) -> Result<(), Error> {
        self.close_all(|queue| (queue.on_unanswered(), queue.close_timeout())).await
    }

    /// As [`close`](Self::close), but waits for `timeout` at most instead of
    /// [`close_timeout`](crate::QueueBuilder::close_timeout). With zero, packets that are still
    /// undecided get the default action at once.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_within(&self, timeout: Duration) -> Result<(), Error> {
        self.close_all(move |queue| (queue.on_unanswered(), timeout)).await
    }

    /// As [`close`](Self::close), but with another action for unread packets and for those that are
    /// still undecided after the time-out.
    ///
    /// Packets that arrive meanwhile are accepted if the action is [`Action::Accept`], and dropped
    /// otherwise, because the kernel does not queue them. So `Stop` and `Requeue` apply only to
    /// packets that are already queued.
    ///
    /// # Errors
    /// As [`close`](Self::close); `InvalidInput` for [`Action::Repeat`] and for a requeue to the
    /// same queue.
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_with(&self, action: Action) -> Result<(), Error> {
        for queue in self.queues.iter().map(|queue| queue.number()) {
            let refused =
                |detail| Error::new(ErrorKind::InvalidInput, format!("close queue {queue}")).with_detail(detail);
            action.check_default(queue).map_err(refused)?;
        }
        self.close_all(move |queue| (action, queue.close_timeout())).await
    }

    /// Ends a queue that has failed: as [`close`](Self::close), but rules that fail closed stay.
    pub(crate) async fn close_after_failure(&self) {
        if self.rules.as_ref().is_some_and(|rules| rules.fail_closed()) {
            let closing = self.queues.iter().map(|queue| queue.close(queue.on_unanswered(), queue.close_timeout()));
            join_all(closing).await;
        } else {
            let _ = self.close().await;
        }
    }

    /// Closes all numbers at the same time. Returns the first error.
    async fn close_all(&self, how: impl Fn(&Shared) -> How + Send + 'static) -> Result<(), Error> {
        if let Some(rules) = &self.rules {
            return rules.close(how).await;
        }
        let closing = self.queues.iter().map(|queue| {
            let (action, timeout) = how(queue);
            queue.close(action, timeout)
        });
        join_all(closing).await.into_iter().collect()
    }

    /// Begins to hand the queue over to another process: a restart that loses no packet and decides
    /// none twice.
    ///
    /// From now on the stream returns no packet: what is not read waits in the kernel. The verdicts
    /// that tasks owe are awaited, for `within` at most. Packets that are still undecided then get
    /// the [default action](crate::QueueBuilder::on_unanswered), as by [`close`](Self::close),
    /// because their bytes are only here; a verdict for them that comes later is `Expired`. Then
    /// everything that was decided is sent, and the future resolves. The [`Handover`] says what to
    /// do next; if it is dropped, the queue continues here, and the stream returns packets again.
    ///
    /// While tasks decide, the loop that reads the stream may wait for this future: packets that it
    /// has taken from the stream and holds itself are owed as well.
    ///
    /// # Errors
    /// The queue continues here:
    /// * `Closed`: the queue is closing or closed.
    /// * `InvalidInput`: it is being handed over already.
    /// * `TimedOut`: verdicts cannot be sent, because the capability is missing or the kernel is
    ///   out of memory.
    /// * The kind of the failure, if the queue fails meanwhile.
    ///
    /// # Cancel safety
    /// If the future is dropped, the queue continues here.
    #[cfg(feature = "handover")]
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        let frozen = join_all(self.queues.iter().map(|queue| queue.hand_over(within))).await;
        let handover = frozen.into_iter().collect::<Result<_, _>>().map(Handover::new)?;
        match &self.rules {
            Some(rules) => rules.go_with(handover).await,
            None => Ok(handover),
        }
    }

    /// Changes settings while the queue runs, in one message that the kernel applies or refuses as
    /// a whole. No packet is lost. If the receive buffer has its default size, it grows with a
    /// longer queue or copy range. A receive buffer that is requested is set before the message is
    /// sent.
    ///
    /// The message is sent by this call; the future resolves when the kernel has replied. The reply
    /// arrives in the socket behind the packets that wait there. The future receives these too, up
    /// to 128 each time it is polled, and the stream returns them. If the reply is lost, the
    /// message is sent again.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change.
    /// * `Unsupported`: this kernel does not support a setting; the error names it.
    /// * `NotPermitted`: the calling thread has no `CAP_NET_ADMIN`.
    /// * `Unconfirmed`: the reply was lost repeatedly because the receive buffer was full. The
    ///   change may have been applied.
    /// * `Closed`: the queue is closing or closed, or it is being [handed over](Self::hand_over).
    ///
    /// # Cancel safety
    /// If the future is dropped, the change stays; only its confirmation is lost.
    #[must_use = "the change has been sent, but only the future returns the kernel's reply"]
    pub fn reconfigure(&self, change: &Reconfigure) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let changes = join_all(self.queues.iter().map(|queue| queue.reconfigure(change.changes())));
        async move { changes.await.into_iter().collect() }
    }

    /// The counters: the sum, if there are several numbers.
    pub fn stats(&self) -> Stats {
        self.queues.iter().map(|queue| queue.stats()).sum()
    }

    /// The kernel's own counters of the queue, from `/proc/net/netfilter/nfnetlink_queue` of the
    /// queue's network namespace, in whichever namespace the caller is. It makes one or two system
    /// calls.
    ///
    /// # Errors
    /// * `Closed`: the queue is not bound any more.
    /// * `Unsupported`: `/proc` was not mounted when the queue was bound.
    /// * `NotPermitted`: the file could not be opened when the queue was bound, or when it was
    ///   taken over and the predecessor had not opened it either. Its mode is 0440: only root of
    ///   the user namespace that owns the network namespace may read it, and processes with
    ///   `CAP_DAC_READ_SEARCH`. In a user namespace that was entered after its network namespace
    ///   was created, no process may.
    /// * Any other error of reading the file.
    pub fn kernel_stats(&self) -> Result<KernelStats, Error> {
        let mut all = self.queues[0].kernel_stats()?;
        for queue in &self.queues[1..] {
            all.add(&queue.kernel_stats()?);
        }
        Ok(all)
    }

    /// What has cost packets so far, and what to do about it: limits that were reached, and base
    /// chains or interfaces with which the kernel dropped queued packets. Empty if nothing has. If
    /// the kernel's counters cannot be read, an entry says so, because packets that found the queue
    /// full are then not seen.
    pub fn advice(&self) -> Vec<Advice> {
        let advice = |queue: &Arc<Shared>| {
            let kernel = queue.bound_kernel_stats().map_err(|error| error.raw_os_error());
            advise(&queue.stats(), kernel, queue.wanted_receive_buffer(), queue.dropped_while_queued())
        };
        self.queues.iter().flat_map(advice).collect()
    }

    /// Whether the queue is closing or closed, with all its numbers. Whether this clone is closed
    /// (`SinkExt::close`) does not count.
    pub fn is_closed(&self) -> bool {
        self.queues.iter().all(|queue| queue.is_closed())
    }

    /// The number; the first, if there are several.
    pub fn queue_number(&self) -> u16 {
        self.queues[0].number()
    }

    /// The numbers.
    pub fn queue_numbers(&self) -> RangeInclusive<u16> {
        self.queue_number()..=self.queues[self.queues.len() - 1].number()
    }
}

impl fmt::Debug for VerdictSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerdictSink").field("queues", &self.queue_numbers()).field("closed", &self.is_closed()).finish()
    }
}

/// Always ready: the number of gathered verdicts is limited by the packets in flight. `poll_close`
/// flushes and closes only this clone; the queue and the other clones stay open. To close the
/// queue, use [`VerdictSink::close`].
impl Sink<Verdict> for VerdictSink {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(if self.closed { Err(Error::new(ErrorKind::Closed, "submit verdict")) } else { Ok(()) })
    }

    fn start_send(self: Pin<&mut Self>, verdict: Verdict) -> Result<(), Error> {
        if self.closed {
            return Err(Error::new(ErrorKind::Closed, "submit verdict").with_packet(verdict.id()));
        }
        verdict.submit()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.flushing.resize(this.queues.len(), None);
        let mut all = Poll::Ready(Ok(()));
        for (queue, round) in this.queues.iter().zip(&mut this.flushing) {
            if queue.poll_flush(round, cx).is_pending() {
                all = Poll::Pending;
            }
        }
        all
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.closed = true;
        self.poll_flush(cx)
    }
}

/// Errors that concern one verdict or one message: see [`VerdictSink::refusals`].
#[must_use = "a stream does nothing unless it is polled"]
pub struct Refusals {
    queues: Arc<[Arc<Shared>]>,
    ended: bool,
}

impl Refusals {
    /// The next error; `None` when the queue is closed and no packet is held any more.
    ///
    /// # Cancel safety
    /// Cancel safe: no error is lost.
    pub async fn recv(&mut self) -> Option<Error> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Refusals {
    /// Takes an error if there is one. For programs without `await`.
    pub fn try_recv(&mut self) -> Option<Error> {
        self.queues.iter().find_map(|queue| queue.next_refusal())
    }
}

impl Stream for Refusals {
    type Item = Error;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Error>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut pending = false;
        for queue in self.queues.iter() {
            match queue.poll_refusal(cx) {
                Poll::Ready(Some(error)) => return Poll::Ready(Some(error)),
                Poll::Ready(None) => {}
                Poll::Pending => pending = true,
            }
        }
        if pending {
            return Poll::Pending;
        }
        self.ended = true;
        Poll::Ready(None)
    }
}

impl FusedStream for Refusals {
    fn is_terminated(&self) -> bool {
        self.ended
    }
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").field("queue", &self.queues[0].number()).finish_non_exhaustive()
    }
}
