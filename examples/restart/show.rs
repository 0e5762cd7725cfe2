//! The show: numbered datagrams over loopback, through the queue of a service that is restarted.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nfqueue_testbed as testbed;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::net::sockopt::socket_recv_buffer_size;

use super::Options;

const PORT: u16 = 9000;
/// After this time without a datagram the missing ones count as lost.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(options: &Options) -> Result<(), String> {
    // Each datagram has a number, and a counter.
    let count = u64::from(options.rate) * u64::from(options.seconds) * (u64::from(options.restarts) + 1);
    let count = u32::try_from(count).ok().filter(|count| *count <= 1_000_000_000);
    let count = count.ok_or("these are more than 1000000000 datagrams")?;
    // Before any other thread starts: an ordinary user becomes root of a user namespace.
    testbed::enter()?;
    let folder = std::env::temp_dir().join(format!("restart-{}", std::process::id()));
    fs::create_dir(&folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let result = testbed::isolated(|| show(options, count, &folder.join("socket")));
    let _ = fs::remove_dir_all(&folder);
    result
}

fn show(options: &Options, count: u32, socket: &Path) -> Result<(), String> {
    let mut service = Service::start(socket)?;
    let traffic = Traffic::start(options.rate, count)?;
    println!("{:>7}{:>10}{:>16}{:>12}{:>20}", "restart", "process", "sent until then", "passed on", "longest pause");
    let mut reports = Vec::new();
    for restart in 1..=options.restarts {
        traffic.until(options.rate * options.seconds * restart)?;
        traffic.longest_pause();
        let sent = traffic.sent.load(SeqCst);
        let successor = Service::start(socket)?;
        let old = std::mem::replace(&mut service, successor);
        let process = old.0.id();
        let report = old.report()?;
        let pause = traffic.longest_pause();
        println!("{restart:>7}{process:>10}{sent:>16}{:>12}{:>17.1} ms", report[1], pause.as_secs_f64() * 1e3);
        reports.push(report);
    }
    let Outcome { took, counts } = traffic.finish();
    service.terminate();
    reports.push(service.report()?);

    let sent = counts.len();
    let lost = counts.iter().filter(|count| **count == 0).count();
    let doubled = counts.iter().filter(|count| **count > 1).count();
    let sum = |index: usize| reports.iter().map(|report| report[index]).sum::<u64>();
    println!(
        "{sent} datagrams, {:.0} a second: {lost} lost, {doubled} doubled; {} decided, {} gone",
        sent as f64 / took.as_secs_f64(),
        sum(0),
        sum(3)
    );
    if lost + doubled > 0 || sum(0) != sent as u64 || sum(3) > 0 {
        return Err("each datagram should have been decided once and delivered once".to_owned());
    }
    Ok(())
}

/// A process with the service: this program with other arguments.
struct Service(Child);

