//! The verdicts of each connection in the order of its packets.

use std::collections::{HashMap, VecDeque, hash_map::Entry};

use super::flow::FlowKey;

/// Values that are given back per connection in the order in which their places were taken.
#[derive(Debug)]
pub(super) struct Order<T> {
    flows: HashMap<FlowKey, Flow<T>>,
}

#[derive(Debug)]
struct Flow<T> {
    /// The number of the first place.
    first: u64,
    /// `None`: it is not known yet.
    places: VecDeque<Option<T>>,
}

/// A place in the order of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    flow: FlowKey,
    number: u64,
}

impl<T> Default for Order<T> {
    fn default() -> Self {
        Self { flows: HashMap::new() }
    }
}

impl<T> Order<T> {
    /// Takes the next place of a connection.
    pub(super) fn take(&mut self, flow: FlowKey) -> Place {
        let places = self.flows.entry(flow).or_insert_with(|| Flow { first: 0, places: VecDeque::new() });
        places.places.push_back(None);
        Place { flow, number: places.first + places.places.len() as u64 - 1 }
    }

    /// The value of a place is known. Calls `give` with each value whose turn it is.
    pub(super) fn known(&mut self, place: Place, value: T, mut give: impl FnMut(T)) {
        let Entry::Occupied(mut entry) = self.flows.entry(place.flow) else { return };
        let flow = entry.get_mut();
        let index = (place.number - flow.first) as usize;
        flow.places[index] = Some(value);
        while let Some(Some(_)) = flow.places.front() {
            flow.first += 1;
            flow.places.pop_front().flatten().into_iter().for_each(&mut give);
        }
        if flow.places.is_empty() {
            entry.remove();
        }
    }

    /// Whether the connection waits for nothing, so that a value need not take a place.
    pub(super) fn is_idle(&self, flow: &FlowKey) -> bool {
        !self.flows.contains_key(flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(number: u8) -> FlowKey {
        let mut packet = [0; 28];
        (packet[0], packet[9], packet[15]) = (0x45, 17, number);
        FlowKey::of(&packet)
    }

    #[test]
    fn values_of_one_connection_keep_their_order_and_do_not_wait_for_others() {
        let mut order = Order::default();
        let places: Vec<Place> = (0..4).map(|_| order.take(flow(1))).collect();
        let other = order.take(flow(2));
        let mut given = Vec::new();
        order.known(places[2], 2, |value| given.push(value));
        order.known(places[1], 1, |value| given.push(value));
        assert_eq!(given, []);
        order.known(other, 10, |value| given.push(value));
        assert_eq!(given, [10]);
        order.known(places[0], 0, |value| given.push(value));
        assert_eq!(given, [10, 0, 1, 2]);
        assert!(!order.is_idle(&flow(1)) && order.is_idle(&flow(2)));
        let later = order.take(flow(1));
        order.known(later, 4, |value| given.push(value));
        order.known(places[3], 3, |value| given.push(value));
        assert_eq!(given, [10, 0, 1, 2, 3, 4]);
        assert!(order.flows.is_empty(), "what is idle takes no memory");
    }
}
