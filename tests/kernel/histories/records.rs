//! What became of every datagram, as the program, the receivers and the library tell, and whether
//! that was allowed.

use std::{
    collections::HashMap,
    fmt::Write as _,
    ops::AddAssign,
    time::{Duration, Instant},
};

use tokio_nfqueue::{Action, ErrorKind, Stats};

use super::plan::Plan;
use crate::common::Account;

#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) datagrams: Vec<Datagram>,
    /// What `refusals` told, by queue and packet id.
    told: HashMap<(usize, u32), Vec<ErrorKind>>,
    /// The number of the round that is under way.
    pub(crate) round: usize,
    /// The end has begun.
    pub(crate) ending: bool,
    /// Where nothing may be sent any more, for the end came without the capability.
    pub(crate) hopeless: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Datagram {
    round: usize,
    /// Sent while no queue was in its way.
    direct: bool,
    /// The sender was told that it was not sent.
    pub(crate) unsent: bool,
    handed_out: Vec<HandedOut>,
    delivered: u32,
}

/// One time that a packet was handed out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandedOut {
    queue: usize,
    id: u32,
    at: Instant,
    pub(crate) done: Done,
}

/// What its owner did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// Nothing yet.
    Held,
    Abandoned,
    Gave(Action, Answer, Instant),
}

/// What the owner knows of its verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// `refusals` tells if it was refused.
    ToldElsewhere,
    /// It was confirmed, and nobody heard the answer.
    Unheard,
    Confirmed(Result<(), ErrorKind>),
}

/// How things ended, summed up.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) histories: u64,
    pub(crate) packets: u64,
    pub(crate) delivered: u64,
    /// Dropped by a verdict.
    pub(crate) dropped: u64,
    pub(crate) repeated: u64,
    pub(crate) requeued: u64,
    /// Of those handed out, the ones that nobody decided.
    pub(crate) abandoned: u64,
    /// Verdicts that came too late.
    pub(crate) late: u64,
    /// Verdicts refused for want of the capability.
    pub(crate) refused: u64,
    /// Verdicts of which it is known that they found no packet.
    pub(crate) gone: u64,
    /// Accepted, and gone with a hook or an interface as far as can be told.
    pub(crate) excused: u64,
    /// Never handed out.
    pub(crate) unseen: u64,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.histories += other.histories;
        self.packets += other.packets;
        self.delivered += other.delivered;
        self.dropped += other.dropped;
        self.repeated += other.repeated;
        self.requeued += other.requeued;
        self.abandoned += other.abandoned;
        self.late += other.late;
        self.refused += other.refused;
        self.gone += other.gone;
        self.excused += other.excused;
        self.unseen += other.unseen;
    }
}

/// What may have become of a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fates {
    delivered: bool,
    lost: bool,
    requeued: bool,
}

impl Fates {
    const LOST: Self = Self { delivered: false, lost: true, requeued: false };

    fn of(action: Action) -> Self {
        match action {
            Action::Accept | Action::Stop | Action::Repeat => Self { delivered: true, ..Self::default() },
            Action::Drop => Self::LOST,
            Action::Requeue { .. } => Self { requeued: true, ..Self::default() },
            other => unreachable!("{other:?} is given by nobody"),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            delivered: self.delivered | other.delivered,
            lost: self.lost | other.lost,
            requeued: self.requeued | other.requeued,
        }
    }

    fn or_if(self, condition: bool, other: Self) -> Self {
        if condition { self.or(other) } else { self }
    }
}

/// What is wrong.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Delivered, which it must not be.
    pub(crate) wrong: usize,
    /// Not delivered, which it must be.
    pub(crate) forgotten: usize,
    /// Delivered more than once.
    pub(crate) twice: usize,
    /// Numbers that do not add up.
    pub(crate) sums: usize,
    pub(crate) text: String,
}

impl Findings {
    pub(crate) fn none(&self) -> bool {
        self.wrong + self.forgotten + self.twice + self.sums == 0
    }

    fn sum(&mut self, text: &str) {
        self.sums += 1;
        let _ = writeln!(self.text, "  {text}");
    }

