//! A packet that waits for its verdict.

use std::{fmt, net::IpAddr, time::SystemTime};

use bytes::Bytes;

use crate::{
    io::{RawPacket, VerdictGuard},
    types::{Action, Error, Family, Hook, PacketId, Vlan, flow_codes::FlowCodes},
    verdict::Verdict,
    wire::{attribute, packet},
};

/// A packet in the queue: its payload and metadata, and the right to decide it.
///
/// Deciding consumes it: [`accept`](Self::accept), [`drop`](Self::drop()),
/// [`reject`](Self::reject), [`repeat`](Self::repeat), [`stop`](Self::stop) and
/// [`requeue`](Self::requeue) each turn it into a [`Verdict`], which takes effect when it is
/// [submitted](Verdict::submit). A packet that is
/// dropped without a verdict gets the default action:
/// [`QueueBuilder::on_unanswered`](crate::QueueBuilder::on_unanswered).
///
/// A packet owns its bytes. It may be held, sent to other tasks and threads, and decided in any
/// order. While it is held, the kernel holds the packet too, and it counts against the queue's
/// [`max_len`](crate::QueueBuilder::max_len).
pub struct Packet {
    guard: VerdictGuard,
    raw: RawPacket,
}

impl Packet {
    pub(crate) fn new(raw: RawPacket, guard: VerdictGuard) -> Self {
        Self { guard, raw }
    }

    /// The kernel's id of the packet.
    pub fn id(&self) -> PacketId {
        self.guard.id()
    }

    /// The number of the packet's queue.
    pub fn queue_number(&self) -> u16 {
        self.guard.queue_number()
    }

    /// Whether the packet has been decided by its [deadline](crate::QueueBuilder::deadline) or by a
    /// closing queue. If true, a verdict has no effect any more. If false, this may still happen
    /// before a verdict is submitted.
    pub fn is_expired(&self) -> bool {
        self.guard.is_expired()
    }

    /// The packet from its network header on, up to the
    /// [copy range](crate::QueueBuilder::copy_range). Empty in
    /// [metadata](crate::QueueBuilder::copy_metadata) mode.
    ///
    /// With [GSO](crate::QueueBuilder::gso) it may be a super-packet of up to 64 KiB, whose
    /// checksums may be unfinished ([`is_checksum_ready`](Self::is_checksum_ready)).
    pub fn payload(&self) -> &[u8] {
        self.raw.payload()
    }

    /// The payload as [`Bytes`], without a copy. It stays valid after the packet has been decided.
    ///
    /// Packets of up to 2 KiB share buffers of 8 KiB, packets of up to 16 KiB share buffers of 32
    /// KiB, and a longer packet has a buffer of its own. These bytes keep the whole buffer alive.
    /// To keep a few bytes for a long time, copy them.
    pub fn payload_bytes(&self) -> Bytes {
        self.raw.payload_bytes()
    }

    /// The length of the packet in bytes, even if fewer were copied. `None` in
    /// [metadata](crate::QueueBuilder::copy_metadata) mode, in which the kernel does not send it.
    #[doc(alias = "NFQA_CAP_LEN")]
    pub fn original_len(&self) -> Option<usize> {
        let copied = self.payload().len();
        self.raw.be32(attribute::CAPTURED_LENGTH).map(|length| length as usize).or((copied > 0).then_some(copied))
    }

    /// Whether [`payload`](Self::payload) is shorter than the packet.
    pub fn is_truncated(&self) -> bool {
        self.original_len().is_none_or(|length| length > self.payload().len())
    }

    /// The family of the hook that queued the packet.
    pub fn family(&self) -> Family {
        self.raw.family.into()
    }

    /// The hook that queued the packet.
    pub fn hook(&self) -> Hook {
        Hook::new(self.family(), self.raw.hook)
    }

