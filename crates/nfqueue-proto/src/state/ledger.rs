//! The packets in flight, the memory that they keep allocated, and the messages that decide them.
//! No bytes, sockets or clocks: only ids and verdict fields.
//!
//! The kernel assigns ids in order (`__nfqnl_enqueue_packet` counts under the queue's lock), so the
//! window of ids in flight is a ring, indexed by the distance from its base. An id that stays
//! undecided while many thousands are decided is moved to a separate map, so that one forgotten
//! packet does not keep the whole window in memory.
//!
//! | state of an id | meaning |
//! |---|---|
//! | undecided | arrived and not decided |
//! | decided | decided; no message has been made |
//! | settled | a message decides it, or it never arrived: nothing is owed |

use std::collections::{BTreeMap, VecDeque};

use super::memory::{HeldMemory, NO_TOKEN, Storage};
use crate::wire::verdict::VerdictFields;

#[cfg(test)]
mod tests;

/// The ledger of one queue. `E` is what a verdict for a single packet may carry besides its fields;
/// the ledger only stores it.
#[derive(Debug)]
pub struct Ledger<E> {
    /// The id of the ring's first slot.
    base: u32,
    ring: VecDeque<Slot<E>>,
    /// Ids before `base` that are not settled. While there is one, no batch may be sent, because it
    /// would decide that packet too.
    stragglers: BTreeMap<u32, Slot<E>>,
    /// Decided ids, in the order of the decisions.
    gathered: Vec<u32>,
    /// The ids that the messages of the last [`settle`](Ledger::settle) decide, until these are
    /// known to be sent.
    leaving: Vec<u32>,
    undecided: usize,
    /// The memory of the undecided packets. Each slot has the token of its own.
    held: HeldMemory,
    batches: bool,
    /// The messages are in the order of the decisions.
    keeps_order: bool,
    /// How many of `gathered` are unsent messages of the last `settle`.
    returned: usize,
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<E> {
    /// What every verdict message can carry.
    pub fields: VerdictFields,
    /// What only a message for a single packet can carry.
    pub extras: Option<E>,
    /// Who has decided.
    pub origin: Origin,
}

/// Who has decided a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The owner of the packet.
    Owner,
    /// The queue, by its default action or a deadline.
    Queue,
}

/// A message that settles one or more ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerdictMessage<E> {
    /// Decides one packet.
    Single {
        /// Its id.
        id: u32,
        /// What happens to it.
        decision: Decision<E>,
    },
    /// Decides everything that is queued up to `max`. `count` ids from `first` on were decided like
    /// this; the others in between are settled.
    Batch {
        /// The first id that was decided like this.
        first: u32,
        /// The last one, which is in the message.
        max: u32,
        /// The verdict for all of them.
        fields: VerdictFields,
        /// Who has decided them.
        origin: Origin,
        /// How many packets were decided like this.
        count: usize,
    },
}

impl<E> VerdictMessage<E> {
    /// The number of packets that it decides.
    pub fn count(&self) -> usize {
        match self {
            Self::Single { .. } => 1,
            Self::Batch { count, .. } => *count,
        }
    }

    /// The id of the first packet that it decides.
    pub fn first(&self) -> u32 {
        match self {
            Self::Single { id, .. } => *id,
            Self::Batch { first, .. } => *first,
        }
    }

    /// The verdict without extras.
    pub fn fields(&self) -> &VerdictFields {
        match self {
            Self::Single { decision, .. } => &decision.fields,
            Self::Batch { fields, .. } => fields,
        }
    }
}

#[derive(Debug)]
enum Slot<E> {
    /// With the token of its memory.
    Undecided(u32),
    Decided(Decision<E>),
    Settled,
}

/// The ring may span this many ids more than a small multiple of the unsettled ones. Then its
/// oldest slot is moved to the map. With 40 bytes per slot this limits the idle part of the ring to
/// 320 KiB.
const SPARE_SPAN: usize = 8192;

