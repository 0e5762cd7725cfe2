//! The end of a queue, without losing a packet.
//!
//! 1. Length 0 (and fail-open where unanswered packets are accepted): no new packet is queued. One message, acknowledged;
//!    what was queued before it took effect is in the socket by then.
//! 2. Everything received and not handed out, and all that is still in the socket, is answered for.
//! 3. The verdicts that owners still owe are awaited.
//! 4. The queue is unbound. Nothing is queued any more, so that drops nothing.

use std::{task::Poll, time::Instant};

use super::shared::{Phase, Shared, lock, plain};
use crate::{
    Action, Error, ErrorKind,
    wire::config::{Command, Config, FLAG_FAIL_OPEN},
};

impl Shared {
    /// Steps 1 and 2. Does nothing if the end has already begun. With `until`, owners are waited for no longer.
    pub(super) fn begin_drain(&self, fate: Action, until: Option<Instant>) {
        {
            let mut core = self.core();
            match &mut core.phase {
                phase @ Phase::Open => *phase = Phase::Draining { fate, until },
                Phase::Draining { until: bound @ None, .. } if until.is_some() => {
                    // Begun by a drop, which waits for ever; now somebody waits for it who does not.
                    *bound = until;
                    drop(core);
                    self.signal.notify_one();
                    return;
                }
                _ => return,
            }
            core.wake_stream();
        }
        // fail-open would let traffic past a firewall that fails closed, so it is taken back there.
        let fail_open = if fate == Action::Accept { FLAG_FAIL_OPEN } else { 0 };
        let config = Config { max_len: Some(0), flags: Some((FLAG_FAIL_OPEN, fail_open)), ..Config::default() };
        let mut result = self.configure("drain queue", &config);
        if matches!(&result, Err(error) if error.kind() == ErrorKind::Unconfirmed) {
            // The answer found no room. The request may be repeated.
            result = self.configure("drain queue", &config);
        }
        let unread: Vec<u32> = lock(&self.inbox).packets.drain(..).map(|packet| packet.id).collect();
        let mut core = self.core();
        for id in unread {
            core.counters.unanswered += 1;
            let _ = core.decide(id, plain(fate));
        }
        if let Err(error) = result {
            core.close_error = Some(error);
        }
        if until.is_some() && !core.driven {
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
        self.begin_drain(fate, Some(Instant::now() + self.settings.close_timeout));
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
        self.begin_drain(self.settings.on_unanswered, None);
    }

    pub(super) fn timed_out(&self, left: usize) -> Error {
        Error::new(ErrorKind::TimedOut, format!("close queue {}", self.settings.queue))
            .with_detail(format!("{left} packets were still undecided after {:?}", self.settings.close_timeout))
    }
}
