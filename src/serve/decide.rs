//! What decides a packet, and what may come of it.

use std::{
    fmt,
    future::Future,
    sync::Arc,
    task::{Context, Poll},
};

use crate::{packet::Packet, verdict::Verdict};

/// What a handler may return.
///
/// | value | what happens |
/// |---|---|
/// | `Verdict` | it is submitted |
/// | `Some(verdict)` | the same |
/// | `None` | nothing: the handler has submitted the verdict, or has given the packet away. If it has dropped the packet, this has got the default action |
/// | `Ok(..)` | as above |
/// | `Err(error)` | the default action; the error is counted, and traced |
///
/// It cannot be implemented for other types.
pub trait IntoVerdict: Send + sealed::Sealed + 'static {
    #[doc(hidden)]
    fn into_verdict(self) -> Result<Option<Verdict>, String>;
}

mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for Verdict {}
impl<V: sealed::Sealed> sealed::Sealed for Option<V> {}
impl<V: sealed::Sealed, E> sealed::Sealed for Result<V, E> {}

impl IntoVerdict for Verdict {
    fn into_verdict(self) -> Result<Option<Verdict>, String> {
        Ok(Some(self))
    }
}

impl<V: IntoVerdict> IntoVerdict for Option<V> {
    fn into_verdict(self) -> Result<Option<Verdict>, String> {
        self.map_or(Ok(None), IntoVerdict::into_verdict)
    }
}

impl<V: IntoVerdict, E: fmt::Display + Send + 'static> IntoVerdict for Result<V, E> {
    fn into_verdict(self) -> Result<Option<Verdict>, String> {
        self.map_err(|error| error.to_string())?.into_verdict()
    }
}

/// What [`Serve`](crate::Serve) asks about each packet: a function or a service. It cannot be
/// implemented for other types.
pub trait Decide: Clone + Send + sealed::Sealed + 'static {
    #[doc(hidden)]
    type Output: IntoVerdict;
    #[doc(hidden)]
    type Future: Future<Output = Self::Output> + Send + 'static;

    /// Whether it takes a packet.
    #[doc(hidden)]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>>;

    #[doc(hidden)]
    fn call(&mut self, packet: Packet) -> Self::Future;
}

/// A function: see [`Queue::serve`](crate::Queue::serve).
pub struct Handler<H>(pub(super) Arc<H>);

impl<H> Clone for Handler<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H> sealed::Sealed for Handler<H> {}

impl<H, F> Decide for Handler<H>
where
    H: Fn(Packet) -> F + Send + Sync + 'static,
    F: Future<Output: IntoVerdict> + Send + 'static,
{
    type Output = F::Output;
    type Future = F;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, packet: Packet) -> F {
        (self.0)(packet)
    }
}

/// A service of tower: see [`Queue::serve_service`](crate::Queue::serve_service).
#[cfg(feature = "tower")]
#[derive(Clone)]
pub struct Service<S>(pub(super) S);

#[cfg(feature = "tower")]
impl<S> sealed::Sealed for Service<S> {}

#[cfg(feature = "tower")]
impl<S> Decide for Service<S>
where
    S: tower_service::Service<Packet, Response: IntoVerdict, Error: fmt::Display + Send + 'static>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Output = Result<S::Response, S::Error>;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
        self.0.poll_ready(cx).map_err(|error| error.to_string())
    }

    fn call(&mut self, packet: Packet) -> S::Future {
        self.0.call(packet)
    }
}
