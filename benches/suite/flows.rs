//! Verdicts for whole connections: beside no queue, and beside a queue that gets every packet.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::channel,
    },
    thread,
    time::{Duration, Instant},
};

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{Cmp, DataAttribute, Meta, MetaKey, Operator, Payload, Register};
use nfqueue_divert::Divert;
use nix::{
    libc::{IPPROTO_TCP, IPPROTO_UDP},
    sys::socket::{
        setsockopt,
        sockopt::{Linger, UdpGroSegment},
    },
    time::ClockId,
};
use tokio::{
    runtime::Builder,
    sync::oneshot::{self, error::TryRecvError},
};
use tokio_nfqueue::{FlowMarks, Hook, Protocol, Queue, Rule};

use super::{
    busy::clock_of,
    consumer::Job,
    floor,
    memory::resident,
    options::Scale,
    rules::{self, Expressions, NetfilterProtoFamily as Family, Place},
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

/// The mark of accepted connections of [`Way::ByHand`].
const MARK: u32 = 1;
/// The settings of the queue, for all ways.
const MAX_LEN: u32 = 65_536;
const COPY_RANGE: u32 = 128;

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
    /// The first packet of each connection, to a blocking loop that marks it. Rules written by
    /// hand accept the rest of the connection.
    ByHand,
}

impl Way {
    pub const ALL: [Self; 6] =
        [Self::NoQueue, Self::Tracked, Self::EveryPacket, Self::FirstPacket, Self::FirstFour, Self::ByHand];

    pub fn name(self) -> &'static str {
        match self {
            Self::NoQueue => "no queue",
            Self::Tracked => "no queue, connection tracking",
            Self::EveryPacket => "every packet",
            Self::FirstPacket => "first packet decides",
            Self::FirstFour => "first four packets",
            Self::ByHand => "first packet, C loop, rules by hand",
        }
    }

    fn rules(self, protocol: Protocol) -> Option<Divert> {
        let rule = Rule::new(Hook::Output).protocol(protocol).destination_port(PORT).to_queue(0);
        let builder = match self {
            Self::NoQueue => return None,
            Self::ByHand => {
                install_by_hand(protocol).expect("install rules");
                return None;
            }
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
    /// The clock of the thread's CPU time.
    clock: ClockId,
}

impl Consumer {
    fn start(way: Way, protocol: Protocol) -> Self {
        let (end, mut ended) = oneshot::channel();
        let (tell, is_bound) = channel();
        let bound = move || tell.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("report");
        let thread = thread::spawn(move || {
            if way == Way::ByHand {
                let job = Job { max_len: MAX_LEN, copy_range: COPY_RANGE, gso: true, ..Job::default() };
                floor::mark_all(&job, MARK, bound, || ended.try_recv() != Err(TryRecvError::Empty));
                return;
            }
            let runtime = Builder::new_current_thread().enable_all().build().expect("start a runtime");
            runtime.block_on(async {
                let builder =
                    Queue::builder(0).max_len(MAX_LEN).copy_range(COPY_RANGE).flow_marks(FlowMarks::default());
                let mut queue = builder.bind().await.expect("bind a queue");
                bound();
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
                }
            });
        });
        let clock = clock_of(is_bound.recv().expect("the queue is bound"));
        Self { divert: way.rules(protocol), end, thread, clock }
    }

    fn cpu(&self) -> Duration {
        self.clock.now().expect("read a thread's clock").into()
    }

    fn stop(self) {
        drop(self.divert);
        let _ = self.end.send(());
        while !self.thread.is_finished() {
            wake();
        }
        self.thread.join().expect("the consumer ends");
    }
}

/// The rules of a program that does without this crate's: packets of a connection without the mark
/// go to the queue, and the mark of a verdict becomes the connection's.
fn install_by_hand(protocol: Protocol) -> io::Result<()> {
    let (number, ipv4) = (|kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec()), Family::IPv4);
    let register = || Register::Other(1);
    let compare = |operator, value: &[u8]| {
        let value = DataAttribute::Value(value.to_vec());
        Expressions::Cmp(vec![Cmp::SourceRegister(Register::Reg1), Cmp::Op(operator), Cmp::Data(value)])
    };
    let meta = |key| Expressions::Meta(vec![Meta::DestinationRegister(register()), Meta::Key(key)]);
    // NFTA_CT_KEY: NFT_CT_MARK, and NFTA_CT_DREG or NFTA_CT_SREG
    let connection_mark = |direction| Expressions::Other {
        expression_type: "ct".to_owned(),
        attributes: vec![number(2, 3), number(direction, 1)],
    };
    let protocol = if protocol == Protocol::Udp { IPPROTO_UDP } else { IPPROTO_TCP };
    // The destination port, of the transport header.
    let port = vec![Payload::DestinationRegister(register()), Payload::Base(2), Payload::Offset(2), Payload::Len(2)];
    let unmarked = [
        meta(MetaKey::L4Proto),
        compare(Operator::Equal, &[protocol as u8]),
        Expressions::Payload(port),
        compare(Operator::Equal, &PORT.to_be_bytes()),
        connection_mark(1),
        compare(Operator::NotEqual, &MARK.to_ne_bytes()),
    ];
    // NF_INET_LOCAL_OUT
    rules::install_queue_if(ipv4, "by_hand", Place { hook: 3, priority: 0 }, &unmarked, 0)?;
    let save = vec![meta(MetaKey::Mark), compare(Operator::Equal, &MARK.to_ne_bytes()), connection_mark(4)];
    rules::install(ipv4, "by_hand_save", Some(Place { hook: 3, priority: 1 }), save)
}

/// Packets that come to the queue, if there is one.
fn wake() {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let _ = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.send_to(b"x", to));
    let _ = TcpStream::connect_timeout(&to, Duration::from_millis(1));
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
                // The client's reset can be lost: seen once, with the loop written by hand.
                stream.set_read_timeout(Some(LOST)).expect("set SO_RCVTIMEO");
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
                match connect() {
                    Ok(()) => count += 1,
                    // One of some ten thousand, whatever program has the queue.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                    Err(error) => panic!("connect: {error}"),
                }
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

/// After this time a server waits for no more of a connection.
const LOST: Duration = Duration::from_millis(200);

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
