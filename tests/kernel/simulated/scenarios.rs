//! What is done on both kernels.

use tokio_nfqueue::simulated::TestPacket;

use super::{
    messages::{ACK, BATCH, CONFIG, REQUEST, Settings, VERDICT, attribute, describe, message, verdict_header},
    worlds::{Datagram, PASS, World, addresses},
};

/// A kernel, and a record of what was seen.
pub(crate) struct Script<'a> {
    world: &'a mut dyn World,
    seen: Vec<String>,
    sequence: u32,
    next: u32,
}

pub(crate) fn run(world: &mut dyn World, scenario: fn(&mut Script<'_>)) -> Vec<String> {
    let mut script = Script { world, seen: Vec::new(), sequence: 0, next: 0 };
    scenario(&mut script);
    script.seen
}

const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const REPEAT: u32 = 4;
const STOP: u32 = 5;
const fn requeue(queue: u32, bypass: bool) -> u32 {
    3 | queue << 16 | if bypass { 0x8000 } else { 0 }
}

const BIND: Settings = Settings { command: Some(1), copy: Some((0xffff, 2)), max_len: None, mask: None, flags: None };
const UNBIND: Settings = Settings { command: Some(2), ..NOTHING };
const NOTHING: Settings = Settings { command: None, copy: None, max_len: None, mask: None, flags: None };
const FAIL_OPEN: u32 = 1;
const GSO: u32 = 4;

impl Script<'_> {
    /// A message with the next sequence number.
    fn message(&mut self, kind: u16, flags: u16, queue: u16, attributes: &[u8]) -> Vec<u8> {
        self.sequence += 1;
        message(kind, flags, self.sequence, queue, attributes)
    }

    fn send(&mut self, socket: usize, datagram: &[u8]) {
        if let Err(error) = self.world.transmit(socket, datagram) {
            self.seen.push(format!("send: {:?}", error.raw_os_error()));
        }
    }

    fn open(&mut self) {
        self.world.open(true, None);
    }

    /// Opens a socket, and binds queue 0 with these settings.
    fn bind(&mut self, settings: Settings) {
        self.open();
        self.configure(0, 0, settings);
    }

    fn configure(&mut self, socket: usize, queue: u16, settings: Settings) {
        let message = self.message(CONFIG, REQUEST | ACK, queue, &settings.attributes());
        self.send(socket, &message);
        self.look(socket);
    }

    fn flags(&mut self, mask: u32, flags: u32) {
        self.configure(0, 0, Settings { mask: Some(mask), flags: Some(flags), ..NOTHING });
    }

    /// Sends numbered datagrams.
    fn datagrams(&mut self, count: u32) {
        (0..count).for_each(|_| self.datagram(|_| ()));
    }

    fn datagram(&mut self, change: impl FnOnce(&mut Datagram)) {
        let payload = self.next.to_be_bytes().to_vec();
        let mut datagram = Datagram { payload, mark: 0, bypass: false, segment: None };
        change(&mut datagram);
        self.next += 1;
        self.world.datagram(&datagram);
    }

    fn verdict(&mut self, id: u32, word: u32) {
        self.verdict_with(id, word, &[]);
    }

    /// With more attributes.
    fn verdict_with(&mut self, id: u32, word: u32, more: &[u8]) {
        let message = self.message(VERDICT, REQUEST, 0, &[&verdict_header(word, id), more].concat());
        self.send(0, &message);
    }

    fn batch(&mut self, max: u32, word: u32) {
        let message = self.message(BATCH, REQUEST, 0, &verdict_header(word, max));
        self.send(0, &message);
    }

    /// Records everything that a socket receives.
    fn look(&mut self, socket: usize) {
        loop {
            match self.world.receive(socket) {
                Ok(datagram) => self.seen.push(format!("socket {socket}: {}", describe(&datagram))),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => self.seen.push(format!("socket {socket}: {:?}", error.raw_os_error())),
            }
        }
    }

    /// Records what has arrived, and the counters.
    fn check(&mut self) {
        let mut arrived = self.world.arrived();
        arrived.sort();
        let arrived: Vec<String> = arrived
            .iter()
            .map(|payload| format!("{:02x?} of {}", &payload[..payload.len().min(6)], payload.len()))
            .collect();
        let counters = [self.world.stats(0), self.world.stats(1)];
        self.seen.push(format!("arrived {arrived:?}, counters {counters:?}"));
    }

    /// Records everything.
    fn all(&mut self) {
        self.look(0);
        self.check();
    }
}

