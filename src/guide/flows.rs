//! Verdicts for whole connections: what the kernel then does, and what that needs.
//!
//! Most filters know after the first packets what they think of a connection. A verdict with
//! [`for_flow`](crate::Verdict::for_flow) holds for the packet and for every later packet of its
//! connection, in both directions. These do not come to the queue.
//!
//! ```no_run
//! use tokio_nfqueue::{Divert, Hook, Protocol, Queue, Rule};
//!
//! # fn is_bad(_: &[u8]) -> Option<bool> { None }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokio_nfqueue::Error> {
//! let rules = Divert::builder().rule(Rule::new(Hook::Forward).protocol(Protocol::Tcp));
//! let mut queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
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
//! The example `per_flow` accepts connections by their first packet; `firewall` asks a service
//! about each; `ips` and `sni_filter` judge the first bytes of TCP connections, which the crate
//! `nfqueue-inspect` puts together. Linux 5.18 or later is needed; on an older kernel these
//! verdicts hold for their packet only, and
//! [`refusals`](crate::VerdictSink::refusals) reports each.
//!
//! # What is a connection
//!
//! A connection is what connection tracking calls one. An accept never holds for a packet that
//! begins a connection: that packet comes to the queue, also if connection tracking counts it to an
//! older connection on the same addresses and ports. What it begins inherits nothing from the
//! older connection.
//!
//! | protocol | a new connection begins with | two are one for the kernel if |
//! |---|---|---|
//! | TCP | a segment with SYN and without ACK and RST | a late packet of the older one is counted to the newer one; see below |
//! | SCTP | a packet with the verification tag 0 (INIT) | the same; or the second begins on these addresses and ports with a heartbeat, as on a further path: conntrack takes over its tags |
//! | DCCP, if the kernel tracks it (`CONFIG_NF_CT_PROTO_DCCP`; otherwise as "all others") | a Request | never |
//! | UDP; UDP-Lite, where `nf_conntrack_checksum` is 0: otherwise conntrack calls its packets invalid | the first packet after none has come for 30 s, or for 2 minutes after replies (`nf_conntrack_udp_timeout`, `nf_conntrack_udp_timeout_stream`) | the second uses the same ports before that time |
//! | ICMP echo | the first request after none has come for 30 s (`nf_conntrack_icmp_timeout`) | it has the same identifier |
//! | GRE with keys of PPTP | the first packet after 30 s, or 3 minutes after replies | it has the same key |
//! | all others, also GRE without PPTP, ESP | the first packet after none has come for 10 minutes (`nf_conntrack_generic_timeout`) | they are between the same two hosts |
//!
//! Where the kernel cannot tell, the accept of the older connection holds for the newer one.
//!
//! - Connection tracking does not look at interfaces. Equal addresses and ports on two of them
//!   (link-local addresses, networks of customers, bridges) are one connection, also if the rules
//!   name the interfaces; of TCP, the SYN of the second one comes to the queue. Give such
//!   interfaces zones of connection tracking (`ct zone set`): accepts do not hold in another zone.
//! - A packet with a source route (a routing header of IPv6, an option of IPv4) belongs to the
//!   connection with the next hop, and is for another host; one with a home address (destination
//!   options of IPv6) is of another host. No accept lets such packets pass: each comes
//!   to the queue, as do all packets with options of IPv4. Look at the whole header. A host that
//!   itself removes routing headers (`seg6local`, with the flavor PSP or with decapsulation) needs
//!   its rules at `Prerouting`, where the header is seen: at `Forward` an accept of the connection
//!   with the removed address holds wherever the packet goes.
//! - Of an IPv6 packet that the kernel cannot reassemble, because another fragment header is in
//!   front of the first, the parts are dropped:
//!   [`defragment`](crate::divert::DivertBuilder::defragment).
//! - ICMP errors belong to the connection that they are about, and pass if it is accepted. A
//!   verdict on an ICMP error holds for the error only, because anybody can quote a connection:
//!   `for_flow` is then reported by `refusals`.
//! - A connection that another one has announced (a helper of connection tracking expects it) comes
//!   to the queue, also if the other one is accepted. If the other one has been denied by a verdict
//!   for a packet of its entry, or has been stopped since the verdict, it is denied.
//! - A SYN on an accepted connection's addresses and ports ends the accept, from either side, also
//!   if its sender has forged them. The connection's packets then come to the queue again. (If
//!   connection tracking calls the SYN invalid, it ends the accept when it passes. The table
//!   remembers 4096 such for each IP version, for the time of denials, also if their connection is
//!   not complete by then; while that list is full, it drops them. A SYN that a rule excludes from
//!   tracking ends nothing: exclude all packets of a connection, or none. Nor does a SYN that waits
//!   in the queue of another program while [`replace_rules`](crate::Divert::replace_rules) adds a
//!   rule at an earlier hook, or at an earlier priority of the same hook.)
//! - If a SYN comes while conntrack has an entry with its addresses and ports (of an older
//!   connection, or of the same one if the SYN is sent again), only a verdict for a SYN can accept
//!   the connection. `accept().for_flow()` for a later packet holds for that packet: packets of
//!   both connections may wait in the queue. Of two SYNs that wait at once, the later verdict holds
//!   for both.
//! - Until a connection is established (the third packet of its handshake has come, and may still
//!   wait in the queue; of SCTP, COOKIE ACK), `accept().for_flow()` for a packet that is neither a
//!   SYN nor the answer to one holds for that packet; so also for data that a server sends earlier
//!   (TCP Fast Open). It may be of an older connection: if conntrack has no entry of that any more
//!   when the SYN comes (it was closed or reset, or the entry is lost), it counts late packets of
//!   the older connection to the newer one. What rules cannot tell: a late SYN-ACK is taken for the
//!   answer, a late packet with numbers that fit the newer connection for one of it, and, once that
//!   is established, any late packet. `accept().for_flow()` for such a packet accepts the newer
//!   connection.
//!   (`reject()` of a TCP packet resets the connection also for conntrack. It may then not be
//!   established any more.)
//! - A connection of TCP, SCTP or DCCP whose beginning connection tracking has not seen is accepted
//!   by its second packet: `accept().for_flow()` for the first one, which has no entry yet, holds
//!   for that packet. It may be of an older connection than a SYN that has passed meanwhile. A
//!   verdict for the first reply holds for that packet, too. (Of SCTP, it is accepted by the first
//!   packets behind an answer of the other side.)
//! - [`forget_flow`](crate::Divert::forget_flow) and
//!   [`forget_flows`](crate::Divert::forget_flows) end an accept. A verdict that comes after them
//!   counts, also for a packet that has waited since before; but between a SYN and its answer, a
//!   forgotten connection is accepted only by a verdict for another SYN.
//! - A packet that comes to the hooks of this host twice with the same addresses and ports, such as
//!   that of a program of this host that leaves by a pair of interfaces into a bridge of this host,
//!   is as one that is sent again: a SYN ends its own accept.
//! - A SYN does not renew the entry of a connection that a reset has closed
//!   (`nf_conntrack_tcp_timeout_close`, 10 s). If the entry ends before the server's answer, about
//!   once in 50 000 connections that use their ports again within that time, the accept ends with
//!   it: the answer is invalid for connection tracking, and the packets behind it come to the queue
//!   as those of a connection whose beginning was not seen. Of two that wait in the queue at once,
//!   the kernel drops one; TCP sends it again.
//! - After `accept().for_flow()` for a SYN, packets come to the queue until the server has answered
//!   with a SYN. So the hook must see both directions.
//! - TCP, SCTP and DCCP in an authentication header of IPv6 (protocol 51) always come to the queue:
//!   `accept().for_flow()` holds for the packet, because rules cannot see which packet begins a
//!   connection. Denials hold, but not for packets that connection tracking calls invalid, and also
//!   for a connection that the other side begins. (In IPv4 connection tracking does not see what is
//!   behind the header: as "all others".)
//!
//! # Where two verdicts meet
//!
//! Several packets of a connection can wait in the queue at once, and their verdicts can differ.
//! The denial wins for all packets that follow, in whichever order the verdicts come, and also if
//! the packets are from both sides. Packets that are queued already still need their own verdicts;
//! if these accept them, a later hook of the table may drop them. A packet that has passed the hook
//! before the denial, by its own verdict or by another one's accept, is not stopped by it:
//! if it waits elsewhere (in the backlog of a processor, in another program's queue), it arrives
//! later.
//!
//! Two packets of a *new* connection each have an entry of connection tracking, and the kernel
//! keeps only the one that passes first. `accept().for_flow()` for the other one is forgotten: the
//! connection's next packet comes to the queue. (Before Linux 6.12 it holds: the packet gets the
//! entry that was kept. So it is with first packets of both sides that cross: if one has passed
//! while the other waits, both are of one connection, and a denial of the later one denies it.)
//!
//! # How long a denial holds
//!
//! A denied connection is remembered by protocol, addresses and ports, for
//! [`denied_flows`](crate::divert::DivertBuilder::denied_flows) (ten minutes by default) since its
//! last packet, in either direction. Each packet lets the time begin anew. Until then it stays
//! denied, also if a side sends a reset and a SYN, and so does a new connection from the same port
//! to the same port. Beyond that time it is denied as long as connection tracking has its entry:
//! that of the packet with the verdict, or another one of which a packet has been stopped
//! meanwhile. (It is dropped then, if it was rejected. Of TCP, SCTP and DCCP, an entry that the
//! other side has begun comes to the queue.) Behind address translation, when the entry is gone,
//! the time of each direction begins anew with its own packets only.
//!
//! The other side of a connection that was denied at its first packet may begin a connection of its
//! own, on the same addresses and ports: its first packet (a SYN, or any packet of a protocol
//! without one) comes to the queue if a rule matches it. If none does, a packet of a protocol
//! without SYN is dropped for two seconds after the verdict, as it may have crossed the denied one.
//! After that it passes: otherwise a sender with a forged address could block the connections of
//! others. (It also passes if a rule of yours accepts it at the last hook with rules.) Later
//! packets of such a connection come to the queue, and cannot leave it, while the denial is
//! remembered. The table remembers 4096 such connections for each IP version, for twice the time of
//! denials; while that list is full, it drops the first packets of further ones.
//!
//! If a packet of either side has passed before the verdict, all that the other side sends is of
//! the denied connection, also beside an earlier denial of the same addresses and ports, and when
//! connection tracking has lost the connection. (If two first packets wait at once, one passes, and
//! the other one is denied, the rules cannot see that one has passed. Then this holds once a packet
//! of the connection has been stopped while connection tracking has its entry.) Only where the
//! protocol shows that a packet begins a connection (TCP, SCTP and DCCP), the other side may still
//! begin one of its own: with a packet that connection tracking does not count to the denied one as
//! a reply.
//!
//! Behind address translation, connection tracking may have an entry for each direction of what the
//! ends take for one conversation: if packets of both sides cross before one of them has passed, or
//! if the other side sends to an address that has been translated. Each is then a connection with
//! verdicts of its own, except that a denial of a first packet also holds for an entry whose
//! destination alone has been translated, without another port. (That such an entry is the
//! other side's own shows only behind the translation: if all rules are at `Prerouting` with a
//! priority of −100 or below, its first packet is as that of any connection, and later ones are
//! denied.)
//!
//! The addresses of a packet can be forged:
//!
//! - A sender that forges a client's address can have the client's connection denied; if an earlier
//!   one of its packets has passed, also what the server sends on the same ports. Let the kernel
//!   drop what comes from the wrong side (`rp_filter`), or name the interface in the rule.
//! - A policy that accepts forged packets of a server before it denies their connection denies the
//!   client's own connection on the same ports too: conntrack counts both to one.
//! - A packet that connection tracking calls invalid is denied by its own addresses. Behind address
//!   translation these are not the connection's, and the packet has no receiver who knows them.
//! - A denial of any packet with a connection's addresses and ports ends the connection that the
//!   other side has begun beside an earlier denial. With destination translation, a forged packet
//!   to the translated address has these addresses too.
//! - An ICMP message that belongs to no connection (invalid, or another program's `notrack`) is
//!   dropped if it quotes a packet of a denied connection, is a denied echo request, or the reply
//!   to one. It is not if the quoted packet has IP options or extension headers, is a later
//!   fragment, or is itself ICMP.
//! - A packet that a program of this host puts on the loopback interface itself, past `Output`
//!   (`AF_PACKET`, `tc`), is looked at only at the hooks of the rules.
//! - The tuples of denied connections do not contain the zone of connection tracking.
//!
//! `stop()` skips the chain behind the queue, which learns nothing of the packet: it ends no
//! accept, and begins no connection beside a denied one. Use `accept()`.
//!
//! A rule at a later hook that [`replace_rules`](crate::Divert::replace_rules) adds does not change
//! where a connection beside a denied one begins: it begins when its first packet has passed the
//! last hook that had rules when the table was installed, also if the new rule drops that packet.
//!
//! There must be room: see [`denied_flows`](crate::divert::DivertBuilder::denied_flows).
//!
//! # Rejected connections
//!
//! Only this host's own replies pass: resets without data and ICMP errors that no process has sent
//! (or a process of root that has closed its raw socket while the error waited elsewhere; on the
//! loopback interface, also a reset of a process that has left `Output` before the verdict, and
//! waited elsewhere). Resets
//! and ICMP errors from elsewhere are dropped as all else, in both directions. A reply to the first
//! packet is never queued, whatever the rules are: the kernel would drop it
//! (`nfqnl_enqueue_packet`), and the client would wait.
//!
//! - In the middle of a connection, the sender of the rejected packet is reset at once, and the
//!   other side when it sends next. The kernel has no way to send a segment that nothing has
//!   caused; [`Edit::tcp_reset`](crate::edit::Edit::tcp_reset) with an
//!   [`Injector`](crate::inject::Injector) can, before the verdict.
//! - At `Postrouting` the kernel cannot reject. The packet is dropped, with `for_flow` also the
//!   connection, and `refusals` reports it.
//! - The kernel sends a reply only if it has a route to the sender. A host that bridges packets
//!   through the hooks of IP (`bridge-nf-call-iptables`) may have none: without an address in the
//!   bridge's network, the packet is dropped and its sender waits. Nothing reports it.
//! - Without flow marks, a rule with [`reject`](crate::Rule::reject) beside one that queues the
//!   replies has no answer: since Linux 6.1.107 and 6.10.7 the kernel drops the reply to a first
//!   packet in the queue. Accept resets and related ICMP errors before the rule that queues.
//!
//! # Accepted connections past the hooks
//!
//! An accepted connection costs less than one whose packets all come to the queue, and more than
//! one without any rule. With [`DivertBuilder::offload`](crate::divert::DivertBuilder::offload) it
//! costs less than without any rule: the kernel forwards its packets when they arrive, past all
//! hooks (an nf_tables flowtable, in software).
//!
//! ```no_run
//! use tokio_nfqueue::{Divert, Hook, Protocol, Queue, Rule};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokio_nfqueue::Error> {
//! let rule = Rule::new(Hook::Forward).protocol(Protocol::Tcp);
//! let rules = Divert::builder().rule(rule).offload(["eth0", "eth1"]);
//! let queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
//! # let _ = queue;
//! # Ok(())
//! # }
//! ```
//!
//! This concerns TCP and UDP that this host forwards between the named interfaces. A connection
//! leaves the hooks with the first packet that its accept saves from the queue of a rule at
//! `Forward`, when packets of both sides have passed. When none has come for 30 s
//! (`nf_flowtable_tcp_timeout`, `nf_flowtable_udp_timeout`), it comes back, and leaves again with
//! its next packet.
//!
//! What is promised above still holds:
//!
//! - What begins a connection comes to the queue. The kernel itself would forward a SYN on the
//!   ports of an offloaded connection. The table moves it past the flowtable, and then all packets
//!   of the connection for five minutes.
//! - A denial holds from its verdict on, also if its packet waited in the queue while another one
//!   accepted the connection.
//! - [`forget_flow`](crate::Divert::forget_flow) and
//!   [`forget_flows`](crate::Divert::forget_flows) bring connections back to the queue at once.
//!
//! The price:
//!
//! - No rule sees the packets, of this table or another, at `Prerouting`, `Forward` and
//!   `Postrouting`. A rule does not count them, limit their rate, drop, mark or queue them, and a
//!   table with other flow marks does not ask about them. Rules of this table that limit rates
//!   there are refused, unless they are limited to TCP flags or connection states. Of all others
//!   that must see every packet, such as [`count`](crate::Rule::count), the numbers are too low.
//!   What conntrack counts (`nf_conntrack_acct`), and so
//!   [`first_bytes`](crate::divert::Match::first_bytes), stays correct.
//! - Traffic control at the interface that a packet leaves by sees it (`tc`, the hook `egress`),
//!   and so do packet sockets (`tcpdump`) and rules at `ingress` with a priority below 0.
//! - A program that overwrites a connection's mark, or a rule of
//!   [`replace_rules`](crate::Divert::replace_rules) that would drop it, has no effect until the
//!   connection comes back.
//! - The list of interfaces is static. One that is made later is not in it, also if it has the name
//!   of one that is gone (since Linux 6.16 it is).
//! - FIN and RST end the offload before Linux 6.15. Later kernels forward them, and conntrack does
//!   not learn that the connection has ended: its entry stays for 30 s, and then as for a closed
//!   connection.
//! - Leave `nf_flowtable_tcp_timeout` and `nf_flowtable_udp_timeout` below five minutes. The table
//!   remembers the ports of 65 536 connections that it moves past the flowtable. If that list is
//!   full, it drops a SYN on an established connection, and `forget_flow` and `forget_flows` return
//!   an error.
//! - Packets that the kernel cannot forward so meet the hooks as before: fragments, those with IP
//!   options or extension headers or longer than the MTU, ICMP errors, all of a connection with a
//!   helper of conntrack, all of other interfaces.
//!
//! A rule cannot tell the kernel to skip the flowtable. But the flowtable ignores packets whose TTL
//! (hop limit) has run out. So at `ingress`, with the priority −1, the table sets it to 0, for SYNs
//! and for packets with the ports of a denied or forgotten connection, and keeps it in the packet's
//! priority. At `Prerouting`, with the priority −450, it restores it, and sets the priority to 0.
//! Rules between, and macvlan and ipvlan interfaces on a named one, see such packets with TTL 0.
//! Since Linux 7.3 rules may change packets only in network namespaces of the initial user
//! namespace: in others, `install` returns `Unsupported`.
//!
//! Kernels had mistakes in flowtables. Of Linux 6.12, take 6.12.114 or later, which
//!
//! - keeps conntrack's entry until the flow is released (6.12.112; before, freed memory could be
//!   read),
//! - extends the entry's time while the connection is offloaded (6.12.113),
//! - shows a new flow to its garbage collector only when it is complete (6.12.105), and leaks no
//!   routes (6.12.114).
//!
//! # What the verdict of a packet cannot do
//!
//! These are reported by [`refusals`](crate::VerdictSink::refusals), and by
//! [`confirm`](crate::Verdict::confirm), with the packet's id; `submit` succeeds. The verdict then
//! holds for the packet alone.
//!
//! - The packet was not queued by a rule of a table with flow marks: for example another program's
//!   rule sends to the same queue. It cannot be rejected and is dropped instead.
//! - The packet belongs to no connection: connection tracking calls it invalid, or a rule has
//!   excluded it (`notrack`).
//! - The packet's priority (`skb->priority`) is 2²⁴ or more: a traffic control class with a major
//!   number of `0x100` or higher.
//!
//! The last one also concerns a SYN that is accepted without `for_flow`, and gets such a priority
//! or has it: if another SYN on the same addresses and ports is accepted with `for_flow` and
//! answered meanwhile, that accept holds for both.
//!
//! # How it works
//!
//! - A rule that queues puts a code into the highest byte of the packet's *priority*. It shows that
//!   the chain behind the queue exists. A verdict for a connection is another code. The chain at
//!   the same hook, directly behind the queue, carries the verdict out and restores the priority.
//!   Priorities do not decide about routes, and the packet's mark is not used at all.
//! - Tables with other flow marks have other codes, so that none reads another's: except if the
//!   lowest bits of their marks are 14 or 28 positions apart, and neither marks are the default.
//!   Such a table carries out verdicts of the other one's queue if it registers base chains at the
//!   same hook, at the same or an earlier priority, while the packet waits.
//! - [`FlowMarks`](crate::FlowMarks) are three bits of the *connection's* mark, for accepted
//!   connections. All three are compared, so that the mark of another program is a verdict only if
//!   it has exactly the same value.
//! - The first rules of the table look up denied connections, in sets, before anything else.
//! - Rules before the queue's rule still see packets of accepted connections. Rules behind it in
//!   the same chain do not.
//! - A verdict that denies lets the packet meet its chain once more (`NF_REPEAT`), where the first
//!   rules carry it out. [`Stats`](crate::Stats) counts such a packet as dropped.
//! - If another program registers an earlier chain at the same hook while a packet waits, the
//!   packet comes to the hook once more (`nf_reinject` counts hooks). If its verdict accepts, it
//!   comes to the queue again. If its verdict denies, it meets the new chain, and is denied behind
//!   that; if that drops it, the denial is forgotten.
//! - If another program removes an earlier chain at the hook, the kernel drops what is queued. A
//!   verdict that comes between the two (milliseconds) continues behind the next chain: one that
//!   accepts the connection may be forgotten, and one that denies is carried out all the same. (If
//!   it removes several chains in one transaction, such as those of a table with flow marks, while
//!   packets flood in and are denied one by one, a few of ten thousand can be dropped without that
//!   being remembered, or pass.)
//!
//! # Other programs
//!
//! A program that overwrites the whole mark of connections (`ct mark set`) erases accepts: the
//! connections come to the queue again. It does not erase denials while they are remembered. But it
//! also erases that a SYN has ended an accept. If it does that while a packet of the older
//! connection waits in the queue, `accept().for_flow()` for that packet accepts the new connection.
//! Let such a program change its own bits only (`ct mark set ct mark & ... | ...`). One that writes
//! exactly [`accepted`](crate::FlowMarks::accepted) into the flow marks accepts connections; choose
//! marks that no other program uses. A second `Divert` at an earlier priority sees resets of this
//! host for connections that the first has rejected.
//!
//! Where packets get past the hooks of the rules, verdicts do not hold: a socket that another
//! program's `tproxy` gives a denied packet that the rules stop only at `Forward`; another
//! program's flowtable. With `synproxy`, the kernel itself completes the handshake at `Output`, and
//! a rule at `Forward` asks about its SYN-ACK first. A tunnel device that this host has made and
//! given to a container keeps the priority that a process there sets: one with `CAP_NET_ADMIN` can
//! deny the tunnel's own connection by it.
//!
//! # Taking verdicts back
//!
//! [`Divert::forget_flows`](crate::Divert::forget_flows) and
//! [`forget_flow`](crate::Divert::forget_flow). When the table goes, at the latest when the process
//! ends, nothing is left that reads the marks. The next table with the same marks removes them
//! first.
//!
//! When connection tracking has lost a denied connection whose source was translated, `forget_flow`
//! finds what the server sends only by the addresses of the server's packets when they arrive.
//!
//! An accept is found when its connection has an entry that connection tracking shows: from when a
//! packet has passed all hooks. If the first packet of a connection is accepted with `for_flow` and
//! waits at a later hook, in another queue, `forget_flows` misses the accept, and `forget_flow`
//! returns `false`. Call it again after that. A denial is found at once; but a denied connection of
//! which a packet comes while it is being forgotten (some tens of milliseconds) can stay denied,
//! because its entry and the sets renew each other. Forget it again while its sender is silent.
//!
//! # With rules of your own
//!
//! A queue with flow marks also works with other rules, if these use the same codes.
//! `Divert::to_nft` prints complete ones. This table accepts and drops connections at one hook; it
//! does not reject, knows only TCP's new connections, and remembers denied connections by their
//! marks only, so that a denied first packet is not remembered:
//!
//! ```text
//! table inet filter {
//!     chain forward {
//!         type filter hook forward priority 0;
//!         meta priority 0xac5d19e3 ct mark set ct mark & 0xffffefed | 0x1010 drop # its verdict
//!         meta priority & 0xf8000000 == 0xa8000000 meta priority set meta priority & 0x00ffffff
//!         ct mark & 0x1012 == 0x1010 drop                              # denied()
//!         tcp flags & (syn | ack | rst) == syn ct mark & 0x1012 == 0x1012 \
//!             ct mark set ct mark & 0xffffefed
//!         ct mark & 0x1012 == 0x1012 accept                            # accepted()
//!         ct state { new, established } meta priority & 0xff000000 == 0 \
//!             meta priority set meta priority & 0x00ffffff | 0xa8000000
//!         queue num 0
//!     }
//!     chain behind {
//!         type filter hook forward priority 1;
//!         meta priority & 0xf8000000 != 0xa8000000 accept
//!         # Only if another program removes an earlier chain at this hook meanwhile.
//!         meta priority 0xac5d19e3 ct mark set ct mark & 0xffffefed | 0x1010 drop
//!         meta priority & 0xff000000 == 0xaa000000 ct mark & 0x1012 != 0x1010 \
//!             ct mark set ct mark & 0xffffefed | 0x1012
//!         meta priority set meta priority & 0x00ffffff
//!     }
//! }
//! ```
//!
//! | code | where | meaning |
//! |---|---|---|
//! | `0xa8` in the highest byte | on the way to the queue | a packet of a connection |
//! | `0xa9` in the highest byte | on the way to the queue | a packet of no connection, or an ICMP error |
//! | `0xaa` in the highest byte | on the way from the queue | accept the connection |
//! | `0xac5d19e3` | on the way from the queue | drop the connection |
//! | `0xad5d19e3` | on the way from the queue | reject the connection |
//! | `0xae5d19e3` | on the way from the queue | reject the packet |
//!
//! The verdicts that drop or reject are `NF_REPEAT`: the chain must carry them out before it
//! queues. A rule that writes the codes on the way to the queue must have the chain behind the
//! queue.
