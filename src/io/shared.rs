//! What the handles of one queue share: its state, its socket, and the locks around them. Locks are
//! always taken in this order:
//!
//! | lock | held while | by |
//! |---|---|---|
//! | `outbox`, the send lock | messages are encoded and sent; within a send the kernel processes the packets, 100 µs for 64 | threads that flush or configure. One that finds it taken by a flush leaves its verdicts to the holder |
//! | `receiver` | datagrams are received and parsed, about 50 µs at most | the stream, and callers that wait for a reply of the kernel |
//! | `core` | the state changes, well below 1 µs | every caller |
//!
//! Users' code (wakers, subscribers, policies, drops of payloads) runs under none of them. So the
//! effects that the state asks for are performed after the lock has been released:
//! [`Shared::with`]. A thread that holds `outbox` or `receiver` postpones them until these are
//! released as well: [`Shared::perform_pending`].

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
    time::Duration,
};

use futures::channel::oneshot;
use tokio::sync::Notify;

use super::{
    clock::QueueClock,
    extras::VerdictExtras,
    kernel::{KernelStats, KernelTable},
    ready_fd::ReadyFd,
    receiver::Receiver,
    socket::{self, Socket},
    sys::{self, Owner},
    tallies::{HandedOut, LastSent},
    timer::{Timer, TimerTarget},
    trace::Trace,
    wakers::Wakers,
};
use crate::{
    state::{
        Carried, Decision, Effects, FixedSettings, Hold, Machine, Notice, Outbox,
        flush::{FlushContext, FlushPolicy},
    },
    types::{Action, Error, ErrorKind, FlowMarks, PacketId, Stats},
};

/// The settings that are needed after `bind`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) queue: u16,
    /// The receive buffer that `bind` requests, in bytes; `None` for one that holds a full queue.
    pub(crate) receive_buffer: Option<usize>,
    pub(crate) on_unanswered: Action,
    pub(crate) deadline: Option<(Duration, Action)>,
    pub(crate) close_timeout: Duration,
    /// How long to busy-poll; zero for not at all.
    pub(crate) busy_poll: Duration,
    /// Connection tracking entries were requested.
    pub(crate) conntrack: bool,
    /// Bytes of optional attributes in a message.
    pub(crate) attributes: usize,
    pub(crate) flow_marks: Option<FlowMarks>,
    pub(crate) in_submission_order: bool,
    /// The queue has rules that fail closed.
    pub(crate) fail_closed: bool,
}

impl Settings {
    /// What the state knows of them.
    pub(super) fn fixed(&self) -> FixedSettings {
        FixedSettings {
            queue: self.queue,
            on_unanswered: self.on_unanswered,
            deadline: self.deadline,
            in_submission_order: self.in_submission_order,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) settings: Settings,
    pub(super) socket: Socket,
    pub(super) clock: QueueClock,
    pub(super) table: KernelTable,
    pub(super) outbox: Mutex<Outbox<Box<VerdictExtras>>>,
    pub(super) receiver: Mutex<Receiver>,
    core: Mutex<Core>,
    /// Wakes the driver. In an `Arc` of its own, so that the driver can wait without keeping the
    /// queue alive.
    pub(super) signal: Arc<Notify>,
    /// Set once by `bind`, because the timer refers to this struct.
    pub(super) timer: OnceLock<Timer>,
    /// The process that used the queue last: [`sys::process`].
    process: AtomicUsize,
    pub(super) last_sent: LastSent,
    pub(super) hold: Hold,
    pub(super) handed_out: HandedOut,
    /// For event loops that wait for a descriptor.
    pub(super) ready_fd: OnceLock<ReadyFd>,
    pub(super) trace: Trace,
    /// The owner of the socket's network namespace.
    pub(super) network_owner: Owner,
    /// The size of the receive buffer that was requested, last; 0 if it follows from the limits. It
    /// is written under the send lock.
    pub(super) requested_buffer: AtomicUsize,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) machine: Machine<Box<VerdictExtras>, QueueClock>,
    pub(super) wakers: Wakers,
}

/// What must be delivered to users' code.
#[derive(Debug, Default)]
struct Pending {
    wakers: Vec<Waker>,
    notices: Vec<Notice<Box<VerdictExtras>>>,
}

impl Core {
    fn pending(&mut self, effects: &Effects) -> Pending {
        Pending { wakers: self.wakers.take(effects), notices: self.machine.take_notices() }
    }
}

