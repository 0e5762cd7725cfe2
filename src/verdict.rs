//! What to do with one packet.

#[cfg(feature = "conntrack")]
use std::time::Duration;
use std::{borrow::Cow, fmt};

use bytes::Bytes;

use crate::{
    Action, Confirm, Error, ErrorKind, PacketId, Vlan, kernel,
    packet::Claim,
    queue::Extra,
    state::{Decision, Origin},
    wire::{MAX_PAYLOAD, verdict::Ruling},
};
#[cfg(feature = "conntrack")]
use crate::{Expectation, wire::verdict::encode_conntrack};

/// What to do with one packet: an action, and changes to the packet.
///
/// It takes effect when it is [submitted](Self::submit), or given to a [`VerdictSink`](crate::VerdictSink); it goes to the
/// packet's own queue whichever sink that is. Dropped instead, the packet gets what
/// [`QueueBuilder::on_unanswered`](crate::QueueBuilder::on_unanswered) says.
#[must_use = "a verdict takes effect when it is submitted; dropped, the packet counts as unanswered"]
pub struct Verdict {
    claim: Claim,
    action: Action,
    mark: Option<u32>,
    priority: Option<u32>,
    extra: Option<Box<Extra>>,
    #[cfg(feature = "conntrack")]
    conntrack: Option<Box<ConntrackChange>>,
}

/// Changes to a connection tracking entry.
#[cfg(feature = "conntrack")]
#[derive(Debug, Default)]
struct ConntrackChange {
    mark: Option<(u32, u32)>,
    labels: Option<([u8; 16], [u8; 16])>,
    timeout: Option<Duration>,
    expectation: Option<Expectation>,
}

impl Verdict {
    pub(crate) fn new(claim: Claim, action: Action) -> Self {
        Self {
            claim,
            action,
            mark: None,
            priority: None,
            extra: None,
            #[cfg(feature = "conntrack")]
            conntrack: None,
        }
    }

    /// The packet it decides.
    pub fn packet_id(&self) -> PacketId {
        self.claim.id()
    }

    /// What happens to the packet.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The number of the queue that the packet waits in.
    pub fn queue(&self) -> u16 {
        self.claim.queue()
    }

    /// Gives the verdict; as [`VerdictSink::submit`](crate::VerdictSink::submit). A verdict knows its queue.
    ///
    /// # Errors
    /// As [`VerdictSink::submit`](crate::VerdictSink::submit).
    pub fn submit(self) -> Result<(), Error> {
        crate::sink::submit(self)
    }

    /// Gives the verdict, and resolves when the kernel has acknowledged it; as
    /// [`VerdictSink::confirm`](crate::VerdictSink::confirm).
    ///
    /// # Errors
    /// As [`VerdictSink::confirm`](crate::VerdictSink::confirm).
    ///
    /// # Cancel safety
    /// As [`VerdictSink::confirm`](crate::VerdictSink::confirm).
    pub fn confirm(self) -> Confirm {
        crate::sink::confirm(self)
    }

    /// Sets the packet's mark, all 32 bits of it. Without this the packet keeps the mark it has.
    ///
    /// To change some bits only, start from [`Packet::mark`](crate::Packet::mark). At the output hook a changed mark routes
    /// the packet anew.
    #[doc(alias = "NFQA_MARK")]
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Sets the packet's priority (`skb->priority`). Linux 5.18 and later; older kernels ignore it.
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(mut self, priority: u32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Replaces the packet, from its network header on. The kernel takes the bytes as they are: lengths and checksums,
    /// the network's and the transport's, must be right, also where those of the received packet were unfinished.
    ///
    /// Feature `edit` does that: `Packet::edit`. It also knows the exception: a UDP super-packet wants the pseudo-header's sum in
    /// place of the checksum.
    ///
    /// From 20 (IPv4) or 40 (IPv6) to 65 531 bytes; anything else is refused by the sink, for the kernel would drop the
    /// packet and say nothing. A packet longer than the MTU is fragmented, or lost if it must not be (as it always is
    /// on a bridge, which does not fragment).
    ///
    /// Linux 7.1 and later drop, in silence, every replacement in a network namespace that belongs to another user namespace
    /// than the initial one, and 7.2 and later every one in the bridge family: these two are refused as `Unsupported` before
    /// they are sent. In silence, Linux 7.2 and later also drop a replacement whose header length, options, fragment bits or extension
    /// headers differ from the packet's, and 7.3 and later one whose transport header is missing or, where the packet's
    /// connection is tracked, of another protocol.
    #[doc(alias = "NFQA_PAYLOAD")]
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.extra.get_or_insert_default().payload = Some(payload.into());
        self
    }

    /// Sets the packet's outermost VLAN tag: replaces the one it has, or gives it one. None can be taken away; a control of 0 leaves a
    /// priority tag. The kernel takes any protocol. In the bridge family alone; elsewhere it ignores the tag.
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(mut self, vlan: Vlan) -> Self {
        self.extra.get_or_insert_default().vlan = Some(vlan);
        self
    }

    /// Replaces the link-layer header; it must be as long as the packet's ([`Packet::layer2_header`](crate::Packet::layer2_header)).
    /// It goes out as it is, EtherType included.
    /// In the bridge family alone; elsewhere the kernel ignores it. Another length is refused, for the kernel would lose the
    /// packet (and older kernels its memory).
    #[doc(alias = "NFQA_L2HDR")]
    pub fn layer2_header(mut self, header: impl Into<Bytes>) -> Self {
        self.extra.get_or_insert_default().layer2 = Some(header.into());
        self
    }

