//! Changes to the settings of a bound queue.

use crate::wire::config::{
    Config, CopyMode, FLAG_CONNTRACK, FLAG_FAIL_OPEN, FLAG_GSO, FLAG_SECURITY_CONTEXT, FLAG_UID_GID,
};

/// Changes to the settings of a bound queue, for
/// [`VerdictSink::reconfigure`](crate::VerdictSink::reconfigure). Settings that are not named keep
/// their values. [`QueueBuilder`](crate::QueueBuilder) explains each setting.
#[derive(Debug, Clone, Copy, Default)]
#[must_use = "nothing changes until it is given to `VerdictSink::reconfigure`"]
pub struct Reconfigure {
    copy: Option<CopyMode>,
    max_len: Option<u32>,
    receive_buffer: Option<usize>,
    mask: u32,
    flags: u32,
}

impl Reconfigure {
    /// No change.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`QueueBuilder::copy_range`](crate::QueueBuilder::copy_range), in bytes.
    pub fn copy_range(mut self, bytes: u32) -> Self {
        self.copy = Some(CopyMode::payload(bytes));
        self
    }

    /// As [`QueueBuilder::copy_metadata`](crate::QueueBuilder::copy_metadata).
    pub fn copy_metadata(mut self) -> Self {
        self.copy = Some(CopyMode::Metadata);
        self
    }

    /// As [`QueueBuilder::max_len`](crate::QueueBuilder::max_len), in packets. Packets queued
    /// beyond a new, shorter length stay queued.
    pub fn max_len(mut self, packets: u32) -> Self {
        self.max_len = Some(packets.max(1));
        self
    }

    /// As [`QueueBuilder::receive_buffer`](crate::QueueBuilder::receive_buffer), in bytes. Must not
    /// be 0. Afterwards this size stays, whatever `max_len` and the copy range are.
    ///
    /// What is in a buffer that becomes smaller stays there. It is changed first: a kernel that
    /// refuses another setting of the same change has this size nevertheless.
    #[doc(alias = "SO_RCVBUF")]
    pub fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = Some(bytes);
        self
    }

    /// As [`QueueBuilder::fail_open`](crate::QueueBuilder::fail_open).
    pub fn fail_open(self, on: bool) -> Self {
        self.flag(FLAG_FAIL_OPEN, on)
    }

    /// As [`QueueBuilder::gso`](crate::QueueBuilder::gso).
    pub fn gso(self, on: bool) -> Self {
        self.flag(FLAG_GSO, on)
    }

    /// As [`QueueBuilder::uid_gid`](crate::QueueBuilder::uid_gid).
    pub fn uid_gid(self, on: bool) -> Self {
        self.flag(FLAG_UID_GID, on)
    }

    /// As [`QueueBuilder::security_context`](crate::QueueBuilder::security_context).
    pub fn security_context(self, on: bool) -> Self {
        self.flag(FLAG_SECURITY_CONTEXT, on)
    }

    /// As [`QueueBuilder::conntrack`](crate::QueueBuilder::conntrack).
    pub fn conntrack(self, on: bool) -> Self {
        self.flag(FLAG_CONNTRACK, on)
    }

    fn flag(mut self, flag: u32, on: bool) -> Self {
        self.mask |= flag;
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
        self
    }

    /// The message and the receive buffer, if the values are valid.
    pub(crate) fn changes(&self) -> Result<(Config, Option<usize>), &'static str> {
        if self.receive_buffer == Some(0) {
            return Err("receive buffer is 0");
        }
        let flags = (self.mask != 0).then_some((self.mask, self.flags));
        let config = Config { command: None, copy: self.copy, max_len: self.max_len, flags };
        config.check()?;
        Ok((config, self.receive_buffer))
    }
}
