#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("tokio-nfqueue works on Linux alone: NFQUEUE is a part of its netfilter");

mod advice;
mod builder;
#[cfg(feature = "conntrack")]
mod conntrack;
#[cfg(all(doc, feature = "conntrack", feature = "edit"))]
pub mod counterparts;
#[cfg(feature = "divert")]
mod divert;
#[cfg(feature = "edit")]
mod edit;
mod error;
#[cfg(feature = "conntrack")]
mod expectation;
mod flush;
mod group;
pub mod guide;
mod hook;
mod keeper;
mod kernel;
mod namespace;
mod packet;
mod queue;
mod reconfigure;
mod sink;
mod socket;
mod state;
mod stats;
mod sys;
mod trace;
mod types;
mod verdict;
mod wire;

pub use advice::Advice;
pub use builder::QueueBuilder;
#[cfg(feature = "conntrack")]
pub use conntrack::{Conntrack, ConntrackState, ConntrackStatus, Flow};
#[cfg(feature = "divert")]
pub use divert::{Divert, DivertBuilder, Protocol, Rule};
#[cfg(feature = "edit")]
pub use edit::{Edit, PacketView, complete_checksums};
pub use error::{Error, ErrorKind};
#[cfg(feature = "edit")]
pub use etherparse;
#[cfg(feature = "conntrack")]
pub use expectation::Expectation;
pub use flush::{Flush, FlushPolicy, FlushWhen, Gathered, Occasion};
pub use group::{GroupSink, GroupStream, QueueGroup};
pub use hook::Hook;
pub use kernel::KernelStats;
pub use namespace::NetworkNamespace;
pub use packet::{Family, Packet, Ticket, Vlan};
pub use queue::{PacketStream, Queue, TryRecvError};
pub use reconfigure::Reconfigure;
pub use sink::{Confirm, Refusals, VerdictSink};
pub use stats::{Fill, Stats};
pub use types::{Action, PacketId};
pub use verdict::Verdict;
