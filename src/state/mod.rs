//! A queue's whole logic, without a socket, a lock, a waker or a runtime: what happens comes in, what is to be done goes
//! out. It reads the time from a clock that it is given, and only where it needs it.
//!
//! | comes in | method |
//! |---|---|
//! | packets were received | [`Machine::arrived`] |
//! | a packet could not be understood | [`Machine::malformed`] |
//! | the kernel answered a message | [`Machine::answered`] |
//! | the socket was found empty | [`Machine::emptied`] |
//! | a verdict was given, a packet was abandoned | [`Machine::decide`], [`Machine::abandon`] |
//! | a datagram was sent, refused, or not sent | [`Machine::sent`], [`Machine::refused`], [`Machine::unsent`] |
//! | time passed, a scheduler pass ended | [`Machine::fire`], [`Machine::pass_ended`] |
//! | the queue is to end | [`Machine::begin_close`], [`Machine::stopped`], [`Machine::unbound`] |
//!
//! What is to be done is in [`Machine::todo`], and once the lock is released in [`Machine::take_events`].

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    Action, Error, ErrorKind, Flush, FlushPolicy, Gathered, Occasion, PacketId, Stats,
    stats::FillCounter,
    wire::{
        Answer,
        message::Refused,
        verdict::{Ruling, action_of},
    },
};

mod awaiting;
mod held;
pub(crate) mod ledger;
#[cfg(test)]
mod model;
mod report;
mod times;

use self::{
    awaiting::{Awaited, Awaiting, SentBatches},
    held::Held,
    ledger::{Ledger, NO_TOKEN, NotInFlight},
    report::Reports,
    times::{Arrivals, Deadlines},
};
pub(crate) use self::{
    held::Place,
    ledger::{Decision, Origin, Settlement},
    report::{Kind, Report},
};

/// Where the time comes from.
pub(crate) trait Clock {
    fn now(&self) -> Instant;
}

/// What a single verdict carries beside its ruling, and with it whoever waits for the kernel's answer.
pub(crate) trait Carried {
    type Waiter;
    fn take_waiter(&mut self) -> Option<Self::Waiter>;
    fn put_waiter(&mut self, waiter: Self::Waiter);
}

/// What does not change while the queue is bound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) queue: u16,
    pub(crate) on_unanswered: Action,
    pub(crate) deadline: Option<(Duration, Action)>,
}

/// The limits in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) max_len: u32,
    /// Bytes of payload that a message may carry.
    pub(crate) payload: usize,
}

/// A change of limits that a configuration message carries. What is `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Change {
    pub(crate) max_len: Option<u32>,
    pub(crate) payload: Option<usize>,
}

/// Where a queue is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    /// No packet is handed out any more. The kernel is being told to queue no more.
    Stopping {
        action: Action,
        limit: Limit,
    },
    /// Nothing can be queued any more, and all that was has been received. Verdicts that are owed are awaited.
    Waiting {
        action: Action,
        limit: Limit,
    },
    /// Everything is settled; somebody is unbinding the queue.
    Unbinding,
    Closed,
}

/// How long owed verdicts are awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// For ever: the queue was dropped, and its packets are still held.
    Never,
    At(Instant),
    /// The time is over: every packet has been answered for.
    Over,
}

impl Limit {
    /// The earlier of the two.
    fn tighten(self, other: Self) -> Self {
        match (self, other) {
            (Self::Over, _) | (_, Self::Over) => Self::Over,
            (Self::Never, limit) | (limit, Self::Never) => limit,
            (Self::At(one), Self::At(another)) => Self::At(one.min(another)),
        }
    }
}

/// Whether the kernel lets this process send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permission {
    Held,
    /// A verdict was refused for want of the capability. The pause grows from one attempt to the next.
    Missing {
        since: Instant,
        next: Instant,
        pause: Duration,
    },
    /// It has been missing for so long that the stream has ended with an error.
    Lost,
}

/// What is to be done once the lock is released.
#[derive(Debug)]
pub(crate) struct Todo {
    /// Send what is gathered.
    pub(crate) flush: bool,
    /// Wake the task in the runtime.
    pub(crate) call_driver: bool,
    /// Have [`Machine::fire`] called at this time or before.
    pub(crate) alarm: Option<Instant>,
    /// Ask the user's own policy, and give it back by [`Machine::asked`].
    pub(crate) ask: Option<Box<(FlushPolicy, Gathered)>>,
    /// Receive: packets may have been waiting unread.
    pub(crate) look: bool,
    /// Have [`Machine::readable`] called when the socket is readable.
    pub(crate) watch: bool,
    /// Unbind the queue.
    pub(crate) unbind: bool,
}

impl Todo {
    const NOTHING: Self =
        Self { flush: false, call_driver: false, alarm: None, ask: None, look: false, watch: false, unbind: false };
}

/// What others are to be told once the lock is released.
#[derive(Debug)]
pub(crate) enum Event<E: Carried> {
    WakeStream,
    /// Those who wait for a flush or for the end.
    WakeWaiting,
    WakeRefusals,
    Answer(E::Waiter, Result<(), Error>),
    Report(Report),
    /// It is of no more use; to drop it may run users' code.
    Spent(E),
}

