//! Restarts of processes: this binary, started again as a small service.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::Ipv4Addr,
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::net::sockopt::socket_recv_buffer_size;
use tokio::net::{UnixListener, UnixStream};
use tokio_nfqueue::{Action, Divert, Error, ErrorKind, Packet, Queue, QueueBuilder, handover::Takeover};

use super::ENOUGH;
use crate::{
    common::{PATIENCE, PORT, Traffic, account, eventually, next, soon, udp_in},
    support,
};

tests![
    multi restarts_under_60000_packets_a_second_lose_none_and_decide_none_twice,
    one a_successor_that_is_killed_before_it_accepts_costs_nothing,
    one a_successor_that_is_stopped_costs_nothing,
    one a_predecessor_that_is_killed_leaves_everything_to_the_successor,
    one the_queue_and_the_table_end_with_the_successor,
];

/// How many packets a second are sent, and how many in all.
const RATE: u32 = 60_000;
const COUNT: u32 = 240_000;
const RESTARTS: u32 = 6;

async fn restarts_under_60000_packets_a_second_lose_none_and_decide_none_twice() {
    let mut service = Service::start("serve", None, 0);
    service.expect("ready");
    let flood = Flood::start();
    let mut total = Total::default();
    for generation in 1..=RESTARTS {
        let until = COUNT / (RESTARTS + 1) * generation;
        eventually("traffic flows", || flood.sent.load(SeqCst) >= until).await;
        let mut successor = Service::start("serve", Some(generation - 1), generation);
        // Packets do not need this runtime.
        successor.expect("ready");
        total.add(&service.report());
        service = successor;
    }
    let (elapsed, counts) = flood.finish().await;
    let kernel = account(0).expect("the queue is bound");
    service.end();
    total.add(&service.report());
    let lost = counts.iter().filter(|count| **count == 0).count();
    let doubled = counts.iter().filter(|count| **count > 1).count();
    eprintln!(
        "{RESTARTS} restarts, {COUNT} packets at {:.0} a second: {lost} lost, {doubled} doubled, {total:?}",
        f64::from(COUNT) / elapsed.as_secs_f64()
    );
    assert_eq!((lost, doubled), (0, 0));
    assert_eq!((kernel.queue_full, kernel.socket_full), (0, 0));
    let count = u64::from(COUNT);
    assert_eq!(total, Total { decided: count, handed_over: total.handed_over, lost: 0, gone: 0, unanswered: 0 });
}

async fn a_successor_that_is_killed_before_it_accepts_costs_nothing() {
    let mut service = Service::start("serve", None, 0);
    service.expect("ready");
    let traffic = Traffic::new(200);
    for round in 0..3 {
        let mut successor = Service::start("hang", Some(round), 100 + round);
        successor.expect("received");
        let base = round * 50;
        traffic.send(base..base + 50);
        assert_eq!(traffic.delivered(), [] as [u32; 0]);
        successor.kill();
        service.expect("continues: Disconnected");
        traffic.expect(base..base + 50).await;
    }
    service.end();
    let total = service.report();
    assert_eq!(total, Total { decided: 150, ..Total::default() });
}

async fn a_successor_that_is_stopped_costs_nothing() {
    let mut service = Service::start("hasty", None, 0);
    service.expect("ready");
    let traffic = Traffic::new(50);
    let mut successor = Service::start("hang", Some(0), 100);
    successor.expect("received");
    traffic.send(0..50);
    service.expect("continues: TimedOut");
    traffic.expect(0..50).await;
    // It wakes up too late.
    successor.end();
    successor.expect("refused: TimedOut");
    service.end();
    assert_eq!(service.report(), Total { decided: 50, ..Total::default() });
}

async fn a_predecessor_that_is_killed_leaves_everything_to_the_successor() {
    let mut service = Service::start("serve", None, 0);
    service.expect("ready");
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    traffic.expect(0..20).await;
    let stream = UnixStream::connect(name(0)).await.unwrap();
    let mut takeover = soon("the hand-over", Takeover::receive(stream)).await.unwrap();
    traffic.send(20..60);
    let mut queue = Queue::builder(0).take_over(&mut takeover).unwrap();
    let divert = takeover.take_divert().unwrap().unwrap();
    service.kill();
    assert_eq!(account(0).unwrap().waiting, 40);
    soon("the takeover", takeover.accept()).await.unwrap();
    traffic.send(60..100);
    for _ in 20..100 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect(20..100).await;
    assert_eq!(divert.counters().await.unwrap()[0].packets, 100);
}

