//! Shared by the benchmarks that need the kernel. They work in new network namespaces; see
//! `nfqueue_testbed`.

// Each benchmark uses a different part of this module.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub use nfqueue_testbed::{self as support, rules};

pub mod busy;
pub mod capability;
pub mod child;
pub mod consumer;
pub mod drain;
pub mod everyday;
pub mod flood;
pub mod floor;
pub mod flows;
pub mod goals;
pub mod instructions;
pub mod latency;
pub mod ledger_cost;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod options;
pub mod ours;
pub mod paced;
pub mod peers;
pub mod plan;
pub mod plots;
pub mod report;
pub mod summary;
pub mod syscalls;
pub mod tcp;
pub mod traffic;
pub mod waits;
