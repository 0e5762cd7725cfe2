//! A packet that waits for its verdict, and the right to decide it.

use std::{
    fmt,
    net::IpAddr,
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use crate::{
    Action, Error, ErrorKind, Hook, PacketId, Verdict,
    queue::Shared,
    state::Place,
    wire::{
        NETFILTER_HEADER, PacketMessage, attribute,
        packet::{attributes_of, find, find_be32},
    },
};

/// The protocol family of the hook that queued a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// IPv4, from a rule of family `ip` or `inet`.
    #[doc(alias = "NFPROTO_IPV4")]
    Ipv4,
    /// IPv6, from a rule of family `ip6` or `inet`.
    #[doc(alias = "NFPROTO_IPV6")]
    Ipv6,
    /// ARP.
    #[doc(alias = "NFPROTO_ARP")]
    Arp,
    /// A bridge; the payload begins with the network header, and [`Packet::hw_protocol`] says which.
    #[doc(alias = "NFPROTO_BRIDGE")]
    Bridge,
    /// A device's ingress or egress.
    #[doc(alias = "NFPROTO_NETDEV")]
    Netdev,
    /// Any other number.
    Other(u8),
}

impl From<u8> for Family {
    fn from(number: u8) -> Self {
        match number {
            2 => Self::Ipv4,
            3 => Self::Arp,
            5 => Self::Netdev,
            7 => Self::Bridge,
            10 => Self::Ipv6,
            other => Self::Other(other),
        }
    }
}

/// A VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vlan {
    /// The tag protocol identifier, an EtherType: 0x8100, or 0x88a8 for a service tag.
    pub protocol: u16,
    /// The tag control information: priority (3 bits), drop eligible (1 bit), VLAN identifier (12 bits).
    pub control: u16,
}

impl Vlan {
    /// The VLAN identifier, 12 bits.
    pub fn id(self) -> u16 {
        self.control & 0x0fff
    }
}

/// A packet as it was received, before anyone owns its decision.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) bytes: Bytes,
    pub(crate) id: u32,
    family: u8,
    hook: u8,
    hw_protocol: u16,
    // 32 bits are enough for a datagram and keep a packet small.
    attributes: Range<u32>,
    payload: Range<u32>,
    pub(crate) place: Place,
}

impl Arrived {
    /// `body` is where in `bytes` the message's body lies, from which its ranges count.
    pub(crate) fn new(bytes: Bytes, body: Range<usize>, message: &PacketMessage, place: Place) -> Self {
        let shift = |offset: usize| (body.start + offset) as u32;
        Self {
            id: message.id,
            family: message.family,
            hook: message.hook,
            hw_protocol: message.hw_protocol,
            attributes: shift(NETFILTER_HEADER)..body.end as u32,
            payload: shift(message.payload.start)..shift(message.payload.end),
            place,
            bytes,
        }
    }

    pub(crate) fn claimed(self, queue: Arc<Shared>) -> Packet {
        let bridged = (Family::from(self.family) == Family::Bridge)
            .then(|| find(self.attributes(), attribute::LAYER2_HEADER).map_or(0, <[u8]>::len) as u32);
        Packet { claim: Claim { queue: Some(queue), id: self.id, bridged }, arrived: self }
    }

    /// The attributes behind the `struct nfgenmsg`.
    fn attributes(&self) -> &[u8] {
        self.get(&self.attributes)
    }

    fn get(&self, range: &Range<u32>) -> &[u8] {
        self.bytes.get(range.start as usize..range.end as usize).unwrap_or(&[])
    }
}

/// The right, and the duty, to decide one packet. Dropped, it gives the queue's answer for the unanswered.
pub(crate) struct Claim {
    queue: Option<Arc<Shared>>,
    id: u32,
    /// In the bridge family: the length of the packet's link-layer header.
    bridged: Option<u32>,
}

impl Claim {
    /// In the bridge family: the length of the packet's link-layer header.
    pub(crate) fn bridged(&self) -> Option<usize> {
        self.bridged.map(|length| length as usize)
    }

