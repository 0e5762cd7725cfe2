//! How much memory the queue and its socket need. Pure.

use crate::{
    state::{Change, Limits},
    wire::config::{Config, CopyMode},
};

/// The limits that a configuration message changes.
pub(super) fn change_of(config: &Config) -> Change {
    let payload = config.copy.map(|copy| match copy {
        CopyMode::Metadata => 0,
        CopyMode::Packet(range) => range as usize,
    });
    Change { max_len: config.max_len, payload }
}

/// The limits of a queue that this message binds.
pub(super) fn limits_of(config: &Config) -> Limits {
    Limits { max_len: 0, payload: 0 }.after(change_of(config))
}

/// The receive buffer for a full queue and some replies, in bytes as the kernel accounts them.
pub(super) fn receive_buffer(limits: Limits, attributes: usize) -> usize {
    const REPLIES: usize = 64 * 1024;
    truesize(limits.payload, attributes).saturating_mul(limits.max_len as usize).saturating_add(REPLIES)
}

/// The most that the kernel accounts for one packet message (`skb->truesize`), in bytes.
///
/// `nfqnl_build_packet_message` allocates memory for the attributes and the linear part of the
/// packet (`skb_zerocopy_headlen`: all of a linear or reassembled packet). `__alloc_skb` adds
/// `skb_shared_info`, and `kmalloc_reserve` rounds up to a power of two, or uses a small head.
/// `skb_zerocopy` attaches the rest, which is accounted by its length. The maximum is either a
/// packet that is copied as a whole, or a packet with pages whose linear part just exceeds a power
/// of two, so that half of that memory is unused. Measured on 6.1, 6.12, 6.18 and 7.3 (x86-64):
/// never less than what was accounted, and at most 3 % more than the largest of the four.
fn truesize(payload: usize, attributes: usize) -> usize {
    /// `sizeof(struct sk_buff)`, aligned.
    const SKB: usize = 256;
    /// `sizeof(struct skb_shared_info)`, aligned.
    const SHARED: usize = 320;
    /// Message header and fixed attributes (124), user and group (16), timestamp (20), VLAN tag and
    /// link-layer header of a bridge (44).
    const FIXED: usize = 204;
    /// The largest small head (`SKB_SMALL_HEAD_CACHE_SIZE`: 576 or 704 by configuration; on 6.1
    /// kmalloc's 512).
    const SMALL: usize = 704;
    let fixed = FIXED + attributes;
    let copied = match (fixed + payload).next_multiple_of(64) + SHARED {
        ..=512 => return SKB + SMALL,
        size => size.next_power_of_two(),
    };
    // The next smaller allocation, and the shortest linear part that does not fit into it.
    let (room, head) =
        if copied == 1024 { (SMALL, 0) } else { (copied / 2, (copied / 4 - SHARED).saturating_sub(fixed)) };
    SKB + copied.max(room + payload - head.min(payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.18 accounted for the worst of linear, reassembled and paged packets, by copy
    /// range.
    const CHARGED: [(usize, usize); 12] = [
        (0, 832),
        (128, 1280),
        (528, 1332),
        (1500, 2663),
        (2000, 4352),
        (4000, 8448),
        (8000, 16_640),
        (16_000, 33_024),
        (32_000, 40_907),
        (48_000, 65_792),
        (60_000, 77_099),
        (65_531, 131_328),
    ];

    #[test]
    fn the_buffer_holds_a_full_queue_of_any_packets() {
        for (payload, charged) in CHARGED {
            let limits = Limits { max_len: 1024, payload };
            assert!(receive_buffer(limits, 0) >= 1024 * charged, "copy range {payload}");
            assert!(truesize(payload, 0) <= charged * 2, "copy range {payload}");
        }
        assert_eq!(truesize(65_531, 5000), 131_328);
    }

    #[test]
    fn a_longer_copy_range_never_needs_less() {
        for attributes in [0, 256, 640] {
            let sizes: Vec<usize> = (0..=65_531).map(|payload| truesize(payload, attributes)).collect();
            assert!(sizes.is_sorted());
        }
    }
}
