//! How a packet's priority carries a verdict from the queue to the chain behind the queue.
//!
//! A packet keeps its priority (`skb->priority`) while it is queued, and at one hook nothing reads
//! it between the rule that queues and the chain behind. Unlike the mark, it does not decide about
//! routes, and few programs set it. The highest byte is a code, which the chain behind removes; the
//! lower three bytes remain the packet's own priority. The verdicts that drop the packet are whole
//! numbers, because they may be read where a packet of another origin can be: before the queue,
//! when the packet traverses the hook once more.

/// The bits that tell codes from ordinary priorities.
pub(crate) const MASK: u32 = 0xf800_0000;
/// The value of these bits in a code. As a traffic control class it has the major number 0xa800 or
/// higher, which the kernel assigns to no class by itself.
pub(crate) const VALUE: u32 = 0xa800_0000;
/// The bits of the code itself.
pub(crate) const CODE: u32 = 0xff00_0000;
/// The bits that remain for the packet's own priority.
pub(crate) const ORIGINAL: u32 = !CODE;

/// On its way to the queue: a packet of a connection.
pub(crate) const QUEUED: u32 = 0xa800_0000;
/// On its way to the queue: a packet without a connection, or an ICMP error about one. A verdict
/// can hold for the packet only.
pub(crate) const ALONE: u32 = 0xa900_0000;
/// The verdict accepts the connection.
pub(crate) const ACCEPTED: u32 = 0xaa00_0000;
/// The verdict drops the connection.
pub(crate) const DROPPED: u32 = 0xac5d_19e3;
/// The verdict rejects the connection.
pub(crate) const REJECTED: u32 = 0xad5d_19e3;
/// The verdict rejects the packet alone.
pub(crate) const REJECTED_PACKET: u32 = 0xae5d_19e3;

/// Whether a priority is a code.
pub(crate) const fn is_code(priority: u32) -> bool {
    priority & MASK == VALUE
}

/// The packet's own priority.
pub(crate) const fn original(priority: u32) -> u32 {
    if is_code(priority) { priority & ORIGINAL } else { priority }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_differ_and_are_told_from_ordinary_priorities() {
        let codes = [QUEUED, ALONE, ACCEPTED, DROPPED, REJECTED, REJECTED_PACKET];
        for (index, code) in codes.into_iter().enumerate() {
            assert!(is_code(code) && codes[..index].iter().all(|other| other & CODE != code & CODE), "{code:#x}");
        }
        for priority in [0, 7, 0x0001_0010, 0x00ff_ffff, 0x8001_0010, u32::MAX] {
            assert!(!is_code(priority), "{priority:#x}");
            assert_eq!(original(priority), priority);
        }
        assert_eq!(original(QUEUED | 0x0001_0010), 0x0001_0010);
    }
}