    pub(crate) fn queue(&self) -> u16 {
        self.queue.as_ref().map_or(0, |queue| queue.number())
    }

    /// Why a replaced payload is not taken in the queue's network namespace, where it is not.
    pub(crate) fn no_payload(&self) -> Option<&'static str> {
        self.queue.as_ref().and_then(|queue| queue.no_payload())
    }

    fn is_expired(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| !queue.is_undecided(self.id))
    }

    pub(crate) fn id(&self) -> PacketId {
        PacketId(self.id)
    }

    #[cfg(feature = "conntrack")]
    pub(crate) fn has_conntrack(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.has_conntrack())
    }

    /// Gives the right up to somebody who makes use of it.
    pub(crate) fn redeem(mut self) -> Option<(Arc<Shared>, u32)> {
        self.queue.take().map(|queue| (queue, self.id))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.abandoned(self.id);
        }
    }
}

/// A packet in the queue: its payload and metadata, and the right to decide it.
///
/// Deciding consumes it: [`accept`](Self::accept), [`drop`](Self::drop()), [`repeat`](Self::repeat),
/// [`stop`](Self::stop) and [`requeue`](Self::requeue) each turn it into a [`Verdict`], which takes effect once it is
/// given to a [`VerdictSink`](crate::VerdictSink). A packet that is dropped unanswered gets what
/// [`QueueBuilder::on_unanswered`](crate::QueueBuilder::on_unanswered) says.
///
/// It owns its bytes and may be held, sent to other tasks and threads, and decided in any order. While it is held, the
/// kernel holds the packet too, and it counts against the queue's [`max_len`](crate::QueueBuilder::max_len).
pub struct Packet {
    claim: Claim,
    arrived: Arrived,
}

impl Packet {
    /// The kernel's id of the packet.
    pub fn id(&self) -> PacketId {
        self.claim.id()
    }

    /// The number of the queue the packet waits in.
    pub fn queue(&self) -> u16 {
        self.claim.queue()
    }

    /// Whether the packet has been answered for: by its [deadline](crate::QueueBuilder::deadline), or by a closing queue. A
    /// verdict for it has no effect any more. False says no more than that this had not happened when it was asked.
    pub fn is_expired(&self) -> bool {
        self.claim.is_expired()
    }

    /// The packet from its network header on, as much of it as was copied: see
    /// [`QueueBuilder::copy_range`](crate::QueueBuilder::copy_range). Empty in
    /// [metadata](crate::QueueBuilder::copy_metadata) mode.
    ///
    /// With [GSO](crate::QueueBuilder::gso) it may be a super-packet of up to 64 KiB; then its checksums may be unfinished
    /// ([`is_checksum_ready`](Self::is_checksum_ready)).
    pub fn payload(&self) -> &[u8] {
        self.arrived.get(&self.arrived.payload)
    }

    /// The payload as [`Bytes`], without a copy. It stays valid after the packet has been decided.
    ///
    /// Packets of up to 2 KiB share buffers of 8 KiB, packets of up to 16 KiB buffers of 32 KiB, and a longer one has a
    /// buffer of its own. As long as these bytes are kept, the whole buffer is. To keep a few bytes for long, copy them.
    pub fn payload_bytes(&self) -> Bytes {
        let Range { start, end } = self.arrived.payload;
        self.arrived.bytes.slice(start as usize..end as usize)
    }

    /// The packet's own length in bytes, also where less was copied. `None` in
    /// [metadata](crate::QueueBuilder::copy_metadata) mode, where the kernel does not tell.
    #[doc(alias = "NFQA_CAP_LEN")]
    pub fn original_len(&self) -> Option<usize> {
        let copied = self.payload().len();
        self.be32(attribute::CAPTURED_LENGTH).map(|length| length as usize).or((copied > 0).then_some(copied))
    }

    /// Whether [`payload`](Self::payload) is less than the packet.
    pub fn is_truncated(&self) -> bool {
        self.original_len().is_none_or(|length| length > self.payload().len())
    }

