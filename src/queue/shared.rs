//! What the handles of one queue share: its logic, its socket, and the locks around them. Always taken in this order:
//!
//! | lock | held while | by |
//! |---|---|---|
//! | `outbox` | messages are encoded and sent: a send runs the packets' further way, 100 µs for 64 | who flushes or configures; who finds it taken by a flush leaves its verdicts to the holder |
//! | `inbox` | datagrams are received and taken apart, some 50 µs at most | the stream; who awaits an answer of the kernel |
//! | `core` | bookkeeping, well under a microsecond | everyone |
//!
//! Users' code (wakers, subscribers, policies, drops of payloads) runs under none of them. So whatever the logic wants done
//! or told is carried out once the lock is released: [`Shared::with`]. Who holds `outbox` or `inbox` leaves that until these
//! are released too: [`Shared::attend`].

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32},
    },
    task::Waker,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::channel::oneshot;
use tokio::sync::Notify;

use super::{foreign::Foreign, inbox::Inbox, outbox::Outbox};
use crate::{
    Action, Error, ErrorKind, PacketId, Stats, Vlan,
    keeper::{Timed, Timer},
    kernel::KernelTable,
    socket::Socket,
    state::{Carried, Clock, Decision, Event, Life, Machine, Todo},
    sys::{self, Owner},
    trace::Trace,
    wire::verdict::Attachments,
};

/// What a single verdict message may carry beside its ruling.
#[derive(Debug, Default)]
pub(crate) struct Extra {
    pub(crate) payload: Option<Bytes>,
    pub(crate) vlan: Option<Vlan>,
    pub(crate) layer2: Option<Bytes>,
    /// Encoded.
    pub(crate) conntrack: Option<Vec<u8>>,
    /// Encoded.
    pub(crate) expectation: Option<Vec<u8>>,
    pub(crate) confirm: Option<Confirmer>,
}

impl Extra {
    pub(super) fn attachments(&self) -> Attachments<'_> {
        Attachments {
            payload: self.payload.as_deref(),
            vlan: self.vlan.map(|vlan| (vlan.protocol, vlan.control)),
            layer2: self.layer2.as_deref(),
            conntrack: self.conntrack.as_deref(),
            expectation: self.expectation.as_deref(),
        }
    }
}

impl Carried for Box<Extra> {
    type Waiter = Confirmer;

    fn take_waiter(&mut self) -> Option<Confirmer> {
        self.confirm.take()
    }

    fn put_waiter(&mut self, waiter: Confirmer) {
        self.confirm = Some(waiter);
    }
}

/// Where the kernel's answer to one message goes.
pub(crate) type Confirmer = oneshot::Sender<Result<(), Error>>;
pub(crate) type Answer = oneshot::Receiver<Result<(), Error>>;

#[derive(Debug)]
pub(super) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// The settings that outlive `bind`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) queue: u16,
    /// The receive buffer asked for, in bytes; `None` for one that holds a full queue.
    pub(crate) receive_buffer: Option<usize>,
    pub(crate) on_unanswered: Action,
    pub(crate) deadline: Option<(Duration, Action)>,
    pub(crate) close_timeout: Duration,
    /// How long the stream is polled again before it sleeps; zero for not at all.
    pub(crate) busy_poll: Duration,
    /// Connection tracking was asked for.
    #[cfg_attr(not(feature = "conntrack"), expect(dead_code))]
    pub(crate) conntrack: bool,
    /// Bytes of attributes that may come beside a payload.
    pub(crate) attributes: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) settings: Settings,
    pub(super) socket: Socket,
    pub(super) table: KernelTable,
    pub(super) outbox: Mutex<Outbox>,
    pub(super) inbox: Mutex<Inbox>,
    core: Mutex<Core>,
    /// Wakes the driver. Apart, so that the driver can wait without keeping the queue alive.
    pub(super) signal: Arc<Notify>,
    /// Set once at bind; needs what it is a part of.
    pub(super) timer: OnceLock<Timer>,
    /// Whether the timer has been asked to watch the socket before.
    pub(super) watched: AtomicBool,
    /// The number of the last message whose send has returned. Written after the send, and read before the socket is found
    /// empty: what the kernel has answered by then has been received.
    pub(super) last_sent: AtomicU32,
    /// For loops that wait for a descriptor.
    pub(super) foreign: OnceLock<Foreign>,
    pub(super) trace: Trace,
    /// Of the socket's network namespace.
    pub(super) network_owner: Owner,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) machine: Machine<Box<Extra>, SystemClock>,
    pub(super) stream: Option<Waker>,
    /// Those who wait for everything to be sent, or for the queue to be closed.
    pub(super) waiting: Vec<Waker>,
    /// Those who wait for refusals.
    pub(super) refusals: Vec<Waker>,
}

