//! What the handles of one queue share. Three locks, always taken in this order:
//!
//! | lock | held while | by |
//! |---|---|---|
//! | `outbox` | verdicts are encoded and sent: a send runs the packets' further way, 100 µs for 64 | who flushes; the others leave their verdicts to the holder |
//! | `inbox` | datagrams are received and taken apart, some 50 µs at most | the stream; who awaits an answer of the kernel |
//! | `core` | bookkeeping, well under a microsecond | everyone |

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::channel::oneshot;
use tokio::sync::Notify;

use super::{
    busy_poll::BusyPoll,
    inbox::Inbox,
    limits::Limits,
    outbox::Outbox,
    times::{Arrivals, Deadlines},
};
use crate::{
    Action, Error, ErrorKind, Flush, FlushPolicy, Gathered, Occasion, PacketId, Stats, Vlan,
    kernel::KernelTable,
    ledger::{Decision, Ledger, NotInFlight},
    socket::Socket,
    stats::FillCounter,
    wire::{
        Answer,
        message::Refused,
        verdict::{Attachments, Ruling},
    },
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

/// Where the kernel's answer to one verdict goes.
pub(crate) type Confirmer = oneshot::Sender<Result<(), Error>>;

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
    /// One configuration exchange at a time; taken before any other lock.
    pub(super) configuring: Mutex<()>,
    /// Wakes the driver. Apart, so that the driver can wait without keeping the queue alive.
    pub(super) signal: Arc<Notify>,
}

/// Where a queue is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Open,
    /// No new packet is queued; verdicts still owed are awaited. What arrives or stays unread gets `fate`.
    Draining {
        fate: Action,
        until: Option<Instant>,
    },
    /// Everything is settled; somebody is unbinding the queue.
    Unbinding,
    Closed,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) ledger: Ledger<Box<Extra>>,
    pub(super) policy: FlushPolicy,
    pub(super) phase: Phase,
    pub(super) limits: Limits,
    /// Whether the drain has come so far that nothing can be queued any more and all that was has been received.
    pub(super) drained: bool,
    /// When the oldest verdict not yet sent was given.
    pub(super) oldest: Option<Instant>,
    /// Whether the socket, when last read, may have had more.
    pub(super) backlog: bool,
    /// Somebody wants everything sent; whoever holds the outbox does it.
    pub(super) flush_wanted: bool,
    /// Verdicts have left the ledger and the send has not returned.
    pub(super) sending: bool,
    /// Whether there is a driver to wait for. Without one every verdict is sent at once.
    pub(super) driven: bool,
    pub(super) pass_end: bool,
    /// When the policy is to be asked again.
    pub(super) due: Option<Instant>,
    /// When the driver's alarm will ring.
    pub(super) alarm: Option<Instant>,
    /// An episode of loss to the receive buffer is under way.
    pub(super) losing: bool,
    /// Nothing was missing from what was received last.
    pub(super) lossless: bool,
    pub(super) deadlines: Deadlines,
    pub(super) awaiting: HashMap<u32, Awaited>,
    pub(super) configuring: Option<(u32, Option<Answer>)>,
    pub(super) errors: VecDeque<Error>,
    pub(super) close_error: Option<Error>,
    pub(super) stream: Option<Waker>,
    /// Those who wait for everything to be sent, or for the queue to be closed.
    pub(super) waiting: Vec<Waker>,
    pub(super) arrivals: Arrivals,
    pub(super) fill: FillCounter,
    pub(super) counters: Stats,
}

/// A verdict whose acknowledgement is awaited.
#[derive(Debug)]
pub(super) struct Awaited {
    pub(super) id: u32,
    /// The sequence number of the first message in its datagram: a refusal of the whole datagram answers that one.
    pub(super) first: u32,
    pub(super) confirmer: Confirmer,
}

/// What a caller of [`Core::consult`] is to do once the lock is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Nothing,
    Flush,
    WakeDriver,
}

/// Errors nobody reads are kept up to this number; older ones then give way, counted.
const MAX_ERRORS: usize = 1024;

/// A delay asked for by a policy of the user's own is cut to this.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

