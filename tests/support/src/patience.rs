//! Time limits for what must come.

use std::time::Duration;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(30 * SLOWNESS);
/// A factor for such times, for tests that are built for a slow machine: `TOKIO_NFQUEUE_PATIENCE`,
/// read by the compiler.
pub const SLOWNESS: u64 = match option_env!("TOKIO_NFQUEUE_PATIENCE") {
    None => 1,
    Some(text) => match u64::from_str_radix(text, 10) {
        Ok(factor @ 1..=1000) => factor,
        _ => panic!("TOKIO_NFQUEUE_PATIENCE is a number from 1 to 1000"),
    },
};

/// How often a test does what a few times show as well: less on a slow machine.
pub const fn many(count: u32) -> u32 {
    count / SLOWNESS as u32
}
