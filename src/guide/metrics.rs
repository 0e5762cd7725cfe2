//! Metrics: how to export the numbers of a queue, and which of them call for action.
//!
//! [`QueueMetrics`](crate::metrics::QueueMetrics) (feature `metrics`) registers all numbers at the
//! recorder of the facade [`metrics`](https://docs.rs/metrics); the exporter is yours to choose.
//! With `metrics-exporter-prometheus`, and its own web server left out, because the program has one
//! ([`web`](super::web)):
//!
//! ```ignore
#![doc = include_str!("programs/metrics.rs")]
//! ```
//!
//! # Which numbers call for action
//!
//! The names are without `nfqueue_`; [all of them](crate::metrics).
//!
//! | if this | then | alert |
//! |---|---|---|
//! | `packets_dropped_total{reason="queue_full"}` rises | the queue was full: [`trouble`](super::trouble#everything-is-slow) | `NfqueueFull` |
//! | `packets_lost_total` rises | the receive buffer was full; `packets_dropped_total{reason="user"}` is the kernel's count of the same | `NfqueueBufferFull` |
//! | `oldest_undecided_seconds` exceeds the time that a decision may take | a task has a packet and does not decide it: [`slow_judge`](super::slow_judge) | `NfqueueStuck` |
//! | `packets_expired_total` or `packets_unanswered_total` rises | packets were decided by the deadline, or were dropped without a verdict: an error, a panic, an aborted task | `NfqueueUndecided` |
//! | `packets_gone_total` rises | another program has changed hooks, and the kernel dropped what was queued | `NfqueueFlushedByOthers` |
//! | `packets_refused_total` or `refusals_total` rises | the kernel refuses a verdict, or takes it not as it was meant: log [`refusals`](crate::VerdictSink::refusals) | `NfqueueVerdictsRefused` |
//! | `packets_received_total` does not rise, while there is traffic | the rule matches nothing: [`trouble`](super::trouble#my-rule-sees-nothing) | |
//! | `verdict_wait_seconds` (p99) rises, `in_flight` follows | what the filter asks has become slow; the queue is full at `packets a second × seconds = queue_max_length` | `NfqueuePacketsWait` |
//!
//! The first four cost packets now. The alerts are in the file `alerts.yml` of the example
//! `prometheus`, which has a dashboard for Grafana as well. `in_flight`, `queue_length` and
//! `verdict_wait_seconds` are for the graph beside them.
//!
//! # Numbers of your own
//!
//! The same recorder takes them, so that `GET /metrics` has both:
//!
//! ```toml
//! [dependencies]
//! # The version that tokio-nfqueue and the exporter use. Another one has another recorder, and its
//! # numbers go nowhere: `cargo tree -i metrics` must show one.
//! metrics = "0.24"
//! metrics-exporter-prometheus = { version = "0.18", default-features = false }
//! tokio-nfqueue = { version = "0.1", features = ["metrics"] }
//! ```
//!
//! ```ignore
#![doc = include_str!("programs/own_numbers.rs")]
//! ```
//!
//! The names that are known are better labels than addresses, such as those of your rules, or of
//! networks. The five clients that are blocked most, a second, in PromQL:
//!
//! ```text
//! topk(5, sum by (client) (rate(filter_blocked_total[5m])))
//! ```
//!
//! # What surprises
//!
//! - `fail_open` helps when the queue is full, not when the program is stopped (SIGSTOP, a
//!   debugger): what is in the queue then waits, and only what finds it full passes. When the
//!   program has ended, `bypass` in the rule helps.
//! - With `fail_open`, and with `bypass` while no program has the queue, packets pass undecided,
//!   and no counter of the kernel says how many. Packets that found the receive buffer full are in
//!   `packets_lost_total` also then.
//! - The numbers of the kernel need root or `CAP_DAC_READ_SEARCH` when the queue is bound;
//!   `kernel_counters_readable` is 0 without. A full queue is not seen then.
//! - Packets of connections that are decided by [`for_flow`](super::flows) do not come to the
//!   queue, and are not counted here. Let a rule with [`count`](crate::Rule::count) count them.
//! - A packet that was rejected counts as dropped.