impl<E> Ledger<E> {
    /// A ledger that expects `first` to arrive first (1 for a new queue).
    pub fn new(first: u32) -> Self {
        Self {
            base: first,
            ring: VecDeque::new(),
            stragglers: BTreeMap::new(),
            gathered: Vec::new(),
            leaving: Vec::new(),
            undecided: 0,
            held: HeldMemory::default(),
            batches: true,
            keeps_order: false,
            returned: 0,
        }
    }

    /// From now on the messages are in the order of the decisions, not of the ids.
    pub fn keep_order(&mut self) {
        self.keeps_order = true;
    }

    /// From now on every packet is settled by a message of its own. For when it is unknown what the
    /// kernel holds.
    pub fn forbid_batches(&mut self) {
        self.batches = false;
    }

    /// Whether one message may settle several packets.
    pub fn allows_batches(&self) -> bool {
        self.batches
    }

    /// The ids before `next` that have not arrived are not owed: another process has settled them.
    pub fn skip_to(&mut self, next: u32) {
        let skipped = next.wrapping_sub(self.next());
        if skipped > u32::MAX / 2 {
            return;
        }
        if skipped as usize > SPARE_SPAN {
            while !self.ring.is_empty() {
                self.evict();
            }
            self.base = next;
        } else {
            self.ring.extend((0..skipped).map(|_| Slot::Settled));
        }
    }

    /// The id that is expected next.
    pub fn next(&self) -> u32 {
        self.base.wrapping_add(self.ring.len() as u32)
    }

    /// A packet has arrived. Returns how many ids before it are missing. Its memory counts until it
    /// is decided or [`detach`](Self::detach)ed.
    pub fn arrive(&mut self, id: u32, storage: Storage) -> u32 {
        let lost = id.wrapping_sub(self.next());
        if lost > u32::MAX / 2 {
            // Before the expected id. The kernel does not do this; keep the packet nevertheless.
            if self.reopen(id) {
                let token = self.held.enter(storage);
                *self.slot_to_restore(id) = Slot::Undecided(token);
            }
            return 0;
        }
        let token = self.held.enter(storage);
        if lost as usize > SPARE_SPAN {
            // The gap is wider than the ring should be: start a new ring behind it.
            while !self.ring.is_empty() {
                self.evict();
            }
            self.base = id;
        } else {
            self.ring.extend((0..lost).map(|_| Slot::Settled));
        }
        self.ring.push_back(Slot::Undecided(token));
        self.undecided += 1;
        let unsettled = self.undecided + self.gathered.len();
        while self.ring.len() > SPARE_SPAN + 4 * unsettled.saturating_sub(self.stragglers.len()) {
            self.evict();
        }
        lost
    }

    /// Makes a settled id undecided again: its verdict did not reach the kernel, or the packet had
    /// been counted as lost. Returns whether it was settled. It keeps no memory.
    pub fn reopen(&mut self, id: u32) -> bool {
        let slot = self.slot_to_restore(id);
        let settled = matches!(slot, Slot::Settled);
        if settled {
            *slot = Slot::Undecided(NO_TOKEN);
            self.undecided += 1;
        }
        settled
    }

    /// The slot of an id that has arrived; a new one if none is left.
    fn slot_to_restore(&mut self, id: u32) -> &mut Slot<E> {
        let offset = id.wrapping_sub(self.base) as usize;
        if offset < self.ring.len() {
            return &mut self.ring[offset];
        }
        self.stragglers.entry(id).or_insert(Slot::Settled)
    }

    /// Moves the ring's oldest slot out of the ring.
    fn evict(&mut self) {
        if let Some(slot) = self.ring.pop_front() {
            if !matches!(slot, Slot::Settled) {
                self.stragglers.insert(self.base, slot);
            }
            self.base = self.base.wrapping_add(1);
        }
    }

    fn slot(&self, id: u32) -> Option<&Slot<E>> {
        self.ring.get(id.wrapping_sub(self.base) as usize).or_else(|| self.stragglers.get(&id))
    }

    fn slot_mut(&mut self, id: u32) -> Option<&mut Slot<E>> {
        match self.ring.get_mut(id.wrapping_sub(self.base) as usize) {
            Some(slot) => Some(slot),
            None => self.stragglers.get_mut(&id),
        }
    }

