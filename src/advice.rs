//! Which limit was reached and what to raise it to, and what else has cost packets.

use std::fmt;

use rustix::io::Errno;

use crate::{io::kernel::KernelStats, types::Stats};

/// What has cost packets, and what to do about it: from
/// [`VerdictSink::advice`](crate::VerdictSink::advice).
///
/// The kernel counts two kinds of loss. "Queue dropped" packets found that `max_len` packets were
/// already waiting for verdicts. "User dropped" packets found the socket's receive buffer full; the
/// default buffer is so large that the queue is full first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// The queue was full ("queue dropped").
    RaiseMaxLen {
        /// Packets that found it full.
        dropped: u32,
        /// The current length, in packets.
        now: u32,
        /// The length to try next, in packets.
        to: u32,
    },
    /// The queue was full and cannot be longer in this kernel: verdicts come too slowly. More
    /// queues, a shorter copy range or GSO help. With fail-open the packets would be accepted
    /// instead of dropped.
    DecideFaster {
        /// Packets that found it full.
        dropped: u32,
        /// Its length, in packets.
        max_len: u32,
    },
    /// The receive buffer was full ("user dropped").
    RaiseReceiveBuffer {
        /// Packets that found it full.
        lost: u64,
        /// The current size in bytes, as the kernel accounts them.
        now: usize,
        /// The size to try next, in bytes; it holds a full queue.
        to: usize,
        /// The value in bytes to which the system limit `net.core.rmem_max` must be raised first.
        /// `None` if that limit has not reduced the buffer.
        rmem_max: Option<usize>,
    },
    /// The kernel dropped packets that waited in the queue for their verdicts: a hook of the
    /// network namespace was unregistered, or an interface went down.
    ///
    /// If any hook is unregistered, the kernel drops all queued packets of all queues in the
    /// namespace. That happens when a base chain or its table is deleted: by `nft flush ruleset`,
    /// `iptables-nft-restore`, a firewall manager that builds its table again, or a program with a
    /// table of its own that exits. `nft monitor` prints each deletion with the program that did
    /// it. Rules, sets and chains without a hook can be changed without such a loss.
    DroppedWhileQueued {
        /// Packets, at least: see [`Sent::gone_at_least`](crate::stats::Sent::gone_at_least).
        packets: u64,
    },
    /// The kernel's own counters could not be read, so packets that found the queue full are not
    /// seen: see [`VerdictSink::kernel_stats`](crate::VerdictSink::kernel_stats).
    KernelCountersUnreadable {
        /// The error number of the operating system (errno), if there was one.
        errno: Option<i32>,
    },
}

/// The kernel's own limit, in versions that keep the packets of each queue in a hash table (Linux
/// 6.12.83, 6.18.24 and later).
const LONGEST_QUEUE: u32 = 65_536;

