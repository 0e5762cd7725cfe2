//! Rewrites packets in memory, and keeps their lengths and checksums correct.

mod checksum;
mod fields;
mod layout;
mod reply;
mod route;
mod splice;
#[cfg(test)]
mod tests;
mod view;

use std::{borrow::Cow, fmt, sync::LazyLock};

use self::layout::{Layout, Obstacle, Transport};
use crate::{
    packet::Packet,
    types::{Error, ErrorKind, Hook},
    wire::MAX_PAYLOAD,
};

pub use self::{
    reply::Unreachable,
    view::{PacketView, TcpFields},
};

/// A copy of a packet that can be changed: addresses, ports, TTL, TOS and the transport payload.
///
/// Each change also updates the length fields. [`finish`](Self::finish) computes the checksums.
/// `Edit` works on bytes in memory and uses no socket.
///
/// It supports IPv4 and IPv6, and in them TCP, UDP, ICMP and ICMPv6. IPv4 options, IPv6 extension
/// headers and all fields that are not set stay as they are.
///
/// [`Packet::edit`] makes an `Edit` from a received packet. [`Edit::new`] makes one from other
/// bytes.
///
/// [`turn_around`](Self::turn_around), [`tcp_reset`](Self::tcp_reset) and
/// [`icmp_unreachable`](Self::icmp_unreachable) make a reply to the packet's sender.
///
/// ```
/// use std::net::Ipv4Addr;
///
/// use tokio_nfqueue::{Error, Packet, Verdict};
///
/// /// Redirects DNS queries to another server.
/// fn redirect(packet: Packet) -> Result<Verdict, Error> {
///     let mut edit = packet.edit()?;
///     edit.set_destination_address(Ipv4Addr::new(192, 0, 2, 53))?;
///     edit.set_destination_port(5353)?;
///     Ok(packet.accept().payload(edit.finish()))
/// }
///
/// /// Replaces a UDP payload. The new payload may have a different length.
/// fn replace(packet: Packet) -> Result<Verdict, Error> {
///     let mut edit = packet.edit()?;
///     if edit.view().payload() == Some(b"hello") {
///         edit.replace_payload(b"good morning")?;
///     }
///     Ok(packet.accept().payload(edit.finish()))
/// }
/// ```
///
/// # What it does not do
///
/// * It does not track TCP sequence numbers. A TCP payload of a different length breaks the
///   connection: the receiver acknowledges bytes that the sender has not sent. Replace TCP payloads
///   only with payloads of the same length, or terminate the connection in a proxy.
/// * It does not translate replies. After a change of addresses or ports, the packets of the reply
///   direction need the reverse change. Connection tracking knows the replies only if it sees the
///   same addresses in both directions: change one direction before it (hooks prerouting and
///   output, priority below −200), and the other one behind it.
///   [`guide::rewriting`](crate::guide::rewriting) has the tables.
/// * It does not choose a route. At forward and postrouting, a packet with another destination goes
///   to the next hop of the old one, and is usually lost. Change destinations at prerouting or
///   output.
/// * It does not update signatures. After a change, TCP's MD5 and AO options and any authentication
///   inside the payload are wrong.
/// * It does not change the packet that an ICMP error quotes, which has its own addresses and
///   checksums.
/// * It does not change packets inside tunnels.
///
/// A packet that becomes longer than the path MTU is fragmented or lost.
/// [`Verdict::payload`](crate::Verdict::payload) says when, and which replaced packets Linux 7.1
/// and later drop. Linux 7.2 and later compare the length, options, fragment bits and extension
/// headers of the IP header with those of the received packet. None of the setters changes these.
///
/// # Super-packets
///
/// With [`gso(true)`](crate::QueueBuilder::gso) a packet can be a super-packet (GSO): up to 64 KiB
/// that the kernel or the interface later cuts into segments. It can be edited, with these limits:
///
/// * It must keep its length, because the segment size stays the same. With another length, the
///   datagrams would begin at other bytes, and a super-packet that fits in one segment is lost
///   (measured on Linux 6.18).
/// * The checksum of a UDP super-packet becomes the sum of the pseudo header only. The kernel
///   computes the checksums of the segments from that sum.
/// * UDP super-packets are refused at the prerouting and input hooks, that is before local
///   delivery. Before Linux 6.11 they are refused at every hook, because those kernels send the
///   segments with wrong checksums.
/// * TCP super-packets are refused if they have an IPv4 source route that is not completed, or an
///   IPv6 routing header with segments left. The kernel would give the segments wrong checksums.
///
/// To edit without these limits, use `gso(false)`. GSO gains most for TCP, and the limits concern
/// mostly UDP. So a program that edits both binds two queues. Where the kernel tracks connections,
/// the queue with `gso(false)` belongs before connection tracking. Otherwise the kernel may drop
/// segments of new UDP connections, as [`gso`](crate::QueueBuilder::gso) describes.
///
/// ```no_run
/// use futures::{TryStreamExt, stream};
/// use tokio_nfqueue::{Divert, Hook, Protocol, Queue, Rule, divert::Priority};
///
/// # async fn example() -> Result<(), tokio_nfqueue::Error> {
/// let tcp = Queue::builder(0).gso(true).bind().await?;
/// let udp = Queue::builder(1).gso(false).bind().await?;
/// let rule = Rule::new(Hook::Prerouting);
/// let _divert = Divert::builder()
///     .rule(rule.clone().protocol(Protocol::Tcp).to_queue(0))
///     .rule(rule.protocol(Protocol::Udp).priority(Priority::RAW).to_queue(1))
///     .install()?;
/// let mut packets = stream::select(tcp, udp);
/// while let Some(packet) = packets.try_next().await? {
///     let mut edit = packet.edit()?;
///     edit.set_tos(0);
///     // The verdict goes to the queue of its packet.
///     packet.accept().payload(edit.finish()).submit()?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Fragments
///
/// Packets are fragments only where the kernel does not reassemble them before: it does so for
/// local delivery, before the input hook, and for connection tracking, at prerouting and output.
///
/// * [`PacketView::source_port`] and [`PacketView::destination_port`] return the ports of a first
///   fragment. Later fragments have none. To find their ports, remember those of the first fragment
///   by addresses, protocol and identification.
/// * TTL, TOS and addresses can be changed in every fragment. Ports and payload can be changed in
///   none, because the checksum covers the whole datagram.
///
#[doc = include_str!("pktbuff.md")]
pub struct Edit {
    packet: Vec<u8>,
    layout: Layout,
    /// The packet is a super-packet.
    gso: bool,
}

