//! What a queue has seen, in numbers.

use std::time::Duration;

use crate::Action;

/// A snapshot of a queue's counters. All counts are since [`bind`](crate::QueueBuilder::bind), and of packets unless they say
/// otherwise.
///
/// The numbers add up, in every snapshot:
/// `received == accepted + dropped + repeated + requeued + refused + gone_at_least + in_flight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Packets received from the kernel.
    pub received: u64,
    /// Bytes received from the kernel, metadata and netlink headers among them.
    pub bytes: u64,
    /// Packets lost because the socket's receive buffer was full, exactly: the kernel counts ids before it delivers, so a gap
    /// in the ids is what was lost. With fail-open these passed unseen; without, they were dropped.
    ///
    /// A gap shows when the next packet is received, so packets lost behind the last one received are not counted yet,
    /// and not at all if none follows before the end.
    ///
    /// Packets lost because the *queue* was full take no id and do not count here; the kernel counts them in
    /// `/proc/net/netfilter/nfnetlink_queue`.
    pub lost: u64,
    /// How often packets were missing between two received ones.
    pub gaps: u64,
    /// Episodes of loss: each begins with a packet lost to a full receive buffer and ends when that has been read empty.
    pub overrun_episodes: u64,
    /// ENOBUFS reports of the kernel. They are rare, for the socket asks not to be told (`NETLINK_NO_ENOBUFS`).
    pub overruns: u64,
    /// Messages that could not be understood.
    pub malformed: u64,
    /// Accepted, or stopped: the verdict was sent, and the kernel has not said that it found no packet.
    pub accepted: u64,
    /// Dropped; as `accepted`.
    pub dropped: u64,
    /// Sent through the hook again; as `accepted`.
    pub repeated: u64,
    /// Given to another queue; as `accepted`.
    pub requeued: u64,
    /// Decided by the default action: packets, tickets and verdicts that were dropped, packets that nobody had read when
    /// the queue closed, and packets whose verdict was refused.
    pub unanswered: u64,
    /// Decided by their [`deadline`](crate::QueueBuilder::deadline).
    pub expired: u64,
    /// Verdicts that came after the packet had been answered for.
    pub late: u64,
    /// The verdict found no packet: its device had gone down, or a hook was unregistered.
    ///
    /// A hook that is unregistered drops every packet of the queue, and these are counted exactly if they had been received.
    /// Otherwise it is a lower bound: the kernel says of a verdict for one packet whether it found it, and of a batch only
    /// whether it found any. So where an interface goes down, packets of another interface that were decided in the same
    /// batch hide those that had gone; `accepted` and the like are then too high by as many.
    pub gone_at_least: u64,
    /// The kernel refused the verdict for a reason that no other verdict would change, and has let the packet go.
    pub refused: u64,
    /// Verdicts that were refused, each told by [`refusals`](crate::VerdictSink::refusals) or to who
    /// [confirms](crate::Verdict::confirm). A packet whose verdict was refused for want of the capability stays in flight,
    /// and gets the default action when that can be sent.
    pub refusals: u64,
    /// Refusals that nobody read in time.
    pub refusals_unread: u64,
    /// Sends that failed, whose verdicts were sent again later.
    pub failed_sends: u64,
    /// System calls that sent verdicts.
    pub sends: u64,
    /// Verdict messages sent, single and batch.
    pub messages: u64,
    /// Times that gathered verdicts were sent.
    pub flushes: u64,
    /// The most messages sent by one flush.
    pub largest_flush: u64,
    /// Packets received whose verdict has not been sent, or was refused.
    pub in_flight: usize,
    /// The most there ever were of these.
    pub most_in_flight: usize,
    /// How many there were when packets were received: least, mean and most.
    pub fill: Fill,
    /// Bytes of memory that the packets still undecided keep alive: of each buffer that one of them lies in, all of it (see
    /// [`payload_bytes`](crate::Packet::payload_bytes)). Packets that were [detached](crate::Packet::detach) keep none.
    pub held_bytes: usize,
    /// How long the oldest undecided packet has been here, to within a 64th.
    pub oldest_undecided: Option<Duration>,
    /// How many packets the kernel queues at most.
    pub max_len: u32,
    /// Bytes the socket's receive buffer may hold, as the kernel charges them.
    pub receive_buffer: usize,
}

/// The least, the mean and the most of a number that is looked at each time packets are received. All zero before the first look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Fill {
    /// The least.
    pub min: usize,
    /// The mean, rounded down.
    pub mean: usize,
    /// The most.
    pub max: usize,
}

/// What [`Fill`] is made from.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FillCounter {
    looks: u64,
    sum: u64,
    min: usize,
    max: usize,
}

impl FillCounter {
    pub(crate) fn look(&mut self, number: usize) {
        self.min = if self.looks == 0 { number } else { self.min.min(number) };
        self.max = self.max.max(number);
        self.looks += 1;
        self.sum += number as u64;
    }

    pub(crate) fn fill(&self) -> Fill {
        let mean = self.sum.checked_div(self.looks).unwrap_or(0) as usize;
        Fill { min: self.min, mean, max: self.max }
    }
}

impl Stats {
    pub(crate) fn decided(&mut self, action: Action, packets: u64) {
        *self.of(action) += packets;
    }

    /// Verdicts that were counted as taken by the kernel were not.
    pub(crate) fn taken_back(&mut self, action: Action, packets: u64) {
        let count = self.of(action);
        *count = count.saturating_sub(packets);
    }

    fn of(&mut self, action: Action) -> &mut u64 {
        match action {
            Action::Drop => &mut self.dropped,
            Action::Repeat => &mut self.repeated,
            Action::Requeue { .. } => &mut self.requeued,
            Action::Accept | Action::Stop => &mut self.accepted,
        }
    }
}
