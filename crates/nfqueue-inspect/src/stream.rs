//! The first bytes of one client, and the rule that each of them has one value.

use crate::{progress::Reason, segment::Segment};

/// The first bytes of a client, without gaps. Every segment that was accepted and carries one of
/// them carries the same value.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    bytes: Vec<u8>,
    /// A FIN behind them was accepted. If the server has ignored it, a client could continue.
    ended: bool,
}

/// What a segment has done to an undecided stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Added {
    /// The segment has more bytes than can be stored.
    pub(crate) full: bool,
    /// It ends the stream.
    pub(crate) ended: bool,
}

/// The smallest allocation for bytes. Most ClientHellos fit into one to four of them.
const SMALLEST: usize = 512;

impl Stream {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many numbers the bytes take, and the FIN behind them.
    pub(crate) fn numbers(&self) -> u32 {
        self.bytes.len() as u32 + u32::from(self.ended)
    }

    /// What is allocated.
    pub(crate) fn memory(&self) -> usize {
        self.bytes.capacity()
    }

    /// Forgets what is not needed to compare.
    pub(crate) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
    }

    /// A segment of an undecided connection whose first byte has the sequence number `first`.
    /// `None`: it carries nothing of the stream.
    pub(crate) fn add(&mut self, first: u32, segment: &Segment<'_>, most: usize) -> Result<Option<Added>, Reason> {
        let Segment { payload, flags, .. } = segment;
        // The server takes the urgent byte out of the stream, and which byte that is depends on the
        // server. A pointer without payload concerns a later segment.
        if flags.urg {
            return Err(Reason::Urgent);
        }
        if payload.is_empty() && !flags.fin {
            return Ok(None);
        }
        let offset = segment.sequence.wrapping_sub(first) as i32;
        let offset = usize::try_from(offset).map_err(|_| Reason::BeforeStart)?;
        let seen = self.bytes.get(offset..).ok_or(Reason::Gap)?;
        let (again, new) = payload.split_at(payload.len().min(seen.len()));
        if !seen.starts_with(again) || (flags.fin && payload.len() < seen.len()) || (self.ended && !new.is_empty()) {
            return Err(Reason::Conflict);
        }
        let stored = new.len().min(most - self.bytes.len());
        self.reserve(stored, most);
        self.bytes.extend_from_slice(&new[..stored]);
        self.ended |= flags.fin && stored == new.len();
        Ok(Some(Added { full: stored < new.len(), ended: flags.fin }))
    }

    /// A segment of an allowed connection: whether it leaves the stored bytes as they are.
    pub(crate) fn check(&self, first: u32, segment: &Segment<'_>) -> Result<(), Reason> {
        let Segment { payload, flags, .. } = segment;
        let begin = i64::from(segment.sequence.wrapping_sub(first) as i32);
        let (end, length) = (begin + payload.len() as i64, self.bytes.len() as i64);
        if self.ended && (end > length || (flags.fin && end != length)) {
            return Err(Reason::Conflict);
        }
        if begin >= length {
            return Ok(());
        }
        if flags.urg {
            return Err(Reason::Urgent);
        }
        if flags.fin && (0..length).contains(&end) {
            return Err(Reason::Conflict);
        }
        let (from, to) = (begin.max(0), end.min(length));
        if from >= to {
            return Ok(());
        }
        let stored = &self.bytes[from as usize..to as usize];
        let carried = &payload[(from - begin) as usize..(to - begin) as usize];
        if stored == carried { Ok(()) } else { Err(Reason::Conflict) }
    }

    /// Doubles, so that a client that sends single bytes costs little, but not beyond `most`.
    fn reserve(&mut self, more: usize, most: usize) {
        let wanted = self.bytes.len() + more;
        if wanted > self.bytes.capacity() {
            let capacity = wanted.max(self.bytes.capacity() * 2).max(SMALLEST).min(most);
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
    }
}
