//! The server's name in a TLS ClientHello (RFC 8446, RFC 6066).

use crate::{
    name::{Fault, Name, Parsed},
    reader::Reader,
};

/// The longest ClientHello that is read, in bytes. rustls has the same limit.
pub const MOST: usize = 0xffff;

/// What a ClientHello says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hello {
    /// The server's name. `None` if the client has not sent the extension.
    pub name: Option<Name>,
    /// The extension `encrypted_client_hello` is present (RFC 9849). Then the true name may be
    /// encrypted, and [`name`](Self::name) is that of the provider. Browsers also send the
    /// extension with random content (GREASE) when they have no key of the server, so its presence
    /// proves nothing.
    pub encrypted_hello: bool,
}

/// The server's name in the first bytes of a client, which are TLS records.
///
/// The ClientHello may be split over any number of records. Only the first one is read. After a
/// HelloRetryRequest the client sends another one, which must have the same name; some servers do
/// not check that. [`ServerNames`](crate::ServerNames) reads both.
///
/// ```
/// use nfqueue_inspect::{Parsed, tls};
///
/// assert_eq!(tls::server_name(&[22, 3, 1, 0, 200, 1]), Parsed::NeedMore);
/// assert_eq!(tls::server_name(b"GET / HTTP/1.1\r\n"), Parsed::OtherProtocol);
/// ```
pub fn server_name(stream: &[u8]) -> Parsed<Hello> {
    let mut records = Reader::new(stream);
    let mut hello = Vec::new();
    // An SSL 2.0 hello has no name, and begins in another way.
    match stream {
        [] | [20..=24] => return Parsed::NeedMore,
        [22, 3, ..] => {}
        // Some servers skip alerts or ChangeCipherSpec before the hello, or take it in records of
        // other versions: crypto/tls of Go below 16.0, GnuTLS.
        [20..=24, 0..16, ..] => return Parsed::Unreadable(Fault::Malformed),
        _ => return Parsed::OtherProtocol,
    }
    loop {
        match records.rest() {
            [] | [22] | [22, 3] | [22, 3, _] | [22, 3, _, _] => return Parsed::NeedMore,
            [22, 3, ..] => records.take(3),
            // An alert, or data, before the hello is complete.
            _ => return Parsed::Unreadable(Fault::Malformed),
        };
        let Some(length) = records.short().map(usize::from) else { return Parsed::NeedMore };
        // RFC 8446, section 5.1.
        if length == 0 || length > 1 << 14 {
            return Parsed::Unreadable(Fault::Malformed);
        }
        let present = records.rest().len().min(length);
        hello.extend_from_slice(records.take(present).unwrap_or_default());
        match client_hello(&hello) {
            Parsed::NeedMore if present == length => {}
            parsed => return parsed,
        }
    }
}

/// The name in the second ClientHello of a client, which the server has asked for. Between the two
/// there may be records of other types: ChangeCipherSpec, and early data that the server skips.
pub(crate) fn second_server_name(stream: &[u8]) -> Parsed<Hello> {
    client_hello(&behind_hello(stream))
}

/// What handshake records carry behind the first ClientHello, which is complete.
pub(crate) fn behind_hello(stream: &[u8]) -> Vec<u8> {
    let mut records = Reader::new(stream);
    let mut messages = Vec::new();
    while let Some(kind) = records.byte() {
        let Some(length) = records.take(2).and_then(|_| records.short()) else { break };
        let present = records.rest().len().min(length.into());
        let content = records.take(present).unwrap_or_default();
        if kind == 22 {
            messages.extend_from_slice(content);
        }
    }
    let first = length(&messages).min(messages.len());
    messages.split_off(first)
}

/// How many bytes of a server show that it asks for a second hello: the header of a record, that of
/// a ServerHello, its version, and its random bytes.
pub(crate) const RETRY_REQUEST: usize = 43;

/// Whether this byte of a server is that of a HelloRetryRequest. `None`: it comes behind.
pub(crate) fn in_retry_request(at: usize, byte: u8) -> Option<bool> {
    // RFC 8446, section 4.1.3: the SHA-256 of "HelloRetryRequest".
    const RANDOM: [u8; 32] = [
        0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2, 0xa2,
        0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
    ];
    match at {
        0 => Some(byte == 22),
        1 => Some(byte == 3),
        5 => Some(byte == 2),
        2..11 => Some(true),
        _ => RANDOM.get(at - 11).map(|known| *known == byte),
    }
}

