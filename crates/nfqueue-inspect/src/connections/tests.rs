use std::{net::SocketAddr, time::Duration};

use super::*;
use crate::{Flags, Hint, Seen, ServerNames, test_messages};

/// The sequence number of the client's SYN in most tests; the stream wraps.
const SYN: u32 = 0xffff_fffa;
const FIRST: u32 = SYN.wrapping_add(1);
/// That of the server's first byte.
const SERVER: u32 = 5001;

struct Test {
    table: Connections,
    now: Instant,
}

fn end_of(number: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 4000))
}

fn server() -> SocketAddr {
    "192.0.2.7:443".parse().unwrap()
}

fn client(number: u16, sequence: u32, payload: &[u8]) -> Segment<'_> {
    let flags = Flags { ack: true, ..Flags::default() };
    Segment { source: end_of(number), destination: server(), sequence, acknowledgment: SERVER, flags, payload }
}

fn syn(number: u16, sequence: u32) -> Segment<'static> {
    Segment { flags: Flags { syn: true, ..Flags::default() }, ..client(number, sequence, b"") }
}

fn of_server(number: u16, acknowledgment: u32) -> Segment<'static> {
    let segment = client(number, SERVER, b"");
    Segment { source: segment.destination, destination: segment.source, acknowledgment, ..segment }
}

fn syn_ack(number: u16, first: u32) -> Segment<'static> {
    let flags = Flags { syn: true, ack: true, ..Flags::default() };
    Segment { flags, sequence: SERVER - 1, ..of_server(number, first) }
}

impl Test {
    fn new(limits: Limits) -> Self {
        Self { table: Connections::new(limits), now: Instant::now() }
    }

    /// A table of one direction in which client 1 has sent its SYN.
    fn one_direction() -> Self {
        let mut test = Self::new(Limits::default().bytes_per_connection(16));
        test.is(syn(1, SYN), Progress::NoData);
        test
    }

    /// A table of both directions in which client 1 has sent its SYN, and the server has accepted.
    fn both_directions() -> Self {
        let mut test = Self::new(Limits::default().both_directions(true));
        test.is(syn(1, SYN), Progress::NoData);
        test.is(syn_ack(1, FIRST), Progress::NoData);
        test
    }

    #[track_caller]
    fn is(&mut self, segment: Segment<'_>, progress: Progress<'_>) {
        assert_eq!(self.table.push(self.now, &segment), progress);
    }

    #[track_caller]
    fn dropped(&mut self, segment: Segment<'_>, reason: Reason) {
        self.is(segment, Progress::Drop(reason));
    }

    #[track_caller]
    fn bytes(&mut self, segment: Segment<'_>, bytes: &[u8]) {
        self.is(segment, Progress::Bytes(Prefix { bytes, full: false, ended: false }));
    }

    fn decide(&mut self, number: u16, decision: Decision) {
        let connection = Connection { client: end_of(number), server: server() };
        assert!(self.table.decide(self.now, &connection, decision));
    }
}

fn at(offset: u32, payload: &[u8]) -> Segment<'_> {
    client(1, FIRST.wrapping_add(offset), payload)
}

#[test]
fn bytes_are_returned_in_order_across_the_wrap_of_sequence_numbers() {
    let mut test = Test::one_direction();
    test.is(at(0, b""), Progress::NoData);
    test.bytes(at(0, b"abcd"), b"abcd");
    test.dropped(at(8, b"ij"), Reason::Gap);
    test.bytes(at(4, b"efgh"), b"abcdefgh");
    test.bytes(at(8, b"ij"), b"abcdefghij");
    // A retransmission, alone and with new bytes.
    test.bytes(at(2, b"cdef"), b"abcdefghij");
    test.bytes(at(7, b"hijkl"), b"abcdefghijkl");
}

#[test]
fn an_overlap_with_other_bytes_is_a_conflict_before_and_after_the_decision() {
    let mut test = Test::one_direction();
    test.bytes(at(0, b"abcd"), b"abcd");
    test.dropped(at(0, b"abxd"), Reason::Conflict);
    test.dropped(at(3, b"xyz"), Reason::Conflict);
    test.bytes(at(3, b"de"), b"abcde");
    test.decide(1, Decision::Allow);
    let allowed = Progress::Allowed { settled: false };
    test.is(at(4, b"efg"), allowed);
    test.dropped(at(4, b"xfg"), Reason::Conflict);
    test.dropped(at(0, b"x"), Reason::Conflict);
    // Only the bytes that were judged are compared.
    test.is(at(5, b"xx"), allowed);
    // From before the first byte on.
    test.is(client(1, FIRST.wrapping_sub(2), b"..abc"), allowed);
    test.dropped(client(1, FIRST.wrapping_sub(2), b"..abx"), Reason::Conflict);
    assert_eq!(test.table.stats().conflicts, 5);
}