    /// Stores a decision.
    ///
    /// # Errors
    /// Returns the decision if the id is not undecided: it has been decided, or it never arrived.
    pub fn decide(&mut self, id: u32, decision: Decision<E>) -> Result<(), Decision<E>> {
        let Some(slot) = self.slot_mut(id) else { return Err(decision) };
        let Slot::Undecided(token) = *slot else { return Err(decision) };
        *slot = Slot::Decided(decision);
        self.undecided -= 1;
        self.gathered.push(id);
        self.held.leave(token);
        Ok(())
    }

    /// The memory of a packet that may be undecided has been freed.
    pub fn detach(&mut self, id: u32) {
        if let Some(Slot::Undecided(token)) = self.slot_mut(id) {
            let token = std::mem::replace(token, NO_TOKEN);
            self.held.leave(token);
        }
    }

    /// The memory that the undecided packets keep allocated, in bytes.
    pub fn bytes(&self) -> usize {
        self.held.bytes()
    }

    /// Whether an id is undecided.
    pub fn is_undecided(&self, id: u32) -> bool {
        matches!(self.slot(id), Some(Slot::Undecided(_)))
    }

    /// Whether an id has arrived before and is not settled. The kernel gives no id twice until it
    /// wraps.
    pub fn is_repeated(&self, id: u32) -> bool {
        // The usual case costs no search.
        let arrived = id.wrapping_sub(self.next()) > u32::MAX / 2;
        arrived && matches!(self.slot(id), Some(Slot::Undecided(_) | Slot::Decided(_)))
    }

    /// The number of undecided ids.
    pub fn undecided(&self) -> usize {
        self.undecided
    }

    /// The oldest id that is not settled, or the one that is expected next.
    pub fn oldest(&self) -> u32 {
        // The map's order is not the order of the ids across the wrap: that begins half the number
        // range before the base.
        let begin = self.base.wrapping_sub(1 << 31);
        let first = self.stragglers.range(begin..).next().or_else(|| self.stragglers.range(..begin).next());
        first.map_or(self.base, |(id, _)| *id)
    }

    /// The undecided ids; those in the ring are in order.
    pub fn undecided_ids(&self) -> Vec<u32> {
        let ring = self.ring.iter().zip(0..).map(|(slot, offset)| (self.base.wrapping_add(offset), slot));
        let all = self.stragglers.iter().map(|(id, slot)| (*id, slot)).chain(ring);
        all.filter(|(_, slot)| matches!(slot, Slot::Undecided(_))).map(|(id, _)| id).collect()
    }

    /// The undecided ids from `first` to `last`, both included.
    pub fn undecided_between(&self, first: u32, last: u32) -> Vec<u32> {
        let wraps = last < first;
        let to_end = self.stragglers.range(first..=if wraps { u32::MAX } else { last });
        let from_start = self.stragglers.range(..=if wraps { last } else { 0 }).filter(|_| wraps);
        let undecided = |slot: &Slot<E>| matches!(slot, Slot::Undecided(_));
        let mut ids: Vec<u32> =
            to_end.chain(from_start).filter(|(_, slot)| undecided(slot)).map(|(id, _)| *id).collect();
        // Signed distances from the base: ids before it are not in the ring any more.
        let from = (first.wrapping_sub(self.base) as i32).max(0) as usize;
        let to = i64::from(last.wrapping_sub(self.base) as i32) + 1;
        let to = usize::try_from(to).unwrap_or(0).min(self.ring.len());
        let ring = (from..to).filter(|offset| undecided(&self.ring[*offset]));
        ids.extend(ring.map(|offset| self.base.wrapping_add(offset as u32)));
        ids
    }

    /// The number of decisions that have not become messages.
    pub fn gathered(&self) -> usize {
        self.gathered.len()
    }

