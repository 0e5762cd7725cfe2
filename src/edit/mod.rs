//! Rewriting packets: bytes in, bytes out, lengths and checksums kept right.

mod checksum;
mod fields;
mod layout;
mod route;
mod splice;
#[cfg(test)]
mod tests;
mod view;

use std::{borrow::Cow, fmt, sync::LazyLock};

use self::layout::{Layout, Obstacle, Transport};
use crate::{Error, ErrorKind, Hook, Packet, wire::MAX_PAYLOAD};

pub use self::view::PacketView;

/// A packet being rewritten: a copy, of which addresses, ports, TTL, TOS and the transport payload can be set. Lengths
/// follow at once, and [`finish`](Self::finish) computes the checksums. No sockets: bytes in, bytes out.
///
/// For IPv4 and IPv6, and TCP, UDP, ICMP and ICMPv6 in them. IPv4 options, IPv6 extension headers and all fields that are
/// not set stay as they are. Made by [`Packet::edit`]; by [`Edit::new`] of bytes from elsewhere.
///
/// ```
/// use std::net::Ipv4Addr;
///
/// use tokio_nfqueue::{Error, Packet, Verdict};
///
/// /// Sends DNS queries elsewhere.
/// fn redirect(packet: Packet) -> Result<Verdict, Error> {
///     let mut edit = packet.edit()?;
///     edit.set_destination_address(Ipv4Addr::new(192, 0, 2, 53))?;
///     edit.set_destination_port(5353)?;
///     Ok(packet.accept().payload(edit.finish()))
/// }
///
/// /// Says something else. Not of the same length, which is fine for UDP.
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
/// * It keeps no account of TCP's sequence numbers. A TCP payload of another length breaks the connection: the
///   receiver acknowledges what the sender has not sent. Replace as many bytes as there were, or be a proxy.
/// * It knows no connections. After a change of addresses or ports the answers want the reverse change. With connection
///   tracking, do it before the kernel first sees the connection (prerouting and output, priority below −200), or
///   the tracked connection is another than the real one.
/// * It does not sign. TCP's MD5 and AO options, and whatever the payload protects itself with, no longer fit.
/// * It does not look into ICMP errors, which quote a packet with addresses and checksums of its own, nor into tunnels.
///
/// What makes a packet longer than the way's MTU has it fragmented, or lost: see
/// [`Verdict::payload`](crate::Verdict::payload), also for what Linux 7.2 and later refuse. None of the setters touches
/// what these compare, the IP header's length, options, fragment bits and extension headers.
///
/// # Super-packets
///
/// With [`gso(true)`](crate::QueueBuilder::gso) a packet may be one of up to 64 KiB that is cut
/// into segments later. It can be edited as a whole, but must keep its length: where it is cut
/// stays as it was, so that datagrams would begin elsewhere, and what fits in one segment is lost
/// (measured on Linux 6.18). Of UDP, the checksum becomes that of the pseudo header only, for that
/// is what the kernel makes the segments' checksums from; and before local delivery, at the
/// prerouting and input hooks, UDP super-packets are refused, as they are everywhere before Linux
/// 6.11, which sends the segments with wrong checksums. TCP super-packets with an IPv4 source route
/// or an IPv6 routing header that is not used up are refused: the kernel would give the segments
/// wrong checksums. To edit without these limits, use `gso(false)`.
///
#[doc = include_str!("pktbuff.md")]
pub struct Edit {
    packet: Vec<u8>,
    layout: Layout,
    /// It is a super-packet.
    gso: bool,
}

impl Packet {
    /// Starts to rewrite the packet: copies its payload. The preferred way to an [`Edit`], which so knows of
    /// [super-packets](Edit#super-packets).
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) as [`Edit::new`]; and where a replacement would be
    /// lost, which [`gso(false)`](crate::QueueBuilder::gso) prevents: of UDP super-packets at the
    /// prerouting and input hooks, and before Linux 6.11 at all; of TCP super-packets with an IPv4
    /// source route or an IPv6 routing header that is not used up; and of a packet whose checksum
    /// [is not ready](Self::is_checksum_ready) and not known here, because it is SCTP or that of a
    /// packet inside a tunnel's.
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
                "its unfinished checksum is an unknown or an inner one; bind the queue with gso(false)",
            ));
        }
        // `tcp4_gso_segment` and `tcp6_gso_segment` cover the destination in the IP header when
        // they make the segments' checksums of a replaced packet.
        if edit.gso && edit.layout.transport == Some(Transport::Tcp) && edit.layout.is_routed() {
            return Err(invalid(EDIT, "it is a TCP super-packet with a route to go; bind the queue with gso(false)"));
        }
        // Measured on Linux 6.18: delivered locally, such a replacement is lost whatever its checksum, except to sockets
        // with UDP_GRO.
        let is_sent = matches!(self.hook(), Hook::Forward | Hook::Output | Hook::Postrouting);
        if edit.gso && edit.layout.transport == Some(Transport::Udp) && !(is_sent && cuts_replaced_udp()) {
            return Err(invalid(
                EDIT,
                "it is a UDP super-packet, before local delivery or on Linux before 6.11; bind the queue with gso(false)",
            ));
        }
        Ok(edit)
    }
}

