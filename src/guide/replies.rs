//! Replies to packets: how to make them, how to send them, and which arrive.
//!
//! A program that decides packets can also reply to them: it answers a DNS query itself, refuses a
//! connection with a TCP reset, or reports an ICMP error. With feature `edit`,
//! [`Edit`](crate::edit::Edit) makes the reply from the packet:
//!
//! | reply | made by |
//! |---|---|
//! | the packet in the reverse direction, with another payload; an echo reply | [`turn_around`](crate::edit::Edit::turn_around), [`replace_payload`](crate::edit::Edit::replace_payload) |
//! | a TCP reset | [`tcp_reset`](crate::edit::Edit::tcp_reset) |
//! | an ICMP or ICMPv6 error | [`icmp_unreachable`](crate::edit::Edit::icmp_unreachable) |
//!
//! If only the kernel's own resets and errors are needed, [`Packet::reject`](crate::Packet::reject)
//! is simpler.
//!
//! There are two ways to send the reply:
//!
//! - **Injector**: drop the packet, and send the reply with an
//!   [`Injector`](crate::inject::Injector). This works at every hook. The reply is a new packet of
//!   this host and passes the output and postrouting hooks.
//! - **Verdict**: accept the packet with the reply as its
//!   [payload](crate::Verdict::payload). The kernel continues with the packet where it was queued,
//!   so the reply arrives only from two places. It needs neither `CAP_NET_RAW` nor a mark.
//!
//! The example `dns_firewall` answers DNS queries with an injector.
//!
//! # Which reply arrives
//!
//! Measured with UDP over veth on Linux 6.18, IPv4 and IPv6; the kernel tests repeat it on each
//! kernel that they run on. At output and prerouting, a priority before connection tracking (−300)
//! and after it (0) gave the same results.
//!
//! | who sent the packet, and to whom | hook of the queue | verdict | injector |
//! |---|---|---|---|
//! | this host to another | output | arrives ¹ | arrives ¹ |
//! | this host to another | postrouting | lost | arrives ¹ |
//! | another host to this one | prerouting | lost ² | arrives ³ |
//! | another host to this one | input | lost ⁴ | arrives ³ |
//! | another to another, through this one | prerouting | arrives ⁵ ⁶ | arrives ³ |
//! | another to another, through this one | forward | lost ⁷ | arrives ³ |
//! | another to another, through this one | postrouting | lost ⁷ | arrives ³ |
//!
//! 1. The reply passes the output and input hooks of this host. A stateful rule at one of them
//!    drops it (see below). `rp_filter` has no effect.
//! 2. The source of the reply is an address of this host. The kernel accepts no packet with such a
//!    source from an interface.
//! 3. The reply passes the output hook. A stateful rule there drops it; rules at the input and
//!    forward hooks, and `rp_filter`, have no effect.
//! 4. The route was chosen before the hook: the reply is delivered to this host.
//! 5. The reply passes the forward hook. A stateful rule there drops it.
//! 6. Over IPv4 `rp_filter` must be 0, because the source of the reply is not reachable through
//!    the interface where it seems to arrive. IPv6 has no such setting; a `fib` or `rpfilter` rule
//!    has the same effect.
//! 7. The route was chosen before the hook: the reply is sent towards the destination of the
//!    packet.
//!
//! Some kernels [take no replaced payload](crate::Verdict::payload) in some network namespaces; a
//! reply by verdict is then refused. The same kernels drop a reply that differs too much from the
//! packet, for example an ICMP error.
//!
//! # Stateful rules
//!
//! A typical firewall accepts replies with `ct state established,related accept` and drops the
//! rest. If the first packet of a connection is dropped, the kernel forgets the connection. So an
//! injected reply to it counts as the first packet of a new connection; a TCP reset or an ICMP
//! error counts as invalid. A reply by verdict has the connection of the packet that it replaces,
//! in the wrong direction, and counts as new as well.
//!
//! - Give the reply a mark, with [`InjectorBuilder::mark`](crate::inject::InjectorBuilder::mark) or
//!   [`Verdict::mark`](crate::Verdict::mark), and accept the mark before the stateful rule:
//!   `meta mark 0x40 accept`. The mark stays on the packet while it is within this host, also over
//!   loopback.
//! - A reply to a later packet passes if it is injected: once a packet of the connection was
//!   accepted, the kernel knows the connection. For example, a TCP reset in the middle of a
//!   connection.
//! - Stateful rules on other hosts need nothing: for them, the reply belongs to the connection that
//!   they have seen.
//!
//! # Behind address translation
//!
//! Behind a rule for destination NAT, the first packet of a connection carries the translated
//! address. An injected reply comes from that address, to which the client has sent nothing, and
//! the client ignores it. Two ways work:
//!
//! - [`Packet::reject`](crate::Packet::reject): the kernel translates its own resets and errors
//!   back.
//! - A queue before the translation, at prerouting with a priority below −100, such as
//!   `Priority::MANGLE`. There the packet has the address that the client knows.
//!
//! # After a verdict for the connection
//!
//! `drop().for_flow()` at the input hook denies the connection in both directions. A reply that is
//! injected afterwards is a packet of that connection: a rule at the output hook drops it, and
//! [`send`](crate::inject::Injector::send) returns an error. Reply with `reject().for_flow()`, or
//! drop each packet alone with `drop()`, for as long as packets are to be replied to.
//!
//! # Not to reply to oneself
//!
//! - The rule for the queue must not match the replies. If ports or addresses do not exclude them,
//!   exclude the injector's mark (with feature `divert`: `Rule::unless_mark`).
//! - Replies must not cause replies. `tcp_reset` and `icmp_unreachable` refuse to reply to resets
//!   and errors. `turn_around` cannot know: two programs that turn each other's packets around
//!   never stop. Reply only to what is a query.
//! - Errors without a limit help an attacker, who fakes the sender. The kernel limits its own
//!   errors (`net.ipv4.icmp_ratelimit`); a program that sends its own errors must limit them
//!   itself.
