//! The verdict half of several queues.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    Sink, StreamExt as _,
    future::join_all,
    stream::{FusedStream, select_all},
};

use crate::{
    advice::Advice,
    handover::Handover,
    io::kernel::KernelStats,
    reconfigure::Reconfigure,
    sink::VerdictSink,
    types::{Action, Error, ErrorKind, Stats},
    verdict::{Confirm, Verdict},
};

/// Takes the verdicts of a [`QueueGroup`](crate::QueueGroup), each for its packet's own queue. It
/// can be cloned and shared like a [`VerdictSink`].
#[derive(Clone)]
pub struct GroupSink {
    /// In the order of the queues.
    pub(crate) sinks: Vec<VerdictSink>,
}

impl GroupSink {
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

    /// Sends all gathered verdicts of all queues.
    ///
    /// # Errors
    /// As [`VerdictSink::flush`].
    ///
    /// # Cancel safety
    /// As [`VerdictSink::flush`].
    pub async fn flush(&self) -> Result<(), Error> {
        join_all(self.sinks.iter().map(VerdictSink::flush)).await.into_iter().collect()
    }

    /// The refusals of all queues: see [`VerdictSink::refusals`]. It ends when those of all queues
    /// have ended.
    pub fn refusals(&self) -> impl FusedStream<Item = Error> + Send + Unpin + use<> {
        select_all(self.sinks.iter().map(VerdictSink::refusals))
    }

    /// Closes all queues at the same time, each as [`VerdictSink::close`] does.
    ///
    /// # Errors
    /// The first queue's error. Every queue is closed regardless.
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close(&self) -> Result<(), Error> {
        join_all(self.sinks.iter().map(VerdictSink::close)).await.into_iter().collect()
    }

    /// Begins to hand all queues over to another process, which takes all of them or none: see
    /// [`VerdictSink::hand_over`]. If one cannot be handed over, all of them continue here.
    ///
    /// The successor takes the queues over one by one, and collects them:
    ///
    /// ```no_run
    /// # use tokio_nfqueue::{Error, Queue, QueueGroup, Takeover};
    /// # async fn example(mut takeover: Takeover) -> Result<(), Error> {
    /// let numbers = takeover.queues().into_iter();
    /// let queues = numbers.map(|number| Queue::builder(number).take_over(&mut takeover));
    /// let queues: QueueGroup = queues.collect::<Result<_, _>>()?;
    /// takeover.accept().await?;
    /// # let _ = queues;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`VerdictSink::hand_over`], for the first queue that fails.
    ///
    /// # Cancel safety
    /// As [`VerdictSink::hand_over`].
    pub async fn hand_over(&self, within: Duration) -> Result<Handover, Error> {
        let handovers = join_all(self.sinks.iter().map(|sink| sink.hand_over(within))).await;
        let all = handovers.into_iter().reduce(|all, one| Ok(all?.with(one?)));
        all.unwrap_or_else(|| Err(Error::new(ErrorKind::InvalidInput, "hand over").with_detail("there is no queue")))
    }

    /// As [`close`](Self::close), but waits for `timeout` at most: see
    /// [`VerdictSink::close_within`].
    ///
    /// # Errors
    /// As [`close`](Self::close).
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_within(&self, timeout: Duration) -> Result<(), Error> {
        join_all(self.sinks.iter().map(|sink| sink.close_within(timeout))).await.into_iter().collect()
    }

    /// As [`close`](Self::close), but with another action for undecided packets: see
    /// [`VerdictSink::close_with`].
    ///
    /// # Errors
    /// As [`close`](Self::close). `InvalidInput` for an action that [`VerdictSink::close_with`]
    /// refuses for one of the queues; then no queue is closed.
    ///
    /// # Cancel safety
    /// Once polled, the graceful shutdown continues even if the future is dropped.
    pub async fn close_with(&self, action: Action) -> Result<(), Error> {
        for sink in &self.sinks {
            sink.check_close_action(action)?;
        }
        join_all(self.sinks.iter().map(|sink| sink.close_with(action))).await.into_iter().collect()
    }

    /// Changes settings of all queues while they run, each as [`VerdictSink::reconfigure`] does.
    ///
    /// # Errors
    /// The first queue's error. The other queues may have been changed.
    ///
    /// # Cancel safety
    /// As [`VerdictSink::reconfigure`].
    #[must_use = "the change has been sent, but only the future returns the kernel's reply"]
    pub fn reconfigure(&self, change: &Reconfigure) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let changes = join_all(self.sinks.iter().map(|sink| sink.reconfigure(change)));
        async move { changes.await.into_iter().collect() }
    }

    /// The sinks of the queues, in the order of the queues.
    pub fn queues(&self) -> &[VerdictSink] {
        &self.sinks
    }

    /// Each queue's number and counters.
    pub fn stats(&self) -> impl Iterator<Item = (u16, Stats)> {
        self.sinks.iter().map(|sink| (sink.queue_number(), sink.stats()))
    }

    /// Each queue's number and counters at a fixed interval: see [`VerdictSink::watch`]. It ends
    /// when all queues are closed.
    ///
    /// # Errors
    /// As [`VerdictSink::watch`].
    pub fn watch(
        &self,
        every: Duration,
    ) -> Result<impl FusedStream<Item = (u16, Stats)> + Send + Unpin + use<>, Error> {
        let watch = |sink: &VerdictSink| {
            let queue = sink.queue_number();
            Ok(sink.watch(every)?.map(move |stats| (queue, stats)))
        };
        Ok(select_all(self.sinks.iter().map(watch).collect::<Result<Vec<_>, Error>>()?))
    }

    /// Each queue's number and the kernel's own counters: see [`VerdictSink::kernel_stats`].
    ///
    /// # Errors
    /// As [`VerdictSink::kernel_stats`].
    pub fn kernel_stats(&self) -> Result<Vec<(u16, KernelStats)>, Error> {
        self.sinks.iter().map(|sink| Ok((sink.queue_number(), sink.kernel_stats()?))).collect()
    }

    /// Which limits have cost packets so far, each with its queue's number: see
    /// [`VerdictSink::advice`].
    pub fn advice(&self) -> Vec<(u16, Advice)> {
        let advice = |sink: &VerdictSink| {
            let queue = sink.queue_number();
            sink.advice().into_iter().map(move |advice| (queue, advice))
        };
        self.sinks.iter().flat_map(advice).collect()
    }

    /// Whether all queues are closing or closed.
    pub fn is_closed(&self) -> bool {
        self.sinks.iter().all(VerdictSink::is_closed)
    }
}

impl fmt::Debug for GroupSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.sinks).finish()
    }
}

/// Like that of [`VerdictSink`]: always ready until it is closed. Closing it flushes, and closes
/// only this clone.
impl Sink<Verdict> for GroupSink {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_all(|sink| sink.poll_ready(cx))
    }

    fn start_send(mut self: Pin<&mut Self>, verdict: Verdict) -> Result<(), Error> {
        match self.sinks.first_mut() {
            // Each of them finds the verdict's queue, and knows whether this clone is closed.
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
