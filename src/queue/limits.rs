//! How much the queue and its socket may hold, and changing that while it runs.

use super::shared::{Phase, Shared, lock};
use crate::{
    Advice, Error, ErrorKind, KernelStats, Reconfigure,
    advice::advise,
    wire::config::{Config, CopyMode},
};

/// The limits in force.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_len: u32,
    /// Bytes of payload that a message may carry.
    pub(super) payload: usize,
}

impl Limits {
    /// Those of a configuration; what it does not name is as `before`.
    pub(super) fn of(config: &Config, before: Self) -> Self {
        let payload = match config.copy {
            None => before.payload,
            Some(CopyMode::Metadata) => 0,
            Some(CopyMode::Packet(range)) => range as usize,
        };
        Self { max_len: config.max_len.unwrap_or(before.max_len), payload }
    }

    /// A receive buffer in which a full queue finds room, and some answers beside.
    pub(super) fn buffer(&self) -> usize {
        const ANSWERS: usize = 64 * 1024;
        truesize(self.payload).saturating_mul(self.max_len as usize).saturating_add(ANSWERS)
    }
}

/// What the kernel charges a message for, by the packet bytes it carries (`skb->truesize`, measured on Linux 6.18): sizes
/// of the slab its memory comes from, and beyond a page the bytes themselves.
fn truesize(payload: usize) -> usize {
    match payload {
        0..=128 => 832,
        129..=528 => 1280,
        529..=1500 => 2304,
        longer => longer.max(1504) + 832,
    }
}

impl Shared {
    /// Changes settings, in one message. No packet is lost: what was queued stays, and what comes meanwhile is kept.
    pub(crate) fn reconfigure(&self, change: &Reconfigure) -> Result<(), Error> {
        let operation = || format!("reconfigure queue {}", self.settings.queue);
        let config =
            change.config().map_err(|what| Error::new(ErrorKind::InvalidInput, operation()).with_detail(what))?;
        let before = self.core().limits;
        let limits = Limits::of(&config, before);
        // Room first: longer messages may come before the answer does.
        lock(&self.inbox).set_payload(limits.payload.max(before.payload));
        if self.settings.receive_buffer.is_none() && limits.buffer() > self.socket.receive_buffer() {
            self.socket.set_receive_buffer(limits.buffer())?;
        }
        self.configure_if(Phase::Open, "reconfigure queue", &config).map_err(|error| self.explain(error, &config))?;
        self.core().limits = limits;
        Ok(())
    }

    /// The kernel's own account of the queue.
    pub(crate) fn kernel_stats(&self) -> Result<KernelStats, Error> {
        let operation = || format!("read statistics of queue {}", self.settings.queue);
        self.table.read(self.settings.queue)?.ok_or_else(|| Error::new(ErrorKind::Closed, operation()))
    }

    pub(crate) fn advice(&self) -> Vec<Advice> {
        let kernel = self.kernel_stats().ok();
        let wanted = self.settings.receive_buffer.unwrap_or_else(|| self.core().limits.buffer());
        advise(&self.stats(), kernel.as_ref(), wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_holds_a_full_queue() {
        assert!(Limits { max_len: 1024, payload: 65_531 }.buffer() >= 1024 * 66_335);
        assert!(Limits { max_len: 1024, payload: 128 }.buffer() >= 1024 * 832);
    }
}
