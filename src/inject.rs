//! Sends packets that did not come from a queue.

use std::{
    fmt,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::Sink;
use tokio::runtime::Handle;

use crate::{
    io::raw_sockets::{RawSockets, SEND, Unregistered},
    namespace::NetworkNamespace,
    types::{Error, ErrorKind},
};

/// Sends complete IPv4 and IPv6 packets through raw sockets: replies, duplicates, and copies that
/// are sent later.
///
/// Clones share the sockets, and may be used in any task or thread. With feature `edit`, `Edit`
/// makes the packets. [`guide::replies`](crate::guide::replies) has a table of the replies that
/// arrive, by hook.
///
/// ```no_run
/// use tokio_nfqueue::{Error, Packet, Verdict, inject::Injector};
///
/// # async fn example(packet: Packet) -> Result<(), Error> {
/// // The rule that sends packets to the queue excludes this mark.
/// let injector = Injector::builder().mark(0x40).bind()?;
///
/// // Accepts a packet, and sends a copy of it. The queue is bound with `gso(false)`.
/// let copy = packet.payload_bytes();
/// packet.accept().submit()?;
/// injector.send(&copy).await?;
/// # Ok(())
/// # }
/// ```
///
/// # What the kernel does with the packet
///
/// * The packet passes the output and postrouting hooks, like one that a program of this host has
///   sent. A rule there may send it to a queue again. To prevent that, give the injector a
///   [mark](InjectorBuilder::mark), and exclude the mark in the rule (with feature `divert`:
///   `Rule::unless_mark`). A copy of a packet that was queued at another hook passes that hook only
///   if it is routed there.
/// * The destination address in the IP header determines the route. The source address may be any
///   address.
/// * The checksums of TCP, UDP, ICMP and ICMPv6 must be correct. The kernel computes only the
///   checksum of the IPv4 header. It also replaces an IPv4 identification of 0 and an IPv4 source
///   address of 0.0.0.0.
/// * It does not fragment: a packet that is longer than the MTU of the interface is an error.
/// * A copy of a received packet may be a super-packet, which is too long, or have an incomplete
///   checksum ([`Packet::is_checksum_ready`](crate::Packet::is_checksum_ready)). A queue with
///   [`gso(false)`](crate::QueueBuilder::gso) has neither.
/// * A packet to a link-local IPv6 address needs an [interface](InjectorBuilder::interface).
///
/// While a packet waits in a queue at the output hook, it counts against the injector's send
/// buffer. A task that awaits [`send`](Self::send) and is also the one that decides these packets
/// waits for itself.
#[doc(alias = "IP_HDRINCL")]
#[doc(alias = "IPV6_HDRINCL")]
pub struct Injector {
    sockets: Arc<RawSockets>,
    /// The packet that the `Sink` of this clone waits to send.
    waiting: Option<Waiting>,
    closed: bool,
}

type Waiting = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + Sync>>;

/// The settings of an injector: [`Injector::builder`].
#[derive(Debug, Clone)]
#[must_use = "nothing happens until `bind`"]
pub struct InjectorBuilder {
    mark: Option<u32>,
    interface: Option<String>,
    namespace: Option<NetworkNamespace>,
}

impl InjectorBuilder {
    /// Sets the mark of all packets, for rules and routes. Default: 0.
    #[doc(alias = "SO_MARK")]
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Sends all packets through the interface with this name. Default: the route determines the
    /// interface.
    ///
    /// Packets to link-local IPv6 addresses need it. Packets to addresses of this host arrive
    /// nevertheless.
    #[doc(alias = "SO_BINDTODEVICE")]
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interface = Some(name.into());
        self
    }

    /// Sends in another network namespace. Default: that of the calling thread.
    ///
    /// As for [`QueueBuilder::namespace`](crate::QueueBuilder::namespace), the caller's threads do
    /// not change their namespace, and entering another one needs `CAP_SYS_ADMIN`.
    pub fn namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// Opens a raw socket for IPv4, and one for IPv6 if the system has IPv6.
    ///
    /// # Errors
    /// * `NotPermitted`: no `CAP_NET_RAW` in the user namespace that owns the network namespace.
    ///   [`mark`](Self::mark) needs `CAP_NET_ADMIN` before Linux 5.17, and one of both since then.
    /// * `NoRuntime`: not called within a Tokio runtime, or in a runtime without an I/O driver. In
    ///   the latter case Tokio prints a panic message.
    /// * `Other`: no free descriptor, no such [`interface`](Self::interface), or the
    ///   [`namespace`](Self::namespace) cannot be entered.
    pub fn bind(self) -> Result<Injector, Error> {
        const OPERATION: &str = "bind injector";
        if Handle::try_current().is_err() {
            return Err(Error::new(ErrorKind::NoRuntime, OPERATION));
        }
        let open = || Unregistered::open(self.mark, self.interface.as_deref());
        let opened = match &self.namespace {
            None => open(),
            Some(namespace) => namespace.run(open)?,
        };
        let opened = opened.map_err(|error| match error.kind() {
            ErrorKind::NotPermitted => {
                error.with_detail("CAP_NET_RAW is needed in the user namespace of the network namespace")
            }
            _ => error,
        })?;
        let sockets = RawSockets::register(opened).map_err(|error| error.with_operation(OPERATION))?;
        Ok(Injector { sockets: Arc::new(sockets), waiting: None, closed: false })
    }
}