impl Packet {
    /// Copies the packet into an [`Edit`], to change it.
    ///
    /// Use this method for received packets, not [`Edit::new`]: only this method checks for
    /// [super-packets](Edit#super-packets).
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput)
    /// * for the same reasons as [`Edit::new`];
    /// * for a UDP super-packet at the prerouting and input hooks, and before Linux 6.11 at every
    ///   hook;
    /// * for a TCP super-packet with an IPv4 source route that is not completed, or with an IPv6
    ///   routing header that has segments left;
    /// * for a packet whose checksum [is not ready](Self::is_checksum_ready) and cannot be computed
    ///   here: an SCTP checksum, or the checksum of a packet inside a tunnel.
    ///
    /// In the last three cases, the kernel would lose the replaced packet or send it with wrong
    /// checksums. With [`gso(false)`](crate::QueueBuilder::gso), only the first case occurs.
    #[doc(alias = "pktb_alloc")]
    #[cfg_attr(docsrs, doc(cfg(feature = "edit")))]
    pub fn edit(&self) -> Result<Edit, Error> {
        self.edit_checked().map_err(|error| error.with_packet(self.id()))
    }

    fn edit_checked(&self) -> Result<Edit, Error> {
        let edit = Edit { gso: self.is_gso(), ..Edit::new(self.payload())? };
        if !self.is_checksum_ready() && !checksum::is_partial(&edit.packet, &edit.layout) {
            return Err(invalid(
                EDIT,
                "its incomplete checksum is not supported (SCTP, or inside a tunnel); bind the queue with gso(false)",
            ));
        }
        // For a replaced packet, `tcp4_gso_segment` and `tcp6_gso_segment` compute the checksums of
        // the segments with the destination in the IP header, which is not the final destination.
        if edit.gso && edit.layout.transport == Some(Transport::Tcp) && edit.layout.is_routed() {
            return Err(invalid(
                EDIT,
                "it is a TCP super-packet with a route that is not completed; bind the queue with gso(false)",
            ));
        }
        // Measured on Linux 6.18: local delivery loses a replaced UDP super-packet with any
        // checksum, unless the socket has UDP_GRO set.
        let is_sent = matches!(self.hook(), Hook::Forward | Hook::Output | Hook::Postrouting);
        if edit.gso && edit.layout.transport == Some(Transport::Udp) && !(is_sent && segments_replaced_udp()) {
            return Err(invalid(
                EDIT,
                "it is a UDP super-packet before local delivery, or on Linux before 6.11; bind the queue with gso(false)",
            ));
        }
        Ok(edit)
    }
}

impl Edit {
    /// Copies `packet`, which must begin with its IP header. Bytes after the packet (the padding of
    /// short frames) are not copied.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if the bytes
    /// * do not begin with a complete IPv4 or IPv6 header;
    /// * are only a part of the packet, for example because of a short
    ///   [`copy_range`](crate::QueueBuilder::copy_range);
    /// * are a packet of more than 65 531 bytes, or an IPv6 jumbogram.
    ///
    /// A malformed or unknown header after the IP header is not an error here. The methods that
    /// would change it return an error.
    pub fn new(packet: &[u8]) -> Result<Self, Error> {
        let layout = Layout::of(packet).map_err(|detail| invalid(EDIT, detail))?;
        match layout.stated_len {
            None => return Err(invalid(EDIT, "the IP header states no length (an IPv6 jumbogram, for example)")),
            Some(length) if length > layout.end => {
                return Err(invalid(EDIT, format!("only {} of its {length} bytes are present", layout.end)));
            }
            Some(length) if length > MAX_PAYLOAD => return Err(too_long(EDIT, length)),
            Some(_) => {}
        }
        Ok(Self { packet: packet[..layout.end].to_vec(), layout, gso: false })
    }

