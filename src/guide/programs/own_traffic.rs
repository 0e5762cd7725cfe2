use std::{io, net::SocketAddr, time::Duration};

use tokio::{net::UdpSocket, time::timeout};
use tokio_nfqueue::{
    Divert, Error, Hook, Packet, Protocol, Queue, Rule, Verdict,
    divert::{DivertBuilder, Match},
};

/// A bit that no other program of this host uses, of packets and of connections.
const MARK: u32 = 0x0100_0000;

/// UDP of this host in both directions, without that of this program.
fn rules() -> DivertBuilder {
    let udp = |hook| Rule::new(hook).protocol(Protocol::Udp);
    Divert::builder()
        // What the sockets with the mark send, and its connection.
        .rule(udp(Hook::Output).mark(MARK, MARK).set_connection_mark(MARK, MARK).accept())
        .rule(udp(Hook::Output))
        // The answers carry no mark, but belong to the connection.
        .rule(udp(Hook::Input).unless(Match::connection_mark(MARK, MARK)))
}

async fn marked_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0").await?;
    socket2::SockRef::from(&socket).set_mark(MARK)?;
    Ok(socket)
}

/// Whether the service allows the packet.
async fn ask(packet: &Packet, service: SocketAddr) -> io::Result<bool> {
    let socket = marked_socket().await?;
    socket.send_to(packet.payload(), service).await?;
    let mut answer = [0];
    timeout(Duration::from_secs(2), socket.recv(&mut answer)).await??;
    Ok(answer == *b"y")
}

async fn decide(packet: Packet, service: SocketAddr) -> Verdict {
    match ask(&packet, service).await {
        Ok(true) => packet.accept(),
        Ok(false) | Err(_) => packet.drop(),
    }
}

/// Binds the queue; what is returned serves it.
pub async fn start(
    service: SocketAddr,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = Result<(), Error>>, Error> {
    let queue = Queue::builder(Queue::ANY).divert(rules()).bind().await?;
    let serve = queue.serve(move |packet| decide(packet, service));
    Ok(serve.with_graceful_shutdown(stop).into_future())
}
