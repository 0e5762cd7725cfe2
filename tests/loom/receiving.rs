//! The stream finds the socket empty and clears its readiness, while the kernel puts a packet into
//! it, and while another thread receives. In every order of the steps the stream gets every packet.
//!
//! Mirrored are the order of the steps in `Shared::poll_packet` (`src/io/stream.rs`) and
//! `Shared::receive_round` (`src/io/recv.rs`), with loom's mutexes for the receive lock and for the
//! waker in `core`; and of Tokio what `AsyncFd` does: readiness with a tick, which grows with each
//! event, and `clear_ready`, which clears only the readiness of the tick that was polled. Epoll is
//! edge-triggered: an event follows each packet, and nothing else.

use std::{
    collections::VecDeque,
    sync::{
        self,
        atomic::{AtomicBool, AtomicU64},
    },
    task::{Context, Poll, Wake, Waker},
};

use loom::{
    model::Builder,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

/// What the code could do wrongly. Each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// Readiness is cleared whatever has happened since it was polled.
    ClearAlways,
    /// Once its waker is registered, the stream does not look whether another thread has received.
    NoSecondLook,
    /// A thread that has received packets for the stream does not wake it.
    NoWake,
}

/// The readiness of a descriptor as Tokio keeps it: twice the tick, and 1 if it is ready.
struct Readiness {
    state: AtomicUsize,
    waker: Mutex<Option<Waker>>,
}

impl Readiness {
    /// An event of epoll.
    fn event(&self) {
        self.state.fetch_update(SeqCst, SeqCst, |state| Some((state | 1) + 2)).unwrap();
        let waker = self.waker.lock().unwrap().take();
        waker.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<usize> {
        let ready = |state: usize| state & 1 == 1;
        let state = self.state.load(SeqCst);
        if ready(state) {
            return Poll::Ready(state);
        }
        let mut waker = self.waker.lock().unwrap();
        *waker = Some(cx.waker().clone());
        let state = self.state.load(SeqCst);
        if ready(state) { Poll::Ready(state) } else { Poll::Pending }
    }

    fn clear(&self, polled: usize, always: bool) {
        if always {
            self.state.fetch_update(SeqCst, SeqCst, |state| Some(state & !1)).unwrap();
        } else {
            let _ = self.state.compare_exchange(polled, polled & !1, SeqCst, SeqCst);
        }
    }
}

struct Shared {
    /// What the kernel has put into the socket.
    socket: Mutex<VecDeque<u32>>,
    readiness: Readiness,
    /// Received, and not taken by the stream. Its lock is the receive lock.
    received: Mutex<VecDeque<u32>>,
    /// The waker of the stream, for other threads of this crate.
    waker: Mutex<Option<Waker>>,
    mistake: Mistake,
}

impl Shared {
    fn new(mistake: Mistake) -> Arc<Self> {
        Arc::new(Self {
            socket: Mutex::new(VecDeque::new()),
            readiness: Readiness { state: AtomicUsize::new(0), waker: Mutex::new(None) },
            received: Mutex::new(VecDeque::new()),
            waker: Mutex::new(None),
            mistake,
        })
    }

    /// As the kernel does it: first the packet, then the event.
    fn send(&self, packet: u32) {
        self.socket.lock().unwrap().push_back(packet);
        self.readiness.event();
    }

    /// Until the socket is empty. The caller has the receive lock.
    fn receive(&self, received: &mut VecDeque<u32>) {
        while let Some(packet) = { self.socket.lock().unwrap().pop_front() } {
            received.push_back(packet);
        }
    }

    /// As a thread does it that sends verdicts, or that waits for a reply.
    fn receive_round(&self) {
        let mut received = self.received.lock().unwrap();
        self.receive(&mut received);
        let any = !received.is_empty();
        drop(received);
        if any && self.mistake != Mistake::NoWake {
            let waker = self.waker.lock().unwrap().take();
            waker.into_iter().for_each(Waker::wake);
        }
    }

