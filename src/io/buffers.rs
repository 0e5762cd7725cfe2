//! Pooled, reference-counted memory for received datagrams, handed out as [`Bytes`].
//!
//! The size of a datagram is known only after it has been received, and it may be 64 KiB. So it is
//! received into a landing buffer for the longest datagram. A long datagram is handed out from
//! there without a copy. A shorter one is copied next to others of similar size: a held packet then
//! keeps 8 KiB allocated, or 32 KiB if it is longer than 2 KiB, instead of the landing buffer. The
//! copy costs less than a second I/O vector (for 1400 bytes the cost is not measurable).

use std::{collections::VecDeque, os::fd::AsFd};

use bytes::{Bytes, BytesMut};

use super::sys;
use crate::state::Storage;

/// Datagrams of up to this many bytes are stored in small buffers.
const SHORT: usize = 2048;
const SMALL_BUFFER: usize = 8 * 1024;
/// Datagrams of up to this many bytes are stored in large buffers. Longer ones stay in the landing
/// buffer.
const MIDDLE: usize = 16 * 1024;
const LARGE_BUFFER: usize = 32 * 1024;
/// Space for attributes in addition to the payload; conntrack and security contexts are the
/// longest.
const ATTRIBUTES: usize = 8 * 1024;

/// The buffers of one receiver.
#[derive(Debug)]
pub(crate) struct BufferPool {
    landing: Buffers,
    /// For the second of two datagrams.
    second: Buffers,
    small: Buffers,
    large: Buffers,
    longest: usize,
}

impl BufferPool {
    /// For payloads of up to `payload` bytes.
    pub(crate) fn new(payload: usize) -> Self {
        let longest = payload + ATTRIBUTES;
        Self {
            landing: Buffers::new(longest, 32),
            second: Buffers::new(longest, 32),
            small: Buffers::new(SMALL_BUFFER, 256),
            large: Buffers::new(LARGE_BUFFER, 32),
            longest,
        }
    }

    /// Makes room for payloads of up to `payload` bytes; it never shrinks. The last datagram must
    /// have been taken.
    pub(crate) fn grow(&mut self, payload: usize) {
        let longest = payload + ATTRIBUTES;
        if longest > self.longest {
            self.landing = Buffers::new(longest, 32);
            self.second = Buffers::new(longest, 32);
            self.longest = longest;
        }
    }

    /// The longest payload for which there is room, in bytes.
    pub(super) fn payload(&self) -> usize {
        self.longest - ATTRIBUTES
    }

    /// Receives one datagram. Returns its full length, even if the buffer was shorter.
    pub(super) fn receive(&mut self, socket: impl AsFd) -> rustix::io::Result<usize> {
        sys::receive(socket, self.landing())
    }

    /// Receives up to two datagrams. Returns how many, at least one; then the first one is the last
    /// [received](Self::received).
    pub(super) fn receive_two(&mut self, socket: impl AsFd) -> rustix::io::Result<usize> {
        sys::receive_two(socket, self.landings())
    }

    /// The empty buffers for the next two datagrams.
    pub(super) fn landings(&mut self) -> [&mut BytesMut; 2] {
        [&mut self.landing, &mut self.second].map(|buffers| {
            buffers.current.clear();
            buffers.room(self.longest)
        })
    }

    /// The second of two datagrams is the last received from now on.
    pub(super) fn turn_to_second(&mut self) {
        std::mem::swap(&mut self.landing, &mut self.second);
    }

    /// The empty buffer for the next datagram.
    pub(super) fn landing(&mut self) -> &mut BytesMut {
        self.landing.current.clear();
        self.landing.room(self.longest)
    }

    /// The last received datagram.
    pub(crate) fn received(&self) -> &[u8] {
        &self.landing.current
    }

    /// Takes the last received datagram, and returns where it is stored.
    pub(crate) fn take(&mut self) -> (Bytes, Storage) {
        let landing = &mut self.landing.current;
        let (number, pool) = if landing.len() <= SHORT {
            (0, &mut self.small)
        } else if landing.len() <= MIDDLE {
            (1, &mut self.large)
        } else {
            let storage = Storage::Own { bytes: landing.capacity() as u32 };
            return (landing.split().freeze(), storage);
        };
        let buffer = pool.room(landing.len());
        buffer.extend_from_slice(landing);
        let bytes = buffer.split().freeze();
        (bytes, Storage::Shared { pool: number, buffer: pool.number, bytes: pool.size as u32 })
    }
}