/// What users' code is to be told.
#[derive(Debug, Default)]
struct News {
    wakers: Vec<Waker>,
    events: Vec<Event<Box<Extra>>>,
}

impl Core {
    /// Has somebody woken when everything was sent, or the queue is closed. A waker that is there already comes back, to be
    /// dropped without the lock.
    pub(super) fn wait(&mut self, waker: Waker) -> Option<Waker> {
        if self.waiting.iter().any(|other| other.will_wake(&waker)) {
            return Some(waker);
        }
        self.waiting.push(waker);
        None
    }

    fn news(&mut self, todo: &Todo) -> News {
        let events = self.machine.take_events();
        let mut wakers = Vec::new();
        if todo.wake_stream {
            wakers.extend(self.stream.take());
        }
        if todo.wake_waiting {
            wakers.append(&mut self.waiting);
        }
        if todo.wake_refusals {
            wakers.append(&mut self.refusals);
        }
        News { wakers, events }
    }
}

impl Shared {
    pub(super) fn new(
        settings: Settings,
        socket: Socket,
        table: KernelTable,
        machine: Machine<Box<Extra>, SystemClock>,
        inbox: Inbox,
        network_owner: Owner,
    ) -> Self {
        let core = Core { machine, stream: None, waiting: Vec::new(), refusals: Vec::new() };
        Self {
            outbox: Mutex::new(Outbox::new(socket.max_send())),
            inbox: Mutex::new(inbox),
            core: Mutex::new(core),
            signal: Arc::new(Notify::new()),
            timer: OnceLock::new(),
            watched: AtomicBool::new(false),
            last_sent: AtomicU32::new(0),
            foreign: OnceLock::new(),
            trace: Trace::new(settings.queue),
            network_owner,
            settings,
            socket,
            table,
        }
    }

    /// For who holds `outbox` or `inbox`, or only looks; others go by [`with`](Self::with).
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// Has something done under the lock, and carries out what comes of it. No lock may be held.
    pub(super) fn with<R>(&self, body: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.core();
        let result = body(&mut core);
        if !core.machine.is_busy() {
            return result;
        }
        let todo = core.machine.todo();
        let news = core.news(&todo);
        drop(core);
        self.carry_out(todo, news);
        result
    }

    /// Carries out what was left to do under another lock. No lock may be held.
    pub(super) fn attend(&self) {
        self.with(|_| ());
    }

    fn carry_out(&self, todo: Todo, news: News) {
        let Todo { flush, call_driver, alarm, ask, look, watch, unbind, drain, probe, .. } = todo;
        if let (Some(at), Some(timer)) = (alarm, self.timer.get()) {
            timer.set(at);
        }
        if call_driver {
            self.signal.notify_one();
        }
        if probe {
            self.probe();
        }
        if flush {
            self.flush();
        }
        if unbind {
            self.unbind();
        }
        if let Some(action) = drain {
            self.drain_queued(action);
        }
        if look {
            self.look_for_unread();
        }
        if watch {
            self.watch_socket();
        }
        if let Some(ask) = ask {
            self.ask(*ask);
        }
        news.wakers.into_iter().for_each(Waker::wake);
        for event in news.events {
            match event {
                Event::Answer(confirmer, result) => drop(confirmer.send(result)),
                Event::Report(report) => self.trace.report(report),
                Event::Spent(extra) => drop(extra),
            }
        }
    }