    fn expect<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: T, expected: T) {
        if found != expected {
            self.sum(&format!("{what}: {found:?}, expected {expected:?}"));
        }
    }

    fn expect_between(&mut self, what: &str, found: u64, (least, most): (u64, u64)) {
        if !(least..=most).contains(&found) {
            self.sum(&format!("{what}: {found}, expected {least} to {most}"));
        }
    }
}

/// What a queue's numbers should be, by what the program did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Packets that were sent its way: at least, and at most.
    arrived: (u64, u64),
    /// Handed out.
    seen: u64,
    abandoned: u64,
    accepted: u64,
    dropped: u64,
    repeated: u64,
    requeued: u64,
    /// Told to be late.
    late: u64,
    /// Verdicts that may have been late.
    perhaps_late: u64,
    /// Verdicts of which nobody knows whether they were taken.
    unconfirmed: u64,
    /// Delivered, and never handed out.
    delivered_unseen: u64,
    /// Accepted long after they were handed out, known to nobody as gone, and not delivered.
    vanished: u64,
}

/// Where the numbers of a queue stood when a round ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mark {
    tally: Tally,
    stats: Stats,
    account: Option<Account>,
}

impl Records {
    pub(crate) fn new() -> Self {
        Self { datagrams: Vec::new(), told: HashMap::new(), round: 0, ending: false, hopeless: false }
    }

    /// A number for a datagram that is about to be sent.
    pub(crate) fn next(&mut self, direct: bool) -> u32 {
        self.datagrams.push(Datagram { round: self.round, direct, ..Datagram::default() });
        self.datagrams.len() as u32 - 1
    }

    /// A packet has been handed out; tells for the how many-th time.
    pub(crate) fn handed_out(&mut self, serial: u32, queue: usize, id: u32) -> Option<usize> {
        let datagram = self.datagrams.get_mut(serial as usize)?;
        datagram.handed_out.push(HandedOut { queue, id, at: Instant::now(), done: Done::Held });
        Some(datagram.handed_out.len() - 1)
    }

    pub(crate) fn set(&mut self, serial: u32, time: usize, done: Done) {
        self.datagrams[serial as usize].handed_out[time].done = done;
    }

    pub(crate) fn done(&self, serial: u32, time: usize) -> Done {
        self.datagrams[serial as usize].handed_out[time].done
    }

    pub(crate) fn was_handed_out(&self, serial: u32) -> bool {
        !self.datagrams[serial as usize].handed_out.is_empty()
    }

    pub(crate) fn was_delivered(&self, serial: u32) -> bool {
        self.datagrams[serial as usize].delivered > 0
    }

    pub(crate) fn deliver(&mut self, serial: u32) -> bool {
        let datagram = self.datagrams.get_mut(serial as usize);
        datagram.map(|datagram| datagram.delivered += 1).is_some()
    }

    pub(crate) fn tell(&mut self, queue: usize, id: u32, kind: ErrorKind) {
        self.told.entry((queue, id)).or_default().push(kind);
    }

    fn told(&self, time: &HandedOut, kind: ErrorKind) -> bool {
        self.told.get(&(time.queue, time.id)).is_some_and(|kinds| kinds.contains(&kind))
    }

    /// What a verdict came to, as its owner was told: `Ok` if nothing was.
    fn outcome(&self, time: &HandedOut, answer: Answer) -> Result<(), ErrorKind> {
        match answer {
            Answer::Confirmed(result) => result,
            Answer::ToldElsewhere | Answer::Unheard => match self.told.get(&(time.queue, time.id)) {
                Some(kinds) => Err(kinds[0]),
                None => Ok(()),
            },
        }
    }

