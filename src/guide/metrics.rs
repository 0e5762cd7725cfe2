//! Metrics: how to export the numbers of a queue, and which of them call for action.
//!
//! [`QueueMetrics`](crate::metrics::QueueMetrics) (feature `metrics`) registers all numbers at the
//! recorder of the facade [`metrics`](https://docs.rs/metrics); the exporter is yours to choose.
//! With `metrics-exporter-prometheus`, and its own web server left out, because the program has one
//! ([`web`](super::web)):
//!
//! ```
//! use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
//! use tokio_nfqueue::{Error, Queue, metrics::QueueMetrics};
//!
//! /// What the service returns for `GET /metrics`.
//! fn scrape(prometheus: &PrometheusHandle, queue: &QueueMetrics) -> String {
//!     // Now, not at an interval: what is read is never old, and an idle program does nothing.
//!     queue.update();
//!     prometheus.render()
//! }
//!
//! // The test.
//! use tokio_nfqueue::simulated::{self, TestPacket};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // First the recorder, then the queue: what is registered before it goes nowhere.
//! let prometheus = PrometheusBuilder::new().install_recorder()?;
//! let (kernel, mut queue) = simulated::queue(Queue::builder(3).max_len(2))?;
//! let metrics = QueueMetrics::register(&queue.sink());
//!
//! let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! // One more than the queue holds.
//! let sent = kernel.send_all((0..3).map(|_| TestPacket::udp(from, to, b"query")));
//! queue.recv().await.unwrap()?.accept().submit()?;
//! assert!(sent[0].outcome().await.accepted);
//!
//! let text = scrape(&prometheus, &metrics);
//! for line in [
//!     r#"nfqueue_verdicts_total{queue="3",action="accept"} 1"#,
//!     r#"nfqueue_packets_dropped_total{queue="3",reason="queue_full"} 1"#,
//!     r#"nfqueue_queue_length{queue="3"} 1"#,
//! ] {
//!     assert!(text.lines().any(|printed| printed == line), "{line} is not in:\n{text}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Which numbers call for action
//!
//! The names are without `nfqueue_`; [all of them](crate::metrics).
//!
//! | if this | then |
//! |---|---|
//! | `packets_dropped_total{reason="queue_full"}` rises | the queue was full: [`trouble`](super::trouble#everything-is-slow) |
//! | `packets_lost_total` rises | the receive buffer was full; `packets_dropped_total{reason="user"}` is the kernel's count of the same |
//! | `oldest_undecided_seconds` exceeds the time that a decision may take | a task has a packet and does not decide it: [`slow_judge`](super::slow_judge) |
//! | `packets_expired_total` or `packets_unanswered_total` rises | packets were decided by the deadline, or were dropped without a verdict: an error, a panic, an aborted task |
//! | `packets_gone_total` rises | another program has changed hooks, and the kernel dropped what was queued |
//! | `refusals_total` rises | the kernel takes a verdict not as it was meant: log [`refusals`](crate::VerdictSink::refusals) |
//! | `packets_received_total` does not rise, while there is traffic | the rule matches nothing: [`trouble`](super::trouble#my-rule-sees-nothing) |
//! | `verdict_wait_seconds` (p99) rises, `in_flight` follows | what the filter asks has become slow; the queue is full at `packets a second × seconds = queue_max_length` |
//!
//! Alert on the first four. `in_flight`, `queue_length` and `verdict_wait_seconds` are for the
//! graph beside them. The example `prometheus` has alerts, and a dashboard for Grafana.
//!
//! # What surprises
//!
//! - With `fail_open`, and with `bypass` while no program has the queue, packets pass undecided,
//!   and no counter of the kernel says how many. Packets that found the receive buffer full are in
//!   `packets_lost_total` also then.
//! - The numbers of the kernel need root or `CAP_DAC_READ_SEARCH` when the queue is bound;
//!   `kernel_counters_readable` is 0 without. A full queue is not seen then.
//! - Packets of connections that are decided by [`for_flow`](super::flows) do not come to the
//!   queue, and are not counted here. Let a rule with [`count`](crate::Rule::count) count them.
//! - A packet that was rejected counts as accepted, because for the queue it is.