#[test]
fn bytes_from_before_the_first_are_dropped() {
    let mut test = Test::one_direction();
    // A keep-alive with a byte of garbage, before and after data.
    test.dropped(client(1, SYN, b"\0"), Reason::BeforeStart);
    test.is(client(1, SYN, b""), Progress::NoData);
    test.bytes(at(0, b"abcd"), b"abcd");
    test.dropped(at(3, b"\0"), Reason::Conflict);
    test.dropped(client(1, SYN, b"?abcd"), Reason::BeforeStart);
}

#[test]
fn urgent_data_is_dropped_where_it_could_change_what_was_judged() {
    let mut test = Test::one_direction();
    let urgent = |offset, payload| {
        let segment = at(offset, payload);
        Segment { flags: Flags { urg: true, ..segment.flags }, ..segment }
    };
    test.dropped(urgent(0, b"abcd"), Reason::Urgent);
    // The pointer may be that of a later byte.
    test.dropped(urgent(0, b""), Reason::Urgent);
    test.bytes(at(0, b"abcd"), b"abcd");
    test.decide(1, Decision::Allow);
    test.dropped(urgent(3, b""), Reason::Urgent);
    test.is(urgent(4, b"x"), Progress::Allowed { settled: false });
}

#[test]
fn a_syn_with_data_is_dropped() {
    for mut test in [Test::one_direction(), Test::both_directions()] {
        test.dropped(Segment { payload: b"data", ..syn(1, SYN) }, Reason::SynData);
        test.dropped(Segment { payload: b"data", ..syn(2, SYN) }, Reason::SynData);
        assert_eq!(test.table.len(), 1);
    }
}

#[test]
fn with_one_direction_a_second_syn_passes_only_when_the_first_is_forgotten() {
    let mut test = Test::one_direction();
    test.is(syn(1, SYN), Progress::NoData);
    test.dropped(syn(1, SYN + 1), Reason::OtherStart);
    test.bytes(at(0, b"abcd"), b"abcd");
    test.is(syn(1, SYN), Progress::NoData);
    for decision in [Decision::Allow, Decision::Deny] {
        test.decide(1, decision);
        test.dropped(syn(1, SYN + 1), Reason::OtherStart);
        // The same number may be another connection, whose bytes were not judged.
        test.dropped(syn(1, SYN), Reason::OtherStart);
    }
    test.now += Duration::from_secs(60);
    test.is(syn(1, SYN + 1), Progress::NoData);
    test.bytes(at(1, b"efgh"), b"efgh");
}

#[test]
fn with_both_directions_nothing_passes_before_the_server_has_accepted() {
    let mut test = Test::new(Limits::default().both_directions(true));
    test.is(syn(1, SYN), Progress::NoData);
    test.dropped(at(0, b"abcd"), Reason::Unconfirmed);
    // Another SYN, before the handshake is complete: the server says which one counts.
    test.is(syn(1, SYN.wrapping_sub(100)), Progress::NoData);
    test.is(syn_ack(1, FIRST), Progress::NoData);
    // The end of another handshake.
    test.dropped(Segment { acknowledgment: SERVER + 1, ..at(0, b"abcd") }, Reason::Unacceptable);
    test.dropped(Segment { flags: Flags::default(), ..at(0, b"abcd") }, Reason::Unacceptable);
    test.bytes(at(0, b"abcd"), b"abcd");
    let acknowledging = Segment { acknowledgment: SERVER + 9, ..at(4, b"e") };
    test.dropped(acknowledging, Reason::Unacceptable);
    test.is(Segment { payload: b"9 bytes..", ..of_server(1, FIRST) }, Progress::NoData);
    test.bytes(acknowledging, b"abcde");
}

