//! Random histories of the machine against a model of nfnetlink_queue and of the socket. After each
//! event the promises are checked, and at the end of each history that nothing is left.
//! `NFQUEUE_STATE_SEED` repeats one history.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use self::kernel::{Datagram, Kernel, Random, Sent};
use super::{flush::FlushDecision, *};
use crate::types::ErrorKind;

mod handover;
mod kernel;

/// Histories, and events in each: a million in all.
const HISTORIES: u64 = 500;
const EVENTS: usize = 2000;
/// What the kernel accounts for a datagram. Also the smaller of the receive buffers of the
/// histories are large enough for proofs that come later.
const CHARGE: usize = 16 * 1024;
const CAP: Duration = Duration::from_micros(500);
/// The sequence numbers wrap early.
const SEQUENCE: u32 = u32::MAX - 50;
/// The length of a message in bytes.
const MESSAGE: usize = 32;

#[derive(Debug, Clone)]
struct TestClock(Rc<Cell<Instant>>);

impl Clock for TestClock {
    fn now(&self) -> Instant {
        self.0.get()
    }
}

#[derive(Debug, Default)]
struct TestExtra {
    acknowledged: bool,
    waiter: Option<u32>,
}

impl Carried for TestExtra {
    type Waiter = u32;

    fn attachments(&self) -> Attachments<'_> {
        Attachments::default()
    }

    fn is_acknowledged(&self) -> bool {
        self.acknowledged
    }

    fn take_waiter(&mut self) -> Option<u32> {
        self.waiter.take()
    }

    fn put_waiter(&mut self, waiter: u32) {
        self.waiter = Some(waiter);
    }
}

/// Which actions are allowed for a packet.
#[derive(Debug, Default)]
struct Said {
    owner: Option<Action>,
    /// The default action is allowed: the packet was abandoned, or its verdict was refused.
    default: bool,
    deadline: bool,
}

