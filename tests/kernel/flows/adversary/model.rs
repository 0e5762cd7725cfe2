//! What the promises say about packets, given the verdicts. The model allows what they leave open:
//! it is no second implementation.

use std::collections::BTreeMap;

use super::connection::Kind;

/// A verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Accept,
    AcceptFlow,
    Drop,
    DropFlow,
    Reject,
    RejectFlow,
}

impl Answer {
    pub(super) fn accepts(self) -> bool {
        matches!(self, Self::Accept | Self::AcceptFlow)
    }

    pub(super) fn denies_flow(self) -> bool {
        matches!(self, Self::DropFlow | Self::RejectFlow)
    }
}

/// The side of a connection that sends a packet: 0 for the one that usually begins.
pub(super) type Side = usize;

/// Positions in the order of all events.
pub(super) type Time = u64;

/// A packet came to the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    at: Time,
    /// And when it was submitted.
    answer: Option<(Answer, Time)>,
    /// Until then no other packet of a connection that the kernel did not know waited: the kernel
    /// keeps one of two new connections between the same ports, with its verdict and its packet.
    alone: bool,
}

/// A packet that was sent.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) connection: usize,
    pub(super) side: Side,
    pub(super) kind: Kind,
    pub(super) at: Time,
    /// Whether connection tracking certainly takes it for a packet of the connection.
    pub(super) valid: bool,
    /// Whether the kernel certainly knew the connection then, and in which direction it began.
    pub(super) known: bool,
    pub(super) questions: Vec<Question>,
    pub(super) arrived: Option<Time>,
}

impl Sent {
    /// The last verdict.
    fn answer(&self) -> Option<Answer> {
        self.questions.last()?.answer.map(|(answer, _)| answer)
    }

    /// Whether it waited for a verdict at any time since then.
    fn waited_since(&self, then: Time) -> bool {
        self.questions.iter().any(|question| question.answer.is_none_or(|(_, decided)| decided > then))
    }

    fn is_accepted(&self) -> bool {
        self.questions.iter().all(|question| question.answer.is_some_and(|(answer, _)| answer.accepts()))
    }
}

/// `accept().for_flow()`
#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    pub(super) number: u32,
    pub(super) side: Side,
    queued: Time,
    submitted: Time,
    /// No other packet of the connection waited then, and none was denied before.
    pub(super) clean: bool,
}

/// `drop().for_flow()` or `reject().for_flow()`
#[derive(Debug, Clone, Copy)]
pub(super) struct Denial {
    pub(super) number: u32,
    pub(super) side: Side,
    confirmed: Time,
    /// It certainly holds for the other side's packets too: the kernel knew the connection.
    both: bool,
    /// The other side has a connection of its own between the same ports, so that the kernel may
    /// count packets of this side as replies.
    crossed: bool,
}

/// A broken promise.
#[derive(Debug, Clone)]
pub(super) struct Violation {
    pub(super) promise: &'static str,
    pub(super) connection: usize,
    pub(super) detail: String,
}

/// The verdicts for a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Verdicts {
    pub(super) grants: Vec<Grant>,
    pub(super) denials: Vec<Denial>,
    /// Accepted SYNs: number, when they were queued, when they were decided.
    syns: Vec<(u32, Time, Time)>,
    /// The packets sent.
    pub(super) numbers: Vec<u32>,
    /// What a verdict holds for is not certain: for example, it was for a packet that the kernel had
    /// dropped. Nothing follows from it.
    pub(super) uncertain: bool,
}

impl Verdicts {
    /// Denials that certainly hold for a packet.
    fn denial_of(&self, sent: &Sent) -> Option<&Denial> {
        self.denials.iter().find(|denial| {
            denial.confirmed < sent.at
                && sent.kind != Kind::Error
                && match denial.side == sent.side {
                    true => !denial.crossed,
                    false => denial.both && !sent.kind.begins(),
                }
        })
    }

    /// Whether a verdict may be why a packet passes that has had none of its own.
    fn may_pass(&self, sent: &Sent) -> bool {
        sent.kind != Kind::Syn && self.grants.iter().any(|grant| self.holds(grant, sent))
    }

    fn holds(&self, grant: &Grant, sent: &Sent) -> bool {
        let denied = self.denials.iter().any(|denial| {
            // A denial after the packet was queued, or in the same flush, wins.
            denial.confirmed < sent.at && grant.queued < denial.confirmed && (denial.side == grant.side || denial.both)
        });
        let begun_anew = self
            .syns
            .iter()
            .any(|&(number, queued, decided)| number != grant.number && queued > grant.submitted && decided < sent.at);
        grant.submitted < sent.at && !denied && !begun_anew
    }
}

