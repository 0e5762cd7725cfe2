//! The filter: a process with a queue and its rules, which begins anew or takes over.
//!
//! It reads commands from its standard input, and says on its standard output what has happened.

use std::{
    io::{BufRead, Write},
    process::ExitCode,
    time::Duration,
};

use rustix::thread::{CapabilitySet, CapabilitySets};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_nfqueue::{
    Action, Divert, Error, Hook, Packet, Protocol, Queue, QueueBuilder, Rule, Verdict, handover::Takeover,
};

use super::{HAND_OVER, Port, TABLE, Traits, flow};

/// The first argument of such a process.
const ARGUMENT: &str = "filter-of-the-soak";
/// How long a filter waits for verdicts, and then for its successor.
const WITHIN: Duration = Duration::from_secs(20);

/// Where a filter's queue comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Nothing,
    /// The number of the predecessor.
    Predecessor(u32),
    /// The same; it waits for a command before it accepts.
    Slowly(u32),
}

/// The arguments of a filter with this number.
pub(super) fn arguments(number: u32, from: Origin, traits: Traits) -> Vec<String> {
    let from = match from {
        Origin::Nothing => "nothing".to_owned(),
        Origin::Predecessor(number) => number.to_string(),
        Origin::Slowly(number) => format!("slowly-{number}"),
    };
    let Traits { closed, bypass, numbers, ordered } = traits;
    let traits = [closed, bypass, ordered].map(|on| on.to_string()).join(",");
    vec![ARGUMENT.to_owned(), number.to_string(), from, numbers.to_string(), traits]
}

/// The whole `main` of such a process, and `None` in all others.
pub(crate) fn child() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let [number, from, numbers, traits] = [(); 4].map(|()| arguments.next().expect("an argument"));
    let number = number.parse().expect("a number");
    let from = match from.strip_prefix("slowly-") {
        Some(number) => Origin::Slowly(number.parse().expect("a number")),
        None => from.parse().map_or(Origin::Nothing, Origin::Predecessor),
    };
    let mut on = traits.split(',').map(|word| word == "true");
    let [closed, bypass, ordered] = [(); 3].map(|()| on.next().expect("a trait"));
    let traits = Traits { closed, bypass, ordered, numbers: numbers.parse().expect("a number") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let result = runtime.block_on(filter(number, from, traits));
    if let Err(error) = &result {
        say(&format!("failed: {error:#}"));
    }
    // A thread still reads the input.
    std::process::exit(i32::from(result.is_err()));
}

async fn filter(number: u32, from: Origin, traits: Traits) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).expect("handle SIGTERM");
    let mut commands = commands();
    let (queue, taken) = begin(from, traits, &mut commands).await?;
    let mut listener = UnixListener::bind(name(number)).expect("the name is free");
    say(if taken { "ready taken" } else { "ready anew" });
    let sink = queue.sink();
    let mut serving = tokio::spawn(serve(queue, traits));
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => {
                let (stream, _) = accepted.expect("accept a connection");
                let handover = sink.hand_over(WITHIN).await?;
                match handover.send(stream, WITHIN).await {
                    Ok(()) => break,
                    Err(error) => say(&format!("continues: {:?}", error.kind())),
                }
                drop(listener);
                listener = UnixListener::bind(name(number)).expect("the name is free");
            }
            _ = terminate.recv() => {
                sink.close().await?;
                break;
            }
            command = commands.recv() => match command.as_deref() {
                Some("ping") => say("pong"),
                Some("lose") => lose_capabilities(),
                // The parent has ended.
                _ => break,
            },
            served = &mut serving => {
                served.expect("it does not panic")?;
                panic!("the stream has ended");
            }
        }
    }
    let stats = sink.stats();
    let decided = stats.decided;
    let settled = decided.accepted + decided.dropped + decided.repeated + decided.requeued + decided.handed_over;
    let settled = settled + stats.sent.refused + stats.sent.gone_at_least;
    say(&format!("end {} {settled} {} {}", stats.received.packets, stats.held.in_flight, stats.lost.packets));
    Ok(())
}

