//! Isolation and tools for tests and examples that need a kernel: everything happens in fresh
//! network namespaces, as root or, through a user namespace, as an ordinary user.
//!
//! The tests are in one binary with `harness = false`, `tests/kernel`:
//!
//! ```ignore
//! #[path = "../support/mod.rs"]
//! mod support;
//!
//! fn main() -> std::process::ExitCode {
//!     support::run(vec![support::test("it works", || async { /* in a namespace of its own */ })])
//! }
//! ```
//!
//! An example calls [`enter`] first thing in `main`, before there is a second thread, and does its
//! work in [`isolated`].

// Every user of this module uses a different part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod bridge;
mod link;
mod namespace;
pub mod random;
mod raw_queue;
pub mod settings;
mod sockets;
mod sys;
mod trial;
mod user_namespace;

pub use self::{
    bridge::{Bridge, End, Frame, FrameSocket},
    link::{
        Offload, Peer, VethOptions, add_address, default_route, forwarding, link_down, link_flags, link_up,
        marked_route, set_mtu, set_offload, unreachable_unless_marked, veth, veth_with,
    },
    namespace::{Namespace, enter, isolated},
    raw_queue::{RawPacket, RawQueue},
    sockets::{ping, queue_line, raw_ipv4, send_raw_ipv4, set_mark, set_priority, udp, udp_marked, wait_until},
    sys::{fork_sleeper, go_on_in_a_fork, in_a_fork, refuse_call, replace_descriptor},
    trial::{PATIENCE, Report, run, test, test_multi, test_sync, test_unbounded},
    user_namespace::UserNamespace,
};