    /// The EtherType: 0x0800 for IPv4, 0x86dd for IPv6. In the bridge family any EtherType, such as
    /// 0x0806 for ARP, or 0x8100 if the payload begins with an inner VLAN tag.
    pub fn hw_protocol(&self) -> u16 {
        self.raw.hw_protocol
    }

    /// The packet's mark. It is 0 if none is set.
    #[doc(alias = "NFQA_MARK")]
    pub fn mark(&self) -> u32 {
        self.raw.be32(attribute::MARK).unwrap_or(0)
    }

    /// The packet's priority (`skb->priority`, a traffic control class). It is 0 if none is set.
    ///
    /// Linux 5.18 and later; always 0 before. In a queue with
    /// [`flow_marks`](crate::QueueBuilder::flow_marks), the code that the rules have put in the
    /// highest byte is removed.
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(&self) -> u32 {
        let priority = self.raw.be32(attribute::PRIORITY).unwrap_or(0);
        self.guard.flow_marks().map_or(priority, |(marks, _)| FlowCodes::of(marks).original(priority))
    }

    /// When the packet was received. `None` for packets from this host, and if the network stack
    /// took no timestamp.
    #[doc(alias = "NFQA_TIMESTAMP")]
    pub fn timestamp(&self) -> Option<SystemTime> {
        SystemTime::UNIX_EPOCH.checked_add(packet::timestamp(self.attribute(attribute::TIMESTAMP)?)?)
    }

    /// Index of the interface on which the packet arrived.
    #[doc(alias = "NFQA_IFINDEX_INDEV")]
    pub fn interface_in(&self) -> Option<u32> {
        self.raw.be32(attribute::INTERFACE_IN)
    }

    /// Index of the interface on which the packet leaves.
    #[doc(alias = "NFQA_IFINDEX_OUTDEV")]
    pub fn interface_out(&self) -> Option<u32> {
        self.raw.be32(attribute::INTERFACE_OUT)
    }

    /// Index of the bridge port on which the packet arrived, if
    /// [`interface_in`](Self::interface_in) is a bridge: at the prerouting, input and forward
    /// hooks, of the bridge family and (with br_netfilter) of other families.
    #[doc(alias = "NFQA_IFINDEX_PHYSINDEV")]
    pub fn physical_in(&self) -> Option<u32> {
        self.raw.be32(attribute::PHYSICAL_IN)
    }

    /// Index of the bridge port on which the packet leaves, if
    /// [`interface_out`](Self::interface_out) is a bridge: at the forward, output and postrouting
    /// hooks.
    #[doc(alias = "NFQA_IFINDEX_PHYSOUTDEV")]
    pub fn physical_out(&self) -> Option<u32> {
        self.raw.be32(attribute::PHYSICAL_OUT)
    }

    /// The sender's link-layer address: 6 bytes for Ethernet, at most 8. `None` if the packet did
    /// not arrive on an interface with such addresses.
    #[doc(alias = "NFQA_HWADDR")]
    pub fn hardware_address(&self) -> Option<&[u8]> {
        packet::hardware_address(self.attribute(attribute::HARDWARE_ADDRESS)?)
    }

    /// User id of the packet's local socket. It needs
    /// [`uid_gid`](crate::QueueBuilder::uid_gid). `None` if there is no such socket.
    ///
    /// At [`Output`](Hook::Output) and [`Postrouting`](Hook::Postrouting) this is the socket that
    /// sent the packet. At [`Input`](Hook::Input) it is the socket that will *receive* it, if the
    /// kernel knows it already: an established connection or a connected UDP socket has one, an
    /// unconnected UDP socket or a listening one has none. A policy that judges senders by their
    /// user must look at the [`hook`](Self::hook) first. The kernel's own packets, such as resets
    /// and ICMP errors, have none.
    #[doc(alias = "NFQA_UID")]
    pub fn uid(&self) -> Option<u32> {
        self.raw.be32(attribute::UID)
    }

