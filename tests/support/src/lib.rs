//! Isolation and tools for tests, benchmarks and examples that need a kernel: everything happens in
//! fresh network namespaces, as root or, through a user namespace, as an ordinary user.
//!
//! A program calls [`enter`] first thing in `main`, before there is a second thread, and does its
//! work in [`isolated`].

#![allow(clippy::new_without_default, reason = "what `new` makes needs privileges")]

mod bridge;
mod connections;
mod cpus;
mod link;
mod namespace;
mod patience;
mod processes;
pub mod random;
mod raw_queue;
mod rtnetlink;
pub mod rules;
mod sockets;
mod sys;
mod user_namespace;

pub use self::{
    bridge::{Bridge, End, Frame, FrameSocket},
    connections::lose_connections,
    cpus::{on_each_cpu, stay_on_one_cpu},
    link::{
        Offload, Peer, VethOptions, add_address, default_route, forwarding, link_down, link_flags, link_up,
        marked_route, set_mtu, set_offload, unreachable_unless_marked, veth, veth_with,
    },
    namespace::{Namespace, enter, fresh, isolated},
    patience::{PATIENCE, SLOWNESS, many},
    processes::{drop_now, start_process},
    raw_queue::{RawPacket, RawQueue},
    sockets::{
        ping, queue_line, raw_ipv4, received_before, send_raw_ipv4, send_raw_ipv6, set_mark, set_priority, udp,
        udp_marked, wait_until,
    },
    sys::{answer_calls, fork_sleeper, go_on_in_a_fork, in_a_fork, keep_send_buffers, refuse_call, replace_descriptor},
    user_namespace::UserNamespace,
};