impl Service {
    /// Starts the service, and waits until it has the queue.
    fn start(socket: &Path) -> Result<Self, String> {
        let program: PathBuf = std::env::current_exe().map_err(|error| error.to_string())?;
        let process = Command::new(program)
            .arg("--socket")
            .arg(socket)
            .args(["--udp-port", &PORT.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut service = Self(process.map_err(|error| format!("cannot start the service: {error}"))?);
        let mut output = BufReader::new(service.0.stderr.take().ok_or("the service has no standard error")?);
        let mut line = String::new();
        output.read_line(&mut line).map_err(|error| error.to_string())?;
        match line.as_str() {
            "ready\n" => {}
            line => return Err(format!("the service has failed: {}", line.trim_end())),
        }
        // Later messages of the service.
        thread::spawn(move || output.lines().map_while(Result::ok).for_each(|line| eprintln!("{line}")));
        Ok(service)
    }

    fn terminate(&self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
    }

    /// Waits for its end. Returns how many packets it has decided, passed on and lost, and how many
    /// had gone before their verdict.
    fn report(mut self) -> Result<[u64; 4], String> {
        let mut text = String::new();
        let mut output = self.0.stdout.take().ok_or("the service has no standard output")?;
        output.read_to_string(&mut text).map_err(|error| error.to_string())?;
        let status = self.0.wait().map_err(|error| error.to_string())?;
        let numbers: Vec<u64> = text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().map_err(|_| format!("the service has ended without a report: {status}"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A sender and a receiver.
struct Traffic {
    sent: Arc<AtomicU32>,
    pause: Arc<Mutex<Duration>>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<u8>>,
    begun: Instant,
}

struct Outcome {
    took: Duration,
    /// How often each number has arrived.
    counts: Vec<u8>,
}

impl Traffic {
    fn start(rate: u32, count: u32) -> Result<Self, String> {
        let (from, to) = (testbed::udp((Ipv4Addr::LOCALHOST, 0)), testbed::udp((Ipv4Addr::LOCALHOST, PORT)));
        to.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        // So many are under way at most: the receiver's buffer holds them, whatever the system's
        // limits. Otherwise a busy system would lose some there.
        let buffer = socket_recv_buffer_size(&to).map_err(|error| error.to_string())?;
        let window = (buffer / 1024).clamp(1, 8000) as u32;
        let (sent, received) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let pause = Arc::new(Mutex::new(Duration::ZERO));
        let begun = Instant::now();
        let sender = {
            let (sent, received) = (Arc::clone(&sent), Arc::clone(&received));
            thread::spawn(move || send(&from, rate, count, window, &sent, &received))
        };
        let receiver = {
            let pause = Arc::clone(&pause);
            thread::spawn(move || receive(&to, count, &received, &pause))
        };
        Ok(Self { sent, pause, sender, receiver, begun })
    }

    /// Waits until so many have been sent.
    fn until(&self, count: u32) -> Result<(), String> {
        while self.sent.load(SeqCst) < count {
            if self.sender.is_finished() {
                return Err("the datagrams do not arrive".to_owned());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The longest time without a datagram since the last call.
    fn longest_pause(&self) -> Duration {
        std::mem::take(&mut *self.pause.lock().expect("no thread panics"))
    }

    fn finish(self) -> Outcome {
        let _ = self.sender.join();
        let took = self.begun.elapsed();
        Outcome { took, counts: self.receiver.join().expect("the receiver does not panic") }
    }
}

fn send(socket: &UdpSocket, rate: u32, count: u32, window: u32, sent: &AtomicU32, received: &AtomicU32) {
    let begun = Instant::now();
    let mut next = 0;
    let mut progress = Instant::now();
    while next < count && progress.elapsed() < PATIENCE {
        let due = (begun.elapsed().as_micros() * u128::from(rate) / 1_000_000).min(count.into()) as u32;
        let allowed = due.min(received.load(SeqCst).saturating_add(window));
        if next >= allowed {
            thread::sleep(Duration::from_micros(100));
            continue;
        }
        for number in next..allowed {
            // What is not sent is counted as lost.
            let _ = socket.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT));
        }
        next = allowed;
        sent.store(next, SeqCst);
        progress = Instant::now();
    }
}

fn receive(socket: &UdpSocket, count: u32, received: &AtomicU32, pause: &Mutex<Duration>) -> Vec<u8> {
    let mut counts = vec![0_u8; count as usize];
    let mut datagram = [0; 4];
    let mut left = count;
    let mut last: Option<Instant> = None;
    while left > 0 && socket.recv(&mut datagram).is_ok() {
        let now = Instant::now();
        if let Some(last) = last {
            let mut longest = pause.lock().expect("no thread panics");
            *longest = (*longest).max(now - last);
        }
        last = Some(now);
        left -= u32::from(note(&mut counts, datagram));
        received.fetch_add(1, SeqCst);
    }
    // One that is doubled may be behind the last one.
    let _ = socket.set_read_timeout(Some(Duration::from_millis(100)));
    while socket.recv(&mut datagram).is_ok() {
        note(&mut counts, datagram);
    }
    counts
}

/// Counts a number. Returns whether it is new.
fn note(counts: &mut [u8], datagram: [u8; 4]) -> bool {
    let Some(count) = counts.get_mut(u32::from_be_bytes(datagram) as usize) else { return false };
    *count = count.saturating_add(1);
    *count == 1
}
