//! What nfqueue-inspect reads: the first bytes of clients, segments, QUIC's Initial packets.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::input::Input;
use nfqueue_inspect::{
    Connections, Datagram, Decision, Flags, Hint, Limits, Parsed, Progress, Segment, http,
    quic::{QuicNames, seal_initial},
    tls,
};

/// More steps take long and find no more.
const MOST_STEPS: usize = 64;

/// Reads the bytes as the first ones of a client, and as a packet.
pub fn first_bytes(data: &[u8]) {
    stable(data, tls::server_name);
    stable(data, tls::client_hello);
    stable(data, http::host);
    if let Ok(segment) = Segment::parse(data) {
        assert!(segment.payload.len() + 40 <= data.len());
    }
    if let Ok(datagram) = Datagram::parse(data) {
        assert!(datagram.payload.len() + 28 <= data.len());
    }
}

/// What a parser finds in a part is what it finds in the whole.
fn stable<T: PartialEq + std::fmt::Debug>(data: &[u8], parse: fn(&[u8]) -> Parsed<T>) {
    let whole = parse(data);
    // Not each length of a long input: that would take the square of its length.
    for end in (0..data.len()).step_by(data.len() / 64 + 1) {
        let part = parse(&data[..end]);
        assert!(part == Parsed::NeedMore || part == whole, "{part:?} of {end} bytes, then {whole:?}");
    }
}

fn addresses() -> [SocketAddr; 2] {
    [SocketAddr::from(([192, 0, 2, 1], 40_000)), SocketAddr::from(([192, 0, 2, 7], 443))]
}

/// How many bytes of a client are stored.
const STORED: usize = 64;

/// Takes the bytes for segments of one client and its server.
pub fn segments(data: &[u8]) {
    let mut input = Input::new(data);
    let both_directions = input.flag();
    let limits =
        Limits::default().connections(2).bytes_per_connection(STORED).bytes(100).both_directions(both_directions);
    let mut table = Connections::new(limits);
    let [client, server] = addresses();
    let start = Instant::now();
    let mut seconds = 0;
    let syn = 0xffff_fff0_u32;
    // What accepted segments carry of the bytes that are judged, by their offsets. With both
    // directions, the beginning of the stream changes, and the model knows nothing of it.
    let mut carried: [Option<u8>; STORED] = [None; STORED];
    let mut checks = !both_directions;
    let mut begun_by_server = false;
    for step in 0..MOST_STEPS {
        if step > 0 && input.is_empty() {
            break;
        }
        let [bits, more] = if step == 0 { [1, 0] } else { input.array() };
        // Close to each other, so that they overlap.
        let offset = if step == 0 { 0 } else { u32::from(input.byte() & 63) };
        let sequence = syn.wrapping_add(offset);
        let acknowledgment = syn.wrapping_add(u32::from(more));
        let flag = |bit: u8| bits >> bit & 1 != 0;
        let of_server = flag(6) && flag(7);
        let payload = input.take(usize::from(more & 31));
        let flags =
            Flags { syn: flag(0), ack: flag(1), fin: flag(2), rst: flag(3) && flag(4), urg: flag(4) && flag(5) };
        let (source, destination) = if of_server { (server, client) } else { (client, server) };
        let segment = Segment { source, destination, sequence, acknowledgment, flags, payload };
        if both_directions {
            seconds += u64::from(input.byte() & 3);
        }
        let now = start + Duration::from_secs(seconds);
        // A connection that is begun in the server's name may displace the client's. Then the
        // client's segments are those of a server.
        checks &= !(begun_by_server && table.len() < 2);
        begun_by_server |= of_server && flags.syn && !flags.ack;
        let mut is_judged = false;
        let (accepted, decision) = match table.push(now, &segment) {
            Progress::NoData => (true, None),
            Progress::Allowed { settled } => {
                checks &= !settled;
                (true, None)
            }
            Progress::Bytes(prefix) => {
                is_judged = true;
                assert!(prefix.bytes.len() <= STORED && (!payload.is_empty() || prefix.ended));
                let all =
                    carried.iter().zip(prefix.bytes).all(|(carried, byte)| carried.is_none_or(|one| one == *byte));
                // A SYN of the server begins a connection of its own.
                assert!(all || !checks || of_server, "what was accepted is not what is judged");
                match more & 0xc0 {
                    0x40 => (true, Some((Decision::Allow, prefix.bytes.len()))),
                    0x80 => (false, Some((Decision::Deny, 0))),
                    _ => (!prefix.full, None),
                }
            }
            _ => (false, None),
        };
        assert!(table.memory() <= Connections::most_memory(&limits));
        if checks && accepted && !of_server && !flags.syn {
            // The first byte follows the SYN.
            for (at, byte) in (0..payload.len()).map(|at| at + offset as usize).zip(payload) {
                let Some(slot) = at.checked_sub(1).and_then(|at| carried.get_mut(at)) else { continue };
                assert!(slot.is_none_or(|other| other == *byte), "an accepted segment has another byte at {at}");
                if is_judged {
                    *slot = Some(*byte);
                }
            }
        }
        if let Some((decision, judged)) = decision {
            assert!(table.decide(now, &segment.connection(), decision));
            if !of_server {
                carried[judged..].fill(None);
            }
        }
    }
}

