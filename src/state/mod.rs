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
    Action, Error, ErrorKind, FlushPolicy, Gathered, Occasion, Stats,
    stats::FillCounter,
    wire::{Answer, message::Refused, verdict::Ruling},
};

mod answers;
mod awaiting;
mod deciding;
mod ending;
mod held;
pub(crate) mod ledger;
#[cfg(test)]
mod model;
mod receiving;
mod report;
mod sending;
mod time;
mod times;

use self::{
    awaiting::{Awaited, Awaiting, SentBatches},
    held::Held,
    ledger::{Ledger, NO_TOKEN},
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
    Unbinding {
        action: Action,
        limit: Limit,
    },
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
        /// Calls of the driver that it has not answered.
        calls: u32,
        /// A thread that stands for the process has looked (since the time of the end was over), and has none.
        confirmed: bool,
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
    /// Stop the queue once more, with this action: the capability was missing before.
    pub(crate) drain: Option<Action>,
    /// Ask whether the calling thread may send, as the driver does otherwise: there is none, or it does not come.
    pub(crate) probe: bool,
    pub(crate) wake_stream: bool,
    /// Those who wait for a flush or for the end.
    pub(crate) wake_waiting: bool,
    pub(crate) wake_refusals: bool,
}

impl Todo {
    const NOTHING: Self = Self {
        flush: false,
        call_driver: false,
        alarm: None,
        ask: None,
        look: false,
        watch: false,
        unbind: false,
        drain: None,
        probe: false,
        wake_stream: false,
        wake_waiting: false,
        wake_refusals: false,
    };

    fn is_nothing(&self) -> bool {
        let flags = [self.flush, self.call_driver, self.look, self.watch, self.unbind, self.probe];
        let wakes = [self.wake_stream, self.wake_waiting, self.wake_refusals];
        !flags.contains(&true)
            && !wakes.contains(&true)
            && self.alarm.is_none()
            && self.ask.is_none()
            && self.drain.is_none()
    }
}

/// What others are to be told once the lock is released.
#[derive(Debug)]
pub(crate) enum Event<E: Carried> {
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
    /// The queue could not be stopped for want of the capability; it is tried again.
    undrained: bool,
    /// The queue has ended for those who wait, and could not be unbound for want of the capability; it is tried again.
    unbind_later: bool,
    counters: Stats,
    reports: Reports,
    todo: Todo,
    events: Vec<Event<E>>,
}

/// Refusals nobody reads are kept up to this number; older ones then give way, counted.
const MAX_REFUSALS: usize = 1024;
/// A delay asked for by a policy of the user's own is cut to this.
const LONGEST_DELAY: Duration = Duration::from_secs(1);
/// After so many unanswered calls the driver is taken not to come, and the timer's thread stands for the process.
const PATIENT_CALLS: u32 = 10;
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
            undrained: false,
            unbind_later: false,
            counters: Stats::default(),
            reports: Reports::default(),
            todo: Todo::NOTHING,
            events: Vec::new(),
        }
    }

    // What is to be done.

    /// Whether anything is to be done or told.
    pub(crate) fn is_busy(&self) -> bool {
        !self.todo.is_nothing() || !self.events.is_empty()
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
        self.todo.wake_stream = true;
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