    /// What may have become of a packet when its owner had done this.
    fn fates(&self, plan: &Plan, datagram: &Datagram, time: &HandedOut) -> Result<Fates, String> {
        let settings = &plan.queues[time.queue];
        let closing = self.ending && datagram.round == self.round;
        let faulty = plan.is_faulty(datagram.round);
        let hopeless = self.hopeless && closing;
        let gone = faulty || hopeless;
        let unanswered = Fates::of(settings.unanswered);
        let expired = match settings.deadline {
            // Its own verdict may have been refused.
            Some((_, action)) => Fates::of(action).or_if(plan.capless || hopeless, unanswered),
            None => Fates::default(),
        };
        let answered_for = expired.or_if(closing, unanswered);
        let fates = match time.done {
            Done::Held => return Err("still held".to_owned()),
            Done::Abandoned => unanswered.or(expired).or_if(gone, Fates::LOST),
            Done::Gave(action, answer, _) => match (answer, self.outcome(time, answer)) {
                (Answer::Unheard, _) => Fates::of(action)
                    .or(answered_for)
                    .or_if(plan.capless || hopeless, unanswered)
                    .or_if(gone, Fates::LOST),
                // Where a hook comes before the rules it is queued once more, and perhaps in vain.
                (Answer::Confirmed(_), Ok(())) => {
                    Fates::of(action).or_if(plan.queues_again(datagram.round), Fates::LOST)
                }
                (_, Ok(())) => Fates::of(action).or_if(gone, Fates::LOST),
                (_, Err(ErrorKind::NotPermitted)) if plan.capless || hopeless => unanswered.or_if(gone, Fates::LOST),
                (_, Err(ErrorKind::Expired)) if answered_for != Fates::default() => {
                    answered_for.or_if(gone, Fates::LOST)
                }
                (_, Err(ErrorKind::PacketGone)) if gone => Fates::LOST,
                (_, Err(ErrorKind::Unconfirmed)) if settings.receive_buffer.is_some() => {
                    Fates::of(action).or_if(plan.capless, unanswered).or_if(gone, Fates::LOST)
                }
                (_, Err(kind)) => return Err(format!("unexpectedly {kind:?}")),
            },
        };
        Ok(fates)
    }

    /// What may have become of a packet that was never handed out.
    fn unseen(&self, plan: &Plan, datagram: &Datagram, queue: usize, bypass: bool) -> Fates {
        let settings = &plan.queues[queue];
        let closing = self.ending && datagram.round == self.round;
        let expired = settings.deadline.is_some_and(|(_, action)| {
            action == Action::Accept || plan.capless && settings.unanswered == Action::Accept
        });
        let passes = settings.fail_open || expired || closing && (settings.unanswered == Action::Accept || bypass);
        Fates { delivered: passes, lost: true, requeued: false }
    }

    fn fates_of(&self, plan: &Plan, serial: u32) -> Result<Fates, String> {
        let datagram = &self.datagrams[serial as usize];
        if datagram.direct {
            return Ok(Fates { delivered: true, ..Fates::default() });
        }
        let Some(last) = datagram.handed_out.last() else {
            return Ok(self.unseen(plan, datagram, plan.front(serial), plan.bypass));
        };
        // What came before must have been something after which a packet can come again.
        let before = &datagram.handed_out[..datagram.handed_out.len() - 1];
        for (time, next) in before.iter().zip(&datagram.handed_out[1..]) {
            let fates = self.fates(plan, datagram, time)?;
            let again = plan.is_faulty(datagram.round) && fates.delivered;
            if !again && !fates.requeued {
                return Err(format!("came again as {next:?}"));
            }
        }
        let fates = self.fates(plan, datagram, last)?;
        if !fates.requeued {
            return Ok(fates);
        }
        let bypass = matches!(last.done, Done::Gave(Action::Requeue { bypass: true, .. }, ..));
        let there = self.unseen(plan, datagram, plan.side(), bypass);
        Ok(Fates { requeued: false, ..fates }.or(there))
    }

