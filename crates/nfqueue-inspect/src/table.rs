//! A map with a fixed number of entries, from which the oldest are removed first.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// No entry: the end of a list.
const NONE: u32 = u32::MAX;

/// The lists of a table. Each has an order of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    /// Entries that have stored no bytes yet.
    Empty,
    /// The others.
    Used,
}

/// The entries are in one of two lists, in the order of the times at which they were put there.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    numbers: HashMap<K, u32>,
    slots: Vec<Slot<K, V>>,
    /// The first slot that is free. They are a list by `next`.
    free: u32,
    ends: [Ends; 2],
    most: usize,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    oldest: u32,
    newest: u32,
    len: usize,
}

#[derive(Debug)]
struct Slot<K, V> {
    /// `None`: the slot is free.
    entry: Option<(K, V)>,
    list: List,
    since: Instant,
    older: u32,
    newer: u32,
}

impl<K: Copy + Eq + Hash, V> Table<K, V> {
    /// A table of up to `most` entries; at least 1.
    pub(crate) fn new(most: usize) -> Self {
        let most = most.clamp(1, NONE as usize - 1);
        let ends = [Ends { oldest: NONE, newest: NONE, len: 0 }; 2];
        Self { numbers: HashMap::new(), slots: Vec::new(), free: NONE, ends, most }
    }

    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The memory that a full table of `most` entries takes, without what the entries point to.
    ///
    /// Both parts double when they grow. A hash table is 7/8 full at most, has a byte of control
    /// for each of its places, and doubles once more when entries are removed and added.
    pub(crate) fn most_memory(most: usize) -> usize {
        let places = 2 * (most.max(4) * 8 / 7 + 1).next_power_of_two();
        most.next_power_of_two().max(4) * size_of::<Slot<K, V>>() + places * (size_of::<(K, u32)>() + 1) + 64
    }

    /// The memory that the table has allocated, without what the entries point to.
    pub(crate) fn memory(&self) -> usize {
        let places = (self.numbers.capacity().max(4) * 8 / 7).next_power_of_two();
        self.slots.capacity() * size_of::<Slot<K, V>>() + places * (size_of::<(K, u32)>() + 1)
    }

