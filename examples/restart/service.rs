//! The service: it accepts every packet. A successor takes over its queue, and its rule if it has
//! one.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path, pin::pin, time::Duration};

use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
};
use tokio_nfqueue::{Action, Divert, Error, ErrorKind, Hook, Protocol, Queue, QueueBuilder, Rule, handover::Takeover};

use super::Options;

/// How long the verdicts of tasks, and then the successor, are awaited.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(options: &Options, socket: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    runtime.block_on(serve(options, socket))
}

/// The queue, and the rule that sends packets to it, if it is not the user's.
type Filter = (Queue, Option<Divert>);

async fn serve(options: &Options, socket: &Path) -> Result<(), String> {
    let mut end = pin!(end_signal());
    // While a successor starts, packets wait in the queue. It must be long enough for that.
    let settings = || Queue::builder(options.queue).max_len(16_384).on_unanswered(Action::Accept);
    let (mut queue, divert) = match UnixStream::connect(socket).await {
        Ok(stream) => match take_over(stream, settings()).await {
            // The old process has ended before it had handed over.
            Err(error) if error.kind() == ErrorKind::Disconnected => start(options, settings()).await,
            result => result,
        },
        Err(_) => start(options, settings()).await,
    }
    .map_err(|error| format!("{error:#}"))?;
    let listening = || listen(socket).map_err(|error| format!("cannot listen on {}: {error}", socket.display()));
    let mut listener = listening()?;
    eprintln!("ready");

    let sink = queue.sink();
    let mut packets = Vec::new();
    loop {
        tokio::select! {
            // In this order, so that a flood of packets does not keep a successor waiting.
            biased;
            accepted = listener.accept() => {
                let result = match accepted {
                    Ok((stream, _)) => hand_over(stream, &queue, divert.as_ref()).await,
                    Err(error) => Err(format!("cannot accept a connection: {error}")),
                };
                match result {
                    Ok(()) => break,
                    // The queue continues here.
                    Err(sentence) => eprintln!("restart: {sentence}"),
                }
                listener = listening()?;
            }
            () = &mut end => {
                close(queue, divert).await.map_err(|error| format!("{error:#}"))?;
                break;
            }
            received = queue.recv_many(&mut packets, 64) => {
                if received.map_err(|error| format!("{error:#}"))? == 0 {
                    break;
                }
                for packet in packets.drain(..) {
                    packet.accept().submit().map_err(|error| format!("{error:#}"))?;
                }
            }
        }
    }
    let stats = sink.stats();
    println!(
        "decided {} passed-on {} lost {} gone {}",
        stats.decided.accepted + stats.decided.dropped,
        stats.decided.handed_over,
        stats.lost.packets,
        stats.sent.gone_at_least + stats.sent.refused
    );
    Ok(())
}

/// Begins without a predecessor, or with one that ends without a hand-over.
async fn start(options: &Options, settings: QueueBuilder) -> Result<Filter, Error> {
    let queue = settings.bind_when_free().await?;
    let Some(port) = options.udp_port else { return Ok((queue, None)) };
    let rule = Rule::new(Hook::Input).protocol(Protocol::Udp).destination_port(port).to_queue(options.queue);
    let rules = Divert::builder().table(format!("restart_{}", options.queue)).rule(rule);
    Ok((queue, Some(Divert::install_when_free(&rules).await?)))
}

async fn take_over(stream: UnixStream, settings: QueueBuilder) -> Result<Filter, Error> {
    let mut takeover = Takeover::receive(stream).await?;
    let queue = settings.take_over(&mut takeover)?;
    let divert = takeover.take_divert()?;
    // Everything else that can fail belongs before this line: until here the old process keeps the
    // queue if there is an error.
    takeover.accept().await?;
    Ok((queue, divert))
}

async fn hand_over(stream: UnixStream, queue: &Queue, divert: Option<&Divert>) -> Result<(), String> {
    let here = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == here => {}
        _ => return Err("a process of another user has asked for the queue".to_owned()),
    }
    let hand_over = async {
        let mut handover = queue.hand_over(PATIENCE).await?;
        if let Some(divert) = divert {
            handover = handover.with_divert(divert).await?;
        }
        handover.send(stream, PATIENCE).await
    };
    hand_over.await.map_err(|error: Error| format!("{error:#}; the queue stays here"))
}

/// The graceful end, without a successor.
async fn close(queue: Queue, divert: Option<Divert>) -> Result<(), Error> {
    if let Some(divert) = &divert {
        divert.remove_rules().await?;
    }
    queue.close().await?;
    match divert {
        Some(divert) => divert.close().await,
        None => Ok(()),
    }
}

/// Listens for a successor of the same user. The name was that of the predecessor.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Ends with SIGINT or SIGTERM.
fn end_signal() -> impl Future<Output = ()> {
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}