async fn the_queue_and_the_table_end_with_the_successor() {
    let mut service = Service::start("serve", None, 0);
    service.expect("ready");
    let mut successor = Service::start("serve", Some(0), 1);
    successor.expect("ready");
    service.report();
    let traffic = Traffic::new(50);
    traffic.send(0..10);
    traffic.expect(0..10).await;
    successor.kill();
    eventually("the queue is unbound", || account(0).is_none()).await;
    // Without the table, packets are not dropped for want of a queue.
    eventually("the table is gone", || {
        traffic.send([10]);
        !traffic.delivered().is_empty()
    })
    .await;
}

/// What the services have counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Total {
    decided: u64,
    handed_over: u64,
    lost: u64,
    gone: u64,
    unanswered: u64,
}

impl Total {
    fn add(&mut self, other: &Self) {
        self.decided += other.decided;
        self.handed_over += other.handed_over;
        self.lost += other.lost;
        self.gone += other.gone;
        self.unanswered += other.unanswered;
    }
}

/// A service in a process of its own, in the network namespace of the thread that starts it.
pub(super) struct Service {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Service {
    pub(super) fn start(mode: &str, from: Option<u32>, to: u32) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(CHILD, format!("{mode} {} {to}", from.map_or("-".to_owned(), |from| from.to_string())));
        let mut process = support::start_process(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap();
        let (input, output) = (process.stdin.take(), process.stdout.take().unwrap());
        Self { process, input, output: BufReader::new(output) }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[track_caller]
    pub(super) fn expect(&mut self, line: &str) {
        assert_eq!(self.line(), line);
    }

    /// Ends the service, or wakes it.
    fn end(&mut self) {
        self.input = None;
    }

    pub(super) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// What it has counted, when it ends.
    fn report(&mut self) -> Total {
        let line = self.line();
        let numbers: Vec<u64> =
            line.split(' ').map(|word| word.parse().unwrap_or_else(|_| panic!("{line:?}"))).collect();
        let [decided, handed_over, lost, gone, unanswered] = numbers[..] else { panic!("{line:?}") };
        assert!(self.process.wait().unwrap().success());
        Total { decided, handed_over, lost, gone, unanswered }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Numbered datagrams at a steady rate. The number under way is limited, so that none is lost in a
/// buffer of the receiver while the system is busy.
struct Flood {
    sent: Arc<AtomicU32>,
    begun: Instant,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<u8>>,
}

impl Flood {
    fn start() -> Self {
        let (from, to) = (support::udp((Ipv4Addr::LOCALHOST, 0)), support::udp((Ipv4Addr::LOCALHOST, PORT)));
        let window = if socket_recv_buffer_size(&to).unwrap() > 8 << 20 { 4000 } else { 200 };
        let (sent, received) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let begun = Instant::now();
        let sender = std::thread::spawn({
            let (sent, received) = (Arc::clone(&sent), Arc::clone(&received));
            move || {
                let mut patience = Instant::now() + PATIENCE;
                let mut next = 0;
                while next < COUNT {
                    let due = (begun.elapsed().as_micros() * u128::from(RATE) / 1_000_000) as u32;
                    let allowed = due.min(received.load(SeqCst) + window).min(COUNT);
                    if next >= allowed {
                        assert!(Instant::now() < patience, "{next} sent, {} received", received.load(SeqCst));
                        std::thread::sleep(Duration::from_micros(200));
                        continue;
                    }
                    patience = Instant::now() + PATIENCE;
                    for number in next..allowed {
                        from.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                    }
                    next = allowed;
                    sent.store(next, SeqCst);
                }
            }
        });
        let receiver = std::thread::spawn(move || {
            let mut counts = vec![0_u8; COUNT as usize];
            let mut datagram = [0; 4];
            let mut left = COUNT;
            // An error is the time-out: a datagram was lost, and the counts show which.
            while left > 0 && to.recv(&mut datagram).is_ok() {
                let count = &mut counts[u32::from_be_bytes(datagram) as usize];
                *count += 1;
                if *count == 1 {
                    left -= 1;
                }
                received.fetch_add(1, SeqCst);
            }
            // One that was doubled may be behind.
            to.set_nonblocking(true).unwrap();
            while to.recv(&mut datagram).is_ok() {
                counts[u32::from_be_bytes(datagram) as usize] += 1;
            }
            counts
        });
        Self { sent, begun, sender, receiver }
    }

    /// Waits for the end. Returns how long it took, and how often each number arrived.
    async fn finish(self) -> (Duration, Vec<u8>) {
        while !self.sender.is_finished() || !self.receiver.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let elapsed = self.begun.elapsed();
        self.sender.join().unwrap();
        (elapsed, self.receiver.join().unwrap())
    }
}

const CHILD: &str = "TOKIO_NFQUEUE_TEST_HANDOVER_CHILD";

/// A name without a file, which belongs to the network namespace.
fn name(generation: u32) -> String {
    format!("\0hand-over {generation}")
}

/// The whole `main` of a service.
pub(super) fn child() -> Option<ExitCode> {
    let arguments = std::env::var(CHILD).ok()?;
    let [mode, from, to] = arguments.split(' ').collect::<Vec<_>>()[..] else { panic!("{arguments:?}") };
    let (from, to) = (from.parse().ok(), to.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(async {
        match mode {
            "serve" => serve(from, to, ENOUGH).await,
            "hasty" => serve(from, to, Duration::from_millis(100)).await,
            "hang" => hang(from.unwrap()).await,
            "table" => table(),
            mode => panic!("{mode:?}"),
        }
    });
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn settings() -> QueueBuilder {
    Queue::builder(0).max_len(8192).copy_range(128)
}

/// Serves the queue until a successor has taken it over, or until the input ends.
async fn serve(from: Option<u32>, to: u32, within: Duration) -> Result<(), Error> {
    let (mut queue, divert) = match from {
        None => {
            let queue = settings().bind().await?;
            (queue, Divert::install(&Divert::builder().rule(udp_in().to_queue(0))).await?)
        }
        Some(generation) => {
            let stream = UnixStream::connect(name(generation)).await.expect("the predecessor listens");
            let mut takeover = Takeover::receive(stream).await?;
            let queue = settings().take_over(&mut takeover)?;
            let divert = takeover.take_divert()?.expect("the table goes along");
            takeover.accept().await?;
            (queue, divert)
        }
    };
    let mut listens = to;
    let mut listener = UnixListener::bind(name(listens)).expect("the name is free");
    say("ready");
    let sink = queue.sink();
    let mut end = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
    let mut packets: Vec<Packet> = Vec::new();
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => {
                let (stream, _) = accepted.expect("accept a connection");
                let handover = sink.hand_over(within).await?.with_divert(&divert).await?;
                match handover.send(stream, within).await {
                    Ok(()) => break drop(divert),
                    Err(error) => say(&format!("continues: {:?}", error.kind())),
                }
                listens += 1;
                listener = UnixListener::bind(name(listens)).expect("the name is free");
            }
            _ = &mut end => {
                divert.remove_rules().await?;
                sink.close_with(Action::Accept).await?;
                divert.close().await?;
                break;
            }
            received = queue.recv_many(&mut packets, 16) => {
                received?;
                packets.drain(..).try_for_each(|packet| packet.accept().submit())?;
            }
        }
    }
    let stats = sink.stats();
    let decided = stats.decided.accepted + stats.decided.dropped;
    let gone = stats.sent.gone_at_least + stats.sent.refused;
    say(&format!("{decided} {} {} {gone} {}", stats.decided.handed_over, stats.lost.packets, stats.decided.unanswered));
    // The task that reads the input is blocked.
    std::process::exit(0);
}

/// Receives what the predecessor sends, and waits before it accepts.
async fn hang(from: u32) -> Result<(), Error> {
    let stream = UnixStream::connect(name(from)).await.expect("the predecessor listens");
    let mut takeover = Takeover::receive(stream).await?;
    let _queue = settings().take_over(&mut takeover)?;
    let _divert = takeover.take_divert()?.expect("the table goes along");
    say("received");
    let _ = std::io::stdin().read_line(&mut String::new());
    match takeover.accept().await {
        Err(error) if error.kind() == ErrorKind::TimedOut => say("refused: TimedOut"),
        result => say(&format!("{result:?}")),
    }
    Ok(())
}

/// Owns a table until it is killed.
fn table() -> Result<(), Error> {
    let _divert = Divert::builder().table("named").rule(udp_in().mark(1, 1).to_queue(0)).install()?;
    say("ready");
    let _ = std::io::stdin().read(&mut [0]);
    Ok(())
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").expect("write to the test");
    output.flush().expect("write to the test");
}
