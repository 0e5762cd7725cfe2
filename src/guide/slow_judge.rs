//! A slow judge: decisions that take time, and what happens when they take too long.
//!
//! The filter asks something else before it decides: a user, a database, a service in the network.
//! One decision must not delay the others, and a judge that is slow, down or overloaded must not
//! fill the queue. Three limits do that:
//!
//! | limit | here | what it prevents |
//! |---|---|---|
//! | time for a question | `timeout(PATIENCE, ...)` | a judge that does not answer |
//! | questions at once | `Semaphore::try_acquire` | a judge that answers too slowly for the traffic |
//! | time for a packet | [`deadline`](crate::QueueBuilder::deadline) | a mistake in the handler, and a runtime that is busy |
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use tokio::{sync::{Semaphore, mpsc, oneshot}, time::timeout};
//! use tokio_nfqueue::{Action, Error, Packet, Queue, QueueBuilder, Verdict};
//!
//! const PATIENCE: Duration = Duration::from_secs(2);
//!
//! fn settings() -> QueueBuilder {
//!     // Longer than the patience: it is for what the handler does not notice.
//!     Queue::builder(0).deadline(2 * PATIENCE, Action::Drop)
//! }
//!
//! /// Asks a task, here; it may as well be a connection to a service.
//! #[derive(Clone)]
//! struct Judge {
//!     questions: mpsc::Sender<(Vec<u8>, oneshot::Sender<bool>)>,
//!     at_once: Arc<Semaphore>,
//! }
//!
//! impl Judge {
//!     /// `None`: it has not answered in time, is overloaded, or is gone.
//!     async fn allows(&self, packet: &[u8]) -> Option<bool> {
//!         let _permit = self.at_once.try_acquire().ok()?;
//!         let (reply, answer) = oneshot::channel();
//!         let ask = async {
//!             self.questions.send((packet.to_vec(), reply)).await.ok()?;
//!             answer.await.ok()
//!         };
//!         timeout(PATIENCE, ask).await.ok()?
//!     }
//! }
//!
//! async fn decide(packet: Packet, judge: Judge) -> Verdict {
//!     match judge.allows(packet.payload()).await {
//!         Some(true) => packet.accept(),
//!         Some(false) => packet.drop(),
//!         // The decision of the policy: here it fails closed.
//!         None => packet.drop(),
//!     }
//! }
//!
//! async fn serve(queue: Queue, judge: Judge) -> Result<(), Error> {
//!     queue.serve(move |packet| decide(packet, judge.clone())).await
//! }
//!
//! // The tests, with Tokio's clock paused: time-outs take no time.
//! use tokio_nfqueue::simulated::{self, TestPacket};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (kernel, queue) = simulated::queue(settings())?;
//! let (questions, mut asked) = mpsc::channel(8);
//! let judge = Judge { questions, at_once: Arc::new(Semaphore::new(2)) };
//! tokio::spawn(serve(queue, judge));
//! let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! let send = |text: &str| kernel.send(TestPacket::udp(from, to, text.as_bytes()));
//!
//! // The second question is answered first.
//! let (slow, quick) = (send("slow"), send("quick"));
//! let (_slow_question, slow_reply) = asked.recv().await.unwrap();
//! let (_quick_question, quick_reply) = asked.recv().await.unwrap();
//! quick_reply.send(true).unwrap();
//! assert!(quick.outcome().await.accepted);
//! assert!(slow.is_waiting());
//!
//! // Two at once; the third is not asked about.
//! let _other = send("other");
//! let (_other_question, other_reply) = asked.recv().await.unwrap();
//! assert!(!send("one too many").outcome().await.accepted);
//!
//! // One is answered late, for which the test does not wait two seconds.
//! let before = tokio::time::Instant::now();
//! assert!(!slow.outcome().await.accepted);
//! assert_eq!(before.elapsed().as_secs(), 2);
//! assert!(slow_reply.send(true).is_err());
//! # drop(other_reply);
//! # Ok(())
//! # }
//! ```
//!
//! The third limit follows the clock of the simulated kernel, not Tokio's: test it with
//! [`Kernel::advance`](crate::simulated::Kernel::advance), as in [`testing`](super::testing).
//!
//! # What surprises
//!
//! - The sender does not wait indefinitely. TCP sends a SYN again after 1 s, then 2 s, 4 s and so
//!   on, and each is one more packet in the queue, with one more question. Keep what was asked, by
//!   the connection's addresses, and let the later packets wait for the same answer; and once it is
//!   known, decide the connection: [`for_flow`](super::flows).
//! - A resolver asks again after some seconds. An answer that comes later than that is for nothing.
//! - Without the second limit, slowness becomes loss: at 1000 packets a second and 2 s for each,
//!   2000 packets wait, more than the [1024 places](crate::QueueBuilder::max_len) of the queue, and
//!   then the kernel drops packets of all connections, also those that need no question. `serve`
//!   itself stops reading at [1024](crate::Serve::concurrency) handlers.
//! - Where the answers come in another order than the questions, so do the verdicts, and packets of
//!   one connection can overtake each other: [`in_flow_order`](crate::Serve::in_flow_order).
//! - A deadline begins when this crate has received the packet. What waits in the kernel before
//!   that has no limit; it is short as long as the stream is read.
//! - At `Output`, a packet that waits counts against its sender's socket buffer: see
//!   [`guide`](super#packets-that-wait).
//! - A blocking library blocks the runtime: `tokio::task::spawn_blocking`, with the same limits.
//!   A timed-out `spawn_blocking` still occupies its thread.
//! - If the judge is in the network, its own packets must not wait for it:
//!   [`own_traffic`](super::own_traffic).
//! - A judge that is down for long: answer at once, from the last known policy, and try again
//!   later. The example `firewall` shows what its client sees meanwhile.
