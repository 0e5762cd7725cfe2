//! The ledger against a model of the kernel's queue (`nfnetlink_queue.c`): for any order of
//! arrivals, decisions, losses, gaps and wraps, every packet gets exactly the verdict of its owner,
//! and no packet is left without one.

use std::collections::BTreeMap;

use nfqueue_proto::{
    state::{
        Storage,
        ledger::{Decision, Ledger, Origin, VerdictMessage},
    },
    types::Action,
    wire::verdict::VerdictFields,
};

/// The queue as the kernel keeps it: the packets that wait for a verdict, in the order of their
/// ids.
#[derive(Default)]
struct Kernel {
    queued: Vec<u32>,
    verdicts: BTreeMap<u32, (VerdictFields, Option<u8>)>,
}

impl Kernel {
    fn apply(&mut self, message: VerdictMessage<u8>) {
        match message {
            VerdictMessage::Single { id, decision } => {
                if let Some(at) = self.queued.iter().position(|queued| *queued == id) {
                    self.queued.remove(at);
                    self.decided(id, decision.fields, decision.extras);
                }
            }
            // nfqnl_recv_verdict_batch: walks from the head while the id is not after max (signed
            // difference).
            VerdictMessage::Batch { max, fields, .. } => {
                while let Some(&head) = self.queued.first() {
                    if (head.wrapping_sub(max) as i32) > 0 {
                        break;
                    }
                    self.queued.remove(0);
                    self.decided(head, fields, None);
                }
            }
        }
    }

