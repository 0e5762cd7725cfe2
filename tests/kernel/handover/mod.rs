//! Restarts: a queue goes from one process to another, or is bound as soon as it is free.
//!
//! The promise of `VerdictSink::hand_over`: "a restart that loses no packet and decides none
//! twice", and of `Handover`: "there is no time at which a failure of the successor costs a
//! packet".
//!
//! Most tests hand over within one process: the two queues share nothing but what was passed. The
//! tests in `processes` use several.

mod divert;
mod failures;
mod passing;
mod processes;
mod supervision;
mod waiting;

use std::{process::ExitCode, time::Duration};

use libtest_mimic::Trial;
use tokio::net::UnixStream;
use tokio_nfqueue::{Divert, Error, Queue, QueueBuilder, VerdictSink, handover::Takeover};

use crate::common::{PATIENCE, soon, udp_in};

pub(crate) fn tests() -> Vec<Trial> {
    [passing::tests(), failures::tests(), divert::tests(), waiting::tests(), supervision::tests(), processes::tests()]
        .into_iter()
        .flatten()
        .collect()
}

/// The whole `main` of a process that a test has started, and `None` in all others.
pub(crate) fn child() -> Option<ExitCode> {
    processes::child()
}

/// Enough for a successor that is not stopped on purpose.
const ENOUGH: Duration = PATIENCE;

/// A connected pair: for the predecessor and for the successor.
fn connection() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("make a pair of Unix sockets")
}

/// Binds a queue and sends all received UDP to it. The rules can be handed over.
async fn start_with_rules(builder: QueueBuilder) -> (Queue, Divert) {
    let queue = builder.bind().await.expect("bind the queue");
    let rules = Divert::builder().rule(udp_in().to_queue(queue.queue_number()));
    (queue, Divert::install(&rules).await.expect("install the rules"))
}

/// Takes over one queue.
async fn take_over(stream: UnixStream, builder: QueueBuilder) -> Result<Queue, Error> {
    let mut takeover = Takeover::receive(stream).await?;
    let queue = builder.take_over(&mut takeover)?;
    takeover.accept().await?;
    Ok(queue)
}

/// Hands a queue over within this process.
async fn pass_on(sink: &VerdictSink, builder: QueueBuilder) -> Queue {
    let (here, there) = connection();
    let send = async {
        let handover = sink.hand_over(ENOUGH).await.expect("nothing is owed");
        handover.send(here, ENOUGH).await.expect("the successor accepts");
    };
    let ((), queue) = soon("the hand-over", async { tokio::join!(send, take_over(there, builder)) }).await;
    queue.expect("take the queue over")
}