#[test]
fn a_stream_cannot_be_moved_by_a_syn_cookie() {
    let mut test = Test::both_directions();
    // The server may be listening still, and take these for the end of the handshake.
    test.dropped(at(1, b""), Reason::Unacceptable);
    test.bytes(at(0, b"xyz"), b"xyz");
    test.dropped(at(3, b"GET"), Reason::Unacceptable);
    test.dropped(at(3, b""), Reason::Unacceptable);
    test.dropped(client(1, FIRST.wrapping_sub(3), b""), Reason::Unacceptable);
    test.bytes(at(0, b"xyzGET"), b"xyzGET");
    test.decide(1, Decision::Allow);
    test.dropped(at(3, b"GET"), Reason::Unacceptable);
    test.dropped(client(1, FIRST.wrapping_sub(3), b"GET"), Reason::Unacceptable);
    test.is(of_server(1, FIRST.wrapping_add(1)), Progress::NoData);
    test.is(at(3, b"GET"), Progress::Allowed { settled: false });
}

#[test]
fn with_both_directions_a_second_syn_passes_after_what_was_judged_has_arrived() {
    let mut test = Test::both_directions();
    test.bytes(at(0, b"abcd"), b"abcd");
    test.is(syn(1, SYN), Progress::NoData);
    test.dropped(syn(1, 70_000), Reason::OtherStart);
    test.is(syn_ack(1, 70_001), Progress::NoData);
    test.decide(1, Decision::Allow);
    test.dropped(syn(1, 70_000), Reason::OtherStart);
    test.is(of_server(1, FIRST.wrapping_add(4)), Progress::NoData);
    test.is(syn(1, 70_000), Progress::NoData);
    // The server has not accepted it: the old connection continues.
    test.is(at(0, b"xyz"), Progress::Allowed { settled: true });
    test.is(Segment { sequence: 9000, ..syn_ack(1, 70_001) }, Progress::NoData);
    test.dropped(at(0, b"xyz"), Reason::Unacceptable);
    test.bytes(Segment { acknowledgment: 9001, ..client(1, 70_001, b"new") }, b"new");
}

#[test]
fn a_connection_with_the_numbers_of_the_last_one_is_judged() {
    let mut test = Test::both_directions();
    test.bytes(at(0, b"abcd"), b"abcd");
    test.decide(1, Decision::Allow);
    test.is(of_server(1, FIRST.wrapping_add(4)), Progress::NoData);
    // A late SYN-ACK begins nothing.
    test.is(syn_ack(1, FIRST), Progress::NoData);
    test.is(at(4, b"e"), Progress::Allowed { settled: true });
    test.is(syn(1, SYN), Progress::NoData);
    test.is(syn_ack(1, FIRST), Progress::NoData);
    test.bytes(at(0, b"other"), b"other");
}

#[test]
fn a_connection_is_settled_when_the_server_has_acknowledged_what_was_judged() {
    let mut test = Test::both_directions();
    test.bytes(at(0, b"abcd"), b"abcd");
    test.is(of_server(1, FIRST.wrapping_add(4)), Progress::NoData);
    test.bytes(at(4, b"ef"), b"abcdef");
    test.decide(1, Decision::Allow);
    let memory = test.table.memory();
    // Too little; more than was sent; a late segment of another connection; a reset.
    for segment in [
        of_server(1, FIRST.wrapping_add(5)),
        of_server(1, FIRST.wrapping_add(7)),
        Segment { sequence: SERVER - 9, ..of_server(1, FIRST.wrapping_add(6)) },
        Segment { flags: Flags { rst: true, ack: true, ..Flags::default() }, ..of_server(1, FIRST.wrapping_add(6)) },
    ] {
        test.is(segment, Progress::NoData);
        test.is(at(6, b""), Progress::Allowed { settled: false });
    }
    test.is(of_server(1, FIRST.wrapping_add(6)), Progress::NoData);
    test.is(at(0, b"xx"), Progress::Allowed { settled: true });
    assert_eq!(test.table.memory(), memory - 6);
}

#[test]
fn a_denied_connection_stays_denied() {
    let mut test = Test::both_directions();
    test.bytes(at(0, b"abcd"), b"abcd");
    test.decide(1, Decision::Deny);
    test.decide(1, Decision::Allow);
    test.is(at(0, b"abcd"), Progress::Denied);
    test.dropped(syn(1, 70_000), Reason::OtherStart);
    test.now += Duration::from_secs(60);
    test.is(at(4, b"e"), Progress::Unknown);
}