/// One received packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) id: u32,
    /// The memory it keeps alive.
    pub(crate) place: Place,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Machine<E: Carried, K> {
    rules: Rules,
    clock: K,
    ledger: Ledger<E>,
    life: Life,
    limits: Limits,
    /// `None` while the user's own is being asked, outside of the lock.
    policy: Option<FlushPolicy>,
    /// It is to be asked once more when it comes back, and why.
    ask_again: Option<Occasion>,
    /// Whether there is a task in a runtime to wait for. Without one every verdict is sent at once.
    driven: bool,
    /// When the oldest verdict not yet sent was given.
    oldest: Option<Instant>,
    /// When what is gathered is sent at the latest.
    due: Option<Instant>,
    /// Whether the socket, when last read, may have had more.
    backlog: bool,
    /// The driver has been called for the end of a scheduler pass.
    pass_end: bool,
    /// Somebody wants everything sent; whoever holds the send lock does it.
    flush_wanted: bool,
    /// Packets whose verdicts have left the ledger, and whose datagram is not begun.
    leaving: usize,
    /// Messages of the datagram that is being sent.
    begun: usize,
    /// A round of sending is under way.
    sending: bool,
    rounds_begun: u64,
    rounds_ended: u64,
    /// `rounds_begun` when the alarm last rang.
    rounds_at_alarm: u64,
    /// When the alarm rings.
    alarm: Option<Instant>,
    permission: Permission,
    /// First messages of datagrams that are known to have been refused; their answers say nothing new.
    known_refused: VecDeque<u32>,
    /// A send that is being watched, by the sequence number of its first message, and whether it was refused.
    watched: Option<(u32, bool)>,
    /// A refusal came although the capability was there: what a send did is only known from the answers to it.
    distrust: bool,
    /// When to send again after a failure, and the pause after the next one.
    retry: Option<(Instant, Duration)>,
    awaiting: Awaiting<E::Waiter>,
    sent_batches: SentBatches,
    /// Packet messages whose id could not be read, since the last id that could.
    unknown: u32,
    deadlines: Deadlines,
    arrivals: Arrivals,
    fill: FillCounter,
    held: Held,
    /// Rounds of receiving.
    receives: u64,
    /// When to look whether packets lie unread, and `receives` when the socket became readable.
    look: Option<(Instant, u64)>,
    /// An episode of loss to the receive buffer is under way.
    losing: bool,
    /// Nothing was missing from what was received last.
    lossless: bool,
    refusals: VecDeque<Error>,
    failure: Option<Error>,
    close_error: Option<Error>,
    counters: Stats,
    reports: Reports,
    todo: Todo,
    events: Vec<Event<E>>,
}

/// Refusals nobody reads are kept up to this number; older ones then give way, counted.
const MAX_REFUSALS: usize = 1024;
/// A delay asked for by a policy of the user's own is cut to this.
const LONGEST_DELAY: Duration = Duration::from_secs(1);
/// How long the capability must be missing until that counts as lasting.
const LASTING: Duration = Duration::from_secs(3);
/// Pauses between attempts to send after a refusal or a failure: from the first to the second, doubled each time.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));
/// A gap this wide is not searched for packets whose id could not be read.
const WIDEST_SEARCH: u32 = 65_536;
/// A datagram is answered at most once for each of its messages; so many refused ones are remembered.
const MAX_KNOWN_REFUSED: usize = 1024;

impl<E: Carried, K: Clock> Machine<E, K> {
    pub(crate) fn new(rules: Rules, policy: FlushPolicy, limits: Limits, first: u32, clock: K) -> Self {
        Self {
            rules,
            clock,
            ledger: Ledger::new(first),
            life: Life::Open,
            limits,
            policy: Some(policy),
            ask_again: None,
            driven: false,
            oldest: None,
            due: None,
            backlog: false,
            pass_end: false,
            flush_wanted: false,
            leaving: 0,
            begun: 0,
            sending: false,
            rounds_begun: 0,
            rounds_ended: 0,
            rounds_at_alarm: 0,
            alarm: None,
            permission: Permission::Held,
            known_refused: VecDeque::new(),
            watched: None,
            distrust: false,
            retry: None,
            awaiting: Awaiting::default(),
            sent_batches: SentBatches::default(),
            unknown: 0,
            deadlines: Deadlines::default(),
            arrivals: Arrivals::default(),
            fill: FillCounter::default(),
            held: Held::default(),
            receives: 0,
            look: None,
            losing: false,
            lossless: true,
            refusals: VecDeque::new(),
            failure: None,
            close_error: None,
            counters: Stats::default(),
            reports: Reports::default(),
            todo: Todo::NOTHING,
            events: Vec::new(),
        }
    }

    // What is to be done.

    /// Whether anything is to be done or told.
    pub(crate) fn is_busy(&self) -> bool {
        let Todo { flush, call_driver, alarm, ask, look, watch, unbind } = &self.todo;
        *flush | *call_driver | *look | *watch | *unbind || alarm.is_some() || ask.is_some() || !self.events.is_empty()
    }

    /// Takes what is to be done now.
    pub(crate) fn todo(&mut self) -> Todo {
        std::mem::replace(&mut self.todo, Todo::NOTHING)
    }

    /// Takes what others are to be told.
    pub(crate) fn take_events(&mut self) -> Vec<Event<E>> {
        std::mem::take(&mut self.events)
    }

    /// Sees to it that the alarm rings at this time or before. It may ring for an earlier wish that has lapsed.
    fn wish(&mut self, at: Instant) {
        if self.alarm.is_none_or(|alarm| at < alarm) {
            self.alarm = Some(at);
            self.todo.alarm = Some(at);
        }
    }

    /// There are packets for the stream.
    pub(crate) fn wake_stream(&mut self) {
        self.events.push(Event::WakeStream);
    }

