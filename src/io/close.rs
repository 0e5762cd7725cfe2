//! The graceful shutdown of a queue.
//!
//! 1. The kernel is asked to queue no more packets: fail-open is switched on if undecided packets
//!    are accepted, then the length is set to 0. Both are acknowledged, so everything that was
//!    queued before is in the socket by then.
//! 2. Packets that have not been handed out, including those in the socket, get the action.
//! 3. The verdicts that owners still owe are awaited.
//! 4. The queue is unbound. The kernel drops nothing, because nothing is queued any more.

use std::{task::Poll, time::Duration};

use tokio::task::yield_now;

use super::{
    receiver::RECEIVE_BATCH,
    shared::{Shared, lock},
};
use crate::{
    state::{Clock, WaitLimit},
    types::{Action, Error},
    wire::config::{Command, Config, FLAG_FAIL_OPEN},
};

impl Shared {
    /// Decides packets that were received and not handed out.
    pub(super) fn decide_unread(&self, action: Action) {
        let mut receiver = lock(&self.receiver);
        let unread = std::mem::take(&mut receiver.packets);
        // Under both locks, so that the end of the time-out does not come in between, and takes
        // these packets for packets that are owed.
        self.core().machine.decide_unread(unread.iter().map(|packet| packet.id), action);
        drop(receiver);
    }

    /// The timer fires, and the time-out of a queue that is being stopped may be over. No packet is
    /// received between the decision about what was not handed out and the end of the wait.
    pub(super) fn fire_while_stopping(&self) {
        let mut receiver = lock(&self.receiver);
        let mut core = self.core();
        let overdue = core.machine.overdue_while_stopping();
        let unread = overdue.map(|action| (std::mem::take(&mut receiver.packets), action));
        if let Some((unread, action)) = &unread {
            core.machine.decide_unread(unread.iter().map(|packet| packet.id), *action);
        }
        core.machine.fire();
        drop((core, receiver, unread));
        self.perform_pending();
    }

    /// Steps 1 and 2.
    pub(super) fn drain(&self, action: Action) {
        // If undecided packets are not accepted, fail-open is switched off, so that a firewall
        // stays closed. It has a message of its own before that with the length: nfqnl_recv_config
        // applies the length first and the flags later, and a packet in between would find a full
        // queue with the old flags.
        // Rules that fail closed may still send packets here, and must not have them accepted.
        let accepts = action == Action::Accept && !self.settings.fail_closed;
        let fail_open = if accepts { FLAG_FAIL_OPEN } else { 0 };
        let flags = Config { flags: Some((FLAG_FAIL_OPEN, fail_open)), ..Config::default() };
        let length = Config { max_len: Some(0), ..Config::default() };
        let result = [flags, length].iter().try_for_each(|config| self.configure_acknowledged("close queue", config));
        // The reply was behind everything that was queued.
        self.decide_unread(action);
        // If it is unknown, the result is the kernel's reply.
        let capable = self.socket.was_capable().unwrap_or(false);
        self.with(|core| core.machine.stopped(result, capable));
    }

    /// As [`drain`](Self::drain), but lets other tasks run in between: a long queue may hold 65 536
    /// packets, and deciding each takes some microseconds.
    async fn drain_yielding(&self, action: Action) {
        // If this future is dropped, the shutdown continues.
        let rest = Rest { shared: self, action };
        self.decide_unread(action);
        let rounds = self.core().machine.limits().max_len as usize / RECEIVE_BATCH;
        for _ in 0..rounds {
            self.with(|core| core.machine.flush());
            let empty = self.receive(&mut lock(&self.receiver), RECEIVE_BATCH);
            self.perform_pending();
            if !matches!(empty, Ok(false)) {
                break;
            }
            yield_now().await;
        }
        drop(rest);
    }

    /// Step 4, by the thread that finds everything settled.
    pub(super) fn unbind(&self) {
        let config = Config { command: Some(Command::Unbind), ..Config::default() };
        let result = self.configure_acknowledged("unbind queue", &config);
        let error = result.as_ref().err().map(ToString::to_string);
        let capable = self.socket.was_capable().unwrap_or(false);
        if self.with(|core| core.machine.unbound(result, capable)) {
            self.trace.closed(error, &self.stats());
        }
    }

    /// Drains and unbinds the queue; resolves when that is done. It continues if it is
    /// not awaited any more.
    pub(crate) async fn close(&self, action: Action, timeout: Duration) -> Result<(), Error> {
        let limit = self.clock.now().checked_add(timeout).map_or(WaitLimit::Never, WaitLimit::At);
        self.trace.closing(action);
        self.prove_sent();
        if self.with(|core| core.machine.begin_close(action, limit)) {
            self.drain_yielding(action).await;
        }
        std::future::poll_fn(|cx| {
            let waker = cx.waker().clone();
            let mut core = self.core();
            if core.machine.life().is_closed() {
                return Poll::Ready(core.machine.take_close_error().map_or(Ok(()), Err));
            }
            let spare = core.wakers.wait(waker);
            drop(core);
            drop(spare);
            Poll::Pending
        })
        .await
    }

    /// The receive half has been dropped.
    pub(crate) fn stream_dropped(&self) {
        let action = self.settings.on_unanswered;
        self.prove_sent();
        if self.with(|core| core.machine.begin_close(action, WaitLimit::Never)) {
            self.trace.closing(action);
            self.drain(action);
        }
    }
}

/// The rest of a drain, done when this is dropped.
struct Rest<'a> {
    shared: &'a Shared,
    action: Action,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.shared.drain(self.action);
    }
}
