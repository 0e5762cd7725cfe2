//! The CRYPTO stream of a client, whose pieces come in any order.

use crate::{limits::MOST_BYTES, progress::Reason};

/// Pieces of a stream. Every piece that was accepted agrees with the others about the bytes they
/// have in common.
#[derive(Debug, Default)]
pub(super) struct Crypto {
    bytes: Vec<u8>,
    /// The bytes that are there: begin and end of ranges that do not touch, in their order.
    ranges: Vec<(usize, usize)>,
}

/// More gaps than this are refused. Chrome cuts a ClientHello into some ten pieces.
const MOST_RANGES: usize = 64;

/// Why a piece is not added.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The piece must be dropped.
    Drop(Reason),
    /// The stream is too long, or in too many pieces.
    TooLong,
}

impl Crypto {
    /// The bytes from the first one to the first gap.
    pub(super) fn prefix(&self) -> &[u8] {
        match self.ranges.first() {
            Some((0, end)) => &self.bytes[..*end],
            _ => &[],
        }
    }

    pub(super) fn memory(&self) -> usize {
        self.bytes.capacity() + self.ranges.capacity() * size_of::<(usize, usize)>()
    }

    /// Whether a piece agrees with what is stored.
    pub(super) fn check(&self, offset: u64, piece: &[u8]) -> Result<(), Refused> {
        // What is further away is stored nowhere.
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(MOST_BYTES * 2);
        let end = begin + piece.len();
        for (from, to) in &self.ranges {
            let (from, to) = ((*from).max(begin), (*to).min(end));
            if from < to && self.bytes[from..to] != piece[from - begin..to - begin] {
                return Err(Refused::Drop(Reason::Conflict));
            }
        }
        Ok(())
    }

    /// Adds a piece of a stream that has up to `most` bytes.
    pub(super) fn add(&mut self, offset: u64, piece: &[u8], most: usize) -> Result<(), Refused> {
        self.check(offset, piece)?;
        let begin = usize::try_from(offset).ok().filter(|begin| *begin <= most).ok_or(Refused::TooLong)?;
        let end = begin + piece.len();
        if end > most {
            return Err(Refused::TooLong);
        }
        if piece.is_empty() {
            return Ok(());
        }
        // The ranges that the piece overlaps or touches become one.
        let first = self.ranges.partition_point(|(_, to)| *to < begin);
        let last = self.ranges.partition_point(|(from, _)| *from <= end);
        if first == last && self.ranges.len() == MOST_RANGES {
            return Err(Refused::TooLong);
        }
        let merged =
            self.ranges[first..last].iter().fold((begin, end), |all, one| (all.0.min(one.0), all.1.max(one.1)));
        self.ranges.splice(first..last, [merged]);
        if self.bytes.len() < end {
            let capacity = end.max(self.bytes.capacity() * 2).min(most);
            self.bytes.reserve_exact(capacity.saturating_sub(self.bytes.len()));
            self.bytes.resize(end, 0);
        }
        self.bytes[begin..end].copy_from_slice(piece);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stream_in_too_many_pieces_is_refused() {
        let mut crypto = Crypto::default();
        for piece in 0..MOST_RANGES as u64 {
            crypto.add(piece * 2 + 1, b"x", 4096).unwrap();
        }
        assert_eq!(crypto.add(1000, b"x", 4096), Err(Refused::TooLong));
        assert_eq!(crypto.add(0, b"x", 4096), Ok(()));
        assert_eq!(crypto.prefix(), b"xx");
        assert_eq!(crypto.add(4000, &[0; 97], 4096), Err(Refused::TooLong));
        assert_eq!(crypto.add(u64::MAX, b"x", 4096), Err(Refused::TooLong));
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_are_put_together(
            stream in prop::collection::vec(any::<u8>(), 1..200),
            pieces in prop::collection::vec((any::<prop::sample::Index>(), 1usize..40, any::<bool>()), 0..60),
        ) {
            let mut crypto = Crypto::default();
            let mut known = vec![None; stream.len()];
            for (at, length, change) in pieces {
                let begin = at.index(stream.len());
                let end = (begin + length).min(stream.len());
                let mut piece = stream[begin..end].to_vec();
                if change {
                    piece[0] ^= 1;
                }
                let conflicts = (begin..end).any(|at| known[at].is_some_and(|byte| byte != piece[at - begin]));
                let added = crypto.add(begin as u64, &piece, 200);
                prop_assert_eq!(added, if conflicts { Err(Refused::Drop(Reason::Conflict)) } else { Ok(()) });
                if !conflicts {
                    (begin..end).for_each(|at| known[at] = Some(piece[at - begin]));
                }
                let prefix: Vec<u8> = known.iter().map_while(|byte| *byte).collect();
                prop_assert_eq!(crypto.prefix(), &prefix[..]);
                prop_assert!(crypto.memory() <= 200 + 64 * 16 * 2);
            }
        }
    }
}
