//! The ledger by hand: what leaves it in which messages.

use super::*;
use crate::types::Action::{self, Accept as ACCEPT, Drop as DROP};

fn plain(action: Action) -> Decision<u8> {
    Decision { fields: VerdictFields::plain(action), extras: None, origin: Origin::Owner }
}

fn batch(first: u32, max: u32, action: Action, count: usize) -> VerdictMessage<u8> {
    VerdictMessage::Batch { first, max, fields: VerdictFields::plain(action), origin: Origin::Owner, count }
}

fn ledger(ids: impl IntoIterator<Item = u32>) -> Ledger<u8> {
    let mut ledger = Ledger::new(1);
    for id in ids {
        ledger.arrive(id, Storage::None);
    }
    ledger
}

fn settled(ledger: &mut Ledger<u8>) -> Vec<VerdictMessage<u8>> {
    let mut out = Vec::new();
    ledger.settle(std::iter::empty(), &mut out);
    out
}

#[test]
fn a_decided_prefix_is_one_batch() {
    let mut ledger = ledger(1..=5);
    for id in [3, 1, 2, 5] {
        ledger.decide(id, plain(ACCEPT)).unwrap();
    }
    let single = VerdictMessage::Single { id: 5, decision: plain(ACCEPT) };
    assert_eq!(settled(&mut ledger), [batch(1, 3, ACCEPT, 3), single]);
    ledger.decide(4, plain(DROP)).unwrap();
    assert_eq!(settled(&mut ledger), [VerdictMessage::Single { id: 4, decision: plain(DROP) }]);
    assert_eq!((ledger.undecided(), ledger.gathered(), ledger.ring.len()), (0, 0, 0));
}

#[test]
fn runs_end_where_the_verdict_changes_and_keep_the_order() {
    let mut ledger = ledger(1..=7);
    for id in 1..=7 {
        let decision = match id {
            4 => Decision { fields: VerdictFields::plain(ACCEPT), extras: Some(9), origin: Origin::Owner },
            5.. => plain(DROP),
            _ => plain(ACCEPT),
        };
        ledger.decide(id, decision).unwrap();
    }
    let expected = [
        batch(1, 3, ACCEPT, 3),
        VerdictMessage::Single {
            id: 4,
            decision: Decision { fields: VerdictFields::plain(ACCEPT), extras: Some(9), origin: Origin::Owner },
        },
        batch(5, 7, DROP, 3),
    ];
    assert_eq!(settled(&mut ledger), expected);
}

#[test]
fn a_batch_spans_no_two_rounds_of_receiving() {
    let mut ledger = ledger(1..=12);
    for id in 1..=12 {
        ledger.decide(id, plain(ACCEPT)).unwrap();
    }
    let mut out = Vec::new();
    ledger.settle([1, 4, 4, 11, 13].into_iter(), &mut out);
    assert_eq!(out, [batch(1, 3, ACCEPT, 3), batch(4, 10, ACCEPT, 7), batch(11, 12, ACCEPT, 2)]);
}

#[test]
fn gaps_are_counted_and_need_no_verdict() {
    let mut ledger = Ledger::<u8>::new(1);
    assert_eq!(ledger.arrive(4, Storage::None), 3);
    assert_eq!(ledger.arrive(5, Storage::None), 0);
    assert_eq!(ledger.decide(2, plain(ACCEPT)), Err(plain(ACCEPT)));
    assert_eq!(ledger.undecided_ids(), [4, 5]);
}

#[test]
fn a_second_decision_is_refused() {
    let mut ledger = ledger([1]);
    ledger.decide(1, plain(ACCEPT)).unwrap();
    assert_eq!(ledger.decide(1, plain(DROP)), Err(plain(DROP)));
    settled(&mut ledger);
    assert_eq!(ledger.decide(1, plain(DROP)), Err(plain(DROP)));
    assert_eq!(ledger.decide(2, plain(DROP)), Err(plain(DROP)));
}

