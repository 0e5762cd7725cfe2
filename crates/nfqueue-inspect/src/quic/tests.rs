use std::time::{Duration, Instant};

use super::{
    QuicNames,
    packet::{Packet, Version},
    seal_initial,
};
use crate::{
    Connection, Datagram, Decision, Fault, Hint, Limits, Reason, Seen,
    reader::Reader,
    test_messages::{client_hello, hello_with},
};

/// The ClientHello of RFC 9001, section A.2.
pub(super) const HELLO_OF_RFC: &str = "\
    010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c00000413011302010000\
    c000000010000e00000b6578616d706c652e636f6dff01000100000a00080006001d0017001800100007000504616c70\
    6e000500050100000000003300260024001d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994\
    ec74d748002b0003020304000d0010000e0403050306030203080408050806002d00020101001c000240010039003204\
    08ffffffffffffffff05048000ffff07048000ffff0801100104800075300901100f088394c8f03e51570806048000ff\
    ff";

pub(super) fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn initial(version: Version, key: &[u8], to: &[u8], number: u8, frames: &[u8]) -> Vec<u8> {
    seal_initial(version == Version::V2, key, to, number, frames)
}

fn crypto(offset: usize, piece: &[u8]) -> Vec<u8> {
    let mut frame = vec![6];
    frame.extend((0x8000_0000 | offset as u32).to_be_bytes());
    frame.extend((0x4000 | piece.len() as u16).to_be_bytes());
    frame.extend(piece);
    frame
}

struct Test {
    names: QuicNames,
    now: Instant,
    seen: Vec<Seen>,
}

impl Test {
    fn new() -> Self {
        Self { names: QuicNames::new(Limits::default()), now: Instant::now(), seen: Vec::new() }
    }

    fn push(&mut self, payload: &[u8]) -> Hint {
        self.push_between("[2001:db8::1]:1000", "[2001:db8::2]:443", payload)
    }

    fn push_between(&mut self, source: &str, destination: &str, payload: &[u8]) -> Hint {
        let [source, destination] = [source, destination].map(|text| text.parse().unwrap());
        let datagram = Datagram { source, destination, payload };
        self.names.push_datagram(self.now, &datagram, |connection, seen| {
            assert_eq!(*connection, Connection { client: source, server: destination });
            self.seen.push(seen.clone());
            let bad = seen.name().is_some_and(|name| name.is_in("bad.example"));
            if bad || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
        })
    }

    fn names(&self) -> Vec<&str> {
        self.seen.iter().filter_map(|seen| seen.name().map(|name| name.as_str())).collect()
    }
}

const ALLOWED: Hint = Hint::Allowed { settled: false };
const ID: &[u8] = b"first id";

#[test]
fn the_hello_of_rfc_9001_is_read_in_both_versions() {
    for version in [Version::V1, Version::V2] {
        let mut test = Test::new();
        assert_eq!(test.push(&initial(version, ID, ID, 0, &crypto(0, &hex(HELLO_OF_RFC)))), ALLOWED);
        assert_eq!(test.names(), ["example.com"]);
        // What follows, and what does not belong to it.
        assert_eq!(test.push(&[0x40; 40]), ALLOWED);
        assert_eq!(test.seen.len(), 1);
    }
}

#[test]
fn crypto_frames_in_any_order_and_several_packets_are_put_together() {
    let hello = client_hello("www.bad.example");
    let mut test = Test::new();
    let frames = [crypto(70, &hello[70..]), vec![1, 0, 0, 2, 0, 0, 0, 0], crypto(0, &hello[..40])].concat();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &frames)), Hint::Undecided);
    // 0-RTT and short headers before the hello is complete.
    assert_eq!(test.push(&[0x40; 40]), Hint::Undecided);
    // Two packets in a datagram, the second one is to the server's connection ID.
    let coalesced = [
        initial(Version::V1, ID, b"of the server", 1, &[1]),
        initial(Version::V1, ID, b"of the server", 2, &crypto(30, &hello[30..75])),
    ];
    assert_eq!(test.push(&coalesced.concat()), Hint::Denied);
    assert_eq!(test.names(), ["www.bad.example"]);
    assert_eq!(test.push(&[0x40; 40]), Hint::Denied);
    assert_eq!(test.push(&coalesced.concat()), Hint::Denied);
}

