//! How much the queue and its socket may hold, and changing that while it runs.

use std::{future::Future, sync::Arc};

use super::{
    outbox::TRIES_OF_A_SETTING,
    shared::{Answer, Shared, lock},
};
use crate::{
    Advice, Error, ErrorKind, KernelStats, Reconfigure,
    advice::advise,
    state::Limits,
    wire::config::{Config, CopyMode},
};

/// The limits that a configuration says; what it does not name is as `before`.
pub(super) fn limits_of(config: &Config, before: Limits) -> Limits {
    let payload = match config.copy {
        None => before.payload,
        Some(CopyMode::Metadata) => 0,
        Some(CopyMode::Packet(range)) => range as usize,
    };
    Limits { max_len: config.max_len.unwrap_or(before.max_len), payload }
}

/// A receive buffer in which a full queue finds room, and some answers beside. In bytes, as the kernel charges them.
pub(super) fn receive_buffer(limits: Limits, attributes: usize) -> usize {
    const ANSWERS: usize = 64 * 1024;
    truesize(limits.payload, attributes).saturating_mul(limits.max_len as usize).saturating_add(ANSWERS)
}

/// The most that the kernel charges a socket's buffer for one packet message (`skb->truesize`), in bytes.
///
/// `nfqnl_build_packet_message` allocates room for the attributes and the packet's linear part (`skb_zerocopy_headlen`: all of
/// a linear or reassembled packet). `__alloc_skb` adds `skb_shared_info`, and `kmalloc_reserve` rounds up to a power of two,
/// or takes a small head. What does not fit is attached by `skb_zerocopy` and charged by its length. The most is either a
/// packet that is copied whole, or one whose linear part just crosses a step, so that half of its memory is unused, with pages
/// behind. Measured on 6.1, 6.12, 6.18 and 7.3 (x86-64): never below what was charged, and at most 3 % above the largest
/// charge of the four.
fn truesize(payload: usize, attributes: usize) -> usize {
    /// `sizeof(struct sk_buff)`, aligned.
    const SKB: usize = 256;
    /// `sizeof(struct skb_shared_info)`, aligned.
    const SHARED: usize = 320;
    /// Message header and fixed attributes (124), user and group (16), timestamp (20), a bridge's VLAN tag and link-layer
    /// header (44).
    const FIXED: usize = 204;
    /// Largest small head seen (`SKB_SMALL_HEAD_CACHE_SIZE`: 576 or 704 by configuration; 6.1 has kmalloc's 512).
    const SMALL: usize = 704;
    let fixed = FIXED + attributes;
    let copied = match (fixed + payload).next_multiple_of(64) + SHARED {
        ..=512 => return SKB + SMALL,
        size => size.next_power_of_two(),
    };
    // The next smaller allocation, and the least linear part that needs it.
    let (room, head) =
        if copied == 1024 { (SMALL, 0) } else { (copied / 2, (copied / 4 - SHARED).saturating_sub(fixed)) };
    SKB + copied.max(room + payload - head.min(payload))
}

impl Shared {
    /// Changes settings, in one message, which is sent before this returns. No packet is lost: what was queued stays, and
    /// what comes meanwhile is kept.
    pub(crate) fn reconfigure(
        self: &Arc<Self>,
        change: &Reconfigure,
    ) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let shared = Arc::clone(self);
        let begun = self.begin_reconfigure(change);
        async move {
            let result = match begun {
                Ok((config, answer)) => shared.finish_reconfigure(config, answer).await,
                Err(error) => Err(error),
            };
            shared.trace.reconfigured(&result);
            result
        }
    }

    fn begin_reconfigure(&self, change: &Reconfigure) -> Result<(Config, Answer), Error> {
        let config = change.config().map_err(|what| {
            let error = Error::new(ErrorKind::InvalidInput, format!("reconfigure queue {}", self.settings.queue));
            error.with_detail(what)
        })?;
        let limits = limits_of(&config, self.core().machine.limits());
        // Room first: longer messages may come before the answer does. Neither ever becomes less, so that changes made at
        // the same time need no order between them.
        lock(&self.inbox).grow(limits.payload);
        if self.settings.receive_buffer.is_none() {
            self.socket.grow_receive_buffer(receive_buffer(limits, self.settings.attributes))?;
        }
        let answer = self.begin_configure(RECONFIGURE, &config, true)?;
        Ok((config, answer))
    }

    async fn finish_reconfigure(&self, config: Config, mut answer: Answer) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            let result = std::future::poll_fn(|cx| self.poll_answer(&mut answer, cx)).await;
            let result = result.unwrap_or_else(|| Err(Error::new(ErrorKind::Unconfirmed, RECONFIGURE)));
            match result {
                Err(error) if error.kind() == ErrorKind::Unconfirmed && tries < TRIES_OF_A_SETTING => {
                    // The answer was lost. To set the same once more does no harm, and brings another.
                    tries += 1;
                    answer = self.begin_configure(RECONFIGURE, &config, true)?;
                }
                result => {
                    let named = |error: Error| error.with_operation(format!("{RECONFIGURE} {}", self.settings.queue));
                    return result.map_err(|error| self.explain(named(error), &config));
                }
            }
        }
    }

    /// The kernel's own account of the queue.
    pub(crate) fn kernel_stats(&self) -> Result<KernelStats, Error> {
        self.table.read(self.settings.queue)?.ok_or_else(|| self.closed("read statistics of queue"))
    }

    pub(crate) fn advice(&self) -> Vec<Advice> {
        let kernel = match self.table.read(self.settings.queue) {
            Ok(kernel) => Ok(kernel),
            Err(error) => Err(error.raw_os_error()),
        };
        let limits = self.core().machine.limits();
        let wanted = self.settings.receive_buffer.unwrap_or_else(|| receive_buffer(limits, self.settings.attributes));
        advise(&self.stats(), kernel, wanted)
    }
}

const RECONFIGURE: &str = "reconfigure queue";

#[cfg(test)]
mod tests {
    use super::*;

    /// What was charged for the worst of linear, reassembled and paged packets on Linux 6.18, by the copy range.
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
    fn the_buffer_holds_a_full_queue_of_whatever_packets() {
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
