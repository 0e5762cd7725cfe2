//! The testbed, and a harness for tests in it.
//!
//! Each test has a thread and a network namespace of its own, and a time limit.

// The soak uses a part of this module.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod trial;

pub use self::trial::{Report, run, test, test_multi, test_sync, test_unbounded};
pub use nfqueue_testbed::*;
