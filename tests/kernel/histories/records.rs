//! Records of every datagram, as the program, the receivers and the library report it, and the
//! check whether that was allowed.

use std::{
    collections::HashMap,
    fmt::Write as _,
    ops::AddAssign,
    time::{Duration, Instant},
};

use tokio_nfqueue::{Action, ErrorKind, Stats};

use super::plan::Plan;
use crate::{common::Account, settings::DEFAULT_MAX_LEN};

#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) datagrams: Vec<Datagram>,
    /// The kinds of reported refusals, by queue and packet id.
    reported: HashMap<(usize, u32), Vec<ErrorKind>>,
    /// The number of the current round.
    pub(crate) round: usize,
    /// The shutdown has begun.
    pub(crate) shutting_down: bool,
    /// Nothing can be sent any more, because the shutdown was begun without the capability.
    pub(crate) unsendable: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Datagram {
    round: usize,
    /// Sent while no queue was in the way.
    direct: bool,
    /// The send has failed.
    pub(crate) unsent: bool,
    handed_out: Vec<HandedOut>,
    delivered: u32,
}

/// One time at which a packet was handed out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandedOut {
    queue: usize,
    id: u32,
    at: Instant,
    pub(crate) done: Done,
}

/// What the owner of the packet did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// Nothing yet.
    Held,
    Abandoned,
    Gave(Action, Response, Instant),
}

/// What the owner knows about its verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Response {
    /// `refusals` reports it if it was refused.
    InRefusals,
    /// `confirm` was called, and its result was not read.
    NotAwaited,
    Confirmed(Result<(), ErrorKind>),
}

/// The sums of all results.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) histories: u64,
    pub(crate) packets: u64,
    pub(crate) delivered: u64,
    /// Dropped by a verdict.
    pub(crate) dropped: u64,
    pub(crate) repeated: u64,
    pub(crate) requeued: u64,
    /// Handed out, and not decided by the owner.
    pub(crate) abandoned: u64,
    /// Verdicts that came too late.
    pub(crate) late: u64,
    /// Verdicts refused because the capability was missing.
    pub(crate) refused: u64,
    /// Verdicts that are known to have found no packet.
    pub(crate) gone: u64,
    /// Accepted, and probably gone with a hook or an interface.
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

/// Which results are allowed for a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Allowed {
    delivered: bool,
    lost: bool,
    requeued: bool,
}

impl Allowed {
    const LOST: Self = Self { delivered: false, lost: true, requeued: false };

    fn of(action: Action) -> Self {
        match action {
            Action::Accept | Action::Stop | Action::Repeat => Self { delivered: true, ..Self::default() },
            Action::Drop => Self::LOST,
            Action::Requeue { .. } => Self { requeued: true, ..Self::default() },
            other => unreachable!("{other:?} is never given"),
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
    /// Delivered, but must not be.
    pub(crate) wrong: usize,
    /// Not delivered, but must be.
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

/// The expected numbers of a queue, by what the program did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Packets that were sent to the queue: minimum and maximum.
    arrived: (u64, u64),
    /// Handed out.
    seen: u64,
    abandoned: u64,
    accepted: u64,
    dropped: u64,
    repeated: u64,
    requeued: u64,
    /// Reported as late.
    late: u64,
    /// Verdicts that may have been late.
    perhaps_late: u64,
    /// Verdicts of which it is unknown whether the kernel has taken them.
    unconfirmed: u64,
    /// Delivered, and never handed out.
    delivered_unseen: u64,
    /// Accepted long after they were handed out, not reported as gone, and not delivered.
    vanished: u64,
}

/// The numbers of a queue at the end of a round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mark {
    tally: Tally,
    stats: Stats,
    account: Option<Account>,
}

impl Records {
    pub(crate) fn new() -> Self {
        Self { datagrams: Vec::new(), reported: HashMap::new(), round: 0, shutting_down: false, unsendable: false }
    }

    /// A number for the next datagram.
    pub(crate) fn next(&mut self, direct: bool) -> u32 {
        self.datagrams.push(Datagram { round: self.round, direct, ..Datagram::default() });
        self.datagrams.len() as u32 - 1
    }

    /// A packet has been handed out. Returns how often this packet was handed out before.
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

    pub(crate) fn report(&mut self, queue: usize, id: u32, kind: ErrorKind) {
        self.reported.entry((queue, id)).or_default().push(kind);
    }

    fn was_reported(&self, time: &HandedOut, kind: ErrorKind) -> bool {
        self.reported.get(&(time.queue, time.id)).is_some_and(|kinds| kinds.contains(&kind))
    }

    /// The result of a verdict as its owner knows it: `Ok` if no error was reported.
    fn outcome(&self, time: &HandedOut, response: Response) -> Result<(), ErrorKind> {
        match response {
            Response::Confirmed(result) => result,
            Response::InRefusals | Response::NotAwaited => match self.reported.get(&(time.queue, time.id)) {
                Some(kinds) => Err(kinds[0]),
                None => Ok(()),
            },
        }
    }

