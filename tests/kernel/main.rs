//! The tests that need a kernel: a module for each subject.
//!
//! They are one binary, so that linking is done once. The name of a test begins with its module:
//! `cargo test close::` runs the tests of a module, and `cargo test NAME` runs the tests whose
//! names contain this text. The suffix `::two_workers` means a runtime with two worker threads.
//!
//! Each test has its own thread and network namespace; two tests run at the same time. All tests
//! share the process, so a test changes only what belongs to its threads: capabilities, CPU
//! affinity, mounts, namespaces and the `tracing` subscriber. A test that needs another process
//! starts one: this binary ([`divert::child`],
//! [`handover::child`], [`faults::child`], `support::UserNamespace`) or an example.

#[macro_use]
mod common;
#[path = "../histories/settings.rs"]
mod settings;
mod support;

mod bridge;
mod close;
mod concurrency;
mod conntrack;
mod cookbook;
mod divert;
mod dropping;
mod edit;
mod errors;
mod examples;
mod faults;
mod flows;
mod flushing;
mod handover;
mod histories;
mod injector;
mod isolation;
mod metadata;
mod metrics;
mod modes;
mod namespaces;
mod numbers;
mod order;
mod overload;
mod own_rules;
mod payload;
mod poll_loop;
mod promises;
mod reconfigure;
mod replacement;
mod rules;
mod scale;
mod serve;
mod simulated;
mod statistics;
mod surprises;
mod unanswered;
mod verdicts;

use std::process::ExitCode;

use libtest_mimic::Trial;

/// The modules in the order in which they run.
const MODULES: &[fn() -> Vec<Trial>] = &[
    // Tests of the tools that all others use.
    isolation::tests,
    verdicts::tests,
    order::tests,
    unanswered::tests,
    dropping::tests,
    close::tests,
    errors::tests,
    flushing::tests,
    concurrency::tests,
    modes::tests,
    poll_loop::tests,
    metadata::tests,
    metrics::tests,
    payload::tests,
    replacement::tests,
    edit::tests,
    injector::tests,
    conntrack::tests,
    bridge::tests,
    divert::tests,
    rules::tests,
    own_rules::tests,
    flows::tests,
    serve::tests,
    simulated::tests,
    namespaces::tests,
    numbers::tests,
    handover::tests,
    reconfigure::tests,
    statistics::tests,
    overload::tests,
    promises::tests,
    surprises::tests,
    examples::tests,
    examples::capture::tests,
    examples::dns_firewall::tests,
    examples::firewall::tests,
    examples::ips::tests,
    examples::netem::tests,
    examples::prometheus::tests,
    examples::shaper::tests,
    examples::sni_filter::tests,
    examples::web::tests,
    cookbook::tests,
    faults::tests,
    scale::tests,
    // These keep the CPUs busy, which would delay other tests with short deadlines.
    histories::tests,
];

fn main() -> ExitCode {
    if let Some(code) = divert::child().or_else(handover::child).or_else(faults::child) {
        return code;
    }
    support::run(MODULES.iter().flat_map(|tests| tests()).collect())
}