/// Takes the bytes for frames in Initial packets of one client, and for other datagrams.
pub fn initials(data: &[u8]) {
    let mut input = Input::new(data);
    let limits = Limits::default().bytes_per_connection(512).bytes(4096);
    let mut names = QuicNames::new(limits);
    let [source, destination] = addresses();
    let start = Instant::now();
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let bits = input.byte();
        let (key, to) = ([bits & 3; 8], [bits >> 2 & 3; 8]);
        let number = input.byte();
        let content = input.bytes();
        let payload = match bits >> 6 {
            0 => content.to_vec(),
            1 => seal_initial(true, &key, &to, number, &content[..content.len().min(16_000)]),
            _ => seal_initial(false, &key, &to, number, &content[..content.len().min(16_000)]),
        };
        let datagram = Datagram { source, destination, payload: &payload };
        let mut decisions = 0;
        let hint = names.push_datagram(start, &datagram, |_, seen| {
            decisions += 1;
            if seen.is_doubtful() || bits & 0x20 != 0 { Decision::Deny } else { Decision::Allow }
        });
        // A datagram that begins with a sealed packet has one, and may have others behind it.
        assert!(decisions == 0 || !matches!(hint, Hint::Undecided | Hint::Unknown | Hint::Unparsed(_)));
        // Sixteen streams, each with its bytes and its gaps.
        assert!(names.memory() < 2_000_000 + 16 * (512 + 64 * 32 + 200));
    }
}

/// The inputs that fuzzing begins with.
#[cfg(test)]
pub(super) mod seeds {
    /// A ClientHello for `example.com`.
    fn hello(name: &[u8]) -> Vec<u8> {
        let length = name.len() as u8;
        let mut body = [&[3, 3][..], &[7; 32], &[0, 0, 4, 0x13, 1, 0x13, 2, 1, 0]].concat();
        body.extend([0, length + 19, 0x0a, 0x0a, 0, 0, 0, 0, 0, length + 5, 0, length + 3, 0, 0, length]);
        body.extend(name);
        body.extend([0xfe, 0x0d, 0, 2, 0, 0]);
        [&[1, 0, 0, body.len() as u8][..], &body].concat()
    }

    fn records(hello: &[u8], length: usize) -> Vec<u8> {
        let record = |piece: &[u8]| [&[22, 3, 1, 0, piece.len() as u8][..], piece].concat();
        hello.chunks(length).flat_map(record).collect()
    }

    pub(in super::super) fn first_bytes() -> Vec<Vec<u8>> {
        let hello = hello(b"example.com");
        let mut packet = vec![0x45, 0, 0, 43, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 7];
        packet.extend([0x9c, 0x40, 1, 0xbb, 0, 0, 0, 5, 0, 0, 0, 6, 0x50, 0x18, 1, 0, 0, 0, 0, 0, b'a', b'b', b'c']);
        let mut six = vec![0x60, 0, 0, 0, 0, 24, 0, 64];
        six.extend([0x20; 32]);
        six.extend([17, 1, 5, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 53, 1, 0, 0, 8, 0, 0]);
        vec![
            records(&hello, 200),
            records(&hello, 7),
            hello,
            b"GET / HTTP/1.1\r\nHost: example.com:80\r\nA: b\r\n\r\n".to_vec(),
            b"\r\nGET http://[::1]/ HTTP/1.1\nHost:\t[::1]\n\n".to_vec(),
            b"CONNECT a:1 HTTP/1.0\r\nHost : a\r\n b\r\n\r\n".to_vec(),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            packet,
            six,
        ]
    }

    pub(in super::super) fn segments() -> Vec<Vec<u8>> {
        let segment = |bits: u8, more: u8, offset: u8, payload: &[u8]| {
            [&[bits, more | payload.len() as u8, offset][..], payload].concat()
        };
        let honest =
            [segment(2, 0, 1, b"abcd"), segment(2, 0, 5, b"efgh"), segment(2, 0x40, 9, b"i"), segment(6, 0, 10, b"")];
        let other = [
            segment(2, 0, 1, b"abcd"),
            segment(2, 0, 3, b"xyz"),
            segment(2, 0x40, 1, b"abcdef"),
            segment(2, 0, 4, b"xx"),
        ];
        let denied =
            [segment(2, 0, 3, b"gap"), segment(2, 0x80, 1, b"ab"), segment(2, 0, 1, b"ab"), segment(1, 0, 9, b"")];
        let mut both = vec![1, 0];
        // The server's SYN-ACK and acknowledgement; a second between them.
        for one in [segment(0xc3, 1, 10, b""), segment(2, 11, 1, b"abcdefghijk"), segment(0xc2, 9, 11, b"")] {
            both.extend([one, vec![1]].concat());
        }
        vec![
            [&[0][..], &honest.concat()].concat(),
            [&[0][..], &other.concat()].concat(),
            [&[0][..], &denied.concat()].concat(),
            both,
        ]
    }

    pub(in super::super) fn initials() -> Vec<Vec<u8>> {
        let step = |bits: u8, number: u8, content: &[u8]| {
            [&[bits, number][..], &(content.len() as u16).to_be_bytes(), content].concat()
        };
        let crypto = |offset: u8, piece: &[u8]| [&[6, offset, 0x40, piece.len() as u8][..], piece].concat();
        let hello = hello(b"example.com");
        let shuffled = [crypto(40, &hello[40..]), vec![1, 0, 0], crypto(0, &hello[..40])].concat();
        let acknowledged =
            [&[2, 5, 0, 1, 0, 0, 0, 3, 1, 0, 0, 0, 1, 2, 3][..], &crypto(0, b"\x01"), &[0x1c, 0, 0, 1, b'x']].concat();
        let sealed = super::seal_initial(false, &[9; 8], &[9; 8], 1, &crypto(0, &hello));
        vec![
            step(0x80, 0, &crypto(0, &hello)),
            step(0x40, 3, &shuffled),
            [step(0x80, 0, &crypto(0, &hello[..30])), step(0x84, 1, &crypto(20, &hello[20..]))].concat(),
            step(0x80, 0, &acknowledged),
            [step(0, 0, &sealed), step(0, 0, &[0x40; 30])].concat(),
        ]
    }
}
