//! Memory while many packets are held, measured in a process of its own.

use std::fs;

use tokio::runtime::Builder;
use tokio_nfqueue::{Hook, Protocol, Queue};

use super::{
    child,
    options::Scale,
    summary::Book,
    support,
    traffic::{Sender, divert},
};

pub const SECTION: &str = "memory";
pub const RATIO: &str = "resident bytes/payload byte";
pub const OURS: &str = "this crate, packets held";
pub const DETACHED: &str = "this crate, tickets held";
pub const NFQ: &str = "nfq, messages held";
pub const ALL: [&str; 3] = [OURS, DETACHED, NFQ];

/// Bytes of UDP payload, and of the packet with its headers.
const PAYLOAD: usize = 1400;
const PACKET: usize = PAYLOAD + 28;

pub fn measure(name: &str, scale: &Scale, book: &mut Book) {
    let answer = child::ask(&["memory", name, &scale.held.to_string()]);
    let grown: f64 = answer.trim().parse().unwrap_or_else(|_| panic!("the child printed {answer:?}"));
    book.note(SECTION, name, RATIO, grown / (scale.held * PACKET) as f64);
}

/// Runs in the child. Returns by how many bytes the process grows.
pub fn grown(name: &str, packets: usize) -> usize {
    support::isolated(|| match name {
        NFQ => {
            let mut queue = nfq::Queue::open().expect("open a queue");
            queue.bind(0).expect("bind a queue");
            queue.set_queue_max_len(0, 65_536).expect("set the queue's length");
            hold(packets, || queue.recv().expect("receive"))
        }
        _ => {
            let runtime = Builder::new_current_thread().enable_all().build().expect("start a runtime");
            let _inside = runtime.enter();
            let mut queue =
                runtime.block_on(Queue::builder(0).max_len(65_536).gso(false).bind()).expect("bind a queue");
            let mut next = || runtime.block_on(queue.recv()).expect("the queue is open").expect("receive");
            if name == DETACHED { hold(packets, || next().detach()) } else { hold(packets, next) }
        }
    })
}

/// Packets are queued at the input hook. There they are not charged to a send buffer.
fn hold<T>(packets: usize, mut next: impl FnMut() -> T) -> usize {
    let divert = divert(Hook::Input, Protocol::Udp, 1);
    let mut sender = Sender::new(PAYLOAD);
    let mut held = Vec::new();
    // The first packets bring the fixed costs, which do not count.
    let first: Vec<T> = (0..sender.burst()).map(|_| next()).collect();
    let before = resident();
    while held.len() < packets {
        held.extend((0..sender.burst()).map(|_| next()));
    }
    let after = resident();
    drop((first, held));
    drop(divert);
    after.saturating_sub(before)
}

pub fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").expect("read /proc/self/statm");
    let pages: usize = text.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a number of pages");
    pages * rustix::param::page_size()
}
