//! How a packet's priority carries a verdict from the queue to the chain behind the queue.
//!
//! A packet keeps its priority (`skb->priority`) while it is queued, and at one hook nothing reads
//! it between the rule that queues and the chain behind. Unlike the mark, it does not decide about
//! routes, and few programs set it. The highest byte is a code, which the chain behind removes; the
//! lower three bytes remain the packet's own priority. The verdicts that drop the packet are whole
//! numbers, because they may be read where a packet of another origin can be: before the queue,
//! when the packet traverses the hook once more.
//!
//! Tables with other marks have other codes, as far as there are: a chain that another table
//! registers while a packet waits comes between, and must not carry out what is not for it.

use super::FlowMarks;

/// The bits that distinguish codes from ordinary priorities.
pub const MASK: u32 = 0xf800_0000;
/// The bits of the code itself.
pub const CODE: u32 = 0xff00_0000;
/// The bits that remain for the packet's own priority.
pub const ORIGINAL: u32 = !CODE;

/// The codes of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowCodes {
    /// The value of [`MASK`] in a code. As a traffic control class it has a major number of 0x8800
    /// or higher, which the kernel does not assign.
    pub value: u32,
}

/// Whether a new priority is a code that denies, of any table.
pub const fn denies(priority: u32) -> bool {
    priority >= 0x8800_0000 && matches!(priority & !MASK, 0x045d_19e3 | 0x055d_19e3 | 0x065d_19e3)
}

/// The value for the default marks.
const DEFAULT: u32 = 0xa800_0000;

impl FlowCodes {
    /// The codes of a table with these marks.
    pub const fn of(marks: FlowMarks) -> Self {
        if marks.mask() == FlowMarks::DEFAULT {
            return Self { value: DEFAULT };
        }
        // One of the other fourteen values. The lowest bits of marks that can be used side by side
        // differ.
        let value = 0x8800_0000 + marks.mask().trailing_zeros() % 14 * 0x0800_0000;
        Self { value: if value >= DEFAULT { value + 0x0800_0000 } else { value } }
    }

    /// On its way to the queue: a packet of a connection.
    pub const fn queued(self) -> u32 {
        self.value
    }

    /// On its way to the queue: a packet without a connection, or an ICMP error about one. A
    /// verdict can hold for the packet only.
    pub const fn alone(self) -> u32 {
        self.value | 0x0100_0000
    }

    /// The verdict accepts the connection.
    pub const fn accepted(self) -> u32 {
        self.value | 0x0200_0000
    }

    /// The verdict drops the connection.
    pub const fn dropped(self) -> u32 {
        self.value | 0x045d_19e3
    }

    /// The verdict rejects the connection.
    pub const fn rejected(self) -> u32 {
        self.value | 0x055d_19e3
    }

    /// The verdict rejects the packet alone.
    pub const fn rejected_packet(self) -> u32 {
        self.value | 0x065d_19e3
    }

    /// Whether a priority is a code of this table.
    pub const fn has(self, priority: u32) -> bool {
        priority & MASK == self.value
    }

    /// The packet's own priority.
    pub const fn original(self, priority: u32) -> u32 {
        if self.has(priority) { priority & ORIGINAL } else { priority }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_differ_and_are_told_from_ordinary_priorities() {
        for mask in [FlowMarks::DEFAULT, 7, 0xe000_0000, 0x0007_0000] {
            let codes = FlowCodes::of(FlowMarks::new(mask));
            let all = [
                codes.queued(),
                codes.alone(),
                codes.accepted(),
                codes.dropped(),
                codes.rejected(),
                codes.rejected_packet(),
            ];
            for (index, code) in all.into_iter().enumerate() {
                assert!(codes.has(code) && all[..index].iter().all(|other| other & CODE != code & CODE), "{code:#x}");
                assert_eq!(denies(code), index > 2, "{code:#x}");
            }
            for priority in [0, 7, 0x0001_0010, 0x00ff_ffff, 0x8001_0010] {
                assert!(!codes.has(priority) && !denies(priority), "{priority:#x}");
                assert_eq!(codes.original(priority), priority);
            }
            assert_eq!(codes.original(codes.queued() | 0x0001_0010), 0x0001_0010);
        }
    }

    #[test]
    fn other_marks_have_other_codes_than_the_default() {
        let default = FlowCodes::of(FlowMarks::default());
        assert_eq!((default.queued(), default.dropped()), (0xa800_0000, 0xac5d_19e3));
        for shift in 0..30 {
            for mask in [0b111, 0b1101, 0b1_0000_0011].map(|bits: u32| bits.rotate_left(shift)) {
                let codes = FlowCodes::of(FlowMarks::new(mask));
                assert_ne!(codes, default, "{mask:#x}");
                assert!((0x8800_0000..=0xf800_0000).contains(&codes.value) && codes.value & !MASK == 0);
            }
        }
    }

    #[test]
    fn marks_have_the_same_codes_only_if_their_lowest_bits_are_fourteen_apart() {
        let lowest = |shift: u32| [0b111, 0b1011, 0b1_0000_0001_0000_0001].map(move |bits: u64| (bits << shift) as u32);
        let usable = |mask: &u32| FlowMarks::new(*mask).check().is_ok();
        let mut pairs = 0;
        for (one, other) in (0..30).flat_map(|one| (0..30).map(move |other| (one, other))) {
            for (mask, another) in lowest(one).into_iter().flat_map(|mask| lowest(other).map(|another| (mask, another)))
            {
                if usable(&mask) && usable(&another) {
                    let same = FlowCodes::of(FlowMarks::new(mask)) == FlowCodes::of(FlowMarks::new(another));
                    assert_eq!(same, one % 14 == other % 14, "{mask:#x} {another:#x}");
                    pairs += 1;
                }
            }
        }
        assert!(pairs > 900);
        // Those of whole nibbles or bytes, and one behind the other.
        for distance in [3, 4, 8] {
            let values = (0..28).step_by(distance).map(|shift| FlowCodes::of(FlowMarks::new(7 << shift)).value);
            let mut values: Vec<u32> = values.collect();
            let count = values.len();
            values.sort();
            values.dedup();
            assert_eq!(values.len(), count, "{distance}");
        }
    }
}