/// The server's name in a ClientHello without records, as QUIC sends it.
pub fn client_hello(bytes: &[u8]) -> Parsed<Hello> {
    let mut reader = Reader::new(bytes);
    match reader.byte() {
        None => return Parsed::NeedMore,
        Some(1) => {}
        Some(_) => return Parsed::Unreadable(Fault::Malformed),
    }
    let Some(length) = reader.medium() else { return Parsed::NeedMore };
    if length as usize > MOST - 4 {
        return Parsed::Unreadable(Fault::TooLong);
    }
    let Some(body) = reader.take(length as usize) else { return Parsed::NeedMore };
    match body_of_hello(Reader::new(body)) {
        Ok(hello) => Parsed::Found(hello),
        Err(fault) => Parsed::Unreadable(fault),
    }
}

/// How long a complete ClientHello is, with its header.
pub(crate) fn length(hello: &[u8]) -> usize {
    let mut header = Reader::new(hello);
    header.byte().and_then(|_| header.medium()).map_or(0, |length| length as usize) + 4
}

fn body_of_hello(mut body: Reader<'_>) -> Result<Hello, Fault> {
    let mut extensions = (|| {
        // The version and the random bytes.
        body.take(2 + 32)?;
        let session = body.bytes_of_byte()?;
        let suites = body.bytes_of_short()?.rest().len();
        let methods = body.bytes_of_byte()?.rest().len();
        if session.rest().len() > 32 || suites < 2 || suites % 2 != 0 || methods == 0 {
            return None;
        }
        if body.is_empty() {
            return Some(body);
        }
        let extensions = body.bytes_of_short()?;
        body.is_empty().then_some(extensions)
    })()
    .ok_or(Fault::Malformed)?;
    let mut hello = Hello { name: None, encrypted_hello: false };
    while !extensions.is_empty() {
        let kind = extensions.short().ok_or(Fault::Malformed)?;
        let content = extensions.bytes_of_short().ok_or(Fault::Malformed)?;
        match kind {
            0 if hello.name.is_some() => return Err(Fault::SeveralNames),
            0 => hello.name = Some(name_of_extension(content)?),
            0xfe0d => hello.encrypted_hello = true,
            _ => {}
        }
    }
    Ok(hello)
}

