//! What a queue has seen, in numbers.

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
    /// Bytes the socket's receive buffer may hold, as the kernel charges them.
    pub receive_buffer: usize,
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
