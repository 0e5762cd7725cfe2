//! The whole logic of a queue, without sockets, locks, wakers or a runtime. Events come in as
//! method calls; what must be done comes out as effects. It reads the time from a clock that it is
//! given, and only when it needs the time.
//!
//! | event | method |
//! |---|---|
//! | packets were received | [`Machine::arrived`] |
//! | a packet message could not be parsed | [`Machine::malformed`] |
//! | the kernel replied to a message | [`Machine::replied`] |
//! | the socket was found empty | [`Machine::socket_empty`] |
//! | a verdict was submitted, a packet was dropped | [`Machine::decide`], [`Machine::abandon`] |
//! | a thread has the send lock | [`Machine::poll_transmit`] and [`Machine::transmitted`], in turn; then [`Machine::send_lock_released`] |
//! | time passed, the ready tasks have run | [`Machine::fire`], [`Machine::tasks_ran`] |
//! | the queue is closed | [`Machine::begin_close`], [`Machine::stopped`], [`Machine::unbound`] |
//! | the queue is handed over | [`Machine::begin_hand_over`], [`Machine::freeze`], [`Machine::release`] or [`Machine::resume`] |
//! | the queue is taken over | [`Machine::inherit`] |
//!
//! The caller takes [`Effects`] and [`Notice`]s under the lock, and carries them out after
//! releasing it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    types::{Action, Error, FillCounter, Stats},
    wire::verdict::{Attachments, VerdictFields},
};

mod arrivals;
mod awaiting;
mod effects;
pub mod flush;
mod gathering;
mod handover;
pub mod ledger;
mod life_cycle;
mod memory;
#[cfg(test)]
mod model;
mod outbox;
mod outstanding;
mod permission;
mod receive_rounds;
mod recv;
mod replies;
mod reports;
mod send;
mod send_rounds;
mod shutdown;
mod timer;
mod unproven;
mod verdicts;

use self::{
    arrivals::Arrivals, awaiting::Awaited, flush::FlushPolicy, gathering::Gathering, ledger::Ledger, life_cycle::Life,
    outstanding::Outstanding, permission::Permission, receive_rounds::ReceiveRounds, reports::Reports,
    send_rounds::SendRounds, unproven::Verdict,
};
pub use self::{
    effects::{Alarm, Effects, Notice},
    handover::Position,
    ledger::{Decision, Origin, VerdictMessage},
    life_cycle::{Binding, Hold, LifeCycle, WaitLimit},
    memory::Storage,
    outbox::Outbox,
    reports::{Report, ReportKind},
    send::{Outcome, Transmit},
    unproven::Proof,
};

/// The source of the time.
pub trait Clock {
    /// The time now. It never decreases.
    fn now(&self) -> Instant;
}

/// What a verdict for a single packet carries besides its fields, including what waits for the
/// kernel's reply.
pub trait Carried {
    /// What waits for the kernel's reply.
    type Waiter;
    /// What the verdict carries, for its message.
    fn attachments(&self) -> Attachments<'_>;
    /// Whether a task waits, or has waited: the kernel replies also on success.
    fn is_acknowledged(&self) -> bool;
    /// Takes out what waits, if anything does.
    fn take_waiter(&mut self) -> Option<Self::Waiter>;
    /// Puts back a waiter that was taken out: the verdict was not sent.
    fn put_waiter(&mut self, waiter: Self::Waiter);
}

/// The settings that do not change while the queue is bound.
#[derive(Debug, Clone, Copy)]
pub struct FixedSettings {
    /// The number of the queue.
    pub queue: u16,
    /// The default action: for packets that their owners drop undecided.
    pub on_unanswered: Action,
    /// The action for packets that are undecided this long after they were received.
    pub deadline: Option<(Duration, Action)>,
    /// Whether verdicts are sent in the order of their submission, not of the ids.
    pub in_submission_order: bool,
}

/// The limits in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many packets the kernel queues at most.
    pub max_len: u32,
    /// The longest payload of a message, in bytes.
    pub payload: usize,
}

impl Limits {
    /// The limits once the kernel has carried out a change.
    pub fn after(self, change: Change) -> Self {
        Self { max_len: change.max_len.unwrap_or(self.max_len), payload: change.payload.unwrap_or(self.payload) }
    }

    /// The higher value of each.
    fn highest(self, other: Self) -> Self {
        Self { max_len: self.max_len.max(other.max_len), payload: self.payload.max(other.payload) }
    }
}

/// A change of the limits by a configuration message. What is `None` stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// How many packets the kernel queues at most.
    pub max_len: Option<u32>,
    /// The longest payload of a message, in bytes.
    pub payload: Option<usize>,
}

