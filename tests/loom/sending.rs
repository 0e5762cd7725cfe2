//! "Another thread is sending": a thread that finds the send lock taken leaves its verdicts to the
//! thread that has it. In every order of the steps of the threads no verdict may be left behind.
//!
//! The state is the real one, `nfqueue_proto::state::Machine`. What is mirrored here, because it
//! needs a socket and Tokio, are the loops around it: `Shared::with`, `Shared::send_lock_released`
//! (`src/io/shared.rs`), `Shared::flush`, `Shared::send_round`, and the end of
//! `Shared::begin_configure` (`src/io/send.rs`). A mutex of loom takes the place of `core`. For
//! `outbox` there is an atomic flag: loom does not run other threads between the last step of a
//! thread and its unlocking of a mutex, and so never shows it a `try_lock` that fails just then.

use std::{
    sync::{self, PoisonError, atomic::AtomicU64},
    time::Instant,
};

use loom::{
    model::Builder,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};
use nfqueue_proto::{
    state::{
        Arrival, Carried, Clock, Decision, FixedSettings, Limits, Machine, Origin, Outbox, Outcome, Storage, Transmit,
        flush::FlushPolicy,
    },
    types::Action,
    wire::verdict::{Attachments, VerdictFields},
};

#[derive(Debug)]
struct Stopped(Instant);

impl Clock for Stopped {
    fn now(&self) -> Instant {
        self.0
    }
}

#[derive(Debug)]
struct NoExtras;

impl Carried for NoExtras {
    type Waiter = ();

    fn attachments(&self) -> Attachments<'_> {
        Attachments::default()
    }

    fn is_acknowledged(&self) -> bool {
        false
    }

    fn take_waiter(&mut self) -> Option<()> {
        None
    }

    fn put_waiter(&mut self, (): ()) {}
}

/// What the code could do wrongly. Each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// The thread that has sent does not look whether another round is wanted.
    NoLook,
    /// It looks before it releases the send lock.
    EarlyLook,
    /// A thread that had the send lock for another purpose does not look.
    NoFlushForOthers,
}

struct Shared {
    core: Mutex<Machine<NoExtras, Stopped>>,
    outbox: SendLock,
    mistake: Mistake,
}

/// The send lock, with what it protects. The inner lock is never contended.
struct SendLock {
    taken: AtomicBool,
    outbox: sync::Mutex<Outbox<NoExtras>>,
}

struct Sending<'a> {
    lock: &'a SendLock,
    outbox: sync::MutexGuard<'a, Outbox<NoExtras>>,
}

impl SendLock {
    fn try_lock(&self) -> Option<Sending<'_>> {
        // As the mutex of the standard library. (Loom does not order a `swap` that finds the lock
        // taken before the release that follows.)
        self.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(Sending { lock: self, outbox: self.outbox.try_lock().expect("the lock is not taken") })
    }

    fn lock(&self) -> Sending<'_> {
        loop {
            if let Some(sending) = self.try_lock() {
                return sending;
            }
            thread::yield_now();
        }
    }
}

