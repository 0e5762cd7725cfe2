use std::{future::ready, net::IpAddr};

use tokio_nfqueue::{
    Divert, Error, Hook, Packet, Protocol, Queue, Rule, Verdict,
    divert::{DivertBuilder, Priority},
};

/// A service that has moved: the clients know the old address.
#[derive(Clone, Copy)]
pub struct Moved {
    pub port: u16,
    pub old: IpAddr,
    pub new: IpAddr,
}

impl Moved {
    /// On a router. Connection tracking sees the new address alone, of both directions: questions
    /// are rewritten before it, and replies behind it.
    fn rules(self) -> DivertBuilder {
        let prefix = if self.old.is_ipv4() { 32 } else { 128 };
        let udp = |hook| Rule::new(hook).protocol(Protocol::Udp);
        let questions = udp(Hook::Prerouting).destination_address(self.old, prefix);
        let replies = udp(Hook::Postrouting).source_address(self.new, prefix);
        Divert::builder()
            .rule(questions.destination_port(self.port).priority(Priority::RAW))
            .rule(replies.source_port(self.port))
            // Verdicts for connections need connection tracking before the queue.
            .flow_marks(None)
    }

    fn rewrite(self, packet: Packet) -> Result<Verdict, Error> {
        let mut edit = packet.edit()?;
        if edit.view().destination_address() == self.old {
            edit.set_destination_address(self.new)?;
        } else {
            // The reply: without this, the client gets it from an address that it has not asked.
            edit.set_source_address(self.old)?;
        }
        // With the new lengths and checksums.
        Ok(packet.accept().payload(edit.finish()))
    }

    /// Binds the queue; what is returned serves it.
    pub async fn start(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<impl Future<Output = Result<(), Error>>, Error> {
        // Datagrams of their own length, not put together to super-packets.
        let queue = Queue::builder(Queue::ANY).gso(false).divert(self.rules()).bind().await?;
        // What cannot be rewritten gets the default action of the queue: it is dropped.
        let serve = queue.serve(move |packet| ready(self.rewrite(packet)));
        Ok(serve.with_graceful_shutdown(stop).into_future())
    }
}
