//! The bits of marks that carry decisions about connections.

/// The bits of packets' marks and connections' marks that carry verdicts for whole connections.
///
/// Give the same value to [`QueueBuilder::flow_marks`](crate::QueueBuilder::flow_marks) and to
/// `DivertBuilder::flow_marks`. Then [`Verdict::for_flow`](crate::Verdict::for_flow) and
/// [`Packet::reject`](crate::Packet::reject) work: see [`guide::flows`](crate::guide::flows).
///
/// The bits are reserved: nobody else in the network namespace may use them. Two tables with the
/// same bits share their decisions: what one has accepted does not come to the queue of the other,
/// and the second table removes the first one's marks when it is installed. Give them other bits.
/// The other bits of both marks stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowMarks {
    mask: u32,
}

/// The lowest three bits of the mask carry these values.
const REJECTED_PACKET: u8 = 0b011;
const QUEUED: u8 = 0b100;
const ACCEPTED: u8 = 0b101;
const DROPPED: u8 = 0b110;
const REJECTED: u8 = 0b111;

impl FlowMarks {
    /// Returns the marks in the lowest three bits of `mask`. The others of its bits are not used.
    ///
    /// A mask with fewer than three bits is refused by `bind` and `install`.
    pub const fn new(mask: u32) -> Self {
        let mut used = 0;
        let mut rest = mask;
        let mut count = 0;
        while count < 3 && rest != 0 {
            used |= rest & rest.wrapping_neg();
            rest &= rest - 1;
            count += 1;
        }
        Self { mask: used }
    }

    /// The three bits.
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// The packet's mark on its way to the queue. It shows that the rules behind the queue are
    /// there.
    pub const fn queued(self) -> u32 {
        self.place(QUEUED)
    }

    /// The mark of an accepted connection, and of the packet whose verdict accepts it.
    pub const fn accepted(self) -> u32 {
        self.place(ACCEPTED)
    }

    /// The mark of a dropped connection, and of the packet whose verdict drops it.
    pub const fn dropped(self) -> u32 {
        self.place(DROPPED)
    }

    /// The mark of a rejected connection, and of the packet whose verdict rejects it.
    pub const fn rejected(self) -> u32 {
        self.place(REJECTED)
    }

    /// The mark of a packet that is rejected alone.
    pub const fn rejected_packet(self) -> u32 {
        self.place(REJECTED_PACKET)
    }

    const fn place(self, value: u8) -> u32 {
        let low = self.mask & self.mask.wrapping_neg();
        let rest = self.mask & !low;
        let middle = rest & rest.wrapping_neg();
        let high = rest & !middle;
        let mut bits = 0;
        if value & 0b001 != 0 {
            bits |= low;
        }
        if value & 0b010 != 0 {
            bits |= middle;
        }
        if value & 0b100 != 0 {
            bits |= high;
        }
        bits
    }

    pub(crate) fn check(self) -> Result<(), &'static str> {
        if self.mask.count_ones() < 3 { Err("flow marks: the mask has fewer than three bits") } else { Ok(()) }
    }
}

impl Default for FlowMarks {
    /// The three highest bits, `0xe000_0000`.
    fn default() -> Self {
        Self::new(0xe000_0000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_in_the_lowest_three_bits_of_the_mask() {
        let marks = FlowMarks::new(0xff00);
        assert_eq!(marks.mask(), 0x0700);
        let values = [marks.rejected_packet(), marks.queued(), marks.accepted(), marks.dropped(), marks.rejected()];
        assert_eq!(values, [0x300, 0x400, 0x500, 0x600, 0x700]);
        assert_eq!(FlowMarks::new(0x8421).accepted(), 0x0401);
        assert_eq!(FlowMarks::new(0x8421).mask(), 0x0421);
        assert_eq!(FlowMarks::default().accepted(), 0xa000_0000);
    }

    #[test]
    fn mask_needs_three_bits() {
        for mask in [0, 1, 0x8001] {
            assert!(FlowMarks::new(mask).check().is_err(), "{mask:#x}");
        }
        assert!(FlowMarks::new(0x8003).check().is_ok());
    }
}