/// One received packet.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// The packet id.
    pub id: u32,
    /// The memory that it keeps allocated.
    pub storage: Storage,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Machine<E: Carried, K> {
    settings: FixedSettings,
    limits: Limits,
    clock: K,
    life: Life,
    ledger: Ledger<E>,
    gathering: Gathering,
    rounds: SendRounds,
    outstanding: Outstanding<E::Waiter>,
    receiving: ReceiveRounds,
    permission: Permission,
    arrivals: Arrivals,
    fill: FillCounter,
    counters: Stats,
    /// For the log.
    reports: Reports,
    /// For [`next_refusal`](Machine::next_refusal).
    refusals: VecDeque<Error>,
    /// With which the stream ends.
    failure: Option<Error>,
    /// For the first caller that waits for the graceful shutdown.
    close_error: Option<Error>,
    /// When [`fire`](Machine::fire) is called next.
    alarm: Alarm,
    effects: Effects,
    notices: Vec<Notice<E>>,
}

/// The first and the longest pause between attempts to send after a refusal or a failure. Each
/// pause is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

impl<E: Carried, K: Clock> Machine<E, K> {
    /// A queue that has just been bound. `first` is the packet id that is expected first: 1 for a
    /// new queue.
    pub fn new(settings: FixedSettings, policy: FlushPolicy, limits: Limits, first: u32, clock: K) -> Self {
        let mut ledger = Ledger::new(first);
        if settings.in_submission_order {
            ledger.keep_order();
        }
        Self {
            settings,
            limits,
            clock,
            life: Life::new(),
            ledger,
            gathering: Gathering::new(policy),
            rounds: SendRounds::default(),
            outstanding: Outstanding::new(),
            receiving: ReceiveRounds::new(),
            permission: Permission::default(),
            arrivals: Arrivals::new(settings.deadline.map(|(after, _)| after)),
            fill: FillCounter::default(),
            counters: Stats::default(),
            reports: Reports::default(),
            refusals: VecDeque::new(),
            failure: None,
            close_error: None,
            alarm: Alarm::default(),
            effects: Effects::NOTHING,
            notices: Vec::new(),
        }
    }

    // Effects.

    /// Whether there are effects or notices.
    pub fn has_effects(&self) -> bool {
        !self.effects.is_nothing() || !self.notices.is_empty()
    }

    /// Takes the effects.
    pub fn take_effects(&mut self) -> Effects {
        std::mem::replace(&mut self.effects, Effects::NOTHING)
    }

    /// Takes the notices.
    pub fn take_notices(&mut self) -> Vec<Notice<E>> {
        std::mem::take(&mut self.notices)
    }

    /// Has [`fire`](Self::fire) called at this time or before. It may also be called earlier
    /// without need.
    fn set_timer(&mut self, at: Instant) {
        if self.alarm.at.is_none_or(|alarm| at < alarm) {
            self.change_timer(Some(at));
        }
    }

    fn change_timer(&mut self, at: Option<Instant>) {
        self.alarm = Alarm { at, number: self.alarm.number + 1 };
        self.effects.timer = Some(self.alarm);
    }

    /// There are packets for the stream.
    pub fn wake_stream(&mut self) {
        self.effects.wake_stream = true;
    }

    fn request_flush(&mut self) {
        self.rounds.want();
        self.effects.flush = true;
    }

    fn note(&mut self, kind: ReportKind, count: u64, packet: Option<u32>) {
        let now = self.clock.now();
        match self.reports.note(kind, count, packet, now) {
            Some(report) => self.notices.push(Notice::Report(report)),
            None => {
                if let Some(at) = self.reports.pending() {
                    self.set_timer(at);
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.ledger.undecided() + self.ledger.gathered() + self.rounds.leaving()
    }

    /// How many packets the kernel has dropped while they were queued: they arrived, no verdict was
    /// sent before, and the first one found nothing. Those of a batch that found others are not
    /// known.
    pub fn dropped_while_queued(&self) -> u64 {
        self.outstanding.dropped()
    }

    /// The limits in force, as far as they are known.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The limits once the kernel has carried out the configuration messages whose replies are
    /// awaited. If there are several, it may carry out some and refuse others: then the highest
    /// value of each.
    pub fn highest_limits(&self) -> Limits {
        self.outstanding.highest_limits(self.limits)
    }

    /// The counters now. `limits.receive_buffer` is left 0.
    pub fn stats(&self) -> Stats {
        let mut stats = self.counters;
        stats.held.in_flight = self.in_flight();
        stats.held.fill = self.fill.fill();
        stats.held.bytes = self.ledger.bytes();
        if self.ledger.undecided() > 0 {
            stats.held.oldest_undecided = self.arrivals.age(self.ledger.oldest(), self.clock.now());
        }
        stats.limits.max_len = self.limits.max_len;
        stats
    }
}

/// The queue's own decision, which is only an action.
fn plain<E>(action: Action) -> Decision<E> {
    Decision { fields: VerdictFields::plain(action), extras: None, origin: Origin::Queue }
}
