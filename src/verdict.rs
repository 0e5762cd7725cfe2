//! Verdicts.

#[cfg(feature = "conntrack")]
use std::time::Duration;
use std::{
    borrow::Cow,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use futures::channel::oneshot;
use pin_project::pin_project;

#[cfg(feature = "conntrack")]
use crate::wire::{conntrack::encode_changes, expectation::Expectation};
use crate::{
    io::{Shared, VerdictExtras, VerdictGuard},
    state::{Decision, Origin},
    types::{
        Action, Error, ErrorKind, Hook, PacketId, Vlan,
        flow_codes::{self, FlowCodes},
    },
    wire::{MAX_PAYLOAD, verdict::VerdictFields},
};

/// What to do with one packet: an action, and changes to the packet.
///
/// It takes effect when it is [submitted](Self::submit) or sent to a
/// [`VerdictSink`](crate::VerdictSink). Whichever sink that is, the verdict reaches its packet's
/// own queue. If a verdict is dropped instead, the packet gets the default action:
/// [`QueueBuilder::on_unanswered`](crate::QueueBuilder::on_unanswered).
///
/// A packet gets one verdict at most: whatever decides it takes it. The same holds for a verdict
/// that is submitted.
///
/// ```compile_fail,E0382
/// # fn example(packet: tokio_nfqueue::Packet) {
/// let verdict = packet.accept();
/// let other = packet.drop();
/// # }
/// ```
///
/// ```compile_fail,E0382
/// # fn example(verdict: tokio_nfqueue::Verdict) {
/// verdict.submit().unwrap();
/// verdict.submit().unwrap();
/// # }
/// ```
#[must_use = "a verdict takes effect when it is submitted; if it is dropped, the packet gets the default action"]
pub struct Verdict {
    guard: VerdictGuard,
    action: Action,
    mark: Option<u32>,
    priority: Option<u32>,
    /// The packet is rejected; `action` is `Drop`.
    reject: bool,
    /// The verdict holds for the connection.
    for_flow: bool,
    extras: Option<Box<VerdictExtras>>,
    #[cfg(feature = "conntrack")]
    conntrack: Option<Box<ConntrackChange>>,
}

/// What a verdict changes besides deciding the packet: [`Verdict::changes`]. What is `None` stays
/// as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Changes<'a> {
    /// The packet's new mark: [`Verdict::mark`].
    pub mark: Option<u32>,
    /// The packet's new priority: [`Verdict::priority`].
    pub priority: Option<u32>,
    /// The packet is rejected: [`Packet::reject`](crate::Packet::reject).
    pub reject: bool,
    /// The verdict holds for the connection: [`Verdict::for_flow`].
    pub for_flow: bool,
    /// The packet's new bytes: [`Verdict::payload`].
    pub payload: Option<&'a Bytes>,
    /// The packet's new VLAN tag: [`Verdict::vlan`].
    pub vlan: Option<Vlan>,
    /// The packet's new link-layer header: [`Verdict::layer2_header`].
    pub layer2_header: Option<&'a Bytes>,
    /// Value and mask: [`Verdict::connection_mark`].
    #[cfg(feature = "conntrack")]
    pub connection_mark: Option<(u32, u32)>,
    /// Value and mask: [`Verdict::connection_labels`].
    #[cfg(feature = "conntrack")]
    pub connection_labels: Option<([u8; 16], [u8; 16])>,
    /// The new timeout: [`Verdict::connection_timeout`].
    #[cfg(feature = "conntrack")]
    pub connection_timeout: Option<Duration>,
    /// The expected connection: [`Verdict::expectation`].
    #[cfg(feature = "conntrack")]
    pub expectation: Option<&'a Expectation>,
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
    pub(crate) fn new(guard: VerdictGuard, action: Action) -> Self {
        Self {
            guard,
            action,
            mark: None,
            priority: None,
            reject: false,
            for_flow: false,
            extras: None,
            #[cfg(feature = "conntrack")]
            conntrack: None,
        }
    }

    /// The kernel's id of the packet.
    pub fn id(&self) -> PacketId {
        self.guard.id()
    }

    /// What happens to the packet.
    pub fn action(&self) -> Action {
        self.action
    }

    /// The number of the packet's queue.
    pub fn queue_number(&self) -> u16 {
        self.guard.queue_number()
    }

    /// Submits the verdict. The queue's [`FlushPolicy`](crate::FlushPolicy) decides when it is sent
    /// to the kernel, on this thread or on another. This call does not wait for that.
    ///
    /// If the policy decides to send now, the send happens within this call, and the kernel
    /// processes the accepted packets within the send: some microseconds for one packet, 100 µs for
    /// 64.
    ///
    /// A packet that has already been decided by its deadline or by a closing queue is no error
    /// here: it is counted in [`Decided::late`](crate::stats::Decided::late) and reported by
    /// [`refusals`](crate::VerdictSink::refusals), like verdicts that the kernel refuses.
    /// [`confirm`](Self::confirm) returns both.
    ///
    /// # Errors
    /// The verdict is invalid and was not submitted. The packet gets the default action.
    /// * `InvalidInput`: a payload or link-layer header of an invalid length, a conntrack change in
    ///   a queue that was bound without conntrack, an invalid expectation, a priority that is a
    ///   code of the flow marks, or what [`for_flow`](Self::for_flow) and
    ///   [`Packet::reject`](crate::Packet::reject) refuse.
    ///
    /// What depends on the packet or on the system is no error here, but reported by
    /// [`refusals`](crate::VerdictSink::refusals) and returned by `confirm`: `Unsupported` if the
    /// kernel does not take the replaced [payload](Self::payload), `InvalidInput` if the link-layer
    /// header is not as long as the packet's (in both cases the packet gets the default action),
    /// and what [`for_flow`](Self::for_flow) says.
    pub fn submit(self) -> Result<(), Error> {
        self.check()?;
        let obstacle = self.obstacle();
        let (guard, decision, alone) = self.into_parts();
        match obstacle {
            Some(error) => guard.report(error),
            None => {
                alone.into_iter().for_each(|error| guard.report(error));
                if let Some((queue, id)) = guard.disarm() {
                    queue.decide(id, decision);
                }
            }
        }
        Ok(())
    }

    /// Submits the verdict, sends all gathered verdicts at once, and resolves when the kernel has
    /// acknowledged this one.
    ///
    /// The verdict is submitted by this call, not when the future is polled. An acknowledgement
    /// costs about 800 ns more than a plain verdict. It arrives in the socket behind the packets
    /// that wait there. The future receives these too, up to 128 each time it is polled, and the
    /// stream returns them.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and each with the packet's id:
    /// * `Expired`: the packet has already been decided by its deadline or by a closing queue.
    /// * `PacketGone`: the kernel no longer had the packet.
    /// * `NotPermitted`: the sending thread had no `CAP_NET_ADMIN`. The packet gets the default
    ///   action as soon as that can be sent.
    /// * `Unconfirmed`: the acknowledgement was lost because the receive buffer was full.
    ///
    /// # Cancel safety
    /// If the future is dropped, the verdict stays submitted; only the confirmation is lost.
    pub fn confirm(self) -> Confirm {
        let id = self.id();
        let state = match self.check().err().or_else(|| self.obstacle()) {
            Some(error) => Confirmation::Refused(Some(error)),
            None => {
                let (guard, decision, alone) = self.into_parts();
                match guard.disarm() {
                    Some((queue, id)) => {
                        let reply = queue.decide_confirmed(id, decision);
                        Confirmation::Awaited(queue, reply, alone)
                    }
                    None => Confirmation::Refused(None),
                }
            }
        };
        Confirm { id, state }
    }

    /// Applies the verdict to this packet and to every later packet of its connection, in both
    /// directions. The kernel then accepts, drops or rejects these. They do not come to the queue.
    /// See [`guide::flows`](crate::guide::flows).
    ///
    /// Packets that are queued already still need their own verdicts. If verdicts for one
    /// connection differ, the one that denies wins. Before a TCP, SCTP or DCCP connection is
    /// established, an accept holds if its packet begins the connection or answers that; for
    /// another packet it holds for the packet alone, as it may be of an older connection. So decide
    /// each packet that comes, also of a connection that you have accepted.
    ///
    /// # Errors
    /// [`submit`](Self::submit) and [`confirm`](Self::confirm) refuse the verdict as
    /// `InvalidInput`, and the packet gets the default action, if
    /// * the queue was bound without [`flow_marks`](crate::QueueBuilder::flow_marks);
    /// * the action is not accept, drop or reject;
    /// * the verdict accepts, and sets a [priority](Self::priority) of 2^24 or more.
    ///
    /// If the *packet* is the obstacle, the verdict holds for the packet alone, `submit` succeeds,
    /// and [`refusals`](crate::VerdictSink::refusals) and `confirm` return `InvalidInput` with the
    /// packet's id: the packet was not queued by a rule with flow marks, it belongs to no
    /// connection, or it is an ICMP error. Before Linux 5.18 every packet is such an obstacle.
    #[doc(alias = "bypass")]
    pub fn for_flow(mut self) -> Self {
        self.for_flow = true;
        self
    }

    pub(crate) fn rejecting(mut self) -> Self {
        self.reject = true;
        self
    }

    /// Sets the packet's mark, all 32 bits. Without this the packet keeps its mark.
    ///
    /// To change some bits only, use [`Packet::mark_with`](crate::Packet::mark_with). At the output
    /// hook, a changed mark makes the kernel route the packet again.
    #[doc(alias = "NFQA_MARK")]
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Sets the packet's priority (`skb->priority`).
    ///
    /// Linux 5.18 and later; older kernels ignore it.
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(mut self, priority: u32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Replaces the packet, from its network header on. The kernel takes the bytes as they are, so
    /// lengths and checksums of the network and the transport header must be correct, even if those
    /// of the received packet were unfinished.
    ///
    /// [`Packet::edit`](crate::Packet::edit) (feature `edit`) keeps them correct. It also handles
    /// the exception: in a UDP super-packet the checksum field holds the sum of the pseudo-header.
    ///
    /// The length is 20 (IPv4) or 40 (IPv6) to 65 531 bytes. [`submit`](Self::submit) refuses other
    /// lengths, because the kernel would silently drop the packet. A packet longer than the MTU is
    /// fragmented, or lost if it must not be fragmented (a bridge never fragments).
    ///
    /// Some replacements are not taken:
    /// * Linux 7.1 and later take none in a network namespace that is owned by another user
    ///   namespace than the initial one, and Linux 7.2 and later none in the bridge family. Both
    ///   are refused as `Unsupported`.
    /// * Linux 7.2 and later silently drop a replacement whose IP header length, options, fragment
    ///   bits or extension headers differ from the packet's. Linux 7.3 and later also drop one
    ///   without a transport header or, if the packet's connection is tracked, with another
    ///   protocol.
    #[doc(alias = "NFQA_PAYLOAD")]
    pub fn payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.extras.get_or_insert_default().payload = Some(payload.into());
        self
    }

    /// Sets the packet's outermost VLAN tag: replaces the tag or adds one. A tag cannot be removed;
    /// a control field of 0 leaves a priority tag. The kernel takes any protocol.
    ///
    /// Bridge family only; in other families the kernel ignores it.
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(mut self, vlan: Vlan) -> Self {
        self.extras.get_or_insert_default().vlan = Some(vlan);
        self
    }

    /// Replaces the link-layer header. It must be as long as the packet's
    /// ([`Packet::layer2_header`](crate::Packet::layer2_header)) and is sent unchanged, including
    /// the EtherType.
    ///
    /// Bridge family only; in other families the kernel ignores it. A header of another length is
    /// refused, because the kernel would lose the packet (and older kernels its memory).
    #[doc(alias = "NFQA_L2HDR")]
    pub fn layer2_header(mut self, header: impl Into<Bytes>) -> Self {
        self.extras.get_or_insert_default().layer2_header = Some(header.into());
        self
    }

    /// Changes the mark of the packet's connection (`ct mark`) in the bits of `mask`. With a rule
    /// before the queue's rule that accepts marked connections (`ct mark & MASK == VALUE accept`),
    /// the rest of the flow is not queued.
    ///
    /// A queue that was bound without [`conntrack`](crate::QueueBuilder::conntrack) refuses this
    /// and the other conntrack changes, because a kernel without the support ignores them silently.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_CT")]
    pub fn connection_mark(mut self, value: u32, mask: u32) -> Self {
        self.conntrack.get_or_insert_default().mark = Some((value, mask));
        self
    }

    /// Changes the labels of the packet's connection in the bits of `mask`: 128 bits each, as
    /// [`Conntrack::labels`](crate::conntrack::Conntrack::labels).
    ///
    /// Labels need a rule in the network namespace that sets labels (`ct label set`). Without one
    /// the kernel silently ignores this change, and also the change of the connection's mark by the
    /// same verdict.
    #[cfg(feature = "conntrack")]
    pub fn connection_labels(mut self, value: [u8; 16], mask: [u8; 16]) -> Self {
        self.conntrack.get_or_insert_default().labels = Some((value, mask));
        self
    }

    /// Lets the packet's connection expire after `timeout` without a packet. The next packet of the
    /// connection restores the protocol's own timeout.
    ///
    /// In whole seconds. The kernel limits it to 2³¹ − 1 ticks, which is 24 days or more.
    #[cfg(feature = "conntrack")]
    pub fn connection_timeout(mut self, timeout: Duration) -> Self {
        self.conntrack.get_or_insert_default().timeout = Some(timeout);
        self
    }

    /// Lets connection tracking expect a connection that belongs to the packet's connection.
    /// Packets of the expected connection are
    /// [related](crate::conntrack::ConnectionState::Related), and its entry names this connection
    /// as its [master](crate::conntrack::Conntrack::master).
    ///
    /// The packet's connection must have a helper
    /// ([`Conntrack::helper`](crate::conntrack::Conntrack::helper), assigned by a rule), whose
    /// limits for number and lifetime of expectations apply. Without a helper, or if the addresses
    /// are of another family than the connection's, the kernel silently ignores the expectation.
    #[cfg(feature = "conntrack")]
    #[doc(alias = "NFQA_EXP")]
    pub fn expectation(mut self, expectation: Expectation) -> Self {
        self.conntrack.get_or_insert_default().expectation = Some(expectation);
        self
    }

    /// What the verdict changes besides deciding the packet.
    ///
    /// A verdict consists of these changes and its [`action`](Self::action), so a function
    /// `fn decide(packet: Packet) -> Verdict` can be tested by what it returns.
    pub fn changes(&self) -> Changes<'_> {
        let extras = self.extras.as_ref();
        #[cfg(feature = "conntrack")]
        let conntrack = self.conntrack.as_ref();
        Changes {
            mark: self.mark,
            priority: self.priority,
            reject: self.reject,
            for_flow: self.for_flow,
            payload: extras.and_then(|extras| extras.payload.as_ref()),
            vlan: extras.and_then(|extras| extras.vlan),
            layer2_header: extras.and_then(|extras| extras.layer2_header.as_ref()),
            #[cfg(feature = "conntrack")]
            connection_mark: conntrack.and_then(|change| change.mark),
            #[cfg(feature = "conntrack")]
            connection_labels: conntrack.and_then(|change| change.labels),
            #[cfg(feature = "conntrack")]
            connection_timeout: conntrack.and_then(|change| change.timeout),
            #[cfg(feature = "conntrack")]
            expectation: conntrack.and_then(|change| change.expectation.as_ref()),
        }
    }

    /// Refuses mistakes in the program that the kernel would accept and then lose silently.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |kind, detail: Cow<'static, str>| {
            Err(Error::new(kind, "submit verdict").with_detail(detail).with_packet(self.guard.id()))
        };
        #[cfg(feature = "conntrack")]
        if self.conntrack.is_some() && !self.guard.has_conntrack() {
            return refuse(
                ErrorKind::InvalidInput,
                "the verdict changes conntrack, but the queue was bound without conntrack(true)".into(),
            );
        }
        #[cfg(feature = "conntrack")]
        if let Some(Err(detail)) =
            self.conntrack.as_ref().and_then(|change| change.expectation.as_ref()).map(Expectation::check)
        {
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        if let Err(detail) = self.check_flow() {
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        let Some(extras) = &self.extras else { return Ok(()) };
        if extras.layer2_header.as_ref().is_some_and(|header| header.is_empty() || header.len() > MAX_LAYER2) {
            return refuse(ErrorKind::InvalidInput, "a link-layer header of an invalid length".into());
        }
        let Some(payload) = &extras.payload else { return Ok(()) };
        let least = match payload.first().map(|first| first >> 4) {
            Some(4) => 20,
            Some(6) => 40,
            _ => 1,
        };
        if !(least..=MAX_PAYLOAD).contains(&payload.len()) {
            let detail = format!("a replaced payload of {} bytes; {least} to {MAX_PAYLOAD} are allowed", payload.len());
            return refuse(ErrorKind::InvalidInput, detail.into());
        }
        Ok(())
    }

    /// What the kernel would accept and then lose silently, because of the packet or the system.
    fn obstacle(&self) -> Option<Error> {
        let extras = self.extras.as_ref()?;
        let (kind, detail): (_, Cow<'static, str>) = match (&extras.layer2_header, self.guard.bridge_header_length()) {
            (Some(header), Some(length)) if header.len() != length => {
                let detail = format!("a link-layer header of {} bytes; the packet's has {length}", header.len());
                (ErrorKind::InvalidInput, detail.into())
            }
            _ => (ErrorKind::Unsupported, extras.payload.as_ref().and_then(|_| self.guard.payload_obstacle())?.into()),
        };
        Some(Error::new(kind, "submit verdict").with_detail(detail).with_packet(self.guard.id()))
    }

    /// Refuses what no rule could carry out for any packet.
    fn check_flow(&self) -> Result<(), &'static str> {
        let Some((marks, _)) = self.guard.flow_marks() else {
            let wanted = self.for_flow || self.reject;
            return if wanted { Err("the queue was bound without flow_marks") } else { Ok(()) };
        };
        #[cfg(feature = "conntrack")]
        if self.conntrack.as_ref().and_then(|change| change.mark).is_some_and(|(_, mask)| mask & marks.mask() != 0) {
            return Err("connection_mark: the mask has bits of the queue's flow marks");
        }
        if self.priority.is_some_and(|priority| FlowCodes::of(marks).has(priority)) {
            return Err("priority: it is one of the codes of the queue's flow marks");
        }
        if !self.for_flow {
            return Ok(());
        }
        if !matches!(self.action, Action::Accept | Action::Drop) {
            return Err("for_flow: the action must be accept, drop or reject");
        }
        if self.action == Action::Accept && self.priority.is_some_and(|priority| priority > flow_codes::ORIGINAL) {
            return Err("for_flow: the new priority must be less than 2^24");
        }
        Ok(())
    }

    /// The action and the priority that the kernel gets, and the reason if the verdict holds for
    /// less than it says. Verdicts of rules behind the queue are codes in the packet's priority.
    ///
    /// One that denies repeats the chain, whose first rule carries it out. `Accept` would continue
    /// with the hook's next chain, by its number: if another program has just removed an earlier
    /// chain, that is the one behind the rules for verdicts.
    fn action_and_priority(&self) -> (Action, Option<u32>, Option<&'static str>) {
        let Some((marks, queued)) = self.guard.flow_marks() else { return (self.action, self.priority, None) };
        let codes = FlowCodes::of(marks);
        let own = self.priority.unwrap_or(codes.original(queued));
        // The chain behind the queue knows by the code that the packet has waited, and removes it.
        let coded = self.priority.map(|priority| match queued & flow_codes::CODE {
            code if (code == codes.queued() || code == codes.alone()) && priority <= flow_codes::ORIGINAL => {
                code | priority
            }
            _ => priority,
        });
        if !self.for_flow && !self.reject {
            // `Stop` skips that chain.
            let restored = self.action == Action::Stop && codes.has(queued);
            return (self.action, if restored { Some(own) } else { coded }, None);
        }
        let can_reject = self.guard.hook() != Hook::Postrouting;
        let no_reject = (self.reject && !can_reject).then_some("the kernel cannot reject packets at Postrouting");
        let accept = self.action == Action::Accept;
        match queued & flow_codes::CODE {
            code if code == codes.queued() && accept => (Action::Accept, Some(codes.accepted() | own), None),
            code if code == codes.queued() && self.for_flow => {
                let code = if self.reject && can_reject { codes.rejected() } else { codes.dropped() };
                (Action::Repeat, Some(code), no_reject)
            }
            code if code == codes.queued() || code == codes.alone() => {
                let alone = self.for_flow.then_some("the packet is of no connection; the verdict holds for it alone");
                let reason = no_reject.or(alone);
                match (accept, self.reject && can_reject) {
                    (true, _) => (Action::Accept, coded, reason),
                    (false, true) => (Action::Repeat, Some(codes.rejected_packet()), reason),
                    (false, false) => (Action::Drop, None, reason),
                }
            }
            _ => (self.action, self.priority, Some("the packet was not queued by a rule with these flow marks")),
        }
    }

    /// The third part is the reason why the verdict holds for the packet alone, if it does against
    /// its wording.
    fn into_parts(self) -> (VerdictGuard, Decision<Box<VerdictExtras>>, Option<Error>) {
        let (action, priority, reason) = self.action_and_priority();
        let alone = reason.map(|reason| {
            let error = Error::new(ErrorKind::InvalidInput, "submit verdict");
            error.with_detail(reason).with_packet(self.guard.id())
        });
        let fields = VerdictFields { action, mark: self.mark, priority };
        #[cfg_attr(not(feature = "conntrack"), expect(unused_mut))]
        let mut extras = self.extras;
        #[cfg(feature = "conntrack")]
        if let Some(change) = self.conntrack {
            let seconds = change.timeout.map(|timeout| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX));
            let encoded = encode_changes(change.mark, change.labels, seconds);
            let extras = extras.get_or_insert_default();
            extras.conntrack = Some(encoded);
            extras.expectation = change.expectation.as_ref().map(Expectation::encode);
        }
        (self.guard, Decision { fields, extras, origin: Origin::Owner }, alone)
    }
}