    /// The family of the hook that queued the packet.
    pub fn family(&self) -> Family {
        self.arrived.family.into()
    }

    /// The hook that queued the packet.
    pub fn hook(&self) -> Hook {
        Hook::new(self.family(), self.arrived.hook)
    }

    /// The EtherType: 0x0800 for IPv4, 0x86dd for IPv6. On a bridge also 0x0806 for ARP, 0x8100 where the payload begins with an
    /// inner VLAN tag, and any other.
    pub fn hw_protocol(&self) -> u16 {
        self.arrived.hw_protocol
    }

    /// The packet's mark; 0 where it has none, as the kernel sees it.
    #[doc(alias = "NFQA_MARK")]
    pub fn mark(&self) -> u32 {
        self.be32(attribute::MARK).unwrap_or(0)
    }

    /// The packet's priority (`skb->priority`, a traffic control class); 0 where it has none. Linux 5.18 and later.
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(&self) -> u32 {
        self.be32(attribute::PRIORITY).unwrap_or(0)
    }

    /// When the packet was received. None for packets this host made, and where the stack took no time stamp.
    #[doc(alias = "NFQA_TIMESTAMP")]
    pub fn timestamp(&self) -> Option<SystemTime> {
        // struct nfqnl_msg_packet_timestamp: seconds, microseconds, big-endian.
        let (seconds, rest) = self.attribute(attribute::TIMESTAMP)?.split_first_chunk()?;
        let micros = u64::from_be_bytes(*rest.first_chunk()?);
        let since = Duration::from_secs(u64::from_be_bytes(*seconds)).checked_add(Duration::from_micros(micros))?;
        SystemTime::UNIX_EPOCH.checked_add(since)
    }

    /// Index of the interface the packet came in by.
    #[doc(alias = "NFQA_IFINDEX_INDEV")]
    pub fn interface_in(&self) -> Option<u32> {
        self.be32(attribute::INTERFACE_IN)
    }

    /// Index of the interface the packet goes out by.
    #[doc(alias = "NFQA_IFINDEX_OUTDEV")]
    pub fn interface_out(&self) -> Option<u32> {
        self.be32(attribute::INTERFACE_OUT)
    }

    /// Index of the bridge port the packet came in by, where [`interface_in`](Self::interface_in) is a bridge: at the prerouting,
    /// input and forward hooks, of the bridge family and (with br_netfilter) of others.
    #[doc(alias = "NFQA_IFINDEX_PHYSINDEV")]
    pub fn physical_in(&self) -> Option<u32> {
        self.be32(attribute::PHYSICAL_IN)
    }

    /// Index of the bridge port the packet goes out by, where [`interface_out`](Self::interface_out) is a bridge: at the forward,
    /// output and postrouting hooks.
    #[doc(alias = "NFQA_IFINDEX_PHYSOUTDEV")]
    pub fn physical_out(&self) -> Option<u32> {
        self.be32(attribute::PHYSICAL_OUT)
    }

    /// The sender's link-layer address, where the packet came in by an interface that has one: 6 bytes for Ethernet, 8
    /// at most.
    #[doc(alias = "NFQA_HWADDR")]
    pub fn hardware_address(&self) -> Option<&[u8]> {
        // struct nfqnl_msg_packet_hw: length, padding, address.
        let (length, rest) = self.attribute(attribute::HARDWARE_ADDRESS)?.split_first_chunk()?;
        rest.get(2..)?.get(..u16::from_be_bytes(*length).into())
    }

    /// User id of the local socket that sent the packet. Only where there is one, and with
    /// [`uid_gid`](crate::QueueBuilder::uid_gid).
    #[doc(alias = "NFQA_UID")]
    pub fn uid(&self) -> Option<u32> {
        self.be32(attribute::UID)
    }

    /// Group id of the local socket that sent the packet; as [`uid`](Self::uid).
    #[doc(alias = "NFQA_GID")]
    pub fn gid(&self) -> Option<u32> {
        self.be32(attribute::GID)
    }

