//! Rewriting packets: where it works, and what connection tracking and address translation make of
//! it.
//!
//! [`Packet::edit`](crate::Packet::edit) copies a packet, changes it, and keeps lengths and
//! checksums correct; the verdict carries it back. A service has moved, and this router sends the
//! questions to its new address, and the replies back under the old one:
//!
//! ```no_run
#![doc = include_str!("programs/rewriting.rs")]
//! ```
//!
//! # Where it works
//!
//! Measured with UDP over veth, IPv4 and IPv6, at the priorities −300 (before connection tracking)
//! and 0 (behind it); the kernel tests repeat it on each kernel that they run on.
//!
//! | hook | payload, also longer | source | another address of the same next host | another host |
//! |---|---|---|---|---|
//! | prerouting | arrives | arrives | arrives | arrives: it is routed behind the hook |
//! | input | arrives | arrives | arrives, if it is an address of this host | lost |
//! | forward | arrives | arrives | arrives | lost: it goes where the old address was |
//! | output | arrives | arrives | arrives | arrives: it is routed again |
//! | postrouting | arrives | arrives | arrives | lost |
//!
//! # Replies
//!
//! Who has asked an address accepts the reply from that address only. So a program that changes
//! addresses or ports changes them back in the other direction. Without stateful rules it may do
//! so at any hook that the reply passes. With a rule such as `ct state established accept`, one
//! more condition holds: **connection tracking must see both directions with the same addresses**.
//!
//! | questions are changed | replies are changed | connection tracking |
//! |---|---|---|
//! | before it: `Priority::RAW` at prerouting or output | behind it: forward, input, postrouting, or with priority 0 | knows the reply |
//! | behind it | before it | knows the reply |
//! | before it | before it | does not: what it sees of the reply is from the old address |
//! | behind it | behind it | does not: it expects the reply from the old address |
//!
//! A changed payload makes no difference to it, at any place.
//!
//! # With address translation
//!
//! A router translates: a client asks the router's address, the server gets the question from the
//! router. What the queue sees:
//!
//! | hook, priority | question | reply |
//! |---|---|---|
//! | prerouting, −300 | client → router | server → router |
//! | prerouting, 0 | client → server | server → client |
//! | forward, 0 | client → server | server → client |
//! | postrouting, 0 | client → server | server → client |
//! | postrouting, 200 | router → server | router → client |
//!
//! - The destination is translated at prerouting (and output), −100; the source at postrouting
//!   (and input), 100. The replies of the same connection are translated at the same places, back.
//! - Rules match what they see there: at forward, the port of the *server*.
//! - Changed payloads arrive at all of these places, in both directions.
//! - Leave the translation of addresses to the kernel where it can do it: a `dnat` rule with a
//!   map needs no queue. A queue is for what depends on the payload.
//!
//! # What surprises
//!
//! - TCP: a payload of another length breaks the connection, because the sequence numbers of both
//!   ends no longer agree. Same length, or a proxy.
//! - A packet that becomes longer than the MTU is fragmented, or lost if it must not be.
//! - Super-packets (`gso`, the default) keep their length:
//!   [`Edit`](crate::edit::Edit#super-packets).
//! - What is behind a signature: TLS, IPsec, QUIC, DNSSEC, TCP MD5 and AO.
//! - Some kernels take no replaced payload, or compare headers: [`kernels`](super::kernels). What
//!   they refuse is reported by [`refusals`](crate::VerdictSink::refusals) where that is possible.
//! - A wrong checksum is no error anywhere: the packet is accepted, and its receiver ignores it.
//!   [`Edit::finish`](crate::edit::Edit::finish) computes them; bytes of your own need
//!   [`complete_checksums`](crate::edit::complete_checksums).
//!
//! Replies that the program itself makes: [`replies`](super::replies).
