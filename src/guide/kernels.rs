//! What differs between the kernels that people run.
//!
//! The kernel tests run on Linux 6.18, and on Debian's kernels 6.1, 6.12, 7.2 and 7.3 in virtual
//! machines (`.ci/kernels`). The table says what a program notices. Where a kernel lacks something
//! that was asked for, the error names it.
//!
//! | since | what |
//! |---|---|
//! | 3.8 | binding to a protocol family (`PF_BIND`) has no meaning any more; it is not sent |
//! | 3.10 | super-packets ([`gso`](crate::QueueBuilder::gso)); the least that the crate needs |
//! | 3.14 | [`uid_gid`](crate::QueueBuilder::uid_gid) |
//! | 4.3 | [`security_context`](crate::QueueBuilder::security_context) |
//! | 5.12 | tables with an owner: feature `divert` |
//! | 5.18 | verdicts for connections ([`for_flow`](crate::Verdict::for_flow)) and [`reject`](crate::Packet::reject), which use the priority; before, `refusals` reports each. [`Packet::priority`](crate::Packet::priority) and [`Verdict::priority`](crate::Verdict::priority); ignored before |
//! | 6.9 | [`fail_closed`](crate::divert::DivertBuilder::fail_closed) keeps a table with an owner; before, the table has none, and other programs can change it |
//! | 6.1.107, 6.10.7 | packets that share an unconfirmed entry of connection tracking are dropped: see [`guide`](crate::guide#connection-tracking). With [`gso(false)`](crate::QueueBuilder::gso), these are all segments of new UDP connections |
//! | 6.1.167, 6.6.130, 6.12.78, 6.18.20 | all queued packets are dropped when another program removes a conntrack template: a rule with `-j CT`, an nf_tables rule that sets a zone, a helper object or a time-out object. Other rules have no effect |
//! | 6.1.167, 6.12.78, 6.18.19 | a verdict with an incomplete VLAN tag no longer leaks its packet. This crate always sends protocol and control field |
//! | 6.11 | UDP super-packets leave with correct checksums after their payload was replaced, also through an interface without checksum offload |
//! | 6.12 | [`Packet::cgroup_class_id`](crate::Packet::cgroup_class_id) (6.1 lacks it) |
//! | 6.12.75, 6.18.14, 6.19.4 | verdicts in any order cost the same, by a hash table of queued packets. Before, a verdict from the end of a long queue walks a list: 51 times the time at 30 000 packets on 6.1 |
//! | 6.12.75, 6.18.14, 6.19.4 | segments of new UDP connections are queued again, and must be accepted in order: see [`gso`](crate::QueueBuilder::gso). Linux 6.1 and 6.6 still drop them |
//! | 6.12.83, 6.18.24, 6.19.14 | each queue has a hash table of its own, and at most 65 536 packets wait in it. Before, all queues shared one, and verdicts in several threads could access freed memory (CVE-2026-43084) |
//! | 7.1 | no replaced payload in a network namespace that another user namespace than the initial one owns: `Unsupported` |
//! | 7.2 | no replaced payload in the bridge family: `Unsupported`. A replacement whose IP header length, options, fragment bits or extension headers differ from the packet's is dropped |
//! | 7.3 | [`offload`](crate::divert::DivertBuilder::offload) in a network namespace that another user namespace than the initial one owns: `Unsupported` |
//! | 7.3 | a replacement without a transport header, or with another protocol than that of a tracked connection, is dropped |
//!
//! Not by version, but by configuration:
//!
//! | option | without it |
//! |---|---|
//! | `NETFILTER_NETLINK_QUEUE` | `bind` returns `Unsupported` |
//! | `NFT_QUEUE` | `Divert` uses the target of iptables (`NFT_COMPAT`, `NETFILTER_XT_TARGET_NFQUEUE`); no queue in the bridge family |
//! | `NETFILTER_NETLINK_GLUE_CT` | [`conntrack`](crate::QueueBuilder::conntrack) returns `Unsupported`; flow marks work without it |
//! | `NF_CT_NETLINK` | flow marks of a `Divert` return `Unsupported` |
//! | `NF_FLOW_TABLE_INET`, `NFT_FLOW_OFFLOAD` | [`offload`](crate::divert::DivertBuilder::offload) returns `Unsupported` |
//! | `NFT_REJECT` of the family | rules that reject return `Unsupported` |
//! | `NFT_TPROXY` | reassembly before rules that compare ports needs connection tracking |
//!
//! Seen on Linux 6.1 only: if a packet is still queued when the last base chain of its hook goes,
//! the kernel logs a warning (`nf_reinject`) and drops the packet. Remove the table last, as the
//! documentation of `Divert` says.