    /// Group id of the packet's local socket. It needs
    /// [`uid_gid`](crate::QueueBuilder::uid_gid). `None` if there is no such socket. At
    /// [`Input`](Hook::Input) it is that of the receiver: see [`uid`](Self::uid).
    #[doc(alias = "NFQA_GID")]
    pub fn gid(&self) -> Option<u32> {
        self.raw.be32(attribute::GID)
    }

    /// The security context of the packet's sender. It needs
    /// [`security_context`](crate::QueueBuilder::security_context).
    #[doc(alias = "NFQA_SECCTX")]
    pub fn security_context(&self) -> Option<&[u8]> {
        self.attribute(attribute::SECURITY_CONTEXT)
    }

    /// The packet's outermost VLAN tag, which the kernel keeps outside the payload. The payload
    /// begins with the inner tag, if there is one. Bridge family only.
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(&self) -> Option<Vlan> {
        packet::vlan(self.attribute(attribute::VLAN)?)
    }

    /// The link-layer header: 14 bytes for Ethernet, without the tag that [`vlan`](Self::vlan)
    /// returns. Bridge family only.
    #[doc(alias = "NFQA_L2HDR")]
    pub fn layer2_header(&self) -> Option<&[u8]> {
        self.attribute(attribute::LAYER2_HEADER)
    }

    /// The class id of the sender's control group (`net_cls`). `None` if no local socket sent the
    /// packet.
    ///
    /// Linux 6.12 and later.
    #[doc(alias = "NFQA_CGROUP_CLASSID")]
    pub fn cgroup_class_id(&self) -> Option<u32> {
        self.raw.be32(attribute::CGROUP_CLASS_ID)
    }

    /// The packet's connection tracking entry, decoded at each call. It needs
    /// [`conntrack`](crate::QueueBuilder::conntrack). `None` if the packet has no entry.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT")]
    pub fn conntrack(&self) -> Option<crate::conntrack::Conntrack> {
        self.attribute(attribute::CONNTRACK).map(crate::conntrack::Conntrack::decode)
    }

    /// The state of the packet's connection. It needs
    /// [`conntrack`](crate::QueueBuilder::conntrack). `None` if the packet has no entry: it is
    /// invalid or untracked, or nothing tracks connections.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT_INFO")]
    pub fn connection_state(&self) -> Option<crate::conntrack::ConnectionState> {
        self.connection_info().map(|(state, _)| state)
    }

    /// The packet's direction in its connection. It needs
    /// [`conntrack`](crate::QueueBuilder::conntrack). `None` as for
    /// [`connection_state`](Self::connection_state), and if that is
    /// [`Other`](crate::conntrack::ConnectionState::Other).
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT_INFO")]
    pub fn direction(&self) -> Option<crate::conntrack::Direction> {
        self.connection_info()?.1
    }

    #[cfg(feature = "conntrack")]
    fn connection_info(&self) -> Option<(crate::conntrack::ConnectionState, Option<crate::conntrack::Direction>)> {
        self.raw.be32(attribute::CONNTRACK_INFO).map(crate::wire::conntrack::decode_info)
    }

    /// The name of an interface in the queue's network namespace, by an index from this packet. It
    /// makes a system call.
    ///
    /// # Errors
    /// There is no interface with this index (any more).
    pub fn interface_name(&self, index: u32) -> Result<String, Error> {
        self.guard.interface_name(index)
    }

    /// Whether the packet's mark equals `value` in the bits of `mask`.
    pub fn has_mark(&self, value: u32, mask: u32) -> bool {
        self.mark() & mask == value & mask
    }

    /// The packet's mark with the bits of `mask` replaced by those of `value`, for
    /// [`Verdict::mark`].
    pub fn mark_with(&self, value: u32, mask: u32) -> u32 {
        self.mark() & !mask | value & mask
    }

    /// Whether the transport checksum in the payload is finished. If not, the network card would
    /// have finished it (on loopback, nothing does).
    ///
    /// The packet can be accepted in either case, but a replaced payload needs finished checksums.
    /// A UDP super-packet may count as ready although its checksum is unfinished.
    #[doc(alias = "NFQA_SKB_CSUMNOTREADY")]
    pub fn is_checksum_ready(&self) -> bool {
        self.offload() & 1 == 0
    }

