//! What several locks of a queue share: numbers that are read and written without one of their own.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// The sequence number of the last message whose send has returned.
///
/// The kernel puts a reply into the socket before the send returns. So if the socket is found empty
/// after the number was loaded, every reply up to it has been received: a message that still waits
/// for one has lost it. A stale number is smaller, and only delays that conclusion.
#[derive(Debug, Default)]
pub(super) struct LastSent(AtomicU32);

impl LastSent {
    /// Called when the send has returned.
    pub(super) fn store(&self, sequence: u32) {
        self.0.store(sequence, Ordering::Release);
    }

    /// Called before the socket is read.
    pub(super) fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}

/// How many packets have been handed out, and how many of them have come back, with a verdict or
/// without.
#[derive(Debug, Default)]
pub(super) struct HandedOut {
    /// Written under the receive lock.
    out: AtomicUsize,
    /// Read and written under the lock of the state.
    back: AtomicUsize,
}

impl HandedOut {
    /// The caller holds the receive lock.
    pub(super) fn hand_out(&self) {
        add_one(&self.out);
    }

    /// The caller holds the lock of the state.
    pub(super) fn come_back(&self) {
        add_one(&self.back);
    }

    /// Whether a packet has not come back. The caller holds the lock of the state.
    pub(super) fn is_any_held(&self) -> bool {
        self.back.load(Ordering::Relaxed) != self.out.load(Ordering::Relaxed)
    }
}

/// Under a lock, so that no read-modify-write operation is needed.
fn add_one(counter: &AtomicUsize) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}
