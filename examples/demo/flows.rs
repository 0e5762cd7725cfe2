//! The traffic: senders in this namespace, receivers in the other.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nfqueue_testbed::Peer;
use tokio::time::{MissedTickBehavior, interval};
use tokio_nfqueue::{Action, Hook, Protocol, Rule, Verdict};

use super::rewrite::{HEARD, SAID};

/// The flows of the demo, by their destination port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Tcp,
    Udp,
    Blocked,
    Rewritten,
}

const FLOWS: [Flow; 4] = [Flow::Tcp, Flow::Udp, Flow::Blocked, Flow::Rewritten];
const TCP_BYTES: u64 = 400 << 20;
const UDP_DATAGRAMS: u64 = 5_000;
const OTHER_DATAGRAMS: u64 = 1_000;
/// Between two datagrams of a flow. Tokio's timers have a resolution of 1 ms.
const PACE: Duration = Duration::from_millis(1);
/// After this time without a datagram a receiver counts the missing ones as lost.
const PATIENCE: Duration = Duration::from_secs(2);

impl Flow {
    pub(crate) const TCP_WRITE: usize = 64 * 1024;

    fn port(self) -> u16 {
        match self {
            Self::Tcp => 7001,
            Self::Udp => 7002,
            Self::Blocked => 7003,
            Self::Rewritten => 7004,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP transfer, 400 MiB",
            Self::Udp => "UDP, 1 000 a second",
            Self::Blocked => "UDP to a blocked port",
            Self::Rewritten => "UDP, payload rewritten",
        }
    }

    /// The flow of an IPv4 packet.
    pub(crate) fn of(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0xf) * 4;
        let port = u16::from_be_bytes(*packet.get(header + 2..)?.first_chunk()?);
        FLOWS.into_iter().find(|flow| flow.port() == port)
    }
}

/// The rules that send the flows to queue 0.
pub(crate) fn rules(peer: &Peer) -> impl Iterator<Item = Rule> {
    FLOWS.into_iter().map(|flow| {
        let protocol = if flow == Flow::Tcp { Protocol::Tcp } else { Protocol::Udp };
        Rule::new(Hook::Output).interface(&peer.near).protocol(protocol).destination_port(flow.port()).to_queue(0)
    })
}

/// Counters of the tasks that decide packets.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    flows: Mutex<[Decided; FLOWS.len()]>,
}

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Decided {
    pub(crate) queued: u64,
    pub(crate) accepted: u64,
    pub(crate) dropped: u64,
    pub(crate) rewritten: u64,
}

impl Counts {
    pub(crate) fn queued(&self, flow: Option<Flow>) {
        self.with(flow, |counts| counts.queued += 1);
    }

    pub(crate) fn decided(&self, flow: Option<Flow>, verdict: &Verdict) {
        self.with(flow, |counts| match (flow, verdict.action()) {
            (_, Action::Drop) => counts.dropped += 1,
            (Some(Flow::Rewritten), _) => counts.rewritten += 1,
            _ => counts.accepted += 1,
        });
    }

    pub(crate) fn of(&self, flow: Flow) -> Decided {
        self.flows.lock().expect("no holder panics")[flow as usize]
    }

    fn with(&self, flow: Option<Flow>, change: impl FnOnce(&mut Decided)) {
        if let Some(flow) = flow {
            change(&mut self.flows.lock().expect("no holder panics")[flow as usize]);
        }
    }
}

/// The results of all flows.
pub(crate) struct Outcome {
    pub(crate) flows: Vec<FlowOutcome>,
    pub(crate) unqueued: Latency,
    pub(crate) queued: Latency,
    pub(crate) notes: Vec<String>,
}

pub(crate) struct FlowOutcome {
    pub(crate) flow: Flow,
    pub(crate) sent: u64,
    /// Neither delivered nor dropped by a verdict.
    pub(crate) lost: u64,
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
}

/// One-way latencies.
pub(crate) struct Latency(Vec<Duration>);

impl Latency {
    fn new(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        Self(all)
    }

    /// In microseconds.
    pub(crate) fn percentile(&self, share: f64) -> u128 {
        let index = (self.0.len() as f64 * share).ceil() as usize;
        self.0.get(index.saturating_sub(1)).map_or(0, Duration::as_micros)
    }
}

/// The sockets of both sides.
pub(crate) struct Flows {
    sender: Arc<UdpSocket>,
    udp: Arc<UdpSocket>,
    blocked: Arc<UdpSocket>,
    rewritten: Arc<UdpSocket>,
    server: Arc<TcpListener>,
    far: std::net::Ipv4Addr,
    /// Both sides are in one process and share its clock.
    epoch: Instant,
}

impl Flows {
    pub(crate) fn start(peer: &Peer) -> io::Result<Self> {
        let far = peer.far_v4;
        let receiver = |flow: Flow| -> io::Result<Arc<UdpSocket>> {
            let socket = peer.run(|| UdpSocket::bind((far, flow.port())))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(Arc::new(socket))
        };
        Ok(Self {
            sender: Arc::new(UdpSocket::bind((peer.near_v4, 0))?),
            udp: receiver(Flow::Udp)?,
            blocked: receiver(Flow::Blocked)?,
            rewritten: receiver(Flow::Rewritten)?,
            server: Arc::new(peer.run(|| TcpListener::bind((far, Flow::Tcp.port())))?),
            far,
            epoch: Instant::now(),
        })
    }

    fn to(&self, flow: Flow) -> SocketAddr {
        (self.far, flow.port()).into()
    }