    /// Reads the packet with the changes made up to now. The checksums in it are not yet computed.
    pub fn view(&self) -> PacketView<'_> {
        PacketView::with_layout(&self.packet, self.layout)
    }

    /// Computes the checksums and returns the packet, for
    /// [`Verdict::payload`](crate::Verdict::payload).
    ///
    /// Computes the checksum of the IPv4 header, and the checksum of TCP, UDP, ICMP or ICMPv6 over
    /// header, payload and pseudo header. It does so even if the old checksum was wrong or
    /// incomplete, because the kernel does not complete the checksums of a replaced packet.
    /// [Super-packets](Self#super-packets) of UDP get the sum of the pseudo header instead.
    ///
    /// The pseudo header contains the final destination. While an IPv4 source route (RFC 791) is
    /// not completed, or an IPv6 routing header of type 0, 2 or 4 has segments left, the final
    /// destination is the last address of the route. Otherwise it is the destination in the IP
    /// header, also if the IPv4 options are malformed.
    ///
    /// A UDP datagram over IPv4 without a checksum (0) stays without one. The transport checksum
    /// stays unchanged in fragments, in other protocols, in malformed packets, and in packets with
    /// an authentication header.
    #[doc(alias = "nfq_ip_set_checksum")]
    #[doc(alias = "nfq_tcp_compute_checksum_ipv4")]
    #[doc(alias = "nfq_tcp_compute_checksum_ipv6")]
    #[doc(alias = "nfq_udp_compute_checksum_ipv4")]
    #[doc(alias = "nfq_udp_compute_checksum_ipv6")]
    #[must_use = "the packet stays unchanged unless the result is given to `Verdict::payload`"]
    pub fn finish(mut self) -> Vec<u8> {
        checksum::complete(&mut self.packet, &self.layout, self.gso);
        self.packet
    }

    /// `number` must be less than 2¹⁶. Lengths are, because the packet is at most [`MAX_PAYLOAD`]
    /// long.
    fn write_u16(&mut self, at: usize, number: usize) {
        self.packet[at..at + 2].copy_from_slice(&(number as u16).to_be_bytes());
    }
}

impl fmt::Debug for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Edit").field(&format_args!("{}", self.view())).finish()
    }
}

/// Computes the checksums of a packet in place: of the IPv4 header, and of TCP, UDP, ICMP or
/// ICMPv6.
///
/// `packet` must begin with its IP header. Use this if [`Packet::is_checksum_ready`] returns
/// `false` (checksum offload) and you need the bytes outside the verdict, for example for a capture
/// file.
///
/// A packet that is accepted unchanged does not need it. [`Edit::finish`] computes the checksums
/// itself. A UDP datagram over IPv4 without a checksum stays without one. For a packet with a
/// route, the checksum is the same as that of [`Edit::finish`].
///
/// # Errors
///
/// [`InvalidInput`](ErrorKind::InvalidInput) if the transport checksum cannot be computed, that is
/// for a fragment, a part of a packet, a jumbogram, another protocol or a malformed packet. The
/// bytes are then unchanged.
///
/// # Examples
///
/// ```
/// # use tokio_nfqueue::{Error, Packet, edit::complete_checksums};
/// fn for_capture(packet: &Packet) -> Result<Vec<u8>, Error> {
///     let mut bytes = packet.payload().to_vec();
///     if !packet.is_checksum_ready() {
///         complete_checksums(&mut bytes)?;
///     }
///     Ok(bytes)
/// }
/// ```
pub fn complete_checksums(packet: &mut [u8]) -> Result<(), Error> {
    const OPERATION: &str = "complete checksums";
    let layout = Layout::of(packet).map_err(|detail| invalid(OPERATION, detail))?;
    if !layout.is_whole() {
        return Err(invalid(OPERATION, "the packet is incomplete, or its IP header states no length"));
    }
    layout.editable().map_err(|obstacle| refused(OPERATION, obstacle))?;
    checksum::complete(packet, &layout, false);
    Ok(())
}

fn invalid(operation: &'static str, detail: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidInput, operation).with_detail(detail)
}

fn refused(operation: &'static str, obstacle: Obstacle) -> Error {
    invalid(operation, obstacle.to_string())
}

fn too_long(operation: &'static str, length: usize) -> Error {
    invalid(operation, format!("a packet of {length} bytes is too long; a verdict carries at most {MAX_PAYLOAD} bytes"))
}

const EDIT: &str = "edit a packet";

/// Whether the kernel segments a replaced UDP super-packet with correct checksums.
///
/// Before Linux 6.11 the kernel leaves the checksums to interfaces with checksum offload, but does
/// not mark the segments for it (measured on 6.1).
fn segments_replaced_udp() -> bool {
    static RELEASE: LazyLock<bool> = LazyLock::new(|| {
        let release = rustix::system::uname();
        let release = release.release().to_string_lossy();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 11)
    });
    *RELEASE
}
