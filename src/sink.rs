//! Giving verdicts.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::{
    Sink, Stream, StreamExt as _,
    stream::{self, FusedStream},
    task::AtomicWaker,
};
use pin_project::pin_project;

use crate::{
    Action, Advice, Error, ErrorKind, KernelStats, PacketId, Reconfigure, Stats, Verdict,
    keeper::{Timed, Timer},
    queue::{Answer, Shared},
};

/// Takes the verdicts of a queue. Clone it freely: clones are independent and may be used from any task or thread.
///
/// [`submit`](Self::submit) needs no await; the queue's [`FlushPolicy`](crate::FlushPolicy) decides when the verdict goes to
/// the kernel. As a [`Sink`], `feed` and `forward` let the policy gather as well, while `SinkExt::send` flushes after each
/// verdict, for that is what it means.
///
/// Within one flush the kernel is told in the order of the packets' ids, whatever the order of the verdicts. Where the order
/// in which packets are released matters, flush between them.
#[derive(Clone)]
pub struct VerdictSink {
    queue: Arc<Shared>,
    closed: bool,
    /// Of the flush that `Sink::poll_flush` waits for.
    flushing: Option<u64>,
}

impl VerdictSink {
    pub(crate) fn new(queue: Arc<Shared>) -> Self {
        Self { queue, closed: false, flushing: None }
    }

