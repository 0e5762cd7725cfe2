//! What grows with what: packets, cores, queues, connections, rules, elements, held packets; and
//! from where on a queue is the wrong tool.
//!
//! The figures are of one host: AMD EPYC, 2 cores, Linux 6.18, sender and receiver on the same
//! cores; those of the tests were measured without optimisation, beside other work. On another, an
//! Intel Xeon, a packet costs a fifth less: 2.0 instead of 2.5 µs, and 533 000 instead of 475 000
//! packets a second pass (`benches/RESULTS.md` of the repository). Measure on yours: the last
//! section says how.
//!
//! # Packets that come to a queue
//!
//! | measured | figure | source |
//! |---|---|---|
//! | CPU time of a packet, all accepted, a queue that is full | 2.5 µs, of which 2.3 µs are the kernel's | R: CPU time per packet |
//! | the same at 100 000 packets a second; 20 000; 1000 | 6 µs; 14 µs; 57 µs | R: one-way latency |
//! | one queue, one core for it, flooded | 475 000 packets a second | R: throughput under a flood |
//! | four queues on the two cores, one of which the sender uses | 448 000 packets a second | R, as above |
//! | any order, eight tasks | 382 000 packets a second | R, as above |
//! | one TCP stream with super-packets; without a queue | 17.6; 20.8 Gbit/s | R: TCP goodput |
//! | the logic of a queue alone | 27 ns a packet, 10^10 packets in 274 s, 3.1 MB resident from begin to end | `ten_billion_ids_leave_nothing_behind` |
//!
//! R is `benches/amd-epyc/RESULTS.md` of the repository; the others are tests there.
//!
//! ```text
//! cores = packets a second × (2.5 µs + your decision)
//! ```
//!
//! The formula is for cores that are busy. When they are not, a packet takes more CPU time, because
//! it is received and decided alone, and there is enough of it. With more cores than these two it
//! is not measured: the packets of different numbers share no lock of this crate but the timer's,
//! so it holds as long as the [hash spreads them](super::one_queue_a_core) and the kernel's own
//! locks do not meet. A super-packet of up to 64 KiB counts as one: see
//! [`gso`](crate::QueueBuilder::gso).
//!
//! # Queues
//!
//! | measured | figure | source |
//! |---|---|---|
//! | to bind 1000 numbers as one queue | 0.11 s | `a_thousand_queues_with_traffic_at_once_lose_no_packet` |
//! | of the process, for each number | 27 KB before the first packet, 53 KB after a thousand packets; 2 descriptors | as above |
//! | a million packets over 1000 numbers, a task for each | none lost | as above |
//!
//! ```text
//! descriptors = 2 × numbers + 3          (RLIMIT_NOFILE)
//! memory      = numbers × (53 KB + packets held × a packet's memory)
//! ```
//!
//! There are 65 536 numbers. More than cores are no gain in speed; they separate kinds of traffic.
//!
//! # Packets that are held
//!
//! | measured | figure | source |
//! |---|---|---|
//! | 65 536 packets of 32 bytes, held at once | 265 bytes resident for each, of which 101 are its buffer | `a_full_queue_is_held_and_decided_in_random_order` |
//! | decided in random order, 64 in a send | 4.9 µs for each, half of them accepted | as above |
//! | packets of 1400 bytes | 1.25 bytes resident for each of their bytes | R: memory |
//! | the same, [detached](crate::Packet::detach) | 0.05 | R: memory |
//! | a verdict in the ledger, 1000 held; 60 000 held | 13; 15 ns, in random order | R: cost of a verdict in the ledger |
//! | one packet held while 2.16 × 10^9 others are decided | memory stays, and it gets its own verdict | `a_packet_held_for_more_than_half_of_all_ids_is_decided_by_its_own_verdict` |
//!
//! ```text
//! memory = held × (164 bytes + the packet's share of a buffer), at most max_len × a whole buffer
//! ```
//!
//! [Memory and descriptors](super#memory-and-descriptors) has the sizes of the buffers, and what
//! the kernel keeps besides. Kernels that find packets by a hash (6.12.117, 6.18, 7.2; not 6.1)
//! hold 65 536 packets in a queue at most, whatever [`max_len`](crate::QueueBuilder::max_len) says;
//! then they drop, or [accept](crate::QueueBuilder::fail_open). While one packet is held, verdicts
//! for later ones are sent one by one and not as a batch: a packet costs about 0.3 µs more (R: one
//! batch and packed singles, 2.2 and 2.5 µs).
//!
//! ```text
//! held = packets a second × seconds that a decision takes
//! ```
//!
//! So at 100 000 packets a second a decision may take 0.6 s on average, or 0.01 s with the default
//! `max_len` of 1024.
//!
//! # Connections
//!
//! | measured | figure | source |
//! |---|---|---|
//! | connections decided by their first packet | 242 000 a second | R: many decided flows |
//! | memory of the process for a million of them | 0.1 to 0.8 MB more than for 10 000, so none for each | `the_memory_of_the_process_does_not_grow_with_the_connections` |
//! | to forget 236 000 of them, in a thread of its own; a million | 0.6 s; 12 to 18 s | R: many decided flows; the test |
//! | UDP datagrams in super-packets of 64: no queue; connection tracking alone; first packet decides; every packet queued | 24.6; 20.8; 17.3; 21.9 million a second | R: decided flows |
//! | CPU time of the program for a short TCP connection: first packet decides; every packet queued | 31; 60 µs | R: decided flows |
//!
//! ```text
//! cores = new connections a second × packets until the verdict × (2.5 µs + your decision)
//! ```
//!
//! Every packet of a decided connection still costs connection tracking and the rules of `Divert`:
//! for a super-packet as much as the queue would. What it saves is the program's time, and the
//! waiting.
//!
//! The kernel remembers the verdict in the connection's entry, and the process nothing. What limits
//! the number is the table of connection tracking: `net.netfilter.nf_conntrack_max` of the initial
//! network namespace, for all namespaces (262 144 on this host), and
//! `nf_conntrack_buckets`. When it is full, the kernel drops packets of new connections. Denials
//! are in sets of 65 535 connections unless
//! [`denied_flows`](crate::divert::DivertBuilder::denied_flows) says otherwise.
//!
//! # Rules and sets
//!
//! | measured | figure | source |
//! |---|---|---|
//! | 10 000 rules: installed; replaced; their counters read | 1.7; 0.6; 0.1 s | `ten_thousand_rules_send_each_packet_to_its_queue` |
//! | a packet that is compared with 10 000 rules, and with none | 0.35 to 0.47 ms; 5 µs | as above |
//! | 100 000 elements of a set: inserted; listed; removed | 0.33; 0.23; 0.34 s | `a_hundred_thousand_elements_of_a_set_are_matched` |
//!
//! ```text
//! CPU time of every packet at the hook = rules before its own × 35 to 47 ns
//! ```
//!
//! A packet is compared with rule after rule, and finds its element of a set by a hash. So many
//! addresses or ports belong in one [set](crate::divert::NamedSet) and one rule, and the rule for
//! most packets first.
//!
//! # Ten million packets a second
//!
//! By the formula above 25 cores would do nothing but queue them. What to do instead, by the share
//! of packets that need a program's decision:
//!
//! | packets a second on the host | what comes to the queue | what does the rest |
//! |---|---|---|
//! | up to 200 000 | every packet, if you like; one number | |
//! | up to a million | every packet, with [a number for each core](super::one_queue_a_core): 2 or 3 cores; or the first packets of each connection | rules |
//! | up to some millions | the first packets of each connection, with [`for_flow`](super::flows) | connection tracking and the rules of `Divert`; each packet still passes the hooks |
//! | ten millions, forwarded | the same | a flowtable, [`DivertBuilder::offload`](crate::divert::DivertBuilder::offload): accepted connections pass no hook |
//! | floods of what is to be dropped | nothing of it | XDP, or the network card: a packet that nf_tables drops has already cost what receiving it costs |
//!
//! From the third row on the queue is not what limits: 100 000 new connections a second, each
//! decided by its first packet, are a quarter of a core for the queue. The entries of connection
//! tracking are: each costs the kernel memory and time, whether or not a queue exists. Where that
//! is too much, the decision itself belongs in XDP or in the card, and this crate beside it: it
//! decides what the program there sends on, and the program there drops what this crate has denied.
//! Neither is part of this crate. The last three rows are not measured here: two cores do not send
//! so much.
//!
//! # Measure
//!
//! - `cargo bench --workspace` in the repository writes `benches/RESULTS.md`.
//! - `cargo test --test kernel scale:: -- --nocapture` prints the figures of the tests, in seconds;
//!   `TOKIO_NFQUEUE_SCALE=50` makes a million connections and packets of 20 000.
//! - In production: `verdict_wait_seconds` of the [`metrics`](super::metrics),
//!   [`advice`](crate::VerdictSink::advice), nfqtop.