#[test]
fn a_connection_whose_beginning_is_not_known_is_unknown() {
    let mut test = Test::one_direction();
    test.is(client(2, FIRST, b"abcd"), Progress::Unknown);
    test.is(Segment { flags: Flags { syn: true, ack: true, ..Flags::default() }, ..syn(2, SYN) }, Progress::Unknown);
    test.is(Segment { flags: Flags { syn: true, fin: true, ..Flags::default() }, ..syn(2, SYN) }, Progress::Unknown);
    assert!(!test.table.decide(test.now, &client(2, 0, b"").connection(), Decision::Allow));
}

#[test]
fn a_connection_is_counted_once_also_on_ports_that_are_used_again() {
    let mut test = Test::both_directions();
    // The SYN-ACK was lost.
    test.is(syn(1, SYN), Progress::NoData);
    test.is(syn_ack(1, FIRST), Progress::NoData);
    test.bytes(at(0, b"good"), b"good");
    test.decide(1, Decision::Allow);
    test.is(of_server(1, FIRST.wrapping_add(4)), Progress::NoData);
    assert_eq!(test.table.stats().connections, 1);
    test.is(syn(1, 7000), Progress::NoData);
    test.is(syn_ack(1, 7001), Progress::NoData);
    test.is(syn_ack(1, 7001), Progress::NoData);
    assert_eq!(test.table.stats().connections, 2);
}

#[test]
fn the_end_of_the_stream_is_reported_and_cannot_move() {
    let mut test = Test::one_direction();
    let fin = |offset, payload| {
        let segment = at(offset, payload);
        Segment { flags: Flags { fin: true, ..segment.flags }, ..segment }
    };
    test.bytes(at(0, b"abcd"), b"abcd");
    test.dropped(fin(2, b"c"), Reason::Conflict);
    test.dropped(fin(5, b""), Reason::Gap);
    test.is(fin(4, b"e"), Progress::Bytes(Prefix { bytes: b"abcde", full: false, ended: true }));
    test.decide(1, Decision::Allow);
    test.dropped(fin(2, b"c"), Reason::Conflict);
    test.is(fin(4, b"e"), Progress::Allowed { settled: false });
}

#[test]
fn nothing_comes_behind_the_end_of_the_stream() {
    let fin = |offset, payload| {
        let segment = at(offset, payload);
        Segment { flags: Flags { fin: true, ..segment.flags }, ..segment }
    };
    let ended = Progress::Bytes(Prefix { bytes: b"abcdef", full: false, ended: true });
    for decided in [false, true] {
        let mut test = Test::both_directions();
        test.is(fin(0, b"abcdef"), ended);
        if decided {
            test.decide(1, Decision::Allow);
        }
        // The server may have ignored the FIN.
        for behind in [at(6, b"g"), at(0, b"abcdefg"), at(5, b"fg"), fin(6, b"g")] {
            test.dropped(behind, Reason::Conflict);
        }
    }
    let mut test = Test::both_directions();
    test.is(fin(0, b"abcdef"), ended);
    test.decide(1, Decision::Allow);
    // The bytes are confirmed, the end is not.
    test.is(of_server(1, FIRST.wrapping_add(6)), Progress::NoData);
    test.is(at(6, b""), Progress::Allowed { settled: false });
    test.dropped(at(6, b"g"), Reason::Conflict);
    test.is(of_server(1, FIRST.wrapping_add(7)), Progress::NoData);
    test.is(at(7, b""), Progress::Allowed { settled: true });
    // An end without a byte before it.
    let mut test = Test::both_directions();
    test.is(fin(0, b""), Progress::Bytes(Prefix { bytes: b"", full: false, ended: true }));
    test.decide(1, Decision::Allow);
    test.is(of_server(1, FIRST), Progress::NoData);
    test.dropped(at(0, b"a"), Reason::Conflict);
}

#[test]
fn bytes_that_are_not_stored_are_reported() {
    let mut test = Test::one_direction();
    let stream = b"0123456789abcdefXYZ";
    let full = Progress::Bytes(Prefix { bytes: &stream[..16], full: true, ended: false });
    test.bytes(at(0, &stream[..16]), &stream[..16]);
    test.is(at(10, &stream[10..]), full);
    test.is(at(16, b"other"), full);
    test.decide(1, Decision::Allow);
    test.is(at(16, b"other"), Progress::Allowed { settled: false });
    test.dropped(at(15, b"?"), Reason::Conflict);
}

#[test]
fn resets_pass_and_change_nothing() {
    let mut test = Test::both_directions();
    let reset = |payload| Segment { flags: Flags { rst: true, ..Flags::default() }, ..at(0, payload) };
    test.is(reset(b""), Progress::NoData);
    test.dropped(reset(b"abcd"), Reason::Unacceptable);
    test.bytes(at(0, b"abcd"), b"abcd");
    test.is(reset(b""), Progress::NoData);
    test.dropped(syn(1, 70_000), Reason::OtherStart);
}