/// What the counters advise. `wanted` is the receive buffer in bytes that was requested, or that a
/// full queue needs. `flushed` are packets that the kernel has dropped while they were queued.
pub(crate) fn advise(
    stats: &Stats,
    kernel: Result<Option<KernelStats>, Option<i32>>,
    wanted: usize,
    flushed: u64,
) -> Vec<Advice> {
    let mut advice = Vec::new();
    let dropped = match kernel {
        Ok(kernel) => kernel.map_or(0, |kernel| kernel.dropped_queue),
        Err(errno) => {
            advice.push(Advice::KernelCountersUnreadable { errno });
            0
        }
    };
    let now = stats.limits.max_len;
    if dropped > 0 && now < LONGEST_QUEUE {
        // The length that would have sufficed is unknown; doubling finds it in a few steps.
        advice.push(Advice::RaiseMaxLen { dropped, now, to: now.saturating_mul(2).min(LONGEST_QUEUE) });
    } else if dropped > 0 {
        advice.push(Advice::DecideFaster { dropped, max_len: now });
    }
    if stats.lost.packets > 0 {
        let now = stats.limits.receive_buffer;
        let to = if wanted > now { wanted } else { now.saturating_mul(2) };
        // The kernel doubles SO_RCVBUF, so the limit must allow half of the accounted size.
        let rmem_max = (wanted > now).then_some(to / 2);
        advice.push(Advice::RaiseReceiveBuffer { lost: stats.lost.packets, now, to, rmem_max });
    }
    if flushed > 0 {
        advice.push(Advice::DroppedWhileQueued { packets: flushed });
    }
    advice
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RaiseMaxLen { dropped, now, to } => {
                write!(
                    f,
                    "{dropped} packets found the queue full: raise max_len from {now} to {to} packets, or decide faster"
                )
            }
            Self::DroppedWhileQueued { packets } => write!(
                f,
                "the kernel dropped at least {packets} packets while they were queued: a program deleted a base chain \
                 or its table (nft, iptables, a firewall manager), or an interface went down; find the program with \
                 nft monitor, and let it change rules without deleting base chains"
            ),
            Self::KernelCountersUnreadable { errno } => {
                f.write_str("/proc/net/netfilter/nfnetlink_queue cannot be read")?;
                if let Some(errno) = errno {
                    write!(f, " ({})", std::io::Error::from_raw_os_error(*errno))?;
                }
                f.write_str(", so it is unknown how many packets found the queue full")?;
                match errno.map(Errno::from_raw_os_error) {
                    Some(Errno::ACCESS | Errno::PERM) | None => {
                        f.write_str(": root or CAP_DAC_READ_SEARCH is needed when the queue is bound")
                    }
                    Some(Errno::NOENT) => f.write_str(": mount /proc before the queue is bound"),
                    Some(_) => Ok(()),
                }
            }
            Self::DecideFaster { dropped, max_len } => write!(
                f,
                "{dropped} packets found the queue full, and the kernel queues at most {max_len} packets: decide faster, \
                 use more queues, or accept excess packets with fail_open"
            ),
            Self::RaiseReceiveBuffer { lost, now, to, rmem_max } => {
                write!(
                    f,
                    "{lost} packets found the receive buffer full: raise receive_buffer from {now} to {to} bytes"
                )?;
                match rmem_max {
                    Some(bytes) => write!(
                        f,
                        "; without CAP_NET_ADMIN in the initial user namespace that needs net.core.rmem_max={bytes}"
                    ),
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(lost: u64, max_len: u32, receive_buffer: usize) -> Stats {
        let mut stats = Stats::default();
        stats.lost.packets = lost;
        stats.limits.max_len = max_len;
        stats.limits.receive_buffer = receive_buffer;
        stats
    }

    fn kernel(dropped_queue: u32) -> KernelStats {
        KernelStats { port_id: 1, queued: 0, copy_range: 100, dropped_queue, dropped_socket: 0, last_id: 0 }
    }

    #[test]
    fn without_loss_there_is_no_advice() {
        assert_eq!(advise(&stats(0, 1024, 1000), Ok(Some(kernel(0))), 1000, 0), []);
    }

    #[test]
    fn each_limit_has_its_advice() {
        let queue = advise(&stats(0, 1024, 1000), Ok(Some(kernel(5))), 1000, 0);
        assert_eq!(queue, [Advice::RaiseMaxLen { dropped: 5, now: 1024, to: 2048 }]);
        let longest = advise(&stats(0, 65_536, 1000), Ok(Some(kernel(5))), 1000, 0);
        assert_eq!(longest, [Advice::DecideFaster { dropped: 5, max_len: 65_536 }]);
        let socket = advise(&stats(3, 1024, 1000), Ok(None), 1000, 0);
        assert_eq!(socket, [Advice::RaiseReceiveBuffer { lost: 3, now: 1000, to: 2000, rmem_max: None }]);
    }

    #[test]
    fn packets_that_the_kernel_dropped_while_queued_have_the_likely_cause() {
        let advice = advise(&stats(0, 1024, 1000), Ok(Some(kernel(0))), 1000, 14);
        assert_eq!(advice, [Advice::DroppedWhileQueued { packets: 14 }]);
        assert!(advice[0].to_string().contains("base chain"), "{}", advice[0]);
    }

    #[test]
    fn unreadable_counters_are_reported() {
        let advice = advise(&stats(0, 1024, 1000), Err(Some(13)), 1000, 0);
        assert_eq!(advice, [Advice::KernelCountersUnreadable { errno: Some(13) }]);
        assert!(advice[0].to_string().contains("CAP_DAC_READ_SEARCH"), "{}", advice[0]);
        let advice = advise(&stats(0, 1024, 1000), Err(Some(2)), 1000, 0);
        assert!(advice[0].to_string().contains("mount /proc"), "{}", advice[0]);
    }

    #[test]
    fn a_buffer_reduced_by_the_system_names_the_limit() {
        let both = advise(&stats(3, 1024, 1000), Ok(Some(kernel(1))), 8000, 0);
        assert_eq!(both[1], Advice::RaiseReceiveBuffer { lost: 3, now: 1000, to: 8000, rmem_max: Some(4000) });
        assert!(both[1].to_string().contains("net.core.rmem_max=4000"));
    }
}
