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

    /// The same for the packet alone.
    fn alone(self) -> Self {
        match self {
            Self::Accept | Self::AcceptFlow => Self::Accept,
            Self::Drop | Self::DropFlow => Self::Drop,
            Self::Reject | Self::RejectFlow => Self::Reject,
        }
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

impl Question {
    fn is_rejected(&self) -> bool {
        self.answer.is_some_and(|(answer, _)| matches!(answer, Answer::Reject | Answer::RejectFlow))
    }
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
    pub(super) loopback: bool,
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

    /// Whether it has passed any hook, as far as one can know: an entry of connection tracking may
    /// be its own.
    fn may_have_passed(&self) -> bool {
        let accepted = |question: &Question| question.answer.is_some_and(|(answer, _)| answer.accepts());
        self.arrived.is_some() || self.questions.iter().any(accepted)
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
    /// No other packet of the connection waited then, and none was denied when it came.
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
    /// The side that has begun the connection, as connection tracking sees it, if that is certain.
    original: Option<Side>,
    /// The other direction's own connection may have begun since. "Later packets of such a
    /// connection come to the queue, and cannot leave it, while the denial is remembered."
    begun_reversed: bool,
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
    /// Its addresses are translated. A segment that connection tracking calls invalid is not: it
    /// goes to this host, where it is of another connection, and ends nothing.
    pub(super) translated: bool,
    /// Accepted SYNs: number, when they were first queued, when they were decided.
    syns: Vec<(u32, Time, Time)>,
    /// The packets sent.
    pub(super) numbers: Vec<u32>,
    /// The last packet that was sent before a denial was forgotten: its entry, which no packet had
    /// confirmed, may have begun beside the denied connection.
    beside: Option<u32>,
    /// What a verdict holds for is not certain: for example, it was for a packet that the kernel
    /// had dropped. Nothing follows from it.
    pub(super) uncertain: bool,
}

impl Verdicts {
    /// Denials that certainly hold for a packet.
    fn denial_of(&self, sent: &Sent) -> Option<&Denial> {
        self.denials.iter().find(|denial| {
            // "The other side of a denied connection may begin a connection of its own, on the same
            // addresses and ports: its first packet (a SYN, or any packet of a protocol without
            // one) comes to the queue if a rule matches it." The other side is the one that has not
            // begun the connection, also if the other side has sent the denied packet.
            let begins_reversed = match sent.kind {
                Kind::Syn => denial.original != Some(sent.side),
                Kind::Udp => denial.original != Some(sent.side) && !(denial.both && sent.known),
                _ => false,
            };
            denial.confirmed < sent.at
                && sent.kind != Kind::Error
                && !begins_reversed
                && !denial.begun_reversed
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
        // "Of two SYNs that wait at once, the later verdict holds for both": also if they wait at
        // different hooks.
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

    /// Whether an accepted verdict holds for a later packet, and not for its own packet only.
    fn is_lasting(&self, grant: &Grant, sent: &Sent) -> bool {
        let numbers = self.verdicts.get(&sent.connection).map_or(&[][..], |verdicts| &verdicts.numbers);
        let packets = || numbers.iter().map(|number| (*number, &self.sent[number]));
        let syns = || packets().filter(|(_, other)| other.kind == Kind::Syn && other.at < sent.at);
        if self.sent[&grant.number].kind == Kind::Syn {
            // "After `accept().for_flow()` for a SYN, packets come to the queue until the server
            // has answered with a SYN."
            let answer = |other: &Sent| {
                let passed = other.arrived.is_some_and(|arrived| arrived < sent.at);
                other.kind == Kind::SynAck && other.side != grant.side && other.at > grant.submitted && passed
            };
            // "A SYN on an accepted connection's addresses and ports ends the accept", also if it
            // is dropped.
            let last = syns().all(|(number, _)| number <= grant.number);
            return last && packets().any(|(_, other)| answer(other));
        }
        // "Until a connection is established, `accept().for_flow()` for a packet that is neither a
        // SYN nor the answer to one holds for that packet." A rejected packet may have reset it
        // again, as connection tracking sees it.
        let granted = &self.sent[&grant.number];
        let before = || packets().filter(|(number, _)| *number < grant.number).map(|(_, other)| other);
        let arrived = |other: &Sent| other.arrived.is_some_and(|arrived| arrived < granted.at);
        let is_established = || {
            let answer = before().find(|other| other.kind == Kind::SynAck && arrived(other));
            let third = |answer: &Sent, other: &Sent| {
                let kind = matches!(other.kind, Kind::Ack | Kind::Data);
                kind && other.side != answer.side && other.at > answer.at && arrived(other)
            };
            let rejected = before().any(|other| other.questions.iter().any(Question::is_rejected));
            !rejected && answer.is_some_and(|answer| before().any(|other| third(answer, other)))
        };
        let may_be_reply = before().any(|other| other.side != grant.side && other.kind != Kind::Error);
        if !matches!(granted.kind, Kind::Udp | Kind::SynAck) && may_be_reply && !is_established() {
            return false;
        }
        // "If a SYN comes while conntrack has an entry with its addresses and ports (of an older
        // connection, or of the same one if the SYN is sent again), only a verdict for a SYN can
        // accept the connection."
        let has_entry = |syn: u32| {
            packets()
                .take_while(|(number, _)| *number < syn)
                .any(|(_, other)| other.kind != Kind::Error && (other.may_have_passed() || other.answer().is_none()))
        };
        syns().all(|(syn, _)| !has_entry(syn))
    }

    /// The side that has begun the connection, as connection tracking sees it when a packet is
    /// denied. `None` if it may have begun in mid-stream, or with packets of both sides.
    fn original(&self, denied: &Sent) -> Option<Side> {
        let numbers = self.verdicts.get(&denied.connection).map_or(&[][..], |verdicts| &verdicts.numbers);
        let packets = || numbers.iter().map(|number| &self.sent[number]).filter(|other| other.kind != Kind::Error);
        let first = packets().next()?;
        let reply = packets().find(|other| other.side != first.side);
        match reply {
            None => Some(first.side),
            // Nothing of the other side was under way when the kernel began to know it.
            Some(reply) => {
                let settled = match denied.kind {
                    Kind::Udp => packets().any(|other| other.arrived.is_some_and(|arrived| arrived < reply.at)),
                    _ => first.kind == Kind::Syn,
                };
                (denied.known && denied.valid && settled).then_some(first.side)
            }
        }
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
            alone
                && verdicts.holds(grant, sent)
                && granted.arrived.is_some_and(|arrived| arrived < sent.at)
                && self.is_lasting(grant, sent)
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
        // If anything has passed, the kernel takes this packet for a reply to it. So does it over
        // loopback with a packet that was denied at its second hook. All rules of the test queue
        // UDP; where none does, a packet "is dropped for two seconds after the verdict, as it may
        // have crossed the denied one" (How long a denial holds).
        let first =
            !earlier.any(|other| other.side == sent.side || other.kind == Kind::Error || other.may_have_passed());
        let others = verdicts.denials.iter().all(|denial| denial.side != sent.side && !denial.both);
        let violates = first && others && !sent.loopback && sent.kind.begins();
        violates.then(|| self.violation(OTHER_SIDE_BLOCKED, number))
    }

    /// Records a verdict before it is submitted.
    pub(super) fn answered(&mut self, number: u32, answer: Answer, at: Time) {
        let Some(sent) = self.sent.get(&number) else { return };
        let Some(&Question { at: queued, .. }) = sent.questions.last() else { return };
        let first_queued = sent.questions[0].at;
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
                denial.begun_reversed |= kind.begins() && denial.original != Some(side);
            }
        }
        if kind == Kind::Error {
            // The verdict is for the error alone.
        } else if answer == Answer::AcceptFlow {
            let beside = verdicts.beside.is_some_and(|last| number <= last);
            let clean = alone && verdicts.denials.is_empty() && !beside;
            verdicts.grants.push(Grant { number, side, queued, submitted: at, clean });
        }
        if kind == Kind::Syn && answer.accepts() && !verdicts.translated {
            verdicts.syns.push((number, first_queued, at));
        } else if kind == Kind::Syn {
            // It has come back, or to a later hook, and begins nothing.
            verdicts.syns.retain(|(other, ..)| *other != number);
        }
    }

    /// "The packet belongs to no connection: connection tracking calls it invalid": "The verdict
    /// then holds for the packet alone."
    pub(super) fn of_no_connection(&mut self, number: u32) {
        let Some(sent) = self.sent.get_mut(&number) else { return };
        let connection = sent.connection;
        if let Some((answer, at)) = sent.questions.last_mut().and_then(|question| question.answer.as_mut()) {
            *answer = answer.alone();
            let at = *at;
            self.of(connection).grants.retain(|grant| (grant.number, grant.submitted) != (number, at));
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
            other.kind != Kind::Error && (other.arrived.is_some() || asked)
        };
        let numbers = self.verdicts.get(&connection).map_or(&[][..], |verdicts| &verdicts.numbers);
        let mut others = numbers.iter().map(|other| &self.sent[other]).filter(|other| passes(other));
        let crossed = !both && others.clone().any(|other| other.side != side);
        let original = self.original(sent);
        // It waited beside this one, so that this denial was not known yet when it was accepted.
        let queued = sent.questions.last().map(|question| question.at);
        let begun_reversed = others.any(|other| {
            other.kind.begins()
                && original != Some(other.side)
                && queued.is_none_or(|queued| other.waited_since(queued))
        });
        let verdicts = self.of(connection);
        verdicts.uncertain |= !certain;
        verdicts.denials.push(Denial { number, side, confirmed: at, both, original, begun_reversed, crossed });
    }

    /// All verdicts for connections are taken back.
    pub(super) fn forget(&mut self) {
        for verdicts in self.verdicts.values_mut() {
            if !verdicts.denials.is_empty() {
                verdicts.beside = verdicts.numbers.last().copied();
            }
            verdicts.grants.clear();
            verdicts.denials.clear();
        }
    }

    /// Whether a packet that was accepted must arrive.
    pub(super) fn must_arrive(&self, number: u32) -> bool {
        let sent = &self.sent[&number];
        let certain = self.verdicts.get(&sent.connection).is_none_or(|verdicts| {
            // A later one may hold at the next hook, or for what the kernel has taken for one
            // connection.
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
