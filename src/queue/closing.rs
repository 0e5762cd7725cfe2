//! The end of a queue, without losing a packet.
//!
//! 1. fail-open, where unanswered packets are accepted, then length 0: no new packet is queued. Acknowledged; what was queued
//!    before it took effect is in the socket by then.
//! 2. Everything received and not handed out, and all that is still in the socket, is answered for.
//! 3. The verdicts that owners still owe are awaited.
//! 4. The queue is unbound. Nothing is queued any more, so that drops nothing.

use std::{task::Poll, time::Instant};

use tokio::task::yield_now;

use super::{
    inbox::RECEIVE_BATCH,
    shared::{Phase, Shared, lock},
};
use crate::{
    Action, Error, ErrorKind,
    wire::config::{Command, Config, FLAG_FAIL_OPEN},
};

impl Shared {
    /// Steps 1 and 2, at once.
    fn drain(&self, fate: Action, until: Option<Instant>) {
        if self.enter_drain(fate, until) {
            self.drain_queued(fate);
        }
    }

    /// From now on no packet is handed out. True if it is the caller who is to go on with the end; false if it has begun
    /// already. With `until`, owners are waited for no longer.
    fn enter_drain(&self, fate: Action, until: Option<Instant>) -> bool {
        let mut core = self.core();
        match &mut core.phase {
            phase @ Phase::Open => *phase = Phase::Draining { fate, until },
            Phase::Draining { until: bound @ None, .. } if until.is_some() => {
                // Begun by a drop, which waits for ever; now somebody waits for it who does not.
                *bound = until;
                drop(core);
                self.signal.notify_one();
                return false;
            }
            _ => return false,
        }
        core.wake_stream();
        true
    }

    /// Answers for what is unread.
    fn answer_unread(&self, fate: Action) {
        let unread: Vec<u32> = lock(&self.inbox).packets.drain(..).map(|packet| packet.id).collect();
        let mut core = self.core();
        for id in unread {
            let _ = core.decide_unanswered(id, fate);
        }
    }

    /// Stops the queue and answers for what is in it.
    fn drain_queued(&self, fate: Action) {
        // fail-open would let traffic past a firewall that fails closed, so it is taken back there. It has a message of its
        // own, ahead of the length: nfqnl_recv_config applies the length first and the flags a moment later, and a packet in
        // between would meet a full queue with the flags as they were.
        let fail_open = if fate == Action::Accept { FLAG_FAIL_OPEN } else { 0 };
        let flags = Config { flags: Some((FLAG_FAIL_OPEN, fail_open)), ..Config::default() };
        let length = Config { max_len: Some(0), ..Config::default() };
        let result = [flags, length].iter().try_for_each(|config| match self.configure("drain queue", config) {
            // The answer found no room. The request may be repeated.
            Err(error) if error.kind() == ErrorKind::Unconfirmed => self.configure("drain queue", config),
            result => result,
        });
        self.answer_unread(fate);
        let mut core = self.core();
        if let Err(error) = result {
            core.close_error = Some(error);
        }
        if matches!(core.phase, Phase::Draining { until: Some(_), .. }) && !core.driven {
            // There is no driver, so nobody would end the wait.
            let left = core.decide_rest(fate);
            if left > 0 {
                core.close_error.get_or_insert_with(|| self.timed_out(left));
            }
        }
        core.drained = true;
        core.flush_wanted = true;
        drop(core);
        self.signal.notify_one();
        // Ends with step 4 if nothing is owed; else the flush that sends the last verdict does.
        self.flush();
    }

    /// As [`drain`](Self::drain), but lets the runtime's other tasks run in between: a long queue may hold 65 536 packets,
    /// and to answer for them takes some microseconds each.
    async fn drain_gently(&self, fate: Action, until: Instant) {
        if !self.enter_drain(fate, Some(until)) {
            return;
        }
        // Whatever becomes of this future, the end goes on.
        let rest = Rest { shared: self, fate };
        self.answer_unread(fate);
        let rounds = self.core().limits.max_len as usize / RECEIVE_BATCH;
        for _ in 0..rounds {
            self.core().flush_wanted = true;
            self.flush();
            let empty = self.receive(&mut lock(&self.inbox), RECEIVE_BATCH);
            if !matches!(empty, Ok(false)) {
                break;
            }
            yield_now().await;
        }
        drop(rest);
    }

    /// Step 4, by the one who sees that everything is settled.
    pub(super) fn unbind(&self) {
        {
            let mut core = self.core();
            if !matches!(core.phase, Phase::Draining { .. }) {
                return;
            }
            core.phase = Phase::Unbinding;
        }
        let config = Config { command: Some(Command::Unbind), ..Config::default() };
        let result = self.configure("unbind queue", &config);
        let mut core = self.core();
        core.phase = Phase::Closed;
        if let Err(error) = result {
            core.close_error.get_or_insert(error);
        }
        core.wake_stream();
        core.wake_waiting();
        drop(core);
        self.signal.notify_one();
    }

    /// Drains the queue and unbinds it; ends when that is done. Goes on by itself if it is no longer awaited.
    pub(crate) async fn close(&self, fate: Action) -> Result<(), Error> {
        self.drain_gently(fate, Instant::now() + self.settings.close_timeout).await;
        std::future::poll_fn(|cx| {
            let mut core = self.core();
            if core.phase == Phase::Closed {
                return Poll::Ready(core.close_error.take().map_or(Ok(()), Err));
            }
            core.wait(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// The receiving half is gone.
    pub(crate) fn abandon(&self) {
        self.drain(self.settings.on_unanswered, None);
    }

    pub(super) fn timed_out(&self, left: usize) -> Error {
        Error::new(ErrorKind::TimedOut, format!("close queue {}", self.settings.queue))
            .with_detail(format!("{left} packets were still undecided after {:?}", self.settings.close_timeout))
    }
}

/// What is left to do of a drain, done when this is dropped.
struct Rest<'a> {
    shared: &'a Shared,
    fate: Action,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.shared.drain_queued(self.fate);
    }
}