    /// Turns every decision into messages, appended to `out` in the order of the ids, and counts
    /// them as settled.
    ///
    /// The longest decided prefix becomes one batch for each run of equal fields. A decision with
    /// extras, or behind an undecided id, becomes a message for a single packet. A run also ends
    /// where a round of receiving began (`rounds` has the first id of each round, oldest first): an
    /// event that makes the kernel drop the packets of one round may leave those of a later round,
    /// and the kernel does not report missing packets of a batch that finds any.
    ///
    /// If the [order of the decisions is kept](Self::keep_order) and is not that of the ids, each
    /// becomes a message for a single packet.
    ///
    /// The messages must be sent in this order and before those of a later call. Before that call,
    /// messages that could not be sent must be returned by [`unsent`](Self::unsent), or their ids
    /// [reopened](Self::reopen).
    pub fn settle(&mut self, rounds: impl Iterator<Item = u32>, out: &mut Vec<VerdictMessage<E>>) {
        std::mem::swap(&mut self.gathered, &mut self.leaving);
        self.gathered.clear();
        self.returned = 0;
        let mut gathered = std::mem::take(&mut self.leaving);
        if self.keeps_order && !are_in_order(&gathered) {
            self.settle_in_order(&gathered, out);
            self.leaving = gathered;
            return;
        }
        let stragglers = self.settle_stragglers(&gathered, out);
        let before = self.ring.len();
        let from_prefix = self.settle_prefix(rounds, out);
        if stragglers + from_prefix < gathered.len() {
            let popped = before - self.ring.len();
            self.settle_rest(&mut gathered, popped, out);
        }
        self.leaving = gathered;
    }

    /// One message for each decision, in the order of the decisions.
    fn settle_in_order(&mut self, gathered: &[u32], out: &mut Vec<VerdictMessage<E>>) {
        for id in gathered {
            let Some(slot @ Slot::Decided(_)) = self.slot_mut(*id) else { continue };
            if let Slot::Decided(decision) = std::mem::replace(slot, Slot::Settled) {
                out.push(VerdictMessage::Single { id: *id, decision });
            }
        }
        self.stragglers.retain(|_, slot| !matches!(slot, Slot::Settled));
        while let Some(Slot::Settled) = self.ring.front() {
            self.ring.pop_front();
            self.base = self.base.wrapping_add(1);
        }
    }

    /// Returns their number.
    fn settle_stragglers(&mut self, gathered: &[u32], out: &mut Vec<VerdictMessage<E>>) -> usize {
        if self.stragglers.is_empty() {
            return 0;
        }
        let before = out.len();
        for id in gathered {
            if !matches!(self.stragglers.get(id), Some(Slot::Decided(_))) {
                continue;
            }
            if let Some(Slot::Decided(decision)) = self.stragglers.remove(id) {
                out.push(VerdictMessage::Single { id: *id, decision });
            }
        }
        out.len() - before
    }

    /// Removes the prefix without undecided ids; returns the number of its decisions.
    fn settle_prefix(&mut self, rounds: impl Iterator<Item = u32>, out: &mut Vec<VerdictMessage<E>>) -> usize {
        let batches = self.batches && self.stragglers.is_empty();
        let mut settled = 0;
        let mut run: Option<Run> = None;
        let mut rounds = rounds.peekable();
        while let Some(Slot::Decided(_) | Slot::Settled) = self.ring.front() {
            let (id, slot) = (self.base, self.ring.pop_front());
            self.base = self.base.wrapping_add(1);
            let Some(Slot::Decided(decision)) = slot else { continue };
            settled += 1;
            if rounds.next_if(|first| id.wrapping_sub(*first) <= u32::MAX / 2).is_some() {
                while rounds.next_if(|first| id.wrapping_sub(*first) <= u32::MAX / 2).is_some() {}
                finish_run(&mut run, out);
            }
            match &mut run {
                Some(run) if run.takes(&decision) => {
                    run.max = id;
                    run.count += 1;
                    continue;
                }
                _ => finish_run(&mut run, out),
            }
            if batches && decision.extras.is_none() {
                let Decision { fields, origin, .. } = decision;
                run = Some(Run { first: id, max: id, fields, origin, count: 1 });
            } else {
                out.push(VerdictMessage::Single { id, decision });
            }
        }
        finish_run(&mut run, out);
        settled
    }