impl Injector {
    /// The settings of an injector.
    pub fn builder() -> InjectorBuilder {
        InjectorBuilder { mark: None, interface: None, namespace: None }
    }

    /// Sends a packet, which must begin with its IP header. Waits while the send buffer is full.
    ///
    /// Success means that the kernel has taken the packet. A full transmit queue of the interface
    /// drops it without an error (`raw_send_hdrinc`, `rawv6_send_hdrinc`).
    ///
    /// # Errors
    /// Each error concerns only this packet.
    /// * `InvalidInput`: the bytes are not one complete IPv4 or IPv6 packet; its length field
    ///   differs from their number.
    /// * `Unsupported`: the packet is IPv6, and the system has no IPv6, or no IPv6 address from
    ///   which to send there (`EADDRNOTAVAIL`): IPv6 may be switched off
    ///   (`net.ipv6.conf.*.disable_ipv6`).
    /// * `NoRuntime`: the send buffer is full, and the runtime is shutting down.
    /// * `Other`, with [`raw_os_error`](Error::raw_os_error): `EMSGSIZE`, the packet is longer than
    ///   the MTU of the interface; `ENETUNREACH` or `EHOSTUNREACH`, there is no route; `EPERM`, a
    ///   rule at the output or postrouting hook dropped it; `ENOBUFS`, no memory; `EINVAL`, the
    ///   kernel refuses the header or the destination.
    ///
    /// # Cancel safety
    /// Cancel safe: if it has not completed, the packet has not been sent.
    pub async fn send(&self, packet: &[u8]) -> Result<(), Error> {
        let to = destination(packet)?;
        self.sockets.send(packet, to).await
    }

    /// Sends a packet if the send buffer is not full. It works in any thread, without a runtime.
    ///
    /// # Errors
    /// * `Full`: the send buffer is full.
    /// * `Failed`: as [`send`](Self::send).
    pub fn try_send(&self, packet: &[u8]) -> Result<(), TrySendError> {
        let to = destination(packet).map_err(TrySendError::Failed)?;
        match self.sockets.try_send(packet, to) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TrySendError::Full),
            Err(error) => Err(TrySendError::Failed(error)),
        }
    }
}

/// The destination address in the header of a complete packet.
fn destination(packet: &[u8]) -> Result<IpAddr, Error> {
    let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, SEND).with_detail(detail);
    let (stated, header, destination) = match packet {
        [first, _, high, low, .., _] if first >> 4 == 4 && packet.len() >= 20 => {
            let header = usize::from(first & 0xf) * 4;
            if header < 20 {
                return Err(invalid("the IPv4 header is malformed".to_owned()));
            }
            (u16::from_be_bytes([*high, *low]).into(), header, address::<4>(packet, 16).into())
        }
        [first, _, _, _, high, low, ..] if first >> 4 == 6 && packet.len() >= 40 => {
            (40 + usize::from(u16::from_be_bytes([*high, *low])), 40, address::<16>(packet, 24).into())
        }
        _ => return Err(invalid("it does not begin with a complete IPv4 or IPv6 header".to_owned())),
    };
    if stated != packet.len() || stated < header {
        return Err(invalid(format!("its header states {stated} bytes, and it has {}", packet.len())));
    }
    Ok(destination)
}