#[test]
fn a_crypto_frame_with_other_bytes_is_dropped_also_after_the_decision() {
    let (good, bad) = (client_hello("www.good.example"), client_hello("www.evil.example"));
    assert_eq!(good.len(), bad.len());
    let mut test = Test::new();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &crypto(0, &good[..68]))), Hint::Undecided);
    let conflict = Hint::Drop(Reason::Conflict);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 1, &crypto(0, &bad))), conflict);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 2, &crypto(0, &good))), ALLOWED);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 3, &crypto(0, &bad))), conflict);
    // With the compatible version, it is the same stream.
    assert_eq!(test.push(&initial(Version::V2, ID, b"other", 4, &crypto(0, &bad))), conflict);
    assert_eq!(test.names.stats().conflicts, 3);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 5, &crypto(0, &good))), ALLOWED);
    assert_eq!(test.names(), ["www.good.example"]);
}

#[test]
fn each_connection_id_with_keys_of_its_own_is_judged() {
    let mut test = Test::new();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &crypto(0, &client_hello("good.example")))), ALLOWED);
    // A Retry, or a second connection.
    let bad = initial(Version::V1, b"retried", b"retried", 1, &crypto(0, &client_hello("bad.example")));
    assert_eq!(test.push(&bad), Hint::Denied);
    assert_eq!(test.names(), ["good.example", "bad.example"]);
    // Not opened with any keys.
    let unknown = initial(Version::V1, b"unknown", b"to", 1, &[1]);
    assert_eq!(test.push(&unknown), Hint::Drop(Reason::Unreadable));
    // The stream of a client that sends more is bounded.
    for number in 0..20_u8 {
        let id = [number; 8];
        let hint = test.push(&initial(Version::V1, &id, &id, 0, &[1]));
        assert_eq!(hint, if number < 14 { Hint::Undecided } else { Hint::Drop(Reason::OtherStart) });
    }
}

#[test]
fn a_packet_number_that_a_server_may_restore_in_two_ways_is_dropped() {
    let mut test = Test::new();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 120, &[1])), Hint::Undecided);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 2, &[1])), Hint::Undecided);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 200, &[1])), Hint::Undecided);
    // 258 for a server that has received 200, and 2 for one that has not.
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 2, &[1])), Hint::Drop(Reason::Unreadable));
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 100, &[1])), Hint::Undecided);
}

#[test]
fn what_no_client_sends_is_dropped() {
    let mut test = Test::new();
    let unreadable = Hint::Drop(Reason::Unreadable);
    for frames in [&[0x08, 0, 0][..], &[6, 0, 0x50], &[0x1c, 0, 0, 9]] {
        let mut padded = vec![1; 40];
        padded.extend(frames);
        assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &padded)), unreadable, "{frames:?}");
    }
    // A server's Initial, another version, a long header without its end.
    assert_eq!(test.push(&[0xc0, 0xfa, 0xfa, 0xfa, 0xfa, 0, 0]), unreadable);
    assert_eq!(test.push(&[0xc0, 0, 0, 0, 1, 8, 0]), unreadable);
    let mut good = initial(Version::V1, b"new", b"new", 0, &crypto(0, &client_hello("good.example")));
    good.extend([0xc0, 0, 0, 0, 2]);
    assert_eq!(test.push(&good), unreadable);
    assert!(test.push(&[]) == Hint::Unknown);
}

