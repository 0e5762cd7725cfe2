//! The loop that serves a queue.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use futures::{
    FutureExt as _, Stream as _,
    future::{BoxFuture, Either, select},
};
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::watch,
    task::JoinSet,
};
use tracing::warn;

use super::{
    Served, Settings,
    decide::{Decide, IntoVerdict},
    flow::FlowKey,
    order::{Order, Place},
};
use crate::{
    packet::Packet,
    queue::Queue,
    sink::VerdictSink,
    stream::PacketStream,
    types::{Error, ErrorKind, PacketId},
    verdict::Verdict,
};

/// Serves a queue until it is closed.
pub(super) async fn run<D: Decide>(
    queue: Queue,
    decide: D,
    settings: Settings,
    shutdown: impl Future<Output = ()>,
) -> Result<Served, Error> {
    let (stream, sink) = queue.split();
    let abandon = watch::Sender::new(false);
    let mut serving = pin!(serve_all(stream, sink.clone(), decide, settings, &abandon));
    if let Either::Left((served, _)) = select(serving.as_mut(), pin!(shutdown)).await {
        return served;
    }
    match select(serving.as_mut(), pin!(sink.close())).await {
        Either::Left((served, closing)) => {
            let closed = closing.await;
            served.and_then(|served| closed.map(|()| served))
        }
        Either::Right((closed, serving)) => {
            // Every packet has been decided, by its handler or at the time-out.
            abandon.send_replace(true);
            let served = serving.await;
            closed.and(served)
        }
    }
}

/// On a multi-thread runtime, a task serves each number.
async fn serve_all<D: Decide>(
    stream: PacketStream,
    sink: VerdictSink,
    decide: D,
    settings: Settings,
    abandon: &watch::Sender<bool>,
) -> Result<Served, Error> {
    let threads = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    let streams = if threads { stream.into_each() } else { vec![stream] };
    let settings = Settings { concurrency: settings.concurrency.div_ceil(streams.len()), ..settings };
    let begin = |stream| Loop::new(stream, decide.clone(), settings, abandon.subscribe());
    let mut loops: Vec<Loop<D>> = streams.into_iter().map(begin).collect();
    if loops.len() == 1 {
        let (served, error) = loops.remove(0).await;
        return end(served, error, &sink).await;
    }
    let mut tasks = JoinSet::new();
    loops.into_iter().for_each(|each| _ = tasks.spawn(each));
    let (mut all, mut first_error) = (Served::default(), None);
    while let Some(ended) = tasks.join_next().await {
        // No loop panics, and none is aborted while the set exists.
        let failed = |source: tokio::task::JoinError| {
            (Served::default(), Some(Error::new(ErrorKind::Other, SERVE).with_source(source.into())))
        };
        let (served, error) = ended.unwrap_or_else(failed);
        all = all.and(served);
        if error.is_some() && first_error.is_none() {
            first_error = error;
            // So that the others end as well.
            sink.close_after_failure().await;
            abandon.send_replace(true);
        }
    }
    first_error.map_or(Ok(all), Err)
}

async fn end(served: Served, error: Option<Error>, sink: &VerdictSink) -> Result<Served, Error> {
    let Some(error) = error else { return Ok(served) };
    sink.close_after_failure().await;
    Err(error)
}

const SERVE: &str = "serve";

/// Serves one stream. Returns what was served, and the error that has ended it.
struct Loop<D: Decide> {
    stream: PacketStream,
    decide: D,
    settings: Settings,
    served: Served,
    error: Option<Error>,
    /// No packet is read any more.
    ended: bool,
    /// For the first poll of a handler's future, without an allocation for each.
    first: Pin<Box<Option<D::Future>>>,
    tasks: JoinSet<Done>,
    /// The queue is closed, and what the tasks still do does not matter any more. Polled unless the
    /// stream is awaited, which then ends.
    abandoned: BoxFuture<'static, ()>,
    /// If the verdicts are to be in the order of the packets.
    order: Option<Order<Option<Verdict>>>,
}

/// What must not move is in a box.
impl<D: Decide> Unpin for Loop<D> {}

/// What a handler's task has come to.
struct Done {
    packet: PacketId,
    place: Option<Place>,
    outcome: Outcome,
}

enum Outcome {
    /// With an order, the verdict is still to be submitted.
    Verdict(Option<Verdict>),
    Failed(String),
    Panicked,
}

impl<D: Decide> Loop<D> {
    fn new(stream: PacketStream, decide: D, settings: Settings, mut abandoned: watch::Receiver<bool>) -> Self {
        Self {
            stream,
            decide,
            settings,
            served: Served::default(),
            error: None,
            ended: false,
            first: Box::pin(None),
            tasks: JoinSet::new(),
            abandoned: Box::pin(async move { drop(abandoned.wait_for(|abandoned| *abandoned).await) }),
            order: settings.in_flow_order.then(Order::default),
        }
    }