#[test]
fn a_syn_in_the_servers_name_does_not_hide_the_client() {
    let mut test = Test::new(Limits::default());
    let forged = syn(1, 1);
    let forged = Segment { source: forged.destination, destination: forged.source, ..forged };
    test.is(forged, Progress::NoData);
    test.is(syn(1, SYN), Progress::NoData);
    test.is(syn_ack(1, FIRST), Progress::NoData);
    test.bytes(at(0, b"abcd"), b"abcd");
}

#[test]
fn memory_is_flat_under_a_flood_of_syns_and_established_connections_survive() {
    let limits = Limits::default().connections(1000).bytes(400_000);
    let mut test = Test::new(limits);
    for number in 0..400 {
        test.is(syn(number, SYN), Progress::NoData);
        test.bytes(client(number, FIRST, b"abcd"), b"abcd");
    }
    let mut most = 0;
    for number in 1000..60_000 {
        test.is(syn(number, SYN), Progress::NoData);
        most = most.max(test.table.memory());
    }
    assert!(most <= Connections::most_memory(&limits), "{most}");
    assert_eq!((test.table.len(), test.table.stats().evicted), (1000, 58_400));
    for number in 0..400 {
        test.bytes(client(number, FIRST.wrapping_add(4), b"e"), b"abcde");
    }
}

#[test]
fn the_bytes_of_all_connections_are_bounded_and_the_oldest_are_removed_first() {
    let limits = Limits::default().connections(1000).bytes(100_000).bytes_per_connection(4096);
    let mut test = Test::new(limits);
    for number in 0..500 {
        test.is(syn(number, SYN), Progress::NoData);
        let bytes = [number as u8; 5000];
        test.is(
            client(number, FIRST, &bytes),
            Progress::Bytes(Prefix { bytes: &bytes[..4096], full: true, ended: false }),
        );
        assert!(test.table.memory() <= Connections::most_memory(&limits));
    }
    let kept = test.table.len() as u16;
    assert_eq!((kept, test.table.stats().evicted), (24, 476));
    test.is(client(499 - kept, FIRST, b"x"), Progress::Unknown);
    test.dropped(client(500 - kept, FIRST, b"x"), Reason::Conflict);
    // Everything expires.
    test.now += Duration::from_secs(60);
    test.is(client(499, FIRST, b""), Progress::Unknown);
    assert!(test.table.is_empty() && test.table.bytes == 0);
    assert_eq!(test.table.stats().expired, 24);
}

#[test]
fn a_client_that_trickles_does_not_stay_longer() {
    let mut test = Test::one_direction();
    let mut stream = Vec::new();
    for second in 0..60_u32 {
        test.now += Duration::from_secs(1);
        if second < 10 {
            stream.push(b'x');
        }
        if second < 59 {
            test.bytes(at(stream.len() as u32 - 1, b"x"), &stream);
        }
    }
    test.now += Duration::from_secs(1);
    test.is(at(0, b"x"), Progress::Unknown);
    assert_eq!(test.table.stats().expired, 1);
}

#[test]
fn names_are_decided_once_and_doubtful_streams_are_told() {
    let limits = Limits::default().bytes_per_connection(64);
    let mut names = ServerNames::new(limits);
    let now = Instant::now();
    let mut push = |segment: Segment<'_>| {
        let mut seen_here = None;
        let hint = names.push_segment(now, &segment, |connection, seen| {
            assert_eq!(*connection, segment.connection());
            seen_here = Some(seen.clone());
            if seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
        });
        (hint, seen_here)
    };
    for number in 1..=5 {
        assert_eq!(push(syn(number, SYN)), (Hint::Undecided, None));
    }
    let allowed = Hint::Allowed { settled: false };
    assert_eq!(push(client(1, FIRST, b"SSH-2.0-x\r\n")), (allowed, Some(Seen::Other)));
    assert_eq!(push(client(1, FIRST, b"SSH-2.0-x\r\nmore")), (allowed, None));
    assert_eq!(push(client(2, FIRST, &[b'A'; 65])), (Hint::Denied, Some(Seen::TooLong)));
    let fin = Flags { fin: true, ack: true, ..Flags::default() };
    assert_eq!(push(Segment { flags: fin, ..client(3, FIRST, b"GET /") }), (Hint::Denied, Some(Seen::Incomplete)));
    let (hint, seen) = push(client(4, FIRST, b"GET / HTTP/1.0\r\nHost: a.example\r\n\r\n"));
    assert_eq!((hint, seen.as_ref().and_then(Seen::name).unwrap().as_str()), (allowed, "a.example"));
    let hello = test_messages::records(&test_messages::hello_with(&[]), 100);
    assert_eq!(push(client(5, FIRST, &hello[..40])), (Hint::Undecided, None));
    assert!(
        matches!(push(client(5, FIRST.wrapping_add(40), &hello[40..])), (hint, Some(Seen::Tls(_))) if hint == allowed)
    );
    assert_eq!(push(client(6, FIRST, b"x")), (Hint::Unknown, None));
}