/// Whether the kernel gives right checksums to what it cuts replaced UDP super-packets into. Before Linux 6.11 it leaves them to
/// interfaces that can make them, and does not tell these so (measured on 6.1).
fn cuts_replaced_udp() -> bool {
    static RELEASE: LazyLock<bool> = LazyLock::new(|| {
        let release = rustix::system::uname();
        let release = release.release().to_string_lossy();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 11)
    });
    *RELEASE
}

const EDIT: &str = "edit a packet";

impl Edit {
    /// Starts with a copy of `packet`, given from its IP header on. Bytes that follow the packet (padding of short frames) are
    /// left out.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it does not begin with a whole IPv4 or IPv6 header; if it is less than
    /// the packet, as with a short [`copy_range`](crate::QueueBuilder::copy_range); if it is longer than 65 531 bytes or an
    /// IPv6 jumbogram. Anything else that is wrong or unknown behind the IP header concerns only changes to what is
    /// there.
    pub fn new(packet: &[u8]) -> Result<Self, Error> {
        let layout = Layout::of(packet).map_err(|detail| invalid(EDIT, detail))?;
        match layout.stated_len {
            None => return Err(invalid(EDIT, "the IP header states no length, as in a jumbogram")),
            Some(length) if length > layout.end => {
                return Err(invalid(EDIT, format!("only {} of its {length} bytes are there", layout.end)));
            }
            Some(length) if length > MAX_PAYLOAD => return Err(too_long(EDIT, length)),
            Some(_) => {}
        }
        Ok(Self { packet: packet[..layout.end].to_vec(), layout, gso: false })
    }

    /// Looks at the packet as it is by now, its checksums not yet finished.
    pub fn view(&self) -> PacketView<'_> {
        PacketView::with_layout(&self.packet, self.layout)
    }

    /// Ends the edit, and gives the packet for [`Verdict::payload`](crate::Verdict::payload).
    ///
    /// Computes the checksum of the IPv4 header, and that of TCP, UDP, ICMP or ICMPv6 over header, payload and pseudo
    /// header, whether or not it was right or finished before: the kernel finishes no checksum of a replaced packet.
    ///
    /// The pseudo header contains the final destination. While an IPv4 source route (RFC 791) or an
    /// IPv6 routing header of type 0, 2 or 4 is not used up, that is the last address of the route.
    /// Otherwise, and if the IPv4 options are malformed, it is the destination in the IP header.
    ///
    /// A UDP datagram over IPv4 without a checksum (0) stays without. Transport checksums of fragments, of other protocols,
    /// and of what is damaged or authenticated are left as they are.
    #[doc(alias = "nfq_ip_set_checksum")]
    #[doc(alias = "nfq_tcp_compute_checksum_ipv4")]
    #[doc(alias = "nfq_tcp_compute_checksum_ipv6")]
    #[doc(alias = "nfq_udp_compute_checksum_ipv4")]
    #[doc(alias = "nfq_udp_compute_checksum_ipv6")]
    #[must_use = "the packet goes its way unchanged unless the result is given to `Verdict::payload`"]
    pub fn finish(mut self) -> Vec<u8> {
        checksum::complete(&mut self.packet, &self.layout, self.gso);
        self.packet
    }

    /// `number` is a length and less than 2¹⁶, for the packet is no longer than [`MAX_PAYLOAD`].
    fn write_u16(&mut self, at: usize, number: usize) {
        self.packet[at..at + 2].copy_from_slice(&(number as u16).to_be_bytes());
    }
}

impl fmt::Debug for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Edit").field(&format_args!("{}", self.view())).finish()
    }
}

/// Finishes in place what offload left undone: computes the checksum of the IPv4 header and that of TCP, UDP, ICMP or
/// ICMPv6, over a packet given from its IP header on.
///
/// For bytes that are used elsewhere, in a capture say, where [`Packet::is_checksum_ready`] says no. A packet that is
/// accepted as it is needs none of this, and [`Edit::finish`] does it by itself. A UDP datagram over IPv4 without a checksum
/// stays without. Of a packet that carries a route, the checksum is that of [`Edit::finish`].
///
/// # Errors
///
/// [`InvalidInput`](ErrorKind::InvalidInput) for whatever has a transport checksum that cannot be computed: a fragment, part of a
/// packet, a jumbogram, another protocol. The bytes are then as they were.
///
/// # Examples
///
/// ```
/// # use tokio_nfqueue::{Error, Packet, complete_checksums};
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
        return Err(invalid(OPERATION, "the packet is longer than these bytes"));
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
    invalid(operation, format!("a packet of {length} bytes; {MAX_PAYLOAD} at most fit in a verdict"))
}
