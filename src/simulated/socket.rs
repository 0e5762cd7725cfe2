//! A netlink socket as a pure model: what waits in it, and what it is charged.

use std::collections::VecDeque;

use bytes::BytesMut;
use rustix::io::Errno;

/// A netlink socket of a program.
#[derive(Debug)]
pub(super) struct Socket {
    /// Datagrams, and what each is charged.
    inbox: VecDeque<(Vec<u8>, usize)>,
    charged: usize,
    limit: usize,
    /// NETLINK_NO_ENOBUFS
    no_enobufs: bool,
    congested: bool,
    overrun: bool,
    /// Its queues have flow marks. No message of the program says that.
    pub(super) flow_marks: Option<crate::types::FlowMarks>,
    /// Memory for the next messages.
    spare: Vec<Vec<u8>>,
}

impl Socket {
    pub(super) fn new(no_enobufs: bool, flow_marks: Option<crate::types::FlowMarks>) -> Self {
        Self {
            inbox: VecDeque::new(),
            charged: 0,
            limit: DEFAULT_RECEIVE_BUFFER,
            no_enobufs,
            congested: false,
            overrun: false,
            flow_marks,
            spare: Vec::new(),
        }
    }

    /// Returns the resulting size.
    pub(super) fn set_receive_buffer(&mut self, bytes: usize) -> usize {
        self.limit = (bytes & !1).max(SMALLEST_RECEIVE_BUFFER);
        self.limit
    }

    pub(super) fn is_empty(&self) -> bool {
        self.inbox.is_empty()
    }

    pub(super) fn has_overrun(&self) -> bool {
        self.overrun
    }

    pub(super) fn is_readable(&self) -> bool {
        self.overrun || !self.inbox.is_empty()
    }

    /// `netlink_recvmsg`: appends a datagram to `room`, up to its capacity.
    pub(super) fn receive(&mut self, room: &mut BytesMut) -> Result<(), Errno> {
        if std::mem::take(&mut self.overrun) {
            return Err(Errno::NOBUFS);
        }
        let (bytes, charge) = self.inbox.pop_front().ok_or(Errno::AGAIN)?;
        let length = bytes.len().min(room.capacity() - room.len());
        room.extend_from_slice(&bytes[..length]);
        self.charged -= charge;
        // netlink_rcv_wake
        self.congested &= !self.inbox.is_empty();
        if self.spare.len() < MOST_SPARE && bytes.capacity() <= LONGEST_SPARE {
            self.spare.push(bytes);
        }
        Ok(())
    }

    /// `netlink_attachskb`: whether the message found room.
    pub(super) fn deliver(&mut self, fill: impl FnOnce(&mut Vec<u8>), charge: usize) -> bool {
        if self.congested || self.charged > 0 && self.charged + charge > self.limit {
            // netlink_overrun
            if !self.no_enobufs && !self.congested {
                self.congested = true;
                self.overrun = true;
            }
            return false;
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        fill(&mut bytes);
        self.charged += charge;
        self.inbox.push_back((bytes, charge));
        true
    }
}

/// `net.core.rmem_default`
const DEFAULT_RECEIVE_BUFFER: usize = 212_992;
/// `SOCK_MIN_RCVBUF`
const SMALLEST_RECEIVE_BUFFER: usize = 2304;
/// Buffers that are kept for the next messages: 4 MiB at most.
const MOST_SPARE: usize = 1024;
const LONGEST_SPARE: usize = 4096;
