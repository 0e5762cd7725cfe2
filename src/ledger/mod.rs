//! What is in flight, and which messages settle it. Knows ids and rulings; no bytes, no socket, no clock.
//!
//! The kernel hands ids out in order (`__nfqnl_enqueue_packet` counts under the queue's lock), so the window of ids in
//! flight is a ring, indexed by distance from its base. An id that stays undecided while many thousands pass it is moved
//! to a side table, so that one forgotten packet does not keep the whole span in memory.
//!
//! | state of an id | meaning |
//! |---|---|
//! | undecided | arrived; its owner has not spoken |
//! | decided | its owner has spoken; the kernel has not been told |
//! | settled | told, or lost before it came: nothing is owed |

use std::collections::{BTreeMap, VecDeque};

use crate::wire::verdict::Ruling;

#[cfg(test)]
mod model;

/// The ledger of one queue. `E` is what a single verdict may carry beside its ruling; the ledger only hands it through.
#[derive(Debug)]
pub(crate) struct Ledger<E> {
    /// The id of the ring's first slot.
    base: u32,
    ring: VecDeque<Slot<E>>,
    /// Ids before `base` that are not settled yet. While one is here, no batch may be sent: it would decide it too.
    stragglers: BTreeMap<u32, Slot<E>>,
    /// Decided ids, in the order of the decisions.
    gathered: Vec<u32>,
    undecided: usize,
    /// The weights of the undecided, added up.
    weight: usize,
    batches: bool,
}

/// What an owner wants done with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision<E> {
    pub(crate) ruling: Ruling,
    /// Only a message of its own can carry this.
    pub(crate) extra: Option<E>,
}

/// A message that settles one or more ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Settlement<E> {
    Single {
        id: u32,
        decision: Decision<E>,
    },
    /// Everything still queued up to `max`; `count` ids of it were decided so by their owners, the rest is settled.
    Batch {
        max: u32,
        ruling: Ruling,
        count: usize,
    },
}

#[derive(Debug)]
enum Slot<E> {
    /// With its weight.
    Undecided(u32),
    Decided(Decision<E>),
    Settled,
}

/// A decision came too late, or for an id that never arrived.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotInFlight;

/// The ring may span this many ids beyond a small multiple of what is unsettled; then its oldest goes to the side table.
/// At 24 bytes a slot this bounds the ring's idle part to 200 KiB.
const SPARE_SPAN: usize = 8192;

impl<E> Ledger<E> {
    /// A ledger whose first arrival is expected to be `first` (1 on a queue just bound).
    pub(crate) fn new(first: u32) -> Self {
        Self {
            base: first,
            ring: VecDeque::new(),
            stragglers: BTreeMap::new(),
            gathered: Vec::new(),
            undecided: 0,
            weight: 0,
            batches: true,
        }
    }

    /// Takes in an id the kernel has handed over; tells how many ids before it were lost on the way. The weight is a number
    /// that is [added up](Self::weight) over the undecided.
    pub(crate) fn arrive(&mut self, id: u32, weight: u32) -> u32 {
        let next = self.base.wrapping_add(self.ring.len() as u32);
        let lost = id.wrapping_sub(next);
        if lost > u32::MAX / 2 {
            // Before what was expected. The kernel does not do this; keep the packet all the same.
            return self.arrive_late(id, weight);
        }
        if lost as usize > SPARE_SPAN {
            // A gap wider than the ring should be: start the ring anew behind it.
            while !self.ring.is_empty() {
                self.evict();
            }
            self.base = id;
        } else {
            self.ring.extend((0..lost).map(|_| Slot::Settled));
        }
        self.ring.push_back(Slot::Undecided(weight));
        self.undecided += 1;
        self.weight += weight as usize;
        while self.ring.len() > SPARE_SPAN + 4 * (self.undecided + self.gathered.len() - self.stragglers.len()) {
            self.evict();
        }
        lost
    }

