//! The host of the first request of an HTTP/1 client (RFC 9112).

use crate::name::{Fault, Name, Parsed};

/// What the head of a request says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Head {
    /// The host: that of the header `Host`, or of the target (`GET http://host/`, `CONNECT
    /// host:443`). `None` if the request names none.
    pub host: Option<Name>,
    /// The port behind the host, if there is one.
    pub port: Option<u16>,
}

/// The methods of RFC 9110 and RFC 5789.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// The host in the first bytes of a client.
///
/// It is found when the head of the request is complete: before its end, there may be another
/// `Host`. What servers read in different ways is [`Unreadable`](Parsed::Unreadable): more than one
/// name, in headers or in header and target, even if they are equal; a header that continues on the
/// next line, or has a space before its colon; control characters.
///
/// Only the first request is read. Others follow on the same connection, with other hosts: a filter
/// for names of HTTP must know that, see the documentation of the crate.
///
/// ```
/// use nfqueue_inspect::{Parsed, http};
///
/// let request = b"GET / HTTP/1.1\r\nHost: Example.com:8080\r\n\r\n";
/// let Parsed::Found(head) = http::host(request) else { panic!() };
/// assert_eq!(head.host.as_ref().map(|name| name.as_str()), Some("example.com"));
/// assert_eq!(head.port, Some(8080));
/// ```
pub fn host(stream: &[u8]) -> Parsed<Head> {
    // Servers skip empty lines before the request (RFC 9112, section 2.2), and some skip more.
    let skipped = stream.iter().position(|byte| !is_space(*byte)).unwrap_or(stream.len());
    let skips_spaces = stream[..skipped].iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
    let mut rest = &stream[skipped..];
    let Some(length) = rest.iter().position(|byte| !is_token(*byte)) else { return Parsed::NeedMore };
    if length == 0 || !is_space(rest[length]) {
        return Parsed::OtherProtocol;
    }
    let method = &rest[..length];
    let line = match next_line(&mut rest) {
        None => return Parsed::NeedMore,
        Some(Ok(line)) if !skips_spaces => line,
        // Servers may divide these lines in different ways.
        Some(Ok(line) | Err(line)) if looks_like_http(method, line) => return Parsed::Unreadable(Fault::Malformed),
        Some(_) => return Parsed::OtherProtocol,
    };
    let mut head = Head { host: None, port: None };
    match request_line(method, line) {
        Ok(Some(authority)) => match host_and_port(authority) {
            Some(found) => head = found,
            None => return Parsed::Unreadable(Fault::BadName),
        },
        Ok(None) => {}
        Err(parsed) => return parsed,
    }
    let from_target = head.host.is_some();
    let mut hosts = 0;
    loop {
        let line = match next_line(&mut rest) {
            None => return Parsed::NeedMore,
            Some(Err(_)) => return Parsed::Unreadable(Fault::Malformed),
            Some(Ok(line)) => line,
        };
        if line.is_empty() {
            return Parsed::Found(head);
        }
        let (name, value) = match header(line) {
            Ok(header) => header,
            Err(fault) => return Parsed::Unreadable(fault),
        };
        if !name.eq_ignore_ascii_case(b"host") {
            continue;
        }
        hosts += 1;
        if hosts > 1 {
            return Parsed::Unreadable(Fault::SeveralNames);
        }
        let found = if value.is_empty() { Some(Head { host: None, port: None }) } else { host_and_port(value) };
        match found {
            None => return Parsed::Unreadable(Fault::BadName),
            // RFC 9112, section 3.2.2: the target counts. Not all servers do that.
            Some(found) if from_target && found.host != head.host => return Parsed::Unreadable(Fault::SeveralNames),
            Some(_) if from_target => {}
            Some(found) => head = found,
        }
    }
}

/// The next line, without its end. `None`: it is not complete. `Err`: it has control characters.
/// Some servers accept a line that ends without CR.
fn next_line<'a>(rest: &mut &'a [u8]) -> Option<Result<&'a [u8], &'a [u8]>> {
    let at = rest.iter().position(|byte| *byte == b'\n')?;
    let (line, after) = rest.split_at(at);
    *rest = &after[1..];
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    // A CR in a line is the end of a line for some servers.
    let is_wrong = |byte: u8| (byte < b' ' && byte != b'\t') || byte == 0x7f;
    Some(if line.iter().any(|byte| is_wrong(*byte)) { Err(line) } else { Ok(line) })
}

/// Whether a line is a request, or some servers may take it for one.
fn looks_like_http(method: &[u8], line: &[u8]) -> bool {
    METHODS.iter().any(|known| method.eq_ignore_ascii_case(known.as_bytes()))
        || line.windows(5).any(|bytes| bytes.eq_ignore_ascii_case(b"HTTP/"))
}

/// The authority in a request line, if its target has one.
fn request_line<'a>(method: &[u8], line: &'a [u8]) -> Result<Option<&'a [u8]>, Parsed<Head>> {
    let malformed = Err(Parsed::Unreadable(Fault::Malformed));
    if !looks_like_http(method, line) {
        return Err(Parsed::OtherProtocol);
    }
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(_), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return malformed;
    };
    match version {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0' | b'1'] => {}
        b"HTTP/2.0" if method == b"PRI" => return Err(Parsed::Unreadable(Fault::Http2)),
        _ => return malformed,
    }
    if target.contains(&b'\t') {
        return malformed;
    }
    if method.eq_ignore_ascii_case(b"CONNECT") {
        return Ok(Some(target));
    }
    if target.starts_with(b"/") || target == b"*" {
        return Ok(None);
    }
    // scheme://authority/path?query
    let scheme = target.iter().position(|byte| !byte.is_ascii_alphanumeric()).unwrap_or_default();
    match target[scheme..].strip_prefix(b"://") {
        Some(rest) if scheme > 0 => {
            let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#' | b'\\')).unwrap_or(rest.len());
            Ok(Some(&rest[..end]))
        }
        _ => malformed,
    }
}

