//! The cost of a verdict in the ledger, by the number of outstanding packets and the order of the
//! verdicts.

use std::time::Instant;

use nfqueue_proto::{
    state::{
        Storage,
        ledger::{Decision, Ledger, Origin},
    },
    types::Action::Accept as ACCEPT,
    wire::verdict::VerdictFields,
};

use crate::suite::summary::{Book, Random};

pub const SECTION: &str = "ledger";
pub const COST: &str = "ns/verdict";
pub const FEW: usize = 1_000;
pub const MANY: usize = 60_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Arrival,
    Reverse,
    Random,
}

pub const ORDERS: [Order; 3] = [Order::Arrival, Order::Reverse, Order::Random];

/// Verdicts between two flushes.
const FLUSH: usize = 64;

pub fn name(outstanding: usize, order: Order) -> String {
    format!("{outstanding} outstanding, {order:?} order")
}

pub fn measure(outstanding: usize, order: Order, verdicts: usize, book: &mut Book) {
    let ids = ids(outstanding, order);
    let mut ledger = Ledger::<()>::new(1);
    let mut first = 1;
    let mut cycle = || {
        first = cycle(&mut ledger, first, &ids);
    };
    cycle();
    let cycles = verdicts.div_ceil(outstanding);
    let start = Instant::now();
    (0..cycles).for_each(|_| cycle());
    let cost = start.elapsed().as_nanos() as f64 / (cycles * outstanding) as f64;
    book.note(SECTION, &name(outstanding, order), COST, cost);
}

/// Offsets of the ids, in the order in which they are decided.
pub fn ids(outstanding: usize, order: Order) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..outstanding as u32).collect();
    match order {
        Order::Arrival => {}
        Order::Reverse => ids.reverse(),
        Order::Random => {
            let mut random = Random::new(7);
            (1..outstanding).for_each(|i| ids.swap(i, random.below(i + 1)));
        }
    }
    ids
}

/// All packets arrive, then all are decided and settled. Returns the next id.
pub fn cycle(ledger: &mut Ledger<()>, first: u32, ids: &[u32]) -> u32 {
    let mut settled = Vec::with_capacity(FLUSH);
    for offset in 0..ids.len() as u32 {
        ledger.arrive(first.wrapping_add(offset), Storage::None);
    }
    for together in ids.chunks(FLUSH) {
        for offset in together {
            let decision = Decision { fields: VerdictFields::plain(ACCEPT), extras: None, origin: Origin::Owner };
            ledger.decide(first.wrapping_add(*offset), decision).expect("it is undecided");
        }
        ledger.settle(std::iter::empty(), &mut settled);
        settled.clear();
    }
    first.wrapping_add(ids.len() as u32)
}