#[test]
fn a_hello_that_is_too_long_is_for_the_caller_to_decide() {
    let mut test = Test::new();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &crypto(100_000, b"far"))), Hint::Denied);
    assert_eq!(test.seen, [Seen::TooLong]);
    let mut test = Test::new();
    let two = hello_with(&[(0, b"\0\x08\0\0\x01a\0\0\x01b".to_vec())]);
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &crypto(0, &two))), Hint::Denied);
    assert_eq!(test.seen, [Seen::Unreadable(Fault::SeveralNames)]);
}

#[test]
fn a_stream_is_forgotten_after_its_lifetime() {
    let mut test = Test::new();
    assert_eq!(test.push(&initial(Version::V1, ID, ID, 0, &[1])), Hint::Undecided);
    test.now += Duration::from_secs(61);
    assert_eq!(test.push(&[0x40; 40]), Hint::Unknown);
    assert_eq!(test.names.stats().expired, 1);
}

#[test]
fn long_headers_of_both_versions_are_told_apart() {
    // 'i': an Initial packet, 'o': another one, '-': none that a client sends.
    let kind = |first: u8, version: u32| {
        let mut bytes = vec![first];
        bytes.extend(version.to_be_bytes());
        bytes.extend([0, 0, 0, 0]);
        match Packet::next(&mut Reader::new(&bytes)) {
            Some(Packet::Initial(_)) => 'i',
            Some(_) => 'o',
            None => '-',
        }
    };
    let kinds = |version| [0xc0, 0xd0, 0xe0, 0xf0].map(|first| kind(first, version));
    assert_eq!(kinds(1), ['i', 'o', 'o', '-']);
    assert_eq!(kinds(0x6b33_43cf), ['-', 'i', 'o', 'o']);
}

#[test]
fn the_parts_of_a_hello_cannot_come_from_two_ports_or_to_two_addresses() {
    let ends = [("192.0.2.1:1000", "192.0.2.7:443"), ("192.0.2.1:1001", "192.0.2.7:443"), ("[::1]:1000", "[::7]:443")];
    let hello = client_hello("bad.example");
    let (first, second) = hello.split_at(hello.len() - 15);
    let parts = [crypto(0, first), crypto(first.len(), second)];
    for (part, other) in [(0, 1), (1, 0)] {
        let mut test = Test::new();
        let (source, destination) = ends[0];
        let packet = |part: usize| initial(Version::V1, ID, ID, part as u8, &parts[part]);
        assert_eq!(test.push_between(source, destination, &packet(part)), Hint::Undecided);
        for (source, destination) in &ends[1..] {
            let hint = test.push_between(source, destination, &packet(other));
            assert_eq!(hint, Hint::Drop(Reason::OtherStart));
        }
        assert_eq!(test.push_between(source, destination, &packet(other)), Hint::Denied);
        // When the first is forgotten, another one may have its ID.
        test.now += Limits::default().lifetime;
        let (source, destination) = ends[1];
        assert_eq!(test.push_between(source, destination, &packet(part)), Hint::Undecided);
    }
}

#[test]
fn the_second_hello_of_a_client_is_judged_as_well() {
    let (good, bad) = (client_hello("good.example"), client_hello("bad.example"));
    let packet = |number: u8, at: usize, piece: &[u8]| initial(Version::V1, ID, ID, number, &crypto(at, piece));
    let mut test = Test::new();
    assert_eq!(test.push(&packet(0, 0, &good)), ALLOWED);
    assert_eq!(test.push(&packet(1, good.len(), &good)), ALLOWED);
    // In two parts, the second part first.
    let at = 2 * good.len();
    assert_eq!(test.push(&packet(2, at + 20, &bad[20..])), ALLOWED);
    assert_eq!(test.push(&packet(3, at, &bad[..9])), Hint::Undecided);
    assert_eq!(test.push(&packet(4, at + 9, &bad[9..20])), Hint::Denied);
    assert_eq!(test.names(), ["good.example", "good.example", "bad.example"]);
    assert_eq!(test.push(&packet(5, 0, &good)), Hint::Denied);
    // Both in one packet.
    let mut test = Test::new();
    assert_eq!(test.push(&packet(0, 0, &[good, bad].concat())), Hint::Denied);
}
