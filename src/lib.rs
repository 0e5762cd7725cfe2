//! Asynchronous NFQUEUE for Tokio.
//!
//! A rule of nftables or iptables sends packets to a numbered queue. The kernel sends each packet
//! to this program and waits for a verdict. Here a [`Queue`] is a [`Stream`](futures::Stream) of
//! packets, and any task may submit the verdicts, in any order. Verdicts are gathered under load
//! and sent together, within a latency limit; an idle queue sends each verdict at once. Linux only.
//!
//! A filter with its rule:
//!
//! ```no_run
//! # #[cfg(feature = "divert")] mod filter {
//! use tokio_nfqueue::{Divert, Error, Hook, Packet, Protocol, Queue, Rule};
//!
//! # async fn allowed(_: &Packet) -> bool { true }
//! #[tokio::main]
//! async fn main() -> Result<(), Error> {
//!     let dns = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53);
//!     let queue = Queue::builder(Queue::ANY).divert(Divert::builder().rule(dns)).bind().await?;
//!     queue
//!         .serve(async |packet: Packet| {
//!             if allowed(&packet).await { packet.accept() } else { packet.reject() }
//!         })
//!         .with_graceful_shutdown(async { drop(tokio::signal::ctrl_c().await) })
//!         .await
//! }
//! # }
//! # fn main() {}
//! ```
//!
//! The loop, for programs that await other things beside packets:
//!
//! ```no_run
//! # use tokio_nfqueue::{Error, Packet, Queue, Verdict};
//! # async fn decide(packet: Packet) -> Verdict { packet.accept() }
//! # #[tokio::main]
//! # async fn main() -> Result<(), Error> {
//! let (mut packets, verdicts) = Queue::builder(0).bind().await?.split();
//! loop {
//!     tokio::select! {
//!         packet = packets.recv() => {
//!             let Some(packet) = packet else { break }; // None: closed
//!             let packet = packet?; // an error here is the end of the queue, nothing less
//!             tokio::spawn(async move { decide(packet).await.submit() });
//!         }
//!         _ = tokio::signal::ctrl_c() => break,
//!     }
//! }
//! verdicts.close().await
//! # }
//! ```
//!
//! New to it? Begin with [`guide::first_filter`].
//!
//! # I want to ...
//!
//! | receive packets | use |
//! |---|---|
//! | bind a queue, several as one, or any free number | [`Queue::builder`], [`QueueNumbers`] |
//! | send traffic to the queue | [`QueueBuilder::divert`]; a rule of your own |
//! | decide every packet by a function, with state or without | [`Queue::serve`] |
//! | have a task for each number | [`PacketStream::into_each`], or `serve` on a multi-thread runtime |
//! | receive packets beside other things | [`recv`](PacketStream::recv), [`recv_many`](PacketStream::recv_many), or the queue as a stream |
//! | read headers | [`Packet::view`], [`Packet::addresses`] |
//!
//! | decide them | use |
//! |---|---|
//! | accept, drop, reject, requeue | [`Packet::accept`], [`Packet::drop`](Packet::drop()), [`Packet::reject`], [`Packet::requeue`]; then [`Verdict::submit`] or [`Verdict::confirm`] |
//! | a whole connection by one packet | [`Verdict::for_flow`]; [`guide::flows`] |
//! | in the order of each connection | [`Serve::in_flow_order`] |
//! | set a mark | [`Verdict::mark`], [`Packet::mark_with`]; of the connection [`Verdict::connection_mark`] |
//! | rewrite, reply, send packets of one's own | [`Packet::edit`], `Edit`, `Injector`; [`guide::replies`] |
//! | hold packets for a long time | [`Packet::detach`]; [`QueueBuilder::max_len`] limits their number |
//! | say what happens to undecided packets | [`QueueBuilder::on_unanswered`], [`QueueBuilder::deadline`] |
//!
//! | run it | use |
//! |---|---|
//! | shut down without losing a packet | [`close`](VerdictSink::close), [`Serve::with_graceful_shutdown`] |
//! | restart without losing a packet | `hand_over`, `take_over`, [`QueueBuilder::bind_when_free`]; `guide::restarting` |
//! | fail open, or fail closed | `DivertBuilder::fail_closed`, [`QueueBuilder::fail_open`] when overloaded |
//! | export metrics | `metrics::QueueMetrics` |
//! | watch a queue | [`VerdictSink::stats`], also how long packets waited ([`Stats::waited`]), [`kernel_stats`](VerdictSink::kernel_stats), [`advice`](VerdictSink::advice), [`refusals`](VerdictSink::refusals); events of `tracing` in [`guide`](guide#tracing) |
//! | limit latency or cost | [`FlushPolicy`], [`QueueBuilder::copy_range`], [`QueueBuilder::busy_poll`]; `guide::scale` |
//! | change settings while it runs | [`VerdictSink::reconfigure`], `Divert::replace_rules` |
//! | use another network namespace, or another event loop | [`QueueBuilder::namespace`]; [`PacketStream::try_recv`], [`PacketStream::readable_fd`] |
//! | run it as a service, or in a container; know what a kernel lacks | [`guide::service`], `guide::containers`, [`guide`]; [`guide::kernels`] |
//! | find out what is wrong | [`guide::trouble`]; the program `nfqtop` |
//! | do something else | the table of tasks in [`guide`] |
//! | test a policy, or a whole program without privileges | [`Verdict::action`], [`Verdict::changes`]; `simulated`, `guide::testing` |
//! | port a program | `migration` has tables for libnetfilter_queue, go-nfqueue, NetfilterQueue and Suricata |
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `conntrack` | on | the module `conntrack`: connection tracking entries of packets, and changes to them in verdicts |
//! | `divert` | on | the module `divert`: nf_tables rules that are removed when the process exits |
//! | `edit` | on | the module `edit`: rewriting packets with correct lengths and checksums |
//! | `handover` | off | the module `handover`: a restart in which the new process takes the live queue over |
//! | `inject` | off | the module `inject`: raw sockets for packets of one's own |
//! | `metrics` | off | the module `metrics`: all numbers of a queue for the facade of this name |
//! | `tower` | off | `Queue::serve_service`: services of tower decide packets |
//! | `test-util` | off | the module `simulated`: a kernel in memory, to test programs that use this crate |
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(
        feature = "conntrack",
        feature = "divert",
        feature = "edit",
        feature = "handover",
        feature = "inject",
        feature = "metrics",
        feature = "test-util"
    )),
    allow(rustdoc::broken_intra_doc_links)
)]
#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("tokio-nfqueue works only on Linux, because NFQUEUE is a part of its netfilter");