    /// Which results are allowed after what the owner did.
    fn allowed(&self, plan: &Plan, datagram: &Datagram, time: &HandedOut) -> Result<Allowed, String> {
        let settings = &plan.queues[time.queue];
        let closing = self.shutting_down && datagram.round == self.round;
        let faulty = plan.is_faulty(datagram.round);
        let unsendable = self.unsendable && closing;
        let gone = faulty || unsendable;
        let unanswered = Allowed::of(settings.unanswered);
        let expired = match settings.deadline {
            // The verdict of the deadline may have been refused.
            Some((_, action)) => Allowed::of(action).or_if(plan.capless || unsendable, unanswered),
            None => Allowed::default(),
        };
        let decided_by_queue = expired.or_if(closing, unanswered);
        let allowed = match time.done {
            Done::Held => return Err("still held".to_owned()),
            Done::Abandoned => unanswered.or(expired).or_if(gone, Allowed::LOST),
            Done::Gave(action, response, _) => match (response, self.outcome(time, response)) {
                (Response::NotAwaited, _) => Allowed::of(action)
                    .or(decided_by_queue)
                    .or_if(plan.capless || unsendable, unanswered)
                    .or_if(gone, Allowed::LOST),
                // If a hook is added before the rules, the packet is queued once more, and may be
                // lost there.
                (Response::Confirmed(_), Ok(())) => {
                    Allowed::of(action).or_if(plan.queues_again(datagram.round), Allowed::LOST)
                }
                (_, Ok(())) => Allowed::of(action).or_if(gone, Allowed::LOST),
                (_, Err(ErrorKind::NotPermitted)) if plan.capless || unsendable => {
                    unanswered.or_if(gone, Allowed::LOST)
                }
                (_, Err(ErrorKind::Expired)) if decided_by_queue != Allowed::default() => {
                    decided_by_queue.or_if(gone, Allowed::LOST)
                }
                (_, Err(ErrorKind::PacketGone)) if gone => Allowed::LOST,
                (_, Err(ErrorKind::Unconfirmed)) if settings.receive_buffer.is_some() => {
                    Allowed::of(action).or_if(plan.capless, unanswered).or_if(gone, Allowed::LOST)
                }
                (_, Err(kind)) => return Err(format!("unexpectedly {kind:?}")),
            },
        };
        Ok(allowed)
    }

    /// Which results are allowed for a packet that was never handed out.
    fn unseen(&self, plan: &Plan, datagram: &Datagram, queue: usize, bypass: bool) -> Allowed {
        let settings = &plan.queues[queue];
        let closing = self.shutting_down && datagram.round == self.round;
        let expired = settings.deadline.is_some_and(|(_, action)| {
            action == Action::Accept || plan.capless && settings.unanswered == Action::Accept
        });
        let passes = settings.fail_open || expired || closing && (settings.unanswered == Action::Accept || bypass);
        Allowed { delivered: passes, lost: true, requeued: false }
    }

    fn allowed_for(&self, plan: &Plan, serial: u32) -> Result<Allowed, String> {
        let datagram = &self.datagrams[serial as usize];
        if datagram.direct {
            return Ok(Allowed { delivered: true, ..Allowed::default() });
        }
        let Some(last) = datagram.handed_out.last() else {
            return Ok(self.unseen(plan, datagram, plan.front(serial), plan.bypass));
        };
        // Before that, something must have happened after which a packet can be queued again.
        let before = &datagram.handed_out[..datagram.handed_out.len() - 1];
        for (time, next) in before.iter().zip(&datagram.handed_out[1..]) {
            let allowed = self.allowed(plan, datagram, time)?;
            let again = plan.is_faulty(datagram.round) && allowed.delivered;
            if !again && !allowed.requeued {
                return Err(format!("came again as {next:?}"));
            }
        }
        let allowed = self.allowed(plan, datagram, last)?;
        if !allowed.requeued {
            return Ok(allowed);
        }
        let bypass = matches!(last.done, Done::Gave(Action::Requeue { bypass: true, .. }, ..));
        let there = self.unseen(plan, datagram, plan.side(), bypass);
        Ok(Allowed { requeued: false, ..allowed }.or(there))
    }

