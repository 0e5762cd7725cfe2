//! Verdicts for whole connections: "a verdict can speak for its whole connection; with `Divert` the
//! kernel then passes, drops or rejects the rest by itself" (ARCHITECTURE.md, promise 12).

mod adversary;
mod attack;
mod attack_more;
mod attack_third;
mod authenticated;
mod beside;
mod denied;
mod forgetting;
mod headers;
mod lasting;
mod late;
mod later_places;
mod meeting;
mod offload;
mod others;
mod parts;
mod refused;
mod replies;
mod reuse;
pub(crate) mod segments;
mod tcp;
mod translated;
mod udp;

use std::{
    env, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use libtest_mimic::Trial;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Error, FlowMarks, Hook, Packet, Protocol, Queue, QueueBuilder, Rule, Verdict, divert::DivertBuilder,
};

pub(crate) use crate::common::unlimited_icmp_errors;
use crate::{
    common::{bind_now, next, soon},
    support::{self, lose_connections},
};

pub(crate) fn tests() -> Vec<Trial> {
    let modules = [
        adversary::tests(),
        attack::tests(),
        attack_more::tests(),
        attack_third::tests(),
        authenticated::tests(),
        udp::tests(),
        tcp::tests(),
        denied::tests(),
        forgetting::tests(),
        headers::tests(),
        refused::tests(),
        reuse::tests(),
        meeting::tests(),
        offload::tests(),
        others::tests(),
        parts::tests(),
        replies::tests(),
        translated::tests(),
        beside::tests(),
        lasting::tests(),
        late::tests(),
        later_places::tests(),
    ];
    modules.into_iter().flatten().collect()
}

const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A verdict for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Accept,
    Drop,
    Reject,
}

const DECISIONS: [Decision; 3] = [Decision::Accept, Decision::Drop, Decision::Reject];

impl Decision {
    fn for_flow(self, packet: Packet) -> Verdict {
        match self {
            Self::Accept => packet.accept().for_flow(),
            Self::Drop => packet.drop().for_flow(),
            Self::Reject => packet.reject().for_flow(),
        }
    }
}

fn builder() -> QueueBuilder {
    Queue::builder(0).flow_marks(FlowMarks::default())
}

fn bind() -> Queue {
    bind_now(builder())
}

/// With less memory for denials than usual: to allocate and free the 27 MB of the default takes a
/// third of the processor time of these tests.
fn table(rules: impl IntoIterator<Item = Rule>) -> DivertBuilder {
    let builder =
        Divert::builder().flow_marks(FlowMarks::default()).rules(rules).denied_flows(1000, Duration::from_secs(600));
    // The other tests must hold as well if accepted connections are offloaded.
    let offloading = builder.clone().offload_all();
    let everywhere = env::var_os("TOKIO_NFQUEUE_OFFLOAD").is_some();
    if everywhere && offloading.to_nft().is_ok() { offloading } else { builder }
}

/// UDP to this port.
fn to_port(hook: Hook, port: u16) -> Rule {
    Rule::new(hook).protocol(Protocol::Udp).destination_port(port)
}

/// Waits until the kernel has carried the verdict out.
async fn confirm(verdict: Verdict) -> Result<(), Error> {
    soon("the acknowledgement", verdict.confirm()).await
}

/// Two UDP sockets that talk to each other.
struct Talk {
    client: UdpSocket,
    server: UdpSocket,
}

impl Talk {
    fn new(client: impl Into<IpAddr>, server: impl Into<IpAddr>) -> Self {
        let server = support::udp((server.into(), 0));
        let client = support::udp((client.into(), 0));
        client.connect(server.local_addr().unwrap()).unwrap();
        Self { client, server }
    }

    fn loopback(address: IpAddr) -> Self {
        Self::new(address, address)
    }

    fn addresses(&self) -> (SocketAddr, SocketAddr) {
        (self.client.local_addr().unwrap(), self.server.local_addr().unwrap())
    }

    fn port(&self) -> u16 {
        self.addresses().1.port()
    }

    fn ask(&self, number: u8) {
        sent(|| self.client.send(&[number]));
    }

    fn answer(&self, number: u8) {
        sent(|| self.server.send_to(&[number], self.addresses().0));
    }

    /// The next question arrives.
    fn asked(&self, number: u8) {
        let mut byte = [0];
        let (_, from) = self.server.recv_from(&mut byte).unwrap();
        assert_eq!((byte[0], from), (number, self.addresses().0));
    }