    /// After the send lock has been released; true if another round is wanted.
    pub(super) fn send_lock_released(&self) -> bool {
        let mut core = self.core();
        let mut again = core.machine.send_lock_released();
        let mut todo = core.machine.todo();
        let news = core.news(&todo);
        drop(core);
        // Not by way of a call within a call.
        again |= std::mem::take(&mut todo.flush);
        self.carry_out(todo, news);
        again
    }

    /// Finds out whether the calling thread may send, where that was missing.
    pub(super) fn probe(&self) {
        let permitted = sys::has_net_admin();
        self.with(|core| match permitted {
            true => core.machine.permitted(),
            false => core.machine.still_missing(),
        });
    }

    /// Asks the user's policy. If it panics, the default one takes its place.
    fn ask(&self, (mut policy, gathered): (crate::FlushPolicy, crate::Gathered)) {
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| policy.when(&gathered)));
        match asked {
            Ok(flush) => self.with(|core| core.machine.asked(policy, flush, &gathered)),
            Err(panic) => {
                self.with(|core| core.machine.policy_panicked());
                // The payload of a panic may panic itself when it is dropped.
                std::mem::forget(panic);
                let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(policy)));
                std::mem::forget(dropped);
            }
        }
    }

    /// Takes an owner's decision; it is sent when the policy says so. A decision that comes too late is told by
    /// `refusals`.
    pub(crate) fn decide(&self, id: u32, decision: Decision<Box<Extra>>) {
        let late = self.with(|core| {
            let late = core.machine.decide(id, decision).err();
            if late.is_some() {
                core.machine.tell_late(id);
            }
            late
        });
        // A payload may be users' code to drop.
        drop(late);
    }

    /// Takes an owner's decision and sends it at once; the kernel's answer goes to the receiver.
    pub(crate) fn decide_confirmed(&self, id: u32, mut decision: Decision<Box<Extra>>) -> Answer {
        let (confirmer, answer) = oneshot::channel();
        decision.extra.get_or_insert_default().confirm = Some(confirmer);
        let late = self.with(|core| {
            let late = core.machine.decide(id, decision).err();
            core.machine.flush();
            late
        });
        if let Some(confirmer) = late.and_then(|decision| decision.extra?.confirm) {
            let error = Error::new(ErrorKind::Expired, "confirm verdict").with_packet(PacketId(id));
            drop(confirmer.send(Err(error)));
        }
        answer
    }

    /// Answers for a packet whose owner has gone.
    pub(crate) fn abandoned(&self, id: u32) {
        self.with(|core| core.machine.abandon(id));
    }

    /// A packet's memory has been given back.
    pub(crate) fn detached(&self, id: u32) {
        self.core().machine.detached(id);
    }

    pub(crate) fn is_undecided(&self, id: u32) -> bool {
        self.core().machine.is_undecided(id)
    }

    pub(crate) fn stats(&self) -> Stats {
        let stats = self.core().machine.stats();
        Stats { receive_buffer: self.socket.receive_buffer(), ..stats }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.core().machine.life() != Life::Open
    }

    /// The error of a thing that cannot be done because the queue has come to its end.
    pub(super) fn closed(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Closed, format!("{operation} {}", self.settings.queue))
    }
}

impl Timed for Shared {
    fn fire(self: Arc<Self>) {
        self.with(|core| core.machine.fire());
    }

    fn readable(self: Arc<Self>) {
        self.with(|core| core.machine.readable());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last handle is gone and with it the last packet: what is decided must still reach the kernel.
        self.with(|core| core.machine.flush());
        self.signal.notify_one();
        crate::socket::forget_port(self.socket.port_id());
    }
}

/// Locks, whatever a panicking holder may have left: no code but this crate's runs under these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
