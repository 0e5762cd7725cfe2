//! Shared by the benchmarks that need the kernel. They work in new network namespaces; see
//! `tests/support`.

// Each benchmark uses a different part of this module.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod busy;
pub mod capability;
pub mod child;
#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../../tests/kernel/common/connections.rs"]
pub mod connections;
pub mod consumer;
pub mod drain;
pub mod everyday;
pub mod flood;
pub mod floor;
pub mod flows;
pub mod goals;
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
#[path = "../../tests/kernel/common/rules.rs"]
pub mod rules;
pub mod summary;
#[path = "../../tests/support/mod.rs"]
pub mod support;
pub mod syscalls;
pub mod tcp;
pub mod traffic;
pub mod waits;
