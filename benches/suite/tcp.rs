//! TCP goodput of one stream, queued at the output hook, over a veth pair into a second namespace.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use super::{
    consumer::{Contender, Job, Running, WHOLE},
    floor,
    measure::Moment,
    options::Scale,
    ours, peers,
    summary::Book,
    support,
    traffic::{PORT, divert},
};
use tokio_nfqueue::{Hook, Protocol};

pub const SECTION: &str = "TCP goodput";
pub const GOODPUT: &str = "Gbit/s";
pub const NO_QUEUE: &str = "no queue";

/// Enough for a full queue of GSO packets. It is this crate's default.
const RECEIVE_BUFFER: usize = 1024 * 66_400;
const WRITE: usize = 256 * 1024;
const READ: usize = 1024 * 1024;

pub const DEFAULTS: &str = "this crate: defaults";
pub const SHORT: &str = "this crate: copy_range(128)";
pub const BUSY_POLL: &str = "this crate: busy_poll(30 µs)";
pub const SHORT_BUSY_POLL: &str = "this crate: copy_range(128), busy_poll(30 µs)";
pub const CLASSIC: &str = "classic loop: recv 1, verdict 1, no GSO";

/// All contenders.
pub fn contenders() -> [(&'static str, Option<(Contender, Job)>); 12] {
    [
        (NO_QUEUE, None),
        (DEFAULTS, Some((ours::ACCEPT_ALL, job(WHOLE, true)))),
        (SHORT, Some((ours::ACCEPT_ALL, job(128, true)))),
        (BUSY_POLL, Some((ours::BUSY_POLL, job(WHOLE, true)))),
        (SHORT_BUSY_POLL, Some((ours::BUSY_POLL, job(128, true)))),
        ("this crate: gso(false)", Some((ours::ACCEPT_ALL, job(WHOLE, false)))),
        (CLASSIC, Some((floor::ONE, job(WHOLE, false)))),
        ("floor: one batch, GSO", Some((floor::BATCH, job(WHOLE, true)))),
        ("floor: one batch, GSO, 128 bytes", Some((floor::BATCH, job(128, true)))),
        ("nfq", Some((peers::NFQ, job(WHOLE, false)))),
        ("nfq, GSO", Some((peers::NFQ, job(WHOLE, true)))),
        ("nfq, thread and channel", Some((peers::NFQ_CHANNEL, job(WHOLE, false)))),
    ]
}

pub fn job(copy_range: u32, gso: bool) -> Job {
    Job { receive_buffer: RECEIVE_BUFFER, copy_range, gso, ..Job::default() }
}

/// One stream, through a contender's queue or without a queue.
pub fn measure(name: &str, queue: Option<(Contender, Job)>, scale: &Scale, book: &mut Book) {
    let rate = support::isolated(|| {
        let peer = support::veth();
        let (far, namespace) = (peer.far_v4, peer.namespace.try_clone());
        let listener = namespace.run(|| TcpListener::bind((far, PORT)).expect("listen"));
        let queue = queue.map(|(contender, job)| {
            let running = Running::start(&contender, &job);
            running.go(None);
            (running, divert(Hook::Output, Protocol::Tcp, 1))
        });
        let stream = TcpStream::connect((far, PORT)).expect("connect");
        let (accepted, _) = listener.accept().expect("accept");
        let bytes = Arc::new(AtomicU64::new(0));
        let writer = spawn_writer(stream.try_clone().expect("duplicate a stream"));
        let reader = spawn_reader(accepted.try_clone().expect("duplicate a stream"), Arc::clone(&bytes));

        thread::sleep(scale.warm_up);
        let (start, before) = (Moment::now(), bytes.load(Relaxed));
        thread::sleep(scale.window);
        let (read, wall) = (bytes.load(Relaxed) - before, start.cost().wall);

        if let Some((running, divert)) = queue {
            // Packets of the stream wake it.
            running.stop(|| ());
            drop(divert);
        }
        // Blocked reads and writes end with an error.
        let _ = (stream.shutdown(Shutdown::Both), accepted.shutdown(Shutdown::Both));
        let _ = (writer.join(), reader.join());
        read as f64 * 8.0 / wall.as_secs_f64() / 1e9
    });
    book.note(SECTION, name, GOODPUT, rate);
}

fn spawn_writer(mut stream: TcpStream) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let data = vec![0x55; WRITE];
        while stream.write_all(&data).is_ok() {}
    })
}

fn spawn_reader(mut stream: TcpStream, bytes: Arc<AtomicU64>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut data = vec![0; READ];
        while let Ok(read @ 1..) = stream.read(&mut data) {
            bytes.fetch_add(read as u64, Relaxed);
        }
    })
}
