//! Answering every packet by a function.

mod decide;
mod flow;
mod order;
mod run;
#[cfg(all(test, feature = "test-util"))]
mod tests;

use std::{
    fmt,
    future::{Future, IntoFuture, Pending, pending},
    pin::Pin,
    sync::Arc,
};

pub use self::decide::IntoVerdict;
#[cfg(feature = "tower")]
pub use self::decide::Service;
pub use self::decide::{Decide, Handler};
use crate::{packet::Packet, queue::Queue, types::Error};

impl Queue {
    /// Answers every packet by a function: its future returns the [`Verdict`](crate::Verdict),
    /// which is then submitted.
    ///
    /// ```no_run
    /// use tokio_nfqueue::{Packet, Queue};
    ///
    /// # async fn allowed(_: &Packet) -> bool { true }
    /// # async fn example() -> Result<(), tokio_nfqueue::Error> {
    /// let queue = Queue::builder(0).bind().await?;
    /// queue
    ///     .serve(async |packet: Packet| {
    ///         if allowed(&packet).await { packet.accept() } else { packet.drop() }
    ///     })
    ///     .with_graceful_shutdown(async { drop(tokio::signal::ctrl_c().await) })
    ///     .await
    /// # }
    /// ```
    ///
    /// A handler with state of its own is a closure that returns an `async` block, and clones what
    /// the block needs. (An `async` closure cannot capture anything here: the compiler says that it
    /// does not implement `Fn` because it captures state.)
    ///
    /// ```no_run
    /// use std::{collections::HashMap, sync::{Arc, Mutex}};
    /// use tokio_nfqueue::{Packet, Queue};
    ///
    /// # async fn example(queue: Queue) -> Result<(), tokio_nfqueue::Error> {
    /// // The first five packets of each source.
    /// let seen = Arc::new(Mutex::new(HashMap::new()));
    /// queue
    ///     .serve(move |packet: Packet| {
    ///         let seen = Arc::clone(&seen);
    ///         async move {
    ///             let Some((source, _)) = packet.addresses() else { return packet.drop() };
    ///             let mut seen = seen.lock().unwrap();
    ///             let count = seen.entry(source).or_insert(0);
    ///             *count += 1;
    ///             if *count <= 5 { packet.accept() } else { packet.drop() }
    ///         }
    ///     })
    ///     .await
    /// # }
    /// ```
    ///
    /// A handler that awaits nothing returns `std::future::ready(verdict)`, and needs neither the
    /// block nor the `Arc`. State that it changes needs a `Mutex` (or an atomic) also then, because
    /// it is an `Fn`:
    ///
    /// ```no_run
    /// # use std::{future::ready, sync::Mutex};
    /// # use tokio_nfqueue::{Packet, Queue};
    /// # async fn example(queue: Queue) -> Result<(), tokio_nfqueue::Error> {
    /// // Drops every tenth packet.
    /// let count = Mutex::new(0_u64);
    /// queue
    ///     .serve(move |packet: Packet| {
    ///         let mut count = count.lock().unwrap();
    ///         *count += 1;
    ///         ready(if *count % 10 == 0 { packet.drop() } else { packet.accept() })
    ///     })
    ///     .await
    /// # }
    /// ```
    ///
    /// The function may also return an `Option` or a `Result` of a verdict: see [`IntoVerdict`]. An
    /// error or a panic gives the packet the
    /// [default action](crate::QueueBuilder::on_unanswered); it is counted, and traced.
    ///
    /// A future that is ready when it is first polled costs no task. The others run as tasks of the
    /// runtime, up to [`concurrency`](Serve::concurrency) at once; beyond that no packet is read.
    /// On a multi-thread runtime, a queue of several numbers is served by a task for each.
    ///
    /// Nothing happens until the returned value is awaited, in the runtime in which the queue was
    /// bound.
    pub fn serve<H, F>(self, handler: H) -> Serve<Handler<H>>
    where
        H: Fn(Packet) -> F + Send + Sync + 'static,
        F: Future<Output: IntoVerdict> + Send + 'static,
    {
        Serve::new(self, Handler(Arc::new(handler)))
    }