#[test]
fn the_memory_of_the_defaults_is_what_the_documentation_says() {
    let limits = Limits::default();
    let table = Connections::most_memory(&limits) - limits.bytes - limits.bytes_per_connection;
    println!(
        "{} bytes for each connection, {} in total",
        table / limits.connections,
        Connections::most_memory(&limits)
    );
    assert!((400..600).contains(&(table / limits.connections)), "{table}");
}

/// The records of a HelloRetryRequest, and of a ServerHello.
fn answers() -> [Vec<u8>; 2] {
    [true, false].map(|retry| {
        let mut answer = vec![22, 3, 3, 0, 88, 2, 0, 0, 84, 3, 3];
        answer.resize(99, 0);
        if retry {
            let random = (11..tls::RETRY_REQUEST)
                .map(|at| (0..=255).find(|byte| tls::in_retry_request(at, *byte) == Some(true)).unwrap());
            answer.splice(11..tls::RETRY_REQUEST, random);
        }
        answer
    })
}

#[test]
fn the_second_hello_is_judged_if_the_server_has_asked_for_it() {
    let [retry, other] = answers();
    let hello = |name: &str| test_messages::records(&test_messages::client_hello(name), 1000);
    let (good, bad) = (hello("good.example"), hello("bad.example"));
    let at_second = good.len() as u32;
    // The server's answer in one segment, in many, and the client that does not wait for it.
    for (length, waits) in [(1000, true), (1, true), (30, true), (7, true), (1000, false)] {
        for (answer, name, expected) in [
            (&retry, &bad, Hint::Denied),
            (&retry, &good, Hint::Allowed { settled: false }),
            (&other, &bad, Hint::Allowed { settled: true }),
        ] {
            let mut names = ServerNames::new(Limits::default().both_directions(true));
            let now = Instant::now();
            let mut push = |segment: Segment<'_>| {
                names.push_segment(now, &segment, |_, seen| {
                    let bad = seen.name().is_some_and(|name| name.is_in("bad.example"));
                    if bad || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
                })
            };
            push(syn(1, SYN));
            push(syn_ack(1, FIRST));
            if length == 7 {
                // Both hellos in one segment, which the client sends again.
                let both = [&good[..], name].concat();
                assert_eq!(push(at(0, &both)), Hint::Drop(Reason::Gap));
                let expected = if name == &bad { Hint::Denied } else { Hint::Allowed { settled: false } };
                assert_eq!(push(at(0, &both)), expected);
                continue;
            }
            assert_eq!(push(at(0, &good)), Hint::Allowed { settled: false });
            if !waits {
                let expected = if name == &bad { Hint::Denied } else { Hint::Allowed { settled: false } };
                assert_eq!(push(at(at_second, name)), expected);
                continue;
            }
            let acknowledged = FIRST.wrapping_add(at_second);
            for (number, piece) in answer.chunks(length).enumerate() {
                let sequence = SERVER.wrapping_add((number * length) as u32);
                push(Segment { sequence, payload: piece, ..of_server(1, acknowledged) });
            }
            push(Segment { sequence: SERVER.wrapping_add(99), ..of_server(1, acknowledged) });
            let change = [20, 3, 3, 0, 1, 1];
            let second = [&change[..], name].concat();
            let (first_part, second_part) = second.split_at(20);
            let client = |offset, payload| Segment { acknowledgment: SERVER + 99, ..at(offset, payload) };
            let hint = push(client(at_second, first_part));
            assert_eq!(hint, if answer == &retry { Hint::Undecided } else { expected });
            assert_eq!(push(client(at_second + 20, second_part)), expected);
        }
    }
}
