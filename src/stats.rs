//! What a queue has seen, in numbers.

use std::time::Duration;

use crate::wire::verdict::code;

/// A snapshot of a queue's counters. All counts are since [`bind`](crate::QueueBuilder::bind).
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
    /// Verdicts: accept, stop.
    pub accepted: u64,
    /// Verdicts: drop.
    pub dropped: u64,
    /// Verdicts: repeat.
    pub repeated: u64,
    /// Verdicts: to another queue.
    pub requeued: u64,
    /// Of those: packets, tickets and verdicts dropped unanswered, and packets nobody had read when the queue closed.
    pub unanswered: u64,
    /// Of those: packets answered for by [`deadline`](crate::QueueBuilder::deadline).
    pub expired: u64,
    /// Verdicts that came after the packet had been answered for.
    pub late: u64,
    /// Verdict messages that found no packet: its device had gone down, or rules were flushed.
    pub gone: u64,
    /// Messages the kernel refused for any other reason.
    pub refused: u64,
    /// Errors that nobody read from the stream in time.
    pub errors_dropped: u64,
    /// System calls that sent verdicts.
    pub sends: u64,
    /// Verdict messages sent, single and batch.
    pub messages: u64,
    /// Times that gathered verdicts were sent.
    pub flushes: u64,
    /// The most messages sent by one flush.
    pub largest_flush: u64,
    /// Packets received whose verdict has not been sent.
    pub in_flight: usize,
    /// The most there ever were of these.
    pub most_in_flight: usize,
    /// How many there were when packets were received: least, mean and most.
    pub fill: Fill,
    /// Bytes of the packets still undecided, as received: metadata and payload.
    pub held_bytes: usize,
    /// How long the oldest undecided packet has been here, to within a 64th.
    pub oldest_undecided: Option<Duration>,
    /// How many packets the kernel queues at most.
    pub max_len: u32,
    /// Bytes the socket's receive buffer may hold, as the kernel charges them.
    pub receive_buffer: usize,
}

/// The least, the mean and the most of a number that is looked at now and then. All zero before the first look.
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
    pub(crate) fn decided(&mut self, word: u32) {
        let count = match word & 0xff {
            code::DROP => &mut self.dropped,
            code::REPEAT => &mut self.repeated,
            code::QUEUE => &mut self.requeued,
            _ => &mut self.accepted,
        };
        *count += 1;
    }
}