    /// Gives a verdict. It goes to the kernel when the queue's policy says so, on this thread or on another; this call does
    /// not wait for it.
    ///
    /// If the policy says "now", the send happens within this call, and the kernel runs the accepted packets' further way in
    /// it: some microseconds for one packet, 100 for a batch of 64.
    ///
    /// A verdict that comes too late, for the packet has been answered for by its deadline or by the closing queue, is no
    /// error here: it is counted in [`Stats::late`] and told by [`refusals`](Self::refusals), as is what the kernel itself
    /// refuses. [`confirm`](Self::confirm) brings both here.
    ///
    /// # Errors
    /// The verdict is impossible, and was not given; the packet gets the `on_unanswered` action:
    /// * `InvalidInput`: a payload or link-layer header of an impossible length, a conntrack change on a queue bound without
    ///   conntrack, an impossible expectation.
    /// * `Unsupported`: a replaced payload that this kernel does not take: see [`Verdict::payload`].
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        submit(verdict)
    }

    /// Gives a verdict, sends it and everything gathered at once, and resolves when the kernel has acknowledged it.
    ///
    /// The verdict is given when this is called, not when the future is polled. An acknowledgement costs about 800 ns more
    /// than a plain verdict. It lies behind the packets that wait in the socket, and the future receives those, up to 128
    /// each time that it is polled.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and each with the packet's id:
    /// * `Expired`: the packet has been answered for, by its deadline or by the closing queue.
    /// * `PacketGone`: the kernel no longer had the packet.
    /// * `NotPermitted`: the sending thread had no `CAP_NET_ADMIN`. The packet gets the `on_unanswered` action when that
    ///   can be sent.
    /// * `Unconfirmed`: the acknowledgement was lost to a full receive buffer.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the verdict given; only its confirmation is lost.
    pub fn confirm(&self, verdict: Verdict) -> Confirm {
        confirm(verdict)
    }

    /// Sends everything gathered, by whichever clone it was given; resolves when that has been done, or has been tried: what
    /// is refused is told by [`refusals`](Self::refusals), and what a failed send has kept is sent later.
    ///
    /// # Errors
    /// None at present.
    ///
    /// # Cancel safety
    /// Cancel safe: the verdicts are sent, or being sent, once this has been polled.
    pub async fn flush(&self) -> Result<(), Error> {
        let mut round = None;
        std::future::poll_fn(|cx| self.queue.poll_flush(&mut round, cx)).await;
        Ok(())
    }

    /// What concerned one verdict or one message and did not end the queue: verdicts that the kernel refused, verdicts that
    /// came too late, messages that could not be understood. Each with its packet's id where that is known; the kind says
    /// which: `NotPermitted`, `Expired`, `Malformed`, or what the kernel answered.
    ///
    /// A verdict given by [`confirm`](Self::confirm) is told there instead. 1024 are kept; then the oldest give way, counted
    /// in [`Stats::refusals_unread`], so that nobody need read them. Where several such streams are read, each item goes to
    /// one of them. It ends when the queue is closed, and does not keep the queue open.
    pub fn refusals(&self) -> Refusals {
        Refusals { queue: Arc::clone(&self.queue), ended: false }
    }

    /// Ends the queue without losing a packet: no new packet is queued, packets nobody has read get the
    /// [`on_unanswered`](crate::QueueBuilder::on_unanswered) action, the verdicts that tasks still owe are awaited (for
    /// [`close_timeout`](crate::QueueBuilder::close_timeout) at most), then the queue is unbound. The stream ends.
    ///
    /// Traffic that arrives meanwhile passes if `on_unanswered` is [`Action::Accept`]. With any other action it is dropped,
    /// until the queue is unbound; then the rule drops it, or passes it if it says `bypass`. With `Accept`, and `bypass` on
    /// the rule, a stop under load loses no packet.
    ///
    /// It ends in time in any executor, also where the runtime of the queue has ended or is not driven. Closing twice, from
    /// clones or together, is fine: each waits for the end, and the shortest time counts.
    ///
    /// # Errors
    /// To the first who waits:
    /// * `TimedOut`: packets were still undecided after the wait; they got the `on_unanswered` action.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN`. A thread of the runtime goes on with the end, if it has the
    ///   capability; otherwise what is queued will be dropped with the last handle.
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close(&self) -> Result<(), Error> {
        self.queue.close(self.queue.on_unanswered(), self.queue.close_timeout()).await
    }

    /// As [`close`](Self::close), and waits for `timeout` at most. Zero waits not at all.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_within(&self, timeout: Duration) -> Result<(), Error> {
        self.queue.close(self.queue.on_unanswered(), timeout).await
    }

    /// As [`close`](Self::close), with another action for packets that nobody has read or that are still undecided after
    /// the wait.
    ///
    /// What arrives meanwhile passes if the action is [`Action::Accept`], and is dropped otherwise: the kernel can do no
    /// more with packets that it does not queue. So `Stop` and `Requeue` are for the packets that are queued already.
    ///
    /// # Errors
    /// As [`close`](Self::close); `InvalidInput` for [`Action::Repeat`], and for a requeue to this very queue.
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close_with(&self, action: Action) -> Result<(), Error> {
        if let Err(detail) = crate::builder::check_default(action, self.queue()) {
            return Err(
                Error::new(ErrorKind::InvalidInput, format!("close queue {}", self.queue())).with_detail(detail)
            );
        }
        self.queue.close(action, self.queue.close_timeout()).await
    }

    /// Changes settings while the queue runs: in one message that the kernel acknowledges or refuses as a whole. No packet is
    /// lost. Where the receive buffer was left to the crate, it grows with a longer queue or copy range.
    ///
    /// The message is sent when this is called; the future resolves when the kernel has answered. The answer lies behind the
    /// packets that wait in the socket, and the future receives those, up to 128 each time that it is polled. A lost answer
    /// is asked for again.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the change made; only its confirmation is lost.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change.
    /// * `Unsupported`: this kernel lacks a setting, which is named.
    /// * `NotPermitted`: the calling thread has no `CAP_NET_ADMIN`.
    /// * `Unconfirmed`: the answer was lost to a full receive buffer, time after time. The change may have been made.
    /// * `Closed`: the queue is closing or closed.
    #[must_use = "the change has been sent, but only the future tells what the kernel said"]
    pub fn reconfigure(&self, change: &Reconfigure) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.queue.reconfigure(change)
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.queue.stats()
    }

    /// The queue's counters at a fixed interval, until the queue is closed. It does not keep the queue open, and works in any
    /// executor.
    ///
    /// # Errors
    /// `InvalidInput` if `every` is zero; an error of the system if it gives no thread for the timer.
    pub fn watch(&self, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
        watch(&self.queue, every)
    }

    /// The kernel's own account of the queue, from `/proc/net/netfilter/nfnetlink_queue` of the queue's network namespace,
    /// wherever the caller is. It takes a system call or two.
    ///
    /// # Errors
    /// * `Closed`: the queue is not bound any more.
    /// * `NotPermitted`: the file could not be opened when the queue was bound. Its mode is 0440: only the root of the user
    ///   namespace that owns the network namespace may read it, and whoever has `CAP_DAC_READ_SEARCH`. In a user namespace
    ///   that was entered after its network namespace was made, nobody can.
    /// * Any other error of the read.
    pub fn kernel_stats(&self) -> Result<KernelStats, Error> {
        self.queue.kernel_stats()
    }

    /// Which limits have cost packets so far, and what to raise them to. Empty where none has. Where the kernel's counters
    /// cannot be read it says so, for then it does not see packets that found the queue full.
    pub fn advice(&self) -> Vec<Advice> {
        self.queue.advice()
    }

    /// Whether the queue is closing or closed.
    pub fn is_closed(&self) -> bool {
        self.closed || self.queue.is_closed()
    }

    /// The queue's number.
    pub fn queue(&self) -> u16 {
        self.queue.number()
    }
}

