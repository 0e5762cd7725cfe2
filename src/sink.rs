//! Giving verdicts.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::{
    Sink, StreamExt as _,
    channel::oneshot,
    stream::{self, FusedStream},
};
use pin_project::pin_project;

use crate::{
    Action, Advice, Error, ErrorKind, KernelStats, PacketId, Reconfigure, Stats, Verdict, alarm::Alarm, queue::Shared,
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
}

impl VerdictSink {
    pub(crate) fn new(queue: Arc<Shared>) -> Self {
        Self { queue, closed: false }
    }

    /// Gives a verdict. It goes to the kernel when the queue's policy says so, on this thread or on the queue's own task;
    /// this call does not wait for it.
    ///
    /// If the policy says "now", the send happens within this call, and the kernel runs the accepted packets' further way in
    /// it: some microseconds for one packet, 100 for a batch of 64.
    ///
    /// # Errors
    /// * `Expired`: the packet has been answered for, by its deadline or by the closing queue.
    /// * `InvalidInput`: a payload or link-layer header of an impossible length, a conntrack change on a queue bound without
    ///   conntrack, an impossible expectation; the packet gets the `on_unanswered` answer.
    ///
    /// What the kernel itself refuses comes out of the stream; [`confirm`](Self::confirm) brings it here.
    pub fn submit(&self, verdict: Verdict) -> Result<(), Error> {
        submit(verdict)
    }

    /// Gives a verdict, sends it and everything gathered at once, and resolves when the kernel has acknowledged it.
    ///
    /// The verdict is given when this is called, not when the future is polled. An acknowledgement costs about 800 ns more
    /// than a plain verdict.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and each with the packet's id:
    /// * `PacketGone`: the kernel no longer had the packet.
    /// * `NotPermitted`: the process has lost `CAP_NET_ADMIN`.
    /// * `Unconfirmed`: the acknowledgement was lost to a full receive buffer.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the verdict given; only its confirmation is lost.
    pub fn confirm(&self, verdict: Verdict) -> Confirm {
        confirm(verdict)
    }

    /// Sends everything gathered, by whichever clone it was given; resolves when that has been done.
    ///
    /// # Errors
    /// None at present: what the kernel refuses comes out of the stream.
    ///
    /// # Cancel safety
    /// Cancel safe: the verdicts are sent, or being sent, once this has been polled.
    pub async fn flush(&self) -> Result<(), Error> {
        std::future::poll_fn(|cx| self.queue.poll_flush(cx)).await;
        Ok(())
    }

    /// Ends the queue without losing a packet: no new packet is queued, packets nobody has read get the
    /// [`on_unanswered`](crate::QueueBuilder::on_unanswered) answer, the verdicts that tasks still owe are awaited (for
    /// [`close_timeout`](crate::QueueBuilder::close_timeout) at most), then the queue is unbound. The stream ends.
    ///
    /// Traffic that arrives meanwhile passes if `on_unanswered` is [`Action::Accept`], and is dropped otherwise: a
    /// firewall that fails closed stays shut. With `Accept`, and `bypass` on the rule, a stop under load loses no packet.
    ///
    /// Closing twice, from clones or together, is fine: each waits for the end.
    ///
    /// # Errors
    /// * `TimedOut`: packets were still undecided after the wait; they got the `on_unanswered` answer.
    /// * `NotPermitted`: the process has lost `CAP_NET_ADMIN`; what is queued will be dropped with the last handle.
    ///
    /// # Cancel safety
    /// Once polled, the end goes on by itself.
    pub async fn close(&self) -> Result<(), Error> {
        self.queue.close(self.queue.on_unanswered()).await
    }

    /// As [`close`](Self::close), with another answer for packets that nobody has read, and for what arrives meanwhile.
    ///
    /// # Errors
    /// As [`close`](Self::close); `InvalidInput` for [`Action::Repeat`].
    pub async fn close_with(&self, action: Action) -> Result<(), Error> {
        if action == Action::Repeat {
            let error = Error::new(ErrorKind::InvalidInput, "close queue");
            return Err(error.with_detail("Repeat would bring the packets back for ever"));
        }
        self.queue.close(action).await
    }