    fn request_flush(&mut self) {
        self.flush_wanted = true;
        self.todo.flush = true;
    }

    fn note(&mut self, kind: Kind, count: u64, packet: Option<u32>) {
        let now = self.clock.now();
        match self.reports.note(kind, count, packet, now) {
            Some(report) => self.events.push(Event::Report(report)),
            None => {
                if let Some(at) = self.reports.pending() {
                    self.wish(at);
                }
            }
        }
    }

    // Packets.

    /// Takes in packets, in the order they were received. False if they have been answered for and are not to be handed
    /// out.
    pub(crate) fn arrived(&mut self, packets: impl Iterator<Item = Arrival> + Clone) -> bool {
        let Some(Arrival { id: first, .. }) = packets.clone().next() else { return true };
        let now = self.clock.now();
        self.arrivals.arrived(first, self.ledger.oldest(), now);
        let mut last = first;
        for Arrival { id, place } in packets.clone() {
            self.enter(id, place);
            last = id;
        }
        if let Some((after, _)) = self.rules.deadline {
            self.deadlines.arrived(first, last, now, after);
            if let Some(at) = self.deadlines.next() {
                self.wish(at);
            }
        }
        let in_flight = self.in_flight();
        self.fill.look(in_flight);
        self.counters.most_in_flight = self.counters.most_in_flight.max(in_flight);
        let action = match self.life {
            Life::Open => return true,
            Life::Stopping { action, .. } | Life::Waiting { action, .. } => action,
            Life::Unbinding | Life::Closed => self.rules.on_unanswered,
        };
        for Arrival { id, .. } in packets {
            let _ = self.decide_in_place(id, action);
        }
        false
    }

    fn enter(&mut self, id: u32, place: Place) {
        let token = self.held.enter(place);
        let missing = self.ledger.arrive(id, token);
        self.counters.received += 1;
        if missing > 0 {
            self.missing(id.wrapping_sub(missing), missing);
        }
        self.unknown = 0;
    }

    /// Ids that never came: lost to the receive buffer, or among them some whose message could not be understood.
    fn missing(&mut self, first: u32, count: u32) {
        let mut lost = count;
        if self.unknown > 0 {
            if count > WIDEST_SEARCH {
                self.ledger.forbid_batches();
            } else {
                // Which of them the kernel still holds is not known, so each gets a message of its own.
                for offset in 0..count {
                    let id = first.wrapping_add(offset);
                    if self.ledger.reopen(id, NO_TOKEN) {
                        self.counters.received += 1;
                        let _ = self.decide_in_place(id, self.rules.on_unanswered);
                    }
                }
                lost = 0;
            }
        }
        self.counters.lost += u64::from(lost);
        self.counters.gaps += u64::from(lost > 0);
    }

    /// A packet that cannot be shown to anybody. It is answered for, if it is known which.
    pub(crate) fn malformed(&mut self, id: Option<u32>) {
        self.counters.malformed += 1;
        self.note(Kind::Malformed, 1, id);
        let mut error = Error::new(ErrorKind::Malformed, "receive packet");
        match id {
            Some(id) => {
                error = error.with_packet(PacketId(id));
                self.enter(id, Place::Nowhere);
                let _ = self.decide_in_place(id, self.rules.on_unanswered);
                self.consult(Occasion::Decided);
            }
            None => self.unknown += 1,
        }
        self.tell(error);
    }

    /// A round of receiving is over. `bytes` and `overruns` are what it brought beside what was taken in one by one;
    /// with `emptied`, there was nothing more, after every message up to the one of this sequence number had been sent.
    pub(crate) fn received(&mut self, bytes: u64, overruns: u64, lost_before: u64, emptied: Option<u32>, more: bool) {
        self.receives += 1;
        self.backlog = more && emptied.is_none();
        self.counters.bytes += bytes;
        self.counters.overruns += overruns;
        self.lossless = overruns == 0 && self.counters.lost == lost_before;
        if !self.lossless && !self.losing {
            self.losing = true;
            self.counters.overrun_episodes += 1;
            self.note(Kind::Lost, self.counters.lost - lost_before, None);
        }
        if let Some(sent) = emptied {
            self.emptied(sent);
        }
    }

    /// The socket was found empty, after every message up to the one of this sequence number had been sent. An answer
    /// that has not come by now will not come.
    pub(crate) fn emptied(&mut self, sent: u32) {
        self.receives += 1;
        self.backlog = false;
        if self.lossless {
            self.losing = false;
        }
        self.sent_batches.forget(sent);
        while let Some(awaited) = self.awaiting.pop_sent(sent) {
            let (waiter, error) = match awaited {
                Awaited::Verdict { id, waiter } => {
                    (waiter, Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(PacketId(id)))
                }
                Awaited::Config { change, waiter, operation } => {
                    // It may have been applied: what the kernel sends may be as large as either says.
                    self.limits.payload = self.limits.payload.max(change.payload.unwrap_or(0));
                    (waiter, Error::new(ErrorKind::Unconfirmed, operation))
                }
            };
            self.events.push(Event::Answer(waiter, Err(error)));
        }
    }

    /// How many packets have been lost so far.
    pub(crate) fn lost(&self) -> u64 {
        self.counters.lost
    }

    /// The socket has become readable. Only asked for where packets have a deadline: nobody else may be reading.
    pub(crate) fn readable(&mut self) {
        let Some((after, _)) = self.rules.deadline else { return };
        let at = self.clock.now() + (after / 64).max(SHORTEST_LOOK);
        self.look = Some((at, self.receives));
        self.wish(at);
    }

