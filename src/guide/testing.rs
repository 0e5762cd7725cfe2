//! Testing a policy: without privileges, without a kernel, and without waiting.
//!
//! A policy is a program that decides packets. Three kinds of tests are possible, from the cheapest
//! on:
//!
//! | what is tested | how |
//! |---|---|
//! | one decision: `fn decide(Packet) -> Verdict` | [`Verdict::action`](crate::Verdict::action), [`Verdict::changes`](crate::Verdict::changes) of what it returns |
//! | the whole program: tasks, deadlines, what happens when it is overloaded, when it loses its privilege, when it ends | its queue in a [simulated kernel](crate::simulated) |
//! | rules, routes and connections together with the program | the real kernel, in a network namespace |
//!
//! The first two need feature `test-util`. Enable it for tests only:
//!
//! ```toml
//! [dev-dependencies]
//! tokio-nfqueue = { version = "0.1", features = ["test-util"] }
//! ```
//!
//! A program can be tested as a whole if it takes its queue from outside, as `serve` here does. The
//! policy: DNS queries are looked up, and everything else is accepted. If the lookup takes longer
//! than a second, the packet is dropped.
//!
//! ```
//! use std::time::Duration;
//!
//! use tokio_nfqueue::{Action, Error, Packet, Queue, QueueBuilder, Verdict};
//!
//! fn settings() -> QueueBuilder {
//!     Queue::builder(0).deadline(Duration::from_secs(1), Action::Drop)
//! }
//!
//! async fn serve(
//!     mut queue: Queue,
//!     names: tokio::sync::mpsc::Sender<Vec<u8>>,
//! ) -> Result<(), Error> {
//!     while let Some(packet) = queue.recv().await {
//!         let packet = packet?;
//!         match query(&packet) {
//!             // The packet waits until the lookup has a result. In this example it has none.
//!             Some(query) => {
//!                 let _ = names.send(query).await;
//!                 tokio::spawn(async move {
//!                     std::future::pending::<()>().await;
//!                     packet.accept().submit()
//!                 });
//!             }
//!             None => decide(packet).submit()?,
//!         }
//!     }
//!     Ok(())
//! }
//!
//! /// The question of a UDP datagram to port 53.
//! fn query(packet: &Packet) -> Option<Vec<u8>> {
//!     let payload = packet.payload();
//!     let is_dns = payload.get(9) == Some(&17) && payload.get(22..24) == Some(&[0, 53]);
//!     is_dns.then(|| payload.get(28..).unwrap_or_default().to_vec())
//! }
//!
//! fn decide(packet: Packet) -> Verdict {
//!     packet.accept().mark(1)
//! }
//!
//! // The tests. Each is a `#[tokio::test]` in a real program.
//! use tokio_nfqueue::simulated::{self, Cause, TestPacket};
//!
//! fn datagram(port: u16, payload: &[u8]) -> TestPacket {
//!     let (client, server) = ([10, 0, 0, 1], [10, 0, 0, 2]);
//!     TestPacket::udp((client, 4000).into(), (server, port).into(), payload)
//! }
//!
//! async fn other_traffic_is_marked_and_accepted() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings())?;
//!     let (names, _lookups) = tokio::sync::mpsc::channel(8);
//!     tokio::spawn(serve(queue, names));
//!     let outcome = kernel.send(datagram(80, b"hello")).outcome().await;
//!     assert!(outcome.accepted);
//!     assert_eq!(outcome.mark, 1);
//!     Ok(())
//! }
//!
//! async fn a_lookup_that_takes_too_long_drops_the_query() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings())?;
//!     let (names, mut lookups) = tokio::sync::mpsc::channel(8);
//!     tokio::spawn(serve(queue, names));
//!     let sent = kernel.send(datagram(53, b"example.org"));
//!     assert_eq!(lookups.recv().await.unwrap(), b"example.org");
//!     assert!(sent.is_waiting());
//!     // The clock moves; the test does not wait.
//!     kernel.advance(Duration::from_secs(2));
//!     let outcome = sent.outcome().await;
//!     assert!(!outcome.accepted);
//!     assert_eq!(outcome.cause, Cause::Verdict);
//!     Ok(())
//! }
//!
//! async fn a_full_queue_drops_what_it_cannot_hold() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings().max_len(2))?;
//!     // No task polls the stream.
//!     let sent = kernel.send_all((0..3).map(|_| datagram(53, b"example.org")));
//!     assert_eq!(sent[2].outcome().await.cause, Cause::QueueFull);
//!     assert_eq!(kernel.stats(0).unwrap().queued, 2);
//!     // Closing decides the rest.
//!     queue.close().await?;
//!     assert_eq!(sent[0].outcome().await.action, Some(Action::Drop));
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Error> {
//! #     other_traffic_is_marked_and_accepted().await?;
//! #     a_lookup_that_takes_too_long_drops_the_query().await?;
//! #     a_full_queue_drops_what_it_cannot_hold().await
//! # }
//! ```
//!
//! # Verdicts for connections
//!
//! If the queue is bound with [`flow_marks`], the simulated kernel does what a `Divert` with flow
//! marks does: see [`simulated`](crate::simulated#verdicts-for-connections). A policy that decides
//! TCP connections by their first packet:
//!
//! ```
//! use tokio_nfqueue::{Error, FlowMarks, Packet, Queue, QueueBuilder, Verdict};
//!
//! fn settings() -> QueueBuilder {
//!     Queue::builder(0).flow_marks(FlowMarks::default())
//! }
//!
//! async fn serve(mut queue: Queue) -> Result<(), Error> {
//!     while let Some(packet) = queue.recv().await {
//!         decide(packet?).submit()?;
//!     }
//!     Ok(())
//! }
//!
//! fn decide(packet: Packet) -> Verdict {
//!     match packet.payload().get(22..24) {
//!         Some([0, 80]) => packet.accept().for_flow(),
//!         Some([0, 23]) => packet.drop().for_flow(),
//!         _ => packet.reject(),
//!     }
//! }
//!
//! // The tests.
//! use std::net::SocketAddr;
//!
//! use tokio_nfqueue::simulated::{self, Cause, TestPacket};
//!
//! fn connection(port: u16) -> [SocketAddr; 2] {
//!     [([10, 0, 0, 1], 4000).into(), ([10, 0, 0, 2], port).into()]
//! }
//!
//! async fn later_packets_of_an_accepted_connection_are_not_queued() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings())?;
//!     tokio::spawn(serve(queue));
//!     let [client, server] = connection(80);
//!     assert!(kernel.send(TestPacket::tcp_syn(client, server)).outcome().await.accepted);
//!     let answer = TestPacket::tcp_syn_ack(server, client);
//!     let request = TestPacket::tcp(client, server, b"request");
//!     for packet in [answer, request] {
//!         let outcome = kernel.send(packet).outcome().await;
//!         assert!(outcome.accepted);
//!         assert_eq!((outcome.cause, outcome.queue), (Cause::FlowVerdict, None));
//!     }
//!     // Another connection on the same ports is asked about.
//!     let outcome = kernel.send(TestPacket::tcp_syn(client, server)).outcome().await;
//!     assert_eq!(outcome.cause, Cause::Verdict);
//!     Ok(())
//! }
//!
//! async fn a_denied_connection_stays_denied() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings())?;
//!     tokio::spawn(serve(queue));
//!     let [client, server] = connection(23);
//!     let first = kernel.send(TestPacket::tcp_syn(client, server)).outcome().await;
//!     assert!(!first.accepted && !first.rejected);
//!     assert_eq!(first.cause, Cause::Verdict);
//!     let later = kernel.send(TestPacket::tcp(client, server, b"login")).outcome().await;
//!     assert!(!later.accepted);
//!     assert_eq!(later.cause, Cause::FlowVerdict);
//!     Ok(())
//! }
//!
//! async fn others_get_a_reset() -> Result<(), Error> {
//!     let (kernel, queue) = simulated::queue(settings())?;
//!     tokio::spawn(serve(queue));
//!     let [client, server] = connection(25);
//!     let outcome = kernel.send(TestPacket::tcp_syn(client, server)).outcome().await;
//!     assert!(outcome.rejected && !outcome.accepted);
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Error> {
//! #     later_packets_of_an_accepted_connection_are_not_queued().await?;
//! #     a_denied_connection_stays_denied().await?;
//! #     others_get_a_reset().await
//! # }
//! ```
//!
//! Address translation and several hooks are not simulated. Test rules, and policies that depend on
//! them, on the real kernel.
//!
//! # Tokio's paused clock
//!
//! A policy that sleeps is tested without sleeping: `#[tokio::test(start_paused = true)]` (feature
//! `test-util` of Tokio). When the runtime is idle, the clock jumps to its next timer. A policy
//! that delays each packet by an hour:
//!
//! ```
//! use std::time::Duration;
//!
//! use tokio_nfqueue::{Error, Packet, Queue};
//!
//! const HOUR: Duration = Duration::from_secs(3600);
//!
//! async fn serve(queue: Queue) -> Result<(), Error> {
//!     queue
//!         .serve(async |packet: Packet| {
//!             tokio::time::sleep(HOUR).await;
//!             packet.accept()
//!         })
//!         .await
//! }
//!
//! use tokio_nfqueue::simulated::{self, TestPacket};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Error> {
//! let (kernel, queue) = simulated::queue(Queue::builder(0))?;
//! tokio::spawn(serve(queue));
//! let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! let before = tokio::time::Instant::now();
//! let sent = kernel.send(TestPacket::udp(from, to, b"query"));
//! assert!(sent.outcome().await.accepted);
//! assert_eq!(before.elapsed().as_secs(), HOUR.as_secs());
//! # Ok(())
//! # }
//! ```
//!
//! There are two clocks, and they are independent:
//!
//! | what follows it | Tokio's clock | the simulated kernel's |
//! |---|---|---|
//! | `tokio::time`: `sleep`, `timeout`, `interval` | yes | |
//! | [`deadline`](crate::QueueBuilder::deadline), flush policies, `close`, `bind_when_free` | | yes |
//! | it moves | when the runtime is idle, or by `tokio::time::advance` | with the system's clock, or only by [`Kernel::advance`] once that was called |
//!
//! So a `tokio::time::timeout` around something that waits for the kernel's clock, such as a
//! deadline, expires at once under a paused clock: the runtime is idle. Call [`Kernel::advance`]
//! first, or leave the `timeout` out. [`slow_judge`](super::slow_judge) is a policy with time-outs
//! and their tests.
//!
//! # What else a test can do
//!
//! - Packets of other protocols, hooks, interfaces, marks and connections: [`TestPacket`]; packets
//!   from a capture file: [`TestPacket::from_pcap`].
//! - Faults: [`Kernel::take_interface_down`], [`Kernel::unregister_hook`],
//!   [`Kernel::set_capable`], [`Kernel::fail_sends`], [`Kernel::fail_receives`].
//! - Verdicts for connections taken back: [`Kernel::forget_flows`].
//! - Several queues, groups of queues: [`Kernel::bind`], [`Kernel::namespace`].
//! - Packets that come back: [`TestPacket::unless_mark`] is the condition of the rule.
//!
//! A test need not be small: in an optimized build, about a thousand packets in a millisecond go
//! through the simulated kernel and this crate (the benchmark `simulated` in `benches`).
//!
//! [`flow_marks`]: crate::QueueBuilder::flow_marks
//! [`Kernel::advance`]: crate::simulated::Kernel::advance
//! [`TestPacket`]: crate::simulated::TestPacket
//! [`TestPacket::from_pcap`]: crate::simulated::TestPacket::from_pcap
//! [`TestPacket::unless_mark`]: crate::simulated::TestPacket::unless_mark
//! [`Kernel::take_interface_down`]: crate::simulated::Kernel::take_interface_down
//! [`Kernel::unregister_hook`]: crate::simulated::Kernel::unregister_hook
//! [`Kernel::set_capable`]: crate::simulated::Kernel::set_capable
//! [`Kernel::fail_sends`]: crate::simulated::Kernel::fail_sends
//! [`Kernel::fail_receives`]: crate::simulated::Kernel::fail_receives
//! [`Kernel::forget_flows`]: crate::simulated::Kernel::forget_flows
//! [`Kernel::bind`]: crate::simulated::Kernel::bind
//! [`Kernel::namespace`]: crate::simulated::Kernel::namespace
