//! What the guide says of rules, packets and connections, and a reader may not expect.

mod bridges;
mod replies;
mod rules;
mod segments;

use libtest_mimic::Trial;

pub(crate) fn tests() -> Vec<Trial> {
    let modules = [rules::tests(), replies::tests(), segments::tests(), bridges::tests()];
    modules.into_iter().flatten().collect()
}
