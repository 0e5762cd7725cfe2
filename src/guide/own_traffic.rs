//! Not to filter one's own traffic.
//!
//! A rule that matches what this host sends also matches what the program sends: its questions to a
//! resolver, a database, a log server. A policy that waits for such an answer waits for a packet
//! that waits for the policy, until a time-out. Exempt the program:
//!
//! | by | how | what it does not cover |
//! |---|---|---|
//! | a narrow rule | protocol, port, interface in the [`Rule`](crate::Rule) | |
//! | a mark on its sockets | `SO_MARK`, and `unless_mark` | sockets that a library opens: getaddrinfo of libc, most HTTP clients |
//! | its user | `unless(Match::user(id))`, with a user of its own (`User=`, `DynamicUser=` of systemd) | what arrives: the kernel may not know the receiver yet. Other programs of that user are exempt as well |
//! | the connection's mark | a rule that copies the packet's mark to the connection | the same as the packet's mark; it covers both directions |
//!
//! Here a service in the network is asked about each packet of UDP, in both directions. The mark of
//! the sockets exempts the questions, that of the connection the answers:
//!
//! ```no_run
#![doc = include_str!("programs/own_traffic.rs")]
//! ```
//!
//! # What surprises
//!
//! - `tokio::net::lookup_host` asks through libc, in a thread, without the mark. Use a resolver
//!   whose sockets are yours, or exempt the user:
//!   `Match::user(rustix::process::getuid().as_raw())`.
//! - If the program runs as root, so does much else: do not exempt root in a firewall.
//! - `SO_MARK` needs `CAP_NET_ADMIN`, which the program has; since Linux 5.17 `CAP_NET_RAW`
//!   suffices.
//! - Others use marks, too: Kubernetes 0x4000 and 0x8000, Calico 0xffff0000, Tailscale 0xff0000,
//!   zapret 0x40000000. Compare and set single bits, with a mask.
//!   The verdicts of [`for_flow`](super::flows) use other bits of the connection's mark
//!   ([`FlowMarks`](crate::FlowMarks)).
//! - A mark on a packet ends with this host; on loopback it stays. Routing rules may depend on it.
//! - The kernel's own packets have no socket: no user, no mark. Resets, ICMP errors and IPv6
//!   neighbour discovery come to a rule that matches them: see [`guide`](super#rules).
//! - What an [`Injector`](crate::inject::Injector) sends is own traffic: give it the mark
//!   ([`InjectorBuilder::mark`](crate::inject::InjectorBuilder::mark)). A packet that is
//!   [repeated](crate::Packet::repeat_marked) passes the rule again, with its mark.
//! - Two filters on one host exempt themselves, and see each other. If each asks the network about
//!   the other's questions, they wait for each other: exempt both, by one mark.
//!
//! Where the traffic of the host itself is not to be filtered at all, as on a router, use
//! [`Hook::Forward`](crate::Hook::Forward): nothing of this host passes it.