    /// The security context of the packet's sender, with
    /// [`security_context`](crate::QueueBuilder::security_context).
    #[doc(alias = "NFQA_SECCTX")]
    pub fn security_context(&self) -> Option<&[u8]> {
        self.attribute(attribute::SECURITY_CONTEXT)
    }

    /// The packet's outermost VLAN tag, which the kernel keeps beside it; an inner one begins the payload. In the bridge family
    /// alone.
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(&self) -> Option<Vlan> {
        let nested = self.attribute(attribute::VLAN)?;
        let be16 = |number| find(nested, number)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
        // NFQA_VLAN_PROTO, NFQA_VLAN_TCI
        Some(Vlan { protocol: be16(1)?, control: be16(2)? })
    }

    /// The link-layer header: of Ethernet 14 bytes, without the tag that [`vlan`](Self::vlan) tells. In the bridge family alone.
    #[doc(alias = "NFQA_L2HDR")]
    pub fn layer2_header(&self) -> Option<&[u8]> {
        self.attribute(attribute::LAYER2_HEADER)
    }

    /// The class id of the sender's control group (`net_cls`). Linux 6.12 and later, where there is a local socket.
    #[doc(alias = "NFQA_CGROUP_CLASSID")]
    pub fn cgroup_class_id(&self) -> Option<u32> {
        self.be32(attribute::CGROUP_CLASS_ID)
    }

    /// The packet's connection tracking entry, with [`conntrack`](crate::QueueBuilder::conntrack) and where it has one.
    /// Decoded at each call.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT")]
    pub fn conntrack(&self) -> Option<crate::Conntrack> {
        self.attribute(attribute::CONNTRACK).map(crate::Conntrack::decode)
    }

    /// How the packet relates to its connection; as [`conntrack`](Self::conntrack).
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT_INFO")]
    pub fn conntrack_state(&self) -> Option<crate::ConntrackState> {
        self.be32(attribute::CONNTRACK_INFO).map(Into::into)
    }

    /// The name of an interface, by an index this packet gave, in the queue's network namespace. It takes a system call.
    ///
    /// # Errors
    /// There is no interface of that index (any more).
    pub fn interface_name(&self, index: u32) -> Result<String, Error> {
        match &self.claim.queue {
            Some(queue) => queue.interface_name(index),
            None => Err(Error::new(ErrorKind::Closed, "name interface")),
        }
    }

    /// Whether the packet's mark has this value in the bits of the mask.
    pub fn has_mark(&self, value: u32, mask: u32) -> bool {
        self.mark() & mask == value & mask
    }

    /// The packet's mark with the bits of the mask changed to the value's, for [`Verdict::mark`].
    pub fn mark_with(&self, value: u32, mask: u32) -> u32 {
        self.mark() & !mask | value & mask
    }

    /// Sends the packet through the hook again, marked, so that the rules above the queue's are applied to it with the mark.
    /// A packet that has the mark already is accepted: whatever the rules say, it does not go round for ever.
    ///
    /// The rule may let marked packets pass by itself (`meta mark & MASK != VALUE queue`); that saves the second look.
    pub fn repeat_marked(self, value: u32, mask: u32) -> Verdict {
        if self.has_mark(value, mask) {
            return self.accept();
        }
        let mark = self.mark_with(value, mask);
        self.repeat().mark(mark)
    }

    /// Whether the transport checksum in the payload is finished. If not, the network card (or nobody, on loopback)
    /// would have finished it; accepting the packet as it is, is fine, but a replaced payload needs full checksums. A UDP
    /// super-packet may be called ready and have an unfinished checksum all the same.
    #[doc(alias = "NFQA_SKB_CSUMNOTREADY")]
    pub fn is_checksum_ready(&self) -> bool {
        self.offload() & 1 == 0
    }

    /// Whether this is a super-packet, to be segmented later.
    #[doc(alias = "NFQA_SKB_GSO")]
    pub fn is_gso(&self) -> bool {
        self.offload() & 2 != 0
    }

