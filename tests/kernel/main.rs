//! The tests that need a kernel: a module for each subject.
//!
//! They are one binary, which links once. The name of a test begins with its module:
//! `cargo test ending::` runs the tests of a module, and `cargo test NAME` those with this text in
//! their names. The suffix `::two_workers` stands for a runtime of two worker threads.
//!
//! Each test has a thread and a network namespace of its own; two tests run at the same time. All
//! share the process. So a test changes only what belongs to its threads: capabilities, processors,
//! mounts, namespaces and the subscriber of traces. A test that needs another process starts one:
//! this binary ([`divert::child`], `support::UserNamespace`) or an example.

#[macro_use]
mod common;
#[path = "../support/mod.rs"]
mod support;

mod bridge;
mod concurrency;
#[cfg(feature = "conntrack")]
mod conntrack;
mod divert;
mod dropping;
#[cfg(feature = "edit")]
mod edit;
mod ending;
mod errors;
mod examples;
mod flushing;
mod group;
mod histories;
mod isolation;
mod metadata;
mod modes;
mod namespaces;
mod order;
mod overload;
mod payload;
mod promises;
mod reconfigure;
mod replacement;
mod statistics;
mod unanswered;
mod verdicts;

use std::process::ExitCode;

use libtest_mimic::Trial;

/// The modules in the order in which they run.
const MODULES: &[fn() -> Vec<Trial>] = &[
    // The tools of all others.
    isolation::tests,
    verdicts::tests,
    order::tests,
    unanswered::tests,
    dropping::tests,
    ending::tests,
    errors::tests,
    flushing::tests,
    concurrency::tests,
    modes::tests,
    metadata::tests,
    payload::tests,
    replacement::tests,
    #[cfg(feature = "edit")]
    edit::tests,
    #[cfg(feature = "conntrack")]
    conntrack::tests,
    bridge::tests,
    divert::tests,
    namespaces::tests,
    group::tests,
    reconfigure::tests,
    statistics::tests,
    overload::tests,
    promises::tests,
    examples::tests,
    // These keep the processors busy, which would delay others with short deadlines.
    histories::tests,
];

fn main() -> ExitCode {
    if let Some(code) = divert::child() {
        return code;
    }
    support::run(MODULES.iter().flat_map(|tests| tests()).collect())
}