/// RFC 6066, section 3: a list with at most one name of each type, and there is one type.
fn name_of_extension(mut content: Reader<'_>) -> Result<Name, Fault> {
    let mut list = content.bytes_of_short().filter(|_| content.is_empty()).ok_or(Fault::Malformed)?;
    let kind = list.byte().ok_or(Fault::Malformed)?;
    let name = list.bytes_of_short().ok_or(Fault::Malformed)?;
    if kind != 0 {
        return Err(Fault::Malformed);
    }
    if !list.is_empty() {
        return Err(Fault::SeveralNames);
    }
    Name::new(name.rest()).ok_or(Fault::BadName)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_messages::{client_hello as hello, extension, hello_with, records};

    fn found(parsed: Parsed<Hello>) -> (Option<String>, bool) {
        match parsed {
            Parsed::Found(hello) => (hello.name.map(|name| name.to_string()), hello.encrypted_hello),
            other => panic!("{other:?}"),
        }
    }

    fn with_names(content: &[u8]) -> Parsed<Hello> {
        client_hello(&hello_with(&[(0, content.to_vec())]))
    }

    #[test]
    fn a_hello_is_read_however_it_is_split_over_records_and_segments() {
        let hello = hello("Www.Example.COM.");
        for length in [1, 2, 3, 5, 40, hello.len()] {
            let stream = records(&hello, length);
            for end in 0..stream.len() {
                assert_eq!(server_name(&stream[..end]), Parsed::NeedMore, "{length} {end}");
            }
            assert_eq!(found(server_name(&stream)), (Some("www.example.com".into()), false));
            // What follows does not matter.
            assert_eq!(server_name(&[&stream[..], &[0xff; 9]].concat()), server_name(&stream));
        }
    }

    #[test]
    fn a_hello_without_a_name_is_told_from_other_protocols() {
        assert_eq!(found(client_hello(&hello_with(&[]))), (None, false));
        assert_eq!(found(client_hello(&hello_with(&[(16, vec![0, 0]), (0x1a1a, vec![1])]))), (None, false));
        // Without the length of the extensions, as in TLS 1.0.
        let mut old = hello_with(&[]);
        old.truncate(old.len() - 2);
        old[3] -= 2;
        assert_eq!(found(client_hello(&old)), (None, false));
        for bytes in [&b"GET / HTTP/1.1"[..], b"\x80\x2e\x01\x03\x01", b"\x16\x10", b"SSH-2.0", b"\0"] {
            assert_eq!(server_name(bytes), Parsed::OtherProtocol);
        }
    }

    #[test]
    fn the_presence_of_an_encrypted_hello_is_reported() {
        let hello = hello_with(&[(0xfe0d, vec![0; 40]), extension(b"public.example")]);
        assert_eq!(found(client_hello(&hello)), (Some("public.example".into()), true));
    }

    #[test]
    fn more_than_one_name_is_unreadable() {
        let several = Parsed::Unreadable(Fault::SeveralNames);
        assert_eq!(client_hello(&hello_with(&[extension(b"a.example"), extension(b"b.example")])), several);
        assert_eq!(with_names(b"\0\x08\0\0\x01a\0\0\x01b"), several);
    }

    #[test]
    fn names_that_servers_read_in_different_ways_are_unreadable() {
        for name in [&b""[..], b"a\0.b", b"caf\xc3\xa9.example", b"a b", b"a..b", &[b'a'; 300]] {
            assert_eq!(client_hello(&hello_with(&[extension(name)])), Parsed::Unreadable(Fault::BadName));
        }
    }

    #[test]
    fn lengths_that_contradict_each_other_are_unreadable() {
        let malformed = Parsed::Unreadable(Fault::Malformed);
        // An empty list, a list longer or shorter than the extension, another type, a name beyond
        // it.
        let contents = [&b""[..], b"\0", b"\0\0", b"\0\x05\0\0\x01a", b"\0\x04\0\0\x01a!", b"\0\x04\x01\0\x01a"];
        for content in contents.into_iter().chain([&b"\0\x04\0\0\x02a"[..], b"\0\x03\0\0"]) {
            assert_eq!(with_names(content), malformed, "{content:?}");
        }
        let good = hello("a.example");
        // The hello's length is one less, so that its last extension is cut.
        let mut short = good.clone();
        short[3] -= 1;
        assert_eq!(client_hello(&short), malformed);
        // The lengths of the session ID, the cipher suites and the compression methods.
        for (at, value) in [(38, 33), (38, 200), (40, 3), (40, 0), (45, 0), (45, 200)] {
            let mut wrong = good.clone();
            wrong[at] = value;
            assert_eq!(client_hello(&wrong), malformed, "{at}");
        }
        // No handshake message, an empty record, a record that is too long, an alert in the middle.
        assert_eq!(server_name(&records(&[2, 0, 0, 0], 4)), malformed);
        assert_eq!(server_name(&[22, 3, 1, 0, 0]), malformed);
        assert_eq!(server_name(&[22, 3, 1, 0x40, 1]), malformed);
        assert_eq!(server_name(&[&records(&good[..20], 20)[..], &[21, 3, 3, 0, 2, 1, 0]].concat()), malformed);
    }

    #[test]
    fn records_that_some_servers_skip_before_a_hello_are_unreadable() {
        let hello = hello("a.example");
        let alert: &[u8] = &[21, 3, 1, 0, 2, 1, 90];
        let change: &[u8] = &[20, 3, 3, 0, 1, 1];
        for first in [alert, change, &[21, 0, 0, 0, 2, 1, 0], &[23, 3, 3, 0, 0], &[24, 3, 3, 0, 0]] {
            let stream = [first, &records(&hello, hello.len())].concat();
            assert_eq!(server_name(&stream[..1]), Parsed::NeedMore);
            for end in 2..stream.len() {
                assert_eq!(server_name(&stream[..end]), Parsed::Unreadable(Fault::Malformed), "{first:?} {end}");
            }
        }
        // Records of a version before SSL 3.0, or of one that does not exist yet.
        for major in [0, 1, 2, 4, 15] {
            let mut stream = records(&hello, hello.len());
            stream[1] = major;
            assert_eq!(server_name(&stream), Parsed::Unreadable(Fault::Malformed), "{major}");
        }
    }

    #[test]
    fn a_hello_that_is_longer_than_any_is_not_waited_for() {
        assert_eq!(client_hello(&[1, 1, 0, 0]), Parsed::Unreadable(Fault::TooLong));
        assert_eq!(client_hello(&[1, 0, 0xff, 0xfc]), Parsed::Unreadable(Fault::TooLong));
        assert_eq!(client_hello(&[1, 0, 0xff, 0xfb]), Parsed::NeedMore);
    }
}