    /// As [`serve`](Self::serve), by a [`tower_service::Service`], whose readiness is respected: no
    /// packet is read while it is not ready. Concurrency limits, time-outs and load shedding are
    /// then tower's. Needs the feature `tower`.
    ///
    /// If the service fails while it gets ready, the queue is closed gracefully, and the error is
    /// returned; rules that fail closed stay. With several numbers on a multi-thread runtime, each
    /// has a clone of the service.
    #[cfg(feature = "tower")]
    pub fn serve_service<S>(self, service: S) -> Serve<Service<S>>
    where
        S: tower_service::Service<Packet, Response: IntoVerdict, Error: fmt::Display + Send + 'static>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
    {
        Serve::new(self, Service(service))
    }
}

/// Serves a queue when it is awaited: from [`Queue::serve`].
///
/// It resolves when the queue has been closed, by this crate's user or by
/// [`with_graceful_shutdown`](Self::with_graceful_shutdown), and every packet has been decided.
///
/// # Errors
/// That of the stream, which is the end of the queue, or that of [closing](Queue::close) it. After
/// an error that is not of closing, rules that fail closed stay, and the kernel drops their
/// packets.
///
/// # Cancel safety
/// If the future is dropped, the queue is closed as by a drop, and unfinished handlers are aborted:
/// their packets get the default action.
#[must_use = "nothing happens until it is awaited"]
pub struct Serve<D, S = Pending<()>> {
    queue: Queue,
    decide: D,
    settings: Settings,
    shutdown: S,
}

#[derive(Debug, Clone, Copy)]
struct Settings {
    concurrency: usize,
    in_flow_order: bool,
}

/// What was served: from [`Serve::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Served {
    /// Packets that were given to the handler.
    pub packets: u64,
    /// Handlers that returned an error, or a verdict that was refused as a mistake of the program.
    pub errors: u64,
    /// Handlers that panicked.
    pub panics: u64,
}

impl Served {
    fn and(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            errors: self.errors + other.errors,
            panics: self.panics + other.panics,
        }
    }
}

impl<D: Decide> Serve<D> {
    fn new(queue: Queue, decide: D) -> Self {
        let settings = Settings { concurrency: 1024, in_flow_order: false };
        Self { queue, decide, settings, shutdown: pending() }
    }
}

impl<D: Decide, S: Future<Output = ()> + Send + 'static> Serve<D, S> {
    /// How many handlers run at once, at most. Default: 1024, as many as packets wait in a queue of
    /// the default length. While so many run, no packet is read: they wait in the kernel. Zero
    /// counts as one. If each number of the queue has a task, they share it equally.
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.settings.concurrency = handlers.max(1);
        self
    }

    /// Submits the verdicts of each connection in the order of its packets, whatever the order in
    /// which they are decided, so that what is accepted stays in order. Default: off.
    ///
    /// A verdict waits for those of earlier packets of its connection, and for nothing else. A
    /// connection is here the packets between two addresses and ports of a protocol, in both
    /// directions, or between two addresses if there are no ports.
    ///
    /// Packets that are sent to another queue, or again through the hook, are out of this order.
    pub fn in_flow_order(mut self) -> Self {
        self.settings.in_flow_order = true;
        self
    }

    /// Closes the queue as [`Queue::close`] does when this future ends: no new packet is queued,
    /// and the handlers that run are awaited, up to
    /// [`close_timeout`](crate::QueueBuilder::close_timeout).
    pub fn with_graceful_shutdown<T: Future<Output = ()> + Send + 'static>(self, shutdown: T) -> Serve<D, T> {
        let Self { queue, decide, settings, .. } = self;
        Serve { queue, decide, settings, shutdown }
    }

    /// As awaiting this, but returns what was served.
    ///
    /// # Errors
    /// As awaiting it.
    ///
    /// # Cancel safety
    /// As awaiting it.
    pub async fn run(self) -> Result<Served, Error> {
        let Self { queue, decide, settings, shutdown } = self;
        run::run(queue, decide, settings, shutdown).await
    }
}

impl<D: Decide, S: Future<Output = ()> + Send + 'static> IntoFuture for Serve<D, S> {
    type Output = Result<(), Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.run().await.map(drop) })
    }
}

impl<D, S> fmt::Debug for Serve<D, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("queue", &self.queue).field("settings", &self.settings).finish_non_exhaustive()
    }
}
