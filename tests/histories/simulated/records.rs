//! What the owners of packets did, and whether the kernel did the same.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use bytes::Bytes;
use tokio_nfqueue::{
    Action, ErrorKind, Stats,
    simulated::{Cause, Outcome, Sent},
};

use super::{
    Totals,
    plan::{LONGEST_DELAY, PASS, Plan},
};

/// A packet in a queue.
pub(crate) type Place = (u16, u32);

#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) packets: Vec<Packet>,
    pub(crate) places: HashMap<Place, HandedOut>,
    pub(crate) refusals: HashMap<Place, ErrorKind>,
    /// Confirmations whose results are unread.
    pub(crate) unheard: HashSet<Place>,
    /// The places of packets that are held.
    held: HashSet<Place>,
    /// How often each packet was handed out.
    times: Vec<u32>,
    /// The last id that was handed out by each queue.
    pub(crate) last: [Option<u32>; 2],
    pub(crate) wrong: Vec<String>,
    /// When the shutdown began.
    pub(crate) closing: Option<Duration>,
    /// An interface went down, or a hook was unregistered.
    pub(crate) gone: bool,
    /// Sends failed, or the capability was missing.
    pub(crate) refused: bool,
    /// Until when the queues recover from a fault.
    pub(crate) disturbed_until: Duration,
    pub(crate) faults: u64,
    /// When the history began.
    pub(crate) begin: Duration,
    digest: DefaultHasher,
}

#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) sent: Sent,
    pub(crate) at: Duration,
    pub(crate) bypass: bool,
    pub(crate) payload: Bytes,
}

/// One time at which a packet was handed out.
#[derive(Debug, Clone)]
pub(crate) struct HandedOut {
    pub(crate) serial: usize,
    pub(crate) at: Duration,
    pub(crate) done: Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Done {
    Held,
    Abandoned,
    Gave { action: Action, mark: Option<u32>, payload: Option<Bytes>, at: Duration },
}

impl Records {
    pub(crate) fn error(&mut self, text: String) {
        self.wrong.push(text);
    }

    pub(crate) fn handed_out(&mut self, place: Place, serial: usize, at: Duration) {
        self.last[usize::from(place.0)] = Some(place.1);
        self.held.insert(place);
        self.times.resize(self.packets.len(), 0);
        self.times[serial] += 1;
        if let Some(before) = self.places.insert(place, HandedOut { serial, at, done: Done::Held }) {
            self.error(format!("{place:?} was handed out twice: {before:?}"));
        }
    }

    pub(crate) fn set(&mut self, place: Place, done: Done) {
        self.held.remove(&place);
        if let Some(handed_out) = self.places.get_mut(&place) {
            handed_out.done = done;
        }
    }

    pub(crate) fn refusal(&mut self, place: Place, kind: ErrorKind) {
        if let Some(before) = self.refusals.insert(place, kind) {
            self.error(format!("{place:?} was refused twice: {before:?}, {kind:?}"));
        }
    }

    /// While the queues are open: nothing is decided without a verdict.
    pub(crate) fn check_held(&mut self, plan: &Plan) {
        if self.gone || self.closing.is_some() {
            return;
        }
        let mut wrong = Vec::new();
        for place in &self.held {
            let settings = &plan.queues[usize::from(place.0)];
            let packet = &self.packets[self.places[place].serial];
            if settings.deadline.is_none() && !packet.sent.is_waiting() {
                wrong.push(format!("{place:?} is held, but {:?}", packet.sent));
            }
        }
        self.wrong.append(&mut wrong);
    }

    /// After the ready tasks have run and the clock has moved by more than every delay: what is
    /// decided or due has reached the kernel. Returns what has not.
    pub(crate) fn unsettled(&self, plan: &Plan, now: Duration) -> Vec<String> {
        if now < self.disturbed_until {
            return Vec::new();
        }
        let mut wrong = Vec::new();
        for (place, handed_out) in &self.places {
            let packet = &self.packets[handed_out.serial];
            // A packet that came back, or has segments, waits for another reason.
            let current = !packet.sent.is_waiting() || self.is_elsewhere(*place, handed_out.serial);
            if current {
                continue;
            }
            let deadline = plan.queues[usize::from(place.0)].deadline;
            let overdue = match (&handed_out.done, deadline) {
                (Done::Gave { action: Action::Accept | Action::Drop, at, .. }, _) => *at + LONGEST_DELAY < now,
                (Done::Abandoned, _) => false,
                (_, Some((after, _))) => handed_out.at + after + after / 32 + LONGEST_DELAY * 2 < now,
                _ => false,
            };
            if overdue && !self.refusals.contains_key(place) {
                wrong.push(format!("{place:?} is overdue at {now:?}: {handed_out:?}"));
            }
        }
        if let Some((after, _)) = plan.queues[0].deadline
            && plan.queues[0].receive_buffer.is_none()
        {
            let limit = after + after / 16 + LONGEST_DELAY * 3;
            let unread = |packet: &&Packet| packet.sent.is_waiting() && packet.at + limit < now;
            for (serial, packet) in self.packets.iter().enumerate().filter(|(_, packet)| unread(packet)) {
                if self.times.get(serial).is_none_or(|times| *times == 0) {
                    wrong.push(format!("packet {serial} of {:?} is unread and overdue at {now:?}", packet.at));
                }
            }
        }
        wrong
    }

