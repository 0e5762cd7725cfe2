//! The bits of connections' marks that carry decisions about connections.

/// The bits of connections' marks (`ct mark`) that carry verdicts for whole connections.
///
/// Give the same value to `QueueBuilder::flow_marks` and to
/// `DivertBuilder::flow_marks`. Then `Verdict::for_flow` and
/// `Packet::reject` work: see `guide::flows` of tokio-nfqueue.
///
/// The bits are reserved: no other program in the network namespace should write them. The table
/// compares all three bits, so that a foreign mark is a verdict only if it has exactly the value of
/// one. Two tables with the same bits share their decisions: what one has accepted does not come to
/// the queue of the other, and the second table removes the first one's marks when it is installed.
/// Give them other bits, whose lowest is not 14 or 28 positions from that of the first: then their
/// verdicts have the same codes on the way from the queue (`7 << 3` and `7 << 17`). No other marks
/// have the codes of the default ones. `guide::flows` says when this
/// matters, in "How it works". The other bits of the connections' marks stay as they are, and the
/// marks of packets are not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowMarks {
    mask: u32,
}

// The lowest three bits of the mask carry these values. Each has at least two bits, because the
// marks of other programs are mostly single bits and small numbers.
const BEGUN_AGAIN: u8 = 0b011;
const ACCEPTING: u8 = 0b101;
const DENIED: u8 = 0b110;
const ACCEPTED: u8 = 0b111;

impl FlowMarks {
    #[doc(hidden)]
    pub const DEFAULT: u32 = 0x0000_1012;

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

    /// The mark of an accepted connection: its packets are not queued, except those that begin a
    /// connection.
    pub const fn accepted(self) -> u32 {
        self.place(ACCEPTED)
    }

    /// The mark of a connection that was accepted by the SYN that began it. The reply to the SYN
    /// changes it to [`accepted`](Self::accepted).
    pub const fn accepting(self) -> u32 {
        self.place(ACCEPTING)
    }

    /// The mark of a dropped or rejected connection.
    pub const fn denied(self) -> u32 {
        self.place(DENIED)
    }

    /// The mark of an entry of connection tracking on which another connection has begun. Only the
    /// verdict of a packet that begins a connection can accept the connection.
    pub const fn begun_again(self) -> u32 {
        self.place(BEGUN_AGAIN)
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

    #[doc(hidden)]
    pub fn check(self) -> Result<(), &'static str> {
        if self.mask.count_ones() < 3 { Err("flow marks: the mask has fewer than three bits") } else { Ok(()) }
    }
}

impl Default for FlowMarks {
    /// The bits `0x0000_1012`.
    ///
    /// They are in no mark of zapret (`0x4000_0000`, `0x2000_0000`), Mullvad (`0x6d6f_6c65`,
    /// connections `0xf41`), Calico (`0xffff_0000`), kube-proxy (`0x4000`, `0x8000`), Cilium
    /// (`0x0f00` and the upper half), Tailscale (`0x00ff_0000`), `wg-quick` (`0xca6c`) and the
    /// Amazon VPC CNI (`0x80`). OpenWrt's mwan3 (`0x3f00`) and NordVPN (`0xe1f1`) use one of the
    /// bits, which is the value of no verdict.
    fn default() -> Self {
        Self::new(Self::DEFAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_in_the_lowest_three_bits_of_the_mask() {
        let marks = FlowMarks::new(0xff00);
        assert_eq!(marks.mask(), 0x0700);
        let values = [marks.begun_again(), marks.accepting(), marks.denied(), marks.accepted()];
        assert_eq!(values, [0x300, 0x500, 0x600, 0x700]);
        assert_eq!(FlowMarks::new(0x8421).accepting(), 0x0401);
        assert_eq!(FlowMarks::new(0x8421).mask(), 0x0421);
        assert_eq!(FlowMarks::default().accepted(), 0x1012);
    }

    #[test]
    fn default_marks_are_not_those_of_other_programs() {
        let marks = FlowMarks::default();
        for foreign in [0x4000_0000, 0x2000_0000, 0x6d6f_6c65, 0xf41, 0xffff_0000, 0x4000, 0x8000, 0x0f00, 0xca6c, 0x80]
        {
            assert_eq!(marks.mask() & foreign, 0, "{foreign:#x}");
        }
        let verdicts = [marks.begun_again(), marks.accepting(), marks.denied(), marks.accepted()];
        for foreign in (0..32).map(|bit| 1 << bit).chain([0x3f00, 0xe1f1]).chain(0..16) {
            assert!(!verdicts.contains(&(marks.mask() & foreign)), "{foreign:#x}");
        }
    }

    #[test]
    fn mask_needs_three_bits() {
        for mask in [0, 1, 0x8001] {
            assert!(FlowMarks::new(mask).check().is_err(), "{mask:#x}");
        }
        assert!(FlowMarks::new(0x8003).check().is_ok());
    }
}