    pub(crate) fn find(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// The entry with this number, which `find` or `insert` returned.
    pub(crate) fn entry(&mut self, number: u32) -> &mut V {
        let entry = self.slots[number as usize].entry.as_mut();
        &mut entry.expect("a number is that of an entry").1
    }

    /// Adds an entry to the newest of `List::Empty`. There must be space, and no entry of this key.
    pub(crate) fn insert(&mut self, key: K, value: V, now: Instant) -> u32 {
        let slot = Slot { entry: Some((key, value)), list: List::Empty, since: now, older: NONE, newer: NONE };
        let number = if self.free == NONE {
            self.slots.push(slot);
            self.slots.len() as u32 - 1
        } else {
            let number = self.free;
            self.free = self.slots[number as usize].newer;
            self.slots[number as usize] = slot;
            number
        };
        self.numbers.insert(key, number);
        self.link(number, List::Empty);
        number
    }

    /// Makes an entry the newest of `list`.
    pub(crate) fn renew(&mut self, number: u32, list: List, now: Instant) {
        self.unlink(number);
        self.slots[number as usize].since = now;
        self.link(number, list);
    }

    pub(crate) fn list(&self, number: u32) -> List {
        self.slots[number as usize].list
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<V> {
        self.unlink(number);
        let slot = &mut self.slots[number as usize];
        slot.newer = self.free;
        self.free = number;
        let (key, value) = slot.entry.take()?;
        self.numbers.remove(&key);
        Some(value)
    }

    /// The oldest of a list.
    pub(crate) fn oldest(&self, list: List) -> Option<u32> {
        Some(self.ends[list as usize].oldest).filter(|number| *number != NONE)
    }

    /// The oldest of a list that is not this one.
    pub(crate) fn oldest_but(&self, list: List, spared: u32) -> Option<u32> {
        let oldest = self.oldest(list)?;
        if oldest == spared { Some(self.slots[oldest as usize].newer).filter(|n| *n != NONE) } else { Some(oldest) }
    }

    /// An entry that was put into its list so long ago.
    pub(crate) fn expired(&self, now: Instant, lifetime: Duration) -> Option<u32> {
        let limit = now.checked_sub(lifetime)?;
        [List::Empty, List::Used].into_iter().find_map(|list| self.oldest_since(list, limit))
    }

    /// The oldest of a list, if it was put there at this time or before.
    fn oldest_since(&self, list: List, limit: Instant) -> Option<u32> {
        self.oldest(list).filter(|number| self.slots[*number as usize].since <= limit)
    }

    /// What must be removed before the next entry is added: while half of the entries or more
    /// have no bytes, the oldest of these, otherwise the oldest of the others.
    pub(crate) fn surplus(&self) -> Option<u32> {
        if self.len() < self.most {
            return None;
        }
        let mostly_empty = self.ends[List::Empty as usize].len * 2 >= self.most;
        let lists = if mostly_empty { [List::Empty, List::Used] } else { [List::Used, List::Empty] };
        lists.into_iter().find_map(|list| self.oldest(list))
    }

    fn link(&mut self, number: u32, list: List) {
        let ends = &mut self.ends[list as usize];
        let older = ends.newest;
        ends.newest = number;
        ends.len += 1;
        if older == NONE {
            ends.oldest = number;
        } else {
            self.slots[older as usize].newer = number;
        }
        let slot = &mut self.slots[number as usize];
        (slot.list, slot.older, slot.newer) = (list, older, NONE);
    }

    fn unlink(&mut self, number: u32) {
        let slot = &self.slots[number as usize];
        let (list, older, newer) = (slot.list, slot.older, slot.newer);
        let ends = &mut self.ends[list as usize];
        ends.len -= 1;
        if older == NONE {
            ends.oldest = newer;
        }
        if newer == NONE {
            ends.newest = older;
        }
        if older != NONE {
            self.slots[older as usize].newer = newer;
        }
        if newer != NONE {
            self.slots[newer as usize].older = older;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn insert(table: &mut Table<u32, ()>, key: u32, now: Instant) {
        while let Some(number) = table.surplus() {
            table.remove(number);
        }
        table.insert(key, (), now);
    }

    #[test]
    fn entries_without_bytes_take_at_most_half_of_a_full_table() {
        let now = Instant::now();
        let mut table = Table::new(10);
        for key in 0..10 {
            insert(&mut table, key, now);
            let number = table.find(&key).unwrap();
            table.renew(number, List::Used, now);
        }
        // The oldest with bytes are removed until half of the table is without; then the oldest of
        // these.
        for key in 100..200 {
            insert(&mut table, key, now);
        }
        assert!((5..10).all(|key| table.find(&key).is_some()));
        assert!((195..200).all(|key| table.find(&key).is_some()));
        assert_eq!(table.len(), 10);
    }

    proptest! {
        #[test]
        fn a_table_agrees_with_two_queues(steps in prop::collection::vec((0u8..4, 0u32..12), 0..200)) {
            let start = Instant::now();
            let mut table = Table::new(8);
            let mut queues: [Vec<u32>; 2] = Default::default();
            for (count, (step, key)) in (0u64..).zip(steps) {
                let now = start + Duration::from_secs(count);
                match (step, table.find(&key)) {
                    (0 | 1, None) => {
                        if queues[0].len() + queues[1].len() == 8 {
                            let list = usize::from(queues[0].len() * 2 < 8);
                            queues[list].remove(0);
                        }
                        insert(&mut table, key, now);
                        queues[0].push(key);
                    }
                    (0 | 1, Some(number)) => {
                        table.renew(number, List::Used, now);
                        queues.iter_mut().for_each(|queue| queue.retain(|other| *other != key));
                        queues[1].push(key);
                    }
                    (2, Some(number)) => {
                        table.remove(number);
                        queues.iter_mut().for_each(|queue| queue.retain(|other| *other != key));
                    }
                    _ => {}
                }
                for (queue, list) in queues.iter().zip([List::Empty, List::Used]) {
                    let oldest = table.oldest(list).map(|number| table.slots[number as usize].entry.unwrap().0);
                    prop_assert_eq!(oldest, queue.first().copied());
                    prop_assert_eq!(table.ends[list as usize].len, queue.len());
                    prop_assert!(queue.iter().all(|key| table.find(key).is_some()));
                }
                prop_assert_eq!(table.len(), queues[0].len() + queues[1].len());
                prop_assert!(table.memory() <= Table::<u32, ()>::most_memory(8));
            }
        }
    }
}
