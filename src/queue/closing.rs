//! The end of a queue, without losing a packet.
//!
//! 1. fail-open, where unanswered packets are accepted, then length 0: no new packet is queued. Acknowledged; what was queued
//!    before it took effect is in the socket by then.
//! 2. Everything received and not handed out, and all that is still in the socket, is answered for.
//! 3. The verdicts that owners still owe are awaited.
//! 4. The queue is unbound. Nothing is queued any more, so that drops nothing.

use std::{
    task::Poll,
    time::{Duration, Instant},
};

use tokio::task::yield_now;

use super::{
    inbox::RECEIVE_BATCH,
    shared::{Shared, lock},
};
use crate::{
    Action, Error,
    state::{Life, Limit},
    sys,
    wire::config::{Command, Config, FLAG_FAIL_OPEN},
};

impl Shared {
    /// Answers for what was received and not handed out.
    fn answer_unread(&self, action: Action) {
        let unread = std::mem::take(&mut lock(&self.inbox).packets);
        self.core().machine.answer_for(unread.iter().map(|packet| packet.id), action);
    }

    /// Steps 1 and 2.
    pub(super) fn drain_queued(&self, action: Action) {
        // fail-open would let traffic past a firewall that fails closed, so it is taken back there. It has a message of its
        // own, ahead of the length: nfqnl_recv_config applies the length first and the flags a moment later, and a packet in
        // between would meet a full queue with the flags as they were.
        let fail_open = if action == Action::Accept { FLAG_FAIL_OPEN } else { 0 };
        let flags = Config { flags: Some((FLAG_FAIL_OPEN, fail_open)), ..Config::default() };
        let length = Config { max_len: Some(0), ..Config::default() };
        let result = [flags, length].iter().try_for_each(|config| self.configure_surely("drain queue", config));
        // The answer was behind all that was queued.
        self.answer_unread(action);
        let capable = sys::has_net_admin();
        self.with(|core| core.machine.stopped(result, capable));
    }

    /// As [`drain_queued`](Self::drain_queued), but lets the runtime's other tasks run in between: a long queue may hold
    /// 65 536 packets, and to answer for them takes some microseconds each.
    async fn drain_gently(&self, action: Action) {
        // Whatever becomes of this future, the end goes on.
        let rest = Rest { shared: self, action };
        self.answer_unread(action);
        let rounds = self.core().machine.limits().max_len as usize / RECEIVE_BATCH;
        for _ in 0..rounds {
            self.with(|core| core.machine.flush());
            let empty = self.receive(&mut lock(&self.inbox), RECEIVE_BATCH);
            self.attend();
            if !matches!(empty, Ok(false)) {
                break;
            }
            yield_now().await;
        }
        drop(rest);
    }

    /// Step 4, by the one who sees that everything is settled.
    pub(super) fn unbind(&self) {
        let config = Config { command: Some(Command::Unbind), ..Config::default() };
        let result = self.configure_surely("unbind queue", &config);
        let error = result.as_ref().err().map(ToString::to_string);
        let capable = sys::has_net_admin();
        if self.with(|core| core.machine.unbound(result, capable)) {
            self.trace.closed(error, &self.stats());
        }
    }

    /// Drains the queue and unbinds it; ends when that is done. Goes on by itself if it is no longer awaited.
    pub(crate) async fn close(&self, action: Action, timeout: Duration) -> Result<(), Error> {
        let limit = Instant::now().checked_add(timeout).map_or(Limit::Never, Limit::At);
        self.trace.closing(action);
        if self.with(|core| core.machine.begin_close(action, limit)) {
            self.drain_gently(action).await;
        }
        std::future::poll_fn(|cx| {
            let waker = cx.waker().clone();
            let mut core = self.core();
            if core.machine.life() == Life::Closed {
                return Poll::Ready(core.machine.take_close_error().map_or(Ok(()), Err));
            }
            let spare = core.wait(waker);
            drop(core);
            drop(spare);
            Poll::Pending
        })
        .await
    }

    /// The receiving half is gone.
    pub(crate) fn stream_dropped(&self) {
        let action = self.settings.on_unanswered;
        if self.with(|core| core.machine.begin_close(action, Limit::Never)) {
            self.trace.closing(action);
            self.drain_queued(action);
        }
    }
}

/// What is left to do of a drain, done when this is dropped.
struct Rest<'a> {
    shared: &'a Shared,
    action: Action,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.shared.drain_queued(self.action);
    }
}
