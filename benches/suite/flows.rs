//! Verdicts for whole connections: beside no queue, and beside a queue that gets every packet.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    socket::{
        setsockopt,
        sockopt::{Linger, UdpGroSegment},
    },
    time::TimeVal,
};
use tokio::{runtime::Builder, sync::oneshot};
use tokio_nfqueue::{Divert, FlowMarks, Hook, Protocol, Queue, Rule};

use super::{
    memory::resident,
    options::Scale,
    summary::Book,
    support,
    traffic::{BURST, PORT, Sender, abyss},
};

pub const DATAGRAMS: &str = "flows: datagrams";
pub const STREAM: &str = "flows: one TCP stream";
pub const CONNECTIONS: &str = "flows: short TCP connections";
pub const MANY: &str = "flows: many";
pub const RATE: &str = "per second";
pub const GOODPUT: &str = "Gbit/s";
pub const CPU: &str = "CPU µs of the consumer per connection";
pub const FLOWS: &str = "flows";
pub const GROWN: &str = "resident bytes per flow";
pub const FORGET: &str = "forget_flows, s";
pub const DECIDE: &str = "flows decided per second";
pub const OURS: &str = "this crate";

/// What comes to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Nothing: there are no rules.
    NoQueue,
    /// Nothing, but connection tracking is on.
    Tracked,
    EveryPacket,
    /// The first packet of each connection, which decides the connection.
    FirstPacket,
    /// The first four packets of each connection, each of which is accepted.
    FirstFour,
}

impl Way {
    pub const ALL: [Self; 5] = [Self::NoQueue, Self::Tracked, Self::EveryPacket, Self::FirstPacket, Self::FirstFour];

    pub fn name(self) -> &'static str {
        match self {
            Self::NoQueue => "no queue",
            Self::Tracked => "no queue, connection tracking",
            Self::EveryPacket => "every packet",
            Self::FirstPacket => "first packet decides",
            Self::FirstFour => "first four packets",
        }
    }

    fn rules(self, protocol: Protocol) -> Option<Divert> {
        let rule = Rule::new(Hook::Output).protocol(protocol).destination_port(PORT).to_queue(0);
        let builder = match self {
            Self::NoQueue => return None,
            Self::Tracked => Divert::builder().chain(Hook::Output, None).track_connections(),
            Self::EveryPacket => Divert::builder().rule(rule),
            Self::FirstPacket => Divert::builder().flow_marks(FlowMarks::default()).rule(rule),
            Self::FirstFour => Divert::builder().rule(rule.first_packets(4)),
        };
        Some(builder.install().expect("install the rule"))
    }
}

/// A thread with a queue, and the rules.
struct Consumer {
    divert: Option<Divert>,
    end: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
    /// CPU time of the thread in nanoseconds.
    cpu: Arc<AtomicU64>,
}

impl Consumer {
    fn start(way: Way, protocol: Protocol) -> Self {
        let (end, mut ended) = oneshot::channel();
        let (bound, is_bound) = std::sync::mpsc::channel();
        let cpu = Arc::new(AtomicU64::new(0));
        let spent = Arc::clone(&cpu);
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("start a runtime");
            runtime.block_on(async {
                let builder = Queue::builder(0).max_len(65_536).copy_range(128).flow_marks(FlowMarks::default());
                let mut queue = builder.bind().expect("bind a queue");
                bound.send(()).expect("report");
                let mut packets = Vec::new();
                loop {
                    tokio::select! {
                        count = queue.recv_many(&mut packets, 64) => { count.expect("receive"); }
                        _ = &mut ended => break,
                    }
                    for packet in packets.drain(..) {
                        let verdict = packet.accept();
                        let verdict = if way == Way::FirstPacket { verdict.for_flow() } else { verdict };
                        verdict.submit().expect("submit");
                    }
                    spent.store(thread_cpu().as_nanos() as u64, Relaxed);
                }
            });
        });
        is_bound.recv().expect("the queue is bound");
        Self { divert: way.rules(protocol), end, thread, cpu }
    }

    fn cpu(&self) -> Duration {
        Duration::from_nanos(self.cpu.load(Relaxed))
    }

    fn stop(self) {
        drop(self.divert);
        let _ = self.end.send(());
        self.thread.join().expect("the consumer ends");
    }
}

fn thread_cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("getrusage");
    let duration = |time: TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    duration(usage.user_time()) + duration(usage.system_time())
}

/// The super-packets that have come to a receiver, whether or not it had room.
fn delivered() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("read the counters");
    let line = text.lines().filter(|line| line.starts_with("Udp:")).nth(1).expect("counters of UDP");
    let numbers: Vec<u64> = line.split(' ').skip(1).filter_map(|word| word.parse().ok()).collect();
    // InDatagrams, NoPorts, InErrors
    numbers[0] + numbers[2]
}

/// A flood of 16 flows.
pub fn datagrams(way: Way, scale: &Scale, book: &mut Book) {
    let rate = support::isolated(|| {
        let abyss = abyss();
        // The receiver takes super-packets as they are: to split them costs more than all else.
        setsockopt(&abyss, UdpGroSegment, &true).expect("set UDP_GRO");
        let consumer = Consumer::start(way, Protocol::Udp);
        let mut sender = Sender::new(64);
        let mut run = |time: Duration| {
            let (start, before) = (Instant::now(), delivered());
            while start.elapsed() < time {
                (0..4).for_each(|_| _ = sender.burst());
            }
            (BURST as u64 * (delivered() - before)) as f64 / start.elapsed().as_secs_f64()
        };
        run(scale.warm_up);
        let rate = run(scale.window);
        consumer.stop();
        rate
    });
    book.note(DATAGRAMS, way.name(), RATE, rate);
}

