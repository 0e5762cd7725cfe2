//! Everything that touches the system: descriptors, locks, wakers, threads and time. It carries out
//! what [`state`](crate::state) decides.
//!
//! | file | what |
//! |---|---|
//! | [`shared`] | what the handles of one queue share, and its locks |
//! | [`bind`], [`reconfigure`], [`close`] | configuration of the queue |
//! | [`receiver`], [`recv`], [`stream`] | from the socket to the stream |
//! | [`sender`], [`send`] | from the ledger to the socket |
//! | [`driver`], [`timer`] | the task in the runtime, and the timer thread |
//! | [`socket`], [`buffers`], [`kernel`], [`clock`], [`sys`] | the operating system |
//! | `memory` | what a kernel in memory has in its place |
//! | [`raw_sockets`] | raw sockets for packets outside of a queue |

mod bind;
mod buffers;
mod busy_poll;
pub(crate) mod clock;
mod close;
mod driver;
mod extras;
mod guard;
pub(crate) mod kernel;
mod limits;
#[cfg(feature = "test-util")]
pub(crate) mod memory;
mod raw_packet;
pub(crate) mod raw_sockets;
mod ready_fd;
mod receiver;
mod reconfigure;
mod recv;
mod send;
mod sender;
mod shared;
mod socket;
mod stream;
pub(crate) mod sys;
pub(crate) mod timer;
mod trace;

pub(crate) use self::{
    bind::Opened,
    extras::VerdictExtras,
    guard::VerdictGuard,
    raw_packet::RawPacket,
    ready_fd::AnyReadyFd,
    shared::{Settings, Shared},
    stream::Received,
};
