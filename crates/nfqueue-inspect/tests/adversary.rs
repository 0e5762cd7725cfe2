//! A client that does all it can to get a forbidden name to a server, and servers that differ in
//! what they accept.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use nfqueue_inspect::{Decision, Flags, Hint, Limits, Parsed, Seen, Segment, ServerNames, http, tls};
use proptest::{prelude::*, strategy::ValueTree};

/// Which of two copies a server keeps, if both come before the bytes that precede them.
#[derive(Debug, Clone, Copy)]
enum Keeps {
    First,
    Last,
}

/// A TCP server. `cookies`: it keeps nothing of a connection before the handshake is complete.
struct Server {
    keeps: Keeps,
    cookies: bool,
    state: State,
    /// How many connections it has accepted: its sequence numbers differ.
    accepted: u32,
    /// The clients' first bytes in the connections that it has offered by cookies.
    offered: Vec<u32>,
}

enum State {
    Listening,
    /// SYN received: the client's first byte, and the server's.
    Half(u32, u32),
    Open(Open),
}

struct Open {
    first: u32,
    own: u32,
    stream: Vec<u8>,
    /// Bytes behind a gap, by their offset.
    later: std::collections::BTreeMap<usize, u8>,
    urgent: Option<usize>,
}

/// A segment on its way from the filter to the server.
#[derive(Debug, Clone)]
struct Sent {
    sequence: u32,
    acknowledgment: u32,
    flags: Flags,
    payload: Vec<u8>,
}

const CLIENT: &str = "192.0.2.1:40000";
const SERVER: &str = "192.0.2.7:443";

impl Server {
    /// What the server sends in return.
    fn receive(&mut self, sent: &Sent) -> Vec<Sent> {
        let answer = |own: u32, first: u32, syn| Sent {
            sequence: own,
            acknowledgment: first,
            flags: Flags { syn, ack: true, ..Flags::default() },
            payload: Vec::new(),
        };
        let flags = sent.flags;
        match &mut self.state {
            State::Open(open) => {
                let answers =
                    if flags.syn { vec![answer(open.own, open.next(), false)] } else { open.receive(sent, self.keeps) };
                if flags.rst && sent.sequence == open.next() {
                    self.state = State::Listening;
                }
                answers
            }
            State::Half(first, own) if !flags.syn && (flags.ack || flags.rst) => {
                let (first, own) = (*first, *own);
                if flags.rst {
                    self.state = State::Listening;
                } else if sent.acknowledgment == own {
                    return self.open(first, own, sent);
                }
                Vec::new()
            }
            State::Half(first, own) if flags.syn && sent.sequence.wrapping_add(1) == *first => {
                vec![answer(own.wrapping_sub(1), *first, true)]
            }
            State::Half(..) => Vec::new(),
            State::Listening if flags.syn && !flags.ack => {
                let first = sent.sequence.wrapping_add(1);
                self.accepted += 1;
                // A cookie of Linux follows the client's number.
                let own = if self.cookies { first.wrapping_add(77_777) } else { 1000 + self.accepted * 500_000 };
                if self.cookies {
                    self.offered.push(first);
                } else {
                    self.state = State::Half(first, own);
                }
                vec![answer(own.wrapping_sub(1), first, true)]
            }
            State::Listening if self.cookies && flags.ack && !flags.rst => {
                // Linux takes a number that differs by the size of a segment.
                let fits = |first: &u32| {
                    let late = sent.sequence.wrapping_sub(*first) as i32;
                    (-3..=3).contains(&late) && first.wrapping_add(77_777) == sent.acknowledgment
                };
                if self.offered.iter().any(fits) {
                    return self.open(sent.sequence, sent.acknowledgment, sent);
                }
                Vec::new()
            }
            State::Listening => Vec::new(),
        }
    }

    fn open(&mut self, first: u32, own: u32, sent: &Sent) -> Vec<Sent> {
        let mut open = Open { first, own, stream: Vec::new(), later: Default::default(), urgent: None };
        let answers = open.receive(sent, self.keeps);
        self.state = State::Open(open);
        answers
    }

    /// The forbidden name has got to the server.
    fn is_reached(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        let mut stream = open.stream.clone();
        if let Some(urgent) = open.urgent.filter(|urgent| *urgent < stream.len()) {
            stream.remove(urgent);
        }
        let name = match (tls::server_name(&stream), http::host(&stream)) {
            (Parsed::Found(hello), _) => hello.name,
            (_, Parsed::Found(head)) => head.host,
            _ => None,
        };
        name.is_some_and(|name| name.is_in("evil.example"))
    }
}

