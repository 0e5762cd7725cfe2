//! The inputs that fuzzing begins with, made by this crate's own encoders.

use std::net::SocketAddr;

use nfqueue_proto::{
    record::{PartRecord, QueueRecord, Record},
    types::{Action, Hook, Vlan},
    wire::{
        config::{Command, Config, CopyMode, FLAGS_ALL},
        conntrack::encode_changes,
        verdict::{Attachments, VerdictFields, encode_batch, encode_single},
    },
};
use tokio_nfqueue::{
    Protocol,
    simulated::{Connection, Kernel, TestPacket},
};

/// The seeds of a target, by its name.
pub(super) fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "datagrams" => datagrams(),
        "received" => received(),
        "requests" => vec![in_steps(0, &requests()), in_steps(1, &requests())],
        "ledger" => vec![vec![0; 64], (0..=255).collect(), (0..=255).rev().collect()],
        "edits" => edits(),
        "records" => records(),
        "captures" => captures(),
        "first_bytes" => super::inspect::seeds::first_bytes(),
        "segments" => super::inspect::seeds::segments(),
        "initials" => super::inspect::seeds::initials(),
        _ => unreachable!("no target {target}"),
    }
}

fn packets() -> Vec<TestPacket> {
    let v4: [SocketAddr; 2] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().expect("an address"));
    let v6: [SocketAddr; 2] = ["[fd00::1]:4000", "[fd00::2]:53"].map(|address| address.parse().expect("an address"));
    let mut packets = Vec::new();
    for [client, server] in [v4, v6] {
        packets
            .push(TestPacket::udp(client, server, b"query").of_connection(Connection::new(1).mark(7).labels([1; 16])));
        packets.push(TestPacket::tcp_syn(client, server).interface_out(1).hook(Hook::Forward));
        packets.push(TestPacket::tcp(client, server, b"data").owner(0, 0).security_context(b"context"));
        packets.push(TestPacket::echo_request(client.ip(), server.ip(), b"ping").mark(9).hardware_address(&[2; 6]));
        packets.push(TestPacket::ip(client.ip(), server.ip(), Protocol::Other(132), &[5; 12]).priority(3));
    }
    packets.push(packets[0].clone().bridged(&[7; 14], Some(Vlan { protocol: 0x8100, control: 5 })));
    packets.push(TestPacket::udp(v4[0], v4[1], &[1; 40]).gso(20));
    packets
}

/// What a program sends: a configuration, verdicts, a batch, the end.
fn requests() -> Vec<Vec<u8>> {
    let config = Config {
        command: Some(Command::Bind),
        copy: Some(CopyMode::Packet(0xffff)),
        max_len: Some(100),
        flags: Some((FLAGS_ALL, FLAGS_ALL & !1)),
    };
    let end = Config { command: Some(Command::Unbind), ..Config::default() };
    let marked = VerdictFields { mark: Some(5), priority: Some(6), ..VerdictFields::plain(Action::Accept) };
    let changes = encode_changes(Some((1, 1)), Some(([1; 16], [1; 16])), Some(60));
    let attachments = Attachments {
        payload: Some(b"\x45payload"),
        vlan: Some(Vlan { protocol: 0x8100, control: 5 }),
        layer2_header: Some(&[7; 14]),
        conntrack: Some(&changes),
        expectation: None,
    };
    let mut all = vec![Vec::new(); 5];
    config.encode(&mut all[0], 1, 0);
    encode_single(&mut all[1], (2, true), 0, 1, &marked, &attachments);
    encode_single(&mut all[2], (3, false), 0, 2, &VerdictFields::plain(Action::Drop), &Attachments::default());
    encode_batch(&mut all[3], 4, 0, 9, &VerdictFields::plain(Action::Requeue { queue: 3, bypass: true }));
    end.encode(&mut all[4], 5, 0);
    all
}

/// What the kernel sends: packets, acknowledgements and errors.
fn datagrams() -> Vec<Vec<u8>> {
    let (kernel, requests) = (Kernel::new(), requests());
    let socket = kernel.raw_socket(true);
    let send = |datagram: &Vec<u8>| socket.send(datagram).expect("it is shorter than the longest");
    send(&requests[0]);
    kernel.send_all(packets());
    requests[1..].iter().for_each(send);
    // For a queue that does not exist any more.
    send(&requests[1]);
    std::iter::from_fn(|| socket.receive().ok()).map(Vec::from).collect()
}

