//! The task in the user's runtime: it sends what was gathered when the runtime has run every task that was ready, which only
//! a task can know. What has a time in it does not depend on it: see `keeper`.

use std::sync::{Arc, Weak};

use tokio::{sync::Notify, task::yield_now};

use super::shared::Shared;
use crate::state::Life;

/// Starts the driver of a queue in the current runtime.
pub(super) fn start(shared: &Arc<Shared>) {
    shared.with(|core| core.machine.set_driven(true));
    let driver = Driver { shared: Arc::downgrade(shared), signal: Arc::clone(&shared.signal) };
    tokio::spawn(driver.run());
}

struct Driver {
    /// Weak, so that waiting does not keep the queue alive.
    shared: Weak<Shared>,
    signal: Arc<Notify>,
}

impl Driver {
    async fn run(self) {
        loop {
            self.signal.notified().await;
            let (pass_end, probe) = {
                let Some(shared) = self.shared.upgrade() else { return };
                let core = shared.core();
                if core.machine.life() == Life::Closed {
                    return;
                }
                (core.machine.wants_pass_end(), core.machine.is_permission_missing())
            };
            if pass_end {
                // Puts this task behind everything that is ready now (Tokio wakes deferred tasks after the run queue).
                yield_now().await;
            }
            let Some(shared) = self.shared.upgrade() else { return };
            if pass_end {
                shared.with(|core| core.machine.pass_ended());
            }
            // A runtime's thread stands for the process: while it lacks the capability, nothing is sent.
            if probe {
                shared.probe();
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The runtime ends, or the queue has closed. From now on verdicts are sent as they come.
        if let Some(shared) = self.shared.upgrade() {
            shared.with(|core| core.machine.set_driven(false));
        }
    }
}
