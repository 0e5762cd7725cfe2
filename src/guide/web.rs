//! A web service beside the filter: what it shares with the filter, and how both end.
//!
//! The filter drops the packets of blocked sources. A web service in the same process says how many
//! packets it has decided, and blocks and unblocks addresses while it runs. The example `web` does
//! this with axum; here the service is a few lines on Tokio, so that the page is complete.
//!
//! ```
//! use std::{
//!     collections::HashSet,
//!     future::{Future, ready},
//!     net::IpAddr,
//!     sync::{Arc, RwLock},
//! };
//!
//! use tokio::{
//!     io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
//!     net::{TcpListener, TcpStream},
//! };
//! use tokio_nfqueue::{Error, Packet, Queue, VerdictSink, Verdict};
//!
//! type Blocked = Arc<RwLock<HashSet<IpAddr>>>;
//!
//! fn decide(packet: Packet, blocked: &Blocked) -> Verdict {
//!     match packet.addresses() {
//!         Some((source, _)) if blocked.read().unwrap().contains(&source) => packet.drop(),
//!         _ => packet.accept(),
//!     }
//! }
//!
//! async fn run(
//!     queue: Queue,
//!     listener: TcpListener,
//!     stop: impl Future<Output = ()> + Send + 'static,
//! ) -> Result<(), Error> {
//!     let blocked = Blocked::default();
//!     let web = tokio::spawn(serve_web(listener, blocked.clone(), queue.sink()));
//!     let result = queue
//!         .serve(move |packet: Packet| ready(decide(packet, &blocked)))
//!         .with_graceful_shutdown(stop)
//!         .await;
//!     // After the filter, so that its end can be watched.
//!     web.abort();
//!     result
//! }
//!
//! const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
//!
//! async fn serve_web(listener: TcpListener, blocked: Blocked, sink: VerdictSink) {
//!     while let Ok((stream, _)) = listener.accept().await {
//!         let (blocked, sink) = (blocked.clone(), sink.clone());
//!         tokio::spawn(async move { respond(stream, &blocked, &sink).await });
//!     }
//! }
//!
//! async fn respond(
//!     mut stream: TcpStream,
//!     blocked: &Blocked,
//!     sink: &VerdictSink,
//! ) -> std::io::Result<()> {
//!     let mut request = String::new();
//!     BufReader::new((&mut stream).take(1000)).read_line(&mut request).await?;
//!     let mut words = request.split(' ');
//!     let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
//!     let address = path.strip_prefix("/blocked/").and_then(|text| text.parse().ok());
//!     let body = match (method, address) {
//!         ("PUT", Some(address)) => format!("{}\n", blocked.write().unwrap().insert(address)),
//!         ("DELETE", Some(address)) => format!("{}\n", blocked.write().unwrap().remove(&address)),
//!         ("GET", None) if path == "/stats" => {
//!             let stats = sink.stats();
//!             format!("accepted {} dropped {}\n", stats.decided.accepted, stats.decided.dropped)
//!         }
//!         _ => return stream.write_all(NOT_FOUND).await,
//!     };
//!     let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
//!     stream.write_all((head + &body).as_bytes()).await
//! }
//!
//! // The test: a simulated kernel, and real HTTP.
//! use tokio_nfqueue::simulated::{self, TestPacket};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (kernel, queue) = simulated::queue(Queue::builder(0))?;
//! let listener = TcpListener::bind("127.0.0.1:0").await?;
//! let web = listener.local_addr()?;
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! let running = tokio::spawn(run(queue, listener, async { drop(stopped.await) }));
//!
//! let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
//! let packet = || TestPacket::udp(from, to, b"");
//! assert!(kernel.send(packet()).outcome().await.accepted);
//! assert!(ask(web, "PUT /blocked/10.0.0.1").await?.ends_with("true\n"));
//! assert!(!kernel.send(packet()).outcome().await.accepted);
//! assert!(ask(web, "DELETE /blocked/10.0.0.1").await?.ends_with("true\n"));
//! assert!(kernel.send(packet()).outcome().await.accepted);
//! assert!(ask(web, "GET /stats").await?.ends_with("accepted 2 dropped 1\n"));
//! assert!(ask(web, "GET /").await?.starts_with("HTTP/1.1 404"));
//!
//! let _ = stop.send(());
//! running.await??;
//! # Ok(())
//! # }
//! # async fn ask(web: std::net::SocketAddr, request: &str) -> std::io::Result<String> {
//! #     let mut stream = TcpStream::connect(web).await?;
//! #     stream.write_all(format!("{request} HTTP/1.1\r\n\r\n").as_bytes()).await?;
//! #     let mut reply = String::new();
//! #     stream.read_to_string(&mut reply).await?;
//! #     Ok(reply)
//! # }
//! ```
//!
//! # What surprises
//!
//! - The service is traffic, too. If the rule matches its connections, they wait for the filter:
//!   exclude its port, or see [`own_traffic`](super::own_traffic). Otherwise a filter that is full
//!   cannot be asked why.
//! - A handler of the service that computes for long delays the packets of a current-thread
//!   runtime: they wait in the kernel. Use a multi-thread runtime, or a thread for the service with
//!   a runtime of its own; sinks work in every thread.
//! - Hold no lock over an `await`, and none of the service's while it writes to a slow client.
//! - A change of the policy concerns packets that are decided after it. Connections that were
//!   decided with `for_flow` stay as they are: take their verdicts back with
//!   [`forget_flow`](crate::Divert::forget_flow) or [`forget_flows`](crate::Divert::forget_flows).
//!   `sink.divert()` returns the rules of the queue.
//! - A sink does not keep the queue open. After its end `stats` still returns the last numbers, and
//!   `kernel_stats` an error.
//! - For both ends by one signal, give both the same: a `tokio::sync::watch`, or a
//!   `CancellationToken` of tokio-util. Let the service end after the filter; the other way round,
//!   a client that keeps its connection open can keep the filter from ending.
//!
//! Many addresses are cheaper in the kernel: in a [named set](crate::divert::NamedSet) of a rule
//! that drops, which the service changes with [`Divert::set`](crate::Divert::set). Then their
//! packets do not come to the queue. Numbers for a monitoring system: [`metrics`](super::metrics).