/// A step with a number of bytes before the bytes.
fn in_steps(step: u8, all: &[Vec<u8>]) -> Vec<u8> {
    let mut steps = Vec::new();
    for bytes in all {
        steps.extend([step, 0]);
        steps.extend((bytes.len() as u16).to_be_bytes());
        steps.extend(bytes);
    }
    steps
}

fn received() -> Vec<Vec<u8>> {
    let forged = datagrams().into_iter().map(|datagram| {
        let length = (datagram.len() as u16).to_be_bytes();
        // Without options: forges it; then receives and decides, holds, decides.
        [&[0, 0], &length[..], &datagram, &[11, 6, 9, 0, 2, 1, 2, 9, 12, 0, 2, 8]].concat()
    });
    let options = (0..16).map(|options| vec![options, 0, 200, 0, 1, 8, b'a', 11, 0, 13, 0, 9, 8, 9, 14, 2, 10, 15]);
    forged.chain(options).collect()
}

fn edits() -> Vec<Vec<u8>> {
    let all = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map(|step: u8| [step, 0, 1, 2, 3, 4, 5]).concat();
    let mut seeds = Vec::new();
    for packet in packets().iter().map(TestPacket::payload).chain(&routed().map(Into::into)) {
        let length = (packet.len() as u16).to_be_bytes();
        for steps in [&all[..], &[11, 0, 7], &[12, 7, 0, 1, b'x'], &[13, 2, 0], &[10, 2, 1, 0, 1, 9, 13, 1]] {
            seeds.push([&length, &packet[..], steps].concat());
        }
    }
    seeds
}

/// Packets with options, extension headers and routes.
fn routed() -> [Vec<u8>; 4] {
    let udp = [0, 7, 0, 8, 0, 12, 1, 1, b'd', b'a', b't', b'a'];
    let v4 = |options: &[u8], fragment: u8| {
        let (header, length) = (20 + options.len(), 20 + options.len() + udp.len());
        let begin =
            [0x40 | (header as u8 / 4), 0, 0, length as u8, 0, 1, fragment, 0, 9, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        [&begin[..], options, &udp].concat()
    };
    let v6 = |next: u8, extension: &[u8]| {
        let mut header = [0; 40];
        header[0] = 0x60;
        header[5] = (extension.len() + udp.len()) as u8;
        header[6..8].copy_from_slice(&[next, 9]);
        (header[8], header[23], header[24], header[39]) = (0xfd, 1, 0xfd, 2);
        [&header[..], extension, &udp].concat()
    };
    let mut route = vec![17, 2, 0, 1, 0, 0, 0, 0];
    route.extend([9; 16]);
    [v4(&[131, 7, 4, 10, 0, 0, 9, 0], 0), v4(&[], 0x20), v6(43, &route), v6(60, &[17, 0, 1, 4, 0, 0, 0, 0])]
}

fn records() -> Vec<Vec<u8>> {
    let table = PartRecord { cookie: 9, body: include_bytes!("../seeds/records/03").to_vec() };
    assert!(super::records::decode_table(&table.body), "`NFQUEUE_FUZZ_WRITE_SEEDS=1 cargo test -p nfqueue-divert`");
    [
        Record::default(),
        Record { queues: vec![QueueRecord::example()], parts: Vec::new() },
        Record { queues: Vec::new(), parts: vec![table.clone()] },
    ]
    .iter()
    .map(Record::encode)
    .chain([table.body])
    .collect()
}

fn captures() -> Vec<Vec<u8>> {
    let frame = packets()[0].payload().clone();
    let headers: [(u32, &[u8]); 5] = [
        (1, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x81, 0, 0, 5, 8, 0]),
        (101, &[]),
        (113, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0]),
        (276, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (0, &[2, 0, 0, 0]),
    ];
    let file = |big: bool, (link, header): (u32, &[u8])| {
        let word = |number: u32| if big { number.to_be_bytes() } else { number.to_le_bytes() };
        let length = word((header.len() + frame.len()) as u32);
        [&word(0xa1b2_c3d4)[..], &[0; 16], &word(link), &[0; 8], &length, &length, header, &frame].concat()
    };
    headers.into_iter().flat_map(|header| [file(false, header), file(true, header)]).collect()
}
