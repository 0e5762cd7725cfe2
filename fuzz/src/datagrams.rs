//! Decoding of what the kernel sends.

use std::net::{IpAddr, SocketAddr};

use super::input::Input;
use nfqueue_divert::decode;
use nfqueue_proto::wire::{
    Message, Messages, PacketMessage, attribute,
    conntrack::Conntrack,
    expectation::Expectation,
    packet::{attributes_of, find, find_be32, hardware_address, timestamp, vlan},
};

/// Decodes the bytes as a datagram, and as the content of every attribute.
pub fn datagrams(data: &[u8]) {
    let mut count = 0;
    for message in Messages::new(data) {
        count += 1;
        match message {
            Message::Packet(packet) => decode_packet(data, &packet),
            Message::Reply(reply) => {
                assert!(reply.error.is_none_or(|errno| (1..4096).contains(&errno.raw_os_error())));
                assert!(reply.text.is_none_or(|text| text.len() <= data.len()));
            }
            Message::BadPacket(_) | Message::Unknown => {}
        }
    }
    // Every message but the last has a header.
    assert!(count <= data.len() / 16 + 1, "{count} messages in {} bytes", data.len());
    decode_values(data);
    decode_tables(data);
    encode_expectation(&mut Input::new(data));
}

/// As what the kernel sends about rules and sets.
fn decode_tables(data: &[u8]) {
    let messages = decode::attributes(data);
    assert!(messages.len() <= data.len() / 16, "{} messages in {} bytes", messages.len(), data.len());
    assert!(decode::replies(data) <= messages.len());
    for attributes in messages.into_iter().chain([data]) {
        if let Some((chain, _)) = decode::rule_counter(attributes) {
            // A byte that is not UTF-8 becomes a character of three.
            assert!(chain.len() <= attributes.len() * 3);
        }
        let elements = decode::elements(attributes);
        assert!(elements.iter().map(|(key, _)| key.len()).sum::<usize>() <= attributes.len());
    }
}

fn decode_packet(data: &[u8], packet: &PacketMessage) {
    let (attributes, payload) = (&data[packet.attributes.clone()], &data[packet.payload.clone()]);
    let decoded: Vec<_> = attributes_of(attributes).collect();
    // Of a message with a malformed attribute no packet is made.
    assert!(decoded.iter().all(Option::is_some));
    if find(attributes, attribute::PAYLOAD).is_none() {
        assert!(payload.is_empty());
    }
    for (_, value) in decoded.into_iter().flatten() {
        assert!(value.len() <= attributes.len());
        decode_values(value);
    }
}

fn decode_values(value: &[u8]) {
    let _ = (timestamp(value), vlan(value), find_be32(value, attribute::MARK));
    assert!(hardware_address(value).is_none_or(|address| address.len() <= value.len()));
    let entry = Conntrack::decode(value);
    // A byte that is not UTF-8 becomes a character of three.
    assert!(entry.helper.is_none_or(|name| name.len() <= value.len() * 3));
}

fn encode_expectation(input: &mut Input<'_>) {
    let mut address = |v6: bool| match v6 {
        false => IpAddr::from(input.array::<4>()),
        true => IpAddr::from(input.array::<16>()),
    };
    let (destination, source, other) = (address(true), address(false), address(true));
    let mut expectation = Expectation::new(input.byte().into(), SocketAddr::new(destination, input.short()));
    if input.flag() {
        expectation = expectation.source_address(source).source_port(input.short());
    }
    if input.flag() {
        expectation = expectation.translation(input.flag(), SocketAddr::new(other, input.short()));
    }
    let mut name = || String::from_utf8_lossy(input.bytes()).into_owned();
    let expectation = expectation.helper(name()).function(name());
    if expectation.check().is_ok() {
        assert!(attributes_of(&expectation.encode()).all(|attribute| attribute.is_some()));
    }
}