impl fmt::Debug for VerdictSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerdictSink").field("queue", &self.queue()).field("closed", &self.is_closed()).finish()
    }
}

/// Gives a verdict to its packet's own queue.
pub(crate) fn submit(verdict: Verdict) -> Result<(), Error> {
    verdict.check()?;
    let (claim, decision) = verdict.into_parts();
    if let Some((queue, id)) = claim.redeem() {
        queue.decide(id, decision);
    }
    Ok(())
}

/// As [`submit`], and what the kernel says of it.
pub(crate) fn confirm(verdict: Verdict) -> Confirm {
    let id = verdict.packet_id();
    let state = match verdict.check() {
        Err(error) => Confirmation::Refused(Some(error)),
        Ok(()) => {
            let (claim, decision) = verdict.into_parts();
            match claim.redeem() {
                Some((queue, id)) => {
                    let answer = queue.decide_confirmed(id, decision);
                    Confirmation::Awaited(queue, answer)
                }
                None => Confirmation::Refused(None),
            }
        }
    };
    Confirm { id, state }
}

/// Always ready: what is gathered is bounded by the packets in flight. `poll_close` flushes and closes this clone alone; the
/// queue and the other clones go on. To end the queue use [`VerdictSink::close`].
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

/// Verdicts and messages that came to nothing: see [`VerdictSink::refusals`].
#[must_use = "a stream does nothing unless it is polled"]
pub struct Refusals {
    queue: Arc<Shared>,
    ended: bool,
}

impl Refusals {
    /// The next refusal; `None` when the queue is closed.
    ///
    /// # Cancel safety
    /// Cancel safe: no refusal is lost.
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

/// The kernel's answer to one verdict: see [`VerdictSink::confirm`].
#[pin_project]
#[must_use = "the verdict has been given, but only the future tells what the kernel said"]
pub struct Confirm {
    id: PacketId,
    state: Confirmation,
}

enum Confirmation {
    Awaited(Arc<Shared>, Answer),
    Refused(Option<Error>),
}

impl Future for Confirm {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let id = *this.id;
        let answer = match this.state {
            Confirmation::Awaited(queue, answer) => ready!(queue.poll_answer(answer, cx)),
            Confirmation::Refused(error) => error.take().map(Err),
        };
        let lost = || Err(Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(id));
        Poll::Ready(answer.unwrap_or_else(lost).map_err(|error| error.with_packet(id)))
    }
}

impl fmt::Debug for Confirm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Confirm").field(&self.id).finish()
    }
}

fn watch(queue: &Arc<Shared>, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
    const OPERATION: &str = "watch statistics";
    if every.is_zero() {
        return Err(Error::new(ErrorKind::InvalidInput, OPERATION).with_detail("the interval is zero"));
    }
    let ticks = Ticks::new().map_err(|source| Error::os(OPERATION, source))?;
    let start = (ticks, Arc::downgrade(queue), Instant::now().checked_add(every));
    let watch = stream::unfold(start, move |(ticks, queue, at)| async move {
        ticks.wait(at).await;
        let stats = queue.upgrade().filter(|queue| !queue.is_closed())?.stats();
        // Late by more than an interval, it skips what it has missed.
        let next = at.and_then(|at| at.checked_add(every)).map(|next| next.max(Instant::now()));
        Some((stats, (ticks, queue, next)))
    });
    Ok(Box::pin(watch.fuse()))
}

/// A timer for a task.
#[derive(Debug)]
struct Ticks {
    alarm: Arc<Alarm>,
    timer: Timer,
}

#[derive(Debug, Default)]
struct Alarm {
    waker: AtomicWaker,
}

impl Timed for Alarm {
    fn fire(self: Arc<Self>) {
        self.waker.wake();
    }

    fn readable(self: Arc<Self>) {}
}

impl Ticks {
    fn new() -> io::Result<Self> {
        let alarm = Arc::new(Alarm::default());
        let timed: Weak<Alarm> = Arc::downgrade(&alarm);
        Ok(Self { timer: Timer::new(timed as Weak<dyn Timed>)?, alarm })
    }

    /// Waits until a time; for ever if there is none.
    async fn wait(&self, at: Option<Instant>) {
        std::future::poll_fn(|cx| {
            let Some(at) = at else { return Poll::Pending };
            self.alarm.waker.register(cx.waker());
            if at <= Instant::now() {
                return Poll::Ready(());
            }
            self.timer.set(at);
            Poll::Pending
        })
        .await;
    }
}
