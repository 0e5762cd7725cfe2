//! Restarting a service: which packets it costs, and how it costs none.
//!
//! While no process has a queue bound, the kernel drops the packets that a rule sends to it, or
//! accepts them if the rule says `bypass`. When the socket of a queue is closed, the kernel drops
//! what is queued. And when an nf_tables table with base chains is removed, which happens when the
//! process with a [`Divert`](crate::Divert) ends, the kernel drops what is queued in all queues of
//! the network namespace. So there are three kinds of restarts:
//!
//! | restart | old packets | packets in between |
//! |---|---|---|
//! | kill the old process, start the new one | dropped | dropped, or accepted with `bypass` |
//! | [`close`](crate::VerdictSink::close), and [`bind_when_free`](crate::QueueBuilder::bind_when_free) in the new process | decided | dropped, or accepted unseen with `bypass` and [`on_unanswered(Accept)`](crate::QueueBuilder::on_unanswered) |
//! | [`hand_over`](crate::VerdictSink::hand_over), and [`take_over`](crate::QueueBuilder::take_over) in the new process | decided | wait, and are decided by the new process |
//!
//! # The plain way
//!
//! The new process is started before the old one has ended, and waits:
//!
//! ```no_run
//! # use tokio_nfqueue::{Action, Queue};
//! # async fn example() -> Result<(), tokio_nfqueue::Error> {
//! let queue = Queue::builder(0).on_unanswered(Action::Accept).bind_when_free().await?;
//! # let _ = queue;
//! # Ok(())
//! # }
//! ```
//!
//! While there are no rules, packets pass unseen. Rules that [fail
//! closed](crate::divert::DivertBuilder::fail_closed) stay when the old process is killed, and the
//! new one replaces them; rules that were made with `nft` stay as well. If the rules of a queue
//! have a table name of their own, `bind_when_free` installs them as soon as the old table is
//! removed. The removal of a table drops queued packets.
//!
//! # The hand-over
//!
//! The old process passes the socket on, with all that is unread in it. It stops reading, and waits
//! for the verdicts that its tasks owe:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use tokio::net::UnixListener;
//! # use tokio_nfqueue::{Divert, Error, Queue, VerdictSink};
//! # type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
//! # async fn example(verdicts: VerdictSink, divert: Divert) -> Result<()> {
//! let listener = UnixListener::bind("/run/filter/handover")?;
//! # let within = Duration::from_secs(5);
//! loop {
//!     // In the main loop, beside the packets:
//!     let (stream, _) = listener.accept().await?;
//!     let handover = verdicts.hand_over(within).await?.with_divert(&divert).await?;
//!     match handover.send(stream, within).await {
//!         // The queue belongs to the new process. This one ends.
//!         Ok(()) => break,
//!         // The queue continues here.
//!         Err(error) => eprintln!("{error:#}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A queue with [rules of its own](crate::QueueBuilder::divert) takes them along: leave
//! `with_divert` and `take_divert` out, and give the successor's builder the same rules. The start
//! of a program that is the first or a successor:
//!
//! ```no_run
//! # use tokio::net::{UnixListener, UnixStream};
//! # use tokio_nfqueue::{Divert, Queue, QueueBuilder, Rule, handover::Takeover};
//! # fn rule() -> Rule { Rule::new(tokio_nfqueue::Hook::Input) }
//! const PATH: &str = "/run/filter/handover";
//!
//! fn settings() -> QueueBuilder {
//!     Queue::builder(0).divert(Divert::builder().table("my_filter").rule(rule()))
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let queue = match UnixStream::connect(PATH).await {
//!     Ok(stream) => {
//!         let mut takeover = Takeover::receive(stream).await?;
//!         let queue = settings().take_over(&mut takeover)?;
//!         takeover.accept().await?;
//!         queue
//!     }
//!     Err(_) => settings().bind_when_free().await?,
//! };
//! // For the next one.
//! let _ = std::fs::remove_file(PATH);
//! let listener = UnixListener::bind(PATH)?;
//! # let _ = (queue, listener);
//! # Ok(())
//! # }
//! ```
//!
//! With a `Divert` that does not belong to the queue, the new process connects, prepares
//! everything, and then accepts:
//!
//! ```no_run
//! # use tokio::net::UnixStream;
//! # use tokio_nfqueue::{Error, Queue, Rule, handover::Takeover};
//! # fn rules() -> Vec<Rule> { Vec::new() }
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = UnixStream::connect("/run/filter/handover").await?;
//! let mut takeover = Takeover::receive(stream).await?;
//! let queue = Queue::builder(0).take_over(&mut takeover)?;
//! let divert = takeover.take_divert()?.ok_or("the old process has no table")?;
//! takeover.accept().await?;
//! // The rules of the old version stay until here.
//! divert.replace_rules(rules()).await?;
//! # let _ = queue;
//! # Ok(())
//! # }
//! ```
//!
//! What can go wrong, and what happens:
//!
//! | event | result |
//! |---|---|
//! | a task still holds packets when the time of `hand_over` is over | they get the default action; [`Handover::unanswered`](crate::handover::Handover::unanswered) counts them |
//! | the new process fails, ends or is killed before it accepts | `send` returns an error, and the old process keeps the queue |
//! | it does not accept in time | the same; its `accept` returns `TimedOut`, also if it comes later |
//! | it uses another version of this crate with another format | its `receive` returns `Incompatible`, and the old process keeps the queue |
//! | the old process is killed before the new one accepts | the new process gets the queue, and `accept` returns `Ok` |
//! | the old process is killed before it has sent anything | `receive` returns `Disconnected`; use `bind_when_free` |
//! | the new process is killed after it has accepted | as whenever a process is killed: the queue ends with it |
//!
//! What to provide for:
//!
//! - Packets wait in the kernel from `hand_over` until `accept`. At 60 000 packets a second, 10 ms
//!   are 600 packets: choose [`max_len`](crate::QueueBuilder::max_len) accordingly, and leave the
//!   [receive buffer](crate::QueueBuilder::receive_buffer) at its default. Prepare the new process
//!   before it connects, so that this time is short.
//! - The old process's copy of the socket is closed when its last handle of the queue is dropped:
//!   stream, sinks and packets. As long as there is a copy, the queue stays bound even if the new
//!   process ends. Likewise, the rules stay until both processes have dropped their `Divert`, or
//!   until the new one calls [`Divert::close`](crate::Divert::close). So let the old process end.
//! - Every process that can connect to the Unix socket can take the packets. Protect it by the
//!   permissions of its folder, or by [`peer_cred`](tokio::net::UnixStream::peer_cred).
//! - The new process needs `CAP_NET_ADMIN` in the user namespace that owns the network namespace,
//!   as the old one does. It may be in another network namespace: the queue stays in its own.
//! - The kernel settings of the queue stay as they are. Change them with
//!   [`reconfigure`](crate::VerdictSink::reconfigure) after `accept`.
//! - A deadline begins anew for the packets that the old process had read and not handed out.
//!
//! `examples/restart` is a service that can be restarted like this.
//!
//! # With the descriptor store of systemd
//!
//! A service manager can keep the descriptors while no process runs: `FileDescriptorStoreMax=8` in
//! the unit, and `systemctl restart`. The packets wait in the kernel meanwhile, up to `max_len`.
//!
//! ```no_run
//! # use std::{os::fd::OwnedFd, time::Duration};
//! # use tokio_nfqueue::{Divert, Error, Queue, VerdictSink, handover::Takeover};
//! # fn store(name: &str, descriptors: Vec<OwnedFd>) {}
//! # fn stored(name: &str) -> Vec<OwnedFd> { Vec::new() }
//! # async fn example(verdicts: VerdictSink, divert: Divert) -> Result<(), Error> {
//! // At SIGTERM. `store` sends `FDSTORE=1` and `FDNAME=nfqueue` with the descriptors to the socket
//! // of `NOTIFY_SOCKET`, for example with the crate `sd-notify`.
//! let handover = verdicts.hand_over(Duration::from_secs(5)).await?.with_divert(&divert).await?;
//! store("nfqueue", handover.descriptors()?);
//! handover.release();
//!
//! // At the start. `stored` takes the descriptors whose name in `LISTEN_FDNAMES` is `nfqueue`.
//! // Their order does not matter.
//! let mut takeover = Takeover::from_descriptors(stored("nfqueue"))?;
//! let queue = Queue::builder(0).take_over(&mut takeover)?;
//! let divert = takeover.take_divert()?;
//! takeover.accept().await?;
//! # let _ = (queue, divert);
//! # Ok(())
//! # }
//! ```
//!
//! After the start, remove the descriptors from the store (`FDSTOREREMOVE=1`): otherwise it keeps
//! the queue bound when the service has ended. If the service is killed instead of stopped, it has
//! stored nothing, and the queue ends with it.