impl Shared {
    pub(super) fn new(
        settings: Settings,
        socket: Socket,
        table: KernelTable,
        machine: Machine<Box<VerdictExtras>, QueueClock>,
        receiver: Receiver,
        network_owner: Owner,
    ) -> Self {
        let mut machine = machine;
        machine.set_receive_buffer(socket.receive_buffer());
        let hold = machine.hold().clone();
        let core = Core { machine, wakers: Wakers::default() };
        Self {
            outbox: Mutex::new(Outbox::new(settings.queue, socket.max_send())),
            receiver: Mutex::new(receiver),
            core: Mutex::new(core),
            signal: Arc::new(Notify::new()),
            timer: OnceLock::new(),
            process: sys::process().into(),
            last_sent: LastSent::default(),
            hold,
            handed_out: HandedOut::default(),
            ready_fd: OnceLock::new(),
            trace: Trace::new(settings.queue),
            network_owner,
            requested_buffer: settings.receive_buffer.unwrap_or(0).into(),
            settings,
            clock: socket.clock(),
            socket,
            table,
        }
    }

    /// Starts the timer of a queue that has been bound or taken over.
    ///
    /// # Errors
    /// The timer thread cannot be started.
    pub(super) fn start_timer(self: &Arc<Self>) -> io::Result<()> {
        let timed: Weak<Self> = Arc::downgrade(self);
        let _ = self.timer.set(Timer::new(timed as Weak<dyn TimerTarget>, &self.clock)?);
        Ok(())
    }

    /// For callers that hold `outbox` or `receiver`, or only read. Others use [`with`](Self::with).
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// Runs `body` under the lock, and performs the effects after releasing it. The caller must
    /// hold no lock.
    pub(super) fn with<R>(&self, body: impl FnOnce(&mut Core) -> R) -> R {
        self.look_for_fork();
        let mut core = self.core();
        let result = body(&mut core);
        if !core.machine.has_effects() {
            return result;
        }
        let effects = core.machine.take_effects();
        let pending = core.pending(&effects);
        drop(core);
        self.perform(effects, pending);
        result
    }

    /// In a child by `fork`, at the first use of the queue: the timer thread and the threads that
    /// were about to perform effects have stayed in the parent. The caller must hold no lock.
    #[inline]
    pub(super) fn look_for_fork(&self) {
        let process = sys::process();
        if self.process.load(Ordering::Relaxed) != process {
            self.forked(process);
        }
    }

    #[cold]
    fn forked(&self, process: usize) {
        if self.process.swap(process, Ordering::Relaxed) != process {
            self.with(|core| core.machine.forked());
        }
    }

    /// Performs effects that were postponed. The caller must hold no lock.
    pub(super) fn perform_pending(&self) {
        self.with(|_| ());
    }

    fn perform(&self, effects: Effects, pending: Pending) {
        let Effects {
            flush,
            call_driver,
            timer,
            ask,
            look,
            watch,
            unbind,
            drain,
            probe,
            wake_stream,
            wake_waiting: _,
            wake_refusals: _,
        } = effects;
        if let (Some(alarm), Some(timer)) = (timer, self.timer.get()) {
            timer.set(alarm);
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
            self.drain(action);
        }
        if look {
            self.receive_unread();
        }
        if watch {
            self.watch_socket();
        }
        if let Some(ask) = ask {
            self.ask(*ask);
        }
        if let Some(ready_fd) = self.ready_fd.get().filter(|_| wake_stream) {
            ready_fd.raise();
        }
        pending.wakers.into_iter().for_each(Waker::wake);
        for notice in pending.notices {
            match notice {
                Notice::Reply(waiter, result) => drop(waiter.send(result)),
                Notice::Report(report) => self.trace.report(report),
                Notice::Spent(extras) => drop(extras),
            }
        }
    }

    /// Called after the send lock has been released. Returns true if another round is wanted.
    pub(super) fn send_lock_released(&self) -> bool {
        let mut core = self.core();
        let mut again = core.machine.send_lock_released();
        let mut effects = core.machine.take_effects();
        let pending = core.pending(&effects);
        drop(core);
        // Returned instead of performed here, to avoid recursion.
        again |= std::mem::take(&mut effects.flush);
        self.perform(effects, pending);
        again
    }

    /// Checks whether the calling thread has the capability, after it was missing.
    pub(super) fn probe(&self) {
        let permitted = self.is_capable();
        self.with(|core| match permitted {
            true => core.machine.permitted(),
            false => core.machine.still_missing(),
        });
    }

