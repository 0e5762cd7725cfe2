//! Faults of processes, of the network, of the kernel and of limits, with the counts that each test
//! proves.
//!
//! `n` is a number that differs from run to run. *By rule* are packets that the rule, or a full
//! queue, drops before they are queued. *Lost* are packets that were queued and got no verdict of
//! their owner. The numbers in the last column are those of the promises below.
//!
//! | fault | test | sent | delivered | by rule | lost | promise |
//! |---|---|---|---|---|---|---|
//! | SIGKILL under load, bypass | `a_killed_process_loses_only_queued_packets_with_bypass` | n | n - lost | 0 | what was queued: 100 of a stopped process, at most 100 otherwise | none: the kernel drops what is queued |
//! | SIGKILL under load, no bypass | `after_a_killed_process_without_bypass_the_rule_drops_until_a_queue_is_bound` | n | n - 400 | 300 | the 100 queued | none, as above |
//! | SIGSTOP for two seconds | `a_stopped_process_loses_no_packet_that_the_queue_holds` | 200 | 200 | 0 | 0 | 1, 5 |
//! | SIGSTOP, full queue | `a_stopped_process_with_a_full_queue_loses_what_the_kernel_counts` | 200 | 100 | 100 | 0 | 5 |
//! | SIGSTOP beyond the deadline | `deadlines_that_expired_in_a_stopped_process_are_kept_when_it_goes_on` | 100 | 100 | 0 | 0 | 1 |
//! | a child by `fork` has the socket | `a_queue_that_a_forked_child_shares_works_and_closes` | 100 | 100 | 0 | 0 | 7 |
//! | the same, and SIGKILL | `a_killed_process_whose_forked_child_lives_keeps_the_queue_bound` | 50 | 30 | 0 | the 20 queued | none: the queue lives as long as a copy of its socket |
//! | bound after `fork`, in a child and in its child | `a_queue_that_is_bound_after_a_fork_keeps_its_time_limits` | 3 each | 3 each | 0 | 0 | 1, 7 |
//! | a daemon: the queue's process continues in a child | `a_forked_child_that_continues_with_the_queue_keeps_its_time_limits` | 5 | 5 | 0 | 0 | 1, 7 |
//! | `capget` refused by seccomp | `where_capget_is_refused_every_verdict_is_sent` | 60 | 60 | 0 | 0 | 1, 7 |
//! | the same, and privileges dropped | `where_capget_is_refused_the_kernels_answer_ends_a_queue_without_the_capability` | 2 | 1 | 0 | 1; the refused verdict is reported, and the stream ends with the reason | 6 |
//! | `recvmmsg` refused by seccomp | `where_recvmmsg_is_refused_every_packet_is_received` | 60 | 60 | 0 | 0 | 5 |
//! | no `/proc` | `without_proc_a_queue_works_and_errors_name_the_reason` | 10 | 10 | 0 | 0 | 1, 10 |
//! | runtime shut down with packets held | `unanswered::packets_of_a_runtime_that_shuts_down_get_the_default_action` | 50 | 50 or 0, by the default action | 0 | 0 | 1 |
//! | 8 queues flooded, out of order, 50 bogus verdicts a packet | `eight_flooded_queues_with_bogus_verdicts_agree_with_the_kernel_to_the_packet` | n | n - by rule | as the kernel counts | as the kernel counts; of those received 0 | 1, 2, 3, 5, 6 |
//! | base chain of another program deleted, 10 times | `a_base_chain_that_another_program_deletes_costs_only_what_was_queued` | 170 | 100 | 0 | the 70 queued, counted as gone | 6 |
//! | interface down and up, 10 times | `an_interface_that_goes_down_and_up_costs_only_what_was_queued` | 170 | 100 | 0 | the 70 queued, counted as gone | 6 |
//! | namespace deleted | `handover::a_queue_keeps_its_namespace_in_existence` | 20 | 20 | 0 | 0 | 1 |
//! | ids across 2^32, in the simulated kernel | `ids_beyond_the_largest_are_decided_in_any_order` | 3000 | each by its verdict | 0 | 0 | 1, 2, 3 |
//! | losses across 2^32, in the simulated kernel | `losses_across_the_largest_id_are_counted_exactly` | 501 | each by its verdict | 0 | as the kernel counts | 5 |
//! | send buffer full, and every errno of a send, in the simulated kernel | `every_errno_of_a_send_ends_the_queue_with_a_reason_or_costs_nothing` | 40 each, after 1 and 5 failures in a row, those of a lack of memory also 40 | each by its verdict if the queue continues | 0 | 0 if the queue continues | 2, 6 |
//! | a send buffer that is too small | `promises::a_datagram_longer_than_the_send_buffer_is_split` | | | | 0 | 6 |
//! | every errno of a receive, in the simulated kernel | `every_errno_of_a_receive_ends_the_queue_with_a_reason_or_costs_nothing` | 40 each | each by its verdict if the queue continues | 0 | 0 if the queue continues | 2, 6 |
//! | EAGAIN from a receive while packets wait, on the real kernel | `spurious::packets_behind_a_false_eagain_wait_at_most_for_the_next_event` | 17 | 17 | 0 | 0 | 1 |
//! | the same, and no later packet, with a deadline | `packets_behind_a_false_eagain_are_decided_by_their_deadline`, `with_a_deadline_the_timer_hands_over_packets_behind_a_false_eagain` | 3 each | 3 each | 0 | 0 | 1 |
//! | slow reader | `overload::packets_lost_to_a_full_receive_buffer_are_counted`, `overload::losses_between_reads_are_counted_exactly` | 1010, 2001 | each by its verdict | 0 | as the kernel counts | 5 |
//! | 10 000 clones of a sink | `ten_thousand_clones_of_a_sink_lose_no_packet` | 5000 | each by its verdict | 0 | 0 | 1, 2, 9 |
//! | 1000 queues | `a_thousand_queues_in_one_process_lose_no_packet` | 1000 | 1000 | 0 | 0 | 1 |
//! | no descriptors at `bind` | `a_bind_without_descriptors_is_an_error_and_binds_nothing` | 20 | 20 | 0 | 0 | 10 |
//! | no memory beyond that of a full queue | `a_flood_of_held_packets_needs_no_more_memory_than_the_queue_length_says` | 30 000 | none, by verdict | as the kernel counts | 0 | 8 |
//! | unprivileged process | `errors::bind_needs_the_capability` | | | | | 10 |
//! | privileges dropped | `errors::verdicts_without_the_capability_are_refused_with_the_ids_of_their_packets`, `promises::a_briefly_missing_capability_leaves_no_packet_undecided` | 21 | 1 | 0 | 20; the 7 refused verdicts are reported, and the stream ends with the reason | 6 |
//!
//! The promises, as far as these faults concern them:
//!
//! - 1: "No packet is forgotten. A packet or verdict dropped unanswered gives the queue's
//!   `on_unanswered` action. `deadline(d, action)` answers for a packet undecided for `d`."
//! - 2: "At most one verdict a packet."
//! - 3: "A batch never decides a packet that its user has not decided."
//! - 5: "Overload is not an error. ENOBUFS, a full queue, id gaps: counted, and the stream goes
//!   on."
//! - 6: "Nothing survivable ends a program that uses `?`. A packet that had already gone (device
//!   down, hook unregistered) is counted, exactly. Losing the right to send (EPERM) is fatal."
//! - 7: "Clean ends. `close()` drains, then the queue is unbound."
//! - 8: "Memory is bounded by the queue length times the actual packet sizes."
//! - 9: "Handles may be dropped in any thread."
//! - 10: "No configuration is half applied: a clear error that names the setting."
//!
//! `TOKIO_NFQUEUE_FAULTS_SECONDS` is for how long the flood lasts (2).

use std::{process::ExitCode, time::Duration};

use libtest_mimic::Trial;

mod errnos;
mod flood;
mod forked;
mod killed;
mod limits;
mod network;
mod proc;
pub(crate) mod process;
mod seccomp;
mod spurious;
mod stopped;
mod wakes;

const SECONDS: &str = "TOKIO_NFQUEUE_FAULTS_SECONDS";

pub(crate) fn tests() -> Vec<Trial> {
    [
        killed::tests,
        stopped::tests,
        forked::tests,
        seccomp::tests,
        spurious::tests,
        wakes::tests,
        proc::tests,
        network::tests,
        errnos::tests,
        limits::tests,
        flood::tests,
    ]
    .iter()
    .flat_map(|tests| tests())
    .collect()
}

/// The whole `main` of the processes that these tests start; `None` in all others.
pub(crate) fn child() -> Option<ExitCode> {
    process::child()
}

fn duration() -> Duration {
    let Ok(text) = std::env::var(SECONDS) else { return Duration::from_secs(2) };
    Duration::from_secs(text.parse().unwrap_or_else(|_| panic!("{SECONDS} is a number, not {text:?}")))
}