    /// Compares what was delivered with what was decided.
    pub(crate) fn judge(&self, plan: &Plan) -> Findings {
        let mut findings = Findings::default();
        for (serial, datagram) in self.datagrams.iter().enumerate() {
            let fates = self.fates_of(plan, serial as u32);
            let twice = |time: &HandedOut| self.told.get(&(time.queue, time.id)).is_some_and(|kinds| kinds.len() > 1);
            let what = match (&fates, datagram.delivered) {
                _ if datagram.handed_out.iter().any(twice) => {
                    findings.sums += 1;
                    "told twice"
                }
                (_, 2..) => {
                    findings.twice += 1;
                    "delivered twice"
                }
                (Err(what), _) => {
                    findings.wrong += 1;
                    what
                }
                (Ok(Fates { delivered: false, .. }), 1) => {
                    findings.wrong += 1;
                    "wrongly delivered"
                }
                (Ok(Fates { lost: false, .. }), 0) if !datagram.unsent => {
                    findings.forgotten += 1;
                    "forgotten"
                }
                _ => continue,
            };
            if findings.wrong + findings.forgotten + findings.twice <= 10 {
                let told: Vec<_> =
                    datagram.handed_out.iter().filter_map(|time| self.told.get(&(time.queue, time.id))).collect();
                let _ = writeln!(findings.text, "  number {serial}: {what}: {datagram:?}, told {told:?}");
            }
        }
        findings
    }

    /// Counts what was done with a queue's packets.
    pub(crate) fn tally(&self, plan: &Plan, queue: usize) -> Tally {
        let mut tally = Tally::default();
        let mut arrive = |certain: bool| {
            tally.arrived.0 += u64::from(certain);
            tally.arrived.1 += 1;
        };
        for (serial, datagram) in self.datagrams.iter().enumerate() {
            let front = plan.front(serial as u32);
            if front == queue && !datagram.direct && !datagram.unsent {
                arrive(true);
            }
            if queue == plan.side() {
                for time in &datagram.handed_out {
                    match self.fates(plan, datagram, time) {
                        Ok(Fates { requeued: true, delivered: false, lost: false }) => arrive(true),
                        Ok(Fates { requeued: true, .. }) => arrive(false),
                        _ => {}
                    }
                }
            }
        }
        for (serial, datagram) in self.datagrams.iter().enumerate() {
            let unseen_at = match datagram.handed_out.last() {
                None => Some(plan.front(serial as u32)),
                Some(last) => {
                    let requeued = self.fates(plan, datagram, last).is_ok_and(|fates| fates.requeued);
                    requeued.then_some(plan.side())
                }
            };
            if unseen_at == Some(queue) && datagram.delivered > 0 && !datagram.direct {
                tally.delivered_unseen += 1;
            }
            for time in datagram.handed_out.iter().filter(|time| time.queue == queue) {
                self.count(plan, datagram, time, &mut tally);
            }
        }
        tally
    }

    fn count(&self, plan: &Plan, datagram: &Datagram, time: &HandedOut, tally: &mut Tally) {
        tally.seen += 1;
        let (action, answer, at) = match time.done {
            Done::Held => return,
            Done::Abandoned => {
                tally.abandoned += 1;
                return;
            }
            Done::Gave(action, answer, at) => (action, answer, at),
        };
        tally.perhaps_late += u64::from(answer == Answer::Unheard);
        match self.outcome(time, answer) {
            Ok(()) => {}
            Err(ErrorKind::Expired) => {
                tally.late += 1;
                return;
            }
            Err(ErrorKind::Unconfirmed) => {
                tally.unconfirmed += 1;
                return;
            }
            Err(_) => return,
        }
        let old = at - time.at > OLD;
        let last = datagram.handed_out.last().is_some_and(|last| last.id == time.id && last.queue == time.queue);
        match action {
            Action::Drop => tally.dropped += 1,
            Action::Repeat => tally.repeated += 1,
            Action::Requeue { .. } => tally.requeued += 1,
            _ => {
                tally.accepted += 1;
                let vanished = old
                    && last
                    && !plan.queues_again(datagram.round)
                    && datagram.delivered == 0
                    && answer == Answer::ToldElsewhere;
                tally.vanished += u64::from(vanished);
            }
        }
    }