    /// Calls a custom policy. If it panics, the default policy replaces it.
    fn ask(&self, (mut policy, context): (FlushPolicy, FlushContext)) {
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| policy.decide(&context)));
        match asked {
            Ok(decision) => self.with(|core| core.machine.policy_decided(policy, decision, &context)),
            Err(panic) => {
                self.with(|core| core.machine.policy_panicked());
                // Both may panic when they are dropped, with payloads that may do so again.
                let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(panic)));
                std::mem::forget(dropped);
                let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(policy)));
                std::mem::forget(dropped);
            }
        }
    }

    /// Takes the decision of a packet's owner; the policy says when it is sent. `refusals` reports
    /// a decision that comes too late.
    pub(crate) fn decide(&self, id: u32, decision: Decision<Box<VerdictExtras>>) {
        let late = self.with(|core| {
            let late = core.machine.decide(id, decision).err();
            if late.is_some() {
                core.machine.report_late(id);
            }
            self.given_back(core);
            late
        });
        // Dropping a payload may run users' code.
        drop(late);
    }

    /// Takes the decision of a packet's owner and sends it at once. The returned receiver gets the
    /// kernel's reply.
    pub(crate) fn decide_confirmed(
        &self,
        id: u32,
        mut decision: Decision<Box<VerdictExtras>>,
    ) -> oneshot::Receiver<Result<(), Error>> {
        let (waiter, reply) = oneshot::channel();
        decision.extras.get_or_insert_default().confirm(waiter);
        let late = self.with(|core| {
            let late = core.machine.decide(id, decision).err();
            core.machine.flush();
            self.given_back(core);
            late
        });
        if let Some(waiter) = late.and_then(|decision| decision.extras?.take_waiter()) {
            let error = Error::new(ErrorKind::Expired, "confirm verdict").with_packet(PacketId::new(id));
            drop(waiter.send(Err(error)));
        }
        reply
    }

    /// Reports an error about a verdict.
    pub(crate) fn report(&self, error: Error) {
        self.with(|core| core.machine.report(error));
    }

    /// The owner of a packet has dropped it.
    pub(crate) fn abandoned(&self, id: u32) {
        self.with(|core| {
            core.machine.abandon(id);
            self.given_back(core);
        });
    }

    /// A packet that was handed out has come back: with the last one of a closed queue, the streams
    /// of refusals end.
    fn given_back(&self, core: &mut Core) {
        self.handed_out.come_back();
        if core.machine.life().is_closed() && !self.handed_out.is_any_held() {
            core.machine.wake_refusals();
        }
    }

    /// The memory of a packet has been freed.
    pub(crate) fn detached(&self, id: u32) {
        self.core().machine.detached(id);
    }

    pub(crate) fn is_undecided(&self, id: u32) -> bool {
        self.core().machine.is_undecided(id)
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = self.core().machine.stats();
        stats.limits.receive_buffer = self.socket.receive_buffer();
        stats
    }

    /// See [`Machine::dropped_while_queued`].
    pub(crate) fn dropped_while_queued(&self) -> u64 {
        self.core().machine.dropped_while_queued()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.core().machine.life().has_ended()
    }

    pub(crate) fn interface_name(&self, index: u32) -> Result<String, Error> {
        self.socket.interface_name(index)
    }

    /// Whether the queue was bound with connection tracking, which proves that the kernel supports
    /// it.
    #[cfg(feature = "conntrack")]
    pub(crate) fn has_conntrack(&self) -> bool {
        self.settings.conntrack
    }

    pub(crate) fn number(&self) -> u16 {
        self.settings.queue
    }

    pub(crate) fn on_unanswered(&self) -> Action {
        self.settings.on_unanswered
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        self.settings.close_timeout
    }

    /// Why the kernel takes no replaced payload in this network namespace, if it takes none.
    pub(super) fn payload_obstacle(&self) -> Option<&'static str> {
        if self.socket.is_in_memory() { None } else { super::kernel::payload_obstacle(self.network_owner) }
    }

    /// As `payload_obstacle`, for packets of the bridge family.
    pub(super) fn bridge_payload_obstacle(&self) -> Option<&'static str> {
        if self.socket.is_in_memory() { None } else { super::kernel::bridge_payload_obstacle() }
    }

    /// The kernel's own counters of the queue.
    pub(crate) fn kernel_stats(&self) -> Result<KernelStats, Error> {
        self.bound_kernel_stats()?.ok_or_else(|| self.closed("read statistics of queue"))
    }

    /// As [`kernel_stats`](Self::kernel_stats); `None` if the queue is not bound any more.
    pub(crate) fn bound_kernel_stats(&self) -> Result<Option<KernelStats>, Error> {
        #[cfg(feature = "test-util")]
        if let Some(stats) = self.socket.stats_in_memory(self.settings.queue) {
            return Ok(stats);
        }
        self.table.read(self.settings.queue)
    }

    /// The error of an operation on a closed queue.
    pub(super) fn closed(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Closed, format!("{operation} {}", self.settings.queue))
    }
}

impl TimerTarget for Shared {
    fn fire(self: Arc<Self>) {
        let overdue = self.core().machine.overdue_while_stopping();
        match overdue {
            Some(_) => self.fire_while_stopping(),
            None => self.with(|core| core.machine.fire()),
        }
    }

    fn readable(self: Arc<Self>) {
        self.with(|core| core.machine.readable());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last handle and the last packet have been dropped. The gathered verdicts must still
        // reach the kernel.
        self.with(|core| core.machine.flush());
        self.signal.notify_one();
        socket::forget_port(self.socket.port_id());
    }
}

/// Locks even after a panic: only this crate's code runs under these locks.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
