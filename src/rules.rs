//! The rules of a queue: they are installed when it is bound, and all ends in the order that loses
//! no packet.
//!
//! 1. The rules are removed, so that no new packet is queued. The table stays, because removing it
//!    would drop what is queued.
//! 2. The queue is closed, which waits for the verdicts that are owed.
//! 3. The table is removed.
//!
//! Steps 1 and 3 take the kernel some tens of milliseconds each, and all must continue when the
//! caller's future is dropped, or its runtime ends. So a thread does them.

#[cfg(feature = "divert")]
mod installed;
#[cfg(not(feature = "divert"))]
mod none;

#[cfg(feature = "divert")]
pub(crate) use installed::{PreparedRules, Rules, Wanted};
#[cfg(not(feature = "divert"))]
pub(crate) use none::{PreparedRules, Rules, Wanted};

use crate::types::Action;

/// What is done with packets that are not decided when a queue is closed, and how long verdicts are
/// awaited.
pub(crate) type How = (Action, std::time::Duration);