    /// Whether this is a super-packet, which is segmented later.
    #[doc(alias = "NFQA_SKB_GSO")]
    pub fn is_gso(&self) -> bool {
        self.offload() & 2 != 0
    }

    /// Whether the kernel has not verified the checksum of a received packet.
    #[doc(alias = "NFQA_SKB_CSUM_NOTVERIFIED")]
    pub fn is_checksum_unverified(&self) -> bool {
        self.offload() & 4 != 0
    }

    fn offload(&self) -> u32 {
        self.raw.be32(attribute::OFFLOAD).unwrap_or(0)
    }

    /// Source and destination address, if the payload begins with a whole IPv4 or IPv6 header.
    pub fn addresses(&self) -> Option<(IpAddr, IpAddr)> {
        fn pair<const N: usize>(payload: &[u8], at: usize) -> Option<(IpAddr, IpAddr)>
        where
            IpAddr: From<[u8; N]>,
        {
            let bytes = payload.get(at..at + 2 * N)?;
            let source: [u8; N] = bytes[..N].try_into().ok()?;
            let destination: [u8; N] = bytes[N..].try_into().ok()?;
            Some((source.into(), destination.into()))
        }
        let payload = self.payload();
        match payload.first()? >> 4 {
            4 => pair::<4>(payload, 12),
            6 => pair::<16>(payload, 8),
            _ => None,
        }
    }

    /// An attribute of the kernel's message by its number (`NFQA_*`), unchanged: numbers are in
    /// network byte order.
    pub fn attribute(&self, number: u16) -> Option<&[u8]> {
        self.raw.attribute(number)
    }

    /// All attributes of the kernel's message, with their numbers.
    pub fn attributes(&self) -> impl Iterator<Item = (u16, &[u8])> {
        self.raw.attributes().map_while(|attribute| attribute)
    }

    /// Frees the memory of payload and metadata, and keeps the right to decide the packet.
    pub fn detach(self) -> DetachedPacket {
        self.guard.detach();
        DetachedPacket { guard: self.guard }
    }

    /// Accepts the packet.
    #[doc(alias = "NF_ACCEPT")]
    pub fn accept(self) -> Verdict {
        self.decide(Action::Accept)
    }

    /// Drops the packet.
    #[doc(alias = "NF_DROP")]
    pub fn drop(self) -> Verdict {
        self.decide(Action::Drop)
    }

    /// Rejects the packet: the kernel drops it and replies, to TCP with a reset, to other protocols
    /// with the error "port unreachable" of ICMP or ICMPv6.
    ///
    /// It needs flow marks: see [`QueueBuilder::flow_marks`](crate::QueueBuilder::flow_marks). The
    /// kernel sends the reply as for [`Rule::reject`](crate::Rule::reject). The verdict's
    /// [`action`](Verdict::action) is [`Action::Drop`]. The reply is not queued, whatever the rules
    /// of the table are. (It can be if, within two seconds, packets behind the first of more than
    /// 1000 connections are rejected and get no reply, because the kernel limits ICMP errors. A
    /// reply to a first packet never is.)
    ///
    /// Where the kernel cannot reject (at `Postrouting`, and packets that another rule has queued),
    /// the packet is dropped, and [`refusals`](crate::VerdictSink::refusals) reports it. Without a
    /// route to the sender, which a host that bridges may lack, the packet is dropped without a
    /// reply and without a report.
    ///
    /// [`Edit::tcp_reset`](crate::edit::Edit::tcp_reset) and
    /// [`Edit::icmp_unreachable`](crate::edit::Edit::icmp_unreachable) make replies without flow
    /// marks.
    #[doc(alias = "REJECT")]
    pub fn reject(self) -> Verdict {
        self.decide(Action::Drop).rejecting()
    }