pub(super) const SYN_UNASKED: &str = "a SYN passed without a verdict of its own";
pub(super) const UNASKED: &str = "a packet passed that no verdict accepted";
pub(super) const ERROR_UNASKED: &str = "an ICMP error passed that no verdict accepted";
pub(super) const DENIED_PASSED: &str = "a packet of a denied connection arrived";
pub(super) const DENIED_ASKED: &str = "a packet of a denied connection came to the queue";
pub(super) const DROPPED_ARRIVED: &str = "a packet arrived although its own verdict dropped or rejected it";
pub(super) const DROPPED_ASKED: &str = "a dropped or rejected packet came to the queue again";
pub(super) const BLOCKED: &str = "a packet was blocked, though nothing of its connection was denied";
pub(super) const OTHER_SIDE_BLOCKED: &str = "the other side's own first packet was blocked by a denied first packet";
pub(super) const ACCEPTED_ASKED: &str = "a packet of an accepted connection came to the queue";
pub(super) const ACCEPTED_LOST: &str = "an accepted packet did not arrive";
pub(super) const REFUSED: &str = "a verdict was refused";

/// All packets and verdicts since the last table was installed.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) sent: BTreeMap<u32, Sent>,
    pub(super) verdicts: BTreeMap<usize, Verdicts>,
}

impl Model {
    pub(super) fn of(&mut self, connection: usize) -> &mut Verdicts {
        self.verdicts.entry(connection).or_default()
    }

    pub(super) fn sends(&mut self, number: u32, sent: Sent) {
        self.of(sent.connection).numbers.push(number);
        self.sent.insert(number, sent);
    }

    fn violation(&self, promise: &'static str, number: u32) -> Violation {
        let sent = &self.sent[&number];
        let detail = format!("packet {number}, {:?} of side {}", sent.kind, sent.side);
        Violation { promise, connection: sent.connection, detail }
    }

    /// A packet has come to the queue.
    pub(super) fn queued(&mut self, number: u32, at: Time, strict: bool) -> Option<Violation> {
        let sent = self.sent.get_mut(&number)?;
        let denied_before = sent.answer().is_some_and(|answer| !answer.accepts());
        sent.questions.push(Question { at, answer: None, alone: false });
        let sent = &self.sent[&number];
        let verdicts = self.verdicts.get(&sent.connection)?;
        if verdicts.uncertain {
            return None;
        }
        if denied_before {
            return Some(self.violation(DROPPED_ASKED, number));
        }
        if let Some(denial) = verdicts.denial_of(sent) {
            let mut violation = self.violation(DENIED_ASKED, number);
            violation.detail += &format!("; packet {} of side {} was denied", denial.number, denial.side);
            return Some(violation);
        }
        let accepted = |grant: &Grant| {
            let granted = &self.sent[&grant.number];
            let alone = grant.clean && granted.questions.len() == 1;
            alone && verdicts.holds(grant, sent) && granted.arrived.is_some_and(|arrived| arrived < sent.at)
        };
        let undisturbed = strict && verdicts.denials.is_empty() && sent.valid && sent.known;
        if undisturbed && !sent.kind.begins_tcp() && sent.kind != Kind::Error && verdicts.grants.iter().any(accepted) {
            return Some(self.violation(ACCEPTED_ASKED, number));
        }
        None
    }

    /// A packet has arrived where it was sent to.
    pub(super) fn arrived(&mut self, number: u32, at: Time) -> Option<Violation> {
        let sent = self.sent.get_mut(&number)?;
        sent.arrived.get_or_insert(at);
        let sent = &self.sent[&number];
        if sent.answer().is_some_and(|answer| !answer.accepts()) {
            return Some(self.violation(DROPPED_ARRIVED, number));
        }
        let nothing = Verdicts::default();
        let verdicts = self.verdicts.get(&sent.connection).unwrap_or(&nothing);
        if !sent.questions.is_empty() || verdicts.uncertain || verdicts.may_pass(sent) {
            return None;
        }
        let of_denied = verdicts.denials.iter().find(|denial| {
            let either = denial.both || sent.kind == Kind::Error || !verdicts.grants.is_empty();
            denial.confirmed < sent.at && (denial.side == sent.side || either)
        });
        Some(match (of_denied, sent.kind) {
            (Some(denial), kind) => {
                let mut violation = self.violation(DENIED_PASSED, number);
                violation.detail += &format!("; packet {} of side {} was denied", denial.number, denial.side);
                if kind == Kind::Error {
                    violation.detail += "; an ICMP error";
                }
                violation
            }
            (None, Kind::Syn) => self.violation(SYN_UNASKED, number),
            (None, Kind::Error) => self.violation(ERROR_UNASKED, number),
            (None, _) => self.violation(UNASKED, number),
        })
    }

