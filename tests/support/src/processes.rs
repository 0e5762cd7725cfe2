//! Processes have copies of all descriptors until they execute their program.

use std::{
    io,
    process::{Child, Command},
    sync::{PoisonError, RwLock},
};

static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process, while no thread is in [`drop_now`].
///
/// # Errors
/// As [`Command::spawn`].
pub fn start_process(command: &mut Command) -> io::Result<Child> {
    let _starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Drops what owns a socket. The kernel closes the socket at once: no process that another thread
/// starts by [`start_process`] has a copy of it.
pub fn drop_now<T>(owner: T) {
    let _no_start = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    drop(owner);
}
