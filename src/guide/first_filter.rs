//! A first filter: which hook, the rule, the loop, the stop, how to look at it, how to test it.
//!
//! # Which hook
//!
//! A packet passes hooks of the kernel on its way. A rule at a hook sends it to the queue.
//!
//! | to filter | hook | what it sees |
//! |---|---|---|
//! | what this host sends | [`Hook::Output`](crate::Hook::Output) | also its replies, and traffic to itself (`lo`) |
//! | what is for this host | [`Hook::Input`](crate::Hook::Input) | behind destination translation |
//! | what this host forwards (router, containers, VMs) | [`Hook::Forward`](crate::Hook::Forward) | both directions |
//! | all that arrives, before routing and translation | [`Hook::Prerouting`](crate::Hook::Prerouting) | |
//! | all that leaves, behind routing | [`Hook::Postrouting`](crate::Hook::Postrouting) | cannot be rejected there |
//!
//! # The rule and the loop
//!
//! ```no_run
//! use tokio_nfqueue::{Divert, Error, Hook, Packet, Protocol, Queue, Rule};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Error> {
//!     let dns = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53);
//!     let rules = Divert::builder().table("first_filter").rule(dns);
//!     let queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
//!     println!("queue {}", queue.queue_number());
//!     queue
//!         .serve(async |packet: Packet| {
//!             println!("{} bytes", packet.payload().len());
//!             packet.accept()
//!         })
//!         .with_graceful_shutdown(async { drop(tokio::signal::ctrl_c().await) })
//!         .await
//! }
//! ```
//!
//! - [`Rule`](crate::Rule) says which packets. One without a target sends them to the queue that it
//!   is given to. Make it as narrow as you can: a rule that matches everything also queues the
//!   traffic of this program, so that a handler that resolves a name waits for itself.
//! - [`Queue::ANY`](crate::Queue::ANY) is the first free number. Name a number if something else
//!   must know it.
//! - [`divert`](crate::QueueBuilder::divert) installs the rule when the queue is bound.
//! - [`serve`](crate::Queue::serve) asks your function about each packet; there is an example of
//!   one with state. Each packet needs a verdict: without one it waits, and takes one of the
//!   queue's [1024 places](crate::QueueBuilder::max_len). If your function fails or panics, the
//!   packet is dropped, unless [`on_unanswered`](crate::QueueBuilder::on_unanswered) says
//!   otherwise.
//! - The program needs `CAP_NET_ADMIN`: run it as root, or see [`service`](super::service).
//!
//! # The stop
//!
//! [`with_graceful_shutdown`](crate::Serve::with_graceful_shutdown), or
//! [`close`](crate::Queue::close), removes the rule, waits for the verdicts that are owed, and then
//! unbinds the queue. If the program ends in another way, the kernel does all that at once, and
//! what was queued is dropped. From then on packets pass; a firewall whose packets must not pass
//! says [`fail_closed`](crate::divert::DivertBuilder::fail_closed).
//!
//! # Looking at it
//!
//! While it runs:
//!
//! ```sh
//! nft list chain inet first_filter output
//! cat /proc/net/netfilter/nfnetlink_queue
//! dig @9.9.9.9 example.org
//! ```
//!
//! The first command shows the rule with its counter: if this stays 0, the rule does not match.
//! (The whole table has about a thousand lines, because it can carry out verdicts for connections.)
//! The second shows the queue: number, owner, packets that wait, and, in the sixth and seventh
//! column, packets that found the queue or the receive buffer full. [`stats`](crate::Queue::stats)
//! and [`advice`](crate::VerdictSink::advice) say the same, and more.
//!
//! On kernels without the `queue` expression of nf_tables the rule uses the target `NFQUEUE` of
//! xtables. `nft` then prints `# Warning: table ... is managed by iptables-nft`, and, where
//! iptables is not installed, `unhandled NFPROTO` and `XT target NFQUEUE not found`. That concerns
//! the printing only.
//!
//! # Rules of your own
//!
//! The rule may also be yours, made with nft or iptables, and then the program binds a number that
//! both know: `Queue::builder(0).bind().await?`.
//!
//! ```sh
//! nft add table inet filter
//! nft add chain inet filter output '{ type filter hook output priority 0; }'
//! nft add rule inet filter output udp dport 53 queue num 0 bypass
//! ```
//!
//! - `type filter hook output`: a chain at the hook `Output`.
//! - `queue num 0`: what the rule matches goes to queue 0.
//! - `bypass`: while no program has bound queue 0, packets pass; without it they are dropped. So
//!   bind first, and then add the rule.
//!
//! If nft says "No such file or directory" at `queue`, the kernel lacks `NFT_QUEUE`: use
//! `iptables -I OUTPUT -p udp --dport 53 -j NFQUEUE --queue-num 0 --queue-bypass`, or the rules of
//! this crate, which do without it.
//!
//! # Testing it
//!
//! A policy is a function from a packet to a verdict. With the feature `test-util` a kernel in
//! memory sends it packets, without privileges: see [`testing`](super::testing).
