//! The protection of Initial packets, whose keys everybody can compute (RFC 9001, section 5).

use aes_gcm::{
    AeadInOut, Aes128Gcm, KeyInit,
    aes::{Aes128, cipher::BlockCipherEncrypt},
};
use hkdf::Hkdf;
use sha2::Sha256;

use super::packet::{Initial, Version};

/// The keys of a client's Initial packets.
pub(super) struct Keys {
    aead: Aes128Gcm,
    iv: [u8; 12],
    header: Aes128,
}

/// An Initial packet without its protection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) number: u64,
    pub(super) frames: Vec<u8>,
}

const TAG: usize = 16;

impl Keys {
    /// The keys that follow from the Destination Connection ID in the first packet of the client.
    pub(super) fn of_client(version: Version, connection_id: &[u8]) -> Self {
        // RFC 9001, section 5.2; RFC 9369, section 3.3.
        let (salt, labels) = match version {
            Version::V1 => (
                b"\x38\x76\x2c\xf7\xf5\x59\x34\xb3\x4d\x17\x9a\xe6\xa4\xc8\x0c\xad\xcc\xbb\x7f\x0a",
                ["quic key", "quic iv", "quic hp"],
            ),
            Version::V2 => (
                b"\x0d\xed\xe3\xde\xf7\x00\xa6\xdb\x81\x93\x81\xbe\x6e\x26\x9d\xcb\xf9\xbd\x2e\xd9",
                ["quicv2 key", "quicv2 iv", "quicv2 hp"],
            ),
        };
        let secret: [u8; 32] = expand(&Hkdf::new(Some(salt), connection_id), "client in");
        let secret = Hkdf::from_prk(&secret).expect("the secret is as long as the hash");
        let (key, header): ([u8; 16], [u8; 16]) = (expand(&secret, labels[0]), expand(&secret, labels[2]));
        Self { aead: Aes128Gcm::new(&key.into()), iv: expand(&secret, labels[1]), header: Aes128::new(&header.into()) }
    }

    /// Removes the protection. `None`: the packet is not protected with these keys.
    ///
    /// `largest` is the largest packet number that may have reached the server. A packet of which
    /// the server could restore another number than this is refused: it can be made to have two
    /// contents.
    pub(super) fn open(&self, packet: &Initial<'_>, largest: Option<u64>) -> Option<Opened> {
        let mask = self.mask(packet.protected)?;
        let first = packet.header[0] ^ (mask[0] & 0x0f);
        let length = usize::from(first & 3) + 1;
        let (number, body) = packet.protected.split_at_checked(length)?;
        let mut header = packet.header.to_vec();
        header[0] = first;
        header.extend(number.iter().zip(&mask[1..]).map(|(byte, mask)| byte ^ mask));
        let truncated = header[packet.header.len()..].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        let number = restore(truncated, length, 0);
        if largest.is_some_and(|largest| restore(truncated, length, largest + 1) != number) {
            return None;
        }
        let (frames, tag) = body.split_at_checked(body.len().checked_sub(TAG)?)?;
        let tag: [u8; TAG] = tag.try_into().ok()?;
        let mut frames = frames.to_vec();
        let opened = self.aead.decrypt_inout_detached(
            &self.nonce(number).into(),
            &header,
            frames.as_mut_slice().into(),
            &tag.into(),
        );
        opened.is_ok().then_some(Opened { number, frames })
    }

    /// RFC 9001, section 5.4. The sample is taken as if the packet number had four bytes.
    fn mask(&self, protected: &[u8]) -> Option<[u8; 16]> {
        let sample: [u8; 16] = protected.get(4..20)?.try_into().ok()?;
        let mut block = sample.into();
        self.header.encrypt_block(&mut block);
        Some(block.into())
    }

    fn nonce(&self, number: u64) -> [u8; 12] {
        let mut nonce = self.iv;
        nonce[4..].iter_mut().zip(number.to_be_bytes()).for_each(|(byte, number)| *byte ^= number);
        nonce
    }

    /// A packet with this header, which ends with a packet number of `length` bytes.
    pub(super) fn seal(&self, mut header: Vec<u8>, length: usize, frames: &[u8]) -> Vec<u8> {
        let at = header.len() - length;
        let number = header[at..].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        let mut body = frames.to_vec();
        let nonce = self.nonce(number).into();
        let tag = self.aead.encrypt_inout_detached(&nonce, &header, body.as_mut_slice().into()).expect("short");
        body.extend_from_slice(&tag);
        header.extend_from_slice(&body);
        let mask = self.mask(&header[at..]).expect("long enough");
        header[0] ^= mask[0] & 0x0f;
        header[at..at + length].iter_mut().zip(&mask[1..]).for_each(|(byte, mask)| *byte ^= mask);
        header
    }
}

