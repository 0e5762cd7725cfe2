//! The ledger against its model of the kernel's queue.

use super::input::Input;
use crate::ledger_model::{Step, run};
use nfqueue_proto::types::Action;

/// More steps take long and find no more.
const MOST_STEPS: usize = 400;

/// Takes the bytes for the steps of a history.
pub fn ledger(data: &[u8]) {
    let mut input = Input::new(data);
    let first = match input.byte() {
        0..128 => 1,
        before => 0_u32.wrapping_sub(u32::from(before - 128) * 3),
    };
    let steps = std::iter::from_fn(|| (!input.is_empty()).then(|| step(&mut input)));
    run(first, steps.take(MOST_STEPS));
}

fn step(input: &mut Input<'_>) -> Step {
    match input.byte() % 32 {
        0..6 => {
            let count = input.byte() % 20;
            let lost = input.byte();
            Step::Arrive((0..count).map(|at| lost != 0 && at == lost % 20).collect())
        }
        // Around the widest gap that the ring takes.
        6 => Step::Gap(8190 + u32::from(input.byte()) % 7),
        7..18 => Step::Decide {
            nth: input.byte().into(),
            action: match input.byte() % 4 {
                0 | 1 => Action::Accept,
                2 => Action::Drop,
                _ => Action::Requeue { queue: 7, bypass: false },
            },
            mark: Some(input.byte()).filter(|mark| mark & 3 == 1).map(|mark| u32::from(mark >> 7)),
            extras: Some(input.byte()).filter(|extras| extras & 7 == 1),
        },
        18..24 => Step::Decide { nth: 0, action: Action::Accept, mark: None, extras: None },
        24 => Step::Stale(input.byte().into()),
        25 => Step::DeviceDown(input.byte().into()),
        26..29 => Step::FlushDecision,
        29 => Step::FailedFlush(input.byte().into()),
        30 => Step::Refused,
        _ => Step::ForbidBatches,
    }
}
