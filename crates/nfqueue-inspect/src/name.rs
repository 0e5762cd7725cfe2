//! Names of hosts, and what a parser says of the bytes it has so far.

use std::fmt;

/// The name of a host, as a client has written it, in lower case and without a dot at the end.
///
/// It consists of labels of letters, digits, `-` and `_`, with dots between them; a label has up to
/// 63 characters and the name up to 253. Names in other alphabets are in Punycode (`xn--`). An IP
/// address is a name as well: `[2001:db8::1]` in HTTP has its brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name(String);

impl Name {
    /// The name of these bytes. `None` if they are none: empty, too long, not ASCII, or with other
    /// characters.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        if let Some(address) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
            // In one form only, so that names can be compared.
            let address: std::net::Ipv6Addr = address.parse().ok()?;
            return Some(Self(format!("[{address}]")));
        }
        let text = text.strip_suffix('.').unwrap_or(text);
        let is_label = |label: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(allowed)
        };
        (text.len() <= 253 && text.split('.').all(is_label)).then(|| Self(text.to_ascii_lowercase()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is `domain` or a name below it: `www.example.com` is in `example.com`, and
    /// `badexample.com` is not. Case and a dot at the end of `domain` do not matter.
    ///
    /// ```
    /// # use nfqueue_inspect::Name;
    /// let name = Name::new(b"WWW.Example.COM.").expect("a name");
    /// assert_eq!(name.as_str(), "www.example.com");
    /// assert!(name.is_in("example.com") && name.is_in("www.example.com."));
    /// assert!(!name.is_in("ample.com"));
    /// ```
    pub fn is_in(&self, domain: &str) -> bool {
        let domain = domain.strip_suffix('.').unwrap_or(domain);
        let Some(at) = self.0.len().checked_sub(domain.len()) else { return false };
        let (before, end) = self.0.as_bytes().split_at(at);
        end.eq_ignore_ascii_case(domain.as_bytes()) && (before.is_empty() || before.ends_with(b"."))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a parser says of the first bytes of a client.
///
/// It depends on the bytes alone, and once it is not [`NeedMore`](Self::NeedMore), more bytes do
/// not change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed<T> {
    /// The bytes so far are the beginning of a message.
    NeedMore,
    /// The message is complete.
    Found(T),
    /// The bytes are of another protocol.
    OtherProtocol,
    /// The bytes are of this protocol, but what they say cannot be trusted: a server may read them
    /// in another way, or not at all. A filter that looks for names should deny these.
    Unreadable(Fault),
}

/// Why a message cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// A length or a field contradicts another.
    Malformed,
    /// More than one name, or the same name more than once.
    SeveralNames,
    /// What stands for the name is none: characters or a length that names do not have.
    BadName,
    /// Longer than [`tls::MOST`](crate::tls::MOST), or in too many pieces.
    TooLong,
    /// HTTP/2 without TLS. Its names are compressed, and not read here.
    Http2,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "malformed",
            Self::SeveralNames => "more than one name",
            Self::BadName => "not a name",
            Self::TooLong => "too long",
            Self::Http2 => "HTTP/2 without TLS",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_in_lower_case_and_without_a_dot_at_the_end() {
        assert_eq!(Name::new(b"Bad.Example.").unwrap().as_str(), "bad.example");
        assert_eq!(Name::new(b"[2001:DB8:0::1]").unwrap().as_str(), "[2001:db8::1]");
        assert_eq!(Name::new(b"_x-1.192.0.2.1").unwrap().to_string(), "_x-1.192.0.2.1");
    }

    #[test]
    fn what_no_host_is_called_is_no_name() {
        let long = "a".repeat(64);
        let longer = ["abcdefghi"; 26].join(".");
        for bytes in
            ["", ".", "a..b", ".a", "a..", "a b", "a\0", "a\0.b", "é", "a/b", "*.a", "[::1", "[a]", &long, &longer]
        {
            assert_eq!(Name::new(bytes.as_bytes()), None, "{bytes}");
        }
        assert_eq!(Name::new(b"\xff"), None);
    }
}