impl Sending<'_> {
    fn release(self) {
        drop(self.outbox);
        self.lock.taken.store(false, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// With packets of the ids from 1 to `packets`, all undecided.
    fn new(packets: u32, mistake: Mistake) -> Arc<Self> {
        let settings =
            FixedSettings { queue: 0, on_unanswered: Action::Drop, deadline: None, in_submission_order: false };
        let limits = Limits { max_len: 1024, payload: 128 };
        let mut machine = Machine::new(settings, FlushPolicy::immediate(), limits, 1, Stopped(Instant::now()));
        machine.set_receive_buffer(1 << 20);
        machine.bound();
        machine.set_driven(true);
        machine.arrived((1..=packets).map(|id| Arrival { id, storage: Storage::None }));
        machine.take_effects();
        let outbox = SendLock { taken: AtomicBool::new(false), outbox: sync::Mutex::new(Outbox::new(0, 4096)) };
        Arc::new(Self { core: Mutex::new(machine), outbox, mistake })
    }

    fn with(&self, body: impl FnOnce(&mut Machine<NoExtras, Stopped>)) {
        let mut core = lock(&self.core);
        body(&mut core);
        let flush = core.take_effects().flush;
        drop(core);
        if flush {
            self.flush();
        }
    }

    fn flush(&self) {
        loop {
            let Some(mut sending) = self.outbox.try_lock() else { return };
            self.send_round(&mut sending.outbox);
            sending.outbox.take_spent();
            let early = (self.mistake == Mistake::EarlyLook).then(|| self.send_lock_released());
            sending.release();
            let again = match self.mistake {
                Mistake::NoLook => false,
                _ => early.unwrap_or_else(|| self.send_lock_released()),
            };
            if !again {
                return;
            }
        }
    }

    fn send_round(&self, outbox: &mut Outbox<NoExtras>) {
        let mut core = lock(&self.core);
        while let Some(transmit) = core.poll_transmit(outbox, || true) {
            drop(core);
            match transmit {
                Transmit::Receive => {
                    core = lock(&self.core);
                    core.socket_empty(u32::MAX);
                }
                Transmit::Datagram { .. } => {
                    assert!(!outbox.encode().is_empty());
                    core = lock(&self.core);
                    core.transmitted(outbox, Outcome::Sent);
                }
            }
        }
    }

    fn send_lock_released(&self) -> bool {
        let mut core = lock(&self.core);
        let again = core.send_lock_released();
        core.take_effects().flush | again
    }

    fn decide(&self, id: u32) {
        let decision = Decision { fields: VerdictFields::plain(Action::Accept), extras: None, origin: Origin::Owner };
        self.with(|core| assert!(core.decide(id, decision).is_ok()));
    }

    /// The send lock is held for another purpose, as a configuration message needs it.
    fn configure(&self) {
        let sending = self.outbox.lock();
        drop(lock(&self.core));
        sending.release();
        if self.mistake != Mistake::NoFlushForOthers {
            self.with(|core| core.flush_if_wanted());
        }
    }
}

/// Each of these threads does this; then every packet has its verdict.
fn check(threads: &[fn(&Shared)], packets: u32, mistake: Mistake) {
    let (threads, orders) = (threads.to_vec(), sync::Arc::new(AtomicU64::new(0)));
    let counted = sync::Arc::clone(&orders);
    // A backtrace (`RUST_BACKTRACE`) overflows the small stacks of loom's threads: a test hangs.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let mut builder = Builder::new();
    // Complete for two threads; of three, all orders with so many preemptions.
    if threads.len() > 2 {
        builder.preemption_bound.get_or_insert(3);
    }
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let shared = Shared::new(packets, mistake);
        let others = threads[1..].iter().map(|body| {
            let (shared, body) = (Arc::clone(&shared), *body);
            thread::spawn(move || body(&shared))
        });
        let others: Vec<_> = others.collect();
        threads[0](&shared);
        others.into_iter().for_each(|other| other.join().unwrap());
        let core = lock(&shared.core);
        let stats = core.stats();
        let done = (stats.decided.accepted, stats.held.in_flight);
        assert_eq!(done, (u64::from(packets), 0), "a verdict was left behind");
    });
    println!("{} orders", orders.load(Ordering::Relaxed));
}

const TWO: [fn(&Shared); 2] = [|shared| shared.decide(1), |shared| shared.decide(2)];
const BESIDE_A_CONFIGURATION: [fn(&Shared); 2] = [Shared::configure, |shared| shared.decide(1)];

#[test]
fn of_two_threads_one_sends_what_the_other_leaves() {
    check(&TWO, 2, Mistake::None);
}

#[test]
fn of_three_threads_none_leaves_a_verdict() {
    check(&[TWO[0], TWO[1], |shared| shared.decide(3)], 3, Mistake::None);
}

#[test]
fn a_thread_that_configures_sends_what_others_leave() {
    check(&BESIDE_A_CONFIGURATION, 1, Mistake::None);
    check(&[TWO[0], TWO[1], Shared::configure], 2, Mistake::None);
}

#[test]
#[should_panic = "a verdict was left behind"]
fn a_sender_that_does_not_look_again_is_found() {
    check(&TWO, 2, Mistake::NoLook);
}

#[test]
#[should_panic = "a verdict was left behind"]
fn a_sender_that_looks_too_early_is_found() {
    check(&TWO, 2, Mistake::EarlyLook);
}

#[test]
#[should_panic = "a verdict was left behind"]
fn a_configuration_that_does_not_flush_for_others_is_found() {
    check(&BESIDE_A_CONFIGURATION, 1, Mistake::NoFlushForOthers);
}