    fn arrive_late(&mut self, id: u32, weight: u32) -> u32 {
        let slot = match self.ring.get_mut(id.wrapping_sub(self.base) as usize) {
            Some(slot) => slot,
            None => self.stragglers.entry(id).or_insert(Slot::Settled),
        };
        if matches!(slot, Slot::Settled) {
            *slot = Slot::Undecided(weight);
            self.undecided += 1;
            self.weight += weight as usize;
        }
        0
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

    /// Notes an owner's decision.
    ///
    /// # Errors
    /// The id is not undecided: its decision has been made, or it never came.
    pub(crate) fn decide(&mut self, id: u32, decision: Decision<E>) -> Result<(), NotInFlight> {
        let slot = match self.ring.get_mut(id.wrapping_sub(self.base) as usize) {
            Some(slot) => slot,
            None => self.stragglers.get_mut(&id).ok_or(NotInFlight)?,
        };
        let Slot::Undecided(weight) = *slot else { return Err(NotInFlight) };
        *slot = Slot::Decided(decision);
        self.undecided -= 1;
        self.weight -= weight as usize;
        self.gathered.push(id);
        Ok(())
    }

    /// Whether an id still waits for its owner.
    pub(crate) fn is_undecided(&self, id: u32) -> bool {
        let slot = self.ring.get(id.wrapping_sub(self.base) as usize).or_else(|| self.stragglers.get(&id));
        matches!(slot, Some(Slot::Undecided(_)))
    }

    /// How many ids wait for their owners.
    pub(crate) fn undecided(&self) -> usize {
        self.undecided
    }

    /// The weights of the ids that wait for their owners, added up.
    pub(crate) fn weight(&self) -> usize {
        self.weight
    }

    /// The oldest id that is not settled yet, or the one expected next.
    pub(crate) fn oldest(&self) -> u32 {
        self.stragglers.keys().next().copied().unwrap_or(self.base)
    }

    /// The ids that wait for their owners, oldest first.
    pub(crate) fn undecided_ids(&self) -> Vec<u32> {
        let stragglers = self.stragglers.iter().map(|(id, slot)| (*id, slot));
        let ring = self.ring.iter().zip(0..).map(|(slot, offset)| (self.base.wrapping_add(offset), slot));
        stragglers.chain(ring).filter(|(_, slot)| matches!(slot, Slot::Undecided(_))).map(|(id, _)| id).collect()
    }

    /// How many decisions the kernel has not been told.
    pub(crate) fn gathered(&self) -> usize {
        self.gathered.len()
    }

    /// From now on every packet is settled by a message of its own. For after a refusal that may have left packets
    /// in the kernel's queue which this ledger holds for settled: a batch would decide those as well.
    pub(crate) fn forbid_batches(&mut self) {
        self.batches = false;
    }

    /// Turns every decision into messages, appended to `out` in the order of the ids, and counts them settled.
    ///
    /// The longest decided prefix becomes one batch for each run of equal rulings; what must go alone, or lies behind an
    /// undecided id, becomes a single verdict. The messages must be sent in this order and before those of a later call.
    pub(crate) fn settle(&mut self, out: &mut Vec<Settlement<E>>) {
        let mut gathered = std::mem::take(&mut self.gathered);
        if !self.stragglers.is_empty() {
            self.settle_stragglers(&mut gathered, out);
        }
        let before = self.ring.len();
        let from_prefix = self.settle_prefix(out);
        if from_prefix < gathered.len() {
            let popped = before - self.ring.len();
            self.settle_rest(&mut gathered, popped, out);
        }
        gathered.clear();
        self.gathered = gathered;
    }

    fn settle_stragglers(&mut self, gathered: &mut Vec<u32>, out: &mut Vec<Settlement<E>>) {
        gathered.retain(|id| {
            if !matches!(self.stragglers.get(id), Some(Slot::Decided(_))) {
                return true;
            }
            if let Some(Slot::Decided(decision)) = self.stragglers.remove(id) {
                out.push(Settlement::Single { id: *id, decision });
            }
            false
        });
    }

    /// Pops the prefix that holds nothing undecided; tells how many decisions it held.
    fn settle_prefix(&mut self, out: &mut Vec<Settlement<E>>) -> usize {
        let batches = self.batches && self.stragglers.is_empty();
        let mut settled = 0;
        let mut run: Option<(u32, Ruling, usize)> = None;
        while let Some(Slot::Decided(_) | Slot::Settled) = self.ring.front() {
            let (id, slot) = (self.base, self.ring.pop_front());
            self.base = self.base.wrapping_add(1);
            let Some(Slot::Decided(decision)) = slot else { continue };
            settled += 1;
            match &mut run {
                Some((max, ruling, count)) if batches && decision.extra.is_none() && *ruling == decision.ruling => {
                    (*max, *count) = (id, *count + 1);
                    continue;
                }
                _ => finish_run(&mut run, out),
            }
            if decision.extra.is_none() {
                run = Some((id, decision.ruling, 1));
            } else {
                out.push(Settlement::Single { id, decision });
            }
        }
        finish_run(&mut run, out);
        settled
    }

    /// Settles what is decided behind an undecided id.
    fn settle_rest(&mut self, gathered: &mut Vec<u32>, popped: usize, out: &mut Vec<Settlement<E>>) {
        let (base, span) = (self.base, self.ring.len());
        let offset = |id: &u32| id.wrapping_sub(base) as usize;
        if popped > 0 {
            gathered.retain(|id| offset(id) < span);
        }
        gathered.sort_unstable_by_key(offset);
        for id in gathered.iter() {
            if let Some(slot @ Slot::Decided(_)) = self.ring.get_mut(offset(id))
                && let Slot::Decided(decision) = std::mem::replace(slot, Slot::Settled)
            {
                out.push(Settlement::Single { id: *id, decision });
            }
        }
    }
}

/// A run of one is sent as a single verdict: the same cost, and it cannot touch another packet.
fn finish_run<E>(run: &mut Option<(u32, Ruling, usize)>, out: &mut Vec<Settlement<E>>) {
    match run.take() {
        Some((id, ruling, 1)) => out.push(Settlement::Single { id, decision: Decision { ruling, extra: None } }),
        Some((max, ruling, count)) => out.push(Settlement::Batch { max, ruling, count }),
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::verdict::code::{ACCEPT, DROP};

    fn plain(word: u32) -> Decision<u8> {
        Decision { ruling: Ruling::plain(word), extra: None }
    }

    fn ledger(ids: impl IntoIterator<Item = u32>) -> Ledger<u8> {
        let mut ledger = Ledger::new(1);
        for id in ids {
            ledger.arrive(id, 1);
        }
        ledger
    }

    fn settled(ledger: &mut Ledger<u8>) -> Vec<Settlement<u8>> {
        let mut out = Vec::new();
        ledger.settle(&mut out);
        out
    }

    #[test]
    fn a_decided_prefix_is_one_batch() {
        let mut ledger = ledger(1..=5);
        for id in [3, 1, 2, 5] {
            ledger.decide(id, plain(ACCEPT)).unwrap();
        }
        let single = Settlement::Single { id: 5, decision: plain(ACCEPT) };
        assert_eq!(
            settled(&mut ledger),
            [Settlement::Batch { max: 3, ruling: Ruling::plain(ACCEPT), count: 3 }, single]
        );
        ledger.decide(4, plain(DROP)).unwrap();
        assert_eq!(settled(&mut ledger), [Settlement::Single { id: 4, decision: plain(DROP) }]);
        assert_eq!((ledger.undecided(), ledger.gathered(), ledger.ring.len()), (0, 0, 0));
    }

    #[test]
    fn runs_break_where_the_ruling_changes_and_keep_the_order() {
        let mut ledger = ledger(1..=7);
        for id in 1..=7 {
            let decision = match id {
                4 => Decision { ruling: Ruling::plain(ACCEPT), extra: Some(9) },
                5.. => plain(DROP),
                _ => plain(ACCEPT),
            };
            ledger.decide(id, decision).unwrap();
        }
        let expected = [
            Settlement::Batch { max: 3, ruling: Ruling::plain(ACCEPT), count: 3 },
            Settlement::Single { id: 4, decision: Decision { ruling: Ruling::plain(ACCEPT), extra: Some(9) } },
            Settlement::Batch { max: 7, ruling: Ruling::plain(DROP), count: 3 },
        ];
        assert_eq!(settled(&mut ledger), expected);
    }

    #[test]
    fn gaps_are_counted_and_owe_nothing() {
        let mut ledger = Ledger::<u8>::new(1);
        assert_eq!(ledger.arrive(4, 1), 3);
        assert_eq!(ledger.arrive(5, 1), 0);
        assert_eq!(ledger.decide(2, plain(ACCEPT)), Err(NotInFlight));
        assert_eq!(ledger.undecided_ids(), [4, 5]);
    }

    #[test]
    fn a_second_decision_is_refused() {
        let mut ledger = ledger([1]);
        ledger.decide(1, plain(ACCEPT)).unwrap();
        assert_eq!(ledger.decide(1, plain(DROP)), Err(NotInFlight));
        settled(&mut ledger);
        assert_eq!(ledger.decide(1, plain(DROP)), Err(NotInFlight));
        assert_eq!(ledger.decide(2, plain(DROP)), Err(NotInFlight));
    }

    #[test]
    fn a_packet_held_for_long_costs_one_entry_and_forbids_batches() {
        let mut ledger = ledger([1]);
        for id in 2..200_000 {
            ledger.arrive(id, 1);
            ledger.decide(id, plain(ACCEPT)).unwrap();
            if id % 64 == 0 {
                let out = settled(&mut ledger);
                assert!(out.iter().all(|s| matches!(s, Settlement::Single { .. })), "a batch would decide packet 1");
            }
        }
        assert!(ledger.ring.len() <= 2 * SPARE_SPAN, "{}", ledger.ring.len());
        assert_eq!(ledger.undecided_ids(), [1]);
        ledger.decide(1, plain(DROP)).unwrap();
        let out = settled(&mut ledger);
        assert_eq!(out[0], Settlement::Single { id: 1, decision: plain(DROP) });
        assert!(matches!(out[1], Settlement::Batch { max: 199_999, .. }));
    }

    #[test]
    fn a_slot_stays_small() {
        // 65 536 packets may be outstanding; with a boxed extra a slot is 40 bytes at most.
        assert!(size_of::<Slot<Box<[u8; 100]>>>() <= 40, "{}", size_of::<Slot<Box<[u8; 100]>>>());
    }
}
