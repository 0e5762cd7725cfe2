//! Rules that belong to their queue: `QueueBuilder::divert`.

mod ending;
mod fail_closed;
mod installing;
mod passing;
mod waiting;

use std::io::Read;

use libtest_mimic::Trial;
use tokio_nfqueue::{Action, Divert, Queue, QueueBuilder, divert::DivertBuilder};

use crate::{
    common::{PATIENCE, udp_in},
    faults::process::{in_runtime, say, wait_for_the_end},
};

pub(crate) fn tests() -> Vec<Trial> {
    [installing::tests(), ending::tests(), passing::tests(), fail_closed::tests(), waiting::tests()]
        .into_iter()
        .flatten()
        .collect()
}

/// The table of [`rules`].
const TABLE: &str = "own";

/// All received UDP.
fn rules() -> DivertBuilder {
    Divert::builder().table(TABLE).rule(udp_in())
}

fn queue(rules: DivertBuilder) -> QueueBuilder {
    Queue::builder(0).on_unanswered(Action::Accept).close_timeout(PATIENCE).divert(rules)
}

fn table_exists() -> bool {
    crate::divert::table_exists(TABLE)
}

pub(crate) const MODE: &str = "own rules, ";

/// A process that accepts all packets of a queue with rules. When its input ends, it ends as `mode`
/// says.
pub(crate) fn child(mode: &str) {
    let (fail_closed, ending) = match mode.strip_prefix(MODE).and_then(|mode| mode.split_once(' ')) {
        Some(("closed", ending)) => (true, ending),
        Some(("open", ending)) => (false, ending),
        _ => panic!("{mode:?}"),
    };
    let rules = if fail_closed { rules().fail_closed() } else { rules() };
    in_runtime(async {
        let mut queue = queue(rules).bind().await.unwrap();
        say("ready");
        let mut end = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
        loop {
            tokio::select! {
                packet = queue.recv() => {
                    let verdict = packet.unwrap().unwrap().accept();
                    let verdict = if ending == "flow" { verdict.for_flow() } else { verdict };
                    verdict.submit().unwrap();
                }
                _ = &mut end => break,
            }
        }
        match ending {
            "panic" => {
                std::panic::set_hook(Box::new(|_| ()));
                panic!("on purpose");
            }
            "return" => {}
            "drop" => {
                let sink = queue.sink();
                drop(queue);
                while crate::common::account(0).is_some() || (!fail_closed && table_exists()) {
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                say("done");
                tokio::task::spawn_blocking(wait_for_the_end).await.unwrap();
                std::future::pending::<()>().await;
                drop(sink);
            }
            "close" => queue.close().await.unwrap(),
            ending => panic!("{ending:?}"),
        }
    });
}