    /// Makes the counters a part of the digest.
    pub(crate) fn note(&mut self, stats: &Stats) {
        stats.iter().for_each(|number| (number.name, number.value).hash(&mut self.digest));
    }

    /// Of all outcomes that have been checked, and of the counters.
    pub(crate) fn digest(&self) -> u64 {
        self.digest.finish()
    }

    fn is_elsewhere(&self, place: Place, serial: usize) -> bool {
        let returns = matches!(
            self.places.get(&place).map(|handed_out| &handed_out.done),
            Some(Done::Gave { action: Action::Repeat | Action::Requeue { .. }, .. })
        );
        returns || self.times[serial] > 1 || self.packets[serial].payload.len() > LONGEST_PLAIN
    }

    /// At the end: every packet has one outcome, which is the right one.
    pub(crate) fn check_end(&mut self, plan: &Plan) -> Totals {
        let mut totals =
            Totals { histories: 1, packets: self.packets.len() as u64, faults: self.faults, ..Totals::default() };
        let mut wrong = Vec::new();
        let mut finals = Vec::new();
        for (serial, packet) in self.packets.iter().enumerate() {
            let Some(outcome) = packet.sent.try_outcome() else {
                wrong.push(format!("packet {serial} has no outcome"));
                continue;
            };
            let leaves = if outcome.segments.is_empty() { std::slice::from_ref(&outcome) } else { &outcome.segments };
            for leaf in leaves {
                let place = leaf.queue.zip(leaf.id.map(|id| id.get()));
                finals.extend(place);
                if let Err(what) = self.judge(plan, packet, leaf, place) {
                    let done = place.and_then(|place| self.places.get(&place));
                    let refusal = place.and_then(|place| self.refusals.get(&place));
                    wrong.push(format!("packet {serial}: {what}: {leaf:?}, {done:?}, {refusal:?}"));
                }
                let place = (leaf.queue, leaf.id.map(|id| id.get()), leaf.mark, &leaf.payload);
                let at = leaf.at.saturating_sub(self.begin);
                (serial, place, leaf.accepted, format!("{:?} {:?}", leaf.cause, leaf.action), at)
                    .hash(&mut self.digest);
                totals.accepted += u64::from(leaf.accepted);
                totals.dropped += u64::from(!leaf.accepted);
                totals.undecided += u64::from(leaf.cause != Cause::Verdict);
            }
        }
        finals.sort_unstable();
        for pair in finals.windows(2).filter(|pair| pair[0] == pair[1]) {
            wrong.push(format!("{:?} has two outcomes", pair[0]));
        }
        for (place, handed_out) in &self.places {
            totals.abandoned += u64::from(handed_out.done == Done::Abandoned);
            if finals.binary_search(place).is_ok() {
                continue;
            }
            // The packet has left this place for another.
            match &handed_out.done {
                Done::Gave { action: Action::Repeat | Action::Requeue { .. }, .. } => {}
                done => wrong.push(format!("{place:?} came back after {done:?}")),
            }
        }
        totals.late = self.refusals.values().filter(|kind| **kind == ErrorKind::Expired).count() as u64;
        totals.refused = self.refusals.values().filter(|kind| **kind == ErrorKind::NotPermitted).count() as u64;
        self.wrong.append(&mut wrong);
        totals
    }