    /// The next answer arrives.
    fn answered(&self, number: u8) {
        let mut byte = [0];
        self.client.recv(&mut byte).unwrap();
        assert_eq!(byte[0], number);
    }

    /// The client is told that its datagram was refused, and nothing else has arrived.
    #[track_caller]
    fn refused(&self, case: &str) {
        refused(&self.client, case);
        self.silent();
    }

    /// The first question is decided for its connection, and the second one does not come to the
    /// queue.
    async fn obeys(&self, decision: Decision, queue: &mut Queue) {
        self.ask(1);
        confirm(decision.for_flow(next(queue).await)).await.unwrap();
        self.decided(decision, 1);
        self.ask(2);
        self.decided(decision, 2);
        queue_is_empty(queue);
    }

    /// The question arrives, or does not, as decided.
    #[track_caller]
    fn decided(&self, decision: Decision, number: u8) {
        match decision {
            Decision::Accept => self.asked(number),
            Decision::Reject => self.refused(&format!("question {number}")),
            Decision::Drop => self.silent(),
        }
    }

    /// Both sides have nothing to receive, not even an error.
    #[track_caller]
    fn silent(&self) {
        for socket in [&self.client, &self.server] {
            socket.set_nonblocking(true).unwrap();
            let received = socket.recv(&mut [0]).map_err(|error| error.kind());
            assert_eq!(received, Err(io::ErrorKind::WouldBlock));
            socket.set_nonblocking(false).unwrap();
        }
    }
}

/// A connected socket is told that its datagram was refused.
#[track_caller]
fn refused(socket: &UdpSocket, case: &str) {
    let received = socket.recv(&mut [0]).map_err(|error| error.kind());
    assert_eq!(received, Err(io::ErrorKind::ConnectionRefused), "{case}");
}

/// Sends a datagram. It may be dropped at the output hook, which is an error of the call.
fn sent(mut send: impl FnMut() -> io::Result<usize>) {
    loop {
        match send().map_err(|error| error.kind()) {
            Ok(1) | Err(io::ErrorKind::PermissionDenied) => return,
            // An ICMP error that came before.
            Err(io::ErrorKind::ConnectionRefused) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Nothing waits in the queue.
fn queue_is_empty(queue: &mut Queue) {
    let packet = queue.try_recv();
    assert!(packet.is_err(), "{packet:?} came to the queue");
}

/// The next packet, if one comes soon.
async fn come(queue: &mut Queue) -> Option<Packet> {
    tokio::time::timeout(Duration::from_millis(700), next(queue)).await.ok()
}

/// Takes a packet and accepts it alone.
async fn pass(queue: &mut Queue) {
    confirm(next(queue).await.accept()).await.unwrap();
}

/// For how long a packet of the other side is taken for one that crossed a denied one. What a test
/// claims of that time holds if the machine has not stopped it for longer.
const CROSSING: Duration = Duration::from_secs(2);

/// Longer than [`CROSSING`].
async fn crossing_is_over() {
    tokio::time::sleep(Duration::from_millis(2500)).await;
}

/// Connection tracking has no entries any more, and [`crossing_is_over`].
async fn entries_gone() {
    lose_connections();
    crossing_is_over().await;
}

/// For how long the table of [`forgetful`] remembers denials.
const MEMORY: Duration = Duration::from_secs(2);

/// As [`table`], with a short memory. It offloads nothing: that needs a longer one.
fn forgetful(rules: impl IntoIterator<Item = Rule>) -> DivertBuilder {
    Divert::builder().flow_marks(FlowMarks::default()).rules(rules).denied_flows(100, MEMORY)
}

/// Sends packets that renew a denial in the table of [`forgetful`] and do not come to the queue.
/// Returns false if the machine stopped the test for so long that the denial may have ended: then
/// the test proves nothing. `denied` is a time before the denial.
async fn renewed(queue: &mut Queue, denied: Instant, times: u32, mut send: impl FnMut()) -> bool {
    let mut last = denied;
    for _ in 0..times {
        tokio::time::sleep(MEMORY / 5).await;
        let now = Instant::now();
        send();
        if last.elapsed() >= MEMORY {
            return false;
        }
        queue_is_empty(queue);
        last = now;
    }
    true
}

/// Longer than this table remembers a denial that no packet renews.
async fn denials_expired() {
    tokio::time::sleep(2 * MEMORY).await;
}