    // Decisions.

    /// Takes an owner's decision; it is sent when the policy says so.
    ///
    /// # Errors
    /// The packet has been answered for.
    pub(crate) fn decide(&mut self, id: u32, decision: Decision<E>) -> Result<(), Decision<E>> {
        if !self.ledger.is_undecided(id) {
            self.counters.late += 1;
            self.note(Kind::Late, 1, Some(id));
            return Err(decision);
        }
        if let Ok(token) = self.ledger.decide(id, decision) {
            self.held.leave(token);
        }
        self.consult(Occasion::Decided);
        Ok(())
    }

    /// Whoever held a packet has dropped it.
    pub(crate) fn abandon(&mut self, id: u32) {
        if self.decide_in_place(id, self.rules.on_unanswered).is_ok() {
            self.note(Kind::Unanswered, 1, Some(id));
            self.consult(Occasion::Decided);
        }
    }

    /// Whoever holds a packet has given back its memory.
    pub(crate) fn detached(&mut self, id: u32) {
        if let Some(token) = self.ledger.exchange_token(id, NO_TOKEN) {
            self.held.leave(token);
        }
    }

    /// Answers for a packet in its owner's place, if that is still to be done.
    fn decide_in_place(&mut self, id: u32, action: Action) -> Result<(), NotInFlight> {
        let token = self.ledger.decide(id, plain(action))?;
        self.held.leave(token);
        self.counters.unanswered += 1;
        Ok(())
    }

    /// Answers for packets that nobody will take from the stream.
    pub(crate) fn answer_for(&mut self, ids: impl Iterator<Item = u32>, action: Action) {
        for id in ids {
            let _ = self.decide_in_place(id, action);
        }
    }

    pub(crate) fn is_undecided(&self, id: u32) -> bool {
        self.ledger.is_undecided(id)
    }

    /// Sends everything, as soon as the lock is released. Tells the round by whose end that has been done; `None` if
    /// there is nothing to send.
    pub(crate) fn flush(&mut self) -> Option<u64> {
        if self.ledger.gathered() == 0 {
            return self.sending.then_some(self.rounds_begun);
        }
        self.request_flush();
        Some(self.rounds_begun + 1)
    }

    /// Asks for a flush again if somebody has asked while the send lock was held for something else.
    pub(crate) fn flush_if_wanted(&mut self) {
        self.todo.flush |= self.flush_wanted;
    }

    pub(crate) fn has_ended(&self, round: u64) -> bool {
        self.rounds_ended >= round
    }

    /// Asks the policy.
    pub(crate) fn consult(&mut self, occasion: Occasion) {
        let decided = self.ledger.gathered();
        if decided == 0 {
            return;
        }
        let undecided = self.ledger.undecided();
        let last_words = self.life != Life::Open && undecided == 0;
        if !self.driven || last_words {
            return self.request_flush();
        }
        let Some(policy) = &mut self.policy else {
            self.ask_again = Some(occasion);
            return;
        };
        // Reading the clock costs as much as the rest of this. Between two looks the alarm keeps the cap.
        let custom = policy.is_custom();
        let look = occasion != Occasion::Decided || custom || decided.is_multiple_of(8);
        let waited = match self.oldest {
            Some(oldest) if look => self.clock.now().saturating_duration_since(oldest),
            _ => Duration::ZERO,
        };
        let gathered = Gathered { decided, undecided, backlog: self.backlog, waited, occasion };
        if custom {
            if self.oldest.is_none() {
                self.oldest = Some(self.clock.now());
            }
            // A user's code is not run under the lock.
            self.todo.ask = self.policy.take().map(|policy| Box::new((policy, gathered)));
            return;
        }
        let flush = policy.when(&gathered);
        self.follow(flush, &gathered);
    }

    /// The user's policy has been asked, and takes its place again.
    pub(crate) fn asked(&mut self, policy: FlushPolicy, flush: Flush, gathered: &Gathered) {
        self.policy = Some(policy);
        if self.ledger.gathered() > 0 {
            self.follow(flush, gathered);
        }
        if let Some(occasion) = self.ask_again.take() {
            self.consult(occasion);
        }
    }

    /// The user's policy has panicked. The default one takes its place.
    pub(crate) fn policy_panicked(&mut self) {
        self.note(Kind::PolicyPanicked, 1, None);
        self.policy = Some(FlushPolicy::default());
        self.ask_again = None;
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
    }

    fn follow(&mut self, flush: Flush, gathered: &Gathered) {
        let delay = match flush {
            Flush::Now => return self.request_flush(),
            // The pass has ended, or will not end in time; a policy that asks for it once more has nothing else to wait for.
            Flush::AtPassEnd if matches!(gathered.occasion, Occasion::PassEnd | Occasion::Due) => {
                return self.request_flush();
            }
            Flush::AtPassEnd => {
                if !std::mem::replace(&mut self.pass_end, true) {
                    self.todo.call_driver = true;
                }
                self.policy.as_ref().map_or(LONGEST_DELAY, FlushPolicy::cap)
            }
            // The delay is over; waiting on would be asking in a circle.
            Flush::Within(delay) if gathered.waited >= delay.min(LONGEST_DELAY) => return self.request_flush(),
            Flush::Within(delay) => delay.min(LONGEST_DELAY),
        };
        let oldest = match self.oldest {
            Some(oldest) => oldest,
            None => *self.oldest.insert(self.clock.now()),
        };
        let due = self.due.map_or(oldest + delay, |earlier| earlier.min(oldest + delay));
        self.due = Some(due);
        self.wish(due);
    }

