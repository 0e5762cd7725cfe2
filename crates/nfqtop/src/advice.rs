//! What is wrong with a queue, and what to do about it, in words.

use std::fmt;

use crate::snapshot::Holder;

/// How long no packet may leave a queue in which some wait, before it is called stuck: a program
/// may hold packets for a while on purpose.
pub(crate) const STUCK_AFTER: f64 = 1.0;

/// The variants are in the order of trouble, the worst first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Advice {
    /// Packets wait, and none has been decided for a while.
    Stuck {
        waiting: u32,
        seconds: f64,
        /// Bytes that the program has not read from its socket, if known.
        unread: Option<u32>,
        /// The first process that holds the socket.
        holder: Option<Holder>,
    },
    /// A rule sends packets to a queue that no program has bound, and they are dropped.
    Unbound { rate: Option<f64> },
    /// The program has bound the queue and has not set its copy mode.
    NoCopyMode,
    /// Packets find the queue full.
    Full {
        rate: f64,
        length: u32,
        /// The queue is stuck because its process is stopped: nothing else is to be done.
        stopped: bool,
    },
    /// Packets find the socket's receive buffer full.
    BufferLoss { rate: f64, stopped: bool },
    /// The queue is nearly as long as it may be.
    Filling { length: u32, percent: u32, assumed: bool },
    /// As `Unbound`, and the packets are accepted.
    Bypassed { rate: Option<f64> },
    /// Packets were lost, and none since the last refresh.
    LostBefore { full: u32, buffer: u32 },
    /// No rule sends packets to the queue, and none arrives.
    NoRule { incomplete: bool },
}