    /// Calls the handler with a packet. Takes its outcome, or leaves that to a task.
    fn begin(&mut self, packet: Packet) {
        self.served.packets += 1;
        let id = packet.id();
        let flow = self.order.as_ref().map(|_| FlowKey::of(packet.payload()));
        let polled = catch_unwind(AssertUnwindSafe(|| {
            let future = self.decide.call(packet);
            self.first.set(Some(future));
            poll(self.first.as_mut(), &mut Context::from_waker(Waker::noop()))
        }));
        let outcome = match polled {
            Ok(Poll::Pending) => return self.spawn(id, flow),
            Ok(Poll::Ready(output)) => outcome(output),
            Err(panic) => panicked(panic),
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.first.set(None))) {
            panicked(panic);
            self.first = Box::pin(None);
        }
        let place = match (&mut self.order, flow) {
            (Some(order), Some(flow)) if !order.is_idle(&flow) => Some(order.take(flow)),
            _ => None,
        };
        self.finish(Done { packet: id, place, outcome });
    }

    /// Leaves the rest to a task.
    fn spawn(&mut self, packet: PacketId, flow: Option<FlowKey>) {
        let mut future = std::mem::replace(&mut self.first, Box::pin(None));
        let place = self.order.as_mut().zip(flow).map(|(order, flow)| order.take(flow));
        self.tasks.spawn(async move {
            let polling = std::future::poll_fn(|cx| poll(future.as_mut(), cx));
            let outcome = match AssertUnwindSafe(polling).catch_unwind().await {
                Ok(output) => outcome(output),
                Err(panic) => panicked(panic),
            };
            let outcome = match (outcome, place) {
                // Here, so that it need not wait for the loop.
                (Outcome::Verdict(verdict), None) => submit(verdict),
                (outcome, _) => outcome,
            };
            Done { packet, place, outcome }
        });
    }

    /// A handler has ended.
    fn finish(&mut self, done: Done) {
        let Done { packet, place, outcome } = done;
        let verdict = match outcome {
            Outcome::Verdict(verdict) => verdict,
            Outcome::Failed(error) => {
                self.failed(packet, &error);
                None
            }
            Outcome::Panicked => {
                self.served.panics += 1;
                if self.served.panics.is_power_of_two() {
                    let queue = self.stream.queue_number();
                    warn!(queue, packet = packet.get(), panics = self.served.panics, "a handler has panicked");
                }
                None
            }
        };
        let mut turn = Vec::new();
        match (place, &mut self.order) {
            (Some(place), Some(order)) => order.known(place, verdict, |verdict| turn.extend(verdict)),
            _ => return self.submit(verdict),
        }
        turn.into_iter().for_each(|verdict| self.submit(Some(verdict)));
    }

    fn submit(&mut self, verdict: Option<Verdict>) {
        let packet = verdict.as_ref().map(Verdict::id);
        if let (Some(packet), Outcome::Failed(error)) = (packet, submit(verdict)) {
            self.failed(packet, &error);
        }
    }

    /// Counts an error. Of many, some are traced.
    fn failed(&mut self, packet: PacketId, error: &str) {
        self.served.errors += 1;
        if self.served.errors.is_power_of_two() {
            let queue = self.stream.queue_number();
            warn!(queue, packet = packet.get(), errors = self.served.errors, error, "a handler has failed");
        }
    }

    /// Reads until there is no packet, the handler is not ready, or as many run as may. Returns
    /// whether the stream wakes the task.
    fn read(&mut self, cx: &mut Context<'_>) -> bool {
        while !self.ended && self.tasks.len() < self.settings.concurrency {
            match self.decide.poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.end(Some(Error::new(ErrorKind::Other, SERVE).with_detail(error)));
                    break;
                }
                Poll::Pending => break,
            }
            match Pin::new(&mut self.stream).poll_next(cx) {
                Poll::Ready(Some(Ok(packet))) => self.begin(packet),
                Poll::Ready(Some(Err(error))) => self.end(Some(error)),
                Poll::Ready(None) => self.end(None),
                Poll::Pending => return true,
            }
        }
        // Packets may be unread, for whose verdicts the gathered ones would wait.
        self.stream.flush();
        false
    }

    /// Takes the outcomes of tasks that have ended. Returns whether there was one.
    fn finish_ended(&mut self, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while !self.tasks.is_empty() {
            match self.tasks.poll_join_next(cx) {
                Poll::Ready(Some(Ok(done))) => self.finish(done),
                // Its panics are caught, and it is aborted only with the set.
                Poll::Ready(Some(Err(error))) => {
                    self.error = Some(Error::new(ErrorKind::Other, SERVE).with_source(error.into()));
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
            any = true;
        }
        any
    }

    fn end(&mut self, error: Option<Error>) {
        self.ended = true;
        self.error = error;
    }
}

impl<D: Decide> Future for Loop<D> {
    type Output = (Served, Option<Error>);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            let awaits_stream = this.read(cx);
            // After the reading, so that the end of a task that it has begun wakes this one.
            let finished = this.finish_ended(cx);
            let over = this.ended && this.tasks.is_empty();
            if over || !awaits_stream && this.abandoned.poll_unpin(cx).is_ready() {
                return Poll::Ready((this.served, this.error.take()));
            }
            if !finished {
                return Poll::Pending;
            }
        }
    }
}

/// Polls the future in its slot.
fn poll<F: Future>(slot: Pin<&mut Option<F>>, cx: &mut Context<'_>) -> Poll<F::Output> {
    slot.as_pin_mut().map_or(Poll::Pending, |future| future.poll(cx))
}

fn outcome(output: impl IntoVerdict) -> Outcome {
    output.into_verdict().map_or_else(Outcome::Failed, Outcome::Verdict)
}

/// An error is a mistake in the program's text, and the packet gets the default action.
fn submit(verdict: Option<Verdict>) -> Outcome {
    match verdict.map_or(Ok(()), Verdict::submit) {
        Ok(()) => Outcome::Verdict(None),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// What a panic has thrown may panic when it is dropped.
fn panicked(panic: Box<dyn Any + Send>) -> Outcome {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(again);
    }
    Outcome::Panicked
}