fn header(line: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    let at = line.iter().position(|byte| *byte == b':').ok_or(Fault::Malformed)?;
    let (name, value) = (&line[..at], line[at + 1..].trim_ascii());
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) { Err(Fault::Malformed) } else { Ok((name, value)) }
}

fn host_and_port(authority: &[u8]) -> Option<Head> {
    let (host, port) = match authority.iter().rposition(|byte| *byte == b':') {
        Some(at) if !authority[at..].contains(&b']') => (&authority[..at], Some(&authority[at + 1..])),
        _ => (authority, None),
    };
    let port = match port {
        // "host:" is a host without a port.
        None | Some([]) => None,
        Some(digits) if digits.iter().all(u8::is_ascii_digit) => Some(std::str::from_utf8(digits).ok()?.parse().ok()?),
        Some(_) => return None,
    };
    Some(Head { host: Some(Name::new(host)?), port })
}

/// What separates words, for one server or another.
fn is_space(byte: u8) -> bool {
    matches!(byte, 9..=13 | 28..=32)
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(stream: &[u8]) -> (Option<String>, Option<u16>) {
        for end in 0..stream.len() {
            assert_eq!(host(&stream[..end]), Parsed::NeedMore, "{end} of {}", stream.escape_ascii());
        }
        match host(stream) {
            Parsed::Found(head) => (head.host.map(|name| name.to_string()), head.port),
            other => panic!("{other:?}: {}", stream.escape_ascii()),
        }
    }

    fn named(name: &str, port: Option<u16>) -> (Option<String>, Option<u16>) {
        (Some(name.into()), port)
    }

    #[test]
    fn the_host_is_found_at_the_end_of_the_head_and_not_before() {
        assert_eq!(found(b"GET / HTTP/1.1\r\nA: b\r\nhOST:\tBad.Example. \r\n\r\n"), named("bad.example", None));
        assert_eq!(found(b"POST /x?http://y HTTP/1.0\nHost: a:81\n\n"), named("a", Some(81)));
        assert_eq!(found(b"\r\n\nX-own / HTTP/1.1\r\nHost: [::1]:8\r\n\r\n"), named("[::1]", Some(8)));
        assert_eq!(found(b"GET / HTTP/1.0\r\n\r\n"), (None, None));
        assert_eq!(found(b"OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n"), (None, None));
    }

    #[test]
    fn a_target_with_a_host_is_read() {
        assert_eq!(found(b"GET http://a.b:8/x HTTP/1.1\r\nHost: a.b\r\n\r\n"), named("a.b", Some(8)));
        assert_eq!(found(b"GET HTTP://a.b?x HTTP/1.0\r\n\r\n"), named("a.b", None));
        assert_eq!(found(b"CONNECT a.b:443 HTTP/1.1\r\nHost: a.b:443\r\n\r\n"), named("a.b", Some(443)));
    }

    #[test]
    fn more_than_one_name_is_unreadable() {
        for stream in [
            &b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            b"GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n",
            b"CONNECT a:1 HTTP/1.1\r\nHost: b:1\r\n\r\n",
        ] {
            assert_eq!(host(stream), Parsed::Unreadable(Fault::SeveralNames), "{}", stream.escape_ascii());
        }
    }

    #[test]
    fn what_servers_read_in_different_ways_is_unreadable() {
        for stream in [
            &b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nA: b\r\n Host: a\r\n\r\n",
            b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\rHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost\r\n\r\n",
            b"GET /\r\n",
            b"GET\r\n",
            b"get /  HTTP/1.1\r\n",
            b"GET\t/ HTTP/1.1\r\n",
            b"GET /\t HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"\x1fGET / HTTP/1.1\r\n",
            b"GET / HTTP/2.0\r\n",
            b"GET / http/1.1\r\n",
            b"GET a/ HTTP/1.1\r\n",
            b"GET ://a/ HTTP/1.1\r\n",
        ] {
            assert_eq!(host(stream), Parsed::Unreadable(Fault::Malformed), "{}", stream.escape_ascii());
        }
        for host_header in [&b"a b"[..], b"a,b", b"u@a", b"a:x", b"a:99999", b"::1", b"\xff", b"a/b"] {
            let stream = [b"GET / HTTP/1.1\r\nHost: ", host_header, b"\r\n\r\n"].concat();
            assert_eq!(host(&stream), Parsed::Unreadable(Fault::BadName), "{}", stream.escape_ascii());
        }
        assert_eq!(host(b"GET http://u@a/ HTTP/1.1\r\n"), Parsed::Unreadable(Fault::BadName));
    }

    #[test]
    fn http_2_without_tls_is_reported() {
        assert_eq!(host(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Parsed::Unreadable(Fault::Http2));
    }

    #[test]
    fn other_protocols_are_told_apart_as_early_as_possible() {
        for stream in
            [&b"\x16\x03"[..], b"\0", b"SSH-2.0-x\r\n", b"SSH-2.0-x y\r\n", b"USER me\r\n", b"\x80GET / HTTP/1.1"]
        {
            assert_eq!(host(stream), Parsed::OtherProtocol, "{}", stream.escape_ascii());
        }
        assert_eq!(host(b"USER me"), Parsed::NeedMore);
        assert_eq!(host(&[b'A'; 5000]), Parsed::NeedMore);
    }
}