impl Advice {
    /// How bad it is: smaller is worse.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Self::Stuck { .. } => 0,
            Self::Unbound { .. } => 1,
            Self::NoCopyMode => 2,
            Self::Full { .. } => 3,
            Self::BufferLoss { .. } => 4,
            Self::Filling { .. } => 5,
            Self::Bypassed { .. } => 6,
            Self::LostBefore { .. } => 7,
            Self::NoRule { .. } => 8,
        }
    }

    /// For programs.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Stuck { .. } => "stuck",
            Self::Unbound { .. } => "unbound",
            Self::NoCopyMode => "no_copy_mode",
            Self::Full { .. } => "full",
            Self::BufferLoss { .. } => "buffer_loss",
            Self::Filling { .. } => "filling",
            Self::Bypassed { .. } => "bypassed",
            Self::LostBefore { .. } => "lost_before",
            Self::NoRule { .. } => "no_rule",
        }
    }

    /// For the column of a table.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Stuck { .. } => "STUCK",
            Self::Unbound { .. } => "UNBOUND",
            Self::NoCopyMode => "NO MODE",
            Self::Full { .. } => "FULL",
            Self::BufferLoss { .. } => "BUFFER",
            Self::Filling { .. } => "filling",
            Self::Bypassed { .. } => "bypassed",
            Self::LostBefore { .. } => "has lost",
            Self::NoRule { .. } => "no rule",
        }
    }

    pub(crate) fn severity(&self) -> Severity {
        match self.rank() {
            0..=4 => Severity::Losing,
            5..=6 => Severity::Warning,
            _ => Severity::Note,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    /// Packets are lost or held now.
    Losing,
    /// Packets may be lost soon, or pass without inspection.
    Warning,
    /// No packet is at risk.
    Note,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stuck { waiting, seconds, unread, holder } => {
                let plural = if *waiting == 1 { "packet waits" } else { "packets wait" };
                write!(f, "{waiting} {plural}, and none has been decided for {seconds:.0} s")?;
                let stopped = holder.as_ref().is_some_and(Holder::is_stopped);
                match unread {
                    _ if stopped => f.write_str(": the process is stopped")?,
                    Some(0) => f.write_str(": the program has read all of them and sends no verdict")?,
                    Some(bytes) => {
                        write!(f, ": the program does not read its socket ({bytes} bytes are unread)")?;
                    }
                    None => {}
                }
                match holder {
                    Some(holder) if stopped => write!(f, "; continue it with kill -CONT {}", holder.pid),
                    Some(holder) => {
                        write!(
                            f,
                            "; see what it waits for with strace -f -p {}; its end drops what is queued",
                            holder.pid
                        )
                    }
                    None => Ok(()),
                }
            }
            Self::Unbound { rate } => {
                f.write_str("a rule leads to this queue and no program has bound it: the kernel drops these packets")?;
                if let Some(rate) = rate {
                    write!(f, " ({rate:.0}/s now)")?;
                }
                f.write_str("; start the program, or let them pass with bypass in the rule")
            }
            Self::NoCopyMode => f.write_str(
                "the program has bound the queue and set no copy mode: the kernel drops every packet; \
                 the program must send NFQA_CFG_PARAMS",
            ),
            Self::Full { rate, length, stopped } => {
                write!(f, "{rate:.0} packets/s find the queue full (length {length} now)")?;
                if *stopped {
                    return Ok(());
                }
                f.write_str(
                    ": decide faster, raise its maximum length (NFQA_CFG_QUEUE_MAXLEN), use more queues, or accept \
                     excess packets with fail-open",
                )
            }
            Self::BufferLoss { rate, stopped } => {
                write!(f, "{rate:.0} packets/s find the socket's receive buffer full")?;
                if *stopped {
                    return Ok(());
                }
                f.write_str(": read faster, raise SO_RCVBUF (net.core.rmem_max limits it), or copy less of each packet")
            }
            Self::Filling { length, percent, assumed } => {
                write!(f, "{length} packets wait, {percent} % of ")?;
                let limit = if *assumed { "the default maximum length" } else { "the maximum length" };
                write!(f, "{limit}: verdicts come too slowly")
            }
            Self::Bypassed { rate } => {
                f.write_str("a rule leads to this queue and no program has bound it: bypass accepts these packets ")?;
                f.write_str("without inspection")?;
                match rate {
                    Some(rate) => write!(f, " ({rate:.0}/s now)"),
                    None => Ok(()),
                }
            }
            Self::LostBefore { full, buffer } => {
                f.write_str("none is lost now; since the queue was bound ")?;
                match (full, buffer) {
                    (full, 0) => write!(f, "{full} packets found it full"),
                    (0, buffer) => write!(f, "{buffer} packets found the socket's receive buffer full"),
                    (full, buffer) => {
                        write!(f, "{full} packets found it full and {buffer} the socket's receive buffer")
                    }
                }
            }
            Self::NoRule { incomplete } => {
                let seen = if *incomplete { "no rule that could be read" } else { "no rule" };
                write!(f, "{seen} of this network namespace leads to this queue, and no packet arrives")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stuck(unread: Option<u32>, state: char) -> String {
        let holder = Some(Holder { pid: 77, name: "ids".into(), state: Some(state) });
        Advice::Stuck { waiting: 3, seconds: 4.2, unread, holder }.to_string()
    }

    #[test]
    fn a_stuck_program_is_said_to_read_or_not_to_read_or_to_be_stopped() {
        assert!(stuck(Some(0), 'S').contains("has read all of them and sends no verdict"));
        assert!(stuck(Some(832), 'S').contains("does not read its socket (832 bytes are unread)"));
        assert!(stuck(Some(0), 'S').contains("strace -f -p 77"));
        assert!(stuck(Some(832), 'T').ends_with("the process is stopped; continue it with kill -CONT 77"));
        let unknown = Advice::Stuck { waiting: 1, seconds: 1.0, unread: None, holder: None }.to_string();
        assert_eq!(unknown, "1 packet waits, and none has been decided for 1 s");
    }

    #[test]
    fn a_stopped_program_is_not_told_to_be_faster() {
        let full = |stopped| Advice::Full { rate: 5.0, length: 1024, stopped }.to_string();
        assert!(full(false).contains("decide faster"));
        assert_eq!(full(true), "5 packets/s find the queue full (length 1024 now)");
        let lost = |stopped| Advice::BufferLoss { rate: 5.0, stopped }.to_string();
        assert!(lost(false).contains("read faster"));
        assert_eq!(lost(true), "5 packets/s find the socket's receive buffer full");
    }

    #[test]
    fn past_losses_are_told_apart() {
        let text = |full, buffer| Advice::LostBefore { full, buffer }.to_string();
        assert!(text(3, 0).ends_with("3 packets found it full"));
        assert!(text(0, 4).ends_with("4 packets found the socket's receive buffer full"));
        assert!(text(3, 4).ends_with("3 packets found it full and 4 the socket's receive buffer"));
    }
}