    /// Changes settings while the queue runs: in one message that the kernel acknowledges or refuses as a whole. No packet is
    /// lost. Where the receive buffer was left to the crate, it grows with a longer queue or copy range.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change.
    /// * `Unsupported`: this kernel lacks a setting, which is named.
    /// * `NotPermitted`: the calling thread has no `CAP_NET_ADMIN`.
    /// * `Closed`: the queue is closing or closed.
    pub fn reconfigure(&self, change: &Reconfigure) -> Result<(), Error> {
        self.queue.reconfigure(change)
    }

    /// The queue's counters.
    pub fn stats(&self) -> Stats {
        self.queue.stats()
    }

    /// The queue's counters now and then: one item each `every`, until the queue is closed. It does not keep the queue
    /// open.
    ///
    /// # Errors
    /// `InvalidInput` if `every` is zero; `NoRuntime` outside a Tokio runtime.
    pub fn watch(&self, every: Duration) -> Result<impl FusedStream<Item = Stats> + Send + Unpin + use<>, Error> {
        watch(&self.queue, every)
    }

    /// The kernel's own account of the queue, from `/proc/net/netfilter/nfnetlink_queue` of the queue's network namespace,
    /// wherever the caller is. It takes a system call or two.
    ///
    /// # Errors
    /// `Closed` if the queue is not bound any more; the error of the read otherwise. In a user namespace that was
    /// entered after its network namespace was made, the file is not readable.
    pub fn kernel_stats(&self) -> Result<KernelStats, Error> {
        self.queue.kernel_stats()
    }

    /// Which limits have cost packets so far, and what to raise them to. Empty where none has.
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
    match claim.redeem() {
        Some((queue, id)) => queue.decide(id, decision),
        None => Ok(()),
    }
}

/// As [`submit`], and what the kernel says of it.
pub(crate) fn confirm(verdict: Verdict) -> Confirm {
    let id = verdict.packet_id();
    let state = match verdict.check() {
        Err(error) => Confirmation::Refused(Some(error)),
        Ok(()) => {
            let (claim, decision) = verdict.into_parts();
            match claim.redeem() {
                Some((queue, id)) => Confirmation::Awaited(queue.decide_confirmed(id, decision)),
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
        match self.submit(verdict) {
            // One packet that was answered for must not end a `forward` of all the others.
            Err(error) if error.kind() == ErrorKind::Expired => Ok(()),
            result => result,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.queue.poll_flush(cx).map(Ok)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.closed = true;
        self.queue.poll_flush(cx).map(Ok)
    }
}

/// The kernel's answer to one verdict: see [`VerdictSink::confirm`].
#[pin_project]
#[must_use = "the verdict has been given, but only the future tells what the kernel said"]
pub struct Confirm {
    id: PacketId,
    #[pin]
    state: Confirmation,
}

#[pin_project(project = ConfirmationProjection)]
enum Confirmation {
    Awaited(#[pin] oneshot::Receiver<Result<(), Error>>),
    Refused(Option<Error>),
}

impl Future for Confirm {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let lost = || Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(*this.id);
        Poll::Ready(match this.state.project() {
            ConfirmationProjection::Awaited(answer) => ready!(answer.poll(cx)).unwrap_or_else(|_| Err(lost())),
            ConfirmationProjection::Refused(error) => Err(error.take().unwrap_or_else(lost)),
        })
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
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(Error::new(ErrorKind::NoRuntime, OPERATION));
    }
    let alarm = Alarm::new().map_err(|source| Error::os(OPERATION, source))?;
    let start = (alarm, Arc::downgrade(queue), Instant::now() + every);
    let watch = stream::unfold(start, move |(mut alarm, queue, at)| async move {
        alarm.set(at).ok()?;
        alarm.rings().await.ok()?;
        let stats = queue.upgrade().filter(|queue| !queue.is_closed())?.stats();
        // Late by more than an interval, it skips what it has missed.
        let next = (at + every).max(Instant::now());
        Some((stats, (alarm, queue, next)))
    });
    Ok(Box::pin(watch.fuse()))
}