    /// All effects of sending a packet are over.
    pub(super) fn settled(&self, number: u32) -> Option<Violation> {
        let sent = &self.sent[&number];
        if sent.arrived.is_some() || !sent.questions.is_empty() {
            return None;
        }
        let nothing = Verdicts::default();
        let verdicts = self.verdicts.get(&sent.connection).unwrap_or(&nothing);
        if verdicts.uncertain {
            return None;
        }
        if verdicts.denials.is_empty() {
            return Some(self.violation(BLOCKED, number));
        }
        let mut earlier = verdicts.numbers.iter().filter(|other| **other < number).map(|other| &self.sent[other]);
        let first = !earlier.any(|other| other.side == sent.side || other.kind == Kind::Error);
        let others = verdicts.denials.iter().all(|denial| denial.side != sent.side && !denial.both);
        (first && others && sent.kind.begins()).then(|| self.violation(OTHER_SIDE_BLOCKED, number))
    }

    /// Records a verdict before it is submitted.
    pub(super) fn answered(&mut self, number: u32, answer: Answer, at: Time) {
        let Some(sent) = self.sent.get(&number) else { return };
        let Some(&Question { at: queued, .. }) = sent.questions.last() else { return };
        let (side, kind, connection) = (sent.side, sent.kind, sent.connection);
        let numbers = self.verdicts.get(&connection).map_or(&[][..], |verdicts| &verdicts.numbers);
        let waits = |other: &u32| *other != number && self.sent[other].waited_since(queued);
        let alone = sent.known || !numbers.iter().any(waits);
        if let Some(question) = self.sent.get_mut(&number).and_then(|sent| sent.questions.last_mut()) {
            question.answer = Some((answer, at));
            question.alone = alone;
        }
        let verdicts = self.of(connection);
        if kind != Kind::Error && answer.accepts() {
            for denial in &mut verdicts.denials {
                denial.crossed |= denial.side != side && !denial.both;
            }
        }
        if kind == Kind::Error {
            // The verdict is for the error alone.
        } else if answer == Answer::AcceptFlow {
            let clean = alone && verdicts.denials.is_empty();
            verdicts.grants.push(Grant { number, side, queued, submitted: at, clean });
        }
        if kind == Kind::Syn && answer.accepts() {
            verdicts.syns.push((number, queued, at));
        }
    }

    /// The kernel has carried out a verdict.
    pub(super) fn confirmed(&mut self, number: u32, answer: Answer, at: Time) {
        let Some(sent) = self.sent.get(&number) else { return };
        if sent.kind == Kind::Error || !answer.denies_flow() {
            return;
        }
        let (side, both) = (sent.side, sent.known && sent.valid);
        let (connection, certain) = (sent.connection, sent.valid || sent.kind == Kind::Syn);
        let passes = |other: &Sent| {
            let asked = !other.questions.is_empty() && other.answer().is_none_or(Answer::accepts);
            other.side != side && other.kind != Kind::Error && (other.arrived.is_some() || asked)
        };
        let numbers = self.verdicts.get(&connection).map_or(&[][..], |verdicts| &verdicts.numbers);
        let crossed = !both && numbers.iter().any(|other| passes(&self.sent[other]));
        let verdicts = self.of(connection);
        verdicts.uncertain |= !certain;
        verdicts.denials.push(Denial { number, side, confirmed: at, both, crossed });
    }

    /// All verdicts for connections are taken back.
    pub(super) fn forget(&mut self) {
        for verdicts in self.verdicts.values_mut() {
            verdicts.grants.clear();
            verdicts.denials.clear();
        }
    }

    /// Whether a packet that was accepted must arrive.
    pub(super) fn must_arrive(&self, number: u32) -> bool {
        let sent = &self.sent[&number];
        let certain = self.verdicts.get(&sent.connection).is_none_or(|verdicts| {
            // A later one may hold at the next hook, or for what the kernel has taken for one connection.
            let harmless = |denial: &Denial| denial.confirmed < sent.at && denial.side != sent.side && !denial.both;
            !verdicts.uncertain && verdicts.denials.iter().all(harmless)
        });
        let alone = sent.questions.iter().all(|question| question.alone);
        sent.is_accepted() && alone && certain && sent.arrived.is_none()
    }

    pub(super) fn has_arrived(&self, number: u32) -> bool {
        self.sent[&number].arrived.is_some()
    }

    pub(super) fn has_denial(&self, connection: usize) -> bool {
        self.verdicts.get(&connection).is_some_and(|verdicts| !verdicts.denials.is_empty())
    }

    pub(super) fn lost(&self, number: u32) -> Violation {
        self.violation(ACCEPTED_LOST, number)
    }
}
