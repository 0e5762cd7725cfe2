//! What only a super-packet of a kernel shows, and the update of a checksum. All else is in
//! `tests/edit`.

use etherparse::{PacketBuilder, checksum::Sum16BitWords};

use super::{Edit, Unreachable, checksum, layout::Transport};
use crate::Error;

fn udp(payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2).write(&mut packet, payload).unwrap();
    packet
}

fn tcp(payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv6([1; 16], [2; 16], 64).tcp(1, 2, 3, 4).write(&mut packet, payload).unwrap();
    packet
}

fn super_packet(packet: &[u8]) -> Edit {
    Edit { gso: true, ..Edit::new(packet).unwrap() }
}

#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.expect_err("refused").to_string()
}

#[test]
fn super_packets_keep_their_length() {
    let mut edit = super_packet(&udp(b"hello"));
    assert!(refusal(edit.replace_payload(b"longer")).contains("must keep its length"));
    refusal(edit.splice_ip_payload(12.., b""));
    edit.replace_payload(b"HELLO").unwrap();
    let pseudo_header = Sum16BitWords::new().add_slice(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 17, 0, 13]);
    assert_eq!(edit.finish()[26..28], (!pseudo_header.ones_complement()).to_ne_bytes());

    let mut edit = super_packet(&tcp(b"hello"));
    refusal(edit.replace_payload(b""));
    edit.payload_mut().unwrap().make_ascii_uppercase();
    assert_eq!(edit.finish(), tcp(b"HELLO"));
}

#[test]
fn super_packets_are_not_turned() {
    let (mut edit, mut whole) = (super_packet(&udp(b"hello")), Edit::new(&udp(b"hello")).unwrap());
    assert!(refusal(edit.turn_around()).contains("super-packet"));
    edit.icmp_unreachable(Unreachable::Port).unwrap();
    whole.icmp_unreachable(Unreachable::Port).unwrap();
    assert_eq!(edit.finish(), whole.finish(), "the checksums of the error are whole");
}

#[test]
fn updated_checksum_matches_rfc_1624() {
    // The example of RFC 1624, section 4: the checksum 0xdd2f becomes 0x0000 when the word 0x5555
    // becomes 0x3285.
    let new = checksum::adjusted([0xdd, 0x2f], &[0x55, 0x55], &[0x32, 0x85], Transport::Tcp);
    assert_eq!(new, [0, 0]);
}
