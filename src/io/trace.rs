//! The events for `tracing`. Their names and fields are in this file only.

use tracing::Span;

use crate::{
    state::{Report, ReportKind},
    types::{Action, Error, Stats},
};

/// `nf_queue_nf_hook_drop` and `nfqnl_dev_drop`.
const LIKELY_CAUSE: &str = "a base chain was deleted, with its table or by iptables, or an interface went down";

/// The span of a queue, and its events.
#[derive(Debug)]
pub(crate) struct Trace {
    span: Span,
}

/// All events and spans of this crate have the same target.
macro_rules! event {
    ($self:ident, $level:ident, $($rest:tt)*) => {
        tracing::event!(target: "tokio_nfqueue", parent: &$self.span, tracing::Level::$level, $($rest)*)
    };
}

impl Trace {
    pub(crate) fn new(queue: u16) -> Self {
        Self { span: tracing::info_span!(target: "tokio_nfqueue", parent: None, "nfqueue", queue) }
    }

    pub(crate) fn watch_failed(&self, error: &std::io::Error) {
        event!(self, ERROR, %error, "deadlines of unread packets are not kept");
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
        let (received, in_flight) = (stats.received.packets, stats.held.in_flight);
        match error {
            None => event!(self, DEBUG, received, in_flight, "closed"),
            Some(error) => event!(self, WARN, error, received, in_flight, "unbind failed"),
        }
    }

    pub(crate) fn handed_over(&self, unread: usize) {
        event!(self, DEBUG, unread, "handed over");
    }

    pub(crate) fn taken_over(&self, unread: usize) {
        event!(self, DEBUG, unread, "taken over");
    }

    pub(crate) fn report(&self, report: Report) {
        let Report { kind, count, packet } = report;
        match kind {
            ReportKind::Lost => event!(self, WARN, count, "packets lost to a full receive buffer"),
            ReportKind::Unanswered => event!(self, DEBUG, count, packet, "default action"),
            ReportKind::Expired => event!(self, DEBUG, count, packet, "deadline expired"),
            ReportKind::Late => event!(self, DEBUG, count, packet, "verdict too late"),
            ReportKind::Dropped => {
                let likely_cause = LIKELY_CAUSE;
                event!(self, WARN, count, packet, likely_cause, "packets dropped by the kernel while they were queued")
            }
            ReportKind::Refused => event!(self, WARN, count, packet, "verdict refused"),
            ReportKind::Malformed => event!(self, WARN, count, packet, "malformed message"),
            ReportKind::Unsent => event!(self, WARN, count, "send failed"),
            ReportKind::CapabilityMissing => event!(self, ERROR, count, "capability missing"),
            ReportKind::PolicyPanicked => event!(self, ERROR, count, "flush policy panicked"),
            ReportKind::Failed => event!(self, ERROR, count, "queue failed"),
        }
    }
}