/// HKDF-Expand-Label of RFC 8446, section 7.1, without context.
fn expand<const N: usize>(secret: &Hkdf<Sha256>, label: &str) -> [u8; N] {
    let length = [0, N as u8, label.len() as u8 + 6];
    let mut output = [0; N];
    let parts = [&length[..], b"tls13 ", label.as_bytes(), &[0]];
    secret.expand_multi_info(&parts, &mut output).expect("shorter than 255 hashes");
    output
}

/// The packet number that ends with these bytes and is closest to the expected one: RFC 9000,
/// section A.3.
fn restore(truncated: u64, length: usize, expected: u64) -> u64 {
    let window = 1 << (8 * length);
    let candidate = (expected & !(window - 1)) | truncated;
    if candidate + window / 2 <= expected && candidate < (1 << 62) - window {
        candidate + window
    } else if candidate > expected + window / 2 && candidate >= window {
        candidate - window
    } else {
        candidate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quic::tests::{HELLO_OF_RFC, hex};

    /// RFC 9001 and RFC 9369, sections A.1 and A.2. The payload has 1162 bytes. The tag at the end
    /// authenticates all others.
    fn check(version: Version, header: &str, begin: &str, end: &str, key: &str, iv: &str) {
        let keys = Keys::of_client(version, &hex("8394c8f03e515708"));
        assert_eq!(keys.iv[..], hex(iv)[..]);
        let mut frames = [hex("060040f1"), hex(HELLO_OF_RFC)].concat();
        frames.resize(1162, 0);
        let packet = keys.seal(hex(header), 4, &frames);
        assert!(packet.starts_with(&hex(begin)) && packet.ends_with(&hex(end)));
        assert_eq!(packet.len(), 1200);
        let same = Aes128Gcm::new_from_slice(&hex(key)).unwrap();
        let mut body = packet[22..1184].to_vec();
        let tag: [u8; 16] = packet[1184..].try_into().unwrap();
        let nonce = keys.nonce(2).into();
        same.decrypt_inout_detached(&nonce, &hex(header), body.as_mut_slice().into(), &tag.into()).unwrap();
        assert_eq!(body, frames);
        let initial = Initial { version, connection_id: &[], header: &packet[..18], protected: &packet[18..] };
        assert_eq!(keys.open(&initial, None), Some(Opened { number: 2, frames }));
        for changed in [0, 17, 18, 30, 1199] {
            let mut packet = packet.clone();
            packet[changed] ^= 1;
            let initial = Initial { version, connection_id: &[], header: &packet[..18], protected: &packet[18..] };
            assert_eq!(keys.open(&initial, None), None, "{changed}");
        }
    }

    #[test]
    fn the_vectors_of_rfc_9001_are_sealed_and_opened() {
        check(
            Version::V1,
            "c300000001088394c8f03e5157080000449e00000002",
            "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11",
            "e221af44860018ab0856972e194cd934",
            "1f369613dd76d5467730efcbe3b1a22d",
            "fa044b2f42a3fd3b46fb255c",
        );
    }

    #[test]
    fn the_vectors_of_rfc_9369_are_sealed_and_opened() {
        check(
            Version::V2,
            "d36b3343cf088394c8f03e5157080000449e00000002",
            "d76b3343cf088394c8f03e5157080000449ea0c95e82ffe67b6abcdb4298b485",
            "9a37ddec600545473cfb5a05e08d0b209973b2172b4d21fb69745a262ccde96ba18b2faa745b6fe189cf772a9f84cbfc",
            "8b1a0bc121284290a29e0971b5cd045d",
            "91f73e2351d8fa91660e909f",
        );
    }

    #[test]
    fn packet_numbers_are_restored_as_in_rfc_9000() {
        assert_eq!(restore(0x9b32, 2, 0xa82f_30ea + 1), 0xa82f_9b32);
        assert_eq!(restore(2, 1, 255), 258);
        assert_eq!(restore(2, 1, 0), 2);
        assert_eq!(restore(0xff, 1, 0x100), 0xff);
    }
}
