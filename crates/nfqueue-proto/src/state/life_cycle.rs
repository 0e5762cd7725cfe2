//! The life cycle of a queue.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use crate::types::Action;

/// Where a queue is between `bind` and the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LifeCycle {
    /// Bound. Packets are handed out.
    Open,
    /// No packet is handed out any more. A thread asks the kernel to queue no more, and receives
    /// what is queued.
    Stopping {
        /// For packets that were not handed out.
        action: Action,
        /// How long owed verdicts are awaited.
        limit: WaitLimit,
        /// The capability was missing; it is tried again.
        failed: bool,
    },
    /// Nothing can be queued any more, and everything has been received. The verdicts that are owed
    /// are awaited.
    Waiting {
        /// As in `Stopping`.
        action: Action,
        /// As in `Stopping`.
        limit: WaitLimit,
    },
    /// Every packet is decided; a thread unbinds the queue.
    Unbinding {
        /// As in `Stopping`.
        action: Action,
        /// As in `Stopping`.
        limit: WaitLimit,
    },
    /// The queue is being handed over to another process, or taken over from one. No packet is
    /// handed out.
    HandingOver {
        /// The socket is not touched.
        frozen: bool,
        /// Until when verdicts that are owed are awaited.
        limit: WaitLimit,
        /// The shutdown that was requested meanwhile. It begins if the queue continues here.
        then: Option<(Action, WaitLimit)>,
    },
    /// Nothing is sent or received any more.
    Closed(Binding),
}

/// Who has a closed queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// No socket.
    Unbound,
    /// The capability was missing; unbinding is tried again.
    StillBound,
    /// Another process, with the socket.
    HandedOver,
}

impl LifeCycle {
    /// Whether it is [`Open`](Self::Open).
    pub fn is_open(self) -> bool {
        self == Self::Open
    }

    /// Whether the stream ends. It does not while the queue is being handed over.
    pub fn has_ended(self) -> bool {
        !matches!(self, Self::Open | Self::HandingOver { .. })
    }

    /// Whether it is [`HandingOver`](Self::HandingOver).
    pub fn is_handing_over(self) -> bool {
        matches!(self, Self::HandingOver { .. })
    }

    /// Whether the socket is not touched.
    pub fn is_frozen(self) -> bool {
        matches!(self, Self::HandingOver { frozen: true, .. } | Self::Closed(Binding::HandedOver))
    }

    /// Whether it is [`Closed`](Self::Closed).
    pub fn is_closed(self) -> bool {
        matches!(self, Self::Closed(_))
    }
}

/// The present [`LifeCycle`], and its [`Hold`].
#[derive(Debug)]
pub(super) struct Life {
    cycle: LifeCycle,
    hold: Hold,
}

impl Life {
    pub(super) fn new() -> Self {
        Self { cycle: LifeCycle::Open, hold: Hold(Arc::new(AtomicU8::new(OPEN))) }
    }

    pub(super) fn set(&mut self, cycle: LifeCycle) {
        self.cycle = cycle;
        let hold = match cycle {
            _ if cycle.is_frozen() => FROZEN,
            LifeCycle::HandingOver { .. } => HELD,
            _ => OPEN,
        };
        self.hold.0.store(hold, Ordering::SeqCst);
    }

    pub(super) fn hold(&self) -> &Hold {
        &self.hold
    }
}

impl Deref for Life {
    type Target = LifeCycle;

    fn deref(&self) -> &LifeCycle {
        &self.cycle
    }
}

/// How far a hand-over is, for those who hand out and receive packets: they do not wait for the
/// machine's lock to read this. It changes with the [`LifeCycle`].
#[derive(Debug, Clone)]
pub struct Hold(Arc<AtomicU8>);

const OPEN: u8 = 0;
const HELD: u8 = 1;
const FROZEN: u8 = 2;

impl Hold {
    /// Whether no packet is handed out.
    pub fn is_held(&self) -> bool {
        self.0.load(Ordering::SeqCst) != OPEN
    }

    /// Whether the socket is not touched.
    pub fn is_frozen(&self) -> bool {
        self.0.load(Ordering::SeqCst) == FROZEN
    }
}

/// How long the verdicts that are owed are awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitLimit {
    /// No limit: the queue was dropped while packets are still held.
    Never,
    /// Until this time.
    At(Instant),
    /// The time is over: every packet has been decided.
    Over,
}

impl WaitLimit {
    /// The earlier of the two.
    pub(super) fn tighten(self, other: Self) -> Self {
        match (self, other) {
            (Self::Over, _) | (_, Self::Over) => Self::Over,
            (Self::Never, limit) | (limit, Self::Never) => limit,
            (Self::At(one), Self::At(another)) => Self::At(one.min(another)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_handed_over_is_not_touched_again() {
        let mut life = Life::new();
        let hold = life.hold().clone();
        let mut after = |cycle| {
            life.set(cycle);
            (hold.is_held(), hold.is_frozen())
        };
        let handing_over = |frozen| LifeCycle::HandingOver { frozen, limit: WaitLimit::Never, then: None };
        assert_eq!(after(handing_over(false)), (true, false));
        assert_eq!(after(handing_over(true)), (true, true));
        assert_eq!(after(LifeCycle::Open), (false, false));
        assert_eq!(after(LifeCycle::Closed(Binding::Unbound)), (false, false));
        assert_eq!(after(LifeCycle::Closed(Binding::HandedOver)), (true, true));
    }
}
