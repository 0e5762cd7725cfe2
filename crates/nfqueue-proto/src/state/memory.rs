//! The memory that undecided packets keep allocated.
//!
//! Short packets share a buffer, which is freed when the last of them is. So the whole buffer
//! counts from its first undecided packet to the last.

/// Where the bytes of a packet are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In memory of its own.
    Own {
        /// The size of the memory.
        bytes: u32,
    },
    /// In a buffer that it shares with other packets. Each pool numbers its buffers.
    Shared {
        /// The number of the pool, 0 or 1.
        pool: u8,
        /// The number of the buffer in its pool.
        buffer: u32,
        /// The size of the whole buffer.
        bytes: u32,
    },
    /// It keeps no memory.
    None,
}

/// The number of pools with shared buffers.
pub(super) const POOLS: usize = 2;

#[derive(Debug, Default)]
pub(super) struct HeldMemory {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// For each pool: the buffer of the last packet, and its entry.
    current: [Option<(u32, u32)>; POOLS],
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    bytes: u32,
    packets: u32,
    /// More packets may be stored in it.
    open: bool,
}

impl HeldMemory {
    /// A packet waits for its verdict. The token is for [`leave`](Self::leave).
    pub(super) fn enter(&mut self, storage: Storage) -> u32 {
        match storage {
            Storage::None => NO_TOKEN,
            Storage::Own { bytes } => self.add(bytes, false),
            Storage::Shared { pool, buffer, bytes } => {
                let pool = usize::from(pool);
                match self.current[pool] {
                    Some((current, entry)) if current == buffer => {
                        let found = &mut self.entries[entry as usize];
                        if found.packets == 0 {
                            self.bytes += found.bytes as usize;
                        }
                        found.packets += 1;
                        entry
                    }
                    before => {
                        if let Some((_, entry)) = before {
                            let old = &mut self.entries[entry as usize];
                            old.open = false;
                            if old.packets == 0 {
                                self.free.push(entry);
                            }
                        }
                        let entry = self.add(bytes, true);
                        self.current[pool] = Some((buffer, entry));
                        entry
                    }
                }
            }
        }
    }

    fn add(&mut self, bytes: u32, open: bool) -> u32 {
        self.bytes += bytes as usize;
        let entry = Entry { bytes, packets: 1, open };
        match self.free.pop() {
            Some(index) => {
                self.entries[index as usize] = entry;
                index
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        }
    }

    /// A packet does not wait any more.
    pub(super) fn leave(&mut self, token: u32) {
        let Some(entry) = self.entries.get_mut(token as usize) else { return };
        entry.packets -= 1;
        if entry.packets == 0 {
            self.bytes -= entry.bytes as usize;
            if !entry.open {
                self.free.push(token);
            }
        }
    }

    /// In bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The token of a packet that keeps no memory.
pub(super) const NO_TOKEN: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_held_packet_counts_its_whole_buffer() {
        let mut held = HeldMemory::default();
        let storage = |buffer| Storage::Shared { pool: 0, buffer, bytes: 1000 };
        let tokens: Vec<u32> = (0..30).map(|index| held.enter(storage(index / 10))).collect();
        let own = held.enter(Storage::Own { bytes: 70_000 });
        assert_eq!(held.bytes(), 3 * 1000 + 70_000);
        held.leave(own);
        for token in &tokens[1..] {
            held.leave(*token);
        }
        assert_eq!(held.bytes(), 1000);
        held.leave(tokens[0]);
        held.leave(NO_TOKEN);
        assert_eq!(held.bytes(), 0);
    }

    #[test]
    fn entries_are_used_again() {
        let mut held = HeldMemory::default();
        for index in 0..10_000 {
            let short = held.enter(Storage::Shared { pool: 1, buffer: index / 7, bytes: 10 });
            let long = held.enter(Storage::Own { bytes: 20 });
            held.leave(long);
            held.leave(short);
        }
        assert_eq!(held.bytes(), 0);
        assert!(held.entries.len() <= 3, "{} entries", held.entries.len());
    }
}