impl Shared {
    pub(super) fn new(
        settings: Settings,
        socket: Socket,
        table: KernelTable,
        policy: FlushPolicy,
        limits: Limits,
    ) -> Self {
        let core = Core {
            // nfqnl counts a queue's packets from 1 (`++queue->id_sequence`).
            ledger: Ledger::new(1),
            policy,
            phase: Phase::Open,
            limits,
            drained: false,
            oldest: None,
            backlog: false,
            flush_wanted: false,
            sending: false,
            driven: false,
            pass_end: false,
            due: None,
            alarm: None,
            losing: false,
            lossless: true,
            deadlines: Deadlines::default(),
            awaiting: HashMap::new(),
            configuring: None,
            errors: VecDeque::new(),
            close_error: None,
            stream: None,
            waiting: Vec::new(),
            arrivals: Arrivals::default(),
            fill: FillCounter::default(),
            counters: Stats::default(),
        };
        Self {
            outbox: Mutex::new(Outbox::new(socket.max_send())),
            inbox: Mutex::new(Inbox::new(limits.payload, BusyPoll::new(settings.busy_poll))),
            core: Mutex::new(core),
            configuring: Mutex::new(()),
            signal: Arc::new(Notify::new()),
            settings,
            socket,
            table,
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// Takes an owner's decision; it is sent when the policy says so.
    pub(crate) fn decide(&self, id: u32, decision: Decision<Box<Extra>>) -> Result<(), Error> {
        let mut core = self.core();
        core.decide(id, decision)?;
        let next = core.consult(Occasion::Decided);
        drop(core);
        self.proceed(next);
        Ok(())
    }

    /// Takes an owner's decision and sends it at once; the kernel's answer goes to the receiver.
    pub(crate) fn decide_confirmed(
        &self,
        id: u32,
        mut decision: Decision<Box<Extra>>,
    ) -> oneshot::Receiver<Result<(), Error>> {
        let (confirmer, answer) = oneshot::channel();
        let mut core = self.core();
        if core.ledger.is_undecided(id) {
            decision.extra.get_or_insert_default().confirm = Some(confirmer);
            let decided = core.decide(id, decision);
            debug_assert!(decided.is_ok(), "it was undecided under the same lock");
            core.flush_wanted = true;
            drop(core);
            self.flush();
        } else if let Err(error) = core.decide(id, decision) {
            let _ = confirmer.send(Err(error));
        }
        answer
    }

    /// Answers for a packet whose owner has gone.
    pub(crate) fn unanswered(&self, id: u32) {
        let mut core = self.core();
        if core.decide_unanswered(id, self.settings.on_unanswered).is_err() {
            // A deadline or the end of the queue has answered already.
            return;
        }
        let next = core.consult(Occasion::Decided);
        drop(core);
        self.proceed(next);
    }

    pub(super) fn proceed(&self, next: Next) {
        match next {
            Next::Nothing => {}
            Next::Flush => {
                self.flush();
            }
            Next::WakeDriver => self.signal.notify_one(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let core = self.core();
        Stats {
            in_flight: core.ledger.undecided() + core.ledger.gathered(),
            fill: core.fill.fill(),
            held_bytes: core.ledger.weight(),
            oldest_undecided: (core.ledger.undecided() > 0).then(|| core.arrivals.age(core.ledger.oldest())).flatten(),
            max_len: core.limits.max_len,
            receive_buffer: self.socket.receive_buffer(),
            ..core.counters
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        !matches!(self.core().phase, Phase::Open)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The last handle is gone and with it the last claim: what is decided must still reach the kernel.
        let core = self.core.get_mut().unwrap_or_else(PoisonError::into_inner);
        core.flush_wanted = core.ledger.gathered() > 0;
        if core.flush_wanted {
            self.flush();
        }
        self.signal.notify_one();
    }
}

impl Core {
    pub(super) fn decide(&mut self, id: u32, decision: Decision<Box<Extra>>) -> Result<(), Error> {
        let word = decision.ruling.word;
        match self.ledger.decide(id, decision) {
            Ok(()) => {
                self.counters.decided(word);
                Ok(())
            }
            Err(_) => {
                self.counters.late += 1;
                Err(Error::new(ErrorKind::Expired, "submit verdict").with_packet(PacketId(id)))
            }
        }
    }

    /// Answers for a packet in its owner's place, if that is still to be done.
    pub(super) fn decide_unanswered(&mut self, id: u32, action: Action) -> Result<(), NotInFlight> {
        let decision = plain(action);
        let word = decision.ruling.word;
        self.ledger.decide(id, decision)?;
        self.counters.decided(word);
        self.counters.unanswered += 1;
        Ok(())
    }

    /// Decides every packet that still waits for its owner.
    pub(super) fn decide_rest(&mut self, action: Action) -> usize {
        let ids = self.ledger.undecided_ids();
        ids.into_iter().filter(|id| self.decide_unanswered(*id, action).is_ok()).count()
    }

    /// Asks the policy.
    pub(super) fn consult(&mut self, occasion: Occasion) -> Next {
        let decided = self.ledger.gathered();
        if decided == 0 {
            return Next::Nothing;
        }
        let undecided = self.ledger.undecided();
        let last_words = self.phase != Phase::Open && undecided == 0;
        if !self.driven || last_words {
            self.flush_wanted = true;
            return Next::Flush;
        }
        // Reading the clock costs as much as the rest of this. Between two looks the driver's alarm keeps the cap.
        let look = occasion != Occasion::Decided || self.policy.is_custom() || decided.is_multiple_of(8);
        let waited = self.oldest.filter(|_| look).map_or(Duration::ZERO, |oldest| oldest.elapsed());
        let gathered = Gathered { decided, undecided, backlog: self.backlog, waited, occasion };
        match self.policy.when(&gathered) {
            Flush::Now => {
                self.flush_wanted = true;
                Next::Flush
            }
            // The pass has ended; a policy that asks for its end once more has nothing else to wait for.
            Flush::AtPassEnd if occasion == Occasion::PassEnd => {
                self.flush_wanted = true;
                Next::Flush
            }
            Flush::AtPassEnd => {
                self.oldest.get_or_insert_with(Instant::now);
                let asked = std::mem::replace(&mut self.pass_end, true);
                if asked { Next::Nothing } else { Next::WakeDriver }
            }
            // The delay is over; waiting on would be asking in a circle.
            Flush::Within(delay) if waited >= delay.min(LONGEST_DELAY) => {
                self.flush_wanted = true;
                Next::Flush
            }
            Flush::Within(delay) => {
                let due = *self.oldest.get_or_insert_with(Instant::now) + delay.min(LONGEST_DELAY);
                self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
                if self.alarm.is_some_and(|alarm| alarm <= due) { Next::Nothing } else { Next::WakeDriver }
            }
        }
    }

    /// Takes in the kernel's answer to one of our messages.
    pub(super) fn answered(&mut self, answer: Answer) {
        if let Some((sequence, result)) = &mut self.configuring
            && *sequence == answer.sequence
        {
            *result = Some(answer);
            return;
        }
        let refusal = |id: Option<u32>| {
            let error = Error::os("send verdict", std::io::Error::from_raw_os_error(answer.errno));
            let error = match &answer.text {
                Some(text) => error.with_detail(text.to_string()),
                None => error,
            };
            match id {
                Some(id) => error.with_packet(PacketId(id)),
                None => error,
            }
        };
        if answer.errno == EPERM {
            // The capability is gone: the whole datagram was discarded, and only its first message is answered.
            let whole: Vec<u32> = self
                .awaiting
                .iter()
                .filter(|(_, a)| a.first == answer.sequence)
                .map(|(sequence, _)| *sequence)
                .collect();
            for awaited in whole.iter().filter_map(|sequence| self.awaiting.remove(sequence)) {
                let _ = awaited.confirmer.send(Err(refusal(Some(awaited.id))));
            }
        }
        if let Some(awaited) = self.awaiting.remove(&answer.sequence) {
            let result = if answer.errno == 0 { Ok(()) } else { Err(refusal(Some(awaited.id))) };
            self.counters.gone += u64::from(answer.errno == ENOENT);
            let _ = awaited.confirmer.send(result);
            return;
        }
        match (answer.errno, answer.refused) {
            (0, _) => {}
            // Device down, rules flushed, queue unbound: the packet left without us.
            (ENOENT, Refused::Verdict { .. } | Refused::Batch { .. }) => self.counters.gone += 1,
            (_, refused) => {
                self.counters.refused += 1;
                self.ledger.forbid_batches();
                self.error(refusal(match refused {
                    Refused::Verdict { id } | Refused::Batch { max: id } => Some(id),
                    Refused::Other => None,
                }));
            }
        }
    }

    /// Notes how a round of receiving went. An episode of loss is traced once, and ends when the socket has been read empty
    /// with nothing lost.
    pub(super) fn episode(&mut self, lossless: bool, emptied: bool) {
        self.lossless = lossless;
        if !lossless && !self.losing {
            self.losing = true;
            self.counters.overrun_episodes += 1;
            tracing::warn!(lost = self.counters.lost, "nfqueue: packets are lost to a full receive buffer");
        } else if lossless && emptied {
            self.losing = false;
        }
    }

    /// Puts an error where the stream will find it.
    pub(super) fn error(&mut self, error: Error) {
        tracing::warn!(%error, "nfqueue");
        if self.errors.len() == MAX_ERRORS {
            self.errors.pop_front();
            self.counters.errors_dropped += 1;
        }
        self.errors.push_back(error);
        self.wake_stream();
    }

    pub(super) fn wake_stream(&mut self) {
        if let Some(waker) = self.stream.take() {
            waker.wake();
        }
    }

    /// Whether nothing that was decided is still on its way.
    pub(super) fn all_sent(&self) -> bool {
        self.ledger.gathered() == 0 && !self.sending
    }

    pub(super) fn wake_waiting(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    pub(super) fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|other| other.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }
}

pub(super) const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
pub(super) const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();

/// A decision that is an action alone.
pub(super) fn plain(action: Action) -> Decision<Box<Extra>> {
    Decision { ruling: Ruling::plain(action.word()), extra: None }
}

/// Locks, whatever a panicking holder may have left: every change under these locks is complete at each point where user
/// code (a policy) can panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