    /// The runtime has run what was ready.
    pub(crate) fn pass_ended(&mut self) {
        if std::mem::take(&mut self.pass_end) {
            self.consult(Occasion::PassEnd);
        }
    }

    pub(crate) fn wants_pass_end(&self) -> bool {
        self.pass_end
    }

    /// The stream was polled and the socket was found empty.
    pub(crate) fn drained(&mut self) {
        self.consult(Occasion::Drained);
    }

    /// There is, or there is no more, a task in a runtime.
    pub(crate) fn set_driven(&mut self, driven: bool) {
        self.driven = driven;
        if !driven {
            self.pass_end = false;
            self.consult(Occasion::Decided);
        }
    }

    // Sending.

    /// Begins a round of sending: every decision becomes a message in `plan`. Tells whether the caller may send without
    /// asking for the capability first.
    pub(crate) fn begin_round(&mut self, plan: &mut Vec<Settlement<E>>) {
        self.flush_wanted = false;
        if self.ledger.gathered() == 0 {
            return;
        }
        self.rounds_begun += 1;
        self.sending = true;
        self.oldest = None;
        self.due = None;
        let before = plan.len();
        self.leaving = self.ledger.gathered();
        self.ledger.settle(self.arrivals.rounds(), plan);
        self.counters.flushes += 1;
        self.counters.largest_flush = self.counters.largest_flush.max((plan.len() - before) as u64);
    }

    /// The round is over. To be said under the send lock, so that no other has begun.
    pub(crate) fn end_round(&mut self) {
        debug_assert_eq!((self.leaving, self.begun), (0, 0), "every message was sent, refused or given back");
        self.sending = false;
        self.rounds_ended = self.rounds_begun;
    }

    /// The send lock has been released. Tells whether somebody has asked for another round who has found it taken.
    pub(crate) fn send_lock_released(&mut self) -> bool {
        if self.flush_wanted {
            return true;
        }
        self.events.push(Event::WakeWaiting);
        self.look_for_the_end();
        false
    }

    /// Whether the caller must have the capability to begin a round: it has been missed before.
    pub(crate) fn is_permission_missing(&self) -> bool {
        self.permission != Permission::Held
    }

    /// A thread that has the capability is about to send.
    pub(crate) fn permitted(&mut self) {
        if self.permission != Permission::Held {
            self.permission = Permission::Held;
            if self.ledger.gathered() > 0 {
                self.request_flush();
            }
        }
    }

    /// A thread of the runtime, which stands for the process, still has no capability.
    pub(crate) fn still_missing(&mut self) {
        let now = self.clock.now();
        if let Permission::Missing { since, .. } = self.permission
            && now.saturating_duration_since(since) >= LASTING
        {
            self.permission = Permission::Lost;
            let error = Error::new(ErrorKind::NotPermitted, "send verdicts");
            self.fail(error.with_detail("CAP_NET_ADMIN has been lost, and no verdict can be sent without it"));
            self.look_for_the_end();
        }
    }

    /// A thread without the capability wanted to send, which has been missed before: what owners have decided is refused.
    pub(crate) fn refuse_gathered(&mut self) {
        self.flush_wanted = false;
        self.rounds_begun += 1;
        self.oldest = None;
        self.due = None;
        let taken = self.ledger.take_back_gathered();
        self.missing_permission();
        for (id, decision) in taken {
            self.refuse(id, decision.extra, missing_capability());
        }
    }

    /// A datagram is about to be sent. Tells whether only the answers to it will tell what became of it.
    ///
    /// From here on its packets count as decided: answers may be received before the send has returned.
    pub(crate) fn begin_send(&mut self, first: u32, messages: &mut [Settlement<E>]) -> bool {
        self.watched = Some((first, false));
        self.begun = messages.len();
        let mut sequence = first;
        for message in messages {
            let (action, count) = (message.ruling().action, message.count());
            self.counters.decided(action, count as u64);
            self.leaving -= count;
            if let Settlement::Batch { .. } = message {
                self.sent_batches.push(sequence, action, count as u64, self.counters.received);
            }
            if let Settlement::Single { id, decision } = message
                && let Some(waiter) = decision.extra.as_mut().and_then(E::take_waiter)
            {
                self.awaiting.push(sequence, Awaited::Verdict { id: *id, waiter });
            }
            sequence = sequence.wrapping_add(1);
        }
        self.distrust
    }

    /// Whether the datagram that is being sent has been refused, as far as answers have been read.
    pub(crate) fn is_refused(&self) -> bool {
        self.watched.is_some_and(|(_, refused)| refused)
    }

    /// It was not executed: whoever waits for answers to it goes back into its messages. Of these, those beyond the datagram
    /// were not begun. Tells whether the refusal has been read already.
    fn end_send(&mut self, first: u32, messages: &mut [Settlement<E>]) -> bool {
        let mut sequence = first;
        for message in messages.iter_mut().take(std::mem::take(&mut self.begun)) {
            let (action, count) = (message.ruling().action, message.count());
            self.counters.taken_back(action, count as u64);
            self.leaving += count;
            if let Settlement::Batch { .. } = message {
                self.sent_batches.take(sequence);
            }
            if let Settlement::Single { decision, .. } = message
                && let Some(extra) = &mut decision.extra
                && let Some(Awaited::Verdict { waiter, .. }) = self.awaiting.remove(sequence)
            {
                extra.put_waiter(waiter);
            }
            sequence = sequence.wrapping_add(1);
        }
        self.watched.take().is_some_and(|(_, refused)| refused)
    }