    /// Looks whether the numbers of a round without faults add up, after its last datagram has come
    /// through.
    pub(crate) fn check_round(
        &self,
        plan: &Plan,
        queue: usize,
        before: &Mark,
        stats: &Stats,
        account: Option<Account>,
        findings: &mut Findings,
    ) -> Mark {
        let tally = self.tally(plan, queue);
        let settings = &plan.queues[queue];
        let name = |what: &str| format!("queue {queue}: {what}");
        let Some(now) = account else {
            findings.sum(&name("not bound"));
            return Mark { tally, stats: *stats, account };
        };
        findings.expect(&name("waiting"), now.waiting, 0);
        findings.expect(&name("in flight"), stats.held.in_flight, 0);
        // What is lost after the last packet that is received is not known yet. The other queues'
        // last has been received.
        let unknown = if queue == plan.side() { u64::MAX } else { 0 };
        let known = stats.received.packets + stats.lost.packets;
        findings.expect_between(&name("the last id"), now.last_id, (known, known.saturating_add(unknown)));
        if !settings.fail_open {
            findings.expect(&name("lost"), now.socket_full - stats.lost.packets, now.last_id - known);
            if !plan.is_faulty(self.round) {
                let (full, last) = before.account.map_or((0, 0), |account| (account.queue_full, account.last_id));
                let found = now.last_id + now.queue_full - last - full;
                let arrived = (tally.arrived.0 - before.tally.arrived.0, tally.arrived.1 - before.tally.arrived.1);
                findings.expect_between(&name("arrived"), found, arrived);
                let unseen =
                    (stats.received.packets - tally.seen) - (before.stats.received.packets - before.tally.seen);
                let delivered = tally.delivered_unseen - before.tally.delivered_unseen;
                let accepts = settings.deadline.is_some_and(|(_, action)| action == Action::Accept);
                let least = if accepts && !plan.capless { unseen } else { 0 };
                let most = if accepts || plan.capless { unseen } else { 0 };
                // A packet with an unheard verdict to be requeued may have been decided otherwise.
                let other = if queue == plan.side() { tally.arrived.1 - tally.arrived.0 } else { 0 };
                findings.expect_between(
                    &name("delivered unseen"),
                    delivered,
                    (least.saturating_sub(other), most + other),
                );
            }
        }
        Mark { tally, stats: *stats, account }
    }

    /// Looks whether a queue's numbers add up at the end.
    pub(crate) fn check_end(&self, plan: &Plan, queue: usize, stats: &Stats, findings: &mut Findings) {
        let tally = self.tally(plan, queue);
        let settings = &plan.queues[queue];
        let name = |what: &str| format!("queue {queue}: {what}");
        if let Some(wrong) = imbalance(stats) {
            findings.sum(&name(&wrong));
        }
        findings.expect(&name("malformed"), stats.received.malformed, 0);
        findings.expect(&name("refusals unread"), stats.sent.refusals_unread, 0);
        if !self.hopeless {
            findings.expect(&name("refused"), stats.sent.refused, 0);
            findings.expect(&name("in flight"), stats.held.in_flight, 0);
            findings.expect(&name("held bytes"), stats.held.bytes, 0);
            findings.expect(&name("oldest undecided"), stats.held.oldest_undecided, None);
        }
        if settings.receive_buffer.is_none() && !self.hopeless && tally.vanished > stats.sent.gone_at_least {
            findings.sum(&name(&format!("{} vanished, but {} gone", tally.vanished, stats.sent.gone_at_least)));
        }
        let late = (tally.late, tally.late + tally.perhaps_late);
        findings.expect_between(&name("late"), stats.decided.late, late);
        let faulty = (0..plan.rounds.len()).any(|round| plan.is_faulty(round));
        if faulty || plan.capless || self.hopeless {
            return;
        }
        findings.expect(&name("gone"), stats.sent.gone_at_least, 0);
        findings.expect(&name("refusals"), stats.sent.refusals, 0);
        let unseen = stats.received.packets - tally.seen;
        findings.expect(
            &name("unanswered and expired"),
            stats.decided.unanswered + stats.decided.expired,
            tally.abandoned + unseen + stats.decided.late,
        );
        let by = |action| {
            let unanswered = if settings.unanswered == action { stats.decided.unanswered } else { 0 };
            let expired = settings.deadline.filter(|(_, other)| *other == action).map_or(0, |_| stats.decided.expired);
            unanswered + expired
        };
        let unheard = stats.decided.late - tally.late;
        let about = |count: u64| (count.saturating_sub(unheard), count + tally.unconfirmed);
        findings.expect_between(&name("accepted"), stats.decided.accepted - by(Action::Accept), about(tally.accepted));
        findings.expect_between(&name("dropped"), stats.decided.dropped - by(Action::Drop), about(tally.dropped));
        findings.expect_between(&name("repeated"), stats.decided.repeated, about(tally.repeated));
        findings.expect_between(&name("requeued"), stats.decided.requeued, about(tally.requeued));
    }