/// A replaced payload for a datagram of the usual port: a UDP packet.
fn replacement(data: &[u8]) -> Vec<u8> {
    let (from, to) = addresses();
    attribute(10, TestPacket::udp(from, to, data).payload())
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub(crate) const ALL: &[(&str, fn(&mut Script<'_>))] = &[$((stringify!($name), $name)),*];
    };
}

scenarios![
    single_verdicts,
    batches,
    verdicts_for_ids_that_are_not_queued,
    verdicts_that_are_refused,
    acknowledgements,
    several_messages_in_a_datagram,
    messages_that_are_no_requests_or_unknown,
    datagrams_that_are_too_long,
    a_full_queue,
    a_full_queue_with_fail_open,
    a_queue_of_length_0_drains,
    copy_ranges,
    the_kinds_of_settings_that_are_refused,
    unbinding_with_packets_queued,
    closing_with_packets_queued,
    a_full_receive_buffer,
    a_full_receive_buffer_with_fail_open,
    a_full_receive_buffer_without_no_enobufs,
    replies_that_find_no_room,
    super_packets,
    super_packets_with_a_full_queue,
    replaced_payloads,
    marks_and_priorities,
    repeated_packets,
    requeued_packets,
    a_missing_capability,
    an_unregistered_hook,
    an_interface_that_goes_down,
];

fn single_verdicts(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(6);
    script.all();
    for (id, word) in [(2, ACCEPT), (1, DROP), (3, STOP), (6, ACCEPT)] {
        script.verdict(id, word);
        script.all();
    }
}

fn batches(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(10);
    script.look(0);
    script.verdict(2, DROP);
    script.batch(3, ACCEPT);
    script.all();
    // Nothing is left up to 3; 100 does not exist.
    script.batch(3, ACCEPT);
    script.batch(0x8000_0000, ACCEPT);
    script.verdict(7, ACCEPT);
    script.all();
    script.batch(8, DROP);
    script.batch(100, ACCEPT);
    script.all();
    script.batch(100, ACCEPT);
    script.all();
}

fn verdicts_for_ids_that_are_not_queued(script: &mut Script<'_>) {
    script.bind(BIND);
    script.verdict(1, ACCEPT);
    script.datagrams(2);
    script.verdict(0, ACCEPT);
    script.verdict(3, ACCEPT);
    script.verdict(u32::MAX, ACCEPT);
    script.verdict(1, ACCEPT);
    script.verdict(1, ACCEPT);
    script.all();
}

fn verdicts_that_are_refused(script: &mut Script<'_>) {
    script.bind(BIND);
    script.open();
    script.datagrams(2);
    for word in [2, 6, 7, 0xff, 0x100, 0x1_0000 | 2] {
        script.verdict(1, word);
    }
    script.all();
    for kind in [VERDICT, BATCH] {
        for attributes in [&[][..], &attribute(2, &[0; 4]), &attribute(3, &[0; 4]), &[1, 2]] {
            let message = script.message(kind, REQUEST, 0, attributes);
            script.send(0, &message);
        }
        let header = verdict_header(ACCEPT, 2);
        let bad_mark = [&header[..], &attribute(3, &[0; 2])].concat();
        let message = script.message(kind, REQUEST, 0, &bad_mark);
        script.send(0, &message);
        // Another queue; another socket's queue.
        let message = script.message(kind, REQUEST, 9, &header);
        script.send(0, &message);
        let message = script.message(kind, REQUEST, 0, &header);
        script.send(1, &message);
    }
    script.look(1);
    script.all();
}

fn acknowledgements(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(4);
    script.look(0);
    let header = |id| verdict_header(ACCEPT, id);
    for (kind, flags, id) in [
        (VERDICT, REQUEST | ACK, 1),
        (VERDICT, REQUEST | ACK, 1),
        (VERDICT, ACK, 2),
        (VERDICT, 0, 2),
        (BATCH, REQUEST | ACK, 3),
    ] {
        let message = script.message(kind, flags, 0, &header(id));
        script.send(0, &message);
        script.all();
    }
}

fn several_messages_in_a_datagram(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(5);
    script.look(0);
    let mut datagram = Vec::new();
    for (id, word) in [(1, ACCEPT), (1, ACCEPT), (2, 7), (3, ACCEPT)] {
        datagram.extend(script.message(VERDICT, REQUEST, 0, &verdict_header(word, id)));
    }
    let settings = Settings { max_len: Some(7), ..NOTHING }.attributes();
    datagram.extend(script.message(CONFIG, REQUEST | ACK, 0, &settings));
    // The end is cut off.
    let last = script.message(VERDICT, REQUEST, 0, &verdict_header(ACCEPT, 4));
    datagram.extend(&last[..last.len() - 1]);
    script.send(0, &datagram);
    script.all();
    // A length that is too short ends it.
    let mut datagram = script.message(VERDICT, REQUEST, 0, &verdict_header(ACCEPT, 4));
    let mut broken = script.message(VERDICT, REQUEST, 0, &verdict_header(ACCEPT, 5));
    broken[..4].copy_from_slice(&15_u32.to_ne_bytes());
    datagram.extend(broken);
    script.send(0, &datagram);
    script.all();
}

fn messages_that_are_no_requests_or_unknown(script: &mut Script<'_>) {
    script.bind(BIND);
    for kind in [0x300, 0x304, 0x3ff, 3, 0xf00] {
        let message = script.message(kind, REQUEST, 0, &[]);
        script.send(0, &message);
        script.look(0);
    }
    // Shorter than a header, and without the part that names the queue.
    script.send(0, &[1, 2, 3]);
    let mut short = script.message(VERDICT, REQUEST | ACK, 0, &[]);
    short.truncate(16);
    short[..4].copy_from_slice(&16_u32.to_ne_bytes());
    script.send(0, &short);
    script.look(0);
}

fn datagrams_that_are_too_long(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(1);
    script.look(0);
    let one = script.message(VERDICT, REQUEST, 0, &verdict_header(DROP, 99));
    let mut datagram = script.message(VERDICT, REQUEST, 0, &verdict_header(ACCEPT, 1));
    datagram.resize(212_961, 0);
    script.send(0, &datagram);
    script.all();
    datagram.truncate(212_960);
    script.send(0, &datagram);
    script.all();
    script.send(0, &one);
    script.all();
}

fn a_full_queue(script: &mut Script<'_>) {
    script.bind(Settings { max_len: Some(3), ..BIND });
    script.datagrams(5);
    script.all();
    script.verdict(2, ACCEPT);
    script.datagrams(2);
    script.all();
}

fn a_full_queue_with_fail_open(script: &mut Script<'_>) {
    script.bind(Settings { max_len: Some(3), mask: Some(FAIL_OPEN), flags: Some(FAIL_OPEN), ..BIND });
    script.datagrams(5);
    script.all();
    script.flags(FAIL_OPEN, 0);
    script.datagrams(1);
    script.all();
}

fn a_queue_of_length_0_drains(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(2);
    script.flags(FAIL_OPEN, FAIL_OPEN);
    script.configure(0, 0, Settings { max_len: Some(0), ..NOTHING });
    script.datagrams(2);
    script.all();
    script.batch(2, ACCEPT);
    script.flags(FAIL_OPEN, 0);
    script.datagrams(1);
    script.all();
}

fn copy_ranges(script: &mut Script<'_>) {
    script.bind(BIND);
    // The last: an unknown mode changes nothing; no copies drop.
    for copy in [(0, 2), (65_531, 2), (65_532, 2), (30, 2), (32, 2), (33, 2), (10, 1), (20, 7), (0, 0)] {
        script.configure(0, 0, Settings { copy: Some(copy), ..NOTHING });
        script.datagrams(1);
        script.all();
    }
}

fn the_kinds_of_settings_that_are_refused(script: &mut Script<'_>) {
    script.open();
    script.open();
    let set = |flags, mask| Settings { flags, mask, ..NOTHING };
    script.configure(0, 0, UNBIND);
    script.configure(0, 0, set(Some(GSO), Some(GSO)));
    script.configure(0, 0, Settings { command: Some(9), ..NOTHING });
    script.configure(0, 0, Settings { command: Some(3), ..NOTHING });
    script.configure(0, 0, BIND);
    script.configure(0, 0, BIND);
    script.configure(1, 0, BIND);
    script.configure(1, 0, UNBIND);
    script.configure(1, 0, set(Some(GSO), Some(GSO)));
    script.configure(0, 0, set(Some(GSO), None));
    script.configure(0, 0, set(None, Some(GSO)));
    script.configure(0, 0, set(Some(1 << 5), Some(1 << 5)));
    script.configure(0, 0, set(Some(1 << 5), Some(0)));
    script.configure(0, 0, Settings { command: Some(9), ..NOTHING });
    script.configure(0, 0, NOTHING);
    for attributes in [attribute(1, &[1]), attribute(2, &[0; 4]), attribute(3, &[0; 2])] {
        let message = script.message(CONFIG, REQUEST | ACK, 0, &attributes);
        script.send(0, &message);
    }
    script.all();
    script.configure(0, 0, UNBIND);
    script.configure(1, 0, BIND);
    script.check();
}

fn unbinding_with_packets_queued(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(2);
    script.configure(0, 0, UNBIND);
    script.verdict(1, ACCEPT);
    script.all();
    script.datagrams(1);
    script.datagram(|datagram| datagram.bypass = true);
    script.all();
    script.configure(0, 0, BIND);
    script.datagrams(1);
    script.all();
    // Without copies, nothing is queued, whether the rule has bypass or not.
    script.configure(0, 0, Settings { copy: Some((0, 0)), ..NOTHING });
    script.datagrams(1);
    script.datagram(|datagram| datagram.bypass = true);
    script.all();
}

fn closing_with_packets_queued(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(2);
    script.open();
    script.world.close(0);
    script.check();
    script.configure(1, 0, BIND);
    script.datagrams(1);
    script.look(1);
    script.check();
}

/// Eight small packets, where each is charged 832 bytes.
const SMALL_BUFFER: usize = 832 * 8;

fn a_full_receive_buffer(script: &mut Script<'_>) {
    script.world.open(true, Some(SMALL_BUFFER));
    script.configure(0, 0, BIND);
    script.datagrams(12);
    script.all();
    script.datagrams(3);
    script.batch(100, ACCEPT);
    script.all();
    // Longer packets, and then short ones again.
    for length in [104, 105, 140, 500, 552, 553, 1000, 1400, 1576, 1577] {
        for _ in 0..12 {
            script.datagram(|datagram| datagram.payload.resize(length, 0));
        }
        script.all();
    }
}

fn a_full_receive_buffer_with_fail_open(script: &mut Script<'_>) {
    script.world.open(true, Some(SMALL_BUFFER));
    script.configure(0, 0, Settings { mask: Some(FAIL_OPEN), flags: Some(FAIL_OPEN), ..BIND });
    script.datagrams(12);
    script.all();
}

fn a_full_receive_buffer_without_no_enobufs(script: &mut Script<'_>) {
    script.world.open(false, Some(SMALL_BUFFER));
    script.configure(0, 0, BIND);
    script.datagrams(12);
    // Congested: freed room is not used.
    for _ in 0..2 {
        let first = script.world.receive(0).map(|datagram| describe(&datagram)).map_err(|error| error.raw_os_error());
        script.seen.push(format!("{first:?}"));
    }
    script.datagrams(2);
    script.all();
    script.datagrams(2);
    script.all();
}

fn replies_that_find_no_room(script: &mut Script<'_>) {
    script.world.open(true, Some(SMALL_BUFFER));
    script.configure(0, 0, BIND);
    script.datagrams(6);
    for _ in 0..4 {
        script.verdict(99, ACCEPT);
    }
    script.verdict(1, ACCEPT);
    script.all();
    // A long message is echoed in its error.
    let long = [verdict_header(ACCEPT, 99), attribute(10, &[0; 600])].concat();
    for _ in 0..6 {
        let message = script.message(VERDICT, REQUEST, 0, &long);
        script.send(0, &message);
    }
    script.all();
}

fn super_packets(script: &mut Script<'_>) {
    script.bind(Settings { mask: Some(GSO), flags: Some(GSO), ..BIND });
    let large = |datagram: &mut Datagram| {
        datagram.payload = (0..2500_u32).map(|byte| (byte / 1000) as u8).collect();
        datagram.segment = Some(1000);
    };
    script.datagram(large);
    script.all();
    script.verdict(1, ACCEPT);
    script.all();
    script.flags(GSO, 0);
    script.datagram(large);
    script.all();
    for (id, word) in [(2, ACCEPT), (3, DROP), (4, ACCEPT)] {
        script.verdict(id, word);
    }
    script.all();
}

fn super_packets_with_a_full_queue(script: &mut Script<'_>) {
    script.bind(Settings { max_len: Some(2), ..BIND });
    script.datagram(|datagram| {
        datagram.payload = (0..4500_u32).map(|byte| (byte / 1000) as u8).collect();
        datagram.segment = Some(1000);
    });
    script.all();
    script.batch(9, ACCEPT);
    script.all();
}

fn replaced_payloads(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(7);
    script.look(0);
    script.verdict_with(1, ACCEPT, &replacement(b"x"));
    script.verdict_with(2, ACCEPT, &replacement(&[7; 1400]));
    script.verdict_with(3, ACCEPT, &replacement(&[8; 4]));
    script.all();
    // Shorter than a header, nothing at all.
    script.verdict_with(4, ACCEPT, &attribute(10, &[0x45; 19]));
    script.verdict_with(5, ACCEPT, &attribute(10, &[]));
    script.verdict_with(6, DROP, &replacement(b"dropped"));
    let message = script.message(VERDICT, REQUEST | ACK, 0, &[verdict_header(ACCEPT, 7), attribute(10, &[1])].concat());
    script.send(0, &message);
    script.all();
}

fn marks_and_priorities(script: &mut Script<'_>) {
    script.bind(BIND);
    script.configure(0, 1, BIND);
    script.datagram(|datagram| datagram.mark = 7);
    script.datagrams(3);
    script.look(0);
    let word = |kind, value: u32| attribute(kind, &value.to_be_bytes());
    // To the other queue, which shows what the packet has.
    script.verdict(1, requeue(1, false));
    script.verdict_with(2, requeue(1, false), &word(3, 0x1234));
    script.verdict_with(3, requeue(1, false), &[word(3, 5), word(21, 6)].concat());
    let more = [verdict_header(requeue(1, false), 9), word(3, 8), word(21, 9)].concat();
    let message = script.message(BATCH, REQUEST, 0, &more);
    script.send(0, &message);
    script.all();
}

fn repeated_packets(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagram(|datagram| datagram.mark = PASS);
    script.datagrams(2);
    script.all();
    script.verdict(1, REPEAT);
    script.verdict_with(2, REPEAT, &attribute(3, &PASS.to_be_bytes()));
    script.all();
    script.configure(0, 0, Settings { max_len: Some(1), ..NOTHING });
    script.datagrams(1);
    script.verdict(3, REPEAT);
    script.all();
    script.batch(10, REPEAT);
    script.all();
}

fn requeued_packets(script: &mut Script<'_>) {
    script.bind(BIND);
    script.open();
    script.datagrams(6);
    script.look(0);
    script.verdict(1, requeue(1, false));
    script.verdict(2, requeue(1, true));
    script.all();
    script.configure(1, 1, BIND);
    script.verdict(3, requeue(1, false));
    script.verdict(4, requeue(0, false));
    script.look(1);
    script.all();
    // The other queue belongs to the other socket.
    let message = script.message(VERDICT, REQUEST, 1, &verdict_header(ACCEPT, 1));
    script.send(0, &message);
    script.send(1, &message);
    script.look(1);
    script.all();
    script.configure(1, 1, Settings { max_len: Some(0), ..NOTHING });
    script.verdict(5, requeue(1, true));
    script.all();
}

fn a_missing_capability(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(2);
    script.look(0);
    let mut datagram = Vec::new();
    for id in [1, 2] {
        datagram.extend(script.message(VERDICT, REQUEST | ACK, 0, &verdict_header(ACCEPT, id)));
    }
    script.world.transmit_incapable(0, &datagram);
    script.all();
    script.datagrams(1);
    script.verdict(1, ACCEPT);
    script.all();
}

fn an_unregistered_hook(script: &mut Script<'_>) {
    script.bind(BIND);
    script.configure(0, 1, BIND);
    script.datagrams(2);
    script.verdict(2, requeue(1, false));
    script.look(0);
    script.world.unregister_hook();
    script.all();
    script.verdict(1, ACCEPT);
    script.datagrams(1);
    script.all();
}

fn an_interface_that_goes_down(script: &mut Script<'_>) {
    script.bind(BIND);
    script.datagrams(2);
    script.verdict(1, ACCEPT);
    script.all();
    script.world.take_interface_down();
    script.all();
    script.verdict(2, ACCEPT);
    script.all();
}
