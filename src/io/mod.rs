//! Everything that touches the system: descriptors, locks, wakers, threads and time. It carries out
//! what [`state`](crate::state) decides.
//!
//! | file | what |
//! |---|---|
//! | [`shared`] | what the handles of one queue share, and its locks |
//! | [`bind`], [`reconfigure`], [`close`] | configuration of the queue |
//! | [`receiver`], [`recv`], [`stream`] | from the socket to the stream |
//! | [`send`] | from the ledger to the socket |
//! | [`driver`], [`timer`], [`task_timer`] | the task in the runtime, and the timer thread |
//! | [`guard`], [`wakers`] | who holds packets, and who waits |
//! | [`socket`], [`buffers`], [`kernel`], [`clock`], [`sys`] | the operating system |
//! | `memory` | what a kernel in memory has in its place |
//! | [`handover`], [`exchange`], [`passed`] | passing a queue to another process |
//! | [`raw_sockets`] | raw sockets for packets outside of a queue |

// Much of what a hand-over needs is small parts of other files.
#![cfg_attr(not(feature = "handover"), allow(dead_code))]

mod bind;
mod buffers;
mod busy_poll;
pub(crate) mod clock;
mod close;
mod driver;
#[cfg(feature = "handover")]
mod exchange;
mod extras;
mod guard;
#[cfg(feature = "handover")]
mod handover;
pub(crate) mod kernel;
mod limits;
#[cfg(feature = "test-util")]
pub(crate) mod memory;
#[cfg(feature = "handover")]
mod passed;
mod raw_packet;
#[cfg(feature = "inject")]
pub(crate) mod raw_sockets;
mod ready_fd;
mod receiver;
mod reconfigure;
mod recv;
mod send;
mod shared;
mod socket;
mod stream;
pub(crate) mod sys;
mod tallies;
mod task_timer;
pub(crate) mod timer;
mod trace;
mod wakers;

#[cfg(all(feature = "divert", feature = "handover"))]
pub(crate) use self::passed::PassedPart;
#[cfg(feature = "divert")]
pub(crate) use self::task_timer::Pauses;
pub(crate) use self::{
    bind::Opened,
    extras::VerdictExtras,
    guard::VerdictGuard,
    raw_packet::RawPacket,
    ready_fd::AnyReadyFd,
    shared::{Settings, Shared},
    stream::Received,
};
#[cfg(feature = "handover")]
pub(crate) use self::{
    exchange::{acknowledge, await_acknowledgement, receive_descriptors, send_descriptors, take_back},
    handover::Frozen,
    passed::{Passed, PassedQueue, packed, unpacked},
};