    /// A configuration message is about to be sent.
    pub(crate) fn await_config(&mut self, sequence: u32, operation: &'static str, change: Change, waiter: E::Waiter) {
        self.awaiting.push(sequence, Awaited::Config { change, waiter, operation });
    }

    /// A datagram has been sent and executed.
    pub(crate) fn sent(&mut self, messages: &[Settlement<E>]) {
        self.counters.sends += 1;
        self.counters.messages += messages.len() as u64;
        self.retry = None;
        self.watched = None;
        self.begun = 0;
        self.sent_batches.expire(self.counters.received, u64::from(self.limits.max_len));
    }

    /// A datagram was refused as a whole for want of the capability. Its packets get the default action when it is back.
    pub(crate) fn refused(&mut self, mut messages: Vec<Settlement<E>>, first: u32) {
        let answer_was_read = self.end_send(first, &mut messages);
        if !answer_was_read {
            if self.known_refused.len() == MAX_KNOWN_REFUSED {
                self.known_refused.pop_front();
            }
            self.known_refused.push_back(first);
        }
        self.counters.sends += 1;
        self.missing_permission();
        let by_queue = |origin, ruling: &Ruling| (origin == Origin::Queue).then_some(ruling.action);
        for message in messages {
            self.leaving -= message.count();
            let ids = self.ledger.ids_of(&message);
            let (mut extra, by_queue) = match message {
                Settlement::Single { decision, .. } => (decision.extra, by_queue(decision.origin, &decision.ruling)),
                Settlement::Batch { ruling, origin, .. } => (None, by_queue(origin, &ruling)),
            };
            for id in ids {
                self.ledger.reopen(id, NO_TOKEN);
                match by_queue {
                    // A default action, or a deadline's: it stays what it was.
                    Some(action) => drop(self.ledger.decide(id, plain(action))),
                    None => self.refuse(id, extra.take(), missing_capability()),
                }
            }
        }
    }

    /// One message that cannot be sent, whatever is tried. Its packets get the default action.
    pub(crate) fn impossible(&mut self, mut message: Settlement<E>, first: u32, error: Error) {
        self.end_send(first, std::slice::from_mut(&mut message));
        self.leaving -= message.count();
        let ids = self.ledger.ids_of(&message);
        if let (Settlement::Single { decision, .. }, [id]) = (message, &ids[..]) {
            self.ledger.reopen(*id, NO_TOKEN);
            self.refuse(*id, decision.extra, error);
        }
    }

    /// Messages were not sent. They are gathered again, and sent later.
    pub(crate) fn unsent(&mut self, mut messages: Vec<Settlement<E>>, first: u32) {
        self.end_send(first, &mut messages);
        for message in messages {
            self.leaving -= message.count();
            self.ledger.unsent(message);
        }
    }

    /// A send has failed for a reason that may pass: the next attempt comes after a pause.
    pub(crate) fn send_failed(&mut self) {
        self.counters.failed_sends += 1;
        self.note(Kind::Unsent, 1, None);
        let pause = self.retry.map_or(PAUSES.0, |(_, pause)| pause);
        let at = self.clock.now() + pause;
        self.retry = Some((at, (pause * 2).min(PAUSES.1)));
        self.wish(at);
    }

    /// A configuration message was not sent.
    pub(crate) fn take_config(&mut self, sequence: u32) -> Option<E::Waiter> {
        match self.awaiting.remove(sequence)? {
            Awaited::Verdict { waiter, .. } | Awaited::Config { waiter, .. } => Some(waiter),
        }
    }

    /// The verdict of a packet was refused. It is told, and the packet gets the default action.
    fn refuse(&mut self, id: u32, mut extra: Option<E>, error: Error) {
        let waiter = extra.as_mut().and_then(E::take_waiter);
        self.events.extend(extra.map(Event::Spent));
        let error = error.with_packet(PacketId(id));
        self.counters.refusals += 1;
        self.note(Kind::Refused, 1, Some(id));
        match waiter {
            Some(waiter) => self.events.push(Event::Answer(waiter, Err(error))),
            None => self.tell(error),
        }
        let _ = self.decide_again(id);
    }

    fn decide_again(&mut self, id: u32) -> Result<(), NotInFlight> {
        self.decide_in_place(id, self.rules.on_unanswered)
    }

    fn missing_permission(&mut self) {
        if self.permission == Permission::Held {
            let now = self.clock.now();
            let next = now + PAUSES.0;
            self.permission = Permission::Missing { since: now, next, pause: PAUSES.0 * 2 };
            self.note(Kind::CapabilityMissing, 1, None);
            self.wish(next);
            self.todo.call_driver = true;
        }
    }

    // The kernel's answers.

