use std::future::ready;

use tokio_nfqueue::{Divert, Error, Hook, NetworkNamespace, Packet, Queue, Rule, divert::Match};

/// From the host: refuses new connections to the ports of a container, apart from one. The network
/// namespace is that of a process in it: `NetworkNamespace::open("/proc/PID/ns/net")?`.
///
/// Binds the queue; what is returned serves it.
pub async fn start(
    container: NetworkNamespace,
    allowed: u16,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = Result<(), Error>>, Error> {
    // What the containers of a pod say to each other is on `lo`.
    let rule = Rule::new(Hook::Input).when(Match::tcp_syn()).unless(Match::interface("lo"));
    // Queue and rules are there; threads and other sockets of this program are not.
    let rules = Divert::builder().rule(rule);
    let queue = Queue::builder(0).namespace(container).divert(rules).bind().await?;
    let serve = queue.serve(move |packet: Packet| {
        let port = packet.view().ok().and_then(|view| view.destination_port());
        ready(if port == Some(allowed) { packet.accept() } else { packet.reject() })
    });
    Ok(serve.with_graceful_shutdown(stop).into_future())
}