    /// Sends datagrams that carry their time of sending, and measures the latency of each.
    pub(crate) async fn latency(&self, datagrams: u64) -> Latency {
        let (receiver, epoch) = (Arc::clone(&self.udp), self.epoch);
        let measured = tokio::task::spawn_blocking(move || {
            let mut latencies = Vec::new();
            let mut datagram = [0; 64];
            while (latencies.len() as u64) < datagrams {
                let Ok(length) = receiver.recv(&mut datagram) else { break };
                let Some(sent) = datagram[..length].first_chunk() else { continue };
                latencies.push(epoch.elapsed().saturating_sub(Duration::from_nanos(u64::from_be_bytes(*sent))));
            }
            latencies
        });
        self.send_paced(Flow::Udp, datagrams, || (self.epoch.elapsed().as_nanos() as u64).to_be_bytes().to_vec()).await;
        Latency::new(measured.await.unwrap_or_default())
    }

    async fn send_paced(&self, flow: Flow, datagrams: u64, mut content: impl FnMut() -> Vec<u8>) {
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
        for _ in 0..datagrams {
            pace.tick().await;
            // The table counts a failed send as a loss.
            let _ = self.sender.send_to(&content(), self.to(flow));
        }
    }

    /// Runs all flows at once.
    pub(crate) async fn run(&self, counts: &Counts, unqueued: Latency) -> Result<Outcome, String> {
        let mut notes = Vec::new();
        let rewriting = self.rewriting_works().await;
        if !rewriting {
            notes.push("This kernel refuses replaced payloads in an unprivileged network namespace (Linux 7.2 and later do): that flow is left out.".to_owned());
        }
        let started = Instant::now();
        let heard = self.count(&self.rewritten, OTHER_DATAGRAMS * u64::from(rewriting), HEARD);
        let (tcp, queued, (), ()) = tokio::join!(
            self.transfer(),
            self.latency(UDP_DATAGRAMS),
            self.send_paced(Flow::Blocked, OTHER_DATAGRAMS, || b"let me in".to_vec()),
            self.send_paced(Flow::Rewritten, OTHER_DATAGRAMS * u64::from(rewriting), || SAID.to_vec()),
        );
        let (tcp_received, tcp_took) = tcp.map_err(|error| format!("the TCP transfer failed: {error}"))?;
        let paced = started.elapsed();
        let heard = heard.await.unwrap_or_default();
        let delivered = queued.0.len() as u64;
        let leaked = self.leaked();
        if leaked > 0 {
            return Err(format!("{leaked} datagrams reached the blocked port"));
        }
        let writes = TCP_BYTES / Flow::TCP_WRITE as u64;
        let blocked_unseen = OTHER_DATAGRAMS.saturating_sub(counts.of(Flow::Blocked).dropped);
        let flow = |flow, sent, lost, bytes, took| FlowOutcome { flow, sent, lost, bytes, took };
        let mut flows = vec![
            flow(
                Flow::Tcp,
                writes,
                (TCP_BYTES - tcp_received).div_ceil(Flow::TCP_WRITE as u64),
                tcp_received,
                tcp_took,
            ),
            flow(Flow::Udp, UDP_DATAGRAMS, UDP_DATAGRAMS - delivered, delivered * 8, paced),
            flow(Flow::Blocked, OTHER_DATAGRAMS, blocked_unseen, 0, paced),
        ];
        if rewriting {
            let bytes = heard * HEARD.len() as u64;
            // The probe was one of them.
            flows.push(flow(Flow::Rewritten, OTHER_DATAGRAMS + 1, OTHER_DATAGRAMS - heard, bytes, paced));
        }
        Ok(Outcome { flows, unqueued, queued, notes })
    }

    /// Sends a probe: does a replaced payload arrive?
    async fn rewriting_works(&self) -> bool {
        let probe = self.count(&self.rewritten, 1, HEARD);
        let _ = self.sender.send_to(SAID, self.to(Flow::Rewritten));
        probe.await.unwrap_or_default() == 1
    }

    /// Counts datagrams with this text, up to `expected` or until none arrives for [`PATIENCE`].
    fn count(&self, socket: &Arc<UdpSocket>, expected: u64, text: &'static [u8]) -> tokio::task::JoinHandle<u64> {
        let socket = Arc::clone(socket);
        tokio::task::spawn_blocking(move || {
            let mut datagram = [0; 256];
            let mut count = 0;
            while count < expected {
                match socket.recv(&mut datagram) {
                    Ok(length) => count += u64::from(&datagram[..length] == text),
                    Err(_) => break,
                }
            }
            count
        })
    }

    /// How many datagrams reached the blocked port.
    fn leaked(&self) -> u64 {
        let _ = self.blocked.set_nonblocking(true);
        (0..OTHER_DATAGRAMS).take_while(|_| self.blocked.recv(&mut [0; 64]).is_ok()).count() as u64
    }

    /// Sends [`TCP_BYTES`] to the other namespace. Returns how many arrived, and how long it took.
    async fn transfer(&self) -> io::Result<(u64, Duration)> {
        let (server, to) = (Arc::clone(&self.server), self.to(Flow::Tcp));
        let received = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&received);
        let transfer = tokio::task::spawn_blocking(move || -> io::Result<Duration> {
            let receiver = thread::spawn(move || -> io::Result<()> {
                let (mut stream, _) = server.accept()?;
                let mut buffer = vec![0; 256 * 1024];
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(()),
                        length => count.fetch_add(length as u64, Ordering::Relaxed),
                    };
                }
            });
            let started = Instant::now();
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
            let content = vec![0x5a; Flow::TCP_WRITE];
            for _ in 0..TCP_BYTES / Flow::TCP_WRITE as u64 {
                stream.write_all(&content)?;
            }
            drop(stream);
            receiver.join().map_err(|_| io::Error::other("the receiver panicked"))??;
            Ok(started.elapsed())
        });
        let took = transfer.await.map_err(io::Error::other)??;
        Ok((received.load(Ordering::Relaxed), took))
    }
}
