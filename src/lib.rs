//! Asynchronous NFQUEUE for Tokio.
//!
//! A rule of nftables or iptables sends packets to a numbered queue. The kernel sends each packet
//! to this program and waits for a verdict. Here a [`Queue`] is a [`Stream`](futures::Stream) of
//! packets, and any task may submit the verdicts, in any order. Verdicts are gathered under load
//! and sent together, within a latency limit; an idle queue sends each verdict at once. Linux only.
//!
//! ```no_run
//! use futures::TryStreamExt;
//! use tokio_nfqueue::Queue;
//!
//! # async fn allowed(_payload: &[u8]) -> bool { true }
//! #[tokio::main]
//! async fn main() -> Result<(), tokio_nfqueue::Error> {
//!     let (mut packets, verdicts) = Queue::builder(0).bind().await?.split();
//!     loop {
//!         tokio::select! {
//!             packet = packets.try_next() => {
//!                 // An error here is the end of the queue.
//!                 let Some(packet) = packet? else { break };
//!                 tokio::spawn(async move {
//!                     let verdict = if allowed(packet.payload()).await {
//!                         packet.accept()
//!                     } else {
//!                         packet.drop()
//!                     };
//!                     verdict.submit()
//!                 });
//!             }
//!             _ = tokio::signal::ctrl_c() => break,
//!         }
//!     }
//!     verdicts.close().await
//! }
//! ```
//!
//! # I want to ...
//!
//! | I want to ... | use |
//! |---|---|
//! | bind a queue | [`Queue::builder`], [`QueueBuilder::bind`] |
//! | bind several queues as one, or any free number | [`QueueNumbers`] |
//! | send traffic to the queue | your own rule, or [`Divert`] |
//! | receive packets | [`Queue`] or [`PacketStream`] as a stream; [`recv`](PacketStream::recv), [`recv_many`](PacketStream::recv_many) |
//! | accept, drop, requeue a packet | [`Packet::accept`], [`Packet::drop`](Packet::drop()), [`Packet::requeue`] |
//! | decide a whole connection by one packet | [`Verdict::for_flow`]; [`guide::flows`] |
//! | see only the beginning of each connection | `Rule::first_packets`, `Rule::first_bytes` |
//! | reject a packet | [`Packet::reject`] |
//! | set a mark | [`Verdict::mark`], [`Packet::mark_with`]; of the connection [`Verdict::conntrack_mark`] |
//! | rewrite a packet | [`Packet::edit`], then [`Verdict::payload`] |
//! | reply to a packet | [`Edit::turn_around`], [`Edit::tcp_reset`], [`Edit::icmp_unreachable`]; [`guide::replies`] |
//! | send packets of one's own | [`Injector`] |
//! | read headers | [`Packet::view`], [`Packet::addresses`] |
//! | submit a verdict | [`Verdict::submit`]; wait for the kernel's acknowledgement: [`Verdict::confirm`] |
//! | hold packets for a long time | [`Packet::detach`]; [`QueueBuilder::max_len`] limits their number |
//! | say what happens to packets that nobody decides | [`QueueBuilder::on_unanswered`], [`QueueBuilder::deadline`] |
//! | limit latency or cost | [`FlushPolicy`], [`QueueBuilder::copy_range`], [`QueueBuilder::busy_poll`] |
//! | accept packets when overloaded | [`QueueBuilder::fail_open`] |
//! | shut down without losing a packet | [`close`](VerdictSink::close), [`close_within`](VerdictSink::close_within) |
//! | restart without losing a packet | [`VerdictSink::hand_over`], [`QueueBuilder::take_over`], [`QueueBuilder::bind_when_free`]; [`guide::restarting`] |
//! | change settings while it runs | [`VerdictSink::reconfigure`] |
//! | test a policy | [`Verdict::action`], [`Verdict::changes`]; the whole program without privileges: [`simulated`], [`guide::testing`] |
//! | watch a queue | [`VerdictSink::stats`], [`kernel_stats`](VerdictSink::kernel_stats), [`advice`](VerdictSink::advice) |
//! | get the errors of refused verdicts | [`VerdictSink::refusals`] |
//! | log | the events of `tracing` in [`guide`](guide#tracing) |
//! | use another network namespace | [`QueueBuilder::namespace`], [`NetworkNamespace`] |
//! | use another event loop than Tokio's | [`PacketStream::try_recv`], [`PacketStream::readable_fd`] |
//! | run it as a service | [`guide::service`]: privileges, a unit file, memory; [`guide`]: threads, shutdown |
//! | know what a kernel lacks | [`guide::kernels`] |
//! | port a program | `migration` has tables for libnetfilter_queue, go-nfqueue, NetfilterQueue and Suricata |
//!
//! # Features
//!
//! All but `tower` and `test-util` are on by default.
//!
//! | feature | what it adds |
//! |---|---|
//! | `conntrack` | connection tracking entries of packets, and changes to them in verdicts |
//! | `divert` | [`Divert`]: nf_tables rules that are removed with the process |
//! | `edit` | [`Edit`], [`PacketView`]: rewriting packets with correct lengths and checksums |
//! | `tower` | `Queue::serve_service`: services of tower decide packets |
//! | `test-util` | [`simulated`]: a kernel in memory, to test programs that use this crate |
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(feature = "conntrack", feature = "divert", feature = "edit", feature = "test-util")),
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
mod divert;
#[cfg(feature = "edit")]
mod edit;
pub mod guide;
mod handover;
mod injector;
mod io;
#[cfg(all(doc, feature = "conntrack", feature = "edit"))]
pub mod migration;
mod namespace;
mod numbers;
mod packet;
mod queue;
mod reconfigure;
mod rules;
#[cfg(feature = "test-util")]
pub mod simulated;
mod sink;
mod stream;
mod verdict;

use nfqueue_proto::{record, state, types, wire};

/// The groups of [`Stats`].
pub mod stats {
    pub use crate::types::stats::{Decided, Fill, Held, Lost, QueueLimits, Received, Sent};
}

pub use advice::Advice;
pub use builder::QueueBuilder;
#[cfg(feature = "divert")]
pub use divert::{Divert, DivertSet};
#[cfg(feature = "edit")]
pub use edit::{Edit, PacketView, TcpFields, Unreachable, complete_checksums};
pub use handover::{Handover, Takeover};
pub use injector::{Injector, InjectorBuilder, TrySendError};
pub use io::kernel::KernelStats;
pub use namespace::NetworkNamespace;
#[cfg(feature = "divert")]
pub use nfqueue_divert::{
    ConnectionState, Direction, DivertBuilder, FlowTuple, Match, NamedSet, PacketField, PortRange, Priority, Protocol,
    Rate, Rule, RuleCounter, SetElement, SetField, SetValue, TableFamily, TcpFlags,
};
pub use numbers::QueueNumbers;
pub use packet::{DetachedPacket, Packet};
pub use queue::Queue;
pub use reconfigure::Reconfigure;
pub use sink::{Refusals, VerdictSink};
pub use state::flush::{FlushContext, FlushDecision, FlushPolicy, FlushReason};
pub use stream::PacketStream;
pub use types::{Action, Error, ErrorKind, Family, FlowMarks, Hook, PacketId, Stats, TryRecvError, Vlan};
pub use verdict::{Changes, Confirm, Verdict};
#[cfg(feature = "conntrack")]
pub use wire::{
    conntrack::{Conntrack, ConntrackState, ConntrackStatus, Flow},
    expectation::Expectation,
};
