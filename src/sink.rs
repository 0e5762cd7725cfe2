//! The sink for verdicts.

use std::{
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{
    Sink, Stream, StreamExt as _,
    future::{Either, select},
    stream::{self, FusedStream},
};

use crate::{
    advice::{Advice, advise},
    handover::Handover,
    io::{Shared, Ticks, kernel::KernelStats},
    reconfigure::Reconfigure,
    state::Clock,
    types::{Action, Error, ErrorKind, Stats},
    verdict::{Confirm, Verdict},
};

/// Takes the verdicts of a queue. Clones are independent and may be used in any task or thread.
///
/// [`submit`](Self::submit) needs no await; the queue's [`FlushPolicy`](crate::FlushPolicy) decides
/// when the verdict is sent to the kernel. As a [`Sink`], `feed` and `forward` let the policy
/// gather verdicts too, while `SinkExt::send` flushes after each verdict.
///
/// Within one flush the verdicts are sent in the order of the packets' ids, whatever the order in
/// which they were submitted. If the order in which packets are released matters, flush in between.
#[derive(Clone)]
pub struct VerdictSink {
    queue: Arc<Shared>,
    closed: bool,
    /// The round of sending that `Sink::poll_flush` waits for.
    flushing: Option<u64>,
}

impl VerdictSink {
    pub(crate) fn new(queue: Arc<Shared>) -> Self {
        Self { queue, closed: false, flushing: None }
    }

    /// Submits a verdict: see [`Verdict::submit`].
    ///
    /// # Errors
    /// As [`Verdict::submit`].
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        verdict.submit()
    }

    /// Submits a verdict and waits for the kernel's acknowledgement: see [`Verdict::confirm`].
    ///
    /// # Errors
    /// As [`Verdict::confirm`].
    ///
    /// # Cancel safety
    /// As [`Verdict::confirm`].
    pub fn confirm(&self, verdict: Verdict) -> Confirm {
        verdict.confirm()
    }

    /// Sends all gathered verdicts, whichever clone submitted them. Resolves when that has been
    /// done or tried: refused verdicts are reported by [`refusals`](Self::refusals), and verdicts
    /// of a failed send are sent later.
    ///
    /// # Errors
    /// Currently none.
    ///
    /// # Cancel safety
    /// Cancel safe: once this has been polled, the verdicts are sent.
    pub async fn flush(&self) -> Result<(), Error> {
        let mut round = None;
        std::future::poll_fn(|cx| self.queue.poll_flush(&mut round, cx)).await;
        Ok(())
    }

    /// Errors that concern one verdict or one message and do not end the queue: verdicts that the
    /// kernel refused, verdicts for packets that had already been decided, and malformed messages.
    /// Each has its packet's id, if that is known. The kind is `NotPermitted`, `Expired`,
    /// `Malformed`, that of the kernel's error, or `InvalidInput` for a verdict whose message is
    /// longer than the socket's send buffer allows. A packet that had already left the queue is not
    /// an error: it is counted in
    /// [`Sent::gone_at_least`](crate::stats::Sent::gone_at_least), and
    /// [`confirm`](Self::confirm) reports it as `PacketGone`.
    ///
    /// What the kernel refuses because the capability is missing is reported when the socket is
    /// read next: while no task polls the stream, 250 ms after the verdict was sent at the latest.
    ///
    /// A refused verdict that was submitted by [`confirm`](Self::confirm) is reported there
    /// instead. Reading is optional: 1024 errors are kept; then the oldest are discarded and
    /// counted in [`Sent::refusals_unread`](crate::stats::Sent::refusals_unread). If there are
    /// several such streams, each error goes to one of them. The stream ends when the queue is
    /// closed and every packet that was handed out has been decided or dropped: verdicts for
    /// packets that the closing queue has decided are reported, too. It does not keep the queue
    /// open.
    pub fn refusals(&self) -> Refusals {
        Refusals { queue: Arc::clone(&self.queue), ended: false }
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
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN`. A thread of the runtime continues the
    ///   shutdown if it has the capability. Otherwise the kernel drops what is queued when the last
    ///   handle is dropped.
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close(&self) -> Result<(), Error> {
        self.queue.close(self.queue.on_unanswered(), self.queue.close_timeout()).await
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
        self.queue.close(self.queue.on_unanswered(), timeout).await
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
        self.check_close_action(action)?;
        self.queue.close(action, self.queue.close_timeout()).await
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
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        self.queue.hand_over(within).await.map(Handover::new)
    }

    /// Refuses an action that would keep packets in the queue indefinitely.
    pub(crate) fn check_close_action(&self, action: Action) -> Result<(), Error> {
        let queue = self.queue_number();
        action
            .check_default(queue)
            .map_err(|detail| Error::new(ErrorKind::InvalidInput, format!("close queue {queue}")).with_detail(detail))
    }

    /// Changes settings while the queue runs, in one message that the kernel applies or refuses as
    /// a whole. No packet is lost. If the receive buffer has its default size, it grows with a
    /// longer queue or copy range.
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
        self.queue.reconfigure(change.config())
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.queue.stats()
    }

    /// The queue's counters at a fixed interval, until the queue is closed. The stream does not
    /// keep the queue open, and works in any executor.
    ///
    /// # Errors
    /// `InvalidInput` if `every` is zero; an error of the operating system if the timer thread
    /// cannot be started.
    pub fn watch(&self, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
        watch(&self.queue, every)
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
        self.queue.kernel_stats()
    }

    /// What has cost packets so far, and what to do about it: limits that were reached, and base
    /// chains or interfaces with which the kernel dropped queued packets. Empty if nothing has. If
    /// the kernel's counters cannot be read, an entry says so, because packets that found the queue
    /// full are then not seen.
    pub fn advice(&self) -> Vec<Advice> {
        let kernel = self.queue.bound_kernel_stats().map_err(|error| error.raw_os_error());
        advise(&self.stats(), kernel, self.queue.wanted_receive_buffer(), self.queue.dropped_while_queued())
    }

    /// Whether the queue is closing or closed.
    pub fn is_closed(&self) -> bool {
        self.closed || self.queue.is_closed()
    }

    /// The queue's number.
    pub fn queue_number(&self) -> u16 {
        self.queue.number()
    }
}

impl fmt::Debug for VerdictSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerdictSink").field("queue", &self.queue_number()).field("closed", &self.is_closed()).finish()
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
            return Err(Error::new(ErrorKind::Closed, "submit verdict").with_packet(verdict.packet_id()));
        }
        self.submit(verdict)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.queue.poll_flush(&mut this.flushing, cx).map(Ok)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.closed = true;
        self.poll_flush(cx)
    }
}

/// Errors that concern one verdict or one message: see [`VerdictSink::refusals`].
#[must_use = "a stream does nothing unless it is polled"]
pub struct Refusals {
    queue: Arc<Shared>,
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

impl Stream for Refusals {
    type Item = Error;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Error>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = ready!(self.queue.poll_refusal(cx));
        self.ended = item.is_none();
        Poll::Ready(item)
    }
}

impl FusedStream for Refusals {
    fn is_terminated(&self) -> bool {
        self.ended
    }
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").field("queue", &self.queue.number()).finish_non_exhaustive()
    }
}

fn watch(queue: &Arc<Shared>, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
    const OPERATION: &str = "watch statistics";
    if every.is_zero() {
        return Err(Error::new(ErrorKind::InvalidInput, OPERATION).with_detail("the interval is zero"));
    }
    let ticks = Ticks::new(queue.clock().clone()).map_err(|source| Error::os(OPERATION, source))?;
    let (may_be_closed, first) = (queue.may_be_closed(), queue.clock().now().checked_add(every));
    let start = (ticks, Arc::downgrade(queue), may_be_closed, first);
    let watch = stream::unfold(start, move |(ticks, queue, may_be_closed, at)| async move {
        let stats = loop {
            let mut closed = pin!(may_be_closed.notified());
            // Before the check, so that a close in between is not missed.
            closed.as_mut().enable();
            queue.upgrade().filter(|queue| !queue.is_closed())?;
            if let Either::Left(_) = select(pin!(ticks.wait(at)), closed).await {
                break queue.upgrade().filter(|queue| !queue.is_closed())?.stats();
            }
        };
        // If it is late by more than an interval, the missed times are skipped.
        let next = at.and_then(|at| at.checked_add(every)).map(|next| next.max(ticks.clock.now()));
        Some((stats, (ticks, queue, may_be_closed, next)))
    });
    Ok(Box::pin(watch.fuse()))
}
