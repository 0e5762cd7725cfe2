use std::{
    future::ready,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use nfqueue_inspect::{Decision, Hint, Limits, ServerNames};
use tokio_nfqueue::{Divert, Error, Hook, Packet, Protocol, Queue, Rule, Verdict};

/// Both directions: what servers send proves what they have received.
fn rules(port: u16) -> [Rule; 2] {
    let tcp = |hook| Rule::new(hook).protocol(Protocol::Tcp);
    [tcp(Hook::Output).destination_port(port), tcp(Hook::Input).source_port(port)]
}

fn decide(packet: Packet, names: &mut ServerNames, blocked: &str) -> Verdict {
    let hint = names.push(Instant::now(), packet.payload(), |_, seen| {
        // The name itself, and all names below it.
        let forbidden = seen.name().is_some_and(|name| name.is_in(blocked));
        if forbidden || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
    });
    match hint {
        Hint::Undecided | Hint::Allowed { settled: false } => packet.accept(),
        // The server has confirmed what was judged: the rest does not come to the queue.
        Hint::Allowed { settled: true } => packet.accept().for_flow(),
        Hint::Denied => packet.reject().for_flow(),
        // It began before this program did. Its client begins a new one.
        Hint::Unknown => packet.reject(),
        // Such as a segment after a gap, which TCP sends again.
        _ => packet.drop(),
    }
}

/// Blocks what this host sends. Binds the queue; what is returned serves it.
pub async fn start(
    blocked: String,
    port: u16,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = Result<(), Error>>, Error> {
    let rules = Divert::builder().rules(rules(port));
    let queue = Queue::builder(Queue::ANY).divert(rules).bind().await?;
    let names = Mutex::new(ServerNames::new(Limits::default().both_directions(true)));
    let serve = queue.serve(move |packet| {
        let mut names = names.lock().unwrap_or_else(PoisonError::into_inner);
        ready(decide(packet, &mut names, &blocked))
    });
    Ok(serve.with_graceful_shutdown(stop).into_future())
}