    /// Sends the packet through the hook again, from its first rule on. If a rule queues it again,
    /// it gets a new id.
    ///
    /// Set a [mark](Verdict::mark) that the rule excludes; otherwise the packet is queued
    /// indefinitely.
    #[doc(alias = "NF_REPEAT")]
    pub fn repeat(self) -> Verdict {
        self.decide(Action::Repeat)
    }

    /// Marks the packet and sends it through the hook again, so that the rules before the queue's
    /// rule see the mark. A packet that already has the mark is accepted, so that it is not queued
    /// indefinitely, whatever the rules are.
    ///
    /// A rule that does not queue marked packets (`meta mark & MASK != VALUE queue`) saves the
    /// second verdict.
    pub fn repeat_marked(self, value: u32, mask: u32) -> Verdict {
        if self.has_mark(value, mask) {
            return self.accept();
        }
        let mark = self.mark_with(value, mask);
        self.repeat().mark(mark)
    }

    /// Accepts the packet and skips the remaining chains of the hook. With flow marks, the chain
    /// behind the queue is one of them: [`guide::flows`](crate::guide::flows).
    #[doc(alias = "NF_STOP")]
    pub fn stop(self) -> Verdict {
        self.decide(Action::Stop)
    }

    /// Sends the packet to another queue. If that queue is not bound, the packet is dropped.
    #[doc(alias = "NF_QUEUE")]
    pub fn requeue(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: false })
    }

    /// Sends the packet to another queue. If that queue is not bound, the packet is accepted.
    #[doc(alias = "NF_VERDICT_FLAG_QUEUE_BYPASS")]
    pub fn requeue_bypass(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: true })
    }

    /// Decides with an action that was computed elsewhere.
    pub fn decide(self, action: Action) -> Verdict {
        Verdict::new(self.guard, action)
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("id", &self.guard.id())
            .field("hook", &self.hook())
            .field("hw_protocol", &format_args!("{:#06x}", self.hw_protocol()))
            .field("len", &self.original_len())
            .finish_non_exhaustive()
    }
}

/// The right to decide a packet whose memory has been freed: see [`Packet::detach`].
///
/// Like the packet itself, it gets the default action if it is dropped without a verdict.
pub struct DetachedPacket {
    guard: VerdictGuard,
}

impl DetachedPacket {
    /// The kernel's id of the packet.
    pub fn id(&self) -> PacketId {
        self.guard.id()
    }

    /// The number of the packet's queue.
    pub fn queue_number(&self) -> u16 {
        self.guard.queue_number()
    }

    /// Whether the packet has been decided already: see [`Packet::is_expired`].
    pub fn is_expired(&self) -> bool {
        self.guard.is_expired()
    }

    /// Accepts the packet.
    pub fn accept(self) -> Verdict {
        self.decide(Action::Accept)
    }

    /// Drops the packet.
    pub fn drop(self) -> Verdict {
        self.decide(Action::Drop)
    }

    /// Rejects the packet: see [`Packet::reject`].
    pub fn reject(self) -> Verdict {
        self.decide(Action::Drop).rejecting()
    }

    /// Sends the packet through the hook again: see [`Packet::repeat`].
    pub fn repeat(self) -> Verdict {
        self.decide(Action::Repeat)
    }

    /// Accepts the packet and skips the remaining chains of the hook.
    pub fn stop(self) -> Verdict {
        self.decide(Action::Stop)
    }

    /// Sends the packet to another queue: see [`Packet::requeue`].
    pub fn requeue(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: false })
    }

    /// Sends the packet to another queue: see [`Packet::requeue_bypass`].
    pub fn requeue_bypass(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: true })
    }

    /// Decides with an action that was computed elsewhere.
    pub fn decide(self, action: Action) -> Verdict {
        Verdict::new(self.guard, action)
    }
}

impl fmt::Debug for DetachedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DetachedPacket").field(&self.guard.id()).finish()
    }
}
