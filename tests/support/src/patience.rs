//! Time limits for what must come.

use std::time::Duration;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(30 * SLOWNESS);
/// How slow the machine is: a factor for such times, and a divisor for repetitions ([`many`]).
/// `TOKIO_NFQUEUE_PATIENCE`, read by the compiler.
pub const SLOWNESS: u64 = match option_env!("TOKIO_NFQUEUE_PATIENCE") {
    None => 1,
    Some(text) => match u64::from_str_radix(text, 10) {
        Ok(factor @ 1..=1000) => factor,
        _ => panic!("TOKIO_NFQUEUE_PATIENCE is a number from 1 to 1000"),
    },
};

/// How often a test repeats something: on a slow machine less, down to a tenth of `count`.
pub const fn many(count: u32) -> u32 {
    let divisor = if SLOWNESS < 10 { SLOWNESS as u32 } else { 10 };
    count / divisor
}