struct World {
    random: Random,
    clock: TestClock,
    machine: Machine<TestExtra, TestClock>,
    outbox: Outbox<TestExtra>,
    kernel: Kernel,
    on_unanswered: Action,
    deadline: Option<(Duration, Action)>,
    close_action: Option<Action>,
    /// Received and not handed out.
    receiver: VecDeque<u32>,
    owned: Vec<u32>,
    said: BTreeMap<u32, Said>,
    received_at: HashMap<u32, Instant>,
    /// Confirmations that are awaited, with the packet and the action that they confirm.
    waiters: HashMap<u32, (u32, Action)>,
    next_waiter: u32,
    /// When each decision was given that has not been sent.
    given: Vec<(u32, Instant)>,
    sent: u32,
    alarm: Option<Instant>,
    capable: bool,
    /// Some sends fail, because the kernel is out of memory.
    out_of_memory: bool,
    custom: bool,
    stopping: bool,
    unbinding: bool,
    tasks_ran_due: bool,
    driver_runs: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let clock = TestClock(Rc::new(Cell::new(Instant::now())));
        let on_unanswered = if random.one_in(2) { Action::Drop } else { Action::Accept };
        let deadline = random.one_in(3).then(|| {
            (
                Duration::from_millis(1 + random.below(20) as u64),
                if random.one_in(2) { Action::Drop } else { Action::Accept },
            )
        });
        let custom = random.one_in(5);
        let policy = match random.below(3) {
            _ if custom => custom_policy(seed),
            0 => FlushPolicy::immediate(),
            1 => FlushPolicy::fixed(1 + random.below(100), CAP),
            _ => FlushPolicy::adaptive(CAP),
        };
        let max_len = 1 + random.below(200);
        let room = if random.one_in(3) { 1 + random.below(60) } else { 100_000 };
        // Near the wrap in some histories.
        let first = if random.one_in(4) { 0u32.wrapping_sub(random.below(500) as u32) } else { 1 };
        let in_submission_order = seed % 4 == 3;
        let settings = FixedSettings { queue: 0, on_unanswered, deadline, in_submission_order };
        let limits = Limits { max_len: max_len as u32, payload: 1000 };
        let mut machine = Machine::new(settings, policy, limits, first, clock.clone());
        machine.outstanding.continue_after(SEQUENCE);
        machine.set_driven(!random.one_in(5));
        machine.set_receive_buffer(room * CHARGE);
        let driver_runs = !random.one_in(3);
        let kernel = Kernel {
            queued: BTreeSet::new(),
            next_id: first,
            max_len,
            fail_open: false,
            socket: VecDeque::new(),
            room,
            actions: HashMap::new(),
            gone: BTreeSet::new(),
            dropped: 0,
            bound: true,
        };
        Self {
            random,
            clock,
            machine,
            outbox: Outbox::new(0, usize::MAX),
            kernel,
            on_unanswered,
            deadline,
            close_action: None,
            receiver: VecDeque::new(),
            owned: Vec::new(),
            said: BTreeMap::new(),
            received_at: HashMap::new(),
            waiters: HashMap::new(),
            next_waiter: 0,
            given: Vec::new(),
            sent: SEQUENCE,
            alarm: None,
            capable: true,
            out_of_memory: false,
            custom,
            stopping: false,
            unbinding: false,
            tasks_ran_due: false,
            driver_runs,
        }
    }

    fn now(&self) -> Instant {
        self.clock.0.get()
    }

    /// One event.
    fn step(&mut self) {
        match self.random.below(100) {
            0..=29 => {
                for _ in 0..1 + self.random.below(8) {
                    self.kernel.packet(&mut self.random);
                }
            }
            30..=49 => {
                let most = 1 + self.random.below(64);
                self.receive(most);
            }
            50..=59 => self.hand_out(),
            60..=79 => self.decide(),
            80..=83 => self.abandon(),
            84..=90 => self.pass_time(),
            91 | 92 => {
                self.machine.stream_empty();
            }
            93 => {
                self.machine.flush();
            }
            94 => {
                self.capable = !self.capable;
                if self.capable {
                    // The driver asks again.
                    self.machine.permitted();
                }
            }
            95 => self.out_of_memory = !self.out_of_memory && self.random.one_in(3),
            96 => {
                // A device goes down, or a hook is unregistered.
                let all = self.random.one_in(3);
                let gone: Vec<u32> =
                    self.kernel.queued.iter().copied().filter(|_| all || self.random.one_in(2)).collect();
                for id in gone {
                    self.kernel.queued.remove(&id);
                    self.kernel.gone.insert(id);
                    self.kernel.dropped += 1;
                }
            }
            97 => self.detach(),
            98 => self.machine.wake_stream(),
            _ => match self.random.below(20) {
                0 => {
                    let driven = self.random.one_in(2);
                    self.machine.set_driven(driven);
                }
                1..=8 => self.begin_hand_over(),
                9 => {
                    // The queue continues in a child by `fork`: the thread that was to carry out
                    // these effects has stayed in the parent.
                    self.decide();
                    drop(self.machine.take_effects());
                    self.machine.forked();
                }
                _ => {}
            },
        }
        self.perform();
        self.continue_hand_over();
        self.check();
    }

    fn receive(&mut self, most: usize) {
        let sent = self.sent;
        let lost_before = self.machine.lost();
        let mut arrivals = Vec::new();
        let mut replies = Vec::new();
        let mut bad = Vec::new();
        let mut emptied = None;
        let before = self.kernel.socket.len();
        for _ in 0..most {
            match self.kernel.socket.pop_front() {
                None => {
                    emptied = Some(sent);
                    break;
                }
                Some(Datagram::Reply(reply)) => replies.push(reply),
                Some(Datagram::Packet { id, readable: None }) => arrivals.push(id),
                Some(Datagram::Packet { id, readable: Some(readable) }) => {
                    self.said.entry(id).or_default().default = true;
                    // What stands behind is received in another round, so that the order is kept.
                    bad.push(readable);
                    break;
                }
            }
        }
        let received = before - self.kernel.socket.len();
        if arrivals.is_empty() && replies.is_empty() && bad.is_empty() {
            if let Some(sent) = emptied {
                self.machine.socket_empty(sent);
            }
            return;
        }
        let now = self.now();
        for id in &arrivals {
            self.received_at.insert(*id, now);
            self.said.entry(*id).or_default();
        }
        let storage = Storage::Own { bytes: 100 };
        if self.machine.arrived(arrivals.iter().map(|id| Arrival { id: *id, storage })) {
            self.receiver.extend(&arrivals);
        } else {
            arrivals.iter().for_each(|id| self.said.entry(*id).or_default().default = true);
        }
        for id in bad {
            self.machine.malformed(id);
        }
        for reply in replies {
            self.machine.replied(reply);
        }
        let charge = received * CHARGE;
        self.machine.end_receive_round(0, charge, 0, lost_before, emptied);
    }

    fn hand_out(&mut self) {
        while let Some(id) = self.receiver.pop_front() {
            if self.machine.is_undecided(id) && self.machine.life().is_open() {
                self.owned.push(id);
                return;
            }
            if !self.machine.life().is_open() {
                self.receiver.push_front(id);
                return;
            }
        }
    }

    fn decide(&mut self) {
        if self.owned.is_empty() {
            return;
        }
        let at = if self.random.one_in(3) { self.random.below(self.owned.len()) } else { 0 };
        let id = self.owned.remove(at);
        let action = match self.random.below(8) {
            0..=3 => Action::Accept,
            4..=6 => Action::Drop,
            _ => Action::Requeue { queue: 7, bypass: false },
        };
        let waiter = self.random.one_in(8).then_some(self.next_waiter);
        let extras = match waiter {
            Some(waiter) => {
                self.next_waiter += 1;
                Some(TestExtra { acknowledged: true, waiter: Some(waiter) })
            }
            None => self.random.one_in(8).then(TestExtra::default),
        };
        let decision = Decision { fields: VerdictFields::plain(action), extras, origin: Origin::Owner };
        let was_undecided = self.machine.is_undecided(id);
        match self.machine.decide(id, decision) {
            Ok(()) => {
                assert!(was_undecided);
                self.said.entry(id).or_default().owner = Some(action);
                self.given.push((id, self.now()));
                if let Some(waiter) = waiter {
                    self.waiters.insert(waiter, (id, action));
                    self.machine.flush();
                }
            }
            Err(_) => assert!(!was_undecided, "packet {id} could have been decided"),
        }
    }

    fn abandon(&mut self) {
        if !self.owned.is_empty() {
            let id = self.owned.swap_remove(self.random.below(self.owned.len()));
            if self.machine.is_undecided(id) {
                self.said.entry(id).or_default().default = true;
                self.given.push((id, self.now()));
            }
            self.machine.abandon(id);
        }
    }

    fn detach(&mut self) {
        if !self.owned.is_empty() {
            self.machine.detached(self.owned[self.random.below(self.owned.len())]);
        }
    }

    /// Advances the clock by a random step, and fires the timer in between.
    fn pass_time(&mut self) {
        let step = Duration::from_micros(1 + self.random.below(3000) as u64);
        let until = self.now() + step;
        while let Some(alarm) = self.alarm.filter(|alarm| *alarm <= until) {
            self.clock.0.set(alarm.max(self.now()));
            self.check_cap();
            self.ring();
        }
        self.clock.0.set(until);
        self.check_cap();
        if std::mem::take(&mut self.tasks_ran_due) && self.random.one_in(2) {
            self.machine.tasks_ran();
        }
    }

    fn ring(&mut self) {
        self.alarm = None;
        let now = self.now();
        if let Some((after, _)) = self.deadline {
            for (id, at) in &self.received_at {
                if *at + after <= now && self.machine.is_undecided(*id) {
                    self.said.get_mut(id).expect("it was received").deadline = true;
                }
            }
        }
        self.machine.fire();
        self.perform();
    }

    /// A verdict that can be sent has been sent when its time limit is over. A custom policy has no
    /// limit.
    fn check_cap(&mut self) {
        let now = self.now();
        let can_send = self.capable && !self.out_of_memory && !self.machine.is_permission_missing();
        if can_send && !self.custom && self.machine.rounds.retry().is_none() {
            let late = self.given.iter().find(|(_, at)| now > *at + CAP);
            assert_eq!(late, None, "{} decisions wait", self.machine.ledger.gathered());
        } else {
            self.given.clear();
        }
        let machine = &self.machine;
        let will_be_sent = machine.rounds.is_wanted()
            || machine.gathering.due().is_some()
            || machine.rounds.retry().is_some()
            || machine.is_permission_missing();
        let goes_on = !matches!(machine.life(), LifeCycle::Unbinding { .. } | LifeCycle::Closed(_));
        assert!(will_be_sent || machine.ledger.gathered() == 0 || !goes_on, "gathered, and nothing sends it");
    }

    fn perform(&mut self) {
        for _ in 0..1000 {
            if !self.machine.has_effects() {
                return;
            }
            let Effects { flush, call_driver, timer, ask, look, unbind, drain, probe, .. } =
                self.machine.take_effects();
            if let Some(alarm) = timer {
                self.alarm = alarm.at;
            }
            self.tasks_ran_due |= call_driver;
            // The driver does not always run.
            let comes = self.driver_runs && call_driver;
            if (comes || probe) && self.machine.is_permission_missing() {
                match self.capable {
                    true => self.machine.permitted(),
                    false => self.machine.still_missing(),
                }
            }
            for event in self.machine.take_notices() {
                match event {
                    Notice::Reply(waiter, result) => self.replied(waiter, &result),
                    Notice::Report(_) | Notice::Spent(_) => {}
                }
            }
            while let Some(refusal) = self.machine.next_refusal() {
                if refusal.kind() == ErrorKind::NotPermitted {
                    self.refused(refusal.packet_id().expect("a refusal names its packet").get());
                }
            }
            if let Some(ask) = ask {
                let (mut policy, context) = *ask;
                let decision = policy.decide(&context);
                match self.random.one_in(50) {
                    true => self.machine.policy_panicked(),
                    false => self.machine.policy_decided(policy, decision, &context),
                }
            }
            if look {
                self.receive(64);
            }
            if flush {
                self.flush();
            }
            if let Some(action) = drain {
                self.stop(action);
            }
            if unbind {
                self.unbind();
            }
        }
        panic!("effects without end");
    }

    fn replied(&mut self, waiter: u32, result: &Result<(), Error>) {
        // Waiters of configuration messages are not in the map.
        let Some((id, action)) = self.waiters.remove(&waiter) else { return };
        match result {
            Ok(()) => assert_eq!(self.kernel.actions.get(&id), Some(&action), "packet {id} was confirmed"),
            Err(error) if error.kind() == ErrorKind::NotPermitted => self.refused(id),
            Err(_) => {}
        }
    }

    fn refused(&mut self, id: u32) {
        // It may have got the default action meanwhile.
        let action = self.kernel.actions.get(&id);
        assert!(action.is_none_or(|action| *action == self.on_unanswered), "packet {id} was not refused");
        self.said.entry(id).or_default().default = true;
    }

    /// As `Shared::flush` does it.
    fn flush(&mut self) {
        loop {
            loop {
                self.outbox.set_max_send(MESSAGE * (1 + self.random.below(20)));
                match self.machine.poll_transmit(&mut self.outbox, || self.capable) {
                    Some(Transmit::Receive) => self.receive(100_000),
                    Some(Transmit::Datagram { proof, acknowledged }) => self.send(proof, acknowledged),
                    None => break,
                }
            }
            self.outbox.take_spent();
            if !self.machine.send_lock_released() {
                return;
            }
        }
    }

    fn send(&mut self, proof: Proof, acknowledged: bool) {
        let (first, messages) = self.outbox.chosen();
        let ids: Vec<u32> = messages.iter().flat_map(|message| self.machine.ledger.ids_of(message)).collect();
        // The queue's own decisions are short.
        let may_be_long = match messages {
            [VerdictMessage::Single { decision, .. }] => decision.origin == Origin::Owner,
            _ => messages.len() > 1,
        };
        let alone = messages.len() == 1;
        let messages: Vec<Sent> = messages
            .iter()
            .map(|message| match message {
                VerdictMessage::Single { id, decision } => Sent::Single {
                    id: *id,
                    action: decision.fields.action,
                    acknowledge: decision.extras.as_ref().is_some_and(TestExtra::is_acknowledged),
                },
                VerdictMessage::Batch { max, fields, .. } => Sent::Batch { max: *max, action: fields.action },
            })
            .collect();
        assert_eq!(self.outbox.encode().len(), messages.len() * MESSAGE);
        let any = messages.iter().any(|message| matches!(message, Sent::Single { acknowledge: true, .. }));
        assert_eq!(acknowledged, any);
        let outcome = if may_be_long && self.random.one_in(30) {
            if alone {
                ids.iter().for_each(|id| self.refused(*id));
            }
            Outcome::TooLong(Errno::MSGSIZE)
        } else if self.out_of_memory && self.random.one_in(2) {
            Outcome::Failed
        } else {
            self.kernel.send(first, messages, self.capable);
            if proof == Proof::Replies || self.random.one_in(3) {
                // Another thread receives meanwhile.
                let most = if proof == Proof::Replies { 100_000 } else { 1 + self.random.below(20) };
                self.receive(most);
            }
            // The capability is not asked for if the proof comes later.
            if self.capable || proof == Proof::Later { Outcome::Sent } else { Outcome::Refused }
        };
        let sent = matches!(outcome, Outcome::Sent) && !self.machine.outstanding.is_refused();
        if sent {
            self.given.retain(|(id, _)| !ids.contains(id));
        }
        self.sent = self.machine.transmitted(&mut self.outbox, outcome);
    }

    /// As `Shared::configure`: receives until the reply has arrived or is lost.
    fn configure(&mut self, message: fn(Action) -> Sent, action: Action) -> Result<(), Error> {
        for _ in 0..50 {
            self.receive(64);
            let waiter = 1_000_000 + self.next_waiter;
            self.next_waiter += 1;
            let sequence = self.machine.await_config("set", Change::default(), waiter);
            self.kernel.send(sequence, vec![message(action)], self.capable);
            self.sent = sequence;
            loop {
                let mut result = None;
                // Notices are not delivered until the lock is released.
                self.machine.notices.retain(|event| match event {
                    Notice::Reply(other, reply) if *other == waiter => {
                        result = Some(match reply {
                            Ok(()) => Ok(()),
                            Err(error) => Err(error.kind()),
                        });
                        false
                    }
                    _ => true,
                });
                match result {
                    None => self.receive(64),
                    Some(Ok(())) => return Ok(()),
                    Some(Err(ErrorKind::Unconfirmed)) => break,
                    Some(Err(kind)) => return Err(Error::new(kind, "set")),
                }
            }
        }
        Err(Error::new(ErrorKind::Unconfirmed, "set"))
    }

    fn unbind(&mut self) {
        assert!(!std::mem::replace(&mut self.unbinding, true), "unbound twice");
        let result = self.configure(|_| Sent::Unbind, Action::Drop);
        self.unbinding = self.machine.unbound(result, self.capable);
    }

    /// Begins the shutdown, and does what `Shared::drain` does.
    fn close(&mut self, limit: WaitLimit) {
        if self.machine.has_unproven() {
            self.receive(100_000);
            self.perform();
        }
        let action = if self.random.one_in(2) { Action::Drop } else { Action::Accept };
        if !self.machine.begin_close(action, limit) {
            if self.machine.life().is_handing_over() {
                // The shutdown begins when the hand-over fails.
                self.close_action = Some(action);
                self.resume();
            }
            return;
        }
        self.close_action = Some(action);
        let unread: Vec<u32> = self.receiver.drain(..).collect();
        unread.iter().for_each(|id| self.said.entry(*id).or_default().default = true);
        self.machine.decide_unread(unread.into_iter(), action);
        self.stop(action);
        self.perform();
    }

    /// As `Shared::drain` does it.
    fn stop(&mut self, action: Action) {
        let length = |action| Sent::Length { packets: 0, fail_open: action == Action::Accept };
        let result = self.configure(length, action);
        let unread: Vec<u32> = self.receiver.drain(..).collect();
        unread.iter().for_each(|id| self.said.entry(*id).or_default().default = true);
        self.machine.decide_unread(unread.into_iter(), action);
        self.stopping = true;
        self.machine.stopped(result, self.capable);
    }

    fn check(&mut self) {
        let stats = self.machine.stats();
        let sum = taken(&stats) + stats.held.in_flight as u64;
        assert_eq!(stats.received.packets, sum, "{stats:?}");
        // No false alarm.
        assert!(self.machine.dropped_while_queued() <= self.kernel.dropped, "{stats:?}");
    }

    /// Every decided packet got an allowed action.
    fn check_actions(&self) {
        for (id, action) in &self.kernel.actions {
            let said = &self.said[id];
            let default = said.default.then_some(self.on_unanswered);
            let close = self.close_action;
            let deadline = self.deadline.filter(|_| said.deadline).map(|(_, action)| action);
            let allowed = [said.owner, default, deadline, close.filter(|_| said.owner.is_none())];
            assert!(allowed.contains(&Some(*action)), "packet {id} got {action:?}, and {said:?}, {allowed:?}");
        }
    }

    /// The end of a history: nothing is forgotten.
    fn end(&mut self) {
        (self.capable, self.out_of_memory) = (true, false);
        self.machine.permitted();
        self.perform();
        let limit = match self.random.below(3) {
            0 => WaitLimit::Never,
            1 => WaitLimit::At(self.now()),
            _ => WaitLimit::At(self.now() + Duration::from_millis(5)),
        };
        // The thread that closes may lack the capability; another thread has it, or gets it later.
        let incapable = limit == WaitLimit::Never && self.random.one_in(2);
        self.capable = !incapable;
        self.close(limit);
        self.perform();
        self.check();
        if limit == WaitLimit::Never {
            while !self.owned.is_empty() {
                if self.random.one_in(2) {
                    self.decide()
                } else {
                    self.abandon()
                }
                self.perform();
                self.check();
            }
        }
        for _ in 0..100_000 {
            if self.machine.life().is_closed() {
                break;
            }
            self.capable |= self.random.one_in(5);
            // Without a timer the shutdown would never finish.
            let alarm = self.alarm.expect("a timer until the queue is closed");
            self.clock.0.set(alarm.max(self.now()));
            if let WaitLimit::At(_) = limit {
                self.owned.iter().for_each(|id| self.said.entry(*id).or_default().default = true);
            }
            self.ring();
            self.check();
        }
        assert!(self.machine.life().is_closed(), "the queue is not closed: {:?}", self.machine.life());
        self.receive(100_000);
        self.perform();
        self.check();
        let stats = self.machine.stats();
        assert_eq!(stats.held.in_flight, 0);
        self.check_actions();
        let forgotten: Vec<u32> = self
            .said
            .keys()
            .copied()
            .filter(|id| !self.kernel.actions.contains_key(id) && !self.kernel.gone.contains(id))
            .collect();
        assert_eq!(forgotten, [] as [u32; 0], "forgotten");
        assert_eq!(self.waiters.len(), 0, "confirmations without a reply");
    }
}

/// Packets that the kernel has taken a verdict for, or that are gone.
fn taken(stats: &Stats) -> u64 {
    let decided = stats.decided;
    let taken = decided.accepted + decided.dropped + decided.repeated + decided.requeued;
    taken + stats.sent.refused + stats.sent.gone_at_least
}

/// A custom policy that makes every decision.
fn custom_policy(seed: u64) -> FlushPolicy {
    let mut state = seed;
    FlushPolicy::custom(move |context| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        match (state >> 33) % 4 {
            0 => FlushDecision::Now,
            1 if context.gathered > 3 => FlushDecision::Now,
            1 | 2 => FlushDecision::AfterReadyTasks,
            _ => FlushDecision::Within(Duration::from_micros(300)),
        }
    })
}

fn history(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..EVENTS {
        world.step();
    }
    world.check_actions();
    world.end();
}

#[test]
fn a_million_events_break_no_promise() {
    if let Some(seed) = std::env::var("NFQUEUE_STATE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return history(seed);
    }
    for seed in 0..HISTORIES {
        if let Err(panic) = std::panic::catch_unwind(|| history(seed)) {
            eprintln!("NFQUEUE_STATE_SEED={seed} repeats it");
            std::panic::resume_unwind(panic);
        }
    }
}
