//! The task that keeps promises with time in them: it flushes at the end of a scheduler's pass and when a delay is over,
//! answers for packets at their deadline, and ends a drain that takes too long. Nobody needs to poll the stream for it.

use std::{
    pin::pin,
    sync::{Arc, Weak},
    time::Instant,
};

use futures::future::{Either, select};
use tokio::{sync::Notify, task::yield_now};

use super::shared::{Next, Phase, Shared, plain};
use crate::{Occasion, alarm::Alarm};

/// Starts the driver of a queue in the current runtime.
pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<()> {
    let alarm = Alarm::new()?;
    shared.core().driven = true;
    let driver = Driver { shared: Arc::downgrade(shared), signal: Arc::clone(&shared.signal), alarm };
    tokio::spawn(driver.run());
    Ok(())
}

struct Driver {
    /// Weak, so that waiting does not keep the queue alive.
    shared: Weak<Shared>,
    signal: Arc<Notify>,
    alarm: Alarm,
}

impl Driver {
    async fn run(mut self) {
        loop {
            let broken = matches!(
                select(pin!(self.signal.notified()), pin!(self.alarm.rings())).await,
                Either::Right((Err(_), _))
            );
            if broken {
                return;
            }
            let pass_end = {
                let Some(shared) = self.shared.upgrade() else { return };
                shared.core().pass_end
            };
            if pass_end {
                // Puts this task behind everything that is ready now (Tokio wakes deferred tasks after the run queue).
                yield_now().await;
            }
            let Some(shared) = self.shared.upgrade() else { return };
            let Some(next_alarm) = shared.tend() else { return };
            if let Some(at) = next_alarm
                && self.alarm.set(at).is_err()
            {
                return;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The runtime ends, or the queue has closed. From now on verdicts are sent as they come.
        if let Some(shared) = self.shared.upgrade() {
            let mut core = shared.core();
            core.driven = false;
            core.pass_end = false;
            core.flush_wanted = true;
            drop(core);
            shared.flush();
        }
    }
}

impl Shared {
    /// Does what is due; tells when to come again, or `None` when the queue has closed.
    fn tend(&self) -> Option<Option<Instant>> {
        let mut core = self.core();
        let now = Instant::now();
        if core.alarm.is_some_and(|alarm| alarm <= now) {
            core.alarm = None;
        }
        if let Some((_, action)) = self.settings.deadline {
            while let Some(ids) = core.deadlines.due(now) {
                for id in ids {
                    if core.ledger.is_undecided(id) {
                        core.counters.expired += 1;
                        let _ = core.decide(id, plain(action));
                    }
                }
            }
        }
        if let Phase::Draining { fate, until: Some(until) } = core.phase
            && until <= now
        {
            core.phase = Phase::Draining { fate, until: None };
            let left = core.decide_rest(fate);
            core.close_error.get_or_insert_with(|| self.timed_out(left));
        }
        let mut next = Next::Nothing;
        if std::mem::take(&mut core.pass_end) {
            next = core.consult(Occasion::PassEnd);
        }
        if next != Next::Flush && core.due.is_some_and(|due| due <= now) {
            core.due = None;
            next = core.consult(Occasion::Due);
        }
        if next != Next::Flush && core.oldest.is_none() {
            // Deadlines may have decided something that nobody has asked the policy about.
            next = core.consult(Occasion::Decided);
        }
        if next == Next::Flush {
            drop(core);
            self.flush();
            core = self.core();
        }
        if core.phase == Phase::Closed {
            return None;
        }
        if core.pass_end {
            self.signal.notify_one();
        }
        let until = match core.phase {
            Phase::Draining { until, .. } => until,
            _ => None,
        };
        let wish = [core.due, core.deadlines.next(), until].into_iter().flatten().min();
        if let Some(at) = wish {
            core.alarm = Some(core.alarm.map_or(at, |alarm| alarm.min(at)));
        }
        Some(wish)
    }
}
