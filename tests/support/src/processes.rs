//! Processes have copies of all descriptors until they execute their program.

use std::{
    io,
    process::{Child, Command},
    sync::{PoisonError, RwLock},
};

static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process, while nobody closes anything by [`close`].
///
/// # Errors
/// As [`Command::spawn`].
pub fn start(command: &mut Command) -> io::Result<Child> {
    let _starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Drops what owns a socket. The kernel then closes the socket at once: no process that another
/// thread begins to [`start`] has a copy of it.
pub fn close<T>(owner: T) {
    let _no_start = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    drop(owner);
}