    fn decided(&mut self, id: u32, fields: VerdictFields, extras: Option<u8>) {
        assert!(self.verdicts.insert(id, (fields, extras)).is_none(), "packet {id} decided twice");
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Packets are queued. For each `true` the message does not fit into the receive buffer, and
    /// the kernel drops the packet.
    Arrive(Vec<bool>),
    /// A gap that is much wider than the ring.
    Gap(u32),
    /// The owner of the n-th undecided packet decides it.
    Decide {
        nth: usize,
        action: Action,
        mark: Option<u32>,
        extras: Option<u8>,
    },
    /// A decision for an id that is not undecided must be refused.
    Stale(usize),
    /// The kernel drops queued packets: an interface went down.
    DeviceDown(usize),
    FlushDecision,
    /// A flush of which only this number of messages is sent; the others are returned.
    FailedFlush(usize),
    /// The gathered decisions are taken back and decided again.
    Refused,
    ForbidBatches,
}

fn plain(action: Action) -> Decision<u8> {
    Decision { fields: VerdictFields::plain(action), extras: None, origin: Origin::Owner }
}

/// Carries the steps out on the ledger and on the model of the kernel. `first` is the id of the
/// first packet.
pub(crate) fn run(first: u32, steps: impl IntoIterator<Item = Step>) {
    let mut kernel = Kernel::default();
    let mut ledger = Ledger::new(first);
    let mut next = first;
    let mut owned = Vec::new();
    let mut wanted = BTreeMap::new();
    let mut lost_by_kernel = Vec::new();
    let mut expected_gap = 0;
    // As if packets had been received in rounds of seven.
    let rounds = |next: u32| (0..20).rev().map(move |round| next.wrapping_sub(7 * round));
    let flush = |ledger: &mut Ledger<u8>, kernel: &mut Kernel, next: u32| {
        let mut out = Vec::new();
        ledger.settle(rounds(next), &mut out);
        out.into_iter().for_each(|message| kernel.apply(message));
        assert_eq!(ledger.gathered(), 0);
    };

    for step in steps {
        match step {
            Step::Arrive(losses) => {
                for lost in losses {
                    let id = next;
                    next = next.wrapping_add(1);
                    if lost {
                        expected_gap += 1;
                        continue;
                    }
                    assert_eq!(ledger.arrive(id, Storage::Own { bytes: 3 }), expected_gap);
                    expected_gap = 0;
                    kernel.queued.push(id);
                    owned.push(id);
                }
            }
            Step::Gap(width) => {
                next = next.wrapping_add(width);
                expected_gap += width;
            }
            Step::Decide { nth, action, mark, extras } => {
                if !owned.is_empty() {
                    let id = owned.remove(nth % owned.len());
                    let decision = Decision {
                        fields: VerdictFields { action, mark, priority: None },
                        extras,
                        origin: Origin::Owner,
                    };
                    assert!(ledger.is_undecided(id));
                    ledger.decide(id, decision.clone()).unwrap();
                    wanted.insert(id, (decision.fields, decision.extras));
                }
            }
            Step::Stale(nth) => {
                if let Some((&id, _)) = wanted.iter().nth(nth % wanted.len().max(1)) {
                    let again = plain(Action::Drop);
                    assert_eq!(ledger.decide(id, again.clone()), Err(again));
                }
            }
            Step::DeviceDown(nth) => {
                if !kernel.queued.is_empty() {
                    lost_by_kernel.push(kernel.queued.remove(nth % kernel.queued.len()));
                }
            }
            Step::FlushDecision => flush(&mut ledger, &mut kernel, next),
            Step::FailedFlush(sent) => {
                let mut out = Vec::new();
                ledger.settle(rounds(next), &mut out);
                let kept = out.split_off(sent % (out.len() + 1));
                out.into_iter().for_each(|message| kernel.apply(message));
                kept.into_iter().for_each(|message| ledger.unsent(message));
            }
            Step::Refused => {
                for (id, decision) in ledger.take_back_gathered() {
                    assert_eq!(wanted.get(&id), Some(&(decision.fields, decision.extras)));
                    ledger.decide(id, plain(Action::Drop)).unwrap();
                    wanted.insert(id, (VerdictFields::plain(Action::Drop), None));
                }
            }
            Step::ForbidBatches => ledger.forbid_batches(),
        }
        // No packet is decided whose owner has not decided it, and none differently.
        for (id, verdict) in &kernel.verdicts {
            assert_eq!(wanted.get(id), Some(verdict), "packet {id}");
        }
        assert_eq!(ledger.undecided(), owned.len());
        assert_eq!(ledger.bytes(), 3 * owned.len());
    }
    flush(&mut ledger, &mut kernel, next);
    for (id, verdict) in &wanted {
        if !lost_by_kernel.contains(id) {
            assert_eq!(kernel.verdicts.get(id), Some(verdict), "packet {id} was forgotten");
        }
    }
    assert_eq!(
        kernel.verdicts.len() + lost_by_kernel.iter().filter(|id| wanted.contains_key(id)).count(),
        wanted.len()
    );
    let mut undecided = ledger.undecided_ids();
    undecided.sort_unstable();
    owned.sort_unstable();
    assert_eq!(undecided, owned);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `SPARE_SPAN` of the ledger: the widest gap that its ring takes.
    const WIDEST_GAP: u32 = 8192;

    fn step() -> impl Strategy<Value = Step> {
        let requeue = Action::Requeue { queue: 7, bypass: false };
        let action = prop_oneof![Just(Action::Accept), Just(Action::Drop), Just(requeue)];
        let mark = prop_oneof![3 => Just(None), 1 => (0u32..2).prop_map(Some)];
        let extras = prop_oneof![6 => Just(None), 1 => any::<u8>().prop_map(Some)];
        prop_oneof![
            6 => prop::collection::vec(prop::bool::weighted(0.05), 1..20).prop_map(Step::Arrive),
            1 => (WIDEST_GAP - 2..WIDEST_GAP + 5).prop_map(Step::Gap),
            20 => (any::<usize>(), action, mark, extras).prop_map(|(nth, action, mark, extras)| Step::Decide { nth, action, mark, extras }),
            20 => Just(Step::Decide { nth: 0, action: Action::Accept, mark: None, extras: None }),
            2 => any::<usize>().prop_map(Step::Stale),
            1 => any::<usize>().prop_map(Step::DeviceDown),
            8 => Just(Step::FlushDecision),
            2 => any::<usize>().prop_map(Step::FailedFlush),
            1 => Just(Step::Refused),
            1 => Just(Step::ForbidBatches),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

        #[test]
        fn every_packet_gets_the_verdict_of_its_owner(steps in prop::collection::vec(step(), 0..200)) {
            run(1, steps);
        }

        #[test]
        fn every_packet_gets_the_verdict_of_its_owner_across_the_wrap(before in 0u32..300, steps in prop::collection::vec(step(), 0..200)) {
            run(0u32.wrapping_sub(before), steps);
        }
    }
}
