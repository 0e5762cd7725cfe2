//! Trouble: "my rule sees nothing", "everything is slow", "the box is unreachable". What to look
//! at, in which order.
//!
//! First, as root in the network namespace of the queue:
//!
//! ```sh
//! nfqtop --once                            # each queue: state, owner, rates, rules, what to do
//! cat /proc/net/netfilter/nfnetlink_queue  # the same from the kernel, if nfqtop is not there
//! ```
//!
//! The columns of the file: queue, owner's port id, packets that wait, copy mode, copy range, found
//! the queue full, found the receive buffer full, last id, and a 1 without meaning. nfqtop's states
//! below are explained by its
//! [README](https://github.com/tokio-nfqueue/tokio-nfqueue/tree/main/crates/nfqtop).
//!
//! Both show one network namespace. `nfqtop --namespace PID` looks into a container; into all:
//!
//! ```sh
//! for p in $(lsns -t net -n -o PID); do nfqtop --once --namespace $p; done
//! ```
//!
//! # Packets disappear: who drops them?
//!
//! | look at | if | they are dropped by |
//! |---|---|---|
//! | nfqtop | `UNBOUND`, `NO MODE` | the kernel: no program takes them |
//! | | `STUCK`, `FULL`, `BUFFER` | the kernel, if the queue or the buffer is full: the program is too slow, or does not decide. [Everything is slow](#everything-is-slow) |
//! | | `ok`, and `IN/S` is what you miss | the program, by its verdicts, which nfqtop cannot see: [`Stats::decided`](crate::Stats::decided), or [`verdicts_total{action="drop"}`](super::metrics) |
//! | | `ok`, and `IN/S` is less | what is before the queue: an earlier rule, or the one for connections that [`for_flow`](super::flows) denied. [My rule sees nothing](#my-rule-sees-nothing) |
//! | | `ok`, all are accepted | what is behind the queue: a later rule, the route, the receiver |
//!
//! # My rule sees nothing
//!
//! | look at | if | then |
//! |---|---|---|
//! | nfqtop | the queue is not there | the program has not bound it, or is in another network namespace: compare `readlink /proc/PID/ns/net` |
//! | nfqtop: `no rule` | | the rule is gone, in another namespace, or names another queue |
//! | nfqtop: `UNBOUND`, `bypassed` | for another number | the rule's number and the program's differ. `Queue::ANY` takes the first free one |
//! | the rule's counter, in nfqtop or [`Divert::counters`](crate::Divert::counters) | 0, while there is traffic | the hook or the conditions are wrong, next rows |
//! | the hook | traffic *through* this host | it passes `Forward`, not `Input` and `Output`: [which hook](super::first_filter#which-hook) |
//! | the addresses and ports | there is address translation | a rule at `Input` or `Forward` sees them translated: [`rewriting`](super::rewriting) |
//! | earlier rules | another table or an earlier rule drops | a packet that was dropped at an earlier priority or hook does not arrive. `meta nftrace set 1` in a rule before it, and `nft monitor trace`, show its way |
//! | | an earlier rule of the same chain accepts | it ends the chain |
//! | `iptables-legacy-save`, `nft list ruleset` | both are used | they are different tables; both see the packet |
//! | a fast path | a flowtable, eBPF (XDP, some container networks), a bridge without `br_netfilter`, `AF_PACKET`, a user-space stack | packets pass no hook of IP there |
//! | connections | decided by `for_flow` | that is the purpose: only their first packets come |
//! | ICMP, loopback | the test is `ping 127.0.0.1` | the rule says UDP, or excludes `lo` |
//!
//! # Everything is slow
//!
//! | look at | if | then |
//! |---|---|---|
//! | nfqtop: `STUCK` | the program has read all | it holds packets: a judge that does not answer ([`slow_judge`](super::slow_judge)), or one that [waits for itself](super::own_traffic) |
//! | | the process is stopped (SIGSTOP, a debugger) | `kill -CONT PID`, or continue it there |
//! | | the program does not read | no task polls the stream: something blocks the runtime |
//! | nfqtop: `FULL` | | verdicts come more slowly than packets, next rows |
//! | the rule | it queues more than it must | narrow it; first packets only, and [`for_flow`](super::flows), which help most |
//! | CPU time, `top -H` | one thread is at 100 % | [`one_queue_a_core`](super::one_queue_a_core), `copy_range`; a build without `--release` |
//! | | none is | the program waits: for the judge, a lock, a limit of `concurrency` |
//! | bursts | losses, at a low mean rate | a longer [`max_len`](crate::QueueBuilder::max_len) |
//! | nfqtop: `BUFFER` | | [`receive_buffer`](crate::QueueBuilder::receive_buffer) was lowered, or its limit `net.core.rmem_max` |
//! | a single slow sender | at `Output` | what waits counts against its [socket buffer](super#packets-that-wait) |
//! | large transfers only | super-packets are off | [`gso`](crate::QueueBuilder::gso) is on by default; with it, one TCP stream had four times the throughput |
//! | every 1, 2, 4 s | TCP | a packet was lost, and sent again: `lost`, `gone`, `refusals` below |
//!
//! What the program can say itself, once in a while or when it is asked:
//!
//! ```
//! use tokio_nfqueue::VerdictSink;
//!
//! /// Which limits were reached and what to raise them to, and what else has cost packets.
//! fn report(queue: &VerdictSink) -> Vec<String> {
//!     let mut lines: Vec<String> = queue.advice().iter().map(ToString::to_string).collect();
//!     let mut refusals = queue.refusals();
//!     while let Some(refusal) = refusals.try_recv() {
//!         lines.push(format!("refused: {refusal:#}"));
//!     }
//!     let held = queue.stats().held;
//!     lines.push(format!("{} undecided, oldest: {:?}", held.in_flight, held.oldest_undecided));
//!     lines
//! }
//!
//! // The test: a queue of two places, and four packets.
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tokio_nfqueue::Error> {
//! use tokio_nfqueue::{Queue, simulated::{self, TestPacket}};
//!
//! let (kernel, mut queue) = simulated::queue(Queue::builder(0).max_len(2))?;
//! let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! let _sent = kernel.send_all((0..4).map(|_| TestPacket::udp(from, to, b"query")));
//! let packet = queue.recv().await.unwrap()?;
//! // Something else makes the kernel drop what is queued.
//! kernel.unregister_hook();
//! assert!(packet.accept().confirm().await.is_err());
//!
//! let lines = report(&queue.sink());
//! assert!(lines[0].starts_with("2 packets found the queue full: raise max_len from 2 to 4"));
//! assert!(lines.iter().any(|line| line.contains("while they were queued")), "{lines:?}");
//! # Ok(())
//! # }
//! ```
//!
//! # The box is unreachable
//!
//! From a console, in this order; each step alone may do:
//!
//! 1. `nfqtop --once`. `UNBOUND`: a rule without `bypass` leads to a queue that no program has, and
//!    drops. `STUCK`, `FULL`: the program is there and does not decide.
//! 2. Stop the program: `systemctl stop NAME`, or kill it. The rules of this crate end with it, and
//!    packets pass.
//! 3. If they do not: rules stay that [fail closed](crate::divert::DivertBuilder::fail_closed), or
//!    that were made by hand. `nft delete table inet NAME`; `iptables -D ...`. nfqtop names the
//!    tables of all rules that queue.
//! 4. If only IPv6 is gone: the policy drops neighbour discovery (ICMPv6 types 133 to 137). IPv4
//!    works, because ARP passes no such hook. [Exclude it](super#rules).
//! 5. If only new connections fail: replies of the kernel (resets, ICMP) or the answers of the
//!    program's own queries are in the queue: [`own_traffic`](super::own_traffic).
//!
//! Before the next attempt, give it an end:
//!
//! ```sh
//! systemd-run --on-active=5min systemctl stop my-filter
//! ```
//!
//! And leave out what you work through: a rule with `.unless(Match::destination_port(22))` at
//! `Input`, and `.unless(Match::source_port(22))` at `Output`.
