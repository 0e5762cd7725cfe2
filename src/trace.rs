//! What is told to `tracing`: the one place that knows the names of events and fields.

use tracing::Span;

use crate::{
    Action, Error, Stats,
    state::{Kind, Report},
};

/// The span of a queue, and the events in it.
#[derive(Debug)]
pub(crate) struct Trace {
    span: Span,
}

/// One name for all events and spans of this crate, whatever module they come from.
macro_rules! event {
    ($self:ident, $level:ident, $($rest:tt)*) => {
        tracing::event!(target: "tokio_nfqueue", parent: &$self.span, tracing::Level::$level, $($rest)*)
    };
}

impl Trace {
    pub(crate) fn new(queue: u16) -> Self {
        Self { span: tracing::info_span!(target: "tokio_nfqueue", parent: None, "nfqueue", queue) }
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    pub(crate) fn bound(&self, max_len: u32, receive_buffer: usize) {
        event!(self, DEBUG, max_len, receive_buffer, "bound");
    }

    pub(crate) fn reconfigured(&self, result: &Result<(), Error>) {
        match result {
            Ok(()) => event!(self, DEBUG, "reconfigured"),
            Err(error) => event!(self, WARN, %error, "reconfigure failed"),
        }
    }

    pub(crate) fn closing(&self, action: Action) {
        event!(self, DEBUG, ?action, "closing");
    }

    pub(crate) fn closed(&self, error: Option<String>, stats: &Stats) {
        let (received, in_flight) = (stats.received, stats.in_flight);
        match error {
            None => event!(self, DEBUG, received, in_flight, "closed"),
            Some(error) => event!(self, WARN, error, received, in_flight, "unbind failed"),
        }
    }

    pub(crate) fn report(&self, report: Report) {
        let Report { kind, count, packet } = report;
        match kind {
            Kind::Lost => event!(self, WARN, count, "packets lost to a full receive buffer"),
            Kind::Unanswered => event!(self, DEBUG, count, packet, "default action"),
            Kind::Expired => event!(self, DEBUG, count, packet, "deadline expired"),
            Kind::Late => event!(self, DEBUG, count, packet, "verdict too late"),
            Kind::Refused => event!(self, WARN, count, packet, "verdict refused"),
            Kind::Malformed => event!(self, WARN, count, packet, "malformed message"),
            Kind::Unsent => event!(self, WARN, count, "send failed"),
            Kind::CapabilityMissing => event!(self, ERROR, count, "capability missing"),
            Kind::PolicyPanicked => event!(self, ERROR, count, "flush policy panicked"),
            Kind::Failed => event!(self, ERROR, count, "queue failed"),
        }
    }
}