    /// Takes in the kernel's answer to one of our messages.
    pub(crate) fn answered(&mut self, answer: Answer) {
        let first = answer.sequence;
        if answer.errno == EPERM {
            if let Some(at) = self.known_refused.iter().position(|known| *known == first) {
                self.known_refused.remove(at);
                return;
            }
            if let Some((watched, refused)) = &mut self.watched
                && *watched == first
            {
                *refused = true;
                return;
            }
        }
        let failed = || answer_error(&answer);
        match self.awaiting.remove(answer.sequence) {
            Some(Awaited::Config { change, waiter, operation }) => {
                if answer.errno == 0 {
                    self.limits.max_len = change.max_len.unwrap_or(self.limits.max_len);
                    self.limits.payload = change.payload.unwrap_or(self.limits.payload);
                }
                let result = if answer.errno == 0 { Ok(()) } else { Err(failed().with_operation(operation)) };
                self.events.push(Event::Answer(waiter, result));
            }
            Some(Awaited::Verdict { id, waiter }) => {
                let result = match answer.errno {
                    0 => Ok(()),
                    _ => {
                        self.not_taken(&answer, Some(id));
                        Err(failed().with_packet(PacketId(id)))
                    }
                };
                self.events.push(Event::Answer(waiter, result));
            }
            None if answer.errno != 0 => {
                let told = self.not_taken(&answer, None);
                if told {
                    let error = match answer.refused {
                        Refused::Verdict { id, .. } | Refused::Batch { max: id } => failed().with_packet(PacketId(id)),
                        Refused::Other => failed(),
                    };
                    self.counters.refusals += 1;
                    self.note(Kind::Refused, 1, error.packet_id().map(PacketId::get));
                    self.tell(error);
                }
            }
            None => {}
        }
    }

    /// Books a verdict that the kernel did not take. Tells whether its owner is to be told.
    fn not_taken(&mut self, answer: &Answer, confirmed: Option<u32>) -> bool {
        let (action, count, id) = match answer.refused {
            Refused::Verdict { id, word } => (action_of(word), 1, Some(id)),
            Refused::Batch { .. } => match self.sent_batches.take(answer.sequence) {
                Some((action, count)) => (Some(action), count, None),
                None => (None, 1, None),
            },
            Refused::Other => (None, 1, confirmed),
        };
        if answer.errno == EPERM {
            // The capability was there a moment later, or is worth nothing: what was sent cannot be known any more.
            self.distrust = true;
            self.ledger.forbid_batches();
            self.missing_permission();
            if let (Some(action), Some(id)) = (action, id)
                && self.ledger.reopen(id, NO_TOKEN)
            {
                self.counters.taken_back(action, 1);
                let _ = self.decide_again(id);
            }
            return true;
        }
        if let Some(action) = action {
            self.counters.taken_back(action, count);
        }
        if answer.errno == ENOENT {
            // Device down, hook unregistered, queue unbound: the packets left without us.
            self.counters.gone_at_least += count;
            return false;
        }
        self.counters.refused += count;
        true
    }

