//! What comes from other processes and from files: records of a hand-over, capture files.

use std::{fs::File, io::Write, os::fd::OwnedFd};

use rustix::fs::MemfdFlags;

use nfqueue_divert::Divert;
use nfqueue_proto::{
    record::{Record, check_header, header},
    types::ErrorKind,
};
use tokio_nfqueue::{handover::Takeover, simulated::TestPacket};

/// Decodes the bytes as a record, and as what follows the first bytes of one.
pub fn records(data: &[u8]) {
    decode_table(data);
    record(data);
    record(&[&header()[..], data].concat());
}

fn record(bytes: &[u8]) {
    let decoded = Record::decode(bytes);
    if let Ok(record) = &decoded {
        assert!(check_header(bytes).is_ok());
        assert_eq!(record.encode(), bytes, "a record has one encoding");
        record.parts.iter().for_each(|part| _ = decode_table(&part.body));
    }
    // As a successor gets it: without the sockets it describes.
    let described = decoded.is_ok_and(|record| record.queues.is_empty() && record.parts.is_empty());
    match Takeover::from_descriptors(vec![in_memory(bytes)]) {
        Ok(_) => assert!(described),
        Err(error) => {
            assert!(!described, "{error}");
            assert!(matches!(error.kind(), ErrorKind::Malformed | ErrorKind::Incompatible), "{error}");
        }
    }
}

/// Decodes the description of a table. Returns whether it is one.
pub(crate) fn decode_table(description: &[u8]) -> bool {
    // Not the socket of a table, so that none is made.
    let error = Divert::adopt(in_memory(&[]), description).expect_err("a file is no socket");
    error.kind() != ErrorKind::Malformed
}

fn in_memory(bytes: &[u8]) -> OwnedFd {
    let descriptor = rustix::fs::memfd_create("fuzzing", MemfdFlags::CLOEXEC).expect("a descriptor is free");
    let mut file = File::from(descriptor);
    file.write_all(bytes).expect("memory is free");
    file.into()
}

/// Parses the bytes as a capture file.
pub fn captures(data: &[u8]) {
    if let Ok(packets) = TestPacket::from_pcap_bytes(data.to_vec()) {
        assert!(packets.len() <= data.len() / 16);
        assert!(packets.iter().all(|packet| matches!(packet.payload().first().map(|first| first >> 4), Some(4 | 6))));
        assert!(packets.iter().map(|packet| packet.payload().len()).sum::<usize>() <= data.len());
    }
}
