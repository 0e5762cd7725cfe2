//! CPU time per packet with a prefilled queue: the queue is filled before the consumer is timed, so
//! that sender and consumer do not disturb each other.

use super::{
    consumer::{Contender, Job, Running},
    measure::{Cost, Moment, count_allocations},
    options::Scale,
    summary::Book,
    support,
    traffic::{Sender, abyss, divert, outstanding},
};
use tokio_nfqueue::{Hook, Protocol};

pub const SECTION: &str = "prefilled queue";
pub const CPU: &str = "CPU ns/packet";
pub const USER: &str = "user ns/packet";
pub const SYSTEM: &str = "system ns/packet";
pub const WALL: &str = "ns/packet";
pub const ALLOCATIONS: &str = "allocations/packet";

/// Bytes of UDP payload.
const PAYLOAD: usize = 64;
/// Bytes that one packet takes of the receive buffer (`skb->truesize`), rounded up.
const CHARGE: usize = 1024;

pub fn job(packets: usize) -> Job {
    Job { max_len: 65_536, receive_buffer: packets * CHARGE, ..Job::default() }
}

/// Empties the queue several times and records the cost per packet.
pub fn measure(contender: &Contender, scale: &Scale, book: &mut Book) {
    let mut cost = Cost::default();
    let mut packets = 0;
    support::isolated(|| {
        drains(contender, &job(scale.packets), scale.packets, scale.drains + 1, |nth, count, run| {
            let start = Moment::now();
            run();
            // The first one is the warm-up.
            if nth > 0 {
                cost += start.cost();
                packets += count;
            }
        });
    });
    let per_packet = |duration: std::time::Duration| duration.as_nanos() as f64 / packets as f64;
    book.note(SECTION, contender.name, CPU, per_packet(cost.cpu()));
    book.note(SECTION, contender.name, USER, per_packet(cost.user));
    book.note(SECTION, contender.name, SYSTEM, per_packet(cost.system));
    book.note(SECTION, contender.name, WALL, per_packet(cost.wall));
}

/// Counts allocations per packet, after two drains in which buffers reach their size.
pub fn allocations(contender: &Contender, scale: &Scale, book: &mut Book) {
    let (mut allocations, mut packets) = (0, 0);
    support::isolated(|| {
        drains(contender, &job(scale.packets), scale.packets, 4, |nth, count, run| {
            count_allocations(nth > 1);
            let start = Moment::now();
            run();
            if nth > 1 {
                allocations += start.cost().allocations;
                packets += count;
            }
            count_allocations(false);
        });
    });
    book.note(SECTION, contender.name, ALLOCATIONS, allocations as f64 / packets as f64);
}

/// Fills and empties the queue `times` times. `around` gets the number of the repetition, the
/// number of packets and a function that empties the queue, which it calls.
pub fn drains(
    contender: &Contender,
    job: &Job,
    packets: usize,
    times: usize,
    mut around: impl FnMut(usize, u64, &mut dyn FnMut()),
) {
    let mut running = Some(Running::start(contender, job));
    let _abyss = abyss();
    let divert = divert(Hook::Output, Protocol::Udp, contender.queues);
    let mut sender = Sender::new(PAYLOAD);
    for nth in 0..times {
        sender.fill(packets);
        // Fewer than `packets` if an ordinary user's buffers are too small.
        let count = outstanding(contender.queues);
        assert!(count > 0, "nothing was queued");
        around(nth, count, &mut || {
            running = running.take().map(|running| {
                running.go(Some(count));
                running.wait()
            });
        });
        assert_eq!(outstanding(contender.queues), 0, "{} left packets undecided", contender.name);
    }
    if let Some(running) = running {
        running.finish();
    }
    drop(divert);
}