/// One stream over a veth pair.
pub fn stream(way: Way, scale: &Scale, book: &mut Book) {
    let rate = support::isolated(|| {
        let peer = support::veth();
        let far = peer.far_v4;
        let listener = peer.run(|| TcpListener::bind((far, PORT)).expect("listen"));
        let consumer = Consumer::start(way, Protocol::Tcp);
        let mut stream = TcpStream::connect((far, PORT)).expect("connect");
        let (mut accepted, _) = listener.accept().expect("accept");
        let bytes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&bytes);
        let copies = [&stream, &accepted].map(|stream| stream.try_clone().expect("duplicate a stream"));
        let writer = thread::spawn(move || {
            let data = vec![0x55; 256 * 1024];
            while stream.write_all(&data).is_ok() {}
        });
        let reader = thread::spawn(move || {
            let mut data = vec![0; 1024 * 1024];
            while let Ok(read @ 1..) = accepted.read(&mut data) {
                counted.fetch_add(read as u64, Relaxed);
            }
        });
        thread::sleep(scale.warm_up);
        let (start, before) = (Instant::now(), bytes.load(Relaxed));
        thread::sleep(scale.window);
        let rate = (bytes.load(Relaxed) - before) as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9;
        copies.iter().for_each(|stream| _ = stream.shutdown(Shutdown::Both));
        consumer.stop();
        let _ = (writer.join(), reader.join());
        rate
    });
    book.note(STREAM, way.name(), GOODPUT, rate);
}

/// Connections over loopback, one after the other: a question, an answer, and a reset, so that no
/// port is kept.
pub fn connections(way: Way, scale: &Scale, book: &mut Book) {
    let (rate, cost) = support::isolated(|| {
        // The entries of closed connections would fill the table.
        let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close";
        let _ = fs::write(file, "1");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).expect("listen");
        let consumer = Consumer::start(way, Protocol::Tcp);
        let ends = Arc::new(AtomicBool::new(false));
        let last = Arc::clone(&ends);
        let server = thread::spawn(move || {
            while !last.load(Relaxed) {
                let (mut stream, _) = listener.accept().expect("accept");
                let mut question = [0; 100];
                if stream.read_exact(&mut question).is_ok() {
                    let _ = stream.write_all(&question);
                }
                let _ = stream.read(&mut question);
            }
        });
        let run = |time: Duration| {
            let (start, cpu, mut count) = (Instant::now(), consumer.cpu(), 0_u32);
            while start.elapsed() < time {
                connect().expect("a connection");
                count += 1;
            }
            let cpu = consumer.cpu().saturating_sub(cpu);
            (f64::from(count) / start.elapsed().as_secs_f64(), cpu.as_secs_f64() * 1e6 / f64::from(count))
        };
        run(scale.warm_up);
        let result = run(scale.window);
        ends.store(true, Relaxed);
        // The server may have seen that already.
        let _ = connect();
        server.join().expect("the server ends");
        consumer.stop();
        result
    });
    book.note(CONNECTIONS, way.name(), RATE, rate);
    if !matches!(way, Way::NoQueue | Way::Tracked) {
        book.note(CONNECTIONS, way.name(), CPU, cost);
    }
}

fn connect() -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
    setsockopt(&stream, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).expect("set SO_LINGER");
    stream.write_all(&[0x55; 100])?;
    stream.read_exact(&mut [0; 100])
}

/// As many flows as connection tracking has room for, at most a million: memory of the process,
/// and the time to forget them.
pub fn many(scale: &Scale, book: &mut Book) {
    let wanted = if scale.rounds > 1 { 1_000_000 } else { 20_000 };
    let (flows, grown, decided, forgotten) = support::isolated(|| {
        let file = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").expect("read the table's size");
        let room: usize = file.trim().parse().expect("a number");
        let flows = wanted.min(room / 10 * 9);
        let consumer = Consumer::start(Way::FirstPacket, Protocol::Udp);
        let _abyss = abyss();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a socket");
        super::traffic::grow_send_buffer(&socket);
        let send = |number: usize| {
            let [_, a, b, c] = (number as u32).to_be_bytes();
            let to = SocketAddr::from(([127, a + 1, b, c], PORT));
            socket.send_to(b"x", to).expect("send");
        };
        (0..1000).for_each(send);
        support::wait_until("the first flows are decided", || decided_flows() >= 1000);
        let (before, start) = (resident(), Instant::now());
        for number in 1000..flows {
            send(number);
            if number % 20_000 == 0 {
                support::wait_until("there is room", || support::queue_line(0).is_some_and(|line| line[2] < 20_000));
            }
        }
        support::wait_until("all flows are decided", || support::queue_line(0).is_some_and(|line| line[2] == 0));
        let decided = (flows - 1000) as f64 / start.elapsed().as_secs_f64();
        let grown = resident().saturating_sub(before);
        let start = Instant::now();
        consumer.divert.as_ref().expect("rules").forget_flows().expect("forget");
        let forgotten = start.elapsed();
        consumer.stop();
        (flows, grown, decided, forgotten)
    });
    book.note(MANY, OURS, FLOWS, flows as f64);
    book.note(MANY, OURS, GROWN, grown as f64 / flows as f64);
    book.note(MANY, OURS, DECIDE, decided);
    book.note(MANY, OURS, FORGET, forgotten.as_secs_f64());
}

/// The entries of connection tracking in this namespace.
fn decided_flows() -> usize {
    let text = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").expect("read the count");
    text.trim().parse().expect("a number")
}