    fn judge(&self, plan: &Plan, packet: &Packet, outcome: &Outcome, place: Option<Place>) -> Result<(), &'static str> {
        let closing = self.closing.is_some_and(|closing| outcome.at >= closing);
        let settings = place.map(|(queue, _)| &plan.queues[usize::from(queue)]);
        match outcome.cause {
            Cause::Rule if outcome.mark & PASS == PASS && outcome.accepted => Ok(()),
            Cause::NotBound => match outcome.action {
                Some(Action::Requeue { bypass, .. }) if bypass == outcome.accepted => Ok(()),
                None | Some(Action::Repeat) if closing && packet.bypass == outcome.accepted => Ok(()),
                _ => Err("not bound"),
            },
            Cause::QueueFull | Cause::ReceiveBufferFull => {
                let queue = match outcome.action {
                    Some(Action::Requeue { queue, .. }) => usize::from(queue),
                    _ => 0,
                };
                let settings = &plan.queues[queue];
                match outcome.cause {
                    _ if closing => Ok(()),
                    _ if settings.fail_open != outcome.accepted => Err("fail-open"),
                    // Messages of packets that have gone stay in the buffer until they are read.
                    Cause::ReceiveBufferFull if settings.receive_buffer.is_none() && !self.gone => Err("a full buffer"),
                    _ => Ok(()),
                }
            }
            Cause::DeviceDown | Cause::HookUnregistered if self.gone => Ok(()),
            Cause::Verdict => {
                let settings = settings.ok_or("decided without a queue")?;
                let action = outcome.action.ok_or("decided without an action")?;
                let done = place.and_then(|place| self.places.get(&place));
                let refusal = place.and_then(|place| self.refusals.get(&place));
                let ended = match plan.end {
                    super::plan::End::CloseWith(other) => action == other || action == settings.unanswered,
                    _ => action == settings.unanswered,
                };
                if !closing && plan.is_exact() && outcome.at > self.disturbed_until {
                    let delay = settings.policy.longest_delay();
                    let limit = match (done, refusal, settings.deadline) {
                        (Some(HandedOut { done: Done::Gave { at, .. }, .. }), None, _) => Some(*at + delay),
                        (Some(received), _, Some((after, _))) => Some(received.at + after + after / 32 + delay),
                        _ => None,
                    };
                    if limit.is_some_and(|limit| outcome.at > limit) {
                        return Err("later than its policy or its deadline allows");
                    }
                }
                let unanswered = action == settings.unanswered || closing && ended;
                let expired =
                    settings.deadline.is_some_and(|(after, other)| action == other && outcome.at >= packet.at + after);
                let by_queue = expired || closing && ended;
                let unheard = place.is_some_and(|place| self.unheard.contains(&place));
                if unheard && (by_queue || self.refused && unanswered) {
                    return Ok(());
                }
                let allowed = match (done.map(|handed_out| &handed_out.done), refusal) {
                    (None | Some(Done::Held), None) => by_queue,
                    (Some(Done::Abandoned), None) => unanswered || expired,
                    (Some(Done::Gave { .. }), Some(ErrorKind::Expired)) => by_queue,
                    (Some(Done::Gave { .. }), Some(ErrorKind::NotPermitted)) if self.refused => unanswered || expired,
                    (Some(Done::Gave { .. }), Some(ErrorKind::Unconfirmed)) => true,
                    (Some(Done::Gave { action: given, mark, payload, .. }), None) => {
                        let same_payload = match payload {
                            Some(payload) => outcome.payload == *payload,
                            None => true,
                        };
                        *given == action && mark.is_none_or(|mark| mark == outcome.mark) && same_payload
                    }
                    // The default action of a refused verdict.
                    (_, Some(ErrorKind::NotPermitted)) if self.refused => unanswered || expired,
                    _ => false,
                };
                if allowed { Ok(()) } else { Err("wrongly decided") }
            }
            _ => Err("lost"),
        }
    }

    /// The counters of a queue at the end.
    pub(crate) fn check_stats(&mut self, queue: u16, stats: &Stats) {
        let settled = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
        let rest = stats.sent.refused + stats.sent.gone_at_least + stats.held.in_flight as u64;
        let mut expect = |what: &str, found: u64, least: u64, most: u64| {
            if !(least..=most).contains(&found) {
                self.wrong.push(format!("queue {queue}: {what}: {found}, expected {least} to {most}; {stats:?}"));
            }
        };
        expect("received", stats.received.packets, settled + rest, settled + rest);
        expect("in flight", stats.held.in_flight as u64, 0, 0);
        expect("held bytes", stats.held.bytes as u64, 0, 0);
        expect("malformed", stats.received.malformed, 0, 0);
        let mut leaves = Vec::new();
        for packet in &self.packets {
            let Some(outcome) = packet.sent.try_outcome() else { continue };
            match outcome.segments.is_empty() {
                true => leaves.push(outcome),
                false => leaves.extend(outcome.segments),
            }
        }
        let of_queue = |outcome: &&Outcome| outcome.queue == Some(queue);
        let count = |cause: Cause, action: Option<Action>| {
            let same = |outcome: &&Outcome| outcome.cause == cause && (action.is_none() || outcome.action == action);
            leaves.iter().filter(of_queue).filter(same).count() as u64
        };
        let lost: Vec<u32> = leaves
            .iter()
            .filter(of_queue)
            .filter(|outcome| outcome.cause == Cause::ReceiveBufferFull)
            .filter_map(|outcome| Some(outcome.id?.get()))
            .collect();
        // Losses behind the last packet that was received are not known.
        let known = match self.last[usize::from(queue)] {
            Some(last) => lost.iter().filter(|id| (id.wrapping_sub(last) as i32) < 0).count() as u64,
            None => 0,
        };
        expect("lost", stats.lost.packets, known, lost.len() as u64);
        if !self.gone {
            expect("gone", stats.sent.gone_at_least, 0, 0);
            let accepted = count(Cause::Verdict, Some(Action::Accept));
            expect("accepted", stats.decided.accepted, accepted, accepted);
            let dropped = count(Cause::Verdict, Some(Action::Drop));
            expect("dropped", stats.decided.dropped, dropped, dropped);
        }
    }
}

/// Packets of up to this many bytes are not segmented.
pub(crate) const LONGEST_PLAIN: usize = 1400;
