//! The ledger against a model of the kernel's queue (`nfnetlink_queue.c`): whatever the order of arrivals, decisions,
//! losses, gaps and wraps, every packet ends with exactly the verdict its owner gave, and no packet without one.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::types::Action;

/// The queue as the kernel keeps it: a list, in id order as `nfqnl` counts, of what waits for a verdict.
#[derive(Default)]
struct Kernel {
    queued: Vec<u32>,
    verdicts: BTreeMap<u32, (Ruling, Option<u8>)>,
}

impl Kernel {
    fn apply(&mut self, message: Settlement<u8>) {
        match message {
            Settlement::Single { id, decision } => {
                if let Some(at) = self.queued.iter().position(|queued| *queued == id) {
                    self.queued.remove(at);
                    self.decided(id, decision.ruling, decision.extra);
                }
            }
            // nfqnl_recv_verdict_batch: walks from the head while the id is not after max (signed difference).
            Settlement::Batch { max, ruling, .. } => {
                while let Some(&head) = self.queued.first() {
                    if (head.wrapping_sub(max) as i32) > 0 {
                        break;
                    }
                    self.queued.remove(0);
                    self.decided(head, ruling, None);
                }
            }
        }
    }

    fn decided(&mut self, id: u32, ruling: Ruling, extra: Option<u8>) {
        assert!(self.verdicts.insert(id, (ruling, extra)).is_none(), "packet {id} decided twice");
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Packets reach the queue; of each `true` the message is lost to the socket buffer, and the kernel drops the packet.
    Arrive(Vec<bool>),
    /// A loss far wider than the ring.
    Gap(u32),
    /// The owner of the n-th undecided packet speaks.
    Decide {
        nth: usize,
        action: Action,
        mark: Option<u32>,
        extra: Option<u8>,
    },
    /// A decision for an id that is not undecided must be refused.
    Stale(usize),
    /// The kernel loses queued packets by itself: an interface went down.
    DeviceDown(usize),
    Flush,
    /// A flush of which only so many messages are sent; the others are given back.
    FailedFlush(usize),
    /// What is gathered is taken back, and decided anew.
    Refused,
    ForbidBatches,
}

fn step() -> impl Strategy<Value = Step> {
    let requeue = Action::Requeue { queue: 7, bypass: false };
    let action = prop_oneof![Just(Action::Accept), Just(Action::Drop), Just(requeue)];
    let mark = prop_oneof![3 => Just(None), 1 => (0u32..2).prop_map(Some)];
    let extra = prop_oneof![6 => Just(None), 1 => any::<u8>().prop_map(Some)];
    prop_oneof![
        6 => prop::collection::vec(prop::bool::weighted(0.05), 1..20).prop_map(Step::Arrive),
        1 => (SPARE_SPAN as u32 - 2..SPARE_SPAN as u32 + 5).prop_map(Step::Gap),
        20 => (any::<usize>(), action, mark, extra).prop_map(|(nth, action, mark, extra)| Step::Decide { nth, action, mark, extra }),
        20 => Just(Step::Decide { nth: 0, action: Action::Accept, mark: None, extra: None }),
        2 => any::<usize>().prop_map(Step::Stale),
        1 => any::<usize>().prop_map(Step::DeviceDown),
        8 => Just(Step::Flush),
        2 => any::<usize>().prop_map(Step::FailedFlush),
        1 => Just(Step::Refused),
        1 => Just(Step::ForbidBatches),
    ]
}

fn plain(action: Action) -> Decision<u8> {
    Decision { ruling: Ruling::plain(action), extra: None, origin: Origin::Owner }
}

fn run(first: u32, steps: Vec<Step>) {
    let mut kernel = Kernel::default();
    let mut ledger = Ledger::new(first);
    let mut next = first;
    let mut owned = Vec::new();
    let mut wanted = BTreeMap::new();
    let mut lost_by_kernel = Vec::new();
    let mut expected_gap = 0;
    // As if packets had been received seven at a time.
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
                    assert_eq!(ledger.arrive(id, 3), expected_gap);
                    expected_gap = 0;
                    kernel.queued.push(id);
                    owned.push(id);
                }
            }
            Step::Gap(width) => {
                next = next.wrapping_add(width);
                expected_gap += width;
            }
            Step::Decide { nth, action, mark, extra } => {
                if !owned.is_empty() {
                    let id = owned.remove(nth % owned.len());
                    let decision =
                        Decision { ruling: Ruling { action, mark, priority: None }, extra, origin: Origin::Owner };
                    assert!(ledger.is_undecided(id));
                    ledger.decide(id, decision.clone()).unwrap();
                    wanted.insert(id, (decision.ruling, decision.extra));
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
            Step::Flush => flush(&mut ledger, &mut kernel, next),
            Step::FailedFlush(sent) => {
                let mut out = Vec::new();
                ledger.settle(rounds(next), &mut out);
                let kept = out.split_off(sent % (out.len() + 1));
                out.into_iter().for_each(|message| kernel.apply(message));
                kept.into_iter().for_each(|message| ledger.unsent(message));
            }
            Step::Refused => {
                for (id, decision) in ledger.take_back_gathered() {
                    assert_eq!(wanted.get(&id), Some(&(decision.ruling, decision.extra)));
                    ledger.decide(id, plain(Action::Drop)).unwrap();
                    wanted.insert(id, (Ruling::plain(Action::Drop), None));
                }
            }
            Step::ForbidBatches => ledger.forbid_batches(),
        }
        // Nobody is decided whose owner has not spoken, and nobody otherwise than its owner said.
        for (id, verdict) in &kernel.verdicts {
            assert_eq!(wanted.get(id), Some(verdict), "packet {id}");
        }
        assert_eq!(ledger.undecided(), owned.len());
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_packet_ends_with_its_owners_verdict(steps in prop::collection::vec(step(), 0..200)) {
        run(1, steps);
    }

    #[test]
    fn also_across_the_wrap(before in 0u32..300, steps in prop::collection::vec(step(), 0..200)) {
        run(0u32.wrapping_sub(before), steps);
    }
}