#[test]
fn a_packet_held_for_long_costs_one_entry_and_forbids_batches() {
    let mut ledger = ledger([1]);
    // An interpreter (Miri) takes its time.
    let end = if cfg!(miri) { 20_000 } else { 200_000 };
    for id in 2..end {
        ledger.arrive(id, Storage::None);
        ledger.decide(id, plain(ACCEPT)).unwrap();
        if id % 64 == 0 {
            let out = settled(&mut ledger);
            assert!(out.iter().all(|s| matches!(s, VerdictMessage::Single { .. })), "a batch would decide packet 1");
        }
    }
    assert!(ledger.ring.len() <= 2 * SPARE_SPAN, "{}", ledger.ring.len());
    assert_eq!(ledger.undecided_ids(), [1]);
    ledger.decide(1, plain(DROP)).unwrap();
    let out = settled(&mut ledger);
    assert_eq!(out[0], VerdictMessage::Single { id: 1, decision: plain(DROP) });
    assert!(matches!(out[1], VerdictMessage::Batch { max, .. } if max == end - 1));
}

#[test]
fn a_slot_stays_small() {
    // 65 536 packets may be outstanding; with boxed extras a slot is 40 bytes at most.
    assert!(size_of::<Slot<Box<[u8; 100]>>>() <= 40, "{}", size_of::<Slot<Box<[u8; 100]>>>());
}

#[test]
fn the_order_of_the_decisions_is_kept_on_request() {
    let single = |id, action| VerdictMessage::Single { id, decision: plain(action) };
    let mut ledger = ledger(1..=6);
    ledger.keep_order();
    for (id, action) in [(3, ACCEPT), (1, ACCEPT), (2, DROP), (5, ACCEPT)] {
        ledger.decide(id, plain(action)).unwrap();
    }
    let expected = [single(3, ACCEPT), single(1, ACCEPT), single(2, DROP), single(5, ACCEPT)];
    let sent = settled(&mut ledger);
    assert_eq!(sent, expected);
    assert_eq!((ledger.base, ledger.ring.len(), ledger.undecided()), (4, 3, 2));
    // Unsent messages come before what has been decided since.
    ledger.decide(4, plain(ACCEPT)).unwrap();
    sent.into_iter().skip(2).for_each(|message| ledger.unsent(message));
    assert_eq!(settled(&mut ledger), [single(2, DROP), single(5, ACCEPT), single(4, ACCEPT)]);
    ledger.decide(6, plain(ACCEPT)).unwrap();
    assert_eq!(settled(&mut ledger), [single(6, ACCEPT)]);
    // In the order of the ids, they share a message.
    (7..=9).for_each(|id| _ = ledger.arrive(id, Storage::None));
    (7..=9).for_each(|id| ledger.decide(id, plain(ACCEPT)).unwrap());
    assert_eq!(settled(&mut ledger), [batch(7, 9, ACCEPT, 3)]);
    assert_eq!((ledger.ring.len(), ledger.stragglers.len()), (0, 0));
}

#[test]
#[cfg_attr(miri, ignore = "these 32 768 ids take an interpreter more than ten minutes")]
fn the_order_of_the_decisions_is_kept_across_the_wrap_and_for_stragglers() {
    let mut ledger = Ledger::<u8>::new(u32::MAX);
    ledger.keep_order();
    [u32::MAX, 0, 1].into_iter().for_each(|id| _ = ledger.arrive(id, Storage::None));
    ledger.decide(u32::MAX, plain(ACCEPT)).unwrap();
    ledger.decide(0, plain(ACCEPT)).unwrap();
    assert_eq!(settled(&mut ledger), [batch(u32::MAX, 0, ACCEPT, 2)]);
    // An id that stays undecided while many are decided leaves the ring.
    let many = 2 * SPARE_SPAN as u32;
    (2..many).for_each(|id| _ = ledger.arrive(id, Storage::None));
    (2..many - 1).for_each(|id| ledger.decide(id, plain(ACCEPT)).unwrap());
    settled(&mut ledger);
    (many..2 * many).for_each(|id| _ = ledger.arrive(id, Storage::None));
    (many..2 * many).for_each(|id| ledger.decide(id, plain(ACCEPT)).unwrap());
    settled(&mut ledger);
    assert!(ledger.stragglers.contains_key(&1));
    ledger.decide(many - 1, plain(DROP)).unwrap();
    ledger.decide(1, plain(ACCEPT)).unwrap();
    let single = |id, action| VerdictMessage::Single { id, decision: plain(action) };
    assert_eq!(settled(&mut ledger), [single(many - 1, DROP), single(1, ACCEPT)]);
    assert!(ledger.stragglers.is_empty());
}
