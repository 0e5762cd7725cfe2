//! The driver: the queue's task in the user's runtime. It reports when the runtime has run every
//! task that was ready, which only a task can find out. Nothing with a time limit depends on it:
//! see `timer`.

use std::{
    io,
    sync::{Arc, Weak},
};

use tokio::{sync::Notify, task::yield_now};

use super::shared::Shared;

/// Starts the timer of a queue, and its driver in the current runtime.
///
/// # Errors
/// The timer thread cannot be started.
pub(super) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    shared.start_timer()?;
    shared.with(|core| core.machine.set_driven(true));
    let driver = Driver { shared: Arc::downgrade(shared), signal: Arc::clone(&shared.signal) };
    tokio::spawn(driver.run());
    Ok(())
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
            let (wait_for_tasks, probe) = {
                let Some(shared) = self.shared.upgrade() else { return };
                let core = shared.core();
                if core.machine.life().is_closed() {
                    return;
                }
                (core.machine.wants_tasks_ran(), core.machine.is_permission_missing())
            };
            if wait_for_tasks {
                // Runs this task after every task that is ready now (Tokio wakes deferred tasks
                // after the run queue).
                yield_now().await;
            }
            let Some(shared) = self.shared.upgrade() else { return };
            if wait_for_tasks {
                shared.with(|core| core.machine.tasks_ran());
            }
            // A thread of the runtime represents the process: while it lacks the capability,
            // nothing is sent.
            if probe {
                shared.probe();
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The runtime ends, or the queue has been closed. From now on each verdict is sent at once.
        if let Some(shared) = self.shared.upgrade() {
            shared.with(|core| core.machine.set_driven(false));
        }
    }
}
