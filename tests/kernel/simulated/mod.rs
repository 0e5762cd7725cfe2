//! The simulated kernel against the real one: each scenario runs on both, and what a program can
//! see must be the same.

use libtest_mimic::Trial;

use self::worlds::{Real, Simulated};
use crate::{common, support};

mod flows;
mod messages;
mod scenarios;
mod worlds;

pub(crate) fn tests() -> Vec<Trial> {
    let trial = |(name, scenario): (&str, fn(&mut scenarios::Script<'_>))| {
        let name = common::test_name(module_path!(), name);
        support::test(&name, move || async move {
            let mut simulated = Simulated::new(worlds::small_head());
            let expected = scenarios::run(&mut simulated, scenario);
            let mut real = Real::new();
            let seen = scenarios::run(&mut real, scenario);
            let mut different = String::new();
            for (number, (real, simulated)) in seen.iter().zip(&expected).enumerate() {
                if real != simulated {
                    different += &format!("\n  {number}: real      {real}\n  {number}: simulated {simulated}");
                }
            }
            assert!(different.is_empty() && seen.len() == expected.len(), "{different}\nreal: {seen:#?}");
        })
    };
    scenarios::ALL.iter().copied().filter(|(name, _)| !is_different(name)).map(trial).chain(flows::tests()).collect()
}

/// The model is that of Linux 6.18. What is known to be different on this kernel is left out.
fn is_different(name: &str) -> bool {
    let release = common::kernel_release();
    match name {
        // Long messages are charged otherwise before Linux 6.3.
        "a_full_receive_buffer" => release < (6, 12),
        // UDP_SEGMENT over loopback.
        _ if name.contains("super_packets") => release < (6, 11),
        // EINVAL instead of EOPNOTSUPP; replaced payloads are checked.
        "the_kinds_of_settings_that_are_refused" | "replaced_payloads" => release >= (7, 1),
        _ => false,
    }
}