/// Buffers of one size, reused when no part of them is held any more.
#[derive(Debug)]
struct Buffers {
    size: usize,
    current: BytesMut,
    /// The number of the current buffer; buffers are counted.
    number: u32,
    /// Full buffers, oldest first. What has been handed out of them keeps them allocated; the
    /// handles here are for reuse.
    used: VecDeque<BytesMut>,
    keep: usize,
}

impl Buffers {
    fn new(size: usize, keep: usize) -> Self {
        Self { size, current: BytesMut::with_capacity(size), number: 0, used: VecDeque::new(), keep }
    }

    /// A buffer with at least `length` free bytes.
    fn room(&mut self, length: usize) -> &mut BytesMut {
        if self.current.capacity() - self.current.len() < length {
            let next = self.recycled().unwrap_or_else(|| BytesMut::with_capacity(self.size));
            self.number = self.number.wrapping_add(1);
            self.used.push_back(std::mem::replace(&mut self.current, next));
            if self.used.len() > self.keep {
                self.used.pop_front();
            }
        }
        &mut self.current
    }

    /// A full buffer of which no part is held any more. Checks some of the oldest, because a buffer
    /// may be held for long.
    fn recycled(&mut self) -> Option<BytesMut> {
        for _ in 0..self.used.len().min(4) {
            let mut oldest = self.used.pop_front()?;
            oldest.clear();
            if oldest.try_reclaim(self.size) {
                return Some(oldest);
            }
            self.used.push_back(oldest);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    use super::*;

    fn receive(memory: &mut BufferPool, bytes: &[u8]) -> (Bytes, Storage) {
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::empty(), None).unwrap();
        assert_eq!(send(here, bytes, SendFlags::empty()), Ok(bytes.len()));
        assert_eq!(memory.receive(there), Ok(bytes.len()));
        assert_eq!(memory.received(), bytes);
        memory.take()
    }

    #[test]
    fn received_bytes_do_not_change_when_buffers_are_reused() {
        let mut memory = BufferPool::new(65_531);
        let length = |i: usize| match i % 50 {
            0 => 60_000,
            1 => 5_000,
            _ => 20 + i % 1500,
        };
        let datagrams: Vec<Vec<u8>> = (0..2000usize).map(|i| vec![i as u8; length(i)]).collect();
        let held: Vec<Bytes> = datagrams.iter().map(|bytes| receive(&mut memory, bytes).0).collect();
        for (held, datagram) in held.iter().zip(&datagrams) {
            assert_eq!(held[..], datagram[..]);
        }
    }

    #[test]
    fn buffers_are_used_again() {
        let mut memory = BufferPool::new(65_531);
        let mut addresses = std::collections::HashSet::new();
        let mut last = VecDeque::new();
        for i in 0..100_000usize {
            let (bytes, _) = receive(&mut memory, &vec![i as u8; if i % 100 == 0 { 65_000 } else { 200 }]);
            addresses.insert(bytes.as_ptr() as usize / (64 * 1024));
            last.push_back(bytes);
            if last.len() > 64 {
                last.pop_front();
            }
        }
        // 100 000 packets are 80 MB, but only the landing buffers and some of the small ones are
        // touched.
        assert!(addresses.len() < 100, "{} pieces of 64 KiB touched", addresses.len());
    }

    #[test]
    fn the_memory_of_held_packets_is_reported() {
        let mut memory = BufferPool::new(65_531);
        let mut kept = |length: usize| match receive(&mut memory, &vec![0; length]).1 {
            Storage::Own { bytes } | Storage::Shared { bytes, .. } => bytes as usize,
            Storage::None => 0,
        };
        assert_eq!(kept(100), SMALL_BUFFER);
        assert_eq!(kept(5_000), LARGE_BUFFER);
        assert!((65_000..65_531 + 2 * ATTRIBUTES).contains(&kept(65_000)));
    }
}