/// The confirmation of one verdict: see [`Verdict::confirm`].
#[pin_project]
#[must_use = "the verdict has been submitted, but only the future returns the kernel's reply"]
pub struct Confirm {
    id: PacketId,
    state: Confirmation,
}

enum Confirmation {
    /// With the reason why the verdict holds for the packet alone, if it does against its wording.
    Awaited(Arc<Shared>, oneshot::Receiver<Result<(), Error>>, Option<Error>),
    Refused(Option<Error>),
}

impl Future for Confirm {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let id = *this.id;
        let result = match this.state {
            Confirmation::Awaited(queue, reply, alone) => match ready!(queue.poll_reply(reply, cx)) {
                Some(Ok(())) => Some(alone.take().map_or(Ok(()), Err)),
                failed => failed,
            },
            Confirmation::Refused(error) => error.take().map(Err),
        };
        let lost = || Err(Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(id));
        Poll::Ready(result.unwrap_or_else(lost).map_err(|error| error.with_packet(id)))
    }
}

impl fmt::Debug for Confirm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Confirm").field(&self.id).finish()
    }
}

/// No link-layer header in the bridge family is longer (`MAX_HEADER` is at most 128 + 32).
const MAX_LAYER2: usize = 160;

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verdict")
            .field("packet", &self.guard.id())
            .field("action", &self.action)
            .field("mark", &self.mark)
            .field("priority", &self.priority)
            .field("reject", &self.reject)
            .field("for_flow", &self.for_flow)
            .field("payload_len", &self.extras.as_ref().and_then(|extras| extras.payload.as_ref()).map(Bytes::len))
            .finish_non_exhaustive()
    }
}
