//! Encodes configuration messages. One message carries all settings of a queue, and the kernel
//! acknowledges it.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};

use super::{MAX_PAYLOAD, MESSAGE_CONFIG, writer::Writer};

/// A configuration message. Settings that are `None` stay unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// Binds or unbinds the queue (`NFQA_CFG_CMD`).
    pub command: Option<Command>,
    /// What to copy of each packet (`NFQA_CFG_PARAMS`).
    pub copy: Option<CopyMode>,
    /// How many packets the kernel queues at most (`NFQA_CFG_QUEUE_MAXLEN`).
    pub max_len: Option<u32>,
    /// A mask of the flags to change, and their new values.
    pub flags: Option<(u32, u32)>,
}

impl Config {
    /// Returns an error for values that the kernel would refuse or silently change.
    pub fn check(&self) -> Result<(), &'static str> {
        match (self.copy, self.max_len) {
            (Some(CopyMode::Packet(0)), _) => Err("copy range is 0; use copy_metadata to copy no payload"),
            (Some(CopyMode::Packet(range)), _) if range as usize > MAX_PAYLOAD => {
                Err("copy range is more than 65531 bytes")
            }
            (_, Some(0)) => Err("max_len is 0; the queue must hold at least 1 packet"),
            _ => Ok(()),
        }
    }

    /// Appends the message to `buffer`. The kernel applies or refuses the message as a whole, and
    /// replies in both cases.
    pub fn encode(&self, buffer: &mut Vec<u8>, sequence: u32, queue: u16) {
        let mut message = Writer::begin(buffer, MESSAGE_CONFIG, NLM_F_REQUEST | NLM_F_ACK, sequence, queue);
        if let Some(command) = self.command {
            // struct nfqnl_msg_config_cmd: command, padding, protocol family (unused since 3.8).
            message.attribute(ATTRIBUTE_COMMAND, &[command as u8, 0, 0, 0]);
        }
        if let Some(copy) = self.copy {
            // struct nfqnl_msg_config_params, packed: copy_range, copy_mode.
            let (range, mode) = match copy {
                CopyMode::Metadata => (0, 1),
                CopyMode::Packet(range) => (range, 2),
            };
            let [a, b, c, d] = u32::to_be_bytes(range);
            message.attribute(ATTRIBUTE_PARAMS, &[a, b, c, d, mode]);
        }
        if let Some(max_len) = self.max_len {
            message.attribute_be32(ATTRIBUTE_MAX_LEN, max_len);
        }
        if let Some((mask, flags)) = self.flags {
            message.attribute_be32(ATTRIBUTE_MASK, mask);
            message.attribute_be32(ATTRIBUTE_FLAGS, flags);
        }
        message.finish();
    }
}

/// The commands (`NFQNL_CFG_CMD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Bind the socket to the queue.
    Bind = 1,
    /// Unbind the queue. The kernel drops the packets in it.
    Unbind = 2,
    /// `PF_BIND`. It concerns no queue and does nothing since Linux 3.8; the kernel checks the
    /// capability, as for every message.
    Nothing = 3,
}

/// How much of each packet the kernel copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMode {
    /// Only metadata (`NFQNL_COPY_META`).
    Metadata,
    /// Metadata, and the payload up to this number of bytes (`NFQNL_COPY_PACKET`).
    Packet(u32),
}

impl CopyMode {
    /// The payload up to this number of bytes. As in the kernel (`nfqnl_set_mode`), 0 and more than
    /// [`MAX_PAYLOAD`] are as much as there can be.
    pub fn payload(bytes: u32) -> Self {
        let most = MAX_PAYLOAD as u32;
        Self::Packet(if bytes == 0 { most } else { bytes.min(most) })
    }
}

// enum nfqnl_attr_config
pub(super) const ATTRIBUTE_COMMAND: u16 = 1;
pub(super) const ATTRIBUTE_PARAMS: u16 = 2;
pub(super) const ATTRIBUTE_MAX_LEN: u16 = 3;
pub(super) const ATTRIBUTE_MASK: u16 = 4;
pub(super) const ATTRIBUTE_FLAGS: u16 = 5;

// The flags of a queue.
/// Accepts packets that find the queue full, instead of dropping them (`NFQA_CFG_F_FAIL_OPEN`).
pub const FLAG_FAIL_OPEN: u32 = 1;
/// Sends connection tracking entries with packets (`NFQA_CFG_F_CONNTRACK`).
pub const FLAG_CONNTRACK: u32 = 1 << 1;
/// Queues segmentation offload packets whole, instead of in segments (`NFQA_CFG_F_GSO`).
pub const FLAG_GSO: u32 = 1 << 2;
/// Sends the user and group ids of local senders (`NFQA_CFG_F_UID_GID`).
pub const FLAG_UID_GID: u32 = 1 << 3;
/// Sends the security contexts of local senders (`NFQA_CFG_F_SECCTX`).
pub const FLAG_SECURITY_CONTEXT: u32 = 1 << 4;
/// All of these flags.
pub const FLAGS_ALL: u32 = FLAG_FAIL_OPEN | FLAG_CONNTRACK | FLAG_GSO | FLAG_UID_GID | FLAG_SECURITY_CONTEXT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_ranges_are_limited_as_by_the_kernel() {
        for (wanted, expected) in [(0, 65_531), (1, 1), (65_531, 65_531), (65_532, 65_531), (u32::MAX, 65_531)] {
            assert_eq!(CopyMode::payload(wanted), CopyMode::Packet(expected));
        }
    }

    #[test]
    fn one_message_carries_all_settings() {
        let mut buffer = Vec::new();
        let config = Config {
            command: Some(Command::Bind),
            copy: Some(CopyMode::Packet(0xffff)),
            max_len: Some(1024),
            flags: Some((FLAGS_ALL, FLAG_GSO)),
        };
        config.encode(&mut buffer, 7, 0x0102);
        #[rustfmt::skip]
        let mut expected = vec![
            0x01, 0x02, // the queue number, big-endian, at the end of the nfgenmsg
            8, 0, 1, 0, 1, 0, 0, 0,
            9, 0, 2, 0, 0, 0, 0xff, 0xff, 2, 0, 0, 0,
            8, 0, 3, 0, 0, 0, 4, 0,
            8, 0, 4, 0, 0, 0, 0, 0x1f,
            8, 0, 5, 0, 0, 0, 0, 4,
        ];
        let length = 18 + expected.len() as u8;
        let mut head = vec![length, 0, 0, 0, 2, 3, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        head.append(&mut expected);
        if cfg!(target_endian = "little") {
            assert_eq!(buffer, head);
        }
        assert_eq!(buffer.len(), usize::from(length));
    }

    #[test]
    fn absent_settings_are_not_sent() {
        let mut buffer = Vec::new();
        Config { command: Some(Command::Unbind), ..Config::default() }.encode(&mut buffer, 1, 3);
        assert_eq!(buffer.len(), 16 + 4 + 8);
    }
}