impl Open {
    fn next(&self) -> u32 {
        self.first.wrapping_add(self.stream.len() as u32)
    }

    fn receive(&mut self, sent: &Sent, keeps: Keeps) -> Vec<Sent> {
        // An acknowledgement of what was never sent, or from long before.
        if !sent.flags.ack || self.own.wrapping_sub(sent.acknowledgment) > 1 << 16 {
            return Vec::new();
        }
        let begin = sent.sequence.wrapping_sub(self.first) as i32 as i64;
        if sent.flags.urg && begin >= 0 {
            self.urgent = Some(begin as usize);
        }
        for (offset, byte) in (begin..).zip(&sent.payload) {
            let next = self.stream.len() as i64;
            if offset < next || offset > next + 60_000 {
                continue;
            }
            match keeps {
                Keeps::First => _ = self.later.entry(offset as usize).or_insert(*byte),
                Keeps::Last => _ = self.later.insert(offset as usize, *byte),
            }
        }
        while let Some(byte) = self.later.remove(&self.stream.len()) {
            self.stream.push(byte);
        }
        let flags = Flags { ack: true, ..Flags::default() };
        vec![Sent { sequence: self.own, acknowledgment: self.next(), flags, payload: Vec::new() }]
    }
}

#[derive(Debug, Clone)]
struct Step {
    kind: u8,
    /// Which stream the payload is of, where the filter may think that it begins, and which piece
    /// of it is sent.
    stream: usize,
    base: usize,
    from: usize,
    length: usize,
    flags: u8,
    transit: u8,
}

fn step() -> impl Strategy<Value = Step> {
    (0u8..16, 0usize..4, 0usize..4, 0usize..9, 1usize..10, any::<u8>(), 0u8..8).prop_map(
        |(kind, stream, base, from, length, flags, transit)| Step { kind, stream, base, from, length, flags, transit },
    )
}

/// Where the streams are cut.
const CUTS: [usize; 10] = [0, 3, 16, 32, 48, 56, 64, 72, 80, 1000];

fn hello(name: &str) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    let length = name.len() as u8;
    body.extend([0, length + 9, 0, 0, 0, length + 5, 0, length + 3, 0, 0, length]);
    body.extend(name.as_bytes());
    let mut record = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    record.extend(body);
    record
}

fn streams() -> [Vec<u8>; 4] {
    [
        hello("evil.example"),
        hello("good.example"),
        vec![0xff; 200],
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n".to_vec(),
    ]
}

