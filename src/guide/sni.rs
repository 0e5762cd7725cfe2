//! Blocking TLS by the server's name, the SNI in a client's first bytes.
//!
//! The crate `nfqueue-inspect` puts the first bytes of a connection together, also if they come in
//! several segments, out of order, or again with other bytes, and reads the names in them. What is
//! allowed then leaves the queue: [`flows`](super::flows).
//!
//! ```toml
//! [dependencies]
//! nfqueue-inspect = "0.1"
//! ```
//!
//! ```no_run
#![doc = include_str!("programs/sni.rs")]
//! ```
//!
//! The example `sni_filter` is this with options, on a router, and with QUIC.
//!
//! # For some clients only, on a router
//!
//! Narrow both rules, the servers' too. If the packets of servers to other clients came, they would
//! be of connections whose beginning was not seen: `Unknown`, and here reset.
//!
//! ```
//! use std::net::IpAddr;
//! use tokio_nfqueue::{Hook, Protocol, Rule, divert::Match};
//!
//! /// Of one client.
//! fn of_client(client: IpAddr, port: u16) -> [Rule; 2] {
//!     let tcp = || Rule::new(Hook::Forward).protocol(Protocol::Tcp);
//!     let length = if client.is_ipv4() { 32 } else { 128 };
//!     [
//!         tcp().source_address(client, length).destination_port(port),
//!         tcp().destination_address(client, length).source_port(port),
//!     ]
//! }
//!
//! /// Of all clients behind an interface, to servers that are not.
//! fn behind(interface: &str, port: u16) -> [Rule; 2] {
//!     let tcp = || Rule::new(Hook::Forward).protocol(Protocol::Tcp);
//!     let (from, to) = (Match::input_interface(interface), Match::output_interface(interface));
//!     [
//!         tcp().when(from.clone()).destination_port(port),
//!         tcp().when(to).unless(from).source_port(port),
//!     ]
//! }
//! # let _ = (of_client("192.0.2.7".parse().unwrap(), 443), behind("eth1", 443));
//! ```
//!
//! # What surprises
//!
//! - **Both directions** must come to the queue, until the connection is settled: only what the
//!   server acknowledges proves which of two different segments it has received. With clients alone
//!   it works, and [promises less](https://docs.rs/nfqueue-inspect/#one-direction-or-both).
//! - A connection costs its handshake, the hello, and the beginning of the server's answer: if that
//!   asks for a second hello (HelloRetryRequest), the name in it counts as well. Do not limit that
//!   by [`first_packets`](crate::Rule::first_packets): the end of a hello in many segments would
//!   pass unseen.
//! - A connection that began before the program did is `Unknown`, because its first bytes are gone.
//!   Here it is reset, and its client begins anew. If old connections shall stay, accept them with
//!   `for_flow`: then a client can avoid the filter by waiting for a restart, which
//!   [`restarting`](super::restarting) without a gap prevents.
//! - With an **encrypted hello** (ECH), the name is that of the provider. Clients get its keys from
//!   DNS (HTTPS records): remove them there to have the name in clear.
//! - **QUIC** is UDP with port 443, and browsers prefer it. Filter it as well
//!   (`nfqueue_inspect::quic`), or reject UDP with port 443, and clients use TCP.
//! - Clients must not be able to send packets in the names of servers, which would prove what the
//!   servers have not received: name the interfaces, as `behind` does, or set `rp_filter` to 1.
//! - The name is what the client says. Another name for the same address passes.
//! - A reset by [`reject`](crate::Packet::reject) reaches the client at once, and the server when
//!   it sends next. The server never gets the whole of a denied hello.
//! - `Instant::now()` is handed in, so that a test moves the time; [`testing`](super::testing)
//!   shows the rest.