/// The code in the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod advice;
mod builder;
#[cfg(feature = "divert")]
pub mod divert;
#[cfg(feature = "edit")]
pub mod edit;
pub mod guide;
#[cfg(feature = "handover")]
pub mod handover;
#[cfg(feature = "inject")]
pub mod inject;
mod io;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(all(
    doc,
    feature = "conntrack",
    feature = "edit",
    feature = "handover",
    feature = "inject",
    feature = "tower",
    feature = "test-util"
))]
pub mod migration;
mod namespace;
mod numbers;
mod packet;
mod queue;
mod reconfigure;
mod rules;
pub mod serve;
#[cfg(feature = "test-util")]
pub mod simulated;
mod sink;
mod stream;
mod verdict;

#[cfg(feature = "handover")]
use nfqueue_proto::record;
use nfqueue_proto::{state, types, wire};

/// The groups of [`Stats`], and the kernel's own counters.
pub mod stats {
    pub use crate::{
        io::kernel::KernelStats,
        types::{
            Histogram, Waited,
            stats::{Decided, Fill, Held, Lost, Number, NumberKind, QueueLimits, Received, Sent},
        },
    };
}

/// Flush policies of one's own: [`FlushPolicy::custom`].
pub mod flush {
    pub use crate::state::flush::{FlushContext, FlushDecision, FlushReason};
}

/// What connection tracking knows of a packet, and expectations for related connections.
#[cfg(feature = "conntrack")]
pub mod conntrack {
    pub use crate::types::{ConnectionState, Direction, FlowTuple};
    pub use crate::wire::{
        conntrack::{Conntrack, ConntrackStatus},
        expectation::Expectation,
    };
}

pub use advice::Advice;
pub use builder::QueueBuilder;
#[cfg(feature = "divert")]
pub use divert::Divert;
pub use namespace::NetworkNamespace;
#[cfg(feature = "divert")]
pub use nfqueue_divert::Rule;
pub use numbers::QueueNumbers;
pub use packet::{DetachedPacket, Packet};
pub use queue::Queue;
pub use reconfigure::Reconfigure;
pub use serve::Serve;
pub use sink::{Refusals, VerdictSink};
pub use state::flush::FlushPolicy;
pub use stream::PacketStream;
pub use types::{Action, Error, ErrorKind, Family, FlowMarks, Hook, PacketId, Protocol, Stats, TryRecvError, Vlan};
pub use verdict::{Changes, Confirm, Verdict};