    fn poll_packet(&self, cx: &Context<'_>) -> Poll<u32> {
        loop {
            if let Some(packet) = { self.received.lock().unwrap().pop_front() } {
                return Poll::Ready(packet);
            }
            *self.waker.lock().unwrap() = Some(cx.waker().clone());
            let ready = self.readiness.poll(cx);
            let mut received = self.received.lock().unwrap();
            if !received.is_empty() && self.mistake != Mistake::NoSecondLook {
                continue;
            }
            let Poll::Ready(ready) = ready else { return Poll::Pending };
            self.receive(&mut received);
            drop(received);
            self.readiness.clear(ready, self.mistake == Mistake::ClearAlways);
        }
    }
}

/// Whether the task of the stream was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: sync::Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// The task of the stream.
struct Task {
    woken: sync::Arc<Woken>,
    taken: Vec<u32>,
}

impl Task {
    fn new() -> Self {
        // A new task is polled.
        Self { woken: sync::Arc::new(Woken(AtomicBool::new(true))), taken: Vec::new() }
    }

    /// Polls the stream as long as the task is woken.
    fn run(&mut self, shared: &Shared) {
        while self.woken.0.swap(false, SeqCst) {
            let waker = Waker::from(sync::Arc::clone(&self.woken));
            let cx = Context::from_waker(&waker);
            while let Poll::Ready(packet) = shared.poll_packet(&cx) {
                self.taken.push(packet);
            }
        }
    }
}

/// The stream is read while two threads do this; then it has all packets from 0 on.
fn check(begin: fn(&Shared), threads: &[fn(&Shared)], packets: u32, mistake: Mistake) {
    let (threads, orders) = (threads.to_vec(), sync::Arc::new(AtomicU64::new(0)));
    let counted = sync::Arc::clone(&orders);
    // A backtrace (`RUST_BACKTRACE`) overflows the small stacks of loom's threads: a test hangs.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let mut builder = Builder::new();
    // Complete for two threads; of three, all orders with so many preemptions.
    if threads.len() > 1 {
        builder.preemption_bound.get_or_insert(3);
    }
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        let shared = Shared::new(mistake);
        begin(&shared);
        let others = threads.iter().map(|body| {
            let (shared, body) = (Arc::clone(&shared), *body);
            thread::spawn(move || body(&shared))
        });
        let others: Vec<_> = others.collect();
        let mut task = Task::new();
        task.run(&shared);
        others.into_iter().for_each(|other| other.join().unwrap());
        task.run(&shared);
        assert!(task.taken.iter().copied().eq(0..packets), "a packet was left behind: {:?}", task.taken);
    });
    println!("{} orders", orders.load(SeqCst));
}

fn nothing(_: &Shared) {}

fn two_packets(shared: &Shared) {
    shared.send(0);
    shared.send(1);
}

/// A receive of the stream has said falsely that the socket is empty, and no other packet follows.
fn a_hidden_packet(shared: &Shared) {
    shared.socket.lock().unwrap().push_back(0);
}

#[test]
fn a_packet_that_comes_while_readiness_is_cleared_is_received() {
    check(nothing, &[two_packets], 2, Mistake::None);
}

#[test]
fn packets_that_another_thread_receives_reach_the_stream() {
    check(nothing, &[two_packets, Shared::receive_round], 2, Mistake::None);
}

#[test]
fn after_a_false_eagain_the_next_thread_that_receives_hands_the_packets_over() {
    check(a_hidden_packet, &[Shared::receive_round], 1, Mistake::None);
}

#[test]
#[should_panic = "a packet was left behind"]
fn readiness_that_is_always_cleared_is_found() {
    check(nothing, &[two_packets], 2, Mistake::ClearAlways);
}

#[test]
#[should_panic = "a packet was left behind"]
fn a_stream_that_does_not_look_again_is_found() {
    check(a_hidden_packet, &[Shared::receive_round], 1, Mistake::NoSecondLook);
}

#[test]
#[should_panic = "a packet was left behind"]
fn a_thread_that_does_not_wake_the_stream_is_found() {
    check(a_hidden_packet, &[Shared::receive_round], 1, Mistake::NoWake);
}