    /// What was never handed out in the last round and not delivered, of a queue whose traffic
    /// should have passed.
    pub(crate) fn check_passing(
        &self,
        plan: &Plan,
        queue: usize,
        before: &Mark,
        stats: &Stats,
        findings: &mut Findings,
    ) {
        let settings = &plan.queues[queue];
        let drops = settings.unanswered != Action::Accept
            || settings.deadline.is_some_and(|(_, action)| action == Action::Drop)
            || settings.max_len.is_some()
            // What is lost after the last packet that is received is counted by nobody.
            || settings.receive_buffer.is_some()
            || !plan.bypass
            || plan.rounds.iter().any(|round| round.reconfigurers > 0);
        if drops || self.hopeless || plan.is_faulty(self.round) || queue == plan.side() {
            return;
        }
        let missing = self.datagrams.iter().enumerate().filter(|(serial, datagram)| {
            plan.front(*serial as u32) == queue
                && datagram.round == self.round
                && datagram.handed_out.is_empty()
                && datagram.delivered == 0
        });
        findings.expect_between(
            &format!("queue {queue}: passing traffic that was lost"),
            missing.count() as u64,
            (0, stats.lost.packets - before.stats.lost.packets),
        );
    }

    pub(crate) fn totals(&self, plan: &Plan) -> Totals {
        let mut totals = Totals { histories: 1, packets: self.datagrams.len() as u64, ..Totals::default() };
        for datagram in &self.datagrams {
            totals.delivered += u64::from(datagram.delivered);
            totals.unseen += u64::from(datagram.handed_out.is_empty());
            for time in &datagram.handed_out {
                match time.done {
                    Done::Held => {}
                    Done::Abandoned => totals.abandoned += 1,
                    Done::Gave(action, answer, _) => match (self.outcome(time, answer), action) {
                        (Ok(()), Action::Drop) => totals.dropped += 1,
                        (Ok(()), Action::Repeat) => totals.repeated += 1,
                        (Ok(()), Action::Requeue { .. }) => totals.requeued += 1,
                        (Ok(()), _) => {}
                        (Err(ErrorKind::Expired), _) => totals.late += 1,
                        (Err(ErrorKind::NotPermitted), _) => totals.refused += 1,
                        (Err(_), _) => totals.gone += 1,
                    },
                }
            }
            let accepted = datagram.handed_out.last().is_some_and(|last| {
                let Done::Gave(Action::Accept | Action::Repeat, answer, _) = last.done else { return false };
                self.outcome(last, answer).is_ok() && !self.told(last, ErrorKind::NotPermitted)
            });
            let faulty = plan.is_faulty(datagram.round) || self.hopeless;
            totals.excused += u64::from(accepted && faulty && datagram.delivered == 0);
        }
        totals
    }
}

/// Longer ago than this a packet gets a verdict of its own, of which the kernel tells whether it
/// found the packet.
const OLD: Duration = Duration::from_millis(5);

/// What does not add up in a snapshot.
pub(crate) fn imbalance(stats: &Stats) -> Option<String> {
    let settled = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
    let rest = stats.sent.refused + stats.sent.gone_at_least + stats.held.in_flight as u64;
    (stats.received.packets != settled + rest)
        .then(|| format!("the sum is not {} received: {stats:?}", stats.received.packets))
}