fn address<const N: usize>(packet: &[u8], at: usize) -> [u8; N] {
    let mut octets = [0; N];
    octets.copy_from_slice(&packet[at..at + N]);
    octets
}

/// The clone has its own state as a `Sink`.
impl Clone for Injector {
    fn clone(&self) -> Self {
        Self { sockets: self.sockets.clone(), waiting: None, closed: false }
    }
}

impl fmt::Debug for Injector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Injector").field("sockets", &self.sockets).field("closed", &self.closed).finish_non_exhaustive()
    }
}

/// Sends each packet at once, or keeps it while the send buffer is full and waits before the next
/// one. An error concerns only one packet, and later packets can be sent; `forward` ends at the
/// first error. `poll_close` closes only this clone.
///
/// [`Injector::send`] hides `SinkExt::send`: use `feed` and `flush`, or `SinkExt::send(&mut
/// injector, packet)`.
impl Sink<Bytes> for Injector {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.closed {
            return Poll::Ready(Err(Error::new(ErrorKind::Closed, SEND)));
        }
        self.poll_flush(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, packet: Bytes) -> Result<(), Error> {
        if self.closed {
            return Err(Error::new(ErrorKind::Closed, SEND));
        }
        match self.try_send(&packet) {
            Ok(()) => Ok(()),
            Err(TrySendError::Failed(error)) => Err(error),
            Err(TrySendError::Full) => {
                let sockets = self.sockets.clone();
                let to = destination(&packet)?;
                self.waiting = Some(Box::pin(async move { sockets.send(&packet, to).await }));
                Ok(())
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(waiting) = &mut self.waiting else { return Poll::Ready(Ok(())) };
        let result = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(result)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.closed = true;
        self.poll_flush(cx)
    }
}

/// Why [`Injector::try_send`] has not sent the packet.
#[derive(Debug)]
pub enum TrySendError {
    /// The send buffer is full.
    Full,
    /// The packet cannot be sent.
    Failed(Error),
}

impl fmt::Display for TrySendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the send buffer is full"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TrySendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Full => None,
            // `Display` is that of the error itself.
            Self::Failed(error) => error.source(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(bytes: usize) -> Vec<u8> {
        let mut packet = vec![0; bytes];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
        packet[16..20].copy_from_slice(&[192, 0, 2, 1]);
        packet
    }

    fn v6(bytes: usize) -> Vec<u8> {
        let mut packet = vec![0; bytes];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&(bytes as u16 - 40).to_be_bytes());
        packet[39] = 1;
        packet
    }

    #[test]
    fn the_header_determines_the_destination() {
        assert_eq!(destination(&v4(20)).unwrap().to_string(), "192.0.2.1");
        assert_eq!(destination(&v4(1500)).unwrap().to_string(), "192.0.2.1");
        assert_eq!(destination(&v6(40)).unwrap().to_string(), "::1");
        assert_eq!(destination(&v6(1280)).unwrap().to_string(), "::1");
    }

    #[test]
    fn only_complete_packets_are_sent() {
        let with = |mut packet: Vec<u8>, at: usize, byte: u8| {
            packet[at] = byte;
            packet
        };
        for packet in [
            Vec::new(),
            vec![0x45],
            v4(20)[..19].to_vec(),
            v6(40)[..39].to_vec(),
            with(v4(40), 0, 0x55),
            with(v4(40), 0, 0x44),
            // Options beyond the end.
            with(v4(20), 0, 0x46),
            // Too long and too short a length.
            with(v4(40), 3, 41),
            with(v4(40), 3, 39),
            with(v6(60), 5, 21),
            with(v6(60), 5, 19),
            with(v6(60), 5, 0),
        ] {
            let error = destination(&packet).expect_err("an incomplete packet");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn bind_outside_a_runtime_is_an_error() {
        assert_eq!(Injector::builder().bind().expect_err("no runtime").kind(), ErrorKind::NoRuntime);
    }
}
