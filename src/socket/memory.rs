//! Receive memory: pooled, reference-counted, handed out as [`Bytes`].
//!
//! A datagram's size is known only once it has been received, and it may be 64 KiB, so it is received where there is
//! room for the longest. A long one is handed out from there without a copy. A shorter one is copied close to its
//! neighbours of like size: a packet that somebody holds keeps 8 KiB alive at most, or 32 KiB if it is longer than 2 KiB,
//! not the landing buffer. The copy costs less than a second I/O vector would (1400 bytes: nothing measurable beside the
//! receive itself).

use std::{collections::VecDeque, os::fd::AsFd};

use bytes::{Bytes, BytesMut};

use crate::{state::Place, sys};

/// Datagrams up to this many bytes lie in small buffers.
const SHORT: usize = 2048;
const SMALL_BUFFER: usize = 8 * 1024;
/// Datagrams up to this many bytes lie in large buffers; what is longer stays where it landed.
const MIDDLE: usize = 16 * 1024;
const LARGE_BUFFER: usize = 32 * 1024;
/// Room for attributes beside the payload: conntrack and security contexts are the long ones.
const ATTRIBUTES: usize = 8 * 1024;

/// The memory of one receiver.
#[derive(Debug)]
pub(crate) struct Memory {
    landing: Pool,
    small: Pool,
    large: Pool,
    longest: usize,
}

impl Memory {
    /// For payloads of up to `payload` bytes.
    pub(crate) fn new(payload: usize) -> Self {
        let longest = payload + ATTRIBUTES;
        Self {
            landing: Pool::new(longest, 32),
            small: Pool::new(SMALL_BUFFER, 256),
            large: Pool::new(LARGE_BUFFER, 32),
            longest,
        }
    }

    /// From now on for payloads of up to `payload` bytes, or of as many as before if that is more. What was received last
    /// must have been taken.
    pub(crate) fn grow(&mut self, payload: usize) {
        let longest = payload + ATTRIBUTES;
        if longest > self.longest {
            self.landing = Pool::new(longest, 32);
            self.longest = longest;
        }
    }

    /// Receives one datagram, and tells its own length, also where not all of it was received.
    pub(super) fn receive(&mut self, socket: impl AsFd) -> rustix::io::Result<usize> {
        self.landing.current.clear();
        sys::receive(socket, self.landing.room(self.longest))
    }

    /// What was received last.
    pub(crate) fn received(&self) -> &[u8] {
        &self.landing.current
    }

    /// Takes what was received last, and tells where it lies.
    pub(crate) fn take(&mut self) -> (Bytes, Place) {
        let landing = &mut self.landing.current;
        let (number, pool) = if landing.len() <= SHORT {
            (0, &mut self.small)
        } else if landing.len() <= MIDDLE {
            (1, &mut self.large)
        } else {
            let place = Place::Own { bytes: landing.capacity() as u32 };
            return (landing.split().freeze(), place);
        };
        let buffer = pool.room(landing.len());
        buffer.extend_from_slice(landing);
        let bytes = buffer.split().freeze();
        (bytes, Place::Shared { pool: number, buffer: pool.number, bytes: pool.size as u32 })
    }
}

/// Buffers of one size, used again once nobody holds a part of them.
#[derive(Debug)]
struct Pool {
    size: usize,
    current: BytesMut,
    /// Of the current buffer, counted from one to the next.
    number: u32,
    /// Buffers used up, oldest first. What is handed out of them keeps them alive; a handle here lets them be found again.
    used: VecDeque<BytesMut>,
    keep: usize,
}

impl Pool {
    fn new(size: usize, keep: usize) -> Self {
        Self { size, current: BytesMut::with_capacity(size), number: 0, used: VecDeque::new(), keep }
    }

    /// A buffer with at least `length` bytes free.
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

    /// A used buffer that nobody holds a part of any more. Looks at a few of the oldest, for some may be held for long.
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

    fn receive(memory: &mut Memory, bytes: &[u8]) -> (Bytes, Place) {
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::empty(), None).unwrap();
        assert_eq!(send(here, bytes, SendFlags::empty()), Ok(bytes.len()));
        assert_eq!(memory.receive(there), Ok(bytes.len()));
        assert_eq!(memory.received(), bytes);
        memory.take()
    }

    #[test]
    fn what_was_handed_out_stays_as_it_was() {
        let mut memory = Memory::new(65_531);
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
        let mut memory = Memory::new(65_531);
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
        // 100 000 packets are 80 MB; what is touched is the landing buffers and a few of the small ones.
        assert!(addresses.len() < 100, "{} pieces of 64 KiB touched", addresses.len());
    }

    #[test]
    fn what_a_held_packet_keeps_alive_is_told() {
        let mut memory = Memory::new(65_531);
        let mut kept = |length: usize| match receive(&mut memory, &vec![0; length]).1 {
            Place::Own { bytes } | Place::Shared { bytes, .. } => bytes as usize,
            Place::Nowhere => 0,
        };
        assert_eq!(kept(100), SMALL_BUFFER);
        assert_eq!(kept(5_000), LARGE_BUFFER);
        assert!((65_000..65_531 + 2 * ATTRIBUTES).contains(&kept(65_000)));
    }
}
