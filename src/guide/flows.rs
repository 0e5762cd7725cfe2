//! Verdicts for whole connections: what the kernel then does by itself, and what that needs.
//!
//! Most filters know after the first packets what they think of a connection. A verdict with
//! [`for_flow`](crate::Verdict::for_flow) holds for the packet and for every later packet of its
//! connection, in both directions. These do not come to the queue.
//!
//! ```no_run
//! use tokio_nfqueue::{Divert, FlowMarks, Hook, Protocol, Queue, Rule};
//!
//! # fn is_bad(_: &[u8]) -> Option<bool> { None }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokio_nfqueue::Error> {
//! let marks = FlowMarks::default();
//! let mut queue = Queue::builder(0).flow_marks(marks).bind()?;
//! let divert = Divert::builder()
//!     .flow_marks(marks)
//!     .rule(Rule::new(Hook::Forward).protocol(Protocol::Tcp).to_queue(0))
//!     .install()?;
//! while let Some(packet) = queue.recv().await.transpose()? {
//!     let verdict = match is_bad(packet.payload()) {
//!         None => packet.accept(),
//!         Some(false) => packet.accept().for_flow(),
//!         Some(true) => packet.reject().for_flow(),
//!     };
//!     verdict.submit()?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | verdict | the packet | later packets of its connection |
//! |---|---|---|
//! | `packet.accept().for_flow()` | accepted | accepted where a rule would queue them |
//! | `packet.drop().for_flow()` | dropped | dropped at the hook of the queue, and at the hook of this host's packets in the other direction |
//! | `packet.reject().for_flow()` | dropped; its sender gets a TCP reset, or an ICMP error | the same, in both directions |
//! | `packet.reject()` | the same | come to the queue |
//!
//! The example `per_flow` accepts connections by their first packet; `ips` searches the first bytes
//! of TCP connections, and keeps what it knows of them.
//!
//! What is a connection is what connection tracking calls one: for UDP, packets between the same
//! addresses and ports until none has come for 30 s, or for 2 minutes after replies
//! (`nf_conntrack_udp_timeout`, `nf_conntrack_udp_timeout_stream`). ICMP errors belong to the
//! connection that they are about. Connections that a helper of connection tracking expects inherit
//! the mark of the connection that they belong to.
//!
//! # How it works
//!
//! [`FlowMarks`](crate::FlowMarks) are three bits of marks. With
//! [`DivertBuilder::flow_marks`](crate::DivertBuilder::flow_marks), the table marks a packet on its
//! way to the queue. A verdict for a connection accepts the packet with other bits. A chain at the
//! same hook, directly behind the queue, saves the bits in the connection's mark, removes them from
//! the packet, and accepts, drops or rejects it. The first rules of the table apply the
//! connection's mark to later packets.
//!
//! - The mark on the way to the queue proves that the chain behind the queue exists. Without it,
//!   `for_flow` and `reject` are refused, because the packet would pass: for example if a rule
//!   without flow marks has queued it.
//! - Rules before the queue's rule still see packets of accepted connections. Rules behind it in
//!   the same chain do not.
//! - At the output hook, an accepted packet is routed without the bits, so policy routing by marks
//!   is not disturbed.
//! - The kernel forgets the mark of a connection whose first packet is dropped. So dropped and
//!   rejected connections of which no packet has passed are kept in a set: see
//!   [`DivertBuilder::denied_flows`](crate::DivertBuilder::denied_flows).
//! - [`Stats`](crate::Stats) counts a packet that is dropped or rejected behind the queue as
//!   accepted, because for the queue it is. The counters of `nft list ruleset` tell.
//!
//! # Taking verdicts back
//!
//! [`Divert::forget_flows`](crate::Divert::forget_flows) and
//! [`forget_flow`](crate::Divert::forget_flow). When the table goes, at the latest when the process
//! ends, nothing is left that reads the marks. The next table with the same marks removes them
//! first.
//!
//! # With rules of your own
//!
//! A queue with flow marks also works with other rules, if these do the same. With the default
//! marks, and for connections that are denied later than at their first packet:
//!
//! ```text
//! table inet filter {
//!     chain forward {
//!         type filter hook forward priority 0;
//!         meta mark & 0xe0000000 != 0 meta mark set meta mark & 0x1fffffff
//!         ct mark & 0xe0000000 == 0xc0000000 drop                                 # dropped()
//!         ct mark & 0xe0000000 == 0xe0000000 meta l4proto tcp reject with tcp reset   # rejected()
//!         ct mark & 0xe0000000 == 0xe0000000 reject
//!         ct mark & 0xe0000000 == 0xa0000000 accept                               # accepted()
//!         meta mark set meta mark | 0x80000000 queue num 0                        # queued()
//!     }
//!     chain behind {
//!         type filter hook forward priority 1;
//!         meta mark & 0xe0000000 == 0xa0000000 ct mark set ct mark & 0x1fffffff | 0xa0000000
//!         meta mark & 0xe0000000 == 0xc0000000 ct mark set ct mark & 0x1fffffff | 0xc0000000 drop
//!         meta mark & 0xe0000000 == 0xe0000000 ct mark set ct mark | 0xe0000000
//!         meta mark & 0xe0000000 == 0xe0000000 meta l4proto tcp reject with tcp reset
//!         meta mark & 0xe0000000 == 0xe0000000 reject
//!         meta mark & 0xe0000000 == 0x60000000 reject   # rejected_packet()
//!         meta mark set meta mark & 0x1fffffff
//!     }
//! }
//! ```
//!
//! Whoever marks packets as queued must have the chain behind the queue: without it, verdicts that
//! drop or reject let the packet pass. `Divert::to_nft` prints the complete rules.