    /// Changes the mark of the packet's connection (`ct mark`), in the bits of the mask. With a rule that lets marked
    /// connections pass (`ct mark & MASK == VALUE accept`, above the queue's) the rest of a flow skips the queue.
    ///
    /// A queue that was not bound with [`conntrack`](crate::QueueBuilder::conntrack) refuses this and the other conntrack
    /// changes: kernels without the glue ignore them in silence.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT")]
    pub fn conntrack_mark(mut self, value: u32, mask: u32) -> Self {
        self.conntrack.get_or_insert_default().mark = Some((value, mask));
        self
    }

    /// Changes the labels of the packet's connection, in the bits of the mask; each is 128 bits, as
    /// [`Conntrack::labels`](crate::Conntrack::labels).
    ///
    /// Labels need a rule in the network namespace that sets some (`ct label set`). Without one the kernel, in silence, makes
    /// neither this change nor the one of the mark that the same verdict carries.
    #[cfg(feature = "conntrack")]
    pub fn conntrack_labels(mut self, value: [u8; 16], mask: [u8; 16]) -> Self {
        self.conntrack.get_or_insert_default().labels = Some((value, mask));
        self
    }

    /// Has the packet's connection expire after so long, if no packet of it comes in the meantime: the next one that does sets the
    /// protocol's usual timeout again. Whole seconds; the kernel cuts it to 2³¹ − 1 of its ticks, 24 days or more.
    #[cfg(feature = "conntrack")]
    pub fn conntrack_timeout(mut self, timeout: Duration) -> Self {
        self.conntrack.get_or_insert_default().timeout = Some(timeout);
        self
    }

    /// Has connection tracking expect a connection that follows from the packet's: its packets are then
    /// [related](crate::ConntrackState::Related), and its entry names this one as its [master](crate::Conntrack::master).
    ///
    /// The packet's connection must have a helper ([`Conntrack::helper`](crate::Conntrack::helper); a rule gives it one), whose
    /// limits for the number and the time of expectations count. Without a helper, or where the addresses are of another family than
    /// the connection's, the kernel expects nothing, in silence.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_EXP")]
    pub fn expectation(mut self, expectation: Expectation) -> Self {
        self.conntrack.get_or_insert_default().expectation = Some(expectation);
        self
    }

    /// Refuses what the kernel would take in silence and lose the packet or the change for.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |kind, detail: Cow<'static, str>| {
            Err(Error::new(kind, "submit verdict").with_detail(detail).with_packet(self.claim.id()))
        };
        #[cfg(feature = "conntrack")]
        if self.conntrack.is_some() && !self.claim.has_conntrack() {
            return refuse(ErrorKind::InvalidInput, "a conntrack change, on a queue bound without conntrack".into());
        }
        #[cfg(feature = "conntrack")]
        if let Some(Err(detail)) =
            self.conntrack.as_ref().and_then(|change| change.expectation.as_ref()).map(Expectation::check)
        {
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        let Some(extra) = &self.extra else { return Ok(()) };
        if extra.layer2.as_ref().is_some_and(|header| header.is_empty() || header.len() > MAX_LAYER2) {
            return refuse(ErrorKind::InvalidInput, "a link-layer header of an impossible length".into());
        }
        if let (Some(header), Some(length)) = (&extra.layer2, self.claim.bridged())
            && header.len() != length
        {
            let detail = format!("a link-layer header of {} bytes; the packet's has {length}", header.len());
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        let Some(payload) = &extra.payload else { return Ok(()) };
        let least = match payload.first().map(|first| first >> 4) {
            Some(4) => 20,
            Some(6) => 40,
            _ => 1,
        };
        if !(least..=MAX_PAYLOAD).contains(&payload.len()) {
            let detail =
                format!("a replaced payload of {} bytes; {least} to {MAX_PAYLOAD} are possible", payload.len());
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        let bridged = self.claim.bridged().and_then(|_| kernel::bridge_payload_obstacle());
        match bridged.or_else(|| self.claim.no_payload()) {
            Some(obstacle) => refuse(ErrorKind::Unsupported, obstacle.into()),
            None => Ok(()),
        }
    }

    pub(crate) fn into_parts(self) -> (Claim, Decision<Box<Extra>>) {
        let ruling = Ruling { action: self.action, mark: self.mark, priority: self.priority };
        #[cfg_attr(not(feature = "conntrack"), expect(unused_mut))]
        let mut extra = self.extra;
        #[cfg(feature = "conntrack")]
        if let Some(change) = self.conntrack {
            let seconds = change.timeout.map(|timeout| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX));
            let encoded = encode_conntrack(change.mark, change.labels, seconds);
            let extra = extra.get_or_insert_default();
            extra.conntrack = Some(encoded);
            extra.expectation = change.expectation.as_ref().map(Expectation::encode);
        }
        (self.claim, Decision { ruling, extra, origin: Origin::Owner })
    }
}

/// No link layer of the bridge family has a longer header (`MAX_HEADER` is 128 + 32 at most).
const MAX_LAYER2: usize = 160;

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verdict")
            .field("packet", &self.claim.id())
            .field("action", &self.action)
            .field("mark", &self.mark)
            .field("priority", &self.priority)
            .field("payload_len", &self.extra.as_ref().and_then(|extra| extra.payload.as_ref()).map(Bytes::len))
            .finish_non_exhaustive()
    }
}