    /// Whether the kernel has left the checksum of an arrived packet unverified.
    #[doc(alias = "NFQA_SKB_CSUM_NOTVERIFIED")]
    pub fn is_checksum_unverified(&self) -> bool {
        self.offload() & 4 != 0
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

    /// An attribute of the kernel's message by its number (`NFQA_*`), as it came: numbers in network byte order.
    pub fn attribute(&self, number: u16) -> Option<&[u8]> {
        find(self.arrived.attributes(), number)
    }

    /// All attributes of the kernel's message, with their numbers.
    pub fn attributes(&self) -> impl Iterator<Item = (u16, &[u8])> {
        attributes_of(self.arrived.attributes()).map_while(|attribute| attribute)
    }

    fn be32(&self, number: u16) -> Option<u32> {
        find_be32(self.arrived.attributes(), number)
    }

    fn offload(&self) -> u32 {
        self.be32(attribute::OFFLOAD).unwrap_or(0)
    }

    /// Keeps only the right to decide, and gives back the memory of payload and metadata.
    pub fn detach(self) -> Ticket {
        if let Some(queue) = &self.claim.queue {
            queue.detached(self.claim.id);
        }
        Ticket { claim: self.claim }
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

    /// Sends the packet through the hook again, from its first rule on; it comes back with a new id if a rule queues it
    /// again. Give it a [mark](Verdict::mark) that the rule excepts, or it goes round for ever.
    #[doc(alias = "NF_REPEAT")]
    pub fn repeat(self) -> Verdict {
        self.decide(Action::Repeat)
    }

    /// Accepts the packet and skips the rest of the hook's chains.
    #[doc(alias = "NF_STOP")]
    pub fn stop(self) -> Verdict {
        self.decide(Action::Stop)
    }

    /// Hands the packet to another queue. If nobody owns that, the packet is dropped.
    #[doc(alias = "NF_QUEUE")]
    pub fn requeue(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: false })
    }

    /// Hands the packet to another queue. If nobody owns that, the packet is accepted.
    #[doc(alias = "NF_VERDICT_FLAG_QUEUE_BYPASS")]
    pub fn requeue_bypass(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: true })
    }

    /// Decides with an action computed elsewhere.
    pub fn decide(self, action: Action) -> Verdict {
        Verdict::new(self.claim, action)
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("id", &self.claim.id)
            .field("hook", &self.hook())
            .field("hw_protocol", &format_args!("{:#06x}", self.hw_protocol()))
            .field("len", &self.original_len())
            .finish_non_exhaustive()
    }
}

/// The right to decide a packet whose bytes have been given back: see [`Packet::detach`].
///
/// As with the packet itself, dropping it unanswered gives the queue's `on_unanswered` answer.
pub struct Ticket {
    claim: Claim,
}

impl Ticket {
    /// The kernel's id of the packet.
    pub fn id(&self) -> PacketId {
        self.claim.id()
    }

    /// As [`Packet::is_expired`].
    pub fn is_expired(&self) -> bool {
        self.claim.is_expired()
    }

    /// As [`Packet::accept`].
    pub fn accept(self) -> Verdict {
        self.decide(Action::Accept)
    }

    /// As [`Packet::drop`](Packet::drop()).
    pub fn drop(self) -> Verdict {
        self.decide(Action::Drop)
    }

    /// As [`Packet::repeat`].
    pub fn repeat(self) -> Verdict {
        self.decide(Action::Repeat)
    }

    /// As [`Packet::stop`].
    pub fn stop(self) -> Verdict {
        self.decide(Action::Stop)
    }

    /// As [`Packet::requeue`].
    pub fn requeue(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: false })
    }

    /// As [`Packet::requeue_bypass`].
    pub fn requeue_bypass(self, queue: u16) -> Verdict {
        self.decide(Action::Requeue { queue, bypass: true })
    }

    /// As [`Packet::decide`].
    pub fn decide(self, action: Action) -> Verdict {
        Verdict::new(self.claim, action)
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.claim.id).finish()
    }
}