/// Whether a forbidden name gets through, and whether any data does.
fn attack(steps: &[Step], keeps: Keeps, cookies: bool, both_directions: bool) -> (bool, bool) {
    let [client, server_address]: [SocketAddr; 2] = [CLIENT, SERVER].map(|text| text.parse().unwrap());
    let mut names =
        ServerNames::new(Limits::default().both_directions(both_directions).lifetime(Duration::from_secs(3600)));
    let mut server = Server { keeps, cookies, state: State::Listening, accepted: 0, offered: Vec::new() };
    // What is on its way, and whether the connection was settled when it was accepted.
    let mut network: Vec<(Sent, bool)> = Vec::new();
    // The number of the server that the client has got last.
    let mut own = 0_u32;
    let streams = streams();
    let first_numbers = [100_u32, 103, 84, 0xffff_fff0];
    let now = Instant::now();
    let mut has_data = false;
    for step in steps {
        let first = first_numbers[step.base];
        let flag = |bit: u8| step.flags >> bit & 15 == 15;
        let sent = match step.kind {
            0 | 1 => {
                let flags = Flags { syn: true, ..Flags::default() };
                let payload = if flag(0) { streams[step.stream].clone() } else { Vec::new() };
                Some(Sent { sequence: first.wrapping_sub(1), acknowledgment: 0, flags, payload })
            }
            2 if step.flags < 60 => {
                // Exactly what the server takes for the end of the connection.
                let State::Open(open) = &server.state else { continue };
                let flags = Flags { rst: true, ..Flags::default() };
                Some(Sent { sequence: open.next(), acknowledgment: 0, flags, payload: Vec::new() })
            }
            2..13 => {
                let stream = &streams[step.stream];
                let from = CUTS[step.from].min(stream.len());
                let to = CUTS[(step.from + step.length).min(9)].min(stream.len());
                let payload = if step.kind == 2 { Vec::new() } else { stream[from..to].to_vec() };
                let acknowledgment = if flag(1) { first.wrapping_add(77_777) } else { own };
                let flags = Flags { ack: true, urg: flag(2), fin: flag(4), ..Flags::default() };
                Some(Sent { sequence: first.wrapping_add(from as u32), acknowledgment, flags, payload })
            }
            _ => None,
        };
        let mut delivered = Vec::new();
        match sent {
            Some(sent) => {
                let Sent { sequence, acknowledgment, flags, .. } = sent;
                let (source, destination) = (client, server_address);
                let payload = &sent.payload;
                let segment = Segment { source, destination, sequence, acknowledgment, flags, payload };
                let hint = names.push_segment(now, &segment, |_, seen: &Seen| {
                    let bad = seen.name().is_some_and(|name| name.is_in("evil.example"));
                    if bad || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
                });
                if hint.may_pass() {
                    has_data |= !sent.payload.is_empty();
                    let settled = hint == Hint::Allowed { settled: true };
                    match step.transit {
                        // It is lost, or the server does not accept it.
                        0 | 1 => {}
                        2 => network.push((sent, settled)),
                        3 => {
                            network.push((sent.clone(), settled));
                            delivered.push(sent);
                        }
                        _ => delivered.push(sent),
                    }
                }
            }
            None if !network.is_empty() => delivered.push(network.remove(step.from % network.len()).0),
            None => {}
        }
        for sent in delivered {
            let was_open = matches!(server.state, State::Open(_));
            let answers = server.receive(&sent);
            if was_open && matches!(server.state, State::Listening) {
                // Nothing stays in the network for longer than a connection, and its cookie is
                // void: limits that the documentation names.
                network.clear();
                server.offered.clear();
            }
            for answer in answers {
                let Sent { sequence, acknowledgment, flags, .. } = answer;
                if flags.syn {
                    // Another limit: segments that outlive an allowed connection.
                    network.retain(|(_, settled)| !settled);
                    own = sequence.wrapping_add(1);
                }
                let (source, destination) = (server_address, client);
                let segment = Segment { source, destination, sequence, acknowledgment, flags, payload: &[] };
                let hint = names.push_segment(now, &segment, |_, _| unreachable!());
                assert!(hint.may_pass());
            }
            if server.is_reached() {
                return (true, true);
            }
        }
    }
    (false, has_data)
}

/// What the test itself can find: without a filter, the name gets to the server.
fn without_a_filter() -> Vec<Sent> {
    let flags = Flags { syn: true, ..Flags::default() };
    let syn = Sent { sequence: 99, acknowledgment: 0, flags, payload: Vec::new() };
    let flags = Flags { ack: true, ..Flags::default() };
    let data = Sent { sequence: 100, acknowledgment: 501_000, flags, payload: hello("evil.example") };
    vec![syn, data]
}

#[test]
fn the_model_of_a_server_reads_the_forbidden_name() {
    for keeps in [Keeps::First, Keeps::Last] {
        let mut server = Server { keeps, cookies: false, state: State::Listening, accepted: 0, offered: Vec::new() };
        for sent in without_a_filter() {
            server.receive(&sent);
        }
        assert!(server.is_reached());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn no_forbidden_name_gets_to_a_server(
        steps in prop::collection::vec(step(), 1..60),
        keeps in prop_oneof![Just(Keeps::First), Just(Keeps::Last)],
        cookies in any::<bool>(),
        both_directions in any::<bool>(),
    ) {
        // With one direction, SYN cookies are a limit that the documentation names.
        let (reached, _) = attack(&steps, keeps, cookies && both_directions, both_directions);
        prop_assert!(!reached);
    }
}

/// The attacks are worth the name: most of them get data to the server.
#[test]
fn most_attacks_get_data_past_the_filter() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = prop::collection::vec(step(), 30..60);
    let with_data = (0..300).filter(|_| {
        let steps = strategy.new_tree(&mut runner).unwrap().current();
        attack(&steps, Keeps::Last, false, true).1
    });
    let count = with_data.count();
    assert!(count > 100, "{count} of 300");
}