    /// Compares what was delivered with what was decided.
    pub(crate) fn judge(&self, plan: &Plan) -> Findings {
        let mut findings = Findings::default();
        for (serial, datagram) in self.datagrams.iter().enumerate() {
            let allowed = self.allowed_for(plan, serial as u32);
            let twice =
                |time: &HandedOut| self.reported.get(&(time.queue, time.id)).is_some_and(|kinds| kinds.len() > 1);
            let what = match (&allowed, datagram.delivered) {
                _ if datagram.handed_out.iter().any(twice) => {
                    findings.sums += 1;
                    "reported twice"
                }
                (_, 2..) => {
                    findings.twice += 1;
                    "delivered twice"
                }
                (Err(what), _) => {
                    findings.wrong += 1;
                    what
                }
                (Ok(Allowed { delivered: false, .. }), 1) => {
                    findings.wrong += 1;
                    "wrongly delivered"
                }
                (Ok(Allowed { lost: false, .. }), 0) if !datagram.unsent => {
                    findings.forgotten += 1;
                    "forgotten"
                }
                _ => continue,
            };
            if findings.wrong + findings.forgotten + findings.twice <= 10 {
                let reported: Vec<_> =
                    datagram.handed_out.iter().filter_map(|time| self.reported.get(&(time.queue, time.id))).collect();
                let _ = writeln!(findings.text, "  number {serial}: {what}: {datagram:?}, reported {reported:?}");
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
                    match self.allowed(plan, datagram, time) {
                        Ok(Allowed { requeued: true, delivered: false, lost: false }) => arrive(true),
                        Ok(Allowed { requeued: true, .. }) => arrive(false),
                        _ => {}
                    }
                }
            }
        }
        for (serial, datagram) in self.datagrams.iter().enumerate() {
            let unseen_at = match datagram.handed_out.last() {
                None => Some(plan.front(serial as u32)),
                Some(last) => {
                    let requeued = self.allowed(plan, datagram, last).is_ok_and(|allowed| allowed.requeued);
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
        let (action, response, at) = match time.done {
            Done::Held => return,
            Done::Abandoned => {
                tally.abandoned += 1;
                return;
            }
            Done::Gave(action, response, at) => (action, response, at),
        };
        tally.perhaps_late += u64::from(response == Response::NotAwaited);
        match self.outcome(time, response) {
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
                    && response == Response::InRefusals;
                tally.vanished += u64::from(vanished);
            }
        }
    }

    /// Checks that the numbers of a round add up, after its last datagram has arrived.
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
        // Losses after the last received packet are not known yet. The last packets of the other
        // queues have been received.
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
                // A packet whose requeue was not confirmed may have been decided otherwise.
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

    /// Checks that the numbers of a queue add up at the end.
    pub(crate) fn check_end(&self, plan: &Plan, queue: usize, stats: &Stats, findings: &mut Findings) {
        let tally = self.tally(plan, queue);
        let settings = &plan.queues[queue];
        let name = |what: &str| format!("queue {queue}: {what}");
        if let Some(wrong) = imbalance(stats) {
            findings.sum(&name(&wrong));
        }
        findings.expect(&name("malformed"), stats.received.malformed, 0);
        findings.expect(&name("refusals unread"), stats.sent.refusals_unread, 0);
        if !self.unsendable {
            findings.expect(&name("refused"), stats.sent.refused, 0);
            findings.expect(&name("in flight"), stats.held.in_flight, 0);
            findings.expect(&name("held bytes"), stats.held.bytes, 0);
            findings.expect(&name("oldest undecided"), stats.held.oldest_undecided, None);
        }
        if settings.receive_buffer.is_none() && !self.unsendable && tally.vanished > stats.sent.gone_at_least {
            findings.sum(&name(&format!("{} vanished, but {} gone", tally.vanished, stats.sent.gone_at_least)));
        }
        let late = (tally.late, tally.late + tally.perhaps_late);
        findings.expect_between(&name("late"), stats.decided.late, late);
        let faulty = (0..plan.rounds.len()).any(|round| plan.is_faulty(round));
        if faulty || plan.capless || self.unsendable {
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

    /// Checks the packets of the last round that were neither handed out nor delivered, for a queue
    /// whose traffic should have been accepted.
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
            || settings.max_len != DEFAULT_MAX_LEN
            // Losses after the last received packet are not counted.
            || settings.receive_buffer.is_some()
            || !plan.bypass
            || plan.rounds.iter().any(|round| round.reconfigurers > 0);
        if drops || self.unsendable || plan.is_faulty(self.round) || queue == plan.side() {
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
                    Done::Gave(action, response, _) => match (self.outcome(time, response), action) {
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
                let Done::Gave(Action::Accept | Action::Repeat, response, _) = last.done else { return false };
                self.outcome(last, response).is_ok() && !self.was_reported(last, ErrorKind::NotPermitted)
            });
            let faulty = plan.is_faulty(datagram.round) || self.unsendable;
            totals.excused += u64::from(accepted && faulty && datagram.delivered == 0);
        }
        totals
    }
}

/// After this time a packet gets a verdict in its own message, and the kernel reports whether it
/// found the packet.
const OLD: Duration = Duration::from_millis(5);

/// Describes a snapshot that does not add up.
pub(crate) fn imbalance(stats: &Stats) -> Option<String> {
    let settled = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
    let rest = stats.sent.refused + stats.sent.gone_at_least + stats.held.in_flight as u64;
    (stats.received.packets != settled + rest)
        .then(|| format!("the sum is not {} received: {stats:?}", stats.received.packets))
}