    fn tell(&mut self, error: Error) {
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.pop_front();
            self.counters.refusals_unread += 1;
        }
        self.refusals.push_back(error);
        self.events.push(Event::WakeRefusals);
    }

    /// The oldest refusal that nobody has read.
    pub(crate) fn next_refusal(&mut self) -> Option<Error> {
        self.refusals.pop_front()
    }

    /// A verdict that came too late is told as well.
    pub(crate) fn tell_late(&mut self, id: u32) {
        self.tell(Error::new(ErrorKind::Expired, "submit verdict").with_packet(PacketId(id)));
    }

    /// Something has happened after which the queue is of no use.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.failure.is_none() && self.life == Life::Open {
            self.note(Kind::Failed, 1, None);
            self.failure = Some(error.fatal());
            self.events.push(Event::WakeStream);
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    // Time.

    /// The alarm has rung: does what is due.
    pub(crate) fn fire(&mut self) {
        let now = self.clock.now();
        self.alarm = None;
        let expired = self.expire(now);
        self.end_wait(now);
        match self.permission {
            Permission::Held => {
                if self.retry.is_some_and(|(at, _)| at <= now) {
                    self.request_flush();
                } else if self.due.is_some_and(|due| due <= now) {
                    self.due = None;
                    self.consult(Occasion::Due);
                } else if expired {
                    self.consult(Occasion::Decided);
                }
            }
            Permission::Missing { since, next, pause } if next <= now => {
                let pause_after = (pause * 2).min(PAUSES.1);
                self.permission = Permission::Missing { since, next: now + pause, pause: pause_after };
                self.todo.call_driver = true;
            }
            Permission::Missing { .. } | Permission::Lost => {}
        }
        if let Some((at, receives)) = self.look
            && at <= now
        {
            self.look = None;
            // Whoever has received since looks after the rest as well.
            self.todo.look = receives == self.receives;
            self.todo.watch = true;
        }
        for report in self.reports.due(now) {
            self.events.push(Event::Report(report));
        }
        self.wish_again(now);
    }

    /// Wishes for the next time at which something is due.
    fn wish_again(&mut self, now: Instant) {
        let permission = match self.permission {
            Permission::Missing { next, .. } => Some(next),
            _ => None,
        };
        let limit = match self.life {
            Life::Stopping { limit: Limit::At(at), .. } | Life::Waiting { limit: Limit::At(at), .. } => Some(at),
            _ => None,
        };
        let retry = self.retry.filter(|_| self.permission == Permission::Held).map(|(at, _)| at.max(now));
        let due = self.due.filter(|_| self.permission == Permission::Held);
        // While there is traffic the alarm goes on ringing: to be woken by each new verdict would cost its sender more.
        let busy = std::mem::replace(&mut self.rounds_at_alarm, self.rounds_begun) != self.rounds_begun;
        let linger =
            self.policy.as_ref().filter(|_| busy && self.driven).and_then(FlushPolicy::linger).map(|cap| now + cap);
        let wishes = [
            due,
            linger,
            permission,
            limit,
            retry,
            self.deadlines.next(),
            self.look.map(|(at, _)| at),
            self.reports.pending(),
        ];
        if let Some(at) = wishes.into_iter().flatten().min() {
            self.wish(at);
        }
    }

    /// Answers for packets whose deadline has come; tells whether there were any.
    fn expire(&mut self, now: Instant) -> bool {
        let Some((_, action)) = self.rules.deadline else { return false };
        let before = self.counters.expired;
        while let Some((first, last)) = self.deadlines.due(now) {
            for id in self.ledger.undecided_between(first, last) {
                if let Ok(token) = self.ledger.decide(id, plain(action)) {
                    self.held.leave(token);
                    self.counters.expired += 1;
                    self.note(Kind::Expired, 1, Some(id));
                }
            }
        }
        self.counters.expired > before
    }

    // The end.

    /// Where packets have a deadline, somebody must look for those that lie unread.
    pub(crate) fn bound(&mut self) {
        self.todo.watch = self.rules.deadline.is_some();
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Begins the end: from now on no packet is handed out. True if it is the caller who goes on with it; false if it has
    /// begun already.
    pub(crate) fn begin_close(&mut self, action: Action, limit: Limit) -> bool {
        match &mut self.life {
            life @ Life::Open => {
                *life = Life::Stopping { action, limit };
                self.events.push(Event::WakeStream);
            }
            Life::Stopping { limit: old, .. } | Life::Waiting { limit: old, .. } => {
                // Begun by a drop, which waits for ever; or by somebody who has more time.
                *old = old.tighten(limit);
                let now = self.clock.now();
                self.end_wait(now);
                self.wish_again(now);
                return false;
            }
            Life::Unbinding | Life::Closed => return false,
        }
        if let Limit::At(at) = limit {
            self.wish(at);
        }
        true
    }

    /// The kernel has been told to queue nothing, or could not be; all that was queued has been received.
    pub(crate) fn stopped(&mut self, result: Result<(), Error>) {
        if let Life::Stopping { action, limit } = self.life {
            self.life = Life::Waiting { action, limit };
        }
        if let Err(error) = result {
            self.close_error.get_or_insert(error);
        }
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
        self.look_for_the_end();
    }

    /// Waits for owed verdicts no longer, where that time has come.
    fn end_wait(&mut self, now: Instant) {
        let (action, limit) = match &mut self.life {
            Life::Stopping { action, limit } | Life::Waiting { action, limit } => (*action, limit),
            _ => return,
        };
        if !matches!(limit, Limit::At(at) if *at <= now) {
            return;
        }
        *limit = Limit::Over;
        let ids = self.ledger.undecided_ids();
        let left = ids.len() + self.ledger.gathered();
        self.answer_for(ids.into_iter(), action);
        if left > 0 {
            let detail = format!("{left} packets were still undecided when the time was over");
            let error = Error::new(ErrorKind::TimedOut, format!("close queue {}", self.rules.queue));
            self.close_error.get_or_insert_with(|| error.with_detail(detail));
            self.request_flush();
        }
        self.look_for_the_end();
    }

    /// Has the queue unbound once nothing is owed.
    fn look_for_the_end(&mut self) {
        let Life::Waiting { limit, .. } = self.life else { return };
        let sent = self.ledger.gathered() == 0 && !self.sending;
        // What cannot be sent is not waited for beyond the time.
        let hopeless = !self.sending
            && (self.permission == Permission::Lost
                || limit == Limit::Over && (self.permission != Permission::Held || self.retry.is_some()));
        if self.ledger.undecided() == 0 && (sent || hopeless) {
            self.life = Life::Unbinding;
            self.todo.unbind = true;
        }
    }

    /// The queue has been unbound, or could not be.
    pub(crate) fn unbound(&mut self, result: Result<(), Error>) {
        self.life = Life::Closed;
        if let Err(error) = result {
            self.close_error.get_or_insert(error);
        }
        self.events.extend([Event::WakeStream, Event::WakeWaiting, Event::WakeRefusals]);
        for report in self.reports.rest(self.clock.now()) {
            self.events.push(Event::Report(report));
        }
        self.todo.call_driver = true;
    }

    /// The error of the end, for the first who asks.
    pub(crate) fn take_close_error(&mut self) -> Option<Error> {
        self.close_error.take()
    }

    // Numbers.

    fn in_flight(&self) -> usize {
        self.ledger.undecided() + self.ledger.gathered() + self.leaving
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn stats(&self) -> Stats {
        let oldest = || self.arrivals.age(self.ledger.oldest(), self.clock.now());
        Stats {
            in_flight: self.in_flight(),
            fill: self.fill.fill(),
            held_bytes: self.held.bytes(),
            oldest_undecided: (self.ledger.undecided() > 0).then(oldest).flatten(),
            max_len: self.limits.max_len,
            ..self.counters
        }
    }
}

/// Nobody looks for unread packets more often.
const SHORTEST_LOOK: Duration = Duration::from_micros(200);

/// A decision that is an action alone, in the owner's place.
fn plain<E>(action: Action) -> Decision<E> {
    Decision { ruling: Ruling::plain(action), extra: None, origin: Origin::Queue }
}

fn missing_capability() -> Error {
    Error::new(ErrorKind::NotPermitted, "send verdict").with_detail("CAP_NET_ADMIN is missing")
}

/// What the kernel's answer says.
fn answer_error(answer: &Answer) -> Error {
    let error = Error::os("send verdict", std::io::Error::from_raw_os_error(answer.errno));
    let error = match (answer.errno, answer.refused) {
        (ENOENT, Refused::Verdict { .. } | Refused::Batch { .. }) => error.with_kind(ErrorKind::PacketGone),
        _ => error,
    };
    match &answer.text {
        Some(text) => error.with_detail(text.to_string()),
        None => error,
    }
}

const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