/// The queue, and whether it was taken over.
async fn begin(
    from: Origin,
    traits: Traits,
    commands: &mut mpsc::UnboundedReceiver<String>,
) -> Result<(Queue, bool), Error> {
    let (Origin::Predecessor(number) | Origin::Slowly(number)) = from else {
        return Ok((settings(traits).bind_when_free().await?, false));
    };
    // A predecessor that has ended before it has sent anything leaves nothing to take over.
    let Ok(stream) = UnixStream::connect(name(number)).await else {
        return Ok((settings(traits).bind_when_free().await?, false));
    };
    let Ok(mut takeover) = Takeover::receive(stream).await else {
        return Ok((settings(traits).bind_when_free().await?, false));
    };
    let queue = settings(traits).take_over(&mut takeover)?;
    say("received");
    if matches!(from, Origin::Slowly(_)) {
        commands.recv().await;
    }
    takeover.accept().await?;
    Ok((queue, true))
}

fn settings(traits: Traits) -> QueueBuilder {
    let rules = [
        Rule::new(Hook::Input).protocol(Protocol::Udp),
        Rule::new(Hook::Input).protocol(Protocol::Tcp),
        Rule::new(Hook::Output).protocol(Protocol::Tcp),
    ];
    let rules = Divert::builder().table(TABLE).rules(rules.map(|rule| rule.bypass(traits.bypass)));
    Queue::builder(0..traits.numbers)
        .max_len(32_768)
        .copy_range(200)
        .on_unanswered(if traits.closed { Action::Drop } else { Action::Accept })
        .divert(if traits.closed { rules.fail_closed() } else { rules })
}

async fn serve(mut queue: Queue, traits: Traits) -> Result<(), Error> {
    if traits.ordered {
        return queue.serve(decide).in_flow_order().await;
    }
    let mut count = 0_u32;
    while let Some(packet) = queue.recv().await {
        // Often some packets have been received and not handed out, also when the queue is handed
        // over.
        count += 1;
        if count.is_multiple_of(24) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let deciding = decide(packet?);
        tokio::spawn(async move {
            if let Some(verdict) = deciding.await {
                verdict.submit().expect("a verdict");
            }
        });
    }
    Ok(())
}

/// Some verdicts come later than those of packets behind.
async fn decide(packet: Packet) -> Option<Verdict> {
    let (port, data) = split(packet.payload())?;
    match (port, data.first()) {
        (Port::Allowed, _) => {
            if data.get(7).is_some_and(|number| number % 5 == 0) {
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            Some(packet.accept())
        }
        (Port::Open, _) => Some(packet.accept()),
        (Port::Forbidden, _) => Some(packet.drop()),
        (Port::Rejected, _) => Some(packet.reject()),
        (Port::Denied, _) => Some(packet.reject().for_flow()),
        (Port::Flow, Some(&flow::DROP_ALONE)) => Some(packet.drop()),
        (Port::Flow, Some(&flow::ACCEPT_ALONE)) => Some(packet.accept()),
        (Port::Flow, Some(&kind)) => {
            let (number, id) = (data.get(1..5)?.try_into().map(u32::from_be_bytes).ok()?, packet.id());
            let verdict = match kind {
                flow::ACCEPT => packet.accept(),
                flow::DROP => packet.drop(),
                _ => packet.reject(),
            };
            // In a task of its own: the order of other connections does not depend on it.
            tokio::spawn(async move {
                match verdict.for_flow().confirm().await {
                    Ok(()) => say(&format!("flow {number}")),
                    Err(error) => say(&format!("flow {number}, packet {}: {error:#}", id.get())),
                }
            });
            None
        }
        (Port::Stream, Some(&flow::DROP_ALONE)) => Some(packet.drop()),
        (Port::Stream | Port::Flow, _) => Some(packet.accept().for_flow()),
    }
}

/// The port of this host in an IPv4 packet, and what is behind the headers.
fn split(packet: &[u8]) -> Option<(Port, &[u8])> {
    const TCP: u8 = 6;
    let (protocol, transport) = (*packet.get(9)?, packet.get(usize::from(packet.first()? & 15) * 4..)?);
    let number = |at| transport.get(at..at + 2)?.try_into().map(u16::from_be_bytes).ok();
    let header = if protocol == TCP { usize::from(transport.get(12)? >> 4) * 4 } else { 8 };
    Some((Port::of(protocol, [number(0)?, number(2)?])?, transport.get(header..)?))
}

/// A name without a file, which belongs to the network namespace.
fn name(number: u32) -> String {
    format!("\0{HAND_OVER} {number}")
}

fn commands() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            let _ = sender.send(line);
        }
    });
    receiver
}

fn lose_capabilities() {
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none).expect("give capabilities up");
}

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    // The parent may have ended.
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}
