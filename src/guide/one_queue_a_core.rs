//! One queue a core: when a single task is not enough.
//!
//! First see whether it is: a queue of defaults decides some hundred thousand packets a second, and
//! [`for_flow`](super::flows) takes most of them away from it. What needs more cores is usually the
//! decision, and that needs no second queue: [`Queue::serve`](crate::Queue::serve) runs handlers
//! that await something as tasks, on all threads of the runtime. Several queues help if the handler
//! computes for long, or if each core has state of its own, without locks.
//!
//! A rule with several queues distributes its packets over them, and each has a task here:
//!
//! ```no_run
#![doc = include_str!("programs/one_queue_a_core.rs")]
//! ```
//!
//! `start(rule, cores(), stop)`, in a multi-thread runtime. Without state of their own,
//! `Queue::builder(Queue::any(cores)).divert(rules).bind().await?.serve(...)` suffices: it also has
//! a task for each number.
//!
//! # Which queue a packet gets
//!
//! | rule | by | so |
//! |---|---|---|
//! | [`to_queues`](crate::Rule::to_queues), or none | a hash of both addresses, for IPv4 also of the protocol | both directions of a connection, and all connections of two hosts, come to the same queue |
//! | with [`fanout`](crate::Rule::fanout) | the CPU that handles the packet | no packet changes its core; a connection stays in a queue only as long as the network card, or the process that sends, keeps it on one CPU |
//!
//! # What surprises
//!
//! - Two hosts are one queue. A proxy, a tunnel or a test with one client and one server uses one
//!   core, however many connections there are. With `fanout`, the CPUs decide instead: set up
//!   receive-side scaling (`ethtool -L`, `-X`) or RPS (`/sys/class/net/*/queues/rx-*/rps_cpus`).
//! - State for each *host* is not in one worker: a host has another queue with each peer. Count per
//!   host by a sum over the workers.
//! - Behind address translation the two directions may have other addresses, and so other queues:
//!   queue them where [both see the same](super::rewriting#with-address-translation).
//! - Each number has [`max_len`](crate::QueueBuilder::max_len) places and a receive buffer of its
//!   own: memory times the number of queues ([`guide`](super#memory-and-descriptors)).
//! - A verdict is executed in the thread that sends it: the rest of an accepted packet's way is
//!   CPU time of the worker.
//! - The I/O driver of a runtime is one thread at a time. For workers that share nothing, give each
//!   a thread with a current-thread runtime, bind one number in each
//!   (`Queue::builder(first + index)`), and then install a [`Divert`](crate::Divert) with
//!   `to_queues(first..=last)`. Pin the threads only with `fanout`, each to the CPU of its number.
//! - Fewer cores than queues is no error, and no gain.
//!
//! Whether it helps on your machine: compare `verdict_wait_seconds` of the
//! [`metrics`](super::metrics) before and after, or the benchmark `cargo bench --workspace` of the
//! repository, which measures four queues beside one.