    /// Settles what is decided behind an undecided id.
    fn settle_rest(&mut self, gathered: &mut [u32], popped: usize, out: &mut Vec<VerdictMessage<E>>) {
        let (base, span) = (self.base, self.ring.len());
        let offset = |id: &u32| id.wrapping_sub(base) as usize;
        let mut rest: Vec<u32>;
        let rest = if popped > 0 || gathered.iter().any(|id| offset(id) >= span) {
            rest = gathered.iter().copied().filter(|id| offset(id) < span).collect();
            &mut rest[..]
        } else {
            gathered
        };
        rest.sort_unstable_by_key(offset);
        for id in rest.iter() {
            let Some(slot @ Slot::Decided(_)) = self.ring.get_mut(offset(id)) else { continue };
            if let Slot::Decided(decision) = std::mem::replace(slot, Slot::Settled) {
                out.push(VerdictMessage::Single { id: *id, decision });
            }
        }
    }

    /// The ids that a message of the last [`settle`](Self::settle) decides.
    pub fn ids_of(&self, message: &VerdictMessage<E>) -> Vec<u32> {
        match message {
            VerdictMessage::Single { id, .. } => vec![*id],
            VerdictMessage::Batch { first, max, .. } => {
                let span = max.wrapping_sub(*first);
                let mut ids: Vec<u32> =
                    self.leaving.iter().copied().filter(|id| id.wrapping_sub(*first) <= span).collect();
                ids.sort_unstable_by_key(|id| id.wrapping_sub(*first));
                ids
            }
        }
    }

    /// A message of the last [`settle`](Self::settle) was not sent: its decisions are gathered
    /// again.
    pub fn unsent(&mut self, message: VerdictMessage<E>) {
        let ids = self.ids_of(&message);
        let mut put = |id: u32, decision: Decision<E>| {
            *self.slot_to_restore(id) = Slot::Decided(decision);
            if self.keeps_order {
                // Before what has been decided since.
                self.gathered.insert(self.returned, id);
                self.returned += 1;
            } else {
                self.gathered.push(id);
            }
        };
        match message {
            VerdictMessage::Single { id, decision } => put(id, decision),
            VerdictMessage::Batch { fields, origin, .. } => {
                for id in ids {
                    put(id, Decision { fields, extras: None, origin });
                }
            }
        }
    }

    /// Makes the gathered decisions of owners undecided again. Returns the ids with their
    /// decisions.
    pub fn take_back_gathered(&mut self) -> Vec<(u32, Decision<E>)> {
        let gathered = std::mem::take(&mut self.gathered);
        let mut taken = Vec::new();
        for id in gathered {
            let Some(slot @ Slot::Decided(Decision { origin: Origin::Owner, .. })) = self.slot_mut(id) else {
                self.gathered.push(id);
                continue;
            };
            if let Slot::Decided(decision) = std::mem::replace(slot, Slot::Undecided(NO_TOKEN)) {
                self.undecided += 1;
                taken.push((id, decision));
            }
        }
        taken
    }
}

fn are_in_order(ids: &[u32]) -> bool {
    ids.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) <= u32::MAX / 2)
}

/// Consecutive decisions with the same fields.
struct Run {
    first: u32,
    max: u32,
    fields: VerdictFields,
    origin: Origin,
    count: usize,
}

impl Run {
    /// Whether one message can carry both. Decisions of owners are kept apart, because their
    /// refusal is reported to the owner.
    fn takes<E>(&self, decision: &Decision<E>) -> bool {
        decision.extras.is_none() && self.fields == decision.fields && self.origin == decision.origin
    }
}

/// A run of one is sent as a message for a single packet: it costs the same, and cannot affect
/// another packet.
fn finish_run<E>(run: &mut Option<Run>, out: &mut Vec<VerdictMessage<E>>) {
    let Some(Run { first, max, fields, origin, count }) = run.take() else { return };
    out.push(match count {
        1 => VerdictMessage::Single { id: first, decision: Decision { fields, extras: None, origin } },
        _ => VerdictMessage::Batch { first, max, fields, origin, count },
    });
}
